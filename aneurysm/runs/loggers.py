"""Loggers beside the local file: TensorBoard and W&B, each imported only when asked for."""

import contextlib
import importlib.util
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing
from aneurysm.runs.folders import StageRun
from aneurysm.runs.settings import READS

log = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]
MODES: dict[str, Mode] = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    "run": "online",
    "dryrun": "offline",
}
STEP = "trainer/global_step"


class TensorBoardMetrics(Logger):
    """TensorBoard events of one fit; a resumed one overrules what a killed attempt wrote beyond its step.

    Lightning's own logger opens its file before the step to go on from is known, so it cannot overrule.
    """

    def __init__(self, folder: Path, fit: str) -> None:
        super().__init__()
        self.folder, self.fit = folder, fit
        self._writer: Any = None

    @property
    def name(self) -> str:
        return "tensorboard"

    @property
    def version(self) -> str:
        return self.fit

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The settings are in run.json."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard" / self.fit), purge_step=step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def save(self) -> None:
        """Events reach the disk."""
        if self._writer is not None:
            self._writer.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def require_tensorboard() -> None:
    """Raise UserError when the package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "logger=tensorboard needs the package tensorboard, which is not installed: "
            "pip install 'aneurysm[tensorboard]'."
        )


class WandbMetrics(Logger):
    """Metrics of one fit in an open W&B run, with epoch and optimiser step beside them as axes."""

    def __init__(self, wandb_run: Any, fit: str) -> None:
        super().__init__()
        self.wandb_run, self.fit = wandb_run, fit
        self.prefix = "" if fit == "last" else f"{fit}/"

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return self.wandb_run.id

    @property
    def experiment(self) -> Any:
        """The W&B run, for callbacks that know it."""
        return self.wandb_run

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The settings went into the run's config when it was opened."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        named = {k if k == "epoch" else f"{self.prefix}{k}": v for k, v in metrics.items()}
        self.wandb_run.log(named if step is None else {**named, STEP: step})


def open_wandb(run: StageRun, cfg: DictConfig) -> Any:
    """The W&B run of one fold of a stage: group is the variant without its fold, job type the stage.

    Nothing is asked for and nothing is waited for: without a network the run is recorded offline. The run's
    id is kept in the folder, so that a resumed run continues it.

    Raises:
        UserError: the mode is unknown, or it is `online` and there is no API key.
    """
    s = cfg.logger.wandb
    mode: Any = _mode(s)
    # Error reports of the client would leave the hospital, and wait for a network that may not be there.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    if mode == "online" and not _logged_in():
        raise UserError(
            "logger.wandb.mode=online, but there is no W&B API key on this machine: run `wandb login` once, "
            "set WANDB_API_KEY, or stay offline (logger.wandb.mode=offline) and upload later."
        )
    settings = {
        "console": "off",
        "silent": True,
        "symlink": False,  # folders get copied to other machines
        "disable_git": not s.metadata,
        "disable_code": True,
        "x_disable_meta": not s.metadata,
        "x_disable_machine_info": not s.metadata,
        "x_save_requirements": bool(s.metadata),
        "x_disable_stats": not s.system,
        "init_timeout": float(s.timeout_s),
        "finish_timeout": float(s.timeout_s),
    }
    chosen: dict[str, Any] = {
        "project": s.project,
        "entity": s.entity,
        "dir": str(run.folder),
        "id": wandb_id(run),
        "name": f"fold_{run.fold}",
        "group": f"{cfg.experiment_name}/{run.stage}/{run.folder.parent.name}",
        "job_type": run.stage,
        "tags": tags(cfg, run.stage),
        "config": wandb_config(run, cfg),
        "resume": "allow",
        # The jobs of a sweep share a process: no run may become the one that the next job logs into.
        "reinit": "create_new",
    }
    try:
        opened = wandb.init(**chosen, mode=mode, settings=wandb.Settings(**settings))
    except wandb.Error as error:
        if mode != "online":
            raise
        log.warning("W&B cannot be reached (%s); this run is recorded offline.", str(error).splitlines()[0])
        wandb.teardown()  # its service holds on to the id of a run that it could not open
        opened = wandb.init(**chosen, mode="offline", settings=wandb.Settings(**settings))
    for axis in ("epoch", STEP):
        opened.define_metric(axis)
    # Without an axis of its own a resumed run would start a second curve at step 0.
    opened.define_metric("*", step_metric="epoch", step_sync=True)
    return opened


def _mode(s: Any) -> Mode:
    """WANDB_MODE wins over the configuration."""
    asked = os.environ.get("WANDB_MODE") or str(s.mode)
    if asked not in MODES:
        where = "WANDB_MODE" if os.environ.get("WANDB_MODE") else "logger.wandb.mode"
        raise UserError(f"{where}={asked} is not a mode of W&B: offline, online or disabled.")
    return MODES[asked]


def _logged_in() -> bool:
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return bool(wandb.login(prompt=False, verify=False))  # whether the key is good shows when it is used


def wandb_id(run: StageRun) -> str:
    """The id of the run's record at W&B: drawn once per folder, the same after every resume."""
    file = run.folder / "wandb_id.txt"
    if not file.is_file():
        with replacing(file) as part:
            part.write_text(f"{run.stage}-{run.key}-fold{run.fold}-{secrets.token_hex(3)}")
    return file.read_text().strip()


def wandb_config(run: StageRun, cfg: DictConfig) -> dict[str, Any]:
    """What the stage reads, and what the run noted about itself when it began."""
    note = json.loads((run.folder / "run.json").read_text())
    return {
        **note["settings"],
        "experiment": cfg.experiment_name,
        "stage": run.stage,
        "fold": run.fold,
        "oscillator_dim": cfg.oscillator_dim,
        **{name: note[name] for name in ("key", "data", "upstream", "versions") if name in note},
    }


def tags(cfg: DictConfig, stage: str) -> list[str]:
    """Experiment, stage, every option that the stage reads as `group=option`, and the user's own."""
    options = [(g, cfg[g]) for g in READS[stage] if "_target_" in cfg[g]]
    named = [f"{group}={option_name(node._target_)}" for group, node in options]
    found = [str(cfg.experiment_name), stage, *named, *(str(t) for t in cfg.logger.wandb.tags)]
    return [tag[:64] for tag in dict.fromkeys(found)]  # longer tags are refused


def option_name(target: str) -> str:
    """A class as a word for people: aneurysm.losses.tversky.FocalTverskyLoss -> focal_tversky."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", target.rsplit(".", 1)[-1])
    words = [w for w in name.lower().split("_") if w not in ("loss", "fusion", "block", "encoder", "head")]
    return "_".join(words).replace("absent", "none")


@contextlib.contextmanager
def staging_in(folder: Path) -> Any:
    """Let W&B stage the files of a table in the run's folder, not in the user's home."""
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = before or str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
