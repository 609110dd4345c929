import copy
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from aneurysm.losses.balance import Fixed, Uw, UwSo


def terms(values: np.ndarray | list[float]) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.tensor(v, dtype=torch.float64, requires_grad=True) for i, v in enumerate(values)}


@pytest.mark.parametrize("case", ["seg_cls_det", "wide", "equal", "tiny", "rsna_like"])
def test_golden_weights(golden: Path, case: str) -> None:
    ref = np.load(golden / "uw_so.npz")
    for t, weights, total in zip(ref["T"], ref[f"{case}__weights"], ref[f"{case}__total"], strict=True):
        got, by_name = UwSo(temperature=float(t), floor=0.0)(terms(ref[f"{case}__losses"]))
        np.testing.assert_allclose([float(w) for w in by_name.values()], weights, atol=1e-10)
        assert float(got.detach()) == pytest.approx(total, abs=1e-10)


def test_weights_carry_no_gradient() -> None:
    losses = terms([0.4, 0.2])
    total, weights = UwSo(temperature=5.0)(losses)
    total.backward()
    for name, loss in losses.items():
        assert loss.grad is not None
        torch.testing.assert_close(loss.grad, weights[name])


def test_absent_tasks_are_dropped() -> None:
    balance = UwSo()
    expected, _ = balance(terms([0.4, 0.2]))
    losses = terms([0.4, 0.2])
    losses |= {"nan": torch.tensor(math.nan), "none": torch.tensor(0.0), "off": torch.tensor(0.3)}
    total, weights = balance(losses, {"off": False, "t0": torch.tensor(True)})
    assert set(weights) == {"t0", "t1"}
    torch.testing.assert_close(total, expected)
    assert float(torch.stack(list(weights.values())).sum()) == pytest.approx(1)


@pytest.mark.parametrize("balance", [UwSo(), Uw(["t0"]), Fixed()], ids=lambda b: type(b).__name__)
def test_nothing_present_is_zero_and_said(balance: torch.nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        total, weights = balance({"t0": torch.tensor(math.nan)})
    total.backward()
    assert float(total.detach()) == 0 and weights == {} and "NaN" in caplog.text
    assert float(balance({})[0].detach()) == 0


def test_divergence_is_not_hidden() -> None:
    total, _ = UwSo()(terms([0.4, math.inf]))
    assert torch.isinf(total)


def test_floor_limits_the_grip_of_a_solved_task() -> None:
    _, weights = UwSo(temperature=20.0, floor=0.05)(terms([1e-6, 0.5]))
    _, limit = UwSo(temperature=20.0, floor=0.05)(terms([0.05, 0.5]))
    torch.testing.assert_close(weights, limit)


def test_reference_puts_tasks_on_one_scale() -> None:
    total, weights = UwSo(reference={"t0": 0.05, "t1": 0.6})(terms([0.05, 0.6]))
    assert float(weights["t0"]) == pytest.approx(0.5) and float(total.detach()) == pytest.approx(1)


def test_calibration_is_the_mean_of_the_first_losses_and_survives_a_checkpoint() -> None:
    balance = UwSo(calibrate=True, calibration_steps=3, reference={"t1": 0.5})
    total, _ = balance(terms([0.4, 0.5]))
    assert float(total) == pytest.approx(1)  # the first loss is its own reference
    for value in (0.2, 0.3, 0.1, 0.1):
        balance(terms([value, 0.5]))
    assert balance.references() == pytest.approx({"t0": 0.3, "t1": 0.5})
    resumed = UwSo(calibrate=True, calibration_steps=3, reference={"t1": 0.5})
    resumed.load_state_dict(copy.deepcopy(balance.state_dict()))
    assert resumed.references() == pytest.approx(balance.references())
    torch.testing.assert_close(resumed(terms([0.2, 0.5]))[0], balance(terms([0.2, 0.5]))[0])


def test_validation_does_not_calibrate() -> None:
    balance = UwSo(calibrate=True).eval()
    balance(terms([0.4, 0.5]))
    assert balance.references() == {}


def test_checkpoint_file_round_trip(tmp_path: Path) -> None:
    balance = UwSo(calibrate=True)
    balance(terms([0.4, 0.5]))
    torch.save(balance.state_dict(), tmp_path / "balance.pt")
    resumed = UwSo(calibrate=True)
    resumed.load_state_dict(torch.load(tmp_path / "balance.pt", weights_only=True))
    assert resumed.references() == pytest.approx({"t0": 0.4, "t1": 0.5})


def test_negative_losses_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="1 - Dice"):
        UwSo()(terms([-0.3, 0.2]))


def test_uw_is_the_formula_and_learns_the_optimum() -> None:
    balance = Uw(["t0", "t1"])
    total, weights = balance(terms([0.4, 0.9]))
    s = -0.5
    assert float(total) == pytest.approx((0.4 + 0.9) / (2 * math.exp(s)) + s)
    assert float(weights["t0"]) == pytest.approx(0.824, abs=1e-3)
    optimiser = torch.optim.SGD(balance.parameters(), lr=0.2)
    for _ in range(300):
        optimiser.zero_grad()
        total, weights = balance(terms([0.4, 0.9]))
        total.backward()
        optimiser.step()
    for name, loss in (("t0", 0.4), ("t1", 0.9)):
        assert float(weights[name]) * loss == pytest.approx(0.5, abs=1e-3)


def test_uw_leaves_the_variance_of_an_absent_task_alone() -> None:
    balance = Uw(["t0", "t1"])
    balance({"t0": torch.tensor(0.3, requires_grad=True)})[0].backward()
    assert balance.log_variance.grad is not None
    assert balance.log_variance.grad[1] == 0 and balance.log_variance.grad[0] != 0


def test_fixed_weights() -> None:
    total, weights = Fixed({"t0": 2.0, "t1": 0.5})(terms([0.4, 0.2]))
    assert float(total) == pytest.approx(0.9) and float(weights["t1"]) == 0.5
    assert float(Fixed()(terms([0.4, 0.2]))[0]) == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"No weight for \['t1'\]"):
        Fixed({"t0": 1.0})(terms([0.4, 0.2]))
    with pytest.raises(ValueError, match="was built for"):
        Uw(["t0"])(terms([0.4, 0.2]))
