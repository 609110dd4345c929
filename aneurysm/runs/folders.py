"""Run folders: where the work of a stage lies, and how it is begun, finished or skipped there.

The folder is `outputs/<experiment>/<stage>/<name>-<hash>/fold_<k>`. The same command therefore always lands
in the same folder, and another configuration in another one.
"""

import json
import logging
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing
from aneurysm.runs.settings import stage_key, variant_name
from aneurysm.sweeps.jobs import command_line, error_line

if TYPE_CHECKING:
    from aneurysm.runs.record import RunLog

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageRun:
    """One fold of one stage."""

    stage: str
    fold: int
    folder: Path
    key: str  # hash of everything that changes the result
    log: "RunLog | None" = field(default=None, compare=False, repr=False)  # open while it is trained

    @property
    def done_file(self) -> Path:
        return self.folder / "done.json"

    def finished(self) -> dict[str, Any] | None:
        """The figures of a finished run, or None."""
        return json.loads(self.done_file.read_text()) if self.done_file.is_file() else None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the run against every other process; wait for one that holds it.

        The operating system lets go of the lock when a process dies, so a killed run blocks nobody.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder.with_name(f".{self.folder.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.info("%s fold %d: another process is at it; waiting", self.stage, self.fold)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def begin(self, record: dict[str, Any], force: bool = False) -> None:
        """Make the folder and note what will run in it; with `force` an older run is moved aside first.

        Raises:
            UserError: the folder belongs to another configuration or was written by upstream products that
                are not the ones at hand.
        """
        if force and self.folder.exists():
            aside = self.folder.with_name(f"{self.folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
            shutil.move(self.folder, aside)
            log.info("%s fold %d: starting over, the old run is kept in %s", self.stage, self.fold, aside)
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "run.json"
        if note.is_file():
            before = json.loads(note.read_text())
            if before["upstream"] != record["upstream"] or before["key"] != self.key:
                raise UserError(
                    f"{self.folder} was begun as run {before['key']} on upstream {before['upstream']}, "
                    f"but this is run {self.key} on {record['upstream']}. Move that folder away or use "
                    "force=true."
                )
            return
        with replacing(note) as part:
            part.write_text(json.dumps({"key": self.key, **record}, indent=2))

    def finish(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Mark the run as finished; from now on the same command skips it."""
        with replacing(self.done_file) as part:
            part.write_text(json.dumps(figures, indent=2))
        # Nothing goes on from it any more; last.ckpt stays for who wants to.
        (self.folder / "previous.ckpt").unlink(missing_ok=True)
        for past in ("failed.json", "progress.json"):
            (self.folder / past).unlink(missing_ok=True)
        return figures

    def fail(self, error: Exception, cfg: DictConfig) -> None:
        """Keep what went wrong: the error, its traceback, the resolved configuration and how to try again."""
        before = self.failure()
        content = {
            "error": error_line(error),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "attempt": 1 + (int(before["attempt"]) if before else 0),
            "command": command_line(),
            "traceback": "".join(traceback.format_exception(error)),
            "config": OmegaConf.to_container(cfg, resolve=True),
        }
        with replacing(self.folder / "failed.json") as part:
            part.write_text(json.dumps(content, indent=1, default=str))

    def failure(self) -> dict[str, Any] | None:
        """What `fail` kept of the last attempt, or None when it did not fail."""
        note = self.folder / "failed.json"
        return json.loads(note.read_text()) if note.is_file() else None

    def read_product(self, name: str) -> Path:
        """Path of a file that this run handed on.

        Raises:
            UserError: the run is not finished or the file is gone.
        """
        path = self.folder / name
        if self.finished() is None or not path.exists():
            raise UserError(
                f"{self.stage} fold {self.fold} (run {self.key}) has no {name} in {self.folder}. "
                f"Run stage={self.stage} first."
            )
        return path


def stage_run(cfg: DictConfig, stage: str, fold: int, data_fingerprint: str) -> StageRun:
    """Where fold `fold` of `stage` lives under this configuration."""
    key = stage_key(cfg, stage, data_fingerprint)
    folder = Path(cfg.paths.outputs) / cfg.experiment_name / stage / f"{variant_name(cfg, stage)}-{key}"
    return StageRun(stage, fold, folder / f"fold_{fold}", key)
