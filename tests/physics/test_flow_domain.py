"""From masks and trees to the places where a flow is tested: caps, fluxes, walls."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from aneurysm.physics.caps import drive
from aneurysm.physics.flow_domain import Domain, driven_domain, undriven_domain
from aneurysm.physics.flow_points import FlowPoints, Sites
from aneurysm.physics.flow_sampling import Numbers, place_flow, sample_flow_points
from aneurysm.physics.lumen import wall_function
from aneurysm.physics.network_flow import VesselTree, murray_outflow
from aneurysm.physics.reference_vessels import bend
from aneurysm.physics.sections import Path, cut_across, resample_path, star_quadrature

Point = tuple[float, float, float]
PARENT, LEFT, RIGHT = 4.0, 3.0, 2.4  # radii of a fork, mm
SPLIT = np.array([4.0, 0.0, 0.0])
TO_LEFT, TO_RIGHT = (np.array([np.cos(0.7), side * np.sin(0.7), 0.0]) for side in (1, -1))
ROOT = np.array([-20.0, 0.0, 0.0])


def tree(
    nodes: list[Point], edges: list[tuple[int, int]], exits: list[tuple[int, Point, Point, float]]
) -> VesselTree:
    """Of nodes, edges and exits (node, position, outward, radius); edges are as wide as the widest exit."""
    position = np.array(nodes, float).reshape(-1, 3)
    pairs = np.array(edges, np.int64).reshape(-1, 2)
    outward = np.array([one[2] for one in exits], float).reshape(-1, 3)
    return VesselTree(
        position=position,
        edges=pairs,
        edge_length=np.linalg.norm(position[pairs[:, 0]] - position[pairs[:, 1]], axis=1),
        edge_radius=np.full(len(edges), max((one[3] for one in exits), default=1.0)),
        exit_node=np.array([one[0] for one in exits], np.int64),
        exit_position=np.array([one[1] for one in exits], float).reshape(-1, 3),
        exit_outward=outward / np.linalg.norm(outward, axis=1, keepdims=True),
        exit_radius=np.array([one[3] for one in exits], float),
    )


def tube_tree(low: float = -20.0, high: float = 20.0, widths: tuple[float, float] = (4.0, 3.9)) -> VesselTree:
    """Of a tube along the first axis with exits at two places; blood enters by the wider."""
    nodes = [(x, 0.0, 0.0) for x in np.linspace(low + 1, high - 1, 8)]
    ends = [
        (0, (low, 0.0, 0.0), (-1.0, 0.0, 0.0), widths[0]),
        (7, (high, 0.0, 0.0), (1.0, 0.0, 0.0), widths[1]),
    ]
    return tree(nodes, [(i, i + 1) for i in range(7)], ends)


def fork_mask() -> np.ndarray:
    """A parent that comes in by the first face and divides into two that leave by the last."""
    grids = [(np.arange(2 * n) + 0.5) / 2 - n / 2 for n in (40, 44, 21)]
    x = np.stack(np.meshgrid(*grids, indexing="ij"), axis=-1)
    inside = np.zeros(x.shape[:3], bool)
    for direction, length, radius in (
        (ROOT - SPLIT, 40.0, PARENT),
        (TO_LEFT, 40.0, LEFT),
        (TO_RIGHT, 40.0, RIGHT),
    ):
        axis = direction / np.linalg.norm(direction)
        along = np.clip((x - SPLIT) @ axis, 0, length)
        inside |= ((x - SPLIT - along[..., None] * axis) ** 2).sum(-1) < radius**2
    return inside.reshape(40, 2, 44, 2, 21, 2).mean((1, 3, 5))


def fork_tree(right_end: float | None = None, left: bool = True) -> VesselTree:
    """Of the fork; the right branch may end early and the left have no exit."""
    faces = [SPLIT + (20 - SPLIT[0]) / way[0] * way for way in (TO_LEFT, TO_RIGHT)]
    if right_end is not None:
        faces[1] = SPLIT + right_end * TO_RIGHT
    nodes = [ROOT + 1e-3, 0.5 * (ROOT + SPLIT), SPLIT]
    nodes += [SPLIT + 0.5 * (face - SPLIT) for face in faces]
    nodes += [SPLIT + 0.95 * (face - SPLIT) for face in faces]
    exits = [(0, ROOT, ROOT - SPLIT, PARENT), (6, faces[1], TO_RIGHT, RIGHT)]
    if left:
        exits.insert(1, (5, faces[0], TO_LEFT, LEFT))
    return tree(nodes, [(0, 1), (1, 2), (2, 3), (2, 4), (3, 5), (4, 6)], exits)  # type: ignore[arg-type]


def fork_path() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Down the parent and on into the left branch."""
    parent, left = np.arange(-19.0, SPLIT[0], 2.0), np.arange(0.0, 20.0, 2.0)
    position = np.concatenate([parent[:, None] * [1.0, 0, 0], SPLIT + left[:, None] * TO_LEFT])
    tangent = np.concatenate([np.tile([1.0, 0, 0], (len(parent), 1)), np.tile(TO_LEFT, (len(left), 1))])
    return position, tangent, np.repeat([PARENT, LEFT], [len(parent), len(left)])


