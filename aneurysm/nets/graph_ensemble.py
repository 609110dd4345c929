"""Several nets on one graph, each trained without a part of the scans: its scores of that part are honest."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GraphEnsemble(nn.Module):
    """Mean log odds of nets that take the same graph.

    members: each takes (x, edge_index, edge_attr, batch) and gives a logit per node.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(members) < 2:
            raise ValueError(f"An ensemble has at least two members, got {len(members)}.")
        self.members = nn.ModuleList(members)

    def calibrate(self, x: Tensor, edge_attr: Tensor | None = None) -> None:
        """Fit the input scaling of all members to nodes and edges of the training graphs."""
        for member in self.members:
            member.calibrate(x, edge_attr)  # type: ignore[operator]

    def each(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor) -> list[Tensor]:
        """Logits (n,) of every member."""
        return [member(x, edge_index, edge_attr, batch) for member in self.members]

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor) -> Tensor:
        """Mean logit per node, (n,)."""
        return torch.stack(self.each(x, edge_index, edge_attr, batch)).mean(0)
