"""Node classifiers on vessel graphs: attention, plain convolution, and the same head without any neighbours.

Sources: dynamic graph attention (GATv2), Brody, Alon and Yahav, ICLR 2022; graph convolution (GCN), Kipf and
Welling, ICLR 2017; GraphNorm, Cai et al., ICML 2021.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.nn import GATv2Conv, GCNConv, GraphNorm
from torch_geometric.utils import scatter

from aneurysm.nets.shapes import expect_rows

_FAR = 6.0  # standard deviations; one wild measurement must not silence the others


class Standardise(nn.Module):
    """Subtract the mean and divide by the spread of features seen in training; identity until calibrated."""

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "n f"]) -> None:
        """Measure on the nodes of the training graphs; constant columns keep their scale."""
        if x.shape[1] != len(self.mean):
            raise ValueError(f"Expected {len(self.mean)} columns to calibrate on but got {x.shape[1]}.")
        if len(x) < 2:
            raise ValueError(f"Calibration needs at least two rows but got {len(x)}.")
        self.mean.copy_(x.mean(0))
        spread = x.std(0)
        self.scale.copy_(torch.where(spread > 1e-4, spread, torch.ones_like(spread)))

    def forward(self, x: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
        expect_rows("Features of vessel nodes or edges", x, len(self.mean))
        return ((x - self.mean) / self.scale).clamp(-_FAR, _FAR)


NORMS = {"layer": nn.LayerNorm, "graph": GraphNorm}


def norms(kind: str, hidden: int, layers: int) -> nn.ModuleList:
    """One norm per layer: `layer` over the features of a node, `graph` per feature over the nodes of a graph.

    Raises:
        ValueError: no such norm.
    """
    if kind not in NORMS:
        raise ValueError(f"norm is one of {', '.join(NORMS)}, got {kind!r}.")
    return nn.ModuleList(NORMS[kind](hidden) for _ in range(layers))


def normed(norm: nn.Module, h: Float[Tensor, "n f"], batch: Int[Tensor, " n"]) -> Float[Tensor, "n f"]:
    """Apply one of `norms`; `batch` says which graph a node belongs to."""
    return norm(h, batch) if isinstance(norm, GraphNorm) else norm(h)


class ScaledInputs(nn.Module):
    """What nets on graphs with edge features share: the scaling of their inputs.

    Args:
        in_features: columns of the node features.
        edge_features: columns of the edge features.
    """

    def __init__(self, in_features: int, edge_features: int) -> None:
        super().__init__()
        self.node_scale = Standardise(in_features)
        self.edge_scale = Standardise(edge_features)

    def calibrate(self, x: Float[Tensor, "n f"], edge_attr: Float[Tensor, "e g"] | None = None) -> None:
        """Fit the input scaling to the nodes (and edges) of the training graphs."""
        self.node_scale.calibrate(x)
        if edge_attr is not None and len(edge_attr) > 1:
            self.edge_scale.calibrate(edge_attr)


class _Propagating(ScaledInputs):
    """What nets that pass messages share: embedding, and a head that also sees the whole graph."""

    def __init__(
        self, in_features: int, edge_features: int, hidden: int, layers: int, dropout: float, residual: bool,
        norm: str,
    ) -> None:  # fmt: skip
        super().__init__(in_features, edge_features)
        self.embed = nn.Linear(in_features, hidden)
        self.norms = norms(norm, hidden, layers)
        self.dropout = nn.Dropout(dropout)
        self.residual = residual
        # The mean of the whole graph tells what is usual in this patient.
        self.head = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def message(self, layer: int, h: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        """What layer number `layer` gathers at every node, (n, hidden)."""
        raise NotImplementedError

    def forward(
        self,
        x: Float[Tensor, "n f"],
        edge_index: Int[Tensor, "2 e"],
        edge_attr: Float[Tensor, "e g"],
        batch: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """Logit per node; `batch` says which graph a node belongs to."""
        if len(x) == 0:  # a batch of empty graphs keeps its gradient path
            return x.new_zeros(0) + 0.0 * self.embed.weight.sum()
        h = self.embed(self.node_scale(x))  # (n, hidden)
        edge_attr = self.edge_scale(edge_attr)
        for layer, norm in enumerate(self.norms):
            gathered = self.message(layer, normed(norm, h, batch), edge_index, edge_attr)
            update = self.dropout(nn.functional.gelu(gathered))
            h = h + update if self.residual else update
        usual = scatter(h, batch, dim=0, reduce="mean")[batch]  # (n, hidden)
        return self.head(torch.cat([h, usual], dim=1)).squeeze(1)


class VesselGat(_Propagating):
    """Score every node of a vessel graph for being an aneurysm, by attention over its neighbours.

    Args:
        in_features: columns of the node features.
        edge_features: columns of the edge features.
        hidden: width of a layer; a multiple of `heads`.
        layers: how many edges away a node can see; 0 leaves only the mean of the whole graph.
        heads: attention heads per layer.
        dropout: on hidden units and attention weights.
        residual: add the input of each layer to its output.
        norm: `layer` (LayerNorm) or `graph` (GraphNorm).
    """

    def __init__(
        self,
        in_features: int,
        edge_features: int,
        hidden: int = 32,
        layers: int = 3,
        heads: int = 4,
        dropout: float = 0.1,
        residual: bool = True,
        norm: str = "layer",
    ) -> None:
        if hidden % heads:
            raise ValueError(f"hidden ({hidden}) must be a multiple of heads ({heads}).")
        super().__init__(in_features, edge_features, hidden, layers, dropout, residual, norm)
        self.attention = nn.ModuleList(
            GATv2Conv(hidden, hidden // heads, heads=heads, edge_dim=edge_features, dropout=dropout)
            for _ in range(layers)
        )

    def message(self, layer: int, h: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        return self.attention[layer](h, edge_index, edge_attr)


class VesselGcn(_Propagating):
    """A control arm of VesselGat: neighbours count alike, edges carry no features.

    Args:
        in_features: columns of the node features.
        edge_features: accepted so that all nets are built alike; not used.
        hidden: width of a layer.
        layers: how many edges away a node can see.
        heads: accepted so that all nets are built alike; not used.
        dropout: on hidden units.
        residual: add the input of each layer to its output.
        norm: `layer` (LayerNorm) or `graph` (GraphNorm).
    """

    def __init__(
        self,
        in_features: int,
        edge_features: int,
        hidden: int = 32,
        layers: int = 3,
        heads: int = 4,
        dropout: float = 0.1,
        residual: bool = True,
        norm: str = "layer",
    ) -> None:
        super().__init__(in_features, edge_features, hidden, layers, dropout, residual, norm)
        self.convolution = nn.ModuleList(GCNConv(hidden, hidden) for _ in range(layers))

    def message(self, layer: int, h: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        return self.convolution[layer](h, edge_index)


class VesselMlp(nn.Module):
    """The ablation of VesselGat: each node is scored from its own features, edges are ignored.

    Args:
        in_features: columns of the node features.
        edge_features: accepted so that both nets are built alike; not used.
        hidden: width of a layer.
        layers: residual layers.
        heads: accepted so that both nets are built alike; not used.
        dropout: on hidden units.
        residual: add the input of each layer to its output.
    """

    def __init__(
        self,
        in_features: int,
        edge_features: int,
        hidden: int = 32,
        layers: int = 3,
        heads: int = 4,
        dropout: float = 0.1,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.node_scale = Standardise(in_features)
        self.embed = nn.Linear(in_features, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(dropout))
            for _ in range(layers)
        )
        self.residual = residual
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def calibrate(self, x: Float[Tensor, "n f"], edge_attr: Float[Tensor, "e g"] | None = None) -> None:
        """Fit the input scaling to the nodes of the training graphs."""
        self.node_scale.calibrate(x)

    def forward(
        self,
        x: Float[Tensor, "n f"],
        edge_index: Int[Tensor, "2 e"],
        edge_attr: Float[Tensor, "e g"],
        batch: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """Logit per node."""
        h = self.embed(self.node_scale(x))  # (n, hidden)
        for block in self.blocks:
            h = h + block(h) if self.residual else block(h)
        return self.head(h).squeeze(1)