def sample_fork(vessels: VesselTree | None, seed: int = 0) -> FlowPoints:
    path, tangent, radius = fork_path()
    return sample_flow_points(
        fork_mask(), np.ones(3), path, tangent, radius, tree=vessels, rng=np.random.default_rng(seed)
    )


def fork_domain() -> Domain:
    path = resample_path(*fork_path(), step_mm=0.5)
    assert path is not None
    lumen = wall_function(fork_mask(), np.ones(3), 1.4, path.position)
    assert lumen is not None
    domain = driven_domain(lumen, path, fork_tree(), 3.5)
    assert domain is not None
    return domain


def in_mm(flow: FlowPoints, sites: Sites) -> np.ndarray:
    """Positions (n, 3) of sites as (d, h, w) from the middle of the crop."""
    return (flow.origin_mm + flow.radius_mm * sites.position[0] @ flow.frame[0]).numpy()


def well_formed(flow: FlowPoints) -> None:
    """What holds of every candidate with flow."""
    assert flow.valid.all()
    for sites in (flow.bulk, flow.shell, flow.section):
        assert all(torch.isfinite(tensor).all() for tensor in vars(sites).values())
        # Beyond a cap chi would be negative and grow: no place may lie there.
        assert ((sites.free[..., 0] >= -1e-12) & (sites.free[..., 0] <= 1 + 1e-12)).all()
    # Drawn by phi to first order, here it is exact: beside a kink they differ by 0.02.
    assert (flow.bulk.wall[..., 0] > -0.05).all()


def test_a_tube_is_driven_by_its_two_ends(tube):
    flow = tube().sample(tree=tube_tree())
    well_formed(flow)
    assert flow.driven.all()
    np.testing.assert_allclose(flow.section_target, np.pi, rtol=1e-12)
    along = in_mm(flow, flow.bulk)[:, 0]
    # The caps: a quarter of a radius within the faces at -20 and 20.
    assert along.min() > -19 and along.max() < 19 and np.ptp(along) > 36
    # From cap to cap the same speed along the vessel, which carries the flux by itself.
    asked = flow.bulk.prescribed[0, :, 0]
    assert asked[:, 1:].abs().max() < 1e-9
    torch.testing.assert_close(asked[:, 0], asked[:1, 0].expand(256), rtol=0.05, atol=0)
    silent = (flow.section.prescribed[0, :, 0, 0] * flow.section.wall[0, :, 0]).reshape(6, -1)
    np.testing.assert_allclose((silent * flow.section_weight[0]).sum(1), np.pi, rtol=0.02)
    near = np.abs(along) > 19 - 4
    free = flow.bulk.free[0, :, 0]
    assert (free[np.abs(along) < 19 - 2 * 4.4] == 1).all() and free[near].max() < 0.95


