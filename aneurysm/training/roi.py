"""Training the coarse net of the vessel stage, and the regions of interest it leaves for later stages."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from aneurysm.build import roi_settings
from aneurysm.data.files import replacing
from aneurysm.experiment import Experiment
from aneurysm.runs.folders import StageRun
from aneurysm.stages.coarse import coarse_net, train_coarse
from aneurysm.stages.processes import from_first, rank
from aneurysm.stages.roi import WHOLE, Roi, RoiSettings, coarse_image, coarse_target, is_large
from aneurysm.stages.stored import opened
from aneurysm.training.products import save_weights

log = logging.getLogger(__name__)

ROI_WEIGHTS = "roi.safetensors"
ROIS = "rois.json"


def train_roi(experiment: Experiment, run: StageRun, annotated: Sequence[Path]) -> list[nn.Module]:
    """The coarse net of a fold, or none where regions are off or no annotated scan is larger than one.

    Args:
        annotated: prepared training scans whose vessels are known.
    """
    cfg = experiment.cfg
    settings = roi_settings(cfg.vessel)
    large = [p for p in annotated if settings is not None and is_large(opened(p).grid, settings)]
    if settings is None or not large:
        (run.folder / ROI_WEIGHTS).unlink(missing_ok=True)
        return []
    log.info("vessel fold %d: the coarse net learns on %d whole scans", run.fold, len(large))
    seed = int(cfg.seed) * 1000 + run.fold
    net = coarse_net()
    net.load_state_dict(from_first(lambda: _trained(large, settings, int(cfg.vessel.roi.steps), seed)))
    save_weights(run.folder / ROI_WEIGHTS, net)
    return [net]


def _trained(large: Sequence[Path], settings: RoiSettings, steps: int, seed: int) -> dict:
    pairs = []
    for path in large:
        case = opened(path).load()
        image, grid = coarse_image(case, settings)
        pairs.append((image, coarse_target(case, grid)))
    return train_coarse(pairs, steps, seed).state_dict()


def write_rois(run: StageRun, rois: Mapping[str, Roi]) -> None:
    """Leave the regions of the held-out scans; of several processes the first one writes."""
    if rank() == 0:
        with replacing(run.folder / ROIS) as part:
            part.write_text(json.dumps({uid: roi.plain() for uid, roi in rois.items()}, indent=1))


def roi_of(experiment: Experiment, uid: str) -> Roi:
    """Where the vessel net looked that had not seen this scan."""
    path = experiment.run("vessel", experiment.fold_of[uid]).folder / ROIS
    if not path.is_file():
        return WHOLE
    return Roi.from_plain(json.loads(path.read_text())[uid])
