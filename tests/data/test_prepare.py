"""Preparation: geometry, intensities, and a cache that is whole, resumable and never stale."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aneurysm.data.errors import ReadError
from aneurysm.data.formats.nifti import read_nifti
from aneurysm.data.labels import LOCATIONS
from aneurysm.data.preparation.prepare import (
    Preparation,
    load_prepared,
    load_prepared_crop,
    prepare_all,
    prepare_case,
    prepare_scan,
    prepared_header,
    resample_labels,
)
from aneurysm.data.preparation.prepared import save_prepared
from aneurysm.data.resample import isotropic
from aneurysm.data.scan import Case, Grid, Lesion, Scan
from aneurysm.data.tables import INDEX, LOCATION_KEYS


def head_scan(modality: str = "MRA", uid: str = "s1", spacing=(1.5, 1.5, 1.5), shape=(56, 84, 82)) -> Scan:
    """An ellipsoidal head of 40 HU (CTA) or 300 units (MR) in air, in it a ball of 340 HU or 900 units."""
    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], [0, 1, 2, 3]] = (*spacing, 1)
    affine[:3, 3] = (-30, 15, 7)
    grid = Grid(shape, affine)
    mm = grid.to_mm(np.moveaxis(np.indices(shape), 0, -1)) - grid.centre_mm
    rng = np.random.default_rng(0)
    head = (mm**2 / np.array([28, 32, 36]) ** 2).sum(-1) < 1
    ball = np.linalg.norm(mm - [8, 4, -6], axis=-1) < 5
    air, tissue, vessel, noise = (-1000, 40, 340, 5) if modality == "CTA" else (5, 300, 900, 30)
    volume = np.select([ball, head], [vessel, tissue], air) + rng.normal(0, noise, shape)
    return Scan(
        uid, "p1", modality, volume.astype(np.float32), grid, grid, age=50.0, sex="M", notes=("a note",)
    )


def labelled(scan: Scan) -> Case:
    mm = scan.grid.to_mm(np.moveaxis(np.indices(scan.grid.shape), 0, -1))
    centre = scan.grid.centre_mm + np.array([8, 4, -6])
    ball = (np.linalg.norm(mm - centre, axis=-1) < 5).astype(np.uint8)
    locations = np.zeros(len(LOCATIONS), np.float32)
    locations[4], locations[7] = 1, np.nan
    return Case(scan, ball * np.uint8(10), ball, (Lesion(centre, 5.0, 4),), True, locations)


def test_geometry_survives_preparation():
    case = labelled(head_scan("CTA"))
    prepared = prepare_case(case, Preparation(spacing_mm=0.75))
    np.testing.assert_allclose(prepared.grid.affine[:3, :3], [[0, 0, 0.75], [0, 0.75, 0], [0.75, 0, 0]])
    # The head (72 x 64 x 56 mm) and 6 mm around it, as far as the coarse search can tell (4.5 mm).
    extent = np.array(prepared.grid.shape) * 0.75
    assert (np.abs(extent - [72 + 12, 64 + 12, 56 + 12]) < 9).all() and (extent > [76, 68, 60]).all()
    centre = case.lesions[0].centre_mm
    for array in (prepared.image > 0.5, prepared.vessel == 10, prepared.aneurysm == 1):
        inside = np.argwhere(array)
        np.testing.assert_allclose(prepared.grid.to_mm(inside.mean(0)), centre, atol=0.2)
        np.testing.assert_allclose(len(inside) * prepared.grid.voxel_mm3, 4 / 3 * np.pi * 125, rtol=0.1)
    assert prepared.source is case.scan.source and prepared.lesions == case.lesions
    native = prepare_case(case, Preparation(spacing_mm=None, crop=False))
    assert native.grid.same_as(case.scan.grid)


def test_intensities_mean_the_same_in_every_scan():
    cta = prepare_scan(head_scan("CTA"), Preparation())
    values = np.sort(cta.image.ravel())
    low, high = (-100 - 40) / 300, (800 - 40) / 300
    assert values[0] == np.float32(low) == np.float32(cta.background) and values[-1] < high
    assert abs(np.median(cta.image[cta.image > -0.2])) < 0.02  # soft tissue
    assert abs(np.median(cta.image[cta.image > 0.8]) - 1) < 0.02  # vessel
    scan = head_scan("MRA")
    mr = prepare_scan(scan, Preparation(spacing_mm=None))
    tissue = mr.image[(mr.image > -3.5) & (mr.image < 3.5)]
    assert abs(np.median(tissue)) < 0.1 and 0.7 < tissue.std() < 1.3
    assert mr.image.min() >= -4 and mr.image.max() <= 8
    # MR has no units: another gain and offset changes nothing.
    other = prepare_scan(
        dataclasses.replace(scan, volume=scan.volume * 7 + 100), Preparation(spacing_mm=None)
    )
    np.testing.assert_allclose(other.image, mr.image, atol=1e-3)


def test_neck_and_chest_are_cut_off_below_the_head():
    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], [0, 1, 2, 3]] = (2, 2, 2, 1)
    grid = Grid((200, 60, 60), affine)
    volume = np.full(grid.shape, -1000, np.float32)
    volume[:180, 10:50, 10:50] = 40  # 360 mm of body, its top at 360 mm
    prepared = prepare_scan(Scan("s", "p", "CTA", volume, grid, grid), Preparation(spacing_mm=2.0))
    bottom = prepared.grid.to_mm([0, 0, 0])[2]
    top = prepared.grid.to_mm([prepared.grid.shape[0] - 1, 0, 0])[2]
    assert 130 <= bottom <= 142 and 360 <= top <= 375


def test_small_field_of_view_is_kept_whole():
    scan = head_scan(spacing=(0.6, 0.6, 0.6), shape=(50, 60, 60))  # nearly all of it is inside the head
    prepared = prepare_scan(scan, Preparation(spacing_mm=None))
    assert prepared.image.shape == scan.volume.shape
    assert abs(np.median(prepared.image)) < 0.2 and prepared.image.max() > 4


def test_real_scans(shared_data):
    t1 = prepare_scan(
        read_nifti(shared_data / "head_volumes/MR_Gd.nii.gz", "T1"), Preparation(spacing_mm=1.5)
    )
    assert 1.0 < np.percentile(t1.image, 99.9) <= 8 and t1.background == t1.image.min()
    # A TOF without anything but vessels has no head to crop to: all vessels stay.
    tof = read_nifti(shared_data / "head_volumes/chris_MRA.nii.gz", "MRA")
    kept = prepare_scan(tof, Preparation(spacing_mm=None))
    assert (kept.image > 1).sum() > 0 and kept.image.shape[2] > 0.8 * tof.volume.shape[2]


@pytest.mark.parametrize("modality", ["CTA", "T1"])
def test_images_without_content(modality):
    scan = head_scan(modality)
    speck = np.where(np.indices(scan.volume.shape).sum(0) == 0, -900, -1000).astype(np.float32)
    for volume, message in ((np.full_like(speck, 3.0), "every voxel is 3"), (speck, "no head")):
        with pytest.raises(ReadError, match=message) as caught:
            prepare_scan(dataclasses.replace(scan, volume=volume), Preparation())
        assert "s1" in str(caught.value)


def test_saved_case_is_read_back_whole_and_by_crops(tmp_path):
    case = labelled(head_scan())
    prepared = prepare_case(case, Preparation(spacing_mm=1.0))
    path = tmp_path / "a.blosc2"
    save_prepared(prepared, path)
    again = load_prepared(path)
    np.testing.assert_allclose(again.image, prepared.image, atol=4e-3)
    assert again.image.dtype == np.float32
    header = prepared_header(path)
    assert header.shape == prepared.image.shape and header.modality == prepared.modality
    assert header.masks == {"vessel", "aneurysm"}
    np.testing.assert_array_equal(again.vessel, prepared.vessel)
    assert again.grid.same_as(prepared.grid) and again.source.same_as(prepared.source)
    for name in ("series_uid", "patient_id", "modality", "age", "sex", "present", "background", "notes"):
        assert getattr(again, name) == getattr(prepared, name), name
    np.testing.assert_array_equal(again.locations, case.locations)
    np.testing.assert_allclose(again.lesions[0].centre_mm, case.lesions[0].centre_mm)
    assert again.lesions[0].location == 4 and again.lesions[0].radius_mm == 5.0
    # Crops: inside, across the border, and outside altogether.
    padded = np.pad(again.image, 40, constant_values=again.background)
    for start in ((5, 6, 7), (-10, 50, -3), (-35, -35, -35), tuple(n - 3 for n in again.image.shape)):
        crop = load_prepared_crop(path, start, (20, 24, 16))
        window = tuple(slice(s + 40, s + 40 + n) for s, n in zip(start, (20, 24, 16), strict=True))
        np.testing.assert_allclose(crop.image, padded[window], atol=1e-6)
        np.testing.assert_array_equal(crop.aneurysm, np.pad(again.aneurysm, 40)[window])
        np.testing.assert_allclose(crop.grid.to_mm([0, 0, 0]), again.grid.to_mm(start))
    save_prepared(prepare_scan(case.scan, Preparation()), path)
    assert (
        load_prepared(path).vessel is None
        and np.isnan(load_prepared_crop(path, (0, 0, 0), (4, 4, 4)).locations).all()
    )
    (tmp_path / "b.blosc2").write_bytes(path.read_bytes()[:1000])
    for name, message in (("b.blosc2", "not a prepared case"), ("c.blosc2", "no such")):
        with pytest.raises(ReadError, match=message):
            load_prepared(tmp_path / name)


class MemorySource:
    """Four good cases, one with NaN voxels, one that raises something unexpected."""

    def __init__(self, root: Path, present: float = 1.0) -> None:
        self.root = root
        self.present = present

    def index(self) -> pd.DataFrame:
        rows = [
            {"series_uid": uid, "patient_id": uid, "modality": "MRA", "age": 50, "sex": "M", "site": "x",
             "present": self.present, **dict.fromkeys(LOCATION_KEYS, np.nan)}
            for uid in ("a", "b", "nan", "c", "odd", "d")
        ]  # fmt: skip
        return INDEX.conform(pd.DataFrame(rows))

    def case(self, series_uid: str) -> Case:
        (self.root / "calls").mkdir(exist_ok=True)
        (self.root / "calls" / f"{series_uid}{time.time_ns()}").touch()
        if series_uid == "odd":
            raise KeyError("a bug")
        scan = head_scan(uid=series_uid, spacing=(4.2, 4.2, 4.2), shape=(24, 30, 30))
        if series_uid == "nan":
            scan = dataclasses.replace(scan, volume=np.full_like(scan.volume, np.nan))
        return Case(scan)

    def calls(self) -> int:
        return len(list((self.root / "calls").iterdir()))


@pytest.mark.parametrize("jobs", [1, 2])
def test_all_cases_once_and_failures_on_record(tmp_path, caplog, jobs):
    source, folder, preparation = MemorySource(tmp_path), tmp_path / "cache", Preparation(spacing_mm=3.0)
    with caplog.at_level("INFO"):
        paths = prepare_all(source, preparation, folder, jobs)
    assert list(paths) == ["a", "b", "c", "d"] and "prepared 6 of 6 cases, 2 skipped" in caplog.text
    failed = json.loads((folder / "failed.json").read_text())
    assert set(failed) == {"nan", "odd"} and "NaN" in failed["nan"] and "KeyError: 'a bug'" in failed["odd"]
    assert load_prepared(paths["b"]).series_uid == "b"
    stamps = {uid: path.stat().st_mtime_ns for uid, path in paths.items()}
    assert prepare_all(source, preparation, folder, 1) == paths  # only the failed ones are tried again
    assert source.calls() == 8 and {uid: p.stat().st_mtime_ns for uid, p in paths.items()} == stamps
    paths["c"].unlink()  # as after a kill
    assert prepare_all(source, preparation, folder, 1) == paths and source.calls() == 11
    # Another preparation or other labels are other files.
    assert prepare_all(source, Preparation(spacing_mm=4.0), folder, 1)["a"] != paths["a"]
    assert prepare_all(MemorySource(tmp_path, 0.0), preparation, folder, 1)["a"] != paths["a"]


def test_nothing_could_be_prepared(tmp_path):
    source = MemorySource(tmp_path)
    source.case = lambda uid: (_ for _ in ()).throw(ReadError(f"{uid}: broken"))
    with pytest.raises(ReadError, match=r"No case of .* a: a: broken"):
        prepare_all(source, Preparation(), tmp_path / "cache", 1)


def test_killed_run_leaves_no_partial_file(tmp_path):
    """Killed in the middle of its writes, a run leaves only whole files, and the next one finishes."""
    script = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\n"
        "import test_prepare as t\n"
        f"source = t.MemorySource(Path({str(tmp_path)!r}))\n"
        "while True:\n"
        f"    t.prepare_all(source, t.Preparation(spacing_mm=1.0), Path({str(tmp_path)!r}) / 'cache', 1)\n"
        f"    [p.unlink() for p in (Path({str(tmp_path)!r}) / 'cache').glob('*.blosc2')]\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    cache = tmp_path / "cache"
    deadline = time.time() + 60
    while not list(cache.glob("*.blosc2")) and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.05)
    process.kill()
    process.wait()
    for path in cache.glob("*.blosc2"):
        load_prepared(path)
    paths = prepare_all(MemorySource(tmp_path), Preparation(spacing_mm=1.0), cache, 1)
    assert [load_prepared(path).series_uid for path in paths.values()] == ["a", "b", "c", "d"]


def test_impossible_preparations():
    for change in ({"spacing_mm": 0}, {"ct_window": (5, 5)}, {"mr_clip": (3, -3)}, {"ct_vessel": 0}):
        with pytest.raises(ValueError):
            Preparation(**change)
    assert Preparation(ct_window=[-100, 800]) == Preparation()


def test_labels_keep_their_volume_and_names_on_another_grid():
    affine = np.array([[0, 0, 0.72, 0], [0, 0.72, 0, 0], [0.79, 0, 0, 0], [0, 0, 0, 1.0]])
    grid = Grid((40, 44, 48), affine)
    target = isotropic(grid, 0.75)
    voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(16):  # two almost equal grids beat: a single position says nothing
        at = grid.to_mm(voxels) - grid.centre_mm - rng.uniform(-4, 4, 3)
        ball = np.linalg.norm(at, axis=-1) <= 5.0
        labels = np.where(ball, np.where(at[..., 2] > 0, 9, 10), 0).astype(np.uint8)
        moved = resample_labels(labels, grid, target)
        assert set(np.unique(moved)) == {0, 9, 10}
        ratios.append((moved > 0).sum() * target.voxel_mm3 / (4 / 3 * np.pi * 125))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.04)
