"""Several segmentation losses as one."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from aneurysm.losses.present import beside_of


class WeightedSum(nn.Module):
    """``sum_i weights[i] * parts[i]``, in the units of the parts.

    Every part is logged under its own name; what a part of several terms is made of, as `<part>_<term>`.

    Args:
        parts: losses by name, each of (logits, target, valid).
        weights: factors >= 0 by the names of parts; a part without one counts once.

    Raises:
        ValueError: no part, a weight for none of them or below 0, or nothing but zeros.
    """

    def __init__(self, parts: Mapping[str, nn.Module], weights: Mapping[str, float | int]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("A sum of losses has at least one part.")
        if unknown := sorted(set(weights) - set(parts)):
            raise ValueError(
                f"The sum has weights for {', '.join(unknown)}, but its parts are {', '.join(parts)}."
            )
        self.weights = {name: float(weights.get(name, 1.0)) for name in parts}
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise ValueError(f"Weights of a sum must be >= 0 and not all 0, got {self.weights}.")
        self.parts = nn.ModuleDict(dict(parts))

    @property
    def beside(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """What its parts want beside a target, one after the other along the channels; None if none does."""
        return self._beside if any(map(beside_of, self.parts.values())) else None

    def _beside(self, target: np.ndarray) -> np.ndarray:
        wanted = [made for part in self.parts.values() if (made := beside_of(part))]
        return np.concatenate([made(target) for made in wanted])

    def forward(
        self,
        logits: Float[Tensor, "b c d h w"],
        target: Float[Tensor, "b c d h w"],
        valid: Bool[Tensor, "b c"] | None = None,
        beside: Bool[Tensor, "b p d h w"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Loss against a 0/1 target over the channels that `valid` marks as annotated.

        Args:
            beside: what the attribute of that name makes of each target; None lets each part make its own.
        """
        pieces = iter(() if beside is None else beside.split(target.shape[1], dim=1))
        total, terms = torch.zeros((), device=logits.device), {}
        for name, part in self.parts.items():
            extra = (next(pieces),) if beside is not None and beside_of(part) else ()
            value, inside = part(logits, target, valid, *extra)
            total = total + self.weights[name] * value
            terms[name] = value
            if len(inside) > 1:
                terms |= {f"{name}_{term}": t for term, t in inside.items()}
        return total, terms
