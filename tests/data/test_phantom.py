"""Simulated patients: anatomy, voxel maps, contrast and the data set on disk."""

import hashlib
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.ndimage import label

from aneurysm.data.labels import LOCATIONS, VESSEL_LABEL
from aneurysm.data.phantom import dataset
from aneurysm.data.phantom.anatomy import Patient, risk, sample_patient
from aneurysm.data.phantom.dataset import MARKER, PhantomSource
from aneurysm.data.phantom.head import smooth_noise
from aneurysm.data.phantom.imaging import HeadGeometry, simulate_image
from aneurysm.data.phantom.lumen import LumenMaps, voxelise
from aneurysm.data.phantom.sacs import sample_sac, sample_site
from aneurysm.data.phantom.tree import sample_tree
from aneurysm.data.scan import Grid


@cache
def patients(count: int = 100) -> tuple[Patient, ...]:
    return tuple(sample_patient(np.random.default_rng([11, i])) for i in range(count))


def cube(size: int, spacing: float, centre: np.ndarray | None = None) -> Grid:
    affine = np.diag([spacing, spacing, spacing, 1.0])[:, [2, 1, 0, 3]]
    affine[:3, 3] = (0 if centre is None else centre) - spacing * (size - 1) / 2
    return Grid((size,) * 3, affine)


@cache
def positive() -> tuple[Patient, Grid, LumenMaps]:
    patient = next(p for p in patients() if len(p.sacs) == 1 and p.sacs[0].extent_mm > 5)
    grid = cube(96, 0.75)
    return patient, grid, voxelise(patient, grid)


def test_about_half_are_positive_and_every_location_occurs() -> None:
    many = patients()
    assert 0.36 < np.mean([p.present for p in many]) < 0.64
    two = np.mean([len(p.sacs) == 2 for p in many if p.present])
    assert 0.02 < two < 0.35
    found = {sac.location for p in many for sac in p.sacs}
    for i in range(100):  # the rarest have 2 % of the aneurysms
        if len(found) == len(LOCATIONS):
            break
        found |= {sac.location for sac in sample_patient(np.random.default_rng([12, i]), luck=0.0).sacs}
    assert found == set(range(len(LOCATIONS)))
    for p in many:
        assert p.locations.sum() == len(p.sacs) and p.present == bool(p.sacs)
        assert 20 <= p.age <= 89 and p.sex in ("M", "F")
    assert risk(60, "F") > risk(60, "M") > risk(40, "M")


def test_sizes_follow_the_clinical_range() -> None:
    extents = [sac.extent_mm for p in patients() for sac in p.sacs]
    assert min(extents) >= 2.5 and max(extents) <= 15
    assert 4.5 < np.median(extents) < 6.5


def test_same_generator_same_patient_and_another_differs() -> None:
    first, again, other = (sample_patient(np.random.default_rng(seed), luck=0.0) for seed in (5, 5, 6))
    for a, b in zip(first.tree.segments, again.tree.segments, strict=True):
        assert a.name == b.name and (a.points == b.points).all() and (a.radii == b.radii).all()
    assert (first.sacs[0].centre_mm == again.sacs[0].centre_mm).all()
    assert not np.allclose(first.tree.segments[0].points[0], other.tree.segments[0].points[0])


def test_left_is_left_and_right_is_right() -> None:
    for patient in patients()[:40]:
        midline = patient.tree.centre_mm[0]
        for part in (*patient.tree.segments, *patient.sacs):
            name = LOCATIONS[part.location]
            x = part.points[:, 0].mean() if hasattr(part, "points") else part.centre_mm[0]
            if "Cerebral" in name and "Anterior" in name:
                continue  # the two A2 run side by side in the midline
            if name.startswith("Left"):
                assert x < midline, part
            if name.startswith("Right"):
                assert x > midline, part


def test_arteries_are_connected_and_have_human_calibres() -> None:
    for patient in patients()[:20]:
        tree = patient.tree
        points = np.concatenate([s.points for s in tree.segments])
        owner = np.concatenate([[i] * len(s.points) for i, s in enumerate(tree.segments)])
        for i, segment in enumerate(tree.segments):
            ends = segment.points[[0, -1]]
            gaps = np.linalg.norm(points[owner != i][:, None] - ends, axis=2).min(axis=0)
            bridge = segment.name.endswith(("PCom", "ACom"))
            assert (gaps.max() if bridge else gaps.min()) < 1e-6, segment.name
            step = np.linalg.norm(np.diff(segment.points, axis=0), axis=1)
            assert step.max() < 2.5, segment.name
            assert segment.radii.min() > 0.25 and segment.radii.max() < 3.2, segment.name
        for side in ("left", "right"):
            carotid, m1, a1 = (
                tree.find(f"{side} {name}").radii.mean() for name in ("supraclinoid ICA", "M1", "A1")
            )
            assert carotid > m1 > 0.9 and carotid > a1
    communicating = [p.tree.find("right PCom") is not None for p in patients()]
    assert 0.6 < np.mean(communicating) < 0.97  # a common variant lacks it


