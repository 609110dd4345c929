import csv
from pathlib import Path

import numpy as np
import pytest
from vessel_meshes import SAC_MM, vessel_with_sac, write_cloud, write_obj

from aneurysm.data.errors import ReadError
from aneurysm.data.sources.intra_meshes import read_obj, read_trees


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AN7 and AN12 are one scan, AN8 lacks its first segment, the segment of AN9 lies elsewhere."""
    folder = tmp_path_factory.mktemp("IntrA")
    for number, shift in ((7, 0), (12, 0), (8, 30), (9, 60)):
        vertices, faces = vessel_with_sac()
        write_obj(folder / "complete" / f"ArteryObjAN{number}.obj", vertices + shift, faces)
    write_cloud(folder / "annotated" / "ad" / "AN7-_norm.ad", scale=10.0)
    write_cloud(folder / "annotated" / "ad" / "AN8-2-_norm.ad", shift_mm=30.0)
    write_cloud(folder / "annotated" / "ad" / "AN9-_norm.ad", shift_mm=75.0)
    return folder


def test_official_layout(release: Path) -> None:
    trees = read_trees(release)
    assert [t.name for t in trees] == ["AN7", "AN8", "AN9", "AN12"]  # by number, not by letter
    assert [t.patient_id for t in trees] == ["AN7", "AN8", "AN9", "AN7"]
    assert [t.fully_annotated for t in trees] == [True, False, False, False]
    assert [[s.aligned for s in t.segments] for t in trees] == [[True], [True], [False], []]
    segment = trees[0].segments[0]
    assert segment.misfit_mm < 0.3 and segment.sac_in_tree  # stored in tenths of a millimetre
    # LPS to RAS: x and y change sign; the points miss the side of the sac that opens into the trunk
    assert np.abs(segment.centre_mm - SAC_MM * (-1, -1, 1)).max() < 1
    outward = ((segment.sac_points - SAC_MM * (-1, -1, 1)) * segment.normals[segment.label == 1]).sum(1)
    assert outward.min() > 2.9


def test_stops_when_enough_patients_have_a_located_aneurysm(release: Path) -> None:
    assert [t.name for t in read_trees(release, max_patients=2)] == ["AN7", "AN8"]


def test_packed_layout_holds_76_trees(shared_data: Path) -> None:
    trees = {tree.name: tree for tree in read_trees(shared_data / "intra")}
    assert len(trees) == 76 and len({t.patient_id for t in trees.values()}) == 75
    assert trees["AN195"].patient_id == trees["AN201"].patient_id  # one scan under two names
    with open(shared_data / "intra" / "annotated_alignment.csv", newline="") as file:
        rows = {row["segment"]: row for row in csv.DictReader(file)}
    segments = {s.name: s for t in trees.values() for s in t.segments}
    assert segments.keys() == rows.keys()
    for name, segment in segments.items():
        centre = [-float(rows[name]["cx_mm"]), -float(rows[name]["cy_mm"]), float(rows[name]["cz_mm"])]
        np.testing.assert_allclose(segment.centre_mm, centre, atol=0.01)
        assert segment.aligned == bool(int(rows[name]["aligned"]))
    assert sorted(n for n, s in segments.items() if s.aligned and not s.sac_in_tree) == [
        "AN148",
        "AN158",
        "AN165",
    ]
    assert sorted(n for n, t in trees.items() if not t.fully_annotated) == ["AN1", "AN144"]


def test_wrong_folders_and_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"Expected complete/\*\.obj"):
        read_trees(tmp_path)
    square = tmp_path / "AN1.obj"
    square.write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\n")
    with pytest.raises(ReadError, match="Triangulate"):
        read_obj(square)
    square.write_text("v 0 0 0\nv 1 0 0\nf 1 2 3\n")
    with pytest.raises(ReadError, match="cut off"):
        read_obj(square)
    write_obj(tmp_path / "complete" / "AN1.obj", *vessel_with_sac())
    cloud = tmp_path / "annotated" / "ad" / "AN1-_norm.ad"
    cloud.parent.mkdir(parents=True)
    cloud.write_text("0 0 0 0 0 1\n")
    with pytest.raises(ReadError, match="7 columns"):
        read_trees(tmp_path)
    cloud.write_text("0 0 0 0 0 1 0\n")
    with pytest.raises(ReadError, match="label 1"):
        read_trees(tmp_path)


def test_obj_indices_may_count_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.obj"
    path.write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nf -3/1 -2/2 -1/3\n")
    np.testing.assert_array_equal(read_obj(path)[1], [[0, 1, 2]])
