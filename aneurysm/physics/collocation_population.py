"""Where the physics is tested: populations of collocation points, some of which follow the residual.

Notation: b candidates with a pool of points each, uniform in the lumen; a population addresses n of every
pool. Its columns are, from left to right,

    kept or drawn by residual | near the wall | near the dome | fresh uniform draws from the whole pool

so that an honest residual can be measured on the last ones: over retained points it is biased upwards, 2 to 3
times on a straight tube, and is never reported.

A draw comes from a generator made of (seed, step) and never from a running state. The fresh columns at step k
need nothing but k, however often the fit was interrupted and whatever else was drawn, so different kinds of
population are also compared on common random numbers. What was retained is history and goes with k into
`state_dict`.
"""

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Seed = int | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Quotas:
    """Shares of the fresh draws that come from near the wall and from near the dome, for any population.

    A candidate without such points draws that share from its whole pool.
    """

    near_wall: Bool[Tensor, "b pool"] | None = None
    near_dome: Bool[Tensor, "b pool"] | None = None
    wall_share: float = 0.2
    dome_share: float = 0.2

    def __post_init__(self) -> None:
        if min(self.wall_share, self.dome_share) < 0 or self.wall_share + self.dome_share >= 1:
            raise ValueError(
                "Quotas are shares of the fresh draws, at least 0, that leave some to the whole pool, "
                f"got wall_share={self.wall_share} and dome_share={self.dome_share}."
            )

    def strata(self, batch: int, pool: int) -> list[tuple[Bool[Tensor, "b pool"], float]]:
        """The masks that there are, without empty rows, and the share that is drawn from each."""
        found = []
        for name, share in (("near_wall", self.wall_share), ("near_dome", self.dome_share)):
            mask = getattr(self, name)
            if mask is None:
                continue
            if mask.shape != (batch, pool):
                raise ValueError(
                    f"{name} must say of every pool point of every candidate whether it is one, "
                    f"{(batch, pool)}, got {tuple(mask.shape)}."
                )
            found.append((mask.cpu() | ~mask.cpu().any(1, keepdim=True), share))
        return found


