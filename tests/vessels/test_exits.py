"""The vessels of a box and the places where they leave it."""

import itertools

import numpy as np
import pytest
from synthetic_trees import Capsule, cube, draw

from aneurysm.physics.network_flow import VesselTree, edge_flow, murray_outflow
from aneurysm.vessels.candidates import Candidate
from aneurysm.vessels.exits import BEFORE_END, LocalTree, local_tree
from aneurysm.vessels.graph import VesselGraph, build_graph

GRID = cube(48)  # 36 mm
VOXEL = 0.75
STRAIGHT: Capsule = ((18, 18, 3), (18, 18, 33), 2.5, 2.5)
SHORT: Capsule = ((18, 18, 8), (18, 18, 28), 1.5, 1.5)
FORK: list[Capsule] = [
    ((18, 18, 3), (18, 18, 16), 2.6, 2.6),
    ((18, 18, 16), (18, 6, 32), 2.0, 2.0),
    ((18, 18, 16), (18, 30, 32), 1.6, 1.6),
]


def leave(
    capsules: list[Capsule], half: float | tuple[float, ...], middle: tuple[float, ...] = (18.0, 18.0, 18.0)
) -> tuple[VesselGraph, LocalTree]:
    """The graph of some vessels and what of it lies in a box."""
    graph = build_graph(draw(GRID, capsules), GRID)
    centre = np.array(middle)
    place = Candidate(centre, 0.5, 0, 1.0)
    return graph, local_tree(graph, place, graph.position - centre, np.broadcast_to(np.array(half, float), 3))


def hangs_together(tree: LocalTree) -> None:
    """One piece whose edges and exits refer to its nodes, as a flow needs it."""
    n = len(tree.position)
    assert len(tree.edges) >= n - 1 and set(tree.edges.ravel().tolist()) == set(range(n))
    assert (tree.edge_length > 0).all() and (tree.edge_radius > 0).all()
    np.testing.assert_allclose(np.linalg.norm(tree.exit_outward, axis=1), 1)
    flow = edge_flow(VesselTree(**vars(tree)), outflow := murray_outflow(tree.exit_radius))
    left = np.zeros(n)
    for (a, b), amount in zip(tree.edges, flow, strict=True):
        left[a], left[b] = left[a] + amount, left[b] - amount
    np.add.at(left, tree.exit_node, outflow)
    assert np.abs(left).max() < 1e-9


def test_a_straight_vessel_leaves_by_two_faces():
    _, tree = leave([STRAIGHT], half=8.0)
    hangs_together(tree)
    order = tree.exit_position[:, 2].argsort()
    # Faces are met exactly, the axis to a voxel, its direction over one step between nodes of 2 mm.
    np.testing.assert_allclose(tree.exit_position[order, 2], [-8, 8], atol=1e-9)
    assert np.abs(tree.exit_position[:, :2]).max() < VOXEL
    np.testing.assert_allclose(tree.exit_outward[order], [[0, 0, -1], [0, 0, 1]], atol=0.2)
    assert tree.exit_radius == pytest.approx([2.5, 2.5], abs=0.5 * VOXEL)
    for node, exit_ in zip(tree.exit_node, tree.exit_position, strict=True):
        assert np.linalg.norm(tree.position[node] - exit_) < 2.5  # the last node before the face
    assert np.abs(tree.position).max() <= 8


def test_every_side_of_the_box_counts_for_itself():
    _, tree = leave([STRAIGHT], half=(4.0, 4.0, 11.0))
    np.testing.assert_allclose(np.sort(tree.exit_position[:, 2]), [-11, 11], atol=1e-9)


def test_a_fork_has_three_exits_of_its_own_calibres():
    _, tree = leave(FORK, half=9.0)
    hangs_together(tree)
    assert len(tree.exit_node) == 3
    down, left, right = (tree.exit_position @ np.array(way) for way in ((0, 0, -1), (0, -1, 1), (0, 1, 1)))
    one = [int(score.argmax()) for score in (down, left, right)]
    assert sorted(one) == [0, 1, 2]
    assert tree.exit_radius[one] == pytest.approx([2.6, 2.0, 1.6], abs=0.5 * VOXEL)
    assert np.abs(tree.exit_position).max(1) == pytest.approx([9, 9, 9])
    for k, way in zip(one, ((0, 0, -1), (0, -0.6, 0.8), (0, 0.6, 0.8)), strict=True):
        assert tree.exit_outward[k] @ np.array(way) > 0.95


