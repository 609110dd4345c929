"""Starting the processes that train together, and joining their group.

A process that was asked for `trainer=ddp` or `fsdp` starts `trainer.devices` workers for the job, waits for
them and hands on their score, error or exit code, as if it had trained itself: what called it, a sweep or a
search, sees no difference. Where `torchrun` or `srun` has started several processes already, nothing is
started. Lightning's own launcher is not used: it replays the command line, and with `-m` the whole sweep.
"""

import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from aneurysm.data.errors import UserError
from aneurysm.data.files import replacing
from aneurysm.runs.settings import processes
from aneurysm.stages.processes import PATIENCE, world

log = logging.getLogger(__name__)
GRACE_S = 10.0  # how long the others may take to end by themselves once one has failed
CONFIG = "config.yaml"


def to_be_launched(trainer: DictConfig) -> bool:
    """Whether this process has to start the ones that train.

    Raises:
        UserError: the number of processes does not fit what has been started, or cannot be started from here.
    """
    wanted = processes(trainer)
    if dist.is_initialized() or _started_by() is not None:
        started = world() if dist.is_initialized() else _size_of_group()
        if started != wanted:
            raise UserError(
                f"{started} processes were started ({_started_by() or 'by the program that calls this'}) but "
                f"trainer.devices x trainer.num_nodes = {wanted}. Make them equal: the number of processes "
                "is part of the result."
            )
        return False
    if wanted > 1 and int(trainer.num_nodes) > 1:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: processes on other machines are started by srun (one "
            "task per GPU) or by torchrun on every node; run this command under one of them."
        )
    return wanted > 1


@contextmanager
def joined_group(trainer: DictConfig) -> Iterator[None]:
    """Be one of the processes that train together, if several were started; else nothing.

    A group started from outside lasts until this process ends, because the jobs of a sweep share it.
    """
    if dist.is_initialized() or _started_by() is None or _size_of_group() == 1:
        yield
        return
    _name_place()
    on_gpu = trainer.accelerator != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # NCCL keeps its own time limit: nothing of what travels by it may take long.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=None if on_gpu else PATIENCE)
    if dist.get_rank() > 0:
        logging.getLogger("aneurysm").setLevel(logging.ERROR)  # the first process speaks for all
    yield  # left as it is when something fails: taking leave of each other would wait for the dead
    if _started_by() == OURS:
        dist.destroy_process_group()


OURS = "by this program"


def _started_by() -> str | None:
    """Who started this process as one of several."""
    if "ANEURYSM_WORKER" in os.environ:
        return OURS
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "by torchrun"
    # Within a job, a script that srun did not start has SLURM_NTASKS too, but is no step of several tasks.
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        return "by srun"
    return None


def _size_of_group() -> int:
    return int(os.environ["SLURM_STEP_NUM_TASKS" if _started_by() == "by srun" else "WORLD_SIZE"])


def _name_place() -> None:
    """Translate SLURM's names for this process into those that PyTorch reads."""
    if _started_by() != "by srun":
        return
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    first = SLURMEnvironment.resolve_root_node_address(os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    # Steps of one job run side by side (folds of a sweep): each has a port of its own.
    step, job = int(os.environ.get("SLURM_STEP_ID", "0")), int(os.environ.get("SLURM_JOB_ID", "0"))
    here = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ["SLURM_STEP_NUM_TASKS"])
    os.environ.setdefault("MASTER_ADDR", first)
    os.environ.setdefault("MASTER_PORT", str(15000 + (job * 101 + step) % 20000))
    os.environ["RANK"], os.environ["WORLD_SIZE"] = (
        os.environ["SLURM_PROCID"],
        os.environ["SLURM_STEP_NUM_TASKS"],
    )
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ["LOCAL_WORLD_SIZE"] = here.split("(")[0].split(",")[0]  # "4(x2)": four on each of two nodes