@dataclass(eq=False)
class Population(ABC):
    """Points per candidate that persist between steps, for fits that see the same candidates at every step.

    A kind of population says in `_refresh` which points lead; the others are fresh.
    """

    batch: int  # candidates
    pool: int  # points available per candidate
    points: int  # in the population; drawn with replacement
    _: KW_ONLY
    every: int = 1  # steps between refreshes; in between the points stay
    seed: Seed = 0  # or several numbers, such as (seed, epoch, index)
    quotas: Quotas | None = field(default=None, repr=False)  # strata with a share of the fresh draws
    unbiased: bool = False  # carry `weights`

    steps: int = field(default=0, init=False)
    indices: Int[Tensor, "b n"] = field(init=False, repr=False)  # into the pool, on the CPU
    starts: Int[Tensor, "b"] = field(init=False, repr=False)  # a candidate's first fresh uniform column
    # With these the weighted mean over the points is an unbiased estimate of the mean over the pool.
    weights: Float[Tensor, "b n"] | None = field(default=None, init=False, repr=False)

    _tensors: ClassVar[tuple[str, ...]] = ("indices", "starts", "weights")

    def __post_init__(self) -> None:
        if min(self.batch, self.pool, self.points, self.every) < 1:
            raise ValueError(
                "A population has at least one candidate, one point out of one and one step between "
                f"refreshes, got batch={self.batch}, pool={self.pool}, points={self.points}, "
                f"every={self.every}."
            )
        self._strata = self.quotas.strata(self.batch, self.pool) if self.quotas is not None else []
        self._renew(0)

    @property
    def retained(self) -> int:
        """First column from which every candidate has uniform draws, always less than `points`."""
        return int(self.starts.max())

    @property
    def fresh(self) -> Bool[Tensor, "b n"]:
        """All uniform draws: candidates that keep fewer points than others have some left of `retained`."""
        return torch.arange(self.points) >= self.starts[:, None]

    def update(self, residual: Float[Tensor, "b n"]) -> None:
        """Counts a step and on every `every`-th one renews the points.

        Args:
            residual: squared residual at `indices`, summed over the equations, as the head minimises it;
                rules that speak of |r| take the root.
        """
        if residual.shape != self.indices.shape:
            raise ValueError(
                f"The population has {tuple(self.indices.shape)} candidates and points but got residuals "
                f"of {tuple(residual.shape)}."
            )
        self.steps += 1
        if self.steps % self.every == 0:
            self._refresh(residual.detach())

    def state_dict(self) -> dict[str, Any]:
        """Everything the next points depend on, for a checkpoint."""
        # The tensors need no copies: a refresh replaces them and writes into none.
        held = {name: getattr(self, name) for name in self._tensors}
        return {"kind": type(self).__name__, "pool": self.pool, "steps": self.steps, **held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken, given the same seed and options.

        Raises:
            ValueError: it was taken from a population of another kind or size.
        """
        theirs, own = _sizes(state), _sizes(self.state_dict())
        if theirs != own:
            raise ValueError(f"The state is of {theirs}, this population has {own}.")
        self.steps = int(state["steps"])
        for name in self._tensors:
            setattr(self, name, None if state[name] is None else state[name].cpu())

    @abstractmethod
    def _refresh(self, residual: Float[Tensor, "b n"]) -> None:
        """Renews the points, given the squared residual at the present ones."""

    def _renew(
        self,
        lead: Int[Tensor, "b"] | int,
        *,
        kept: Int[Tensor, "b n"] | None = None,
        density: Float[Tensor, "b pool"] | None = None,
    ) -> None:
        """Fills all columns: the first `lead` are kept or drawn from a density, the others drawn anew."""
        rng = _generator(self.seed, self.steps)
        # Before anything else, so that the fresh draws do not depend on what else is drawn.
        indices = torch.randint(self.pool, (self.batch, self.points), generator=rng)
        column = torch.arange(self.points)
        lead = torch.as_tensor(lead).expand(self.batch)
        strata = [(mask, (share * (self.points - lead).double()).long()) for mask, share in self._strata]
        start = lead
        if kept is not None:
            indices = torch.where(column < lead[:, None], kept, indices)
        if density is not None:
            start, strata = torch.zeros_like(lead), [(density, lead), *strata]

        mixture = torch.zeros(self.batch, self.pool, dtype=torch.float64)  # density of all points together
        for stratum, count in strata:
            stratum = stratum.double() / stratum.double().sum(1, keepdim=True)
            end = start + count
            here = (start[:, None] <= column) & (column < end[:, None])  # (b, n)
            indices = torch.where(here, _draw(stratum, self.points, rng), indices)
            mixture += (count.double() / self.points)[:, None] * stratum
            start = end
        self.indices, self.starts = indices, start
        if self.unbiased:
            # Balance heuristic (Veach and Guibas 1995): the weight depends on where a point lies, not on
            # which share drew it, and the uniform share bounds it.
            mixture += ((self.points - start).double() / (self.points * self.pool))[:, None]
            self.weights = 1 / (self.pool * mixture.gather(1, indices))


def _sizes(state: dict[str, Any]) -> dict[str, Any]:
    """What two states must have in common for one population to go on from the other's."""
    shapes = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    return {"kind": state.get("kind"), "pool": state.get("pool"), **shapes}


def _generator(seed: Seed, step: int) -> torch.Generator:
    mixed = np.random.SeedSequence(seed, spawn_key=(step,)).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


def _draw(density: Float[Tensor, "b pool"], count: int, rng: torch.Generator) -> Int[Tensor, "b count"]:
    """Positions drawn with replacement, with probability proportional to a density that need not sum to 1."""
    edges = density.cumsum(1)
    level = torch.rand(len(edges), count, dtype=edges.dtype, generator=rng) * edges[:, -1:]
    return torch.searchsorted(edges, level, right=True).clamp(max=edges.shape[1] - 1)
