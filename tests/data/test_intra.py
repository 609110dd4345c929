import csv
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation
from vessel_meshes import SAC_MM, vessel_with_sac, write_cloud, write_obj

from aneurysm.data.errors import ReadError
from aneurysm.data.labels import UNNAMED_VESSEL
from aneurysm.data.sources.intra import MARKER, IntraSource
from aneurysm.data.sources.intra_crops import crop_with, crop_without, willis_centre
from aneurysm.data.sources.intra_meshes import read_trees
from aneurysm.data.sources.intra_sacs import distinct_lesions

pytest.importorskip("vtk", reason="needs aneurysm[mesh]")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two usable trees and one whose segment lies elsewhere."""
    folder = tmp_path_factory.mktemp("IntrA")
    for number, branch in ((3, 8.0), (4, -12.0), (5, 16.0)):
        vertices, faces = vessel_with_sac(hollow=number == 4, branch_mm=branch)
        write_obj(folder / "complete" / f"AN{number}.obj", vertices + 20 * number, faces)
        shift = 20.0 * number + 15 * (number == 5)
        write_cloud(folder / "annotated" / "ad" / f"AN{number}-_norm.ad", 10.0, shift)
    return folder


def render(release: Path, root: Path, jobs: int = 1) -> IntraSource:
    return IntraSource(release, root, seed=3, spacing_mm=0.7, size=52, negatives=1.0, jobs=jobs)


@pytest.fixture(scope="module")
def source(release: Path, tmp_path_factory: pytest.TempPathFactory) -> IntraSource:
    return render(release, tmp_path_factory.mktemp("rendered"))


def test_index(source: IntraSource) -> None:
    index = source.index().sort_values(["patient_id", "present"])
    assert index["patient_id"].tolist() == ["intra-AN3", "intra-AN3", "intra-AN4", "intra-AN4"]
    assert index["present"].tolist() == [0, 1, 0, 1]
    assert (index.groupby("patient_id")["modality"].nunique() == 1).all()  # else it gives labels away
    assert index.filter(like="location_").isna().all(axis=None) and index["age"].isna().all()
    assert set(index["site"]) == {"intra"}
    assert [line for line in source.left_out() if "AN5" in line]


def test_positive_and_negative_cases(source: IntraSource) -> None:
    for row in source.index().itertuples():
        case = source.case(row.series_uid)
        assert case.vessel is not None and case.aneurysm is not None
        assert set(np.unique(case.vessel)) == {0, UNNAMED_VESSEL}
        assert case.scan.volume.shape == (52, 52, 52)
        np.testing.assert_allclose(case.scan.grid.spacing, 0.7, atol=1e-4)
        lumen = case.scan.volume[case.vessel > 0].mean()
        beside = binary_dilation(case.vessel > 0, iterations=3) & ~binary_dilation(case.vessel > 0)
        around = case.scan.volume[beside].mean()
        assert lumen < around if row.modality == "T2" else lumen > around
        if not row.present:
            assert case.present is False and not case.lesions and not case.aneurysm.any()
            continue
        assert case.present is True and len(case.lesions) == 1
        assert (case.vessel[case.aneurysm > 0] > 0).all()
        lesion = case.lesions[0]
        truth = (SAC_MM + 20 * int(row.patient_id[-1])) * (-1, -1, 1)
        assert np.linalg.norm(lesion.centre_mm - truth) < 1.2  # towards the dome: the trunk has its share
        assert lesion.radius_mm == pytest.approx(2.9, abs=0.2)
        assert lesion.location is None


def test_negative_scans_show_less_or_other_lumen(source: IntraSource) -> None:
    index = source.index()
    for _, pair in index.groupby("patient_id"):
        yes, no = (source.case(pair[pair["present"] == p]["series_uid"].iloc[0]) for p in (1, 0))
        assert yes.vessel is not None and no.vessel is not None and yes.aneurysm is not None
        assert (no.vessel > 0).sum() > 300
        if no.scan.grid.same_as(yes.scan.grid):
            assert (no.vessel[yes.aneurysm > 0] > 0).mean() < 0.05


@pytest.mark.slow
def test_same_bytes_for_any_number_of_jobs(source: IntraSource, release: Path, tmp_path: Path) -> None:
    again = render(release, tmp_path, jobs=2)
    names = sorted(p.relative_to(source.root) for p in source.root.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again.root) for p in again.root.rglob("*") if p.is_file())
    assert all((source.root / n).read_bytes() == (again.root / n).read_bytes() for n in names)


def test_found_again_and_kept_apart_from_other_parameters(source: IntraSource, release: Path) -> None:
    stamp = (source.root / MARKER).stat().st_mtime_ns
    assert render(release, source.root.parent).root == source.root
    assert (source.root / MARKER).stat().st_mtime_ns == stamp
    other = IntraSource(release, source.root.parent, seed=3, size=44, spacing_mm=0.7, max_patients=1, jobs=1)
    assert other.root != source.root and other.index()["patient_id"].nunique() == 1


def test_every_tree_in_several_modalities(source: IntraSource, release: Path, tmp_path: Path) -> None:
    both = IntraSource(
        release, tmp_path, seed=3, size=44, spacing_mm=0.7, max_patients=1, renderings=2, jobs=1
    )
    index = both.index()
    assert index["patient_id"].nunique() == 1 and index["modality"].nunique() == 2
    positive = index[index["present"] == 1]["series_uid"]
    assert len(positive) == 2
    images = [both.case(uid).scan.volume for uid in positive]
    assert not np.array_equal(*images)  # its own noise
    with pytest.raises(ValueError, match="renderings=5"):
        IntraSource(release, tmp_path, renderings=5)


def test_too_small_a_box_is_reported(release: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Raise size to"):
        IntraSource(release, tmp_path, size=24, spacing_mm=0.5, jobs=1)
    assert not list(tmp_path.iterdir())  # nothing half-written stays


def test_wrong_parameters_and_folders(release: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="modalities"):
        IntraSource(release, tmp_path, modalities=["PET"])
    with pytest.raises(ReadError, match="no IntrA meshes"):
        IntraSource(tmp_path / "nowhere", tmp_path)


def test_boxes_hold_their_aneurysm_whole_or_none(release: Path) -> None:
    tree = read_trees(release, max_patients=1)[0]
    lesions = distinct_lesions(tree)
    points = lesions[0].sac_points
    for seed in range(20):
        grid = crop_with(lesions[0], lesions, tree, 40, 0.7, np.random.default_rng(seed))
        index = grid.to_index(points)
        assert index.min() > 6 / 0.7 - 1.5 and index.max() < 40.5 - 6 / 0.7 + 1
        free = crop_without(lesions, tree, 24, 0.7, np.random.default_rng(seed), grid)
        if free is not None:
            outside = (free.to_index(points) < -5) | (free.to_index(points) > 24 + 5)
            assert outside.any(1).all()


def test_real_trees(shared_data: Path, tmp_path: Path) -> None:
    """The first patients of IntrA: lesions lie where the annotation says."""
    source = IntraSource(shared_data / "intra", tmp_path, max_patients=2, size=72, jobs=1)
    with open(shared_data / "intra" / "annotated_alignment.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["aligned"] == "1"]
    index = source.index()
    assert set(index["patient_id"]) == {"intra-AN2", "intra-AN6"}
    for uid, patient in index[index["present"] == 1][["series_uid", "patient_id"]].itertuples(index=False):
        centres = [
            (-float(r["cx_mm"]), -float(r["cy_mm"]), float(r["cz_mm"]))
            for r in rows
            if f"intra-{r['patient']}" == patient
        ]
        case = source.case(uid)
        assert case.vessel is not None and 3000 < (case.vessel > 0).sum() < 60000
        for lesion in case.lesions:
            assert np.linalg.norm(np.array(centres) - lesion.centre_mm, axis=1).min() < 2
            assert lesion.radius_mm is not None and 1 < lesion.radius_mm < 4


def test_circle_of_willis_is_found(shared_data: Path) -> None:
    for tree in read_trees(shared_data / "intra", max_patients=2):
        low, high = tree.vertices.min(0), tree.vertices.max(0)
        share = (willis_centre(tree) - low) / (high - low)
        assert abs(share[0] - 0.5) < 0.01 and 0.3 < share[1] < 0.8 and 0.25 < share[2] < 0.65