def test_distance_of_a_segment_is_exact() -> None:
    patient, grid, maps = positive()
    tree = patient.tree
    rng = np.random.default_rng(0)
    near = np.argwhere((maps.lumen > 0) & (maps.lumen < 1))
    for index in near[rng.integers(len(near), size=60)]:
        at = grid.to_mm(index)
        if min(np.linalg.norm(at - sac.centre_mm) - sac.reach_mm for sac in patient.sacs) < 1.5:
            continue
        distances = []
        for segment in tree.segments:
            a, b = segment.points[:-1], segment.points[1:]
            t = np.clip(((at - a) * (b - a)).sum(1) / ((b - a) ** 2).sum(1), 0, 1)
            radius = segment.radii[:-1] + t * np.diff(segment.radii)
            distances.append((np.linalg.norm(a + t[:, None] * (b - a) - at, axis=1) - radius).min())
        expected = np.clip(0.5 - min(distances) / 0.75, 0, 1)
        assert maps.lumen[tuple(index)] == pytest.approx(expected, abs=1e-3)
        if expected >= 0.5:
            nearest = tree.segments[int(np.argmin(distances))]
            assert maps.vessel[tuple(index)] == VESSEL_LABEL[nearest.location]


def test_masks_agree_with_the_volume_fraction() -> None:
    patient, _, maps = positive()
    assert ((maps.lumen >= 0.5) == (maps.vessel > 0)).all()
    sac = maps.aneurysm == 1
    assert sac.any() and (maps.lumen[sac] >= 0.5).all()
    assert (maps.vessel[sac] == VESSEL_LABEL[patient.sacs[0].location]).all()
    joined, _ = label(maps.vessel > 0, structure=np.ones((3, 3, 3)))
    assert len(np.unique(joined[sac])) == 1
    around = joined == joined[sac][0]
    assert (around & ~sac).sum() > 1000  # the sac hangs on the tree


