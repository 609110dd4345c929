import numpy as np
import pytest
from scipy.spatial import KDTree
from test_voxelise import grid
from vessel_meshes import SAC_MM, SAC_RADIUS_MM, sac_points, tube, vessel_with_sac

from aneurysm.data.sources.intra_meshes import Segment, Tree, place_segment
from aneurysm.data.sources.intra_sacs import add_sac, distinct_lesions, drop_crumbs, fill_caves, without_sac
from aneurysm.data.voxelise import voxelise

pytest.importorskip("vtk", reason="needs aneurysm[mesh]")
WHERE = grid(90, 0.3)


def segment_on(vertices: np.ndarray) -> Segment:
    return place_segment("AN1", *sac_points(), KDTree(vertices))


def sac_mm3(outside_of: float) -> float:
    """Volume of the ball beyond the trunk, by counting."""
    axis = np.arange(-8, 8, 0.1)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    ball = (x - SAC_MM[0]) ** 2 + (y - SAC_MM[1]) ** 2 + (z - SAC_MM[2]) ** 2 < SAC_RADIUS_MM**2
    return float((ball & (np.hypot(x, y) > outside_of)).sum()) * 0.1**3


@pytest.mark.parametrize("hollow", [False, True])
def test_sac_is_whole_even_where_the_tree_is_hollow(hollow: bool) -> None:
    vertices, faces = vessel_with_sac(hollow)
    inside = voxelise(vertices, faces, WHERE, 1)
    sac = add_sac(inside, WHERE, segment_on(vertices))
    assert not (sac & ~inside).any()
    volume = sac.sum() * WHERE.voxel_mm3
    # the border to the trunk is where both walls are equally far, a little outside or inside of the trunk's
    # wall
    assert sac_mm3(2.3) * 0.9 < volume < sac_mm3(1.5) * 1.1
    assert np.linalg.norm(WHERE.to_mm(np.argwhere(sac)).mean(0) - SAC_MM) < 1.0


def test_a_missing_sac_comes_with_the_vessel_that_carries_it() -> None:
    vertices, _ = tube(2.0, 40.0)
    segment = segment_on(vertices)
    assert segment.aligned and not segment.sac_in_tree
    inside = np.zeros(WHERE.shape, bool)  # the trunk is missing as well
    sac = add_sac(inside, WHERE, segment)
    lumen = WHERE.to_mm(np.argwhere(inside & ~sac))
    assert sac.sum() * WHERE.voxel_mm3 > sac_mm3(2.3) * 0.9
    assert np.hypot(lumen[:, 0], lumen[:, 1]).max() < 2.4  # a trunk
    assert 7.5 < abs(lumen[:, 2]).max() < 9.5  # as long as the segment: its open ends do not leak


def test_cutting_a_sac_leaves_the_trunk() -> None:
    vertices, faces = vessel_with_sac()
    inside = voxelise(vertices, faces, WHERE, 1)
    sac = add_sac(inside, WHERE, segment_on(vertices))
    left = without_sac(inside, sac, WHERE)
    assert left is not None and not (left & sac).any()
    rest = WHERE.to_mm(np.argwhere(left))
    near = rest[(abs(rest[:, 2] - SAC_MM[2]) < 3) & (abs(rest[:, 1]) < 3)]
    assert near[:, 0].max() < 3.0  # the sac reached to 7 mm; a bump of less than 1 mm is left
    trunk = abs(rest[:, 2] + 8) < 3  # away from sac and branch nothing changed
    assert trunk.sum() * WHERE.voxel_mm3 == pytest.approx(np.pi * 4 * 6, rel=0.06)


def test_a_fusiform_sac_cannot_be_cut() -> None:
    vertices, faces = tube(2.0, 40.0)
    inside = voxelise(vertices, faces, WHERE, 1)
    sac = inside.copy()
    sac[:35] = sac[55:] = False
    assert without_sac(inside, sac, WHERE) is None


def test_caves_are_filled_and_pockets_at_the_border_are_not() -> None:
    lumen = np.zeros((12, 12, 12), bool)
    lumen[2:9, 2:9, 2:9] = True
    lumen[4:6, 4:6, 4:6] = False
    lumen[0:2, 10, :] = True
    filled = fill_caves(lumen)
    assert filled.sum() - lumen.sum() == 8 and filled[4:6, 4:6, 4:6].all()
    assert drop_crumbs(lumen, 30).sum() == lumen.sum() - 24


def test_three_segments_of_one_aneurysm_are_one_lesion() -> None:
    vertices, faces = vessel_with_sac()
    one = segment_on(vertices)
    points, normals, label = sac_points()
    up = np.array([0.0, 0.0, 9.0])
    far = place_segment("AN1-3", points + up, normals, label, KDTree(vertices + up))
    lost = place_segment("AN1-4", points + 40, normals, label, KDTree(vertices))
    tree = Tree("AN1", "AN1", vertices, faces, (one, segment_on(vertices), far, lost))
    assert distinct_lesions(tree) == [one, far]
