"""Fitting a flow network to one batch of candidates, without a classifier around it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import cos, pi

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aneurysm.physics.collocation import Population
from aneurysm.physics.curriculum import Curriculum
from aneurysm.physics.flow_field import FlowField
from aneurysm.physics.flow_points import FlowPoints
from aneurysm.physics.loss import FlowLoss, flow_loss
from aneurysm.physics.soap import SOAP

OPTIMISERS = ("soap", "adam")
WARM_UP = 0.05  # of the steps
FULL_FORCE = Curriculum(momentum_start=0.0, momentum_ramp=0.0, reynolds_ramp=0.0, reynolds_end=1e6)


@dataclass(frozen=True)
class FitSettings:
    """How a flow is fitted.

    steps: of the optimiser. lr: at its height, after a short warm-up; it falls to 0 as a cosine.
    optimiser: soap or adam. SOAP ends ten to a hundred times lower at equal steps.
    """

    steps: int = 300
    lr: float = 5e-3
    optimiser: str = "soap"

    def __post_init__(self) -> None:
        if self.steps < 0 or self.lr <= 0 or self.optimiser not in OPTIMISERS:
            raise ValueError(
                f"A fit has steps >= 0, lr > 0 and an optimiser of {', '.join(OPTIMISERS)}, got "
                f"{self.steps}, {self.lr} and {self.optimiser!r}."
            )


def fit_flow(
    field: FlowField,
    code: Float[Tensor, "b z"],
    flow: FlowPoints,
    reynolds: Float[Tensor, "b"],
    settings: FitSettings,
    population: Population | None = None,
    curriculum: Curriculum = FULL_FORCE,
    watch: Callable[[int, FlowLoss], None] | None = None,
    emphasis: Float[Tensor, "b pool"] | None = None,
) -> None:
    """Fits a field's network, and the codes where they ask for a gradient, to flows; in place.

    Args:
        code: of every candidate, in the network's type.
        flow: of the same candidates, all valid.
        reynolds: of every candidate; the curriculum may cap it.
        population: which of the points each step looks at; all of them at every step when None.
        watch: called with the step's number and its loss, for curves.
        emphasis: weight of every point of `flow` in the mean of the residual; 1 when None.
    """
    flow = flow.cast(field.network.dtype)
    parameters = [*field.parameters(), *([code] if code.requires_grad else [])]
    options = {"lr": settings.lr, "betas": (0.95, 0.95)}
    optimiser = (SOAP if settings.optimiser == "soap" else torch.optim.Adam)(parameters, **options)
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * _pace(step / settings.steps)
        weights = curriculum.at(step / settings.steps)
        points, importance = flow, emphasis
        if population is not None:
            index = population.indices.to(code.device)
            points = flow.at(index)
            importance = None if emphasis is None else emphasis.gather(1, index)
            if population.weights is not None:
                own = population.weights.to(code)
                importance = own if importance is None else own * importance
        optimiser.zero_grad()
        capped = reynolds.clamp(max=weights.reynolds_cap)
        result = flow_loss(field, code, points, weights, capped, importance=importance)
        result.total.backward()
        optimiser.step()
        if population is not None:
            population.update(result.weighted)
        if watch is not None:
            watch(step, result)


def _pace(progress: float) -> float:
    return min((progress + 1e-3) / WARM_UP, 1.0) * (0.5 + 0.5 * cos(pi * progress))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for a module's parameters meanwhile."""
    asked = [(p, p.requires_grad) for p in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)
