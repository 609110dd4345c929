"""How much each task counts: the total that is minimised, from one loss per task."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

Terms = dict[str, Tensor]  # task name -> scalar loss
Present = Mapping[str, bool | Tensor]  # task name -> whether the batch holds labels of that task


def present_terms(terms: Terms, present: Present | None = None) -> Terms:
    """The losses that carry information: absent, NaN and exactly zero ones are left out.

    A loss over no labels is an exact zero without gradient. Kept, it would take the whole softmax of UW-SO
    and silence every other task. An infinite loss is kept: it is a divergence and must be seen.
    """
    names = [name for name in terms if present is None or bool(present.get(name, True))]
    if not names:
        return {}
    values = torch.stack([terms[name].detach().float().reshape(()) for name in names])
    keep = (~torch.isnan(values) & (values != 0)).tolist()  # one wait for the device, not one per task
    kept = {name: terms[name].reshape(()) for name, kept in zip(names, keep, strict=True) if kept}
    if not kept and torch.isnan(values).any():
        log.warning("Every loss of this step is NaN (%s); the step is skipped.", ", ".join(names))
    return kept


def _zero(terms: Terms) -> Tensor:
    """A total for a step without any label: zero, and backward() on it is allowed."""
    device = next(iter(terms.values())).device if terms else torch.device("cpu")
    return torch.zeros((), device=device, requires_grad=True)


class Fixed(nn.Module):
    """Total as a sum of losses with weights that never change.

    Args:
        weights: factor per task name; None counts every task once.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.weights = None if weights is None else {str(k): float(v) for k, v in weights.items()}

    def forward(self, terms: Terms, present: Present | None = None) -> tuple[Tensor, Terms]:
        """Return the total and the weight of every present task.

        Raises:
            ValueError: a task has no weight.
        """
        if self.weights is not None and (missing := sorted(terms.keys() - self.weights.keys())):
            raise ValueError(
                f"No weight for {missing}; weights are given for {sorted(self.weights)}. Add them."
            )
        kept = present_terms(terms, present)
        weights = {n: v.new_tensor(1.0 if self.weights is None else self.weights[n]) for n, v in kept.items()}
        if not kept:
            return _zero(terms), {}
        return torch.stack([weights[name] * kept[name] for name in kept]).sum(), weights