@pytest.mark.parametrize(("widths", "sign"), [((4.0, 3.9), 1.0), ((3.9, 4.0), -1.0)])
def test_blood_enters_by_the_wider_end_whichever_way_the_path_runs(tube, widths, sign):
    flow = tube().sample(tree=tube_tree(widths=widths))
    downstream = torch.tensor([sign, 0.0, 0.0]).double()
    torch.testing.assert_close(flow.frame[0, 0], downstream, rtol=0, atol=1e-9)
    assert (flow.tangent[..., 0] > 0.999).all() and (flow.section_target > 0).all()


def test_an_exit_before_the_end_of_its_vessel_turns_no_flow_round(tube):
    """The graph goes on to the tip of a mask, the exit lies before its rounded end."""
    vessel, vessels = tube(), tube_tree(-16.0, 16.0)
    vessels = replace(vessels, position=1.2 * vessels.position)
    path = resample_path(vessel.path, vessel.tangent, vessel.radius, step_mm=0.5)
    assert path is not None
    lumen = wall_function(vessel.prob, vessel.spacing, 1.6, path.position)
    assert lumen is not None
    domain = driven_domain(lumen, path, vessels, 4.0)
    assert domain is not None and np.ptp(domain.centreline[:, 0]) > 35
    np.testing.assert_allclose(domain.downstream, np.tile([1.0, 0, 0], (len(domain.centreline), 1)))
    np.testing.assert_allclose(domain.centreline_flux, 1)


def test_caps_of_a_fork_carry_their_shares():
    domain = fork_domain()
    share = murray_outflow(np.array([PARENT, LEFT, RIGHT]))
    assert len(domain.caps) == 3
    total = 0.0
    for cap, part in zip(domain.caps, share, strict=True):
        # Four times the rays that set its strength.
        star = cut_across(domain.wall, cap.centre[None], cap.inward[None], np.array([cap.radius]), 64)
        position, area = star_quadrature(*star[:3])
        flux = cap.strength * float(domain.wall.jet(position[0])[:, 0] @ area[0])
        # Radii are those of the lumen as it is resolved, to 2 %, and their cubes make the shares.
        assert flux == pytest.approx(-part * np.pi * 3.5**2, rel=0.06)
        total += flux
        assert star[2].max() < 1.3 * cap.radius  # the profile is prescribed on the whole cross-section
    assert total == pytest.approx(0, abs=0.01 * np.pi * 3.5**2)  # what flows in flows out
    outward = [-cap.inward for cap in domain.caps]
    np.testing.assert_allclose(outward, [[-1, 0, 0], TO_LEFT, TO_RIGHT], atol=1e-3)


def test_nothing_passes_a_narrow_exit(monkeypatch):
    monkeypatch.setattr("aneurysm.physics.flow_domain.NARROW", 0.7)  # between RIGHT and LEFT, of PARENT
    domain, flow = fork_domain(), sample_fork(fork_tree())
    inlet, outlet, closed = (cap.strength for cap in domain.caps)
    assert inlet > 0 > outlet and closed == 0
    well_formed(flow)
    np.testing.assert_allclose(flow.section_target, np.pi, rtol=1e-9)
    # Its branch ends at the cap, where neither caps nor network move the blood.
    free, prescribed = drive(torch.tensor(domain.caps[2].centre[None]), domain.caps, domain.guide)
    assert abs(free[0, 0]) < 1e-12 and prescribed[0].abs().max() < 1e-9
    points = in_mm(flow, flow.bulk) - domain.caps[2].centre
    assert (points @ TO_RIGHT)[np.linalg.norm(points, axis=1) < 2 * RIGHT].max() < 0


