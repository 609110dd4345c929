"""What the stages leave in their run folders, read back."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import nn

from aneurysm.build import graph_settings
from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing
from aneurysm.data.preparation.prepared import SUFFIX
from aneurysm.data.tables import CANDIDATES, EXPERT
from aneurysm.experiment import Experiment
from aneurysm.runs.folders import StageRun
from aneurysm.stages import smart_net
from aneurysm.stages.findings import Finding, list_findings
from aneurysm.stages.processes import rank
from aneurysm.stages.stored import (
    case_at,
    fit_in_memory,
    opened,
    probabilities_at,
    read_labels,
    read_probabilities,
)
from aneurysm.vessels.fusion import Fusion
from aneurysm.vessels.graph import VesselGraph
from aneurysm.vessels.lumen_rule import LumenRule, LumenRules
from aneurysm.vessels.peaks import Peaks

WEIGHTS = "weights.safetensors"


def product_path(run: StageRun, uid: str) -> Path:
    """Where a run keeps the volumes of a scan."""
    return run.folder / "products" / f"{uid}{SUFFIX}"


def artery_path(run: StageRun, uid: str) -> Path:
    """Where a vessel run that names arteries keeps their labels."""
    return run.folder / "products" / "arteries" / f"{uid}{SUFFIX}"


def arteries_of(experiment: Experiment, uid: str) -> np.ndarray | None:
    """Out-of-fold vessel labels of a scan, (d, h, w) uint8; None where arteries have no names."""
    path = artery_path(experiment.run("vessel", experiment.fold_of[uid]), uid)
    return read_labels(path) if path.is_file() else None


def segmentation_of(experiment: Experiment, uid: str) -> dict[str, np.ndarray]:
    """Out-of-fold lumen and sac probabilities of a scan."""
    return read_probabilities(product_path(experiment.run("segmenter", experiment.fold_of[uid]), uid))


def lumen_rules(experiment: Experiment, fold: int) -> LumenRules:
    """What is lumen for the graph: as set, or as chosen with the segmenter of a fold."""
    if (threshold := experiment.cfg.smart_net.threshold) is not None:
        return LumenRules(LumenRule(float(threshold), float(threshold)))
    done = experiment.run("segmenter", fold).finished()
    if done is None:
        raise UserError(f"The segmenter of fold {fold} is not finished. Run stage=segmenter.")
    return LumenRules.from_figures(done)


def lumen_rule(experiment: Experiment, uid: str) -> LumenRule:
    """What is lumen in this scan, by the segmenter that had not seen it."""
    modality = opened(experiment.prepared[uid]).modality
    return lumen_rules(experiment, experiment.fold_of[uid]).of(modality)


def expert_findings(experiment: Experiment, uids: list[str], add_annotations: bool = False) -> list[Finding]:
    """Candidates of these scans, each from the models that had not seen it."""
    settings = graph_settings(experiment.cfg.smart_net)
    tables = {
        fold: CANDIDATES.read(experiment.run("smart_net", fold).read_product("candidates.parquet"))
        for fold in {experiment.fold_of[uid] for uid in uids}
    }
    whole = fit_in_memory(experiment.paths(uids), 2, int(experiment.cfg.trainer.workers))
    found: list[Finding] = []
    for uid in uids:
        segmented = product_path(experiment.run("segmenter", experiment.fold_of[uid]), uid)
        rows = tables[experiment.fold_of[uid]]
        found += list_findings(
            case_at(experiment.prepared[uid], whole),
            probabilities_at(segmented, whole),
            graph_item(experiment, uid, settings).graph,
            pd.DataFrame(rows[rows.series_uid == uid]),
            lumen_rule(experiment, uid).threshold,
            hit_mm=experiment.cfg.expert.hit_mm,
            add_annotations=add_annotations,
        )
    return found


def expert_table(experiment: Experiment) -> pd.DataFrame:
    """Out-of-fold expert predictions of every fold."""
    tables = [
        EXPERT.read(experiment.run("expert", k).read_product("predictions.parquet")) for k in experiment.folds
    ]
    return pd.concat([t for t in tables if len(t)] or tables[:1])


def save_weights(path: Path, net: nn.Module) -> None:
    """Weights as safetensors, atomically; extra state that is not a tensor stays in the checkpoint.

    Of several processes the first one writes; all hold the same weights.
    """
    if rank() > 0:
        return
    state = {
        k: v.detach().cpu().contiguous() for k, v in net.state_dict().items() if isinstance(v, torch.Tensor)
    }
    with replacing(path) as part:
        save_file(state, part)


def _graph_path(experiment: Experiment, uid: str) -> Path:
    return experiment.run("smart_net", 0).folder.parent / "graphs" / f"{uid}.safetensors"


def _repairs_path(graph: Path) -> Path:
    return graph.with_suffix(".repairs.json")


def repairs_of(experiment: Experiment, uids: list[str]) -> pd.DataFrame:
    """What was mended in the masks of these scans before they became graphs, one row each."""
    rows = [json.loads(_repairs_path(_graph_path(experiment, uid)).read_text()) for uid in uids]
    modality = [opened(experiment.prepared[uid]).modality for uid in uids]
    table = pd.DataFrame(rows)
    table.insert(0, "modality", modality)
    table.insert(0, "series_uid", uids)
    return table


def graph_item(experiment: Experiment, uid: str, settings: smart_net.GraphSettings) -> smart_net.GraphItem:
    """A scan's graph and the peaks of its heat map, made on first use and kept beside the stage's folds."""
    case = opened(experiment.prepared[uid])
    path = _graph_path(experiment, uid)
    peaks = path.with_suffix(".peaks.safetensors")
    if not path.is_file():
        rule = lumen_rule(experiment, uid)
        probability = segmentation_of(experiment, uid)
        mended = smart_net.graph_mask(probability, rule, case.grid, settings)
        graph = smart_net.mask_graph(mended.voxels, probability, case.grid, settings)
        with replacing(_repairs_path(path)) as part:
            part.write_text(json.dumps(mended.row()))
        with replacing(path) as part:  # the last: it says that both are there
            graph.save(part)
    if not peaks.is_file():
        smart_net.scan_peaks(segmentation_of(experiment, uid), case.grid, settings).save(peaks)
    return smart_net.GraphItem(
        uid, VesselGraph.load(path), case.grid, case.lesions, case.present, Peaks.load(peaks)
    )


def fusion_of(experiment: Experiment, fold: int) -> Fusion | None:
    """The common scale of node scores and heat-map peaks that a fold of the Smart Net has fitted."""
    return Fusion.from_figures(experiment.run("smart_net", fold).finished() or {})