class UwSo(nn.Module):
    """Soft optimal uncertainty weighting: small losses weigh more, by a softmax over their inverses.

    ``w_k = softmax_k(1 / L_k / T)`` with L detached, ``total = sum_k w_k L_k``; the weights sum to 1 and hold
    no learned parameter. Losses must be positive. The rule favours whatever loss happens to be small, a cross
    entropy of rare labels for instance, so losses are first divided by a reference: what the loss was when
    training began.

    Args:
        temperature: T. High is close to equal weights, low gives all weight to the smallest loss.
        reference: value per task that its loss is divided by; tasks that are not named count as they are.
        floor: smallest loss used in 1/L, after the division.
        calibrate: take the mean of the first `calibration_steps` training losses of each task as its
            reference (tasks named in `reference` keep theirs). The means travel in the checkpoint.
        calibration_steps: how many losses make a reference.

    Under data-parallel training pass losses over the whole batch: every process then finds the same weights.

    Source: Kirchdorfer et al. 2024, "Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning",
    arXiv:2408.07985, eq. 4; the reference division is our own.
    """

    def __init__(
        self,
        temperature: float = 20.0,
        reference: Mapping[str, float] | None = None,
        floor: float = 1e-3,
        calibrate: bool = False,
        calibration_steps: int = 50,
    ) -> None:
        super().__init__()
        if temperature <= 0 or floor < 0 or calibration_steps < 1:
            raise ValueError(
                "Expected temperature > 0, floor >= 0 and calibration_steps >= 1, "
                f"got {temperature}, {floor}, {calibration_steps}."
            )
        self.reference = {str(k): float(v) for k, v in (reference or {}).items()}
        if bad := {k: v for k, v in self.reference.items() if not v > 0}:
            raise ValueError(f"A reference is a typical loss and must be > 0, got {bad}.")
        self.temperature, self.floor = float(temperature), float(floor)
        self.calibrate, self.calibration_steps = calibrate, int(calibration_steps)
        self._seen: dict[str, tuple[float, int]] = {}  # task -> (sum of losses, how many)

    def get_extra_state(self) -> dict[str, tuple[float, int]]:
        """What calibration has measured, for the checkpoint; names of tasks are not known beforehand."""
        return dict(self._seen)

    def set_extra_state(self, state: dict[str, tuple[float, int]]) -> None:
        """Take up calibration where the checkpoint left it."""
        self._seen = {name: (float(total), int(count)) for name, (total, count) in state.items()}

    def references(self) -> dict[str, float]:
        """What each task's loss is divided by at the moment."""
        measured = {name: total / count for name, (total, count) in self._seen.items()}
        return measured | self.reference

    def forward(self, terms: Terms, present: Present | None = None) -> tuple[Tensor, Terms]:
        """Return the total and the weight of every present task.

        Raises:
            ValueError: a loss is negative; the softmax over inverses would then rank it the wrong way round.
        """
        kept = present_terms(terms, present)
        if not kept:
            return _zero(terms), {}
        losses = torch.stack([v if v.dtype == torch.float64 else v.float() for v in kept.values()])  # (k,)
        if (losses.detach() < 0).any():
            negative = {name: float(value) for name, value in kept.items() if value < 0}
            raise ValueError(f"UW-SO needs losses > 0 but got {negative}. Write 1 - Dice instead of -Dice.")
        if self.calibrate and self.training:
            self._measure(kept)
        references = self.references()
        losses = losses / losses.new_tensor([references.get(name, 1.0) for name in kept])
        inverse = 1 / (losses.detach().clamp_min(self.floor) + 1e-8)
        weights = torch.softmax(inverse / self.temperature, 0)
        return (weights * losses).sum(), dict(zip(kept, weights, strict=True))

    def _measure(self, kept: Terms) -> None:
        for name, value in kept.items():
            total, count = self._seen.get(name, (0.0, 0))
            if count < self.calibration_steps and name not in self.reference and torch.isfinite(value):
                self._seen[name] = (total + float(value.detach()), count + 1)


class Uw(nn.Module):
    """Uncertainty weighting with a learned log variance s per task: ``L / (2 e^s) + s / 2``.

    The optimum gives every task the same share, w_k = 1 / (2 L_k), without bound as L_k goes to 0. Keep
    weight decay off `log_variance`. The total may be negative.

    Args:
        names: of all tasks that will ever be passed.
        initial: s at the start; -0.5 gives a weight of 0.82.

    Source: Kendall et al. 2018, arXiv:1705.07115, eq. 10.
    """

    def __init__(self, names: Sequence[str], initial: float = -0.5) -> None:
        super().__init__()
        self.names = list(names)
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"Uw needs the distinct names of all tasks, got {self.names}.")
        self.log_variance = nn.Parameter(torch.full((len(self.names),), float(initial)))

    def forward(self, terms: Terms, present: Present | None = None) -> tuple[Tensor, Terms]:
        """Return the total and the weight 1 / (2 e^s) of every present task.

        Raises:
            ValueError: a task was not named when this balance was built.
        """
        if unknown := sorted(terms.keys() - set(self.names)):
            raise ValueError(f"No learned weight for {unknown}; this balance was built for {self.names}.")
        kept = present_terms(terms, present)
        if not kept:
            return _zero(terms), {}
        s = self.log_variance[[self.names.index(name) for name in kept]]  # (k,)
        weights = torch.exp(-s) / 2
        total = (weights * torch.stack(list(kept.values()))).sum() + s.sum() / 2
        return total, dict(zip(kept, weights.detach(), strict=True))
