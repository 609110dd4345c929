"""Run folders: where the work of a stage lies, and how it is begun, finished or skipped there.

The folder is `outputs/<experiment>/<stage>/<name>-<hash>/fold_<k>`. The same command therefore always lands
in the same folder, and another configuration in another one.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing
from aneurysm.runs.settings import stage_key, variant_name

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

    @property
    def checkpoint(self) -> Path:
        return self.folder / "last.ckpt"

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
        return figures

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
