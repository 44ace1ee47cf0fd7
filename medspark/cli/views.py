"""`medspark views`: a contact sheet of the views that contrastive methods compare."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from medspark.cli.app import plain

if TYPE_CHECKING:
    from medspark.data.views import ViewDataset


def run(config: DictConfig) -> None:
    """Draws views of a store's volumes, writes the sheet and says what it shows."""
    from medspark.data.views_sheet import save_sheet, view_sheet

    if config.samples < 1:
        raise ValueError(f"samples {config.samples}: a sheet shows at least one")
    views = dataset(config)
    title = (
        f"views drawn with seed {config.seed} in the window {config.window}: "
        f"{views.policy.n_global} large, {views.policy.n_local} small; "
        f"each pair with a large one shares at least {views.policy.min_overlap:.0%} of a box"
    )
    figure = view_sheet(views, _progress(range(config.samples), config.progress), title)
    path = save_sheet(figure, config.out)
    print(f"{path}: {config.samples} samples, {views.policy.n_views} views of each")


def dataset(config: DictConfig) -> ViewDataset:
    """The views that a configuration describes.

    Raises:
        FileNotFoundError: there is no such store.
        ValueError: no volumes, no such window or volume, views that make no sense.
    """
    from medspark.data.crops import CropDataset
    from medspark.data.store import Store
    from medspark.data.views import ViewDataset, view_policy
    from medspark.data.windows import Intensity

    policy = view_policy(plain(config.views))
    store = Store(Path(config.store))
    records = store.records
    if config.volume is not None:
        records = [record for record in records if config.volume in (record.id, record.source)]
    if not records:
        which = f"no volume {config.volume!r}" if config.volume is not None else "no volumes"
        raise ValueError(f"{which} in {config.store}, see its manifest.csv")
    z, y, x = plain(config.crop) or policy.size
    crops = CropDataset(
        store,
        records,
        (z, y, x),
        Intensity.named(config.window),
        length=config.samples,
        seed=config.seed,
        flips=False,
        min_body=config.min_body,
        body_share=config.body_share,
    )
    return ViewDataset(crops, policy)


def _progress(numbers: range, show: bool) -> Iterable[int]:
    if not show:
        return numbers
    from rich.progress import track

    return track(numbers, description="views")
