"""A finished experiment, read from its run folders alone: no configuration, no data source, no lock."""

import glob
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import nn

from aneurysm.build import build, build_expert, build_graph_net, graph_settings
from aneurysm.data.errors import UserError
from aneurysm.data.preparation.prepared import SUFFIX
from aneurysm.data.tables import CANDIDATES
from aneurysm.stages.findings import CropSettings
from aneurysm.stages.smart_net import GraphSettings
from aneurysm.stages.stored import opened, opened_probabilities
from aneurysm.training.products import WEIGHTS
from aneurysm.vessels.fusion import Fusion
from aneurysm.vessels.lumen_rule import LumenRule, LumenRules


@dataclass(frozen=True)
class HeldOut:
    """A scan with what the models that had not seen it left."""

    series_uid: str
    fold: int
    case: Path  # prepared
    probability: Path  # of the segmenter: lumen and sac


@dataclass(frozen=True, eq=False)
class Finished:
    """The runs of an experiment from the segmenter to the expert."""

    expert: Path  # run folders, with fold_0, fold_1, ... inside
    smart_net: Path
    segmenter: Path
    cfg: DictConfig  # settings of the expert and the Smart Net
    scans: tuple[HeldOut, ...]

    @property
    def graph_settings(self) -> GraphSettings:
        """How masks become graphs and graphs candidates."""
        return graph_settings(self.cfg.smart_net)

    @property
    def crop(self) -> CropSettings:
        """What the expert sees of a candidate."""
        flow = build(self.cfg.physics) is not None
        return CropSettings(
            int(self.cfg.expert.crop), flow, bool(self.cfg.expert.get("graph_evidence", True))
        )

    def rule(self, fold: int, modality: str) -> LumenRule:
        """Which voxels are lumen in a held-out scan of a fold."""
        if (threshold := self.cfg.smart_net.threshold) is not None:
            return LumenRule(float(threshold), float(threshold))
        done = json.loads((self.segmenter / f"fold_{fold}" / "done.json").read_text())
        return LumenRules.from_figures(done).of(modality)

    def fusion(self, fold: int) -> Fusion | None:
        """The common scale of node scores and heat-map peaks of a fold."""
        done = json.loads((self.smart_net / f"fold_{fold}" / "done.json").read_text())
        return Fusion.from_figures(done)

    def candidates(self) -> pd.DataFrame:
        """Those that the experiment found, `tables.CANDIDATES` of all folds."""
        folds = sorted({scan.fold for scan in self.scans})
        return pd.concat(
            [CANDIDATES.read(self.smart_net / f"fold_{k}" / "candidates.parquet") for k in folds]
        )

    @cache  # noqa: B019  # a handful of nets, for as long as the study runs
    def graph_net(self, fold: int, nodes: int, edges: int) -> nn.Module | None:
        """The graph network of a fold for so many features; None where none was trained."""
        net = build_graph_net(self.cfg, nodes, edges)
        return None if net is None else _loaded(net, self.smart_net / f"fold_{fold}")

    @cache  # noqa: B019
    def expert_net(self, fold: int, graph_features: int) -> nn.Module:
        """The expert of a fold."""
        return _loaded(build_expert(self.cfg, graph_features), self.expert / f"fold_{fold}")


def read_finished(folder: Path, run: str | None = None, prepared: Path | None = None) -> Finished:
    """Find the newest finished expert of an experiment and all that it was trained on.

    Args:
        folder: outputs/<experiment>.
        run: name of an expert's run folder, where there are several.
        prepared: where the prepared scans lie; by default beside the experiment.

    Raises:
        UserError: something is not there; the message says what.
    """
    if not folder.is_dir():
        raise UserError(f"There is no experiment in {folder}: give a folder outputs/<experiment>.")
    expert = _expert(folder, run)
    note = _note(expert)
    smart_net = _upstream(folder, "smart_net", note)
    graph_note = _note(smart_net)
    segmenter = _upstream(folder, "segmenter", graph_note)
    cfg: Any = OmegaConf.create({**graph_note["settings"], **note["settings"]})
    place = prepared or folder.parent / "prepared"
    scans = []
    for fold in range(int(cfg.folds)):
        products = segmenter / f"fold_{fold}" / "products"
        for path in sorted(products.glob(f"*{SUFFIX}")):
            uid = path.name.removesuffix(SUFFIX)
            scans.append(HeldOut(uid, fold, _prepared(place, uid, path), path))
    if not scans:
        raise UserError(f"{segmenter} holds no probability volumes (fold_*/products): they were deleted.")
    return Finished(expert, smart_net, segmenter, cfg, tuple(scans))


def _expert(folder: Path, run: str | None) -> Path:
    finished = []
    for path in sorted((folder / "expert").glob(run or "*")):
        if not (path / "fold_0" / "run.json").is_file():
            continue
        folds = int(_note(path)["settings"]["folds"])
        done = [path / f"fold_{k}" / "done.json" for k in range(folds)]
        if all(file.is_file() for file in done):
            finished.append((max(file.stat().st_mtime for file in done), path))
    if not finished:
        wanted = f" named {run}" if run else ""
        raise UserError(
            f"{folder} has no expert{wanted} that is finished in all folds. Train it: python train.py "
            "stage=expert, with the settings of the experiment and without fold=."
        )
    return max(finished)[1]


def _note(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "fold_0" / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'fold_0' / 'run.json'} cannot be read: {error}.") from error


def _upstream(folder: Path, stage: str, note: dict[str, Any]) -> Path:
    key = note["upstream"].get(stage)
    found = sorted((folder / stage).glob(f"*-{key}"))
    if not found:
        raise UserError(f"{folder / stage} has no run {key}, on which the later stages were trained.")
    for fold in range(int(note["settings"]["folds"])):
        if not (found[0] / f"fold_{fold}" / "done.json").is_file():
            raise UserError(f"{found[0] / f'fold_{fold}'} is not finished. Run stage={stage} again.")
    return found[0]


def _prepared(folder: Path, uid: str, probability: Path) -> Path:
    """The prepared case of a scan; of several preparations the newest with the shape of the volume."""
    shape = opened_probabilities(probability).file.frames["vessel"].shape
    found = [Path(p) for p in glob.glob(f"{glob.escape(str(folder / uid))}-*{SUFFIX}")]
    fitting = [path for path in found if tuple(opened(path).grid.shape) == tuple(shape)]
    if not fitting:
        raise UserError(
            f"{uid}: no prepared scan of shape {tuple(shape)} in {folder}. Say where the prepared scans lie "
            "with --prepared, or run train.py with the settings of the experiment: it prepares them again."
        )
    return max(fitting, key=lambda path: path.stat().st_mtime)


def _loaded(net: nn.Module, run: Path) -> nn.Module:
    path = run / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path} is missing: the run was deleted in part.")
    net.load_state_dict(load_file(path), strict=False)
    return net.eval()