def launch(cfg: DictConfig) -> float:
    """Train in `trainer.devices` new processes; what they return, raise or exit with is passed on.

    SIGTERM, SIGUSR1 and SIGINT go on to all of them. When one dies, the others are ended.
    """
    count = processes(cfg.trainer)
    with tempfile.TemporaryDirectory(prefix="aneurysm-") as name:
        folder = Path(name)
        OmegaConf.save(cfg, folder / CONFIG, resolve=True)
        # Kept open by this process: no other can take the port, and no worker has to be the first.
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        workers = [_start(folder, cfg, number, count, store.port) for number in range(count)]
        try:
            with _passing_on_signals(workers):
                ended = _wait(workers)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        return _outcome(folder, workers, ended)


def _start(folder: Path, cfg: DictConfig, number: int, count: int, port: int) -> subprocess.Popen[bytes]:
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    environment = {
        # All on one machine: no name of it has to be found, no network to be there.
        "GLOO_SOCKET_IFNAME": loopback,
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # that no parameter was unused in a step is no news
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        "ANEURYSM_WORKER": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
    return subprocess.Popen(
        [sys.executable, "-m", "aneurysm.worker", str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


@contextmanager
def _passing_on_signals(workers: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: Any) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {
        number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: list[subprocess.Popen[bytes]]) -> dict[int, float]:
    """Until all have ended, or one has failed and the others had time to notice: when each one ended."""
    ended: dict[int, float] = {}
    deadline = float("inf")
    while len(ended) < len(workers) and time.monotonic() < deadline:
        for number, worker in enumerate(workers):
            if number not in ended and worker.poll() is not None:
                ended[number] = time.time()
                if worker.returncode and deadline == float("inf"):
                    deadline = time.monotonic() + GRACE_S
        time.sleep(0.02)
    return ended


@dataclass(frozen=True)
class Ending:
    """How a worker ended."""

    when: float  # seconds since the epoch
    score: float = float("nan")
    error: BaseException | None = None

    @property
    def is_consequence(self) -> bool:
        """Whether this is what a process sees when another one has died."""
        said = f"{type(self.error).__name__}: {self.error}"
        return any(word in said for word in ("gloo", "NCCL", "Dist", "Connection", "SIGABRT"))


def _outcome(folder: Path, workers: list[subprocess.Popen[bytes]], ended: dict[int, float]) -> float:
    endings: dict[int, Ending] = {}
    for number, when in sorted(ended.items()):
        file = folder / f"{number}.ending"
        if file.is_file():
            endings[number] = pickle.loads(file.read_bytes())
        else:
            said = _unexplained(number, len(workers), workers[number].returncode)
            endings[number] = Ending(when, error=said)
    failed = [e for e in endings.values() if e.error is not None]
    for first in sorted(failed, key=lambda e: (e.is_consequence, e.when)):
        assert first.error is not None
        raise first.error
    return endings[0].score


def _unexplained(number: int, count: int, code: int) -> RuntimeError:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " The kernel does that when memory is short." if code == -signal.SIGKILL else ""
    return RuntimeError(
        f"Process {number} of the {count} that train together {how}; the others were ended.{hint} "
        "Run the same command again to go on from the last checkpoint."
    )


def work(folder: Path, train: Callable[[DictConfig], float]) -> int:
    """One of the processes that `launch` starts; returns its exit code."""
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        cfg: Any = OmegaConf.load(folder / CONFIG)
        with joined_group(cfg.trainer):
            ending, code = Ending(time.time(), score=train(cfg)), 0
    except BaseException as error:
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        else:
            code = 130 if isinstance(error, KeyboardInterrupt) else 1
        if not isinstance(error, UserError | SystemExit | KeyboardInterrupt):
            error.add_note(f"In process {number} of {count}:\n{traceback.format_exc()}")
        ending = Ending(time.time(), error=_portable(error))
    with replacing(folder / f"{number}.ending") as part:
        part.write_bytes(pickle.dumps(ending))
    return code


def _end_with_parent() -> None:
    # The parent holds the other end: nothing is ever sent, and the end comes when the parent is gone.
    os.read(0, 1)
    os._exit(1)


def _portable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return error
