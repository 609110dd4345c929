"""How a known inflow divides among the vessels of small trees and loops."""

import numpy as np
import pytest

from aneurysm.physics.network_flow import VesselTree, edge_flow, murray_outflow

Edge = tuple[int, int]


def vessels(
    edges: list[Edge],
    exits: list[int],
    radius: np.ndarray | None = None,
    length: np.ndarray | None = None,
    nodes: int | None = None,
) -> VesselTree:
    """Only what the flow depends on; the places do not matter."""
    n, e, k = nodes or 1 + max(max(edge) for edge in edges), len(edges), len(exits)
    return VesselTree(
        position=np.zeros((n, 3)),
        edges=np.array(edges, np.int64).reshape(-1, 2),
        edge_length=np.ones(e) if length is None else length,
        edge_radius=np.ones(e) if radius is None else radius,
        exit_node=np.array(exits, np.int64),
        exit_position=np.zeros((k, 3)),
        exit_outward=np.tile([1.0, 0.0, 0.0], (k, 1)),
        exit_radius=np.ones(k),
    )


def surplus(tree: VesselTree, flow: np.ndarray, outflow: np.ndarray) -> np.ndarray:
    """What leaves every node, less what comes in."""
    left = np.zeros(len(tree.position))
    np.add.at(left, tree.edges[:, 0], flow)
    np.add.at(left, tree.edges[:, 1], -flow)
    np.add.at(left, tree.exit_node, outflow)
    return left


def test_shares_follow_the_cube_of_the_radius_and_the_widest_is_the_inlet():
    outflow = murray_outflow(np.array([1.0, 3.0, 2.0]))
    np.testing.assert_allclose(outflow, [1 / 9, -1, 8 / 9])
    assert outflow.sum() == pytest.approx(0, abs=1e-15)
    np.testing.assert_allclose(murray_outflow(np.array([1.0, 3.0, 2.0]), exponent=2.0), [1 / 5, -1, 4 / 5])
    np.testing.assert_allclose(murray_outflow(np.array([1.0, 3.0, 2.0]), inlet=0), [-1, 27 / 35, 8 / 35])


def test_the_unit_of_the_radii_does_not_matter():
    radius = np.array([2.1, 1.4, 0.6, 1.9])
    np.testing.assert_allclose(murray_outflow(radius), murray_outflow(1e-3 * radius), rtol=1e-12)


@pytest.mark.parametrize("extra", [0, 1, 6])  # edges that close loops
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_at_any_node(seed, extra):
    rng = np.random.default_rng([seed, extra])
    n = 40
    edges = [(int(rng.integers(node)), node) for node in range(1, n)]
    edges += [tuple(int(i) for i in rng.choice(n, 2, replace=False)) for _ in range(extra)]
    exits = sorted(set(range(n)) - {a for a, _ in edges})[:8]
    # Radii over one decade: resistances over four.
    tree = vessels(edges, exits, 10 ** rng.uniform(-0.5, 0.5, len(edges)), rng.uniform(0.5, 3, len(edges)))
    outflow = murray_outflow(rng.uniform(0.5, 2.0, len(exits)))
    # Round-off of the pressures, which span the resistances.
    assert np.abs(surplus(tree, edge_flow(tree, outflow), outflow)).max() < 1e-9


def test_in_a_tree_mass_alone_decides():
    edges = [(0, 1), (2, 1), (1, 3), (3, 4), (3, 5)]  # one edge points against the flow
    flows = [
        edge_flow(vessels(edges, [0, 2, 4, 5], radius=np.array(radius)), np.array([-1.0, 0.1, 0.6, 0.3]))
        for radius in ([1.0] * 5, [3.0, 0.5, 1.0, 0.4, 2.0])
    ]
    np.testing.assert_allclose(flows[0], [1, -0.1, 0.9, 0.6, 0.3], atol=1e-12)
    np.testing.assert_allclose(flows[0], flows[1], atol=1e-10)


def test_a_loop_divides_by_its_resistances():
    # Two ways from 1 to 4: over 2 in two pieces in series, and over 3.
    edges = [(0, 1), (1, 2), (2, 4), (1, 3), (3, 4), (4, 5)]
    radius, length = np.array([2.0, 1.0, 1.0, 1.5, 1.5, 2.0]), np.array([1.0, 2.0, 3.0, 4.0, 1.0, 1.0])
    flow = edge_flow(vessels(edges, [0, 5], radius, length), np.array([-1.0, 1.0]))
    resistance = np.array([2 + 3, (4 + 1) / 1.5**4])
    upper, lower = (1 / resistance) / (1 / resistance).sum()
    np.testing.assert_allclose(flow, [1, upper, upper, lower, lower, 1], rtol=1e-10)


def test_no_pressure_drives_a_ring_without_exits():
    ring = vessels([(0, 1), (1, 2), (2, 0)], [])
    np.testing.assert_allclose(edge_flow(ring, np.zeros(0)), 0, atol=1e-15)
    assert edge_flow(vessels([], [0, 0], nodes=1), np.array([-1.0, 1.0])).shape == (0,)


@pytest.mark.parametrize("radius", [[], [1.0], [1.0, 0.0], [1.0, np.nan]])
def test_flow_needs_two_exits_with_a_radius(radius):
    with pytest.raises(ValueError, match="two exits"):
        murray_outflow(np.array(radius))


def test_what_flows_in_must_flow_out():
    with pytest.raises(ValueError, match="must flow out"):
        edge_flow(vessels([(0, 1)], [0, 1]), np.array([-1.0, 0.9]))