def test_flux_through_the_sections_of_a_fork_follows_murray():
    flow = sample_fork(fork_tree())
    well_formed(flow)
    assert flow.driven.all()
    place = in_mm(flow, flow.section).reshape(6, -1, 3).mean(1)
    target = flow.section_target[0].numpy() / np.pi
    before = place[:, 0] < SPLIT[0]
    assert before.any() and (~before).any()
    np.testing.assert_allclose(target[before], 1, rtol=1e-9)
    # By the radii of the resolved lumen, to 2 %: one value for the branch, and not far from the nominal one.
    np.testing.assert_allclose(target[~before], LEFT**3 / (LEFT**3 + RIGHT**3), rtol=0.06)
    assert np.ptp(target[~before]) < 1e-9
    # In each branch the vessel's direction is its own.
    where, tangent = in_mm(flow, flow.bulk) - SPLIT, (flow.tangent[0] @ flow.frame[0]).numpy()
    for way in (TO_LEFT, TO_RIGHT):
        inside = (where @ way > 8) & (np.linalg.norm(where - (where @ way)[:, None] * way, axis=1) < 3)
        np.testing.assert_allclose(tangent[inside], np.tile(way, (inside.sum(), 1)), atol=1e-2)


def test_what_lies_beyond_a_cap_is_cut_off():
    def reach(flow: FlowPoints) -> float:
        """How far points go along the right branch."""
        points = np.concatenate([in_mm(flow, flow.bulk), in_mm(flow, flow.shell)]) - SPLIT
        beside = np.linalg.norm(points - (points @ TO_RIGHT)[:, None] * TO_RIGHT, axis=1) < 1.3 * RIGHT
        return float((points @ TO_RIGHT)[beside].max())

    assert reach(sample_fork(None)) > 17 and reach(sample_fork(fork_tree())) > 17
    cut = sample_fork(fork_tree(right_end=9.0))
    well_formed(cut)
    assert cut.driven.all() and 7 < reach(cut) < 9


def test_sections_lie_between_caps_far_inside_the_path(tube):
    flow = tube().sample(tree=tube_tree(-9.0, 11.0))
    well_formed(flow)
    assert flow.driven.all()
    along = in_mm(flow, flow.section)[:, 0]
    assert along.min() > -8.1 and along.max() < 10.1 and np.ptp(along) > 12


@pytest.mark.parametrize(
    "vessels",
    [
        tree([(0, 0, 0), (9, 0, 0)], [(0, 1)], [(1, (20, 0, 0), (1, 0, 0), 4.0)]),  # a single exit
        tree([], [], []),
        replace(tube_tree(), exit_position=np.array([[-20.0, 13, 0], [20.0, 13, 0]])),  # beside the vessel
        tube_tree(4.0, 20.0),  # a cap between the candidate and the heart
    ],
    ids=["one exit", "none", "off the lumen", "candidate cut off"],
)
def test_without_usable_caps_the_flow_is_normalised_instead(tube, vessels):
    flow, plain = tube().sample(tree=vessels), tube().sample(tree=None)
    well_formed(flow)
    assert not flow.driven.any() and not flow.bulk.prescribed.any() and not flow.section.prescribed.any()
    assert (flow.bulk.free[..., 0] == 1).all() and not flow.bulk.free[..., 1:].any()
    np.testing.assert_allclose(flow.section_target, np.pi)
    assert torch.equal(flow.bulk.position, plain.bulk.position)


def test_an_exit_in_the_open_is_no_cap():
    """Where no ray meets a wall there is no cross-section that could carry a flux."""
    path = np.linspace(-10, 10, 11)[:, None] * np.array([1.0, 0, 0])
    tangent = np.tile([1.0, 0, 0], (11, 1))
    flow = sample_flow_points(
        np.ones((24, 24, 24)),
        np.ones(3),
        path,
        tangent,
        np.full(11, 4.0),
        tree=tube_tree(-12.0, 12.0),
        rng=np.random.default_rng(0),
    )
    assert not flow.driven.any()


