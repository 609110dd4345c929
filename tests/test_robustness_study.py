"""What the flow features owe to assumptions: shapes as voxels, the base case, the changes, the command."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from aneurysm.physics import flow_domain
from aneurysm.physics.network_flow import murray_outflow
from aneurysm.robustness.__main__ import main
from aneurysm.robustness.shapes import HALF, RADIUS_MM, VOXEL_MM, scanned
from aneurysm.robustness.study import BASE, CASES, NUMBERS, flow_of, measured, with_base
from aneurysm.robustness.table import CSV, PNG, changes, heat_map, mean_changes, unit


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(row: dict) -> np.ndarray:
    return np.array([row[name] for name in NUMBERS])


def test_the_voxels_hold_the_vessel_and_its_wall_moves_by_what_is_asked():
    tube = scanned("tube")
    length = 2 * HALF * RADIUS_MM
    for grown in (-0.5, 0.0, 0.5):
        out = grown * VOXEL_MM
        area = tube.probability(grown).sum() * VOXEL_MM**3 / (length + 2 * out)
        assert np.sqrt(area / np.pi) == pytest.approx(RADIUS_MM + out, abs=0.1 * VOXEL_MM)
    edge = tube.probability()
    assert ((edge > 0.1) & (edge < 0.9)).any()  # partial volume


def test_the_pipeline_finds_the_vessels_exits_and_their_split():
    flow = flow_of("fork", 0.0, 3.0, 64, True)
    assert bool(flow.valid) and bool(flow.driven)
    assert float(flow.radius_mm) == pytest.approx(RADIUS_MM, rel=0.1)
    share = flow.section_target[0] / torch.pi
    assert float(share.max()) == pytest.approx(1.0)
    # the path follows the wide daughter, which by Murray's law gets 0.9^3 / (0.9^3 + 0.65^3) = 0.73
    assert float(share.min()) == pytest.approx(0.73, abs=0.05)
    equal = flow_of("fork", 0.0, 0.0, 64, True)
    assert float(equal.section_target.min()) / np.pi == pytest.approx(0.5, abs=1e-6)
    assert flow_domain.murray_outflow is murray_outflow  # as it was
    assert not bool(flow_of("fork", 0.0, 3.0, 64, False).driven)


def test_the_base_case_depends_on_its_seed_alone_and_not_on_what_ran_before():
    first = numbers(measured("tube", replace(BASE, points=64), 4))
    torch.rand(7)
    before = torch.get_rng_state()
    again = measured("tube", replace(BASE, points=64), 4)
    np.testing.assert_array_equal(numbers(again), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert again["driven"] and again["steps"] == 4
    other = numbers(measured("tube", replace(BASE, points=64, seed=1), 4))
    assert np.abs(other - first).max() > 1e-3


def test_single_precision_starts_from_the_same_weights_and_ends_close():
    small = replace(BASE, points=64)
    double, single = (numbers(measured("tube", replace(small, dtype=d), 4)) for d in ("float64", "float32"))
    np.testing.assert_allclose(single, double, atol=0.02)
    assert (single != double).any()


def test_every_case_changes_one_assumption():
    for case in CASES:
        changed = [name for name in vars(BASE) if getattr(case, name) != getattr(BASE, name)]
        assert len(set(changed) - {"kind", "level"}) == 1, case
    assert len({(case.kind, case.level) for case in CASES}) == len(CASES)
    assert [case.kind for case in with_base(["caps"])] == ["base", "caps"]


def test_the_shear_that_is_assumed_scales_the_shear_that_is_reported():
    unfitted = [
        measured("tube", replace(BASE, points=64, wall_shear_pa=pa), 1)["wall_shear_pa"] for pa in (1.0, 2.0)
    ]
    assert unfitted[1] == pytest.approx(2 * unfitted[0], rel=0.05)


def rows() -> pd.DataFrame:
    def row(shape: str, kind: str, level: str, value: float) -> dict:
        return {"shape": shape, "kind": kind, "level": level} | dict.fromkeys(NUMBERS, value)

    table = pd.DataFrame(
        [
            row("tube", "base", "", 1.0), row("tube", "seed", "1", 1.5), row("tube", "mask", "-1", 0.0),
            row("sac", "base", "", -1.0), row("sac", "seed", "1", -0.5), row("sac", "mask", "-1", np.nan),
        ]
    )  # fmt: skip
    return table.assign(flux_error=[0.2] * 6)


def test_changes_are_counted_in_the_difference_between_sac_and_tube():
    assert unit(rows()).coherence == -2.0 and np.isnan(unit(rows()).flux_error)
    np.testing.assert_allclose(changes(rows()).coherence, [0.25, -0.5, 0.25, np.nan])
    mean = mean_changes(rows())
    assert list(mean.index) == [("seed", "1"), ("mask", "-1")]
    np.testing.assert_allclose(mean.coherence, [0.25, 0.5])
    assert list(mean.lost) == [0, 1]
    titles = [axes.get_title(loc="left") for axes in heat_map(rows()).axes]
    assert titles[:3] == ["Mean size over 2 shapes", "Tube", "Sac"]


def test_the_command_leaves_every_number_and_a_figure(tmp_path, capsys):
    assert main(["--shapes", "tube", "--kinds", "seed,caps", "--steps", "2", "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / CSV, keep_default_na=False, na_values=[""])
    assert list(table["shape"]) == ["sac"] + ["tube"] * 6
    assert list(table["kind"]) == ["base", "base", "caps", *["seed"] * 4]
    assert {"driven", "reynolds", "radius_mm", *NUMBERS} <= set(table.columns)
    assert table[list(NUMBERS)].notna().all(axis=None) and not table.driven[2]
    assert (tmp_path / PNG).read_bytes()[:4] == b"\x89PNG" and (tmp_path / PNG).stat().st_size < 300_000
    said = capsys.readouterr().out
    assert "sac - tube" in said and str(tmp_path) in said


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--shapes", "tube,helix"], "--shapes helix: there are tube, bend, fork, small_sac, sac"),
        (["--kinds", "colour"], "--kinds colour: there are viscosity"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--out", __file__], "is a file: give a folder"),
    ],
)
def test_what_cannot_be_studied_is_told(arguments, why, capsys):
    assert main(arguments) == 2
    assert why in capsys.readouterr().err
