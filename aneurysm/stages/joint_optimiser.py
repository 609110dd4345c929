"""Several optimisers that act as one: parts of a network differ in what suits them, training loops do not."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class JointOptimiser(Optimizer):
    """Steps each of its parts once per step; schedules and checkpoints see one optimiser.

    The parameter groups are the parts' own, in their order, so that a schedule that sets a group's learning
    rate sets the part's.

    Args:
        parts: optimisers of disjoint parameters.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__(groups, dict(parts[0].defaults))  # schedules ask these what can be cycled
        self.parts = list(parts)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every part, after one call of the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The parts' states, in their order."""
        return {"parts": [part.state_dict() for part in self.parts], "state": {}, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: it is the state of other parts, as of a run with another optimiser.
        """
        states = state_dict.get("parts", [])
        if len(states) != len(self.parts):
            raise ValueError(
                f"The checkpoint holds {len(states) or 1} optimisers and this run has {len(self.parts)}: it "
                "was trained with other settings. Begin the run anew with force=true."
            )
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self._share()

    def _share(self) -> None:
        """Loading makes new groups: take them over."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = defaultdict(dict)
        for part in self.parts:
            self.state.update(part.state)
