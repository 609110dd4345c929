import time

import numpy as np
import pytest
from scipy import ndimage, sparse
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree
from synthetic_trees import SACS, TREE, canonical, cube, draw

from aneurysm.data.scan import Grid
from aneurysm.vessels.features import EDGE_FEATURES
from aneurysm.vessels.graph import END, JUNCTION, PATH, VesselGraph, build_graph


def pieces(graph: VesselGraph) -> int:
    links = sparse.coo_matrix((np.ones(len(graph.edges)), graph.edges.T), shape=(len(graph), len(graph)))
    return connected_components(links, directed=False)[0]


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Largest distance from a point of one set to the other set, both ways."""
    return float(max(KDTree(a).query(b)[0].max(), KDTree(b).query(a)[0].max()))


def test_tree_without_sac_has_one_junction_and_three_ends():
    grid = cube()
    graph = build_graph(draw(grid, TREE), grid)
    kinds = np.bincount(graph.kind, minlength=3)
    assert (kinds[JUNCTION], kinds[END]) == (1, 3)
    assert graph.segments == 3 and pieces(graph) == 1
    assert np.linalg.norm(graph.position[graph.kind == JUNCTION][0] - [36, 36, 30]) < 4
    assert set(graph.degree[graph.kind == END]) == {1} and set(graph.degree[graph.kind == PATH]) == {2}
    np.testing.assert_allclose(np.linalg.norm(graph.tangent, axis=1), 1, atol=1e-6)
    assert np.median(graph.edge_length) == pytest.approx(2.0, abs=0.3)


@pytest.mark.parametrize("seed", range(4))
def test_length_and_radius_of_oblique_tubes(seed: int):
    rng = np.random.default_rng(seed)
    grid = cube()
    axis = rng.normal(size=3)
    axis *= 25 / np.linalg.norm(axis)
    radius = float(rng.uniform(0.9, 2.2))
    graph = build_graph(draw(grid, [(36 - axis, 36 + axis, radius, radius)]), grid)
    assert graph.edge_length.sum() == pytest.approx(50, rel=0.05)
    assert np.median(graph.radius) == pytest.approx(radius, abs=0.35)
    assert np.all(np.abs(graph.tangent[3:-3] @ axis / 25) > 0.97)


def test_anisotropic_voxels_give_the_same_tree():
    fine = cube()
    flat = canonical((60, 180, 180), (1.2, 0.4, 0.4))
    a, b = (build_graph(draw(grid, TREE), grid) for grid in (fine, flat))
    assert a.segments == b.segments == 3
    assert a.edge_length.sum() == pytest.approx(b.edge_length.sum(), rel=0.06)
    assert apart(a.position, b.position) < 3.0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flipped_mask_gives_the_mirrored_graph(axis: int):
    grid = cube()
    mask = draw(grid, [*TREE, SACS["sidewall"]])
    graph = build_graph(mask, grid)
    mirrored = build_graph(np.flip(mask, axis), grid)
    index = grid.to_index(mirrored.position)
    index[:, axis] = grid.shape[axis] - 1 - index[:, axis]
    assert graph.segments == mirrored.segments
    assert apart(graph.position, grid.to_mm(index)) < 2.0
    assert graph.edge_length.sum() == pytest.approx(mirrored.edge_length.sum(), rel=0.03)


def test_an_oblique_grid_moves_the_graph_with_it():
    grid = cube()
    mask = draw(grid, TREE)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    affine = grid.affine.copy()
    affine[:3, :3], affine[:3, 3] = turn @ affine[:3, :3], [10, -20, 30]
    graph, turned = build_graph(mask, grid), build_graph(mask, Grid(grid.shape, affine))
    np.testing.assert_allclose(turned.position, graph.position @ turn.T + [10, -20, 30], atol=1e-6)
    np.testing.assert_allclose(turned.node_features, graph.node_features, atol=1e-3)


def test_a_ring_has_no_junction_and_no_end():
    grid = canonical((60, 60, 40), (0.75, 0.75, 0.75))
    z, y, x = np.moveaxis(grid.to_mm(np.moveaxis(np.indices(grid.shape), 0, -1)), -1, 0)[::-1]
    ring = np.hypot(np.hypot(z - 22, y - 22) - 14, x - 15) < 1.7
    graph = build_graph(ring, grid)
    assert len(graph) == len(graph.edges) > 20
    assert np.all(graph.degree == 2) and np.all(graph.kind == PATH)
    assert graph.edge_length.sum() == pytest.approx(2 * np.pi * 14, rel=0.05)


def test_two_arteries_between_the_same_junctions_both_stay():
    # A fenestration: an artery that splits and joins again.
    grid = cube(64)
    fork = [((24, 24, 4), (24, 24, 14), 1.6, 1.6), ((24, 24, 34), (24, 24, 44), 1.6, 1.6)]
    for side in (-7, 7):
        fork += [((24, 24, 14), (24, 24 + side, 24), 1.3, 1.3), ((24, 24 + side, 24), (24, 24, 34), 1.3, 1.3)]
    graph = build_graph(draw(grid, fork), grid)
    assert len(graph.edges) == len(graph)  # exactly one cycle in one piece
    assert len({tuple(sorted(edge)) for edge in graph.edges.tolist()}) == len(graph.edges)
    assert (graph.kind == JUNCTION).sum() == 2


@pytest.mark.parametrize("voxels", [0, 1, 2, 3])
def test_masks_of_hardly_any_voxels(voxels: int):
    grid = cube(20)
    mask = np.zeros(grid.shape, bool)
    mask[5, 5, 5 : 5 + voxels] = True
    graph = build_graph(mask, grid)
    assert len(graph) == min(voxels, 2)
    assert len(graph.edges) == max(0, min(voxels, 2) - 1)
    index, features = graph.to_edge_index()
    assert index.shape == (2, 2 * len(graph.edges)) and features.shape == (
        2 * len(graph.edges),
        len(EDGE_FEATURES),
    )


@pytest.mark.parametrize("seed", range(5))
def test_rough_masks_give_valid_graphs_with_as_many_pieces(seed: int):
    noise = np.random.default_rng(seed).normal(size=(40, 40, 40))
    mask = ndimage.gaussian_filter(noise, 2.0) > 0.07
    graph = build_graph(mask, cube(40))  # __post_init__ checks shapes and finiteness
    assert pieces(graph) == ndimage.label(mask, np.ones((3, 3, 3)))[1]
    assert np.all(graph.edges[:, 0] != graph.edges[:, 1])


def test_a_full_mask_does_not_crash():
    assert len(build_graph(np.ones((12, 12, 12), bool), cube(12))) >= 1


def test_saved_graphs_come_back_whole(tmp_path):
    grid = cube()
    graph = build_graph(draw(grid, TREE), grid)
    graph.save(tmp_path / "graph.safetensors")
    again = VesselGraph.load(tmp_path / "graph.safetensors")
    for name in VesselGraph.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(graph, name), getattr(again, name))
    empty = build_graph(np.zeros(grid.shape, bool), grid)
    empty.save(tmp_path / "empty.safetensors")
    assert len(VesselGraph.load(tmp_path / "empty.safetensors")) == 0
    with pytest.raises(FileNotFoundError, match="builds the graphs"):
        VesselGraph.load(tmp_path / "none.safetensors")


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="does not lie on a grid"):
        build_graph(np.zeros((4, 4, 4)), cube(5))
    with pytest.raises(ValueError, match="node_spacing_mm"):
        build_graph(np.zeros((5, 5, 5)), cube(5), node_spacing_mm=0)


def test_a_tree_of_96_cubed_takes_a_fraction_of_a_second():
    grid = cube()
    mask = draw(grid, [*TREE, SACS["sidewall"]])
    build_graph(mask, grid)
    start = time.process_time()
    build_graph(mask, grid)
    assert time.process_time() - start < 1.0  # 0.05 s on an idle core; the rest is for busy machines
