"""Where the physics is tested: retain the points with the largest residual, resample and release the rest.

Source: Daw et al., "Mitigating propagation failures in PINNs using R3 sampling", ICML 2023. The published
rule retains on every step; on a straight tube that ends 75 times worse than uniform sampling because the
population collapses, while retaining the top fraction every hundred steps ends 2 to 3 times better. The
residual over retained points is biased upwards, so it is never reported.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def retain_top(residual: Float[Tensor, "b n"], fraction: float) -> Int[Tensor, "b k"]:
    """Positions of the ceil-rounded top `fraction` of each row's residuals, largest first."""
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


class R3Population:
    """A population of points per candidate, for fits that see the same candidates at every step.

    `indices` (b, points) address a pool of points per candidate; the first `retained` columns are kept hard
    points and the others are uniform draws, so an honest residual is measured on `indices[:, retained:]`.

    Args:
        batch: candidates.
        pool: points available per candidate.
        points: points in the population.
        retain: fraction kept at a refresh; 0.2 to 0.5 work alike.
        every: steps between refreshes.
        seed: of the draws.
    """

    def __init__(
        self, batch: int, pool: int, points: int, retain: float = 0.3, every: int = 100, seed: int = 0
    ):
        if not 0 < retain < 1:
            raise ValueError(f"retain must lie in (0, 1) so that some points are resampled, got {retain}.")
        if every < 1:
            raise ValueError(f"every counts steps between refreshes, at least 1, got {every}.")
        self.pool, self.retain, self.every = pool, retain, every
        self.retained = 0
        self.steps = 0
        self._generator = torch.Generator().manual_seed(seed)
        self.indices = self._uniform(batch, points)

    def update(self, residual: Float[Tensor, "b n"]) -> None:
        """Counts a step; on every `every`-th one keeps the hardest points and redraws the others."""
        self.steps += 1
        if self.steps % self.every:
            return
        kept = retain_top(residual.detach().to("cpu"), self.retain)  # (b, k)
        batch, points = self.indices.shape
        fresh = self._uniform(batch, points - kept.shape[1])
        self.indices = torch.cat((self.indices.gather(1, kept), fresh), dim=1)
        self.retained = kept.shape[1]

    def state_dict(self) -> dict[str, Any]:
        """Everything the next draws depend on, for a checkpoint."""
        return {
            "indices": self.indices.clone(),
            "retained": self.retained,
            "steps": self.steps,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            ValueError: it was taken from a population of another size.
        """
        if state["indices"].shape != self.indices.shape:
            raise ValueError(
                f"The state is of {tuple(state['indices'].shape)} candidates and points, "
                f"this population has {tuple(self.indices.shape)}."
            )
        self.indices = state["indices"].clone()
        self.retained, self.steps = int(state["retained"]), int(state["steps"])
        self._generator.set_state(state["generator"])

    def _uniform(self, batch: int, points: int) -> Tensor:
        return torch.randint(self.pool, (batch, points), generator=self._generator)
