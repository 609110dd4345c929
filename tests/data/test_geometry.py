"""Positions survive everything: any orientation, preparation, and the way back to the input grid.

Every test follows a mark whose place in mm is known from the file alone, by a formula of its own.
"""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian
from scipy.ndimage import gaussian_filter
from synthetic_series import write_series

from aneurysm.data.formats.nifti import read_mask, read_nifti, write_nifti
from aneurysm.data.labels import LABEL_COLUMNS, LOCATIONS
from aneurysm.data.preparation.prepare import Preparation, prepare_case
from aneurysm.data.resample import canonicalise, crop_grid, isotropic
from aneurysm.data.scan import Case, Grid
from aneurysm.data.sources.rsna import RsnaSource

MCA = "Left Middle Cerebral Artery"


@st.composite
def affines(draw, obliquity: float = 0.6, shear: float = 0.0) -> np.ndarray:
    """Any permutation and flips, a rotation by up to `obliquity` rad, anisotropic spacing, an offset."""
    order = draw(st.permutations(range(3)))
    signs = np.array([draw(st.sampled_from([-1.0, 1.0])) for _ in range(3)])
    spacing = np.array([draw(st.floats(0.25, 5.0)) for _ in range(3)])
    axes = np.eye(3)[:, list(order)] * signs
    for axis in range(3):
        angle = draw(st.floats(-obliquity, obliquity))
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        turn = np.eye(3)
        turn[[i, j], [i, j]], turn[i, j], turn[j, i] = np.cos(angle), -np.sin(angle), np.sin(angle)
        axes = turn @ axes
    skew = np.eye(3)
    skew[0, 1] = draw(st.floats(-shear, shear)) if shear else 0.0
    affine = np.eye(4)
    affine[:3, :3] = axes @ skew * spacing
    affine[:3, 3] = [draw(st.floats(-300, 300)) for _ in range(3)]
    return affine


shapes = st.tuples(*[st.integers(3, 40)] * 3)


@settings(max_examples=200, deadline=None)
@given(affines(shear=0.4), shapes)
def test_index_to_mm_and_back(affine, shape):
    grid = Grid(shape, affine)
    index = np.random.default_rng(0).uniform(-5, 45, (50, 3))
    np.testing.assert_allclose(grid.to_index(grid.to_mm(index)), index, atol=1e-4)
    mm = grid.to_mm(index)
    # The slow formula, one homogeneous vector at a time.
    for at, place in zip(index[:5], mm[:5], strict=True):
        np.testing.assert_allclose(place, (affine @ np.append(at, 1.0))[:3], atol=1e-9)
    corner = crop_grid(grid, (2, -1, 3), (4, 4, 4))
    np.testing.assert_allclose(corner.to_index(mm), grid.to_index(mm) - [2, -1, 3], atol=1e-4)


@settings(max_examples=150, deadline=None)
@given(affines(shear=0.3), st.tuples(*[st.integers(3, 9)] * 3))
def test_canonical_axes_move_voxels_and_not_positions(affine, shape):
    grid = Grid(shape, affine)
    volume = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    canonical, onto = canonicalise(volume, grid)
    assert sorted(canonical.ravel()) == sorted(volume.ravel())
    every = np.argwhere(np.ones(shape, bool))
    index = onto.to_index(grid.to_mm(every))
    np.testing.assert_allclose(index, np.rint(index), atol=1e-4)
    np.testing.assert_array_equal(canonical[tuple(np.rint(index).astype(int).T)], volume.ravel())
    # Index grows to superior, anterior, right: no other choice of axes and flips points there better.
    axes = onto.affine[:3, :3] / onto.spacing
    assert axes[2, 0] + axes[1, 1] + axes[0, 2] > 1.5


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(affines(shear=0.3), st.sampled_from([".nii", ".nii.gz"]))
def test_nifti_masks_go_to_the_scan_and_back_voxel_by_voxel(tmp_path, affine, suffix):
    rng = np.random.default_rng(0)
    shape = (7, 9, 6)
    nib.save(nib.Nifti1Image(rng.normal(size=shape).astype(np.float32), affine), tmp_path / f"a{suffix}")
    labels = rng.integers(0, 14, shape).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / f"m{suffix}")
    scan = read_nifti(tmp_path / f"a{suffix}", "MRA")
    on_scan = read_mask(tmp_path / f"m{suffix}", scan.grid)
    write_nifti(tmp_path / f"out{suffix}", on_scan, scan.grid, scan.source)
    out = nib.load(tmp_path / f"out{suffix}")
    np.testing.assert_allclose(out.affine, affine, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(out.dataobj), labels)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(affines(obliquity=0.4, shear=0.2), st.sampled_from([None, 0.75, 1.0]))
