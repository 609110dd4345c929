"""What a healthy tree lets one expect at a node, from its surroundings: an anomaly score without labels.

A node and its neighbours within a few edges are hidden, the net predicts the node's calibre and shape from
what is left of the tree, and the departure from that, in predicted standard deviations, is the score.
Attention passes the messages (GATv2, Brody, Alon and Yahav, ICLR 2022); the loss is the likelihood of a
normal distribution with predicted mean and spread (Nix and Weigend, 1994).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch_geometric.nn import GATv2Conv
from torch_geometric.utils import scatter

from aneurysm.nets.vessel_gat import ScaledInputs, normed, norms

_GROUPS = 12  # one node in so many is hidden at a time, with its neighbours
_LEAST_SPREAD = -3.0  # ln of the smallest predicted standard deviation, in standard deviations of training
_ORDINARY = 3.0  # departures this large are even odds before anything is calibrated


class MaskedNodeRegression(ScaledInputs):
    """Predict chosen features of hidden nodes from the visible rest of the tree.

    Args:
        in_features: columns of the node features.
        edge_features: columns of the edge features.
        targets: columns to predict, which make up the score.
        hidden: width of a layer; a multiple of `heads`.
        layers: how many edges away a node can see; more than `reach`.
        heads: attention heads per layer.
        dropout: on hidden units.
        norm: `layer` or `graph`.
        reach: neighbours within so many edges are hidden with a node: features are measured in balls that
            overlap, and a neighbour would give away what is to be predicted (docs/smart_net.md: AUC of
            nodes on sacs 0.68 with 1, 0.86 with 2, 0.94 with 3, at 2 mm between nodes).

    Raises:
        ValueError: settings that contradict each other.
    """

    def __init__(
        self,
        in_features: int,
        edge_features: int,
        targets: Sequence[int],
        hidden: int = 32,
        layers: int = 6,
        heads: int = 4,
        dropout: float = 0.1,
        norm: str = "layer",
        reach: int = 3,
    ) -> None:
        super().__init__(in_features, edge_features)
        if hidden % heads:
            raise ValueError(f"hidden ({hidden}) must be a multiple of heads ({heads}).")
        if not 0 <= reach < layers:
            raise ValueError(
                f"reach ({reach}) must be in 0..layers - 1 ({layers - 1}): nothing is seen beyond."
            )
        if not targets or not all(0 <= t < in_features for t in targets):
            raise ValueError(f"targets must be columns of the {in_features} features, got {list(targets)}.")
        self.targets, self.reach = list(targets), reach
        self.embed = nn.Linear(in_features, hidden)
        self.unseen = nn.Parameter(torch.zeros(hidden))
        self.attention = nn.ModuleList(
            GATv2Conv(hidden, hidden // heads, heads=heads, edge_dim=edge_features) for _ in range(layers)
        )
        self.norms = norms(norm, hidden, layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Sequential(
            nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, 2 * len(self.targets))
        )

    def predict(
        self,
        x: Float[Tensor, "n f"],
        edge_index: Int[Tensor, "2 e"],
        edge_attr: Float[Tensor, "e g"],
        batch: Int[Tensor, " n"],
        asked: Bool[Tensor, " n"],
    ) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n t"]]:
        """Mean and ln spread of the standardised targets at every node, with the asked nodes hidden."""
        away = asked
        for _ in range(self.reach):
            near = torch.zeros_like(away)
            near[edge_index[1, away[edge_index[0]]]] = True
            away = away | near
        # The features of an edge tell the calibre at its ends.
        visible = ~(away[edge_index[0]] | away[edge_index[1]])
        edge_attr = self.edge_scale(edge_attr) * visible[:, None]
        h = torch.where(away[:, None], self.unseen, self.embed(self.node_scale(x)))
        for attention, norm in zip(self.attention, self.norms, strict=True):
            gathered = attention(normed(norm, h, batch), edge_index, edge_attr)
            h = h + self.dropout(nn.functional.gelu(gathered))
        usual = scatter(h * ~away[:, None], batch, dim=0, reduce="sum")
        seen = scatter((~away).to(h.dtype), batch, dim=0, reduce="sum").clamp_min(1)
        mean, spread = self.head(torch.cat([h, (usual / seen[:, None])[batch]], dim=1)).chunk(2, dim=1)
        return mean, spread.clamp(_LEAST_SPREAD, -_LEAST_SPREAD)

    def loss(
        self,
        x: Float[Tensor, "n f"],
        edge_index: Int[Tensor, "2 e"],
        edge_attr: Float[Tensor, "e g"],
        batch: Int[Tensor, " n"],
        healthy: Bool[Tensor, " n"],
    ) -> Float[Tensor, ""]:
        """Negative log likelihood, in nats, of healthy nodes among those that are hidden in this step."""
        if len(x) == 0:
            return 0.0 * self.embed.weight.sum()
        asked = torch.randint(_GROUPS, (len(x),), device=x.device) == 0
        mean, spread = self.predict(x, edge_index, edge_attr, batch, asked)
        counted = asked & healthy
        departure = (self.node_scale(x)[:, self.targets] - mean) * torch.exp(-spread)
        nats = (0.5 * departure.square() + spread).mean(1)
        return (nats * counted).sum() / counted.sum().clamp_min(1)

    def departures(
        self,
        x: Float[Tensor, "n f"],
        edge_index: Int[Tensor, "2 e"],
        edge_attr: Float[Tensor, "e g"],
        batch: Int[Tensor, " n"],
    ) -> Float[Tensor, "n t"]:
        """|target - prediction| over the predicted spread; every node is hidden once, the others visible."""
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
        group = torch.empty(len(x), dtype=torch.long, device=x.device)
        group[order] = torch.arange(len(x), device=x.device) % _GROUPS
        truth = self.node_scale(x)[:, self.targets]
        found = torch.zeros_like(truth)
        for k in range(min(_GROUPS, len(x))):
            asked = group == k
            mean, spread = self.predict(x, edge_index, edge_attr, batch, asked)
            z = (truth - mean).abs() * torch.exp(-spread)
            found = torch.where(asked[:, None], z, found)
        return found

    def forward(
        self,
        x: Float[Tensor, "n f"],
        edge_index: Int[Tensor, "2 e"],
        edge_attr: Float[Tensor, "e g"],
        batch: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """Score per node, used like a logit: mean departure less what is ordinary."""
        if len(x) == 0:
            return x.new_zeros(0) + 0.0 * self.embed.weight.sum()
        return self.departures(x, edge_index, edge_attr, batch).mean(1) - _ORDINARY


class WithAnomaly(nn.Module):
    """A supervised net that sees the unsupervised score of each node as one more feature.

    Both are trained at once, each by its own loss: the score is handed on without a gradient.

    Args:
        anomaly: gives the score.
        net: takes one column more than `anomaly`; may be an ensemble.
    """

    def __init__(self, anomaly: MaskedNodeRegression, net: nn.Module) -> None:
        super().__init__()
        self.anomaly, self.net = anomaly, net

    @property
    def members(self) -> nn.ModuleList | None:
        """Of the supervised net, when it is an ensemble."""
        return getattr(self.net, "members", None)

    def calibrate(self, x: Float[Tensor, "n f"], edge_attr: Float[Tensor, "e g"] | None = None) -> None:
        """Fit the scaling to nodes and edges of the training graphs.

        The score is of order one by construction and not yet trained: its column stays as it is, by rows of
        mean 0 and spread 1.
        """
        self.anomaly.calibrate(x, edge_attr)
        score = x.new_tensor([-1.0, 1.0]).repeat(len(x) // 2 + 1)[: len(x), None]
        self.net.calibrate(torch.cat([x, score], dim=1), edge_attr)  # type: ignore[operator]

    def widened(
        self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor
    ) -> Float[Tensor, "n f"]:
        """Node features with the score behind them, measured without dropout."""
        training = self.anomaly.training
        self.anomaly.eval()
        with torch.no_grad():
            score = self.anomaly(x, edge_index, edge_attr, batch)[:, None]
        self.anomaly.train(training)
        return torch.cat([x, score], dim=1)

    def loss(
        self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, healthy: Tensor
    ) -> Float[Tensor, ""]:
        """Of the unsupervised net, see there."""
        return self.anomaly.loss(x, edge_index, edge_attr, batch, healthy)

    def each(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor) -> list[Tensor]:
        """Logits of every member of an ensemble."""
        wide = self.widened(x, edge_index, edge_attr, batch)
        return self.net.each(wide, edge_index, edge_attr, batch)  # type: ignore[operator]

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor) -> Float[Tensor, " n"]:
        """Logit per node."""
        return self.net(self.widened(x, edge_index, edge_attr, batch), edge_index, edge_attr, batch)
