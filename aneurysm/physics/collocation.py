"""Where the physics is tested: points drawn at random, retained for their residual, or drawn by it.

What all populations share, and how their columns are laid out, is in `collocation_population.py`. Measured on
a straight tube with 512 points and 1000 steps: retaining the top 20 to 50% every hundred steps ends with a
residual 2 to 3 times smaller than fresh uniform points do, retaining at every step with one 75 to 110 times
larger.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aneurysm.physics.collocation_population import Population, Quotas, Seed


def retain_top(residual: Float[Tensor, "b n"], fraction: float) -> Int[Tensor, "b k"]:
    """Positions of the top `fraction` of each row's residuals, at least one, largest first."""
    if not 0 < fraction <= 1:
        raise ValueError(f"The fraction of points to retain must lie in (0, 1], got {fraction}.")
    keep = max(1, round(fraction * residual.shape[1]))
    return residual.topk(keep, dim=1).indices


def hard_point_mean(residual: Float[Tensor, "b n"], fraction: float, share: float) -> Float[Tensor, "b"]:
    """(1 - share) times the mean of a row plus share times the mean of its top `fraction`.

    What R3 minimises in expectation when a share of the population is retained, without a memory: in
    minibatch training a candidate's points are seen once per epoch and nothing can be carried over.
    """
    uniform = residual.mean(1)
    if share == 0:
        return uniform
    hard = residual.gather(1, retain_top(residual.detach(), fraction)).mean(1)
    return (1 - share) * uniform + share * hard


class UniformPoints(Population):
    """A fresh draw at every step, whatever the residual: the yardstick of the others."""

    def _refresh(self, residual: Float[Tensor, "b n"]) -> None:
        self._renew(0)


class FixedPoints(Population):
    """Drawn once, as optimisers with line searches need it.

    The uniform columns are uniform but not fresh: the fit has seen them, so the residual there is optimistic.
    """

    def _refresh(self, residual: Float[Tensor, "b n"]) -> None:
        """The points stay."""


class Retaining(Population):
    """Keeps the points with the largest residuals, as many as the kind says, and redraws the others."""

    def __post_init__(self) -> None:
        if self.unbiased:
            raise ValueError(
                f"{type(self).__name__} retains points, which come from no known density and have no "
                "weights; unbiased goes with uniform, fixed and residual_weighted."
            )
        super().__post_init__()

    def _refresh(self, residual: Float[Tensor, "b n"]) -> None:
        residual = residual.to("cpu", torch.float64)
        hardest_first = residual.argsort(dim=1, descending=True, stable=True)
        self._renew(self._keep(residual), kept=self.indices.gather(1, hardest_first))

    @abstractmethod
    def _keep(self, residual: Float[Tensor, "b n"]) -> Int[Tensor, "b"] | int:
        """How many points to keep, less than all."""


@dataclass(eq=False)
class R3Population(Retaining):
    """Retain a top fraction, resample and release the others, every hundred steps: the guide's form of R3."""

    every: int = 100
    retain: float = 0.3  # of the points, but never all of them; 0.2 to 0.5 work alike

    def __post_init__(self) -> None:
        if not 0 < self.retain < 1:
            raise ValueError(
                f"retain must lie in (0, 1) so that some points are resampled, got {self.retain}."
            )
        super().__post_init__()

    def _keep(self, residual: Float[Tensor, "b n"]) -> int:
        return min(max(1, round(self.retain * self.points)), self.points - 1)


class R3PaperPopulation(Retaining):
    """Retain the points whose |r| exceeds the mean of their candidate's population, at every step.

    Candidates keep different numbers of points. On a straight tube the population collapses, with 70 to 95%
    retained; with `every=100` it does as well as `R3Population`.

    Source: Daw et al., "Mitigating propagation failures in PINNs using R3 sampling", ICML 2023.
    """

    def _keep(self, residual: Float[Tensor, "b n"]) -> Int[Tensor, "b"]:
        size = residual.sqrt()
        # The smallest never exceeds the mean, except by rounding where all are equal.
        return (size > torch.maximum(size.mean(1), size.amin(1))[:, None]).sum(1)


@dataclass(eq=False)
class ResidualWeighted(Population):
    """Points drawn from the pool with probability proportional to |r|^k / mean |r|^k + c, known as RAD.

    That density is a mixture: |r|^k with share 1 / (1 + c) and the uniform one with c / (1 + c). The shares
    are given to columns instead of to chance, so that the uniform draws are known.

    The paper evaluates the residual on a dense set at every refresh. Here the pool is that set, and nothing
    is evaluated twice: the population remembers the residual last seen at every pool point. A point not yet
    seen counts as the mean of those seen, which are a fair sample of the pool because all unseen points are
    equally likely to be drawn next (quotas aside). A remembered value is as old as the point's last draw.

    Source: Wu et al., "A comprehensive study of non-adaptive and residual-based adaptive sampling for
    physics-informed neural networks", CMAME 403, 2023; k = c = 1 there.
    """

    every: int = 100
    power: float = 1.0  # k; larger ones look at the worst points alone
    floor: float = 1.0  # c, positive; larger ones come closer to uniform points
    seen: Float[Tensor, "b pool"] = field(init=False, repr=False)  # |r|, NaN where never drawn

    _tensors: ClassVar[tuple[str, ...]] = (*Population._tensors, "seen")

    def __post_init__(self) -> None:
        if self.power < 0 or self.floor <= 0:
            raise ValueError(
                "power must not be negative, and floor must be positive so that some points are drawn "
                f"uniformly; got power={self.power} and floor={self.floor}."
            )
        super().__post_init__()
        self.seen = torch.full((self.batch, self.pool), torch.nan, dtype=torch.float64)

    def _refresh(self, residual: Float[Tensor, "b n"]) -> None:
        residual = residual.to("cpu", torch.float64)
        size = residual.sqrt().where(residual.isfinite(), torch.nan)  # where the flow diverged is not seen
        self.seen = self.seen.scatter(1, self.indices, size)
        density = self.seen**self.power
        density = density.where(density.isfinite(), density.nanmean(1, keepdim=True))
        density = density.nan_to_num(1.0).clamp(min=1e-300)  # uniform if nothing is seen or left to see
        lead = min(round(self.points / (1 + self.floor)), self.points - 1)
        self._renew(lead, density=density)


def population(
    kind: str,
    batch: int,
    pool: int,
    points: int,
    *,
    seed: Seed = 0,
    quotas: Quotas | None = None,
    unbiased: bool = False,
    every: int | None = None,
    retain: float = 0.3,
    power: float = 1.0,
    floor: float = 1.0,
) -> Population:
    """The population that a configuration names, with the options that its kind reads.

    Args:
        kind: uniform, fixed, r3, r3_paper or residual_weighted.
        every: of all but fixed; None for the kind's own pace.
        retain: of r3.
        power, floor: of residual_weighted.
    """
    kinds: dict[str, tuple[type[Population], dict[str, float]]] = {
        "uniform": (UniformPoints, {}),
        "fixed": (FixedPoints, {}),
        "r3": (R3Population, {"retain": retain}),
        "r3_paper": (R3PaperPopulation, {}),
        "residual_weighted": (ResidualWeighted, {"power": power, "floor": floor}),
    }
    if kind not in kinds:
        raise ValueError(f"There is no population {kind!r}; choose one of {', '.join(kinds)}.")
    made, options = kinds[kind]
    pace = made.every if every is None else every
    return made(batch, pool, points, every=pace, seed=seed, quotas=quotas, unbiased=unbiased, **options)