def test_a_mark_keeps_its_place_through_preparation_and_back(tmp_path, affine, spacing):
    """A bright ball in a NIfTI file is where it was after preparation, and in the mask that is written."""
    spacing_of = np.linalg.norm(affine[:3, :3], axis=0)
    affine[:3, :3] *= np.clip(spacing_of, 0.5, 1.2) / spacing_of  # a ball must cover voxels on every axis
    shape = (32, 36, 30)
    centre = affine[:3, :3] @ [17.0, 14.0, 16.0] + affine[:3, 3]
    where = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    distance = np.linalg.norm(where - centre, axis=-1)
    image = np.where(distance < 4.0, 400.0, 40.0).astype(np.float32)
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "a_cta.nii")
    scan = read_nifti(tmp_path / "a_cta.nii", "CTA")
    prepared = prepare_case(Case(scan), Preparation(spacing_mm=spacing))
    bright = prepared.image > 0.6
    found = prepared.grid.to_mm(np.argwhere(bright)).mean(axis=0)
    np.testing.assert_allclose(found, centre, atol=0.35)
    write_nifti(tmp_path / "out.nii", bright, prepared.grid, scan.source)
    out = nib.load(tmp_path / "out.nii")
    mask = np.asarray(out.dataobj) > 0
    assert mask.shape == shape
    truth = distance < 4.0
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.85


@settings(max_examples=40, deadline=None)
@given(affines(), st.sampled_from([0.5, 0.75, 1.3]))
def test_the_isotropic_grid_covers_every_voxel(affine, spacing):
    grid = Grid((12, 15, 9), affine)
    onto = isotropic(grid, spacing)
    np.testing.assert_allclose(onto.spacing, spacing)
    corners = grid.to_mm(np.array([[i, j, k] for i in (0, 11) for j in (0, 14) for k in (0, 8)]))
    index = onto.to_index(corners)
    assert (index > -1.01).all() and (index < np.array(onto.shape) + 0.01).all()


# Columns: unit LPS directions along slices, rows and columns.
PLANES = {
    "axial": np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], float),
    "axial, feet last": np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], float),
    "coronal": np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0]], float),
    "sagittal": np.array([[1, 0, 0], [0, 1, 0], [0, 0, -1]], float)[:, [0, 2, 1]],
    "oblique": np.array([[0, 0, 1], [0.0, 0.9, 0], [1.0, 0, 0]]),
}
_TURN = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]]) @ np.array(
    [[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]]
)
PLANES["oblique"] = _TURN @ PLANES["axial"]
SPACING = (2.0, 0.8, 0.6)  # slices, rows, columns in mm
ORIGIN = np.array([-12.0, -25.0, 40.0])  # LPS
SIZE = (24, 44, 52)  # slices, rows, columns


def stored_with_mark(mark: tuple[int, int, int]) -> np.ndarray:
    """Tissue of 300 with noise, and one bright blob at a slice, row and column."""
    rng = np.random.default_rng(0)
    volume = 300 + rng.normal(0, 8, SIZE)
    blob = np.zeros(SIZE)
    blob[mark] = 1.0
    blob = gaussian_filter(blob, (0.7, 1.8, 2.4))
    return np.clip(volume + 900 * blob / blob.max(), 0, 4000).astype(np.uint16)


def patient_position(axes: np.ndarray, at) -> np.ndarray:
    """RAS mm of a slice, row and column, straight from the DICOM standard (C.7.6.2.1.1)."""
    lps = ORIGIN + sum(axes[:, a] * SPACING[a] * at[a] for a in range(3))
    return lps * [-1, -1, 1]


