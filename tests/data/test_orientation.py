from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import SimpleITK as sitk

from medspark.data.headers import UnreadableVolume
from medspark.data.orientation import lps_geometry, lps_spacing, orientation_letters, to_lps

ALL = [
    "".join(letters) for order in permutations(("LR", "PA", "SI")) for letters in product(*order)
]


@pytest.mark.parametrize("letters", ALL)
def test_every_orientation_against_itk(letters: str) -> None:
    """All 48: voxels, spacing, origin and direction as ITK's own filter gives them."""
    array = np.random.default_rng(0).integers(-9, 9, (3, 4, 5)).astype(np.int16)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((7.0, -8.0, 9.0))
    cosines = sitk.DICOMOrientImageFilter_GetDirectionCosinesFromOrientation(letters)
    image.SetDirection(cosines)
    direction = np.array(cosines).reshape(3, 3)
    assert orientation_letters(direction) == letters

    truth = sitk.DICOMOrient(image, "LPS")
    np.testing.assert_array_equal(to_lps(array, letters), sitk.GetArrayFromImage(truth))
    assert lps_spacing((3.0, 2.0, 1.0), letters) == truth.GetSpacing()[::-1]
    spacing, origin, turned = lps_geometry(
        array.shape, letters, np.array([1.0, 2.0, 3.0]), np.array([7.0, -8.0, 9.0]), direction
    )
    np.testing.assert_allclose(spacing, truth.GetSpacing())
    np.testing.assert_allclose(origin, truth.GetOrigin())
    np.testing.assert_allclose(turned.ravel(), truth.GetDirection())


def test_oblique_takes_the_nearest() -> None:
    angle = np.radians(30)
    c, s = np.cos(angle), np.sin(angle)
    assert orientation_letters(np.array([[1, 0, 0], [0, -c, s], [0, s, c]])) == "LAS"


def test_dependent_axes() -> None:
    with pytest.raises(UnreadableVolume, match="not independent"):
        orientation_letters(np.array([[1, 1, 0], [0, 0, 0], [0, 0, 1]]))
