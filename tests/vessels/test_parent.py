import numpy as np
import pytest
from synthetic_trees import SACS, TREE, cube, draw

from aneurysm.vessels.candidates import Candidate
from aneurysm.vessels.graph import build_graph
from aneurysm.vessels.parent import local_path

GRID = cube()


def at(centre) -> Candidate:
    return Candidate(np.array(centre, float), 0.5, 0, 1.0)


def test_the_parent_of_a_sidewall_sac_is_the_straight_vessel():
    sac = SACS["sidewall"]
    graph = build_graph(draw(GRID, [*TREE, sac]), GRID)
    path, tangent, radius = local_path(graph, at(sac[0]), extent_mm=8.0)
    world = path + np.array(sac[0])
    assert np.abs(world[:, 0] - 36).max() < 1 and np.abs(world[:, 1] - 36).max() < 2  # never into the sac
    assert np.ptp(world[:, 2]) == pytest.approx(16, abs=1.5)
    assert np.all(tangent[:, 2] > 0.8)  # the parent thins upwards, and blood runs from thick to thin
    np.testing.assert_allclose(np.linalg.norm(tangent, axis=1), 1)
    assert radius[0] > radius[-1] and np.all((radius > 2) & (radius < 3.5))
    arc = np.linalg.norm(np.diff(path, axis=0), axis=1).sum()
    assert arc <= 16.01


def test_the_walk_passes_a_bifurcation_into_the_thicker_branch():
    graph = build_graph(draw(GRID, TREE), GRID)
    path, _, radius = local_path(graph, at([36, 36, 28]), extent_mm=15.0)
    world = path + np.array([36, 36, 28])
    assert world[-1, 1] < 33  # the branch to smaller y is the thicker one
    assert world[0, 2] < 16 and len(path) == len(radius) > 10


def test_short_and_missing_vessels():
    empty = build_graph(np.zeros(GRID.shape, bool), GRID)
    path, tangent, radius = local_path(empty, at([1, 2, 3]))
    assert path.shape == (0, 3) and tangent.shape == (0, 3) and radius.shape == (0,)
    dot = np.zeros(GRID.shape, bool)
    dot[10, 10, 10] = True
    path, tangent, radius = local_path(build_graph(dot, GRID), at([7.5, 7.5, 7.5]))
    assert path.shape == (1, 3) and np.linalg.norm(tangent) == pytest.approx(1) and radius.shape == (1,)


def test_every_candidate_of_a_scan_gets_the_path_it_would_get_alone():
    sac = SACS["sidewall"]
    mask = draw(GRID, [*TREE, sac])
    graph = build_graph(mask, GRID)
    for node in (0, len(graph) // 2, len(graph) - 1):
        alone = local_path(build_graph(mask, GRID), at(graph.position[node]))
        for ours, other in zip(local_path(graph, at(graph.position[node])), alone, strict=True):
            np.testing.assert_array_equal(ours, other)
