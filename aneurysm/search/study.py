"""A study: where it is stored, and how one of its workers goes from trial to trial."""

import logging
import math
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from aneurysm.data.errors import UserError
from aneurysm.search.space import Parameter
from aneurysm.search.watch import HeartbeatWatch, LockWatch, Watch, hand_back

log = logging.getLogger(__name__)
optuna.logging.set_verbosity(optuna.logging.ERROR)  # workers say themselves what happens
# Heartbeats and the quasi-random sampler are pinned with the version; here trials are asked for one by one.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with Study.optimize")

SAMPLERS = ("tpe", "gp", "random", "qmc")
HEARTBEAT = 30  # seconds; a worker that is silent for four of them is taken for dead
WAIT = 2.0  # seconds between two looks at a study whose last trials run elsewhere

Direction = Literal["minimize", "maximize"]
Objective = Callable[[optuna.Trial, Sequence[str]], float]


class _JournalLock:
    """The operating system's lock: unlike a lock that is a file, it does not outlive its process."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


def open_study(
    name: str, storage: str | Path, folder: Path, direction: Direction, identity: dict[str, Any]
) -> tuple[optuna.Study, Watch]:
    """Open or begin a study.

    Args:
        storage: file of the journal, or the URL of a database as SQLAlchemy writes them.
        folder: for the locks of the workers.
        direction: minimize or maximize.
        identity: what makes trials comparable; noted in a new study, compared with an old one.

    Raises:
        UserError: the storage cannot be opened, or the study was begun with another identity.
    """
    try:
        kept, watch = _open_storage(name, storage, folder)
    except (OSError, ImportError, ValueError, optuna.exceptions.StorageInternalError) as error:
        raise UserError(f"The study cannot be stored in {storage}: {error}") from error
    with watch.turn():
        study = optuna.create_study(study_name=name, storage=kept, direction=direction, load_if_exists=True)
        before = study.user_attrs.get("identity")
        if before is None:
            study.set_user_attr("identity", identity)
    for part, value in identity.items():
        if before is not None and before.get(part) != value:
            raise UserError(
                f"Study {name!r} in {storage} was begun with {part} {before.get(part)}, this command says "
                f"{value}. Their trials do not compare: give this search a name of its own, --study=..."
            )
    return study, watch


def _open_storage(name: str, storage: str | Path, folder: Path) -> tuple[JournalStorage | RDBStorage, Watch]:
    if isinstance(storage, Path):
        storage.parent.mkdir(parents=True, exist_ok=True)
        # Beside the journal, wherever that is: whoever shares one shares the other.
        watch = LockWatch(storage.parent / f".{name}.workers")
        lock = _JournalLock(storage.with_name(f".{storage.name}.lock"))
        lock.acquire()
        try:
            drop_torn_line(storage)
        finally:
            lock.release()
        backend = JournalFileBackend(str(storage), lock_obj=lock)  # pyright: ignore[reportArgumentType]
        return JournalStorage(backend), watch
    database = RDBStorage(storage, heartbeat_interval=HEARTBEAT, grace_period=4 * HEARTBEAT)
    return database, HeartbeatWatch(database, folder / f".{name}.workers" / "turn.lock")


def drop_torn_line(journal: Path) -> None:
    """Cut off a last line that a kill or a full disk left half written: after it nothing could be read."""
    if not journal.is_file():
        return
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        log.warning("%s ended in half a line, which is cut off.", journal)
        with open(journal, "r+b") as file:
            file.truncate(whole)


def sampler(kind: str, seed: int, draw: int) -> BaseSampler:
    """What proposes the parameters of draw number `draw`.

    Every draw has a sampler of its own, seeded by (seed, draw), so what is drawn depends on the history of
    the study and not on which workers lived how long.
    """
    key = zlib.crc32(f"{seed}/{draw}".encode())
    if kind == "tpe":
        return TPESampler(seed=key, warn_independent_sampling=False)
    if kind == "gp":
        return GPSampler(seed=key, warn_independent_sampling=False)
    if kind == "qmc":  # a sequence: the study itself counts how far it is
        return QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
    if kind == "random":
        return RandomSampler(seed=key)
    raise UserError(f"sampler {kind!r} is none of {', '.join(SAMPLERS)}.")


def work(
    study: optuna.Study,
    watch: Watch,
    space: Sequence[Parameter],
    objective: Objective,
    trials: int,
    kind: str = "tpe",
    seed: int = 0,
    timeout: float | None = None,
) -> None:
    """Run trials until the study has `trials` complete ones, by whichever workers.

    Args:
        objective: called with a trial and its overrides; returns the score.
        timeout: seconds after which no new trial is begun.

    Raises:
        UserError: as many trials failed as there should be.
    """
    began = time.monotonic()
    waiting = False
    while True:
        trial, overrides = None, []
        with watch.turn():
            for gone in watch.dead(study):
                hand_back(study, gone, lost=True)
            all_trials = study.get_trials(deepcopy=False)
            done = [t for t in all_trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
            running = [t for t in all_trials if t.state == TrialState.RUNNING]
            if len(done) >= trials:
                return
            if timeout is not None and time.monotonic() - began > timeout:
                log.info("Time is up: %d of %d trials are done. The same command goes on.", len(done), trials)
                return
            _stop_when_nothing_works(all_trials, trials)
            if len(done) + len(running) < trials:
                draw = sum("again" not in t.user_attrs and bool(t.params) for t in all_trials)
                study.sampler = sampler(kind, seed, draw)
                trial = study.ask()
                watch.hold(trial)
                overrides = [parameter.suggest(trial) for parameter in space]
        if trial is None:
            if not waiting:
                log.info("The last trials run elsewhere; waiting for them.")
            waiting = True
            time.sleep(WAIT)
            continue
        waiting = False
        log.info("Trial %d: %s", trial.number, "  ".join(overrides))
        _run(study, watch, trial, overrides, objective)


def _run(
    study: optuna.Study, watch: Watch, trial: optuna.Trial, overrides: Sequence[str], objective: Objective
) -> None:
    state, score, error = TrialState.FAIL, None, None
    try:
        score = objective(trial, overrides)
        if math.isfinite(score):
            state = TrialState.COMPLETE
        else:
            error = f"its score is {score}: the held-out data of these folds cannot be scored"
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except UserError as found:
        error = str(found)
    except Exception as found:
        error = f"{type(found).__name__}: {found}"
        log.exception("Trial %d stopped on an unexpected error.", trial.number)
    except BaseException:  # interrupted, or told to go: the next worker takes the trial over
        with watch.turn():
            hand_back(study, study.trials[trial.number], lost=False)
            watch.release()
        raise
    with watch.turn():
        if error is not None:
            trial.set_user_attr("error", error)
        study.tell(trial, score if state == TrialState.COMPLETE else None, state=state)
        watch.release()
    if state == TrialState.COMPLETE:
        log.info("Trial %d: score %.4f, the best so far is %.4f", trial.number, score, study.best_value)
    elif state == TrialState.PRUNED:
        log.info("Trial %d is given up: its first folds are below the median of the others.", trial.number)
    else:
        log.error("Trial %d failed: %s", trial.number, error)


def _stop_when_nothing_works(trials: Sequence[FrozenTrial], asked: int) -> None:
    failed = [t for t in trials if "error" in t.user_attrs]
    if len(failed) >= max(asked, 3):
        raise UserError(
            f"{len(failed)} trials failed, as many as should succeed; the last one: "
            f"{failed[-1].user_attrs['error']}"
        )
