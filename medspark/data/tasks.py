"""Labelled classification tasks on CT patches and on grey pictures.

Five layouts are read (`load_task`):

* `labels.csv` with `file, patient, label, label_name, split`: one image file per sample, inside
  the task's folder: volumes, or 2D pictures (.png, .jpg, .tif), not both.
* `index.csv` with `id, volume, i, j, k, patch_size_vox, label, label_name, split`: cubes cut from
  whole volumes. `volume` is relative to the folder two levels above the task (`data` for
  `data/tasks/my_task`) and must stay below it. `i, j, k` are indices into the array as stored,
  x first (the convention of nibabel); the cube runs from `centre - size // 2`, `size` voxels.
  The patient is the column `patient` if there is one, else the volume.
* `.npz` as MedMNIST has it: `train_images`, `train_labels` and so on (`task_arrays`).
* `{train,val,test}/{class}/` with 2D pictures (`task_images`).

Tables give CT patches in the orientation of the store (LPS): an index refers to the stored array,
the patch that was cut there is then turned like everything else.

Arrays and pictures are *grey*: 0 to 255 (or 65535) with no unit. `TaskDataset` maps that range
linearly onto the window of the run, black to its low end and white to its high end, and then
standardises as it does HU. So an encoder that was pre-trained on CT meets the range of values
it knows. It is not HU all the same: what was cut off by the picture's own window stays lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.data import Dataset

from medspark.data.augment import Augmentation, augmentation
from medspark.data.task_arrays import load_arrays
from medspark.data.task_images import SPLITS, load_folder
from medspark.data.task_tables import load_table
from medspark.data.task_types import Sample, Task, split_by_patient
from medspark.data.windows import Intensity

__all__ = ["Sample", "Task", "TaskDataset", "load_task", "split_by_patient"]


def load_task(
    path: Path | str, *, fractions: Mapping[str, float] | None = None, seed: int = 0
) -> Task:
    """Load a task from its folder (labels.csv, index.csv or pictures), its table or its `.npz`.

    What is doubtful but can be read, such as a patient in two splits, is in `Task.warnings`;
    `medspark.data.leaks.check_leaks` refuses it.

    Args:
        path: Folder or file.
        fractions: Draw the splits anew with these shares (`split_by_patient`); a table then needs
            no column `split`. None takes the splits as given.
        seed: Choice of that split.

    Raises:
        FileNotFoundError: If there is no task, or a file that it names is missing.
        ValueError: For missing columns, a label that is no class number, classes with two names, a
            sample that comes twice, a path that leaves the allowed folder, or an array file that is
            damaged or promises too much.
    """
    task = _load(Path(path), need_split=fractions is None)
    return task if fractions is None else split_by_patient(task, fractions, seed)


def _load(path: Path, need_split: bool) -> Task:
    if path.suffix.lower() == ".npz":
        return load_arrays(path)
    table = path
    if path.is_dir():
        table = next((path / n for n in ("labels.csv", "index.csv") if (path / n).is_file()), path)
        if table == path and any((path / split).is_dir() for split in SPLITS):
            return load_folder(path)
    if not table.is_file():
        raise FileNotFoundError(
            f"no labels.csv or index.csv in '{path}', no folders train, val and test with "
            "pictures, and no .npz file"
        )
    return load_table(table, need_split)


def grey_to_hu(grey: torch.Tensor, intensity: Intensity) -> torch.Tensor:
    """Grey values as the HU that stand for them: 0 to the top of the type on to the window.

    Args:
        grey: uint8 or uint16, any shape.
        intensity: Its window is the target.

    Returns:
        float32, the same shape.
    """
    share = grey.to(torch.float32) / torch.iinfo(grey.dtype).max
    return share * intensity.window.width + intensity.window.low


class TaskDataset(Dataset[tuple[torch.Tensor, int, int]]):
    """The patches of one split, ready for a network.

    A patch of another size than `size` is resampled linearly as a whole (voxel centres aligned
    to faces), so that it shows the same tissue and no invented air; its voxel size changes
    with it. A patch of the right size is not touched. Grey values are mapped on to the window
    of `intensity` (see the module's text).

    Args:
        task: The task.
        split: Name of the split.
        intensity: Window and standardisation; the pre-trained checkpoint's.
        size: Voxels (d, h, w), or (h, w) of a 2D task; None keeps each patch's.
        augment: False or "none", True or "light" (mirror each axis with probability 1/2, then scale
            by 0.9 to 1.1 and shift by -0.1 to 0.1 in standardised units), "strong", or an
            `Augmentation`.
        seed: Seed of the augmentation, a function of (seed, epoch, index) alone.

    Raises:
        ValueError: If the size or the name of the augmentation makes no sense.
    """

    def __init__(
        self,
        task: Task,
        split: str,
        intensity: Intensity,
        size: tuple[int, ...] | None,
        *,
        augment: bool | str | Augmentation = False,
        seed: int = 0,
    ) -> None:
        if size is not None and (len(size) not in (2, 3) or min(size) < 1):
            raise ValueError(f"size {size} must be three (d, h, w) or two (h, w) positive numbers")
        self.task, self.samples = task, task.split(split)
        self.intensity, self.size, self.seed = intensity, size, seed
        self.augment = augmentation(augment)
        # Shared memory: worker processes that outlive an epoch see the change too.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is drawn."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        """Samples in the split."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        """Patch float32 `[1, D, H, W]` or `[1, H, W]`, its label and its index in the split."""
        sample = self.samples[index]
        voxels, spacing = self.task.read(sample)
        x = torch.from_numpy(voxels.copy())
        grey = x.dtype in (torch.uint8, torch.uint16)
        x = self.intensity.normalise(grey_to_hu(x, self.intensity) if grey else x)
        if self.size is not None and tuple(x.shape) != tuple(self.size):
            spacing = tuple(
                s * a / b for s, a, b in zip(spacing, x.shape, self._sized(sample, x), strict=True)
            )
            x = torch.nn.functional.interpolate(
                x[None, None],
                size=self.size,
                mode="trilinear" if x.ndim == 3 else "bilinear",
                align_corners=False,
            )[0, 0]
        x = self.augment(x, (self.seed, int(self._epoch[0]), index), spacing)
        return x[None].contiguous(), sample.label, index

    def _sized(self, sample: Sample, x: torch.Tensor) -> tuple[int, ...]:
        assert self.size is not None
        if len(self.size) != x.ndim:
            raise ValueError(
                f"sample '{sample.id}' has {x.ndim} axes {tuple(x.shape)}, the size {self.size} "
                f"has {len(self.size)}"
            )
        return self.size