def tables(root: Path, sop_uid: str, coordinates: dict) -> RsnaSource:
    train = {"SeriesInstanceUID": "1.1", "Modality": "MRI T1post", **dict.fromkeys(LABEL_COLUMNS, "0")}
    pd.DataFrame([{**train, "Aneurysm Present": "1", MCA: "1"}]).to_csv(root / "train.csv", index=False)
    row = {
        "SeriesInstanceUID": "1.1",
        "SOPInstanceUID": sop_uid,
        "coordinates": str(coordinates),
        "location": MCA,
    }
    pd.DataFrame([row]).to_csv(root / "train_localizers.csv", index=False)
    return RsnaSource(root)


def enhanced(path: Path, stored: np.ndarray, axes: np.ndarray, frame_order: np.ndarray) -> None:
    """One multi-frame file; frame f shows slice `frame_order[f]` and has a position of its own."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    meta.MediaStorageSOPInstanceUID = "1.1.1"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = EnhancedMRImageStorage, "1.1.1", "1.1"
    ds.Modality, ds.PatientID, ds.NumberOfFrames = "MR", "P1", len(stored)
    ds.Rows, ds.Columns = stored.shape[1:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 0
    measures, orientation = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [SPACING[1], SPACING[2]], 77.0
    orientation.ImageOrientationPatient = [float(v) for v in (*axes[:, 2], *axes[:, 1])]
    shared = Dataset()
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PlaneOrientationSequence = Sequence([orientation])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for k in frame_order:
        place, group = Dataset(), Dataset()
        place.ImagePositionPatient = [float(v) for v in ORIGIN + axes[:, 0] * SPACING[0] * k]
        group.PlanePositionSequence = Sequence([place])
        frames.append(group)
    ds.PerFrameFunctionalGroupsSequence = Sequence(frames)
    ds.PixelData = np.ascontiguousarray(stored[frame_order]).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("spacing", [None, 0.75])
@pytest.mark.parametrize("multi_frame", [False, True])
@pytest.mark.parametrize("plane", PLANES)
def test_localizers_land_on_the_mark_after_preparation(tmp_path, plane, multi_frame, spacing):
    axes, mark = PLANES[plane], (9, 27, 16)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    stored = stored_with_mark(mark)
    if multi_frame:
        order = np.random.default_rng(1).permutation(len(stored))
        enhanced(tmp_path / "series/1.1/all.dcm", stored, axes, order)
        frame = int(np.flatnonzero(order == mark[0])[0])
        source = tables(tmp_path, "1.1.1", {"x": float(mark[2]), "y": float(mark[1]), "f": frame})
    else:
        write_series(tmp_path / "series/1.1", stored, SPACING, axes, tuple(ORIGIN), series="1.1")
        source = tables(tmp_path, f"1.1.{mark[0] + 1}", {"x": float(mark[2]), "y": float(mark[1])})
    case = source.case("1.1")
    truth = patient_position(axes, mark)
    (lesion,) = case.lesions
    np.testing.assert_allclose(lesion.centre_mm, truth, atol=1e-4)
    assert lesion.location == LOCATIONS.index(MCA)
    index = np.rint(case.scan.grid.to_index(truth)).astype(int)
    assert tuple(index) == np.unravel_index(case.scan.volume.argmax(), case.scan.volume.shape)

    prepared = prepare_case(case, Preparation(spacing_mm=spacing))
    bright = np.argwhere(prepared.image > 0.5 * prepared.image.max())
    mean = prepared.grid.to_mm(bright).mean(axis=0)
    np.testing.assert_allclose(mean, truth, atol=0.5)
    at = np.rint(prepared.grid.to_index(prepared.lesions[0].centre_mm)).astype(int)
    assert prepared.image[tuple(at)] > 0.8 * prepared.image.max()
    # What a net would mark there comes back on the stored slices, rows and columns.
    write_nifti(
        tmp_path / "mask.nii", prepared.image > 0.5 * prepared.image.max(), prepared.grid, case.scan.source
    )
    mask = np.asarray(nib.load(tmp_path / "mask.nii").dataobj)
    # The stack runs along the normal of its slices, which may be against the order of writing.
    normal = np.cross(axes[:, 2], axes[:, 1])
    stored_at = mark if normal @ axes[:, 0] > 0 else (SIZE[0] - 1 - mark[0], *mark[1:])
    np.testing.assert_allclose(case.scan.source.to_mm(np.array(stored_at)), truth, atol=1e-4)
    assert mask.shape == SIZE and mask[stored_at]
    np.testing.assert_allclose(np.argwhere(mask).mean(axis=0), stored_at, atol=0.6)
