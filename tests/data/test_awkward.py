"""Every awkward item of the real data: what `medspark prepare` makes of it, and why that is right.

`docs/awkward.md` is made here; after a change of the readers look at the new outcomes, then run
`MEDSPARK_WRITE_DOCS=1 pytest tests/data/test_awkward.py` and commit the table.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from medspark.data.ingest import find_sources, prepare
from medspark.data.io import read_volume
from medspark.data.store import Record, Store, hash_text

DOCS = Path(__file__).resolve().parents[2] / "docs" / "awkward.md"
HEAD = """# Awkward files and what becomes of them

Made by `tests/data/test_awkward.py` from real files; the test fails where this table and
`medspark prepare` disagree. A volume is either *stored* (with warnings, if anything is odd) or
*refused* with a reason, and every file ends as a row of the manifest; *ignored* are objects that are
no images. What is refused only for its looks can be stored by name with `accept_files`.

| Item | What is awkward | Outcome | Why that is right |
| --- | --- | --- | --- |
"""
WHY = {
    "head_gantry_tilt_irregular": (
        "Two scans of different step overlap in one series; between them no step is right. With "
        "`uneven=true` the slices are interpolated to 4 mm, and the tilt is straightened."
    ),
    "phantom_mixed_series": (
        "Each tilt is a volume of its own; its slices are moved in their plane by the tilt, so the "
        "voxel axes are at right angles. Scout and colour summary are no slices of a body."
    ),
    "multiframe_sc_ct_phantom.dcm": (
        "Its functional groups place every frame, and RescaleType says HU: it is a volume, turned "
        "upright as its frames run downwards."
    ),
    "enhanced_ct_perfusion_map.dcm": (
        "Blood flow is no HU, though Modality says CT and the rescale looks like one of CT: the "
        "frame type tells."
    ),
    "dicom_4d_tiny": (
        "Each time point has a SeriesInstanceUID of its own, so that no 76-slice volume is built; "
        "with 2 x 3 pixels none is a scan."
    ),
    "ct_perfusion_rgb.nii.gz": "Colours are no HU.",
    "phantom_oblique_uint8.nii.gz": (
        "8 bits without rescale hold no HU. Accepted by name, it is turned to the nearest axes "
        "and its rotation stays in the direction matrix."
    ),
    "phantom_sheared_affine.nii.gz": (
        "Slope and intercept give HU (in coarse steps, which is said); the sform's shear is taken "
        "out by moving the slices, where ITK would square the axes without a word."
    ),
    "mr_complex64.nii.gz": "Complex numbers are no HU.",
    "head_no_intercept.nii.gz": (
        "Air at 0 and water at 1000 would be bone to the network; without a value below 0 the "
        "volume cannot be HU."
    ),
    "chest_8bit_windowed.nii.gz": "A windowed picture holds grey levels, no HU.",
    "head_template_cormack_units.nii": (
        "The slope is applied; the units (Cormack) show by having no value below 0."
    ),
    "not_ct_pet_sts002.nii.gz": "NIfTI has no modality; SUV show by having no value below 0.",
    "not_ct_mr_t1_sts002.nii.gz": "NIfTI has no modality; MR shows by having no value below 0.",
    "not_ct_mr_totalseg.nii.gz": (
        "NIfTI has no modality; a CT of an abdomen has air around it or in the bowel."
    ),
    "mr_mislabelled_as_ct": "The tag is wrong, the values are right: no value below 0 is no CT.",
    "chest_two_slices.nrrd": (
        "Two slices have a step and are a volume; crops pad it. `min_slices` is the reader's limit."
    ),
    "chest_one_slice_patch.nrrd": "One slice has no step: its depth is unknown.",
    "chest_minimal_tags": (
        "The geometry tags are there; the missing Modality is said, the padding becomes air."
    ),
    "pancreas_j2k_one_slice.dcm": (
        "It is decoded (the codec is there) and then refused: one slice has no step."
    ),
    "head_j2k_pixelrep_mismatch.dcm": (
        "Decoded without wrapping round (-1024 to 1896 HU, tested), then refused: one slice has no "
        "step."
    ),
    "ct_small_one_slice.dcm": "One slice has no step: its depth is unknown.",
    "dicomdir_mixed_modalities": (
        "Only the one whole axial CT series is stored, though no file has a suffix. Folder names "
        "that are a patient's id are hashed."
    ),
    "ct_folder_with_rtstruct": "The six slices are a volume; a structure set has no pixels.",
}


def outcome(rows: list[Record]) -> str:
    """The rows of an item, equal ones counted once."""
    said: Counter[str] = Counter()
    for row in rows:
        if row.status == "ok":
            warnings = [w for w in row.warnings if not w.startswith("no patient id")]
            text = f"stored, {'x'.join(map(str, row.size))} voxels"
            said[text + (f"; warnings: {'; '.join(warnings)}" if warnings else "")] += 1
        else:
            word = "refused" if row.status == "quarantined" else row.status
            said[
                f"{word}: {row.reason.removesuffix(' (accept_files stores it all the same)')}"
            ] += 1
    return "<br>".join(f"{n} times {text}" if n > 1 else text for text, n in said.items())


@pytest.fixture(scope="module")
def rows(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """Rows of the manifest by item."""
    source = real_data / "awkward"
    store = tmp_path_factory.mktemp("awkward") / "store"
    names = {hash_text(s.name): re.split(r"[/#]", s.name)[0] for s in find_sources(source)}
    report = prepare(source, store, progress=False)
    found: dict[str, list[Record]] = {}
    for row in report.rows:
        found.setdefault(names[row.id], []).append(row)
    opened = Store(store)
    assert len(opened) == report.ok == 8
    assert all(opened.read(r.id).shape == r.size for r in opened.records)
    return found


def test_table(real_data: Path, rows: dict[str, list[Record]]) -> None:
    with (real_data / "awkward/manifest.csv").open() as file:
        items = {row["file"]: row["what_is_awkward"] for row in csv.DictReader(file)}
    assert set(rows) == set(items) == set(WHY)
    lines = [
        "| " + " | ".join([f"`{item}`", what, outcome(rows[item]), WHY[item]]) + " |"
        for item, what in items.items()
    ]
    table = HEAD + "\n".join(lines) + "\n"
    if os.environ.get("MEDSPARK_WRITE_DOCS"):
        DOCS.write_text(table, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == table


def test_no_id_of_a_person(rows: dict[str, list[Record]]) -> None:
    text = repr(rows)
    assert "77654033" not in text  # PatientID and folder of the DICOMDIR tree
    assert "STS_002" not in text  # of the series beside the structure set


def test_tilted_phantom_is_upright(real_data: Path, tmp_path: Path) -> None:
    """The phantom's vertical edge, sheared by the tilt as stored, is straight along the slices."""
    source = real_data / "awkward/phantom_sheared_affine.nii.gz"

    def drift(hu: np.ndarray) -> float:
        """How far the front edge of the phantom moves from slice to slice, in voxels."""
        solid = hu[10:44] > -300
        centre = [np.median(np.nonzero(plane)[0]) for plane in solid]
        return float(abs(np.polyfit(np.arange(len(centre)), centre, 1)[0]))

    straight = read_volume(source)
    stored = read_volume(source, canonical=False)
    step = stored.spacing[0] * np.sin(np.radians(18.5)) / stored.spacing[1]
    assert abs(drift(straight.hu) - drift(stored.hu)) == pytest.approx(abs(step), rel=0.5)