def test_a_vessel_without_through_flow_sets_no_scale():
    """The left branch beside the candidate has no exit: nothing runs there that could be the unit."""
    path = resample_path(*fork_path(), step_mm=0.5)
    assert path is not None
    shifted = Path(path.arc_mm, path.position - (SPLIT + 9 * TO_LEFT), path.tangent, path.radius_mm)
    lumen = wall_function(fork_mask(), np.ones(3), 1.4, path.position)
    assert lumen is not None
    moved = replace(lumen, first_mm=lumen.first_mm - (SPLIT + 9 * TO_LEFT))
    vessels = fork_tree(left=False)
    vessels = replace(
        vessels,
        position=vessels.position - (SPLIT + 9 * TO_LEFT),
        exit_position=vessels.exit_position - (SPLIT + 9 * TO_LEFT),
    )
    assert driven_domain(moved, shifted, vessels, LEFT) is None


def test_wall_points_lie_on_the_wall_and_their_normals_point_inwards(tube):
    for flow in (tube().sample(tree=tube_tree()), tube(shape=(40, 47, 29), sac=(1.3, 2.04)).sample()):
        assert flow.shell.wall[..., 0].abs().max() < 1e-6
        torch.testing.assert_close(flow.normal.norm(dim=-1), torch.ones(1, 64).double())
        assert ((flow.normal * flow.shell.wall[..., 1:4]).sum(-1) > 0).all()


def test_wall_points_are_uniform_by_area():
    """In a bent tube the outer side has more wall than the inner, in proportion to its length."""
    curvature, half = 0.3, 3.0
    turn = np.linspace(-half, half, 61) * curvature
    position = np.stack([np.sin(turn), 1 - np.cos(turn), 0 * turn], axis=1) / curvature
    tangent = np.stack([np.cos(turn), np.sin(turn), 0 * turn], axis=1)
    path = Path(np.linspace(0, 2 * half, 61), position, tangent, np.ones(61))
    domain = undriven_domain(bend(curvature, half), path, 1.0)
    count = 1000
    flow = place_flow(domain, Numbers(points=16, wall=count), np.full(3, 9.0), np.random.default_rng(0))
    assert flow is not None and flow.shell.wall[..., 0].abs().max() < 1e-6
    place = in_mm(flow, flow.shell)
    outward = np.hypot(place[:, 0], place[:, 1] - 1 / curvature) - 1 / curvature  # cosine around the tube
    arc = np.sort(np.arctan2(place[:, 0], 1 / curvature - place[:, 1]) / curvature / half)
    # The density is 1 + curvature cos: means with three standard errors, and Kolmogorov's 1 % for the arc.
    assert outward.mean() == pytest.approx(curvature / 2, abs=3 * np.sqrt(0.5 / count))
    assert (outward**2).mean() == pytest.approx(1 / 2, abs=3 * np.sqrt(0.125 / count))
    assert np.abs(np.arange(count) / count - (arc + 1) / 2).max() < 1.63 / np.sqrt(count)


def test_the_seed_decides_the_points(tube):
    a, b, c = (tube().sample(seed, tree=tube_tree()) for seed in (1, 1, 2))
    for name in ("bulk", "shell"):
        assert torch.equal(getattr(a, name).position, getattr(b, name).position)
        assert not torch.equal(getattr(a, name).position, getattr(c, name).position)
    assert torch.equal(a.section.position, c.section.position)  # cuts are not drawn


def test_nodes_at_one_place_disturb_no_flow(tube):
    """Around junctions a graph may hold edges without length, which have no direction."""
    vessels = tube_tree()
    twice = replace(
        vessels,
        position=np.concatenate([vessels.position, vessels.position[-1:]]),
        edges=np.concatenate([vessels.edges, [[len(vessels.position) - 1, len(vessels.position)]]]),
        edge_length=np.append(vessels.edge_length, 0.0),
        edge_radius=np.append(vessels.edge_radius, vessels.edge_radius[-1]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow = tube().sample(tree=twice)
    well_formed(flow)
    assert flow.driven.all()