def test_a_vessel_that_ends_inside_leaves_there():
    graph, tree = leave([SHORT], half=16.0)
    hangs_together(tree)
    assert len(tree.exit_node) == 2 and len(tree.position) == len(graph)
    tips = tree.position[tree.exit_node]
    outward = ((tips - tree.exit_position) * tree.exit_outward).sum(1)
    assert outward == pytest.approx(BEFORE_END * tree.exit_radius, abs=0.5 * VOXEL)
    # The mask ends at 11.5 with a dome.
    assert np.sort(tree.exit_position[:, 2]) * [-1, 1] == pytest.approx([9, 9], abs=2 * VOXEL)


def test_a_dead_end_at_the_candidate_is_its_own():
    """Blood leaves by what lies four radii or more away; a bleb or a dome is no outlet."""
    graph, tree = leave([SHORT], half=20.0, middle=(18.0, 18.0, 26.0))
    assert len(tree.position) == len(graph)
    assert len(tree.exit_node) == 1 and tree.exit_outward[0, 2] < -0.9


def test_a_sac_is_no_exit():
    sac: Capsule = ((18, 22.5, 18), (18, 22.5, 18), 3.0, 3.0)
    graph, tree = leave([STRAIGHT, sac], half=8.0, middle=(18.0, 22.5, 18.0))
    hangs_together(tree)
    assert (graph.position[:, 1] > 21).any()  # the sac has a node of its own ...
    assert np.abs(tree.position[:, 1] + 4.5).max() < 2.5  # ... which is not part of the tree
    assert np.abs(tree.exit_position[:, 2]) == pytest.approx([8, 8]) and len(tree.exit_node) == 2


def test_only_what_hangs_together_inside_the_box_counts():
    beside: Capsule = ((28, 18, 3), (28, 18, 33), 1.6, 1.6)  # crosses the box, but is another vessel
    _, tree = leave([STRAIGHT, beside], half=12.0)
    assert np.abs(tree.position[:, 0]).max() < 2 and len(tree.exit_node) == 2


def test_a_loop_inside_the_box_stays_closed():
    turn = np.linspace(0, 2 * np.pi, 25)
    points = np.array([18, 18, 18]) + 8 * np.stack([0 * turn, np.cos(turn), np.sin(turn)], axis=1)
    ring: list[Capsule] = [(a, b, 1.5, 1.5) for a, b in itertools.pairwise(points)]
    tails: list[Capsule] = [((18, 18, 26), (18, 18, 34), 1.8, 1.8), ((18, 18, 10), (18, 18, 2), 1.8, 1.8)]
    _, tree = leave([*ring, *tails], half=12.0, middle=(18.0, 26.0, 18.0))
    _, whole = leave([*ring, *tails], half=(12.0, 20.0, 12.0))
    hangs_together(whole)
    assert len(whole.edges) == len(whole.position) and len(whole.exit_node) == 2
    # A smaller box cuts the loop open: four ends, two of them of the ring.
    assert len(tree.edges) < len(tree.position) and len(tree.exit_node) == 4


def test_nothing_where_there_is_no_vessel():
    empty = build_graph(np.zeros(GRID.shape, bool), GRID)
    place = Candidate(np.full(3, 18.0), 0.5, -1, 0.0)
    outside = leave([STRAIGHT], half=2.0, middle=(30.0, 30.0, 18.0))[1]
    for tree in (local_tree(empty, place, empty.position, np.full(3, 8.0)), outside):
        assert {name: part.shape for name, part in vars(tree).items()} == {
            "position": (0, 3),
            "edges": (0, 2),
            "edge_length": (0,),
            "edge_radius": (0,),
            "exit_node": (0,),
            "exit_position": (0, 3),
            "exit_outward": (0, 3),
            "exit_radius": (0,),
        }
        VesselTree(**vars(tree))  # of the right types even then
