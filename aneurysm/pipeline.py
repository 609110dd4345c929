"""One scan through all five stages, and the bundle that holds what this needs.

A bundle is a folder: `bundle.json` (format, versions, settings, lumen rules), one safetensors file per
network and fold, and the stacker's trees as `.ubj`. Nothing in it is pickled, and the configuration inside
can only build classes of this package.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import aneurysm
from aneurysm.build import (
    boosting,
    build,
    build_expert,
    build_graph_net,
    build_segmenter,
    build_vessel,
    graph_settings,
    roi_settings,
    segmenter_channels,
    view_settings,
)
from aneurysm.data.errors import UserError
from aneurysm.data.preparation.prepare import Preparation, prepare_scan
from aneurysm.data.preparation.prepared import PreparedCase
from aneurysm.data.scan import Scan
from aneurysm.data.tables import EXPERT
from aneurysm.stages import expert as expert_stage
from aneurysm.stages import smart_net, stacker, vessel
from aneurysm.stages.coarse import coarse_net
from aneurysm.stages.findings import CropSettings, list_findings, with_foreign_flow
from aneurysm.stages.roi import WHOLE, Roi, find_roi
from aneurysm.stages.volumes import mean_volume
from aneurysm.vessels.fusion import Fusion
from aneurysm.vessels.graph import VesselGraph
from aneurysm.vessels.lumen_rule import LumenRule, LumenRules
from aneurysm.vessels.repair import Repaired

log = logging.getLogger(__name__)

FORMAT = 5  # raised when a bundle of the previous format can no longer be read


@dataclass(frozen=True, eq=False)
class Detection:
    """What the detector says about one scan."""

    scan: Scan
    case: PreparedCase
    probability: dict[str, np.ndarray]  # lumen, sac, perhaps a heat map, on the prepared grid, (d, h, w)
    mended: Repaired  # the lumen mask that became the graph, and what was mended in it
    graph: VesselGraph
    node_scores: np.ndarray  # (n,)
    candidates: pd.DataFrame  # tables.EXPERT, one row per candidate, best first; folds averaged
    sac: np.ndarray  # (d, h, w) expert's sac probability around the candidates
    labels: np.ndarray  # (14,) probabilities in submission order
    roi: Roi  # where the segmentation networks looked
    arteries: np.ndarray | None = None  # (d, h, w) uint8 vessel labels, from a vessel net that names arteries


class Detector:
    """Runs every fold's models on a scan and joins what they say."""

    def __init__(self, folder: Path, cfg: DictConfig, note: dict[str, Any], device: str = "cpu") -> None:
        self.cfg, self.note, self.device = cfg, note, torch.device(device)
        self.preparation: Preparation = build(cfg.prepare)
        folds = range(int(note["folds"]))
        self.lumen_rules = LumenRules.mean([LumenRules.from_figures(rule) for rule in note["lumen_rules"]])
        self.vessel = [self._net(folder, "vessel", k, build_vessel(cfg)) for k in folds]
        self.names_arteries = vessel.names_arteries(cfg.vessel.classes)
        self.roi = roi_settings(cfg.vessel)
        self.coarse = [
            self._net(folder, "roi", k, coarse_net())
            for k in folds
            if (folder / weights_name("roi", k)).is_file()
        ]
        self.segmenter = [self._net(folder, "segmenter", k, build_segmenter(cfg)) for k in folds]
        sizes = note["sizes"]
        self.graph_net = [
            net and self._net(folder, "smart_net", k, net, device="cpu")
            for k in folds
            for net in [build_graph_net(cfg, sizes["nodes"], sizes["edges"])]
        ]
        self.fusion = Fusion.mean([Fusion.from_figures(f) for f in note["fusions"]])
        self.expert = [self._net(folder, "expert", k, build_expert(cfg, sizes["candidate"])) for k in folds]
        self.trees = stacker.StackerModule(boosting(cfg))
        for name in ("present", "location"):
            path = folder / f"stacker_{name}.ubj"
            if note["trees"][name]:
                setattr(self.trees, name, stacker.load_booster(path.read_bytes()))

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "Detector":
        """Open a bundle.

        Raises:
            UserError: no bundle there, one of another format, or a damaged one.
        """
        path = folder / "bundle.json"
        if not path.is_file():
            near = (
                sorted(str(p.parent) for p in folder.parent.glob("*/bundle.json"))
                if folder.parent.is_dir()
                else []
            )
            hint = f" Bundles nearby: {', '.join(near)}." if near else " Train one with `python train.py`."
            raise UserError(f"There is no bundle in {folder} (bundle.json is missing).{hint}")
        try:
            note = json.loads(path.read_text())
            written = int(note["format"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged and cannot be read as JSON: copy the bundle again."
            ) from error
        if written != FORMAT:
            raise UserError(
                f"The bundle {folder} was written by aneurysm {note.get('version', '?')} in bundle "
                f"format {written}; this is aneurysm {aneurysm.__version__}, which reads format {FORMAT}. "
                "Install the matching version or train the bundle again."
            )
        _only_own_classes(note["settings"], folder)
        try:
            return cls(folder, DictConfig(note["settings"]), note, device)
        except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(
                f"The bundle {folder} is incomplete or damaged ({str(error).splitlines()[0][:160]}): "
                "copy it again."
            ) from error

    def _net(
        self, folder: Path, stage: str, fold: int, net: nn.Module, device: str | None = None
    ) -> nn.Module:
        net.load_state_dict(load_file(folder / weights_name(stage, fold)), strict=False)
        return net.to(device or self.device).eval()

    def __call__(self, scan: Scan) -> Detection:
        """All five stages in memory on one scan."""
        case = prepare_scan(scan, self.preparation)
        s = self.cfg.smart_net
        look, look_again = view_settings(self.cfg.vessel), view_settings(s)
        roi = WHOLE if self.roi is None else find_roi(self.coarse, case, self.roi)
        lumen, arteries = vessel.vessels_and_names(self.vessel, case, look, self.names_arteries, roi.region)
        names = segmenter_channels(self.cfg)
        parts = [smart_net.segment(net, case, lumen, look_again, names, roi.region) for net in self.segmenter]
        probability = {name: mean_volume([p[name] for p in parts]) for name in names}
        settings, rule = graph_settings(s), self.lumen_rules.of(case.modality)
        mended = smart_net.graph_mask(probability, rule, case.grid, settings)
        graph = smart_net.mask_graph(mended.voxels, probability, case.grid, settings)
        scores = _mean([smart_net.node_scores(net, graph) for net in self.graph_net])
        peaks = smart_net.scan_peaks(probability, case.grid, settings)
        found = smart_net.candidates(graph, scores, peaks, case.grid, settings, self.fusion, arteries)
        rows = smart_net.candidate_rows(scan.series_uid, found, fold=-1)
        candidates, sac = self._judge(case, probability, rule, graph, rows)
        table = stacker.scan_rows(candidates, {scan.series_uid: scan.modality})
        labels = self.trees.probabilities(table)[0]
        return Detection(
            scan,
            case,
            probability,
            mended,
            graph,
            scores,
            candidates,
            sac,
            labels,
            roi,
            arteries=arteries,
        )

    def _judge(
        self,
        case: PreparedCase,
        probability: dict[str, np.ndarray],
        rule: LumenRule,
        graph: VesselGraph,
        rows: pd.DataFrame,
    ) -> tuple[pd.DataFrame, np.ndarray]:
        sac = np.zeros(case.grid.shape, np.float32)
        if not len(rows):
            return pd.DataFrame(columns=list(EXPERT.columns)), sac
        found = list_findings(case, probability, graph, rows, rule.threshold)
        crop = CropSettings(
            self.cfg.expert.crop,
            flow=build(self.cfg.physics) is not None,
            graph=self.cfg.expert.graph_evidence,
        )
        head: Any = self.expert[0].physics
        if head is not None and head.foreign_flow:
            found = with_foreign_flow(found, int(self.cfg.expert.seed))
        judged = [
            expert_stage.judge(net, found, crop, k, int(self.cfg.seed)) for k, net in enumerate(self.expert)
        ]
        merged = average_folds(pd.concat([table for table, _ in judged]))
        for i, one in enumerate(found):
            patch = _mean([masks[i] for _, masks in judged])
            start = np.round(case.grid.to_index(one.centre_mm)).astype(int) - crop.crop // 2
            _paste_maximum(sac, patch, start)
        return merged, sac


def average_folds(table: pd.DataFrame) -> pd.DataFrame:
    """One row per candidate: probabilities averaged as log odds, everything else as numbers; best first."""
    table = table.copy()
    clipped = table.p.astype(float).clip(1e-5, 1 - 1e-5)
    table["p"] = np.log(clipped / (1 - clipped))
    merged: Any = table.groupby(["series_uid", "candidate"], as_index=False).mean(numeric_only=True)
    merged["p"] = 1 / (1 + np.exp(-merged.p))
    merged["fold"] = -1
    return merged.sort_values("p", ascending=False, ignore_index=True)


def weights_name(stage: str, fold: int) -> str:
    """File of one network in a bundle."""
    return f"{stage}_fold{fold}.safetensors"


def _only_own_classes(settings: Any, folder: Path) -> None:
    """A configuration can name any callable; one from a file must not."""
    if isinstance(settings, dict):
        target = settings.get("_target_", "aneurysm.")
        if not str(target).startswith("aneurysm."):
            raise UserError(
                f"The bundle {folder} asks for {target!r}; only classes of aneurysm are built from bundles."
            )
        for value in settings.values():
            _only_own_classes(value, folder)


def _mean(arrays: list[np.ndarray]) -> np.ndarray:
    return np.asarray(np.mean(arrays, axis=0, dtype=np.float32))


def _paste_maximum(volume: np.ndarray, patch: np.ndarray, start: np.ndarray) -> None:
    low = np.maximum(start, 0)
    high = np.minimum(start + patch.shape, volume.shape)
    if (high <= low).any():
        return
    there = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    here = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
    volume[there] = np.maximum(volume[there], patch[here])
