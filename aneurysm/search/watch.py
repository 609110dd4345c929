"""Who works on which trial, so that the trial of a worker that died is handed to another one.

Beside a journal file every trial is a locked file: the operating system lets go of the lock when a process
dies, however it dies. In a database, whose workers may share no folder, every trial has a heartbeat.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

import optuna
from filelock import FileLock, Timeout
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

log = logging.getLogger(__name__)

ATTEMPTS = 10  # a trial whose workers vanished this often is not tried again
HELD = "held"  # set once the first heartbeat is written


class Watch(Protocol):
    """Tells living trials from dead ones."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the study alone: trials are taken, judged and handed back only within."""
        ...

    def hold(self, trial: optuna.Trial) -> None:
        """This worker runs the trial from now on."""
        ...

    def release(self) -> None:
        """It no longer does."""
        ...

    def dead(self, study: optuna.Study) -> list[FrozenTrial]:
        """Running trials whose worker is gone."""
        ...


def hand_back(study: optuna.Study, trial: FrozenTrial, lost: bool) -> None:
    """Fail a trial that nobody runs any more and queue its parameters for the next worker.

    Args:
        lost: its worker vanished, which may be the trial's fault; else it was asked to stop.
    """
    study.tell(trial.number, state=TrialState.FAIL)
    why = "lost its worker" if lost else "was interrupted"
    attempt = int(trial.user_attrs.get("attempt", 0)) + int(lost)
    if not trial.params:  # it had hardly been taken
        return
    if attempt < ATTEMPTS:
        first = trial.user_attrs.get("again", trial.number)
        study.enqueue_trial(trial.params, user_attrs={"again": first, "attempt": attempt})
        log.info("Trial %d %s; its parameters are queued again.", trial.number, why)
    else:
        log.warning("Trial %d %s, the %d. to do so; it is given up.", trial.number, why, attempt)


class LockWatch:
    """Locked files beside a journal.

    Args:
        folder: shared by all workers of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._turn = FileLock(folder / "turn.lock")
        self._held: FileLock | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._turn:
            yield

    def _lock(self, number: int) -> FileLock:
        return FileLock(self.folder / f"trial-{number}.lock")

    def hold(self, trial: optuna.Trial) -> None:
        self._held = self._lock(trial.number)
        self._held.acquire(blocking=False)

    def release(self) -> None:
        if self._held is not None:
            self._held.release()
            Path(self._held.lock_file).unlink(missing_ok=True)
            self._held = None

    def dead(self, study: optuna.Study) -> list[FrozenTrial]:
        return [t for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if self._free(t)]

    def _free(self, trial: FrozenTrial) -> bool:
        lock = self._lock(trial.number)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)
        return True


class HeartbeatWatch:
    """Heartbeats in a database; a turn is held among the workers of one file system.

    Workers that share none may between them finish a trial more than was asked for.

    Args:
        storage: with a heartbeat interval.
        turn: lock file.
    """

    def __init__(self, storage: RDBStorage, turn: Path) -> None:
        self.storage = storage
        turn.parent.mkdir(parents=True, exist_ok=True)
        self._turn = FileLock(turn)
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._turn:
            yield

    def hold(self, trial: optuna.Trial) -> None:
        number = trial._trial_id  # the storage knows trials by this name alone
        self.storage.record_heartbeat(number)
        trial.set_user_attr(HELD, True)
        stop = self._stop = threading.Event()

        def beat() -> None:
            while not stop.wait(float(self.storage.heartbeat_interval or 60)):
                try:
                    self.storage.record_heartbeat(number)
                except (
                    Exception
                ) as error:  # a database that is away for a while is no reason to stop training
                    log.warning("The study's database did not take the heartbeat (%s).", error)

        self._thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        self._thread.start()

    def release(self) -> None:
        if self._stop is not None and self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._stop = self._thread = None

    def dead(self, study: optuna.Study) -> list[FrozenTrial]:
        stale = set(self.storage._get_stale_trial_ids(study._study_id))
        # Killed between being created and its first heartbeat: the storage would never call it stale.
        old = datetime.now() - timedelta(minutes=10)
        return [
            t
            for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if t._trial_id in stale
            or (HELD not in t.user_attrs and t.datetime_start is not None and t.datetime_start < old)
        ]