def test_a_sac_has_the_extent_it_was_asked_for() -> None:
    for seed in range(15):
        rng = np.random.default_rng(seed)
        tree = sample_tree(rng)
        site = sample_site(tree, (2, 4, 8, 11, 12)[seed % 5], rng)
        assert site is not None
        sac = sample_sac(site, 6.0, rng)
        grid = cube(56, 0.25, sac.centre_mm)
        maps = voxelise(Patient(tree, (sac,), 50, "F"), grid)
        wall = np.argwhere(maps.aneurysm == 1) * 0.25
        directions = rng.normal(size=(200, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        extent = np.ptp(wall @ directions.T, axis=0).max()
        assert 5.0 < extent < 7.5
        assert label(maps.aneurysm, structure=np.ones((3, 3, 3)))[1] == 1
        (lesion,) = maps.lesions
        volume = (maps.aneurysm == 1).sum() * grid.voxel_mm3
        assert 4 / 3 * np.pi * lesion.radius_mm**3 == pytest.approx(volume)


def test_a_sac_outside_the_grid_is_refused() -> None:
    patient, _, _ = positive()
    with pytest.raises(ValueError, match="covers no voxel"):
        voxelise(patient, cube(16, 0.75, np.array([300.0, 0, 0])))


@pytest.mark.parametrize("modality", ["CTA", "MRA", "T1", "T2"])
def test_contrast_of_the_modality(modality: str) -> None:
    patient, grid, maps = positive()
    middle = grid.to_index(patient.tree.centre_mm)
    head = HeadGeometry(tuple(float(i) for i in middle), patient.tree.scale)
    image, again = (
        simulate_image(maps.lumen, modality, grid.spacing, np.random.default_rng(3), head=head)
        for _ in range(2)
    )
    assert image.dtype == np.float32 and image.shape == grid.shape and np.isfinite(image).all()
    assert (image == again).all()
    brain = np.zeros(grid.shape, bool)
    brain[70:] = True  # well above the skull base
    brain &= maps.lumen == 0
    blood, tissue = image[maps.lumen == 1], image[brain]
    if modality == "T2":
        assert np.median(blood) < 0.5 * np.median(tissue)
        assert np.percentile(image, 99.5) > 1.8 * np.median(tissue)  # fluid
    else:
        assert np.percentile(blood, 25) > np.percentile(tissue, 95)
    if modality == "CTA":
        assert 200 < np.median(blood) < 480 and 10 < np.median(tissue) < 60
        assert (image[maps.lumen == 0] > 600).mean() > 0.01  # bone: a threshold finds no vessels
        assert image.min() < -300  # air in the sphenoid sinus
    else:
        assert image.min() >= 0
    # Where the skull is not given, the middle of the array is taken for the middle of the circle.
    assert simulate_image(maps.lumen[:40, :40, :40], modality, (1, 1, 1), np.random.default_rng(3)).shape == (
        40, 40, 40,
    )  # fmt: skip


def test_unknown_modality_is_refused() -> None:
    with pytest.raises(ValueError, match="PET"):
        simulate_image(np.zeros((8, 8, 8), np.float32), "PET", (1, 1, 1), np.random.default_rng(0))


def test_smooth_noise_is_smooth_and_normalised() -> None:
    field = smooth_noise((60, 50, 40), (6.0, 5.0, 4.0), np.random.default_rng(0))
    assert field.shape == (60, 50, 40) and field.dtype == np.float32
    assert abs(field.mean()) < 0.1 and 0.5 < field.std() < 0.7
    assert np.abs(np.diff(field, axis=0)).mean() < 0.2


def digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PhantomSource:
    return PhantomSource(tmp_path_factory.mktemp("phantoms"), patients=4, seed=2, size=48, jobs=1)


def test_the_data_set_reads_as_rsna(source: PhantomSource) -> None:
    index = source.index()
    assert len(index) == 4 and index.patient_id.nunique() == 4 and set(index.site) == {"phantom"}
    assert index.present.isin([0, 1]).all() and 1 <= index.present.sum() <= 3
    for row in index.itertuples():
        case = source.case(row.series_uid)
        assert case.scan.modality == row.modality
        assert case.scan.volume.shape == (48, 48, 48)
        assert not case.scan.notes
        assert (case.scan.grid.spacing > 0.69).all() and (case.scan.grid.spacing < 0.81).all()
        assert case.vessel is not None and case.aneurysm is not None
        assert len(case.lesions) == case.locations.sum() and case.present == bool(case.lesions)
        for k, lesion in enumerate(case.lesions, start=1):
            at = tuple(np.rint(case.scan.grid.to_index(lesion.centre_mm)).astype(int))
            assert case.aneurysm[at] == k
            assert case.locations[lesion.location] == 1
            assert case.vessel[at] == VESSEL_LABEL[lesion.location]
            assert lesion.radius_mm is not None and lesion.radius_mm > 0.8


def test_image_and_masks_fit_the_dicom_volume(source: PhantomSource) -> None:
    uid = source.index().series_uid[0]
    case = source.case(uid)
    image = nibabel.load(source.root / "segmentations" / f"{uid}.nii")
    array = np.asarray(image.dataobj)
    rng = np.random.default_rng(0)
    for i, j, k in rng.integers(48, size=(200, 3)):
        world = (image.affine @ (i, j, k, 1))[:3]
        at = case.scan.grid.to_index(world)
        assert np.allclose(at, np.rint(at), atol=0.01)
        assert array[i, j, k] == pytest.approx(case.scan.volume[tuple(np.rint(at).astype(int))], abs=0.51)


def test_same_bytes_for_any_folder_jobs_and_number_of_patients(source: PhantomSource, tmp_path: Path) -> None:
    fewer = PhantomSource(tmp_path, patients=2, seed=2, size=48, jobs=2)
    all_files, files = digest(source.root), digest(fewer.root)
    shared = [name for name in files if name.startswith(("series/", "segmentations/"))]
    assert len(shared) == 2 * (48 + 3)
    assert all(files[name] == all_files[name] for name in shared)
    assert fewer.root.name != source.root.name


def test_a_complete_set_is_kept_and_an_incomplete_one_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"patients": 1, "seed": 0, "size": 44, "modalities": ["T2"], "jobs": 1}
    first = PhantomSource(tmp_path, **settings)
    assert first.index().modality.tolist() == ["T2"]
    before = digest(first.root)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "write_phantoms", lambda *_: pytest.fail("written again"))
        PhantomSource(tmp_path, **settings)
    (first.root / MARKER).unlink()
    next(first.root.glob("series/*/*.dcm")).unlink()
    assert digest(PhantomSource(tmp_path, **settings).root) == before
    assert [path.name for path in tmp_path.iterdir()] == [first.root.name]  # nothing is left behind


def test_few_patients_show_every_modality() -> None:
    draws = np.array([dataset._balanced(seed, i) for seed in range(5) for i in range(12)]).reshape(5, 12, 2)
    for set_of_12 in draws:
        kinds = np.searchsorted([0.35, 0.65, 0.85], set_of_12[:, 1], side="right")
        assert set(kinds) == {0, 1, 2, 3}
        assert 4 <= (set_of_12[:, 0] < 0.5).sum() <= 8


def test_wrong_parameters_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Raise size to 43"):
        PhantomSource(tmp_path, patients=1, seed=0, size=32)
    with pytest.raises(ValueError, match="modalities must be some of"):
        PhantomSource(tmp_path, patients=1, seed=0, modalities=["CT"])
