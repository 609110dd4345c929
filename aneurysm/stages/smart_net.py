"""Stage 3, smart_net: segment, thin, build the vessel graph, score its nodes, propose candidates.

A segmentation network marks lumen and sacs; its thresholded lumen becomes a graph; graph attention decides
which nodes do not belong to a healthy tree. The graph network learns on out-of-fold segmentations, so what
it sees in training has the same errors as what it will see in use.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.scan import Grid, Lesion
from aneurysm.global_batch import gather
from aneurysm.losses.classification import BinaryLoss
from aneurysm.stages.draws import DrawnBatches, drawn_batches, every_draw_once
from aneurysm.stages.processes import world
from aneurysm.stages.segmentation import SegmentationData, SegmentationModule
from aneurysm.stages.step import StageModule, StepOutput, adamw_one_cycle, log_step
from aneurysm.stages.volumes import Region, View, network_image, probability_volume
from aneurysm.vessels.candidates import Candidate, label_nodes, propose
from aneurysm.vessels.features import with_features
from aneurysm.vessels.graph import VesselGraph, build_graph
from aneurysm.vessels.lumen_rule import LumenRule
from aneurysm.vessels.repair import Repaired, VesselRules, repair

if TYPE_CHECKING:  # it takes 0.6 s, and every command imports this module: imported where graphs are made
    from torch_geometric.data import Data

INPUTS, CHANNELS = ("image", "vessel stage"), ("vessel", "aneurysm")
# A graph has hundreds of nodes of which a handful lie on a sac.
POSITIVE_WEIGHT = 8.0


class SegmenterModule(SegmentationModule):
    """Two channels: lumen including sacs, and sacs."""


class SegmenterData(SegmentationData):
    """Patches with the image and the vessel stage's out-of-fold probability as input."""

    def __init__(self, train: Sequence[Path], held_out: Sequence[Path], **settings) -> None:
        super().__init__(train, held_out, CHANNELS, **settings)


def segment(
    net: nn.Module, case: PreparedCase, vessel: np.ndarray, view: View, region: Region | None = None
) -> dict[str, np.ndarray]:
    """Probabilities of lumen and of sac, (d, h, w) float32 each; 0 far from the region where one is given.

    Args:
        vessel: (d, h, w) float32 probability from the vessel stage.
    """
    inputs = [network_image(case), vessel]
    return dict(zip(CHANNELS, probability_volume(net, inputs, view, region), strict=True))


@dataclass(frozen=True)
class GraphSettings:
    """How a probability volume becomes a graph, and a scored graph candidates."""

    node_spacing_mm: float
    max_candidates: int
    min_distance_mm: float
    rules: VesselRules = field(default_factory=VesselRules)  # how the mask is mended before


def vessel_graph(
    probability: dict[str, np.ndarray], rule: LumenRule, grid: Grid, settings: GraphSettings
) -> VesselGraph:
    """Threshold, mend, thin and link; nodes carry shape features and what the network saw around them."""
    return mask_graph(graph_mask(probability, rule, grid, settings).mask, probability, grid, settings)


def graph_mask(
    probability: dict[str, np.ndarray], rule: LumenRule, grid: Grid, settings: GraphSettings
) -> Repaired:
    """The lumen mask that becomes the graph, with what had to be mended."""
    lumen = probability["vessel"]
    return repair(rule(lumen, grid), grid, settings.rules, lumen, faint=lumen >= rule.threshold)


def mask_graph(
    mask: np.ndarray, probability: dict[str, np.ndarray], grid: Grid, settings: GraphSettings
) -> VesselGraph:
    """Thin and link a mended mask."""
    graph = build_graph(mask, grid, node_spacing_mm=settings.node_spacing_mm)
    return with_features(graph, probability, grid)


