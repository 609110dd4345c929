"""Vessel graphs as training data, and the training of the nets that score their nodes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader

from aneurysm.data.scan import Grid, Lesion
from aneurysm.global_batch import gather
from aneurysm.losses.classification import BinaryLoss
from aneurysm.stages.draws import DrawnBatches, drawn_batches, every_draw_once
from aneurysm.stages.processes import world
from aneurysm.stages.step import StageModule, StepOutput, adamw_one_cycle, log_step
from aneurysm.vessels.geometric_score import geometric_score
from aneurysm.vessels.graph import VesselGraph
from aneurysm.vessels.node_labels import label_nodes
from aneurysm.vessels.peaks import NO_PEAKS, Peaks

if TYPE_CHECKING:  # it takes 0.6 s, and every command imports this module: imported where graphs are made
    from torch_geometric.data import Data

# A graph has hundreds of nodes of which a handful lie on a sac.
POSITIVE_WEIGHT = 8.0


class GraphModule(StageModule):
    """Fits the node scores of the vessel graph; unknown nodes (NaN) do not count.

    A net with a `loss` of its own (masked-node regression) is fitted by that, on nodes known to be healthy;
    one with an `anomaly` net inside fits both at once, and no gradient passes from one to the other.
    """

    compiles = False  # a batch of graphs never has the size of the one before

    def __init__(self, net: nn.Module, lr: float, total_steps: int) -> None:
        super().__init__()
        self.net, self.lr, self.total_steps = net, lr, total_steps
        self.loss = BinaryLoss(positive_weight=POSITIVE_WEIGHT)

    def configure_model(self) -> None:
        """As for every stage; what training calls beside `forward` gathers the weights as that does."""
        super().configure_model()
        for method in ("loss", "each"):
            if hasattr(self.net, method):
                register_fsdp_forward_method(self.net, method)  # does nothing to a net that is whole

    def _step(self, batch: Any, split: str) -> Tensor:
        graph = batch.x, batch.edge_index, batch.edge_attr, batch.batch
        labels = batch.y
        graphs = torch.zeros(batch.num_graphs if len(labels) else 0, device=batch.x.device)
        (graphs,) = gather(graphs)
        total, terms = torch.zeros((), device=batch.x.device), {}
        unsupervised = hasattr(self.net, "loss")
        if unsupervised:
            healthy = labels == 0 if len(labels) else torch.zeros_like(batch.batch, dtype=torch.bool)
            total = self.net.loss(*graph, healthy)  # type: ignore[operator]
            terms["masked"] = total
        if not unsupervised or hasattr(self.net, "anomaly"):
            members = getattr(self.net, "members", None)
            if members is None or not self.training:
                supervised, more = self._supervised(self.net(*graph), labels)
            else:
                supervised, more = self._members(batch, graph)
            total, terms = total + supervised, {**terms, **more}
        return log_step(self, StepOutput(total, terms), split, len(graphs))

    def _members(self, batch: Any, graph: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Each member of an ensemble learns from the graphs that are not in its own part."""
        parts: list[tuple[Tensor, dict[str, Tensor]]] = []
        for number, logits in enumerate(self.net.each(*graph)):  # type: ignore[operator]
            own = batch.part[batch.batch] == number
            labels = torch.where(own, torch.nan, batch.y) if len(batch.y) else batch.y
            parts.append(self._supervised(logits, labels))
        losses = torch.stack([loss for loss, _ in parts])
        return losses.sum(), {"bce": losses.detach().mean()}

    def _supervised(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits, labels = gather(logits[: len(labels)], labels)
        return self.loss(logits, labels)

    def training_step(self, batch: "Data", index: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: "Data", index: int) -> Tensor:
        return self._step(batch, "val")

    def configure_optimizers(self):
        return adamw_one_cycle(self.parameters(), self.lr, 1e-3, self.total_steps)


@dataclass(frozen=True, eq=False)
class GraphItem:
    """A scan's graph with the peaks of its heat map and what is known about its aneurysms."""

    series_uid: str
    graph: VesselGraph
    grid: Grid
    lesions: tuple[Lesion, ...]
    present: bool | None
    peaks: Peaks = NO_PEAKS

    @property
    def known(self) -> bool:
        """Whether the positions of all its aneurysms are known."""
        return bool(self.lesions) or self.present is False

    def to_data(self, part: int = -1) -> "Data":
        """As PyG data; node labels are NaN where aneurysm positions are unknown.

        Args:
            part: member of an ensemble that must not learn from it, -1 for none.
        """
        from torch_geometric.data import Data

        labels = label_nodes(self.graph, self.lesions) if self.known else np.full(len(self.graph), np.nan)
        edge_index, edge_attr = self.graph.to_edge_index()
        return Data(
            x=torch.from_numpy(np.asarray(self.graph.node_features, np.float32)),
            edge_index=torch.as_tensor(edge_index),
            edge_attr=torch.as_tensor(edge_attr, dtype=torch.float32),
            y=torch.from_numpy(np.asarray(labels, np.float32)),
            part=torch.tensor([part]),
        )


class GraphData(LightningDataModule):
    """Vessel graphs in batches of `batch` scans.

    Args:
        parts: of each training scan, the member of an ensemble that must not learn from it.
    """

    def __init__(
        self,
        train: list[GraphItem],
        held_out: list[GraphItem],
        batch: int,
        seed: int,
        parts: list[int] | None = None,
    ) -> None:
        super().__init__()
        parts = [-1] * len(train) if parts is None else parts
        self.train = [i.to_data(p) for i, p in zip(train, parts, strict=True) if len(i.graph)]
        self.held_out = [item.to_data() for item in held_out if len(item.graph)]
        self.batch, self.seed = batch, seed

    @property
    def steps(self) -> int:
        """Optimiser steps per epoch; every graph is seen once in each."""
        return max(1, -(-len(self.train) // (self.batch * world())))

    def train_dataloader(self) -> DataLoader:
        epoch = self.trainer.current_epoch if self.trainer else 0
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.train))
        batches = drawn_batches(self.trainer, self.steps, self.batch, total=len(self.train))
        return _graph_loader([self.train[i] for i in order], batches)

    def val_dataloader(self) -> DataLoader:
        return _graph_loader(self.held_out, every_draw_once(len(self.held_out), self.batch))


def _graph_loader(graphs: list[Any], batches: DrawnBatches) -> DataLoader:
    from torch_geometric.data import Batch

    def joined(part: list[Any]) -> Any:
        if part:
            return Batch.from_data_list(part)
        # Nothing is left for this process: a graph without labels, so that it keeps step.
        stand_in: Any = Batch.from_data_list(graphs[:1])
        stand_in.y = stand_in.y[:0]
        return stand_in

    dataset: Any = graphs
    return DataLoader(dataset, batch_sampler=batches, collate_fn=joined)


def patient_parts(patients: list[str], members: int, seed: int) -> list[int]:
    """Deal patients to the members of an ensemble: the part of each scan, 0 .. members - 1."""
    names = sorted(set(patients))
    turn = np.random.default_rng(seed).permutation(len(names))
    part = dict(zip(names, (turn % members).tolist(), strict=True))
    return [int(part[name]) for name in patients]


@torch.no_grad()
def node_scores(net: nn.Module | None, graph: VesselGraph, member: int | None = None) -> np.ndarray:
    """Score of each node, (n,) float32 in 0..1; without a net, the one that geometry gives.

    Args:
        member: of an ensemble: what this one alone says; None for all of them together.
    """
    if net is None:
        return geometric_score(graph)
    if not len(graph):
        return np.zeros(0, np.float32)
    net.eval()
    parameter = next(net.parameters())
    edge_index, edge_attr = graph.to_edge_index()
    x = torch.from_numpy(graph.node_features).to(parameter)
    inputs = (
        x,
        torch.as_tensor(edge_index).to(parameter.device),
        torch.as_tensor(edge_attr).to(parameter),
        torch.zeros(len(x), dtype=torch.long, device=parameter.device),
    )
    logits = net(*inputs) if member is None else net.each(*inputs)[member]  # type: ignore[operator]
    return torch.sigmoid(logits).float().cpu().numpy()
