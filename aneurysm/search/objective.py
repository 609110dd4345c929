"""What a trial is: one training through its run folders, so that a repeated one is skipped or resumed."""

import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from typing import Any, Literal

import hydra
import numpy as np
import optuna
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aneurysm.command_line import config_folder, override_problem, recipe_sweep
from aneurysm.data.errors import UserError
from aneurysm.experiment import open_experiment
from aneurysm.runs.settings import stage_key
from aneurysm.search.space import Choice, Parameter, parse_space
from aneurysm.train import SCORE, run_all, train

RSNA_SCORE = "RSNA 2025 score"
_MINIMISED = frozenset({"val/loss"})


def compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration of `python train.py` with these overrides."""
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", overrides=list(overrides))


def score_of(stage: str) -> tuple[str, Literal["minimize", "maximize"]]:
    """Name of a stage's score, and whether to minimize or maximize it."""
    name = SCORE.get(stage, RSNA_SCORE)
    return name, "minimize" if name in _MINIMISED else "maximize"


def command(overrides: Sequence[str]) -> str:
    """What to type to run a trial again; it finds the run finished and prints its figures."""
    return shlex.join(["python", "train.py", *overrides])


class Search:
    """Overrides of all trials, parameters, and the training of one trial.

    Args:
        arguments: overrides, those of the parameters with sweeps as values; a recipe chosen by
            `experiment=` adds its own.
        prune: give a trial up between two folds when it does worse than the median.

    Raises:
        UserError: the overrides do not compose, or the score does not depend on a parameter.
    """

    def __init__(self, arguments: Sequence[str], prune: bool = False) -> None:
        fixed, _ = parse_space(arguments)
        try:
            recipe = recipe_sweep("train", fixed)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(override_problem("train", ["-m", *fixed]) or str(error)) from error
        # Of a key the last counts: the command line wins over the recipe.
        self.fixed, self.space = parse_space([*recipe, *arguments])
        if not self.space:
            raise UserError(
                "nothing to search: give a parameter several values, as oscillator_dim=choice(2,4,8) or "
                "'expert.lr=tag(log,interval(1e-4,1e-2))'."
            )
        first = [p.ends[0] for p in self.space]
        if problem := override_problem("train", [*self.fixed, *first]):
            raise UserError(problem)
        self.cfg = compose([*self.fixed, *first])
        self.stage = str(self.cfg.stage)
        self.folds = list(range(int(self.cfg.folds))) if self.cfg.fold is None else [int(self.cfg.fold)]
        self.prune = prune
        self._check_settings()
        self._check_parameters(first)

    def _check_parameters(self, first: list[str]) -> None:
        key = self._key(self.cfg)
        for i, parameter in enumerate(self.space):
            # Of the options of a group each may be misspelt or lack a key that another parameter varies.
            names = parameter.values if isinstance(parameter, Choice) else ()
            last = parameter.ends[1]
            other = self.cfg
            for value in dict.fromkeys((*(f"{parameter.key}={name}" for name in names), last)):
                given = [*self.fixed, *first[:i], value, *first[i + 1 :]]
                try:
                    other = compose(given)
                except (HydraException, OmegaConfBaseException) as error:
                    raise UserError(override_problem("train", given) or str(error)) from error
            if parameter.ends[0] != parameter.ends[1] and self._key(other) == key:
                raise UserError(
                    f"stage={self.stage} does not read {parameter.key}: all its values would be one run."
                )

    def _check_settings(self) -> None:
        if self.cfg.force:
            raise UserError("force=true would train the best trial again whenever it is looked at.")
        if self.cfg.trainer.devices != 1:
            raise UserError(
                f"trainer.devices={self.cfg.trainer.devices}: a worker of a search trains on one device. "
                "Start one worker per device instead, with CUDA_VISIBLE_DEVICES=0, 1, ..."
            )
        if self.prune and (self.stage == "all" or len(self.folds) < 2):
            raise UserError("--prune compares trials between two folds: give one stage and no fold.")

    def _key(self, cfg: DictConfig) -> str:
        return stage_key(cfg, "stacker" if self.stage == "all" else self.stage, "")

    def identity(self) -> dict[str, Any]:
        """What makes trials comparable: the score, the parameters and every setting that changes a result."""
        plain: Any = OmegaConf.to_container(self.cfg.data, resolve=True)
        data = {k: v for k, v in plain.items() if k not in ("root", "meshes", "jobs")}
        settings = [self._key(self.cfg), data, self.folds, self.cfg.experiment_name]
        return {
            "score": f"{score_of(self.stage)[0]} of stage={self.stage}",
            "parameters": sorted(str(p) for p in self.space),
            "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8],
        }

    def name(self) -> str:
        """Of the study, unless it is given one: the same search has the same name."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.stage}-{digest}"

    def overrides(self, parameters: Sequence[str]) -> list[str]:
        """All overrides of a trial."""
        return [*self.fixed, *parameters]

    def __call__(self, trial: optuna.Trial, parameters: Sequence[str]) -> float:
        """Train a trial and return its score, the mean over folds."""
        cfg = compose(self.overrides(parameters))
        if self.stage == "all":
            return run_all(open_experiment(cfg)).rsna.score
        if not self.prune:
            return train(cfg)
        scores: list[float] = []
        for step, fold in enumerate(self.folds):
            cfg.fold = fold
            scores.append(train(cfg))
            known = [s for s in scores if not math.isnan(s)]
            if known and step + 1 < len(self.folds):
                trial.report(float(np.mean(known)), step)
                if trial.should_prune():
                    raise optuna.TrialPruned
        known = [s for s in scores if not math.isnan(s)]
        return float(np.mean(known)) if known else math.nan


def parameters_of(space: Sequence[Parameter], params: dict[str, Any]) -> list[str]:
    """The overrides of a trial from the values that the study keeps."""
    return [f"{p.key}={params[p.key] if isinstance(p, Choice) else repr(params[p.key])}" for p in space]
