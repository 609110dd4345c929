"""Orientation, sides, units and masks, on real heads where there are some and on a drawn one."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from aneurysm.check.case import check_case
from aneurysm.check.findings import Collector
from aneurysm.check.intensities import check_intensities, measure_levels
from aneurysm.check.items import Item
from aneurysm.check.layout import find_layout
from aneurysm.check.masks import check_brightness
from aneurysm.check.sides import check_point_side, check_symmetry, head_offset_of
from aneurysm.data.scan import Grid


def grid(shape: tuple[int, int, int], spacing: float = 1.0) -> Grid:
    affine = np.zeros((4, 4))
    affine[[0, 1, 2], [2, 1, 0]] = spacing
    affine[3, 3] = 1
    return Grid(shape, affine)


def drawn_head(air: float = 0.0, tissue: float = 300.0) -> np.ndarray:
    """(d, h, w) 160 x 200 x 180 of 1 mm: symmetric from left to right, not otherwise; not in the middle."""
    z, y, x = np.ogrid[-80:80, -100:100, -90:90]
    x = x - 12
    head = (z / 70) ** 2 + (y / 85) ** 2 + (x / 65) ** 2 < 1
    front = (y > 10) & (z < -10) & (abs(x) < 40) & head
    back = (y < -20) & (z > 0) & (abs(x) < 50) & head
    values = np.where(head, tissue, air) + np.where(front, -0.6 * tissue, 0) + np.where(back, tissue, 0)
    return (values + np.random.default_rng(0).normal(0, 5, values.shape)).astype(np.float32)


def found_codes(collector: Collector) -> list[str]:
    return [finding.code for finding in collector.findings]


def test_axes_in_the_wrong_order_are_suspected() -> None:
    head = drawn_head()
    for order, expected in (((0, 1, 2), []), ((2, 1, 0), ["unlikely-orientation"]), ((0, 2, 1), None)):
        found = Collector("x")
        turned = np.ascontiguousarray(head.transpose(order))
        check_symmetry(turned, grid(turned.shape), measure_levels(turned), found)
        assert found_codes(found) == (expected if expected is not None else ["unlikely-orientation"])


@pytest.mark.parametrize("name", ["MR_Gd", "M2208_T2w", "CT_pitch"])
def test_real_heads_are_not_accused_and_are_when_turned(shared_data: Path, tmp_path: Path, name: str) -> None:
    path = shared_data / "head_volumes" / f"{name}.nii.gz"
    image = nibabel.load(path)
    found, _ = check_case(Item("volumes", name, (path,)))[0]
    assert found_codes(found) == []
    # The same voxels, but the header says that the left-right axis is the up-down axis and the reverse.
    affine = image.affine.copy()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    affine[:3, :3] *= spacing[[2, 1, 0]] / spacing
    turned = np.asarray(image.dataobj).transpose(2, 1, 0)
    nibabel.save(nibabel.Nifti1Image(turned, affine), tmp_path / "turned.nii")
    found, _ = check_case(Item("volumes", "turned", (tmp_path / "turned.nii",)))[0]
    assert set(found_codes(found)) - {"reader-notes"} == {"unlikely-orientation"}


def test_sides_by_the_outline_of_the_head() -> None:
    head = drawn_head()
    space, levels = grid(head.shape), measure_levels(head)
    for x, location, expected in (
        (132.0, "Right Middle Cerebral Artery", []),
        (132.0, "Left Middle Cerebral Artery", ["localizer-wrong-side"]),
        (72.0, "Right Middle Cerebral Artery", ["localizer-wrong-side"]),
        (97.0, "Right Anterior Cerebral Artery", []),  # 5 mm across the middle at 102 mm: not certain
        (132.0, "Basilar Tip", []),
    ):
        mm = np.array([x, 100.0, 80.0])
        offset = head_offset_of(mm, head, space, levels, "MRA")
        assert offset == pytest.approx(x - 102, abs=1.5)
        found = Collector("x")
        check_point_side(location, mm, None, offset, found)
        assert found_codes(found) == expected
    # A crop does not show the outline.
    crop = head[40:120, 60:140, 60:140]
    assert head_offset_of(np.array([30.0, 40.0, 40.0]), crop, grid(crop.shape), levels, "MRA") is None


def test_units_of_ct() -> None:
    rng = np.random.default_rng(1)
    hounsfield = drawn_head(air=-1000, tissue=40)
    hounsfield[70:75, 60:140, 60:140] += 1200  # bone

    def codes_of(volume: np.ndarray, modality: str | None = "CTA") -> list[str]:
        found = Collector("x")
        check_intensities(volume.astype(np.float32), measure_levels(volume), modality, 0, found)
        return found_codes(found)

    assert codes_of(hounsfield) == []
    assert codes_of(hounsfield[40:100, 60:140, 60:140]) == []  # a crop without air
    assert codes_of(hounsfield + 1024) == ["not-hounsfield"]
    assert codes_of(hounsfield - 1024) == ["not-hounsfield"]
    assert codes_of((hounsfield - hounsfield.mean()) / hounsfield.std()) != []
    assert codes_of(np.maximum(hounsfield, 0)) == ["ct-without-air"]
    assert codes_of(np.minimum(hounsfield, 60)) == ["clipped"]
    standard = rng.normal(0, 1, (40, 40, 40))
    assert codes_of(standard, "MRA") == ["negative-mr"]
    assert codes_of(standard, None) == []  # nobody says what it is


@pytest.mark.parametrize("wrong", ["mirrored", "moved"])
def test_a_mask_that_was_mirrored_or_moved_says_how(wrong: str) -> None:
    rng = np.random.default_rng(2)
    vessel = np.zeros((60, 60, 60), np.uint8)
    vessel[5:55, 20:24, 12:16] = vessel[30:34, 10:50, 40:44] = vessel[8:12, 8:12, 8:50] = 1
    image = (rng.normal(100, 15, vessel.shape) + 150 * vessel).astype(np.float32)
    found = Collector("x")
    check_brightness(vessel, image, grid(vessel.shape), "MRA", found)
    assert found_codes(found) == []
    mask = vessel[:, ::-1] if wrong == "mirrored" else np.roll(vessel, 4, axis=2)
    check_brightness(mask, image, grid(vessel.shape), "MRA", found)
    assert found_codes(found) == ["mask-misplaced"]
    words = "mirrored along posterior-anterior" if wrong == "mirrored" else "moved by -4 mm along left-right"
    assert words in found.findings[0].message


def test_real_data_raise_no_alarm(shared_data: Path) -> None:
    """Label maps without an image, crops, and a whole data folder: nothing above a warning."""
    for item in find_layout(shared_data / "topcow").items:
        found, facts = check_case(item)[0]
        assert facts.shape
        assert all(finding.severity in ("note", "warning") for finding in found.findings)