class GraphModule(StageModule):
    """Fits the node scores of the vessel graph; unknown nodes (NaN) do not count."""

    compiles = False  # a batch of graphs never has the size of the one before

    def __init__(self, net: nn.Module, lr: float, total_steps: int) -> None:
        super().__init__()
        self.net, self.lr, self.total_steps = net, lr, total_steps
        self.loss = BinaryLoss(positive_weight=POSITIVE_WEIGHT)

    def _step(self, batch: Any, split: str) -> Tensor:
        logits = self.net(batch.x, batch.edge_index, batch.edge_attr, batch.batch)
        graphs = torch.zeros(batch.num_graphs if len(batch.y) else 0, device=logits.device)
        (graphs,), (logits, labels) = gather(graphs), gather(logits[: len(batch.y)], batch.y)
        loss, terms = self.loss(logits, labels)
        return log_step(self, StepOutput(loss, terms), split, len(graphs))

    def training_step(self, batch: "Data", index: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: "Data", index: int) -> Tensor:
        return self._step(batch, "val")

    def configure_optimizers(self):
        return adamw_one_cycle(self.parameters(), self.lr, 1e-3, self.total_steps)


@dataclass(frozen=True, eq=False)
class GraphItem:
    """A scan's graph with what is known about its aneurysms."""

    series_uid: str
    graph: VesselGraph
    grid: Grid
    lesions: tuple[Lesion, ...]
    present: bool | None

    def to_data(self) -> "Data":
        """As PyG data; node labels are NaN where aneurysm positions are unknown."""
        from torch_geometric.data import Data

        known = bool(self.lesions) or self.present is False
        labels = label_nodes(self.graph, self.lesions) if known else np.full(len(self.graph.position), np.nan)
        edge_index, edge_attr = self.graph.to_edge_index()
        return Data(
            x=torch.from_numpy(np.asarray(self.graph.node_features, np.float32)),
            edge_index=torch.as_tensor(edge_index),
            edge_attr=torch.as_tensor(edge_attr, dtype=torch.float32),
            y=torch.from_numpy(np.asarray(labels, np.float32)),
        )


class GraphData(LightningDataModule):
    """Vessel graphs in batches of `batch` scans."""

    def __init__(self, train: list[GraphItem], held_out: list[GraphItem], batch: int, seed: int) -> None:
        super().__init__()
        self.train = [d for d in (item.to_data() for item in train) if d.num_nodes]
        self.held_out = [d for d in (item.to_data() for item in held_out) if d.num_nodes]
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


@torch.no_grad()
def node_scores(net: nn.Module, graph: VesselGraph) -> np.ndarray:
    """Anomaly score 0..1 per node, (n,) float32."""
    if not len(graph.position):
        return np.zeros(0, np.float32)
    net.eval()
    device = next(net.parameters()).device
    edge_index, edge_attr = graph.to_edge_index()
    x = torch.from_numpy(np.asarray(graph.node_features, np.float32)).to(device)
    logits = net(
        x,
        torch.as_tensor(edge_index).to(device),
        torch.as_tensor(edge_attr, dtype=torch.float32).to(device),
        torch.zeros(len(x), dtype=torch.long, device=device),
    )
    return torch.sigmoid(logits).cpu().numpy()


def candidates(
    graph: VesselGraph,
    scores: np.ndarray,
    probability: dict[str, np.ndarray],
    grid: Grid,
    settings: GraphSettings,
) -> list[Candidate]:
    """The places that the expert should look at, best first."""
    return propose(
        graph,
        scores,
        probability["aneurysm"],
        grid,
        max_candidates=settings.max_candidates,
        min_distance_mm=settings.min_distance_mm,
    )


def candidate_rows(series_uid: str, found: list[Candidate], fold: int) -> pd.DataFrame:
    """Candidates of one scan as rows of the candidates table."""
    return pd.DataFrame(
        [
            {
                "series_uid": series_uid,
                "candidate": k,
                "x_mm": c.centre_mm[0],
                "y_mm": c.centre_mm[1],
                "z_mm": c.centre_mm[2],
                "score": c.score,
                "node": c.node,
                "radius_mm": c.radius_mm,
                "fold": fold,
            }
            for k, c in enumerate(found)
        ]
    )
