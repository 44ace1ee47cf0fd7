"""Contrastive views of CT: several random looks at one place in one scan.

    views = ViewDataset(crops, view_policy("simclr"))
    for batch in ViewLoader(views, batch_size=16, num_workers=4, device="cuda"):
        first, second = batch.views                      # [B, 1, D, H, W] each

Positives are views of one sample, and a sample is a place in one scan of the records that `crops`
draws from: give it the training half of `split_patients` and no other patient appears.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from medspark.data.crops import CropDataset
from medspark.data.reader import VolumeReader
from medspark.data.store import Record
from medspark.data.views_draw import Shot, draw_shots
from medspark.data.views_frame import Frame, frame_of, greatest_extent, read_frame
from medspark.data.views_place import Body
from medspark.data.views_policy import Triple, ViewPolicy
from medspark.data.views_presets import PRESETS, view_policy
from medspark.data.views_render import render

__all__ = ["PRESETS", "Sample", "Shot", "ViewDataset", "ViewPolicy", "view_policy"]


class Sample(NamedTuple):
    """What is drawn for one sample.

    Attributes:
        record: The volume of all its views.
        centre: mm (z, y, x) of the place about which they lie, the centre of the plain crop.
        shots: The views, the large ones first.
        frames: The voxels that each view needs.
    """

    record: Record
    centre: Triple
    shots: list[Shot]
    frames: list[Frame]


class ViewDataset(Dataset[list[Tensor]]):
    """Sample `i` of a run: a function of (seed, i) alone, each view of (seed, i, view).

    The place is that of crop `i` of `crops`: patient, volume, then a place that looks for body.
    Each view is resampled once, straight from the stored box under it.

    Args:
        crops: Where places come from, and window and seed. Its crop is the "plain" view, its flips
            are not used. For slices it must be one voxel deep.
        policy: What views differ in.

    Raises:
        ValueError: If views are slices and the crops are not.
    """

    def __init__(self, crops: CropDataset, policy: ViewPolicy) -> None:
        if policy.dims == 2 and crops.crop_size[0] != 1:
            raise ValueError(
                f"views of single slices need crops one voxel deep, not {crops.crop_size}"
            )
        self.crops, self.policy = crops, policy
        self._reader = VolumeReader(crops.store)

    def __len__(self) -> int:
        """Samples of the run."""
        return self.crops.length

    def __getitem__(self, index: int) -> list[Tensor]:
        """The views of sample `index`, float32 `[1, D, H, W]`, or `[1, H, W]` for slices.

        Raises:
            IndexError: If the index is not in the run.
            DamagedVolume: If its volume cannot be read.
        """
        sample = self.sample(index)
        return [self.view(sample, number) for number in range(self.policy.n_views)]

    def sample(self, index: int) -> Sample:
        """What is drawn for sample `index`, nothing read but the table of the body.

        Raises:
            IndexError: If the index is not in the run.
        """
        place = self.crops.place(index)
        record = place.record
        spacing = np.array(record.spacing)
        # The crop with the air that pads it on both sides.
        crop = np.array(self.crops.crop_size)
        first = np.array(place.start) - (crop - place.extent) // 2
        z, y, x = ((first + crop / 2) * spacing).tolist()
        shots = draw_shots(
            self.policy,
            self.crops.seed,
            index,
            (z, y, x),
            (np.array(record.size) * spacing).tolist(),
            self.crops.intensity.window,
            self._body(record) if self.policy.min_body else None,
        )
        flat = self.policy.dims == 2
        frames = [frame_of(shot, record.size, record.spacing, flat=flat) for shot in shots]
        return Sample(record, (z, y, x), shots, frames)

    def _body(self, record: Record) -> Body:
        """Share of body in a box of a volume, air outside."""
        table, mm = self._reader.table(record), np.array(record.spacing)
        size, flat = np.array(record.size), self.policy.dims == 2

        def share(centre: np.ndarray, edges: np.ndarray) -> float:
            edges = np.where([flat, False, False], mm, edges)
            low, high = np.rint((centre - edges / 2) / mm), np.rint((centre + edges / 2) / mm)
            first, stop = np.clip(low, 0, size - 1), np.clip(high, 1, size)
            extent = np.maximum(stop - first, 1).astype(int)
            found = table.voxels_in(first.astype(int).tolist(), extent.tolist())
            return found / max(1.0, float((high - low).prod()))

        return share

    def view(self, sample: Sample, number: int) -> Tensor:
        """One view of a sample; shape and errors as `[index]`."""
        frame, shot = sample.frames[number], sample.shots[number]
        box = torch.empty((1, 1, *frame.memory), dtype=torch.int16)
        self.read_into(box[0, 0].numpy(), sample, number)
        return self.shaped(render(box, [frame], [shot], self.crops.intensity))[0]

    def read_into(self, out: np.ndarray, sample: Sample, number: int) -> None:
        """Fill int16 `out`, at least of the frame's extent, with the box of a view."""
        read_frame(self._reader, sample.record, sample.frames[number], out)

    def shaped(self, views: Tensor) -> Tensor:
        """`[B, 1, D, H, W]` as networks of `policy.dims` dimensions take it."""
        return views.squeeze(2) if self.policy.dims == 2 else views

    def shape(self, number: int) -> tuple[int, ...]:
        """Shape of view `number` of a sample, as `[index]` gives it."""
        size = self.policy.size_of(number)
        return (1, *size) if self.policy.dims == 3 else (1, *size[1:])

    def box_size(self, number: int) -> tuple[int, int, int]:
        """Voxels that hold every box of view `number`."""
        records = self.crops.store.records
        needed = greatest_extent(self.policy, sorted({r.spacing for r in records}), number)
        largest = np.array([r.size for r in records]).max(0) + 1
        z, y, x = np.minimum(needed, largest).tolist()
        return z, y, x
