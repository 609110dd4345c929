"""Training of stage 1, pretrain."""

from typing import Any

from aneurysm.build import build
from aneurysm.data.errors import UserError
from aneurysm.experiment import Experiment
from aneurysm.nets.reconstruction import MaskedReconstruction
from aneurysm.runs.fit import fit, seed_weights
from aneurysm.runs.folders import StageRun
from aneurysm.runs.record import illustrate
from aneurysm.stages import pretrain
from aneurysm.training.pictures import pretrain_pictures
from aneurysm.training.products import WEIGHTS, save_weights


def train_pretrain(experiment: Experiment, run: StageRun) -> dict[str, Any]:
    """Masked reconstruction on the training patients; leaves backbone weights."""
    cfg, s = experiment.cfg, experiment.cfg.pretrain
    seed_weights(cfg.seed, run)
    masking = build(cfg.masking)
    if masking is None:
        raise UserError("masking=none turns pretraining off, so there is nothing to train in stage=pretrain.")
    net = MaskedReconstruction(build(cfg.backbone), s.decoder_width, mode=s.mode, block=masking.block)
    module = pretrain.PretrainModule(
        net, masking, s.lr, s.weight_decay, total_steps=s.epochs * s.steps, seed=cfg.seed
    )
    data = pretrain.PretrainData(
        experiment.paths(experiment.training(run.fold)),
        experiment.paths(experiment.held_out(run.fold)),
        patch=s.patch,
        batch=s.batch,
        steps=s.steps,
        seed=cfg.seed,
        workers=cfg.trainer.workers,
    )
    fit(run, module, data, s.epochs, cfg)
    save_weights(run.folder / WEIGHTS, net.backbone)
    illustrate(run, lambda log: pretrain_pictures(log, module, data, float(cfg.prepare.spacing_mm)))
    return {"val/loss": pretrain.held_out_loss(module, data)}
