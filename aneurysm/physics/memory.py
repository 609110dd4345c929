"""The hard points of candidates that come and go: R3 in minibatch training."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from aneurysm.physics.collocation import retain_top


class HardPoints:
    """Remembers which of a candidate's points had the largest residual, until they are `every` steps old.

    A population (see `collocation`) sees its candidates at every step. In training a candidate is drawn now
    and then; its retained points wait for it here.

    Args:
        retain: fraction of the points that is kept, 0..1.
        every: steps for which kept points stay, whatever their residual: the guide's K.
    """

    def __init__(self, retain: float, every: int) -> None:
        if not 0 < retain < 1 or every < 1:
            raise ValueError(
                f"retain lies in (0, 1) and every is at least one step, got {retain} and {every}."
            )
        self.retain, self.every = retain, every
        self.kept: dict[int, tuple[int, Tensor]] = {}  # key -> step of the choice, pool indices (k,)

    def count(self, points: int) -> int:
        """How many of so many points are kept."""
        return min(max(1, round(self.retain * points)), points - 1)

    def recall(self, keys: Int[Tensor, "b"], fresh: Int[Tensor, "b k"], pool: int) -> Int[Tensor, "b k"]:
        """The kept points of candidates; `fresh` ones of those not met before, or with another pool."""
        out = fresh.clone()
        for row, key in enumerate(keys.tolist()):
            _, indices = self.kept.get(key, (0, fresh[row]))
            if key and len(indices) == fresh.shape[1] and int(indices.max()) < pool:
                out[row] = indices.to(out.device)
        return out

    def update(
        self, keys: Int[Tensor, "b"], indices: Int[Tensor, "b n"], residual: Float[Tensor, "b n"], step: int
    ) -> None:
        """Keep the hardest of the points just used, for candidates whose kept ones are old or missing."""
        hardest = indices.gather(1, retain_top(residual, self.retain)).cpu()
        for row, key in enumerate(keys.tolist()):
            if key and (key not in self.kept or step - self.kept[key][0] >= self.every):
                self.kept[key] = (step, hardest[row, : self.count(indices.shape[1])].clone())

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {"kept": dict(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.kept = dict(state["kept"])
