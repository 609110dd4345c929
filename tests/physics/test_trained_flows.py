"""Flows that training must find: coarse fits at every run, those of the acceptance numbers with `-m slow`."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aneurysm.physics.fit import FitSettings
from aneurysm.physics.reference_flows import Dean

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import flow_cases
import trained_flows

NEEDS_GOLDEN = pytest.mark.skipif(
    not flow_cases.GOLDEN.exists(),
    reason="the lattice-Boltzmann flow is made by benchmarks/flow_reference.py",
)


def found(name: str, case: flow_cases.Case) -> dict[str, float]:
    """What a fit of a case has found, by name."""
    fitted = flow_cases.fit_case(case)
    return {one.what: one.value for one in trained_flows.measure(name, fitted)}


def quick(case: flow_cases.Case, points: int, steps: int) -> flow_cases.Case:
    """Seconds instead of a minute: a small network on few points, in large steps."""
    return replace(case, width=32, pool=4096, points=points, fit=FitSettings(steps, 1e-2))


@pytest.mark.parametrize(("caps", "steps"), [(True, 300), (False, 200)])
def test_a_straight_tube_carries_poiseuilles_flow(caps, steps):
    result = found("straight", quick(flow_cases.straight(caps), 256, steps))
    assert result["velocity off by"] < 0.01
    assert result["dp/dx"] == pytest.approx(-0.25, rel=0.03)
    assert result["wall shear"] == pytest.approx(4, rel=0.03)


def test_standing_blood_is_no_solution():
    """It obeys the equations and the wall, and our loss sees it."""
    standing = flow_cases.untrained(flow_cases.guide())
    between_caps = flow_cases.untrained(flow_cases.straight())
    for fitted in (standing, between_caps):
        for parameter in fitted.field.network.readout.parameters():
            torch.nn.init.zeros_(parameter)
    own = standing.loss(standing.case.draw(512, seed=5))
    assert float(own.mass.max() + own.force.max() + own.slip.max()) == 0
    assert float(own.rows) == pytest.approx(1)
    assert float(between_caps.loss(between_caps.case.draw(512, seed=5)).rows) > 0.1


def test_the_guides_setup_ends_with_standing_blood():
    fitted = flow_cases.fit_case(
        replace(flow_cases.guide(), width=32, points=128, fit=FitSettings(150, 5e-3))
    )
    result = {one.what: one.value for one in trained_flows.measure("guide", fitted)}
    assert result["velocity off by"] > 0.9 and result["our loss"] > 0.8


def test_a_fork_closes_its_flux():
    # A few seconds' worth: with a thousand steps the fluxes close to a few per cent, see the slow test.
    case = replace(quick(flow_cases.fork(), 512, 300), depth=3)
    assert max(found("fork", case).values()) < 0.25


def test_the_caps_of_a_bend_ask_for_deans_flow():
    """On a cap itself the prescribed velocity is the truth, whatever the network says."""
    case = flow_cases.bend()
    fitted, flow = flow_cases.untrained(case), case.draw(64, seed=0)
    for cap in case.domain.caps:
        side = np.cross(cap.inward, [0, 0, 1.0])
        points = np.stack([cap.centre + 0.5 * side, cap.centre - 0.3 * side + [0, 0, 0.6]])
        assert case.truth is not None
        truth = case.truth(torch.as_tensor(points))[:, :3].numpy()
        np.testing.assert_allclose(fitted.at(points, flow), truth, atol=1e-12)


def test_dean_over_the_wall_is_deans_velocity():
    dean = Dean(viscosity=1 / 40)
    points = torch.tensor([[20.3, 1.0, 0.2], [19.5, -2.0, -0.4]], dtype=torch.float64)
    out = points[:, :2].norm(dim=1) - 20
    wall = 1 - out**2 - points[:, 2] ** 2
    torch.testing.assert_close(dean.over_wall(points) * wall[:, None], dean(points)[:, :3])


@pytest.mark.slow
def test_a_bend_carries_deans_flow():
    result = found("bend", flow_cases.bend())
    assert result["velocity off by"] < 0.005
    assert result["secondary flow off by"] < 0.05


@pytest.mark.slow
@pytest.mark.timeout(1800)
@NEEDS_GOLDEN
def test_a_sac_fills_as_the_lattice_says():
    golden = np.load(flow_cases.GOLDEN)
    result = found("sac", flow_cases.sac())
    assert result["velocity off by"] < 0.06
    assert result["backflow"] == pytest.approx(float(golden["sac_backflow_fraction"]), rel=0.1)
    assert result["sac speed"] == pytest.approx(float(golden["sac_mean_speed"]), rel=0.15)


@pytest.mark.slow
def test_a_fork_closes_its_flux_to_one_per_cent():
    assert max(found("fork", flow_cases.fork()).values()) < 0.01
