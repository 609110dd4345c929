"""Candidates as points: in the units and axes of their vessel, alone and in batches."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from aneurysm.physics.flow_points import FlowPoints, Sites, collate_flow, no_flow
from aneurysm.physics.flow_sampling import sample_flow_points
from aneurysm.physics.lumen import wall_function


def tensors(flow: FlowPoints) -> Iterator[Tensor]:
    """Everything that a candidate consists of."""
    for part in vars(flow).values():
        yield from vars(part).values() if isinstance(part, Sites) else (part,)


@pytest.mark.parametrize("axis", [(1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (1.0, 0.6, -0.4)])
def test_every_straight_vessel_looks_the_same(tube, axis):
    flow = tube(shape=(37, 37, 37), axis=axis).sample()
    assert bool(flow.valid[0])
    across = flow.bulk.position[0, :, 1:].norm(dim=1)
    assert 0.9 < across.max() < 1.1
    assert across.square().mean().sqrt() == pytest.approx(2**-0.5, abs=0.06)  # uniform in a disc
    e1 = torch.tensor([1.0, 0.0, 0.0]).double()
    torch.testing.assert_close(flow.tangent[0], e1.expand(256, 3), rtol=0, atol=1e-9)
    assert flow.section_weight.sum(-1)[0].numpy() == pytest.approx(np.pi, rel=0.08)
    frame = flow.frame[0]
    torch.testing.assert_close(frame @ frame.T, torch.eye(3).double(), rtol=0, atol=1e-12)
    assert torch.linalg.det(frame) == pytest.approx(1.0)


def test_wall_jets_are_in_radii_and_in_the_flow_frame(tube):
    vessel = tube(axis=(1.0, 0.3, 0.2))
    flow = vessel.sample(n_points=32, n_wall=16, n_sections=2, n_section_points=12)
    lumen = wall_function(vessel.prob, vessel.spacing, 0.4 * 4.0, vessel.path)
    radius, frame, origin = 4.0, flow.frame[0].numpy(), flow.origin_mm[0].numpy()

    def phi(points: np.ndarray) -> np.ndarray:
        return lumen.jet(origin + radius * points @ frame)[:, 0]

    step = 5e-3
    for sites in (flow.bulk, flow.shell, flow.section):
        points, jet = sites.position[0].numpy(), sites.wall[0].numpy()
        np.testing.assert_allclose(jet[:, 0], phi(points), atol=1e-9)
        laplacian = np.zeros(len(points))
        for axis in range(3):
            shift = step * np.eye(3)[axis]
            ahead, behind = phi(points + shift), phi(points - shift)
            np.testing.assert_allclose(jet[:, 1 + axis], (ahead - behind) / (2 * step), atol=1e-3)
            laplacian += (ahead - 2 * jet[:, 0] + behind) / step**2
        np.testing.assert_allclose(jet[:, 4], laplacian, atol=0.1)


def test_second_axis_points_to_the_candidate(tube):
    vessel = tube(shape=(40, 47, 29), sac=(1.3, 2.04))
    # Crop around the sac: the candidate is the middle of the crop, 4 voxels off the axis.
    moved = replace(vessel, prob=vessel.prob[:, 8:], path=vessel.path - np.array([0.0, 4.0, 0.0]))
    flow = moved.sample()
    for places in (flow.bulk.position, flow.shell.position):
        assert places[0, :, 1].max() > 2.0 and places[0, :, 1].min() > -1.1
    torch.testing.assert_close(flow.origin_mm[0], torch.tensor([0.0, -4.0, 0.0]).double(), rtol=0, atol=0.3)


def test_same_seed_same_points(tube):
    a, b, c = tube().sample(1), tube().sample(1), tube().sample(2)
    assert all(torch.equal(mine, same) for mine, same in zip(tensors(a), tensors(b), strict=True))
    assert not torch.equal(a.bulk.position, c.bulk.position)


def test_reynolds_number_comes_from_the_median_radius(tube):
    vessel = tube(radius=2.0)
    assert vessel.sample().reynolds[0] == pytest.approx(129.8, abs=0.1)


def invalid(flow: FlowPoints) -> bool:
    return not any(tensor.any() for tensor in tensors(flow)) and flow.bulk.position.shape == (1, 256, 3)


def test_without_a_usable_vessel_the_row_is_invalid(tube):
    v = tube()
    assert invalid(replace(v, prob=np.zeros_like(v.prob)).sample())
    assert invalid(replace(v, path=v.path[:2], tangent=v.tangent[:2], radius=v.radius[:2]).sample())
    assert invalid(replace(v, path=v.path + 100.0).sample())
    assert invalid(replace(v, path=v.path * 0).sample())
    assert invalid(replace(v, path=v.path + np.array([0.0, 9.0, 0.0])).sample())
    blob = np.zeros_like(v.prob)
    blob[19:22, 13:16, 13:16] = 1.0  # 27 voxels
    assert invalid(replace(v, prob=blob).sample())


def test_noise_and_odd_input_do_not_break_the_sampler(tube):
    rng = np.random.default_rng(3)
    for prob in (rng.random((24, 24, 24)), np.ones((24, 24, 24)), np.full((24, 24, 24), np.nan)):
        v = tube()
        flow = sample_flow_points(prob, np.ones(3), v.path, v.tangent, v.radius, rng=rng)
        assert all(torch.isfinite(tensor.double()).all() for tensor in tensors(flow))


def test_single_precision_input_and_other_sizes(tube):
    v = tube()
    flow = sample_flow_points(
        v.prob.astype(np.float32),
        v.spacing.astype(np.float32),
        v.path.astype(np.float32),
        v.tangent.astype(np.float32),
        v.radius.astype(np.float32),
        n_points=50,
        n_sections=4,
        n_section_points=12,
        n_wall=20,
        rng=np.random.default_rng(0),
    )
    assert flow.valid.all() and flow.bulk.position.shape == (1, 50, 3)
    assert flow.section.position.shape == (1, 48, 3) and flow.section_weight.shape == (1, 4, 12)
    assert flow.shell.position.shape == flow.normal.shape == (1, 20, 3)


def test_batching(tube):
    flow = collate_flow([tube().sample(0), no_flow(), tube(radius=3.0).sample(1)])
    assert flow.valid.tolist() == [True, False, True]
    assert flow.radius_mm.tolist() == [4.0, 0.0, 3.0]
    picked = flow.rows(torch.tensor([2])).at(torch.tensor([[5, 0, 7]]))
    for mine, all_ in zip(vars(picked.bulk).values(), vars(flow.bulk).values(), strict=True):
        assert torch.equal(mine[0], all_[2, [5, 0, 7]])
    assert torch.equal(picked.tangent[0], flow.tangent[2, [5, 0, 7]])
    assert torch.equal(picked.section.wall[0], flow.section.wall[2])
    single = flow.to("cpu").cast(torch.float32)
    assert single.bulk.position.dtype == single.section_target.dtype == torch.float32
    assert single.valid.dtype == single.driven.dtype == torch.bool
    for other in (no_flow(n_sections=5), no_flow(n_points=8), no_flow(n_wall=8)):
        with pytest.raises(ValueError, match="same numbers"):
            collate_flow([no_flow(), other])


def test_places_near_the_wall_and_near_the_candidate(tube):
    vessel = tube(shape=(40, 47, 29), sac=(1.3, 2.04))
    # As above, but for a middle of the crop that lies one radius beside the axis, in the neck.
    flow = replace(vessel, prob=vessel.prob[:, 8:], path=vessel.path - np.array([0.0, 4.0, 0.0])).sample()
    place = -flow.frame[0] @ flow.origin_mm[0] / 4.0
    torch.testing.assert_close(place, torch.tensor([0.0, 1.0, 0.0]).double(), rtol=0, atol=0.1)
    assert torch.equal(flow.near_candidate[0], (flow.bulk.position[0] - place).norm(dim=1) < 1.5)
    assert 0.05 < flow.near_candidate.double().mean() < 0.6
    wall = flow.bulk.wall[0, :, 0]
    assert wall[flow.near_wall[0]].max() < 0.4 <= wall[~flow.near_wall[0]].min()
