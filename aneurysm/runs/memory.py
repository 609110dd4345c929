"""The most memory that a run took, for its record: what the next machine must have."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch

MIB = 2**20
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Measure the peak between entering and leaving a block; blocks must not be nested.

    On Linux the kernel keeps the high-water mark of this process (VmHWM, proc(5)) and forgets the one before
    when "5" is written to clear_refs, so nothing is missed and nothing runs meanwhile. Elsewhere, and where
    a container forbids that write, a thread looks every `period` seconds and a shorter peak can be missed.
    Worker processes (`trainer.workers`) are not counted. On CUDA the peak of the tensors is taken as
    well (torch.cuda.max_memory_allocated, the current device; the caching allocator holds some more).
    """

    def __init__(self, period: float = 0.1) -> None:
        self.period = period
        self.resident = 0  # bytes, after the block
        self.gpu: int | None = None  # bytes, after the block; None without CUDA
        self.sampled = False  # True: looked at now and then instead of measured by the kernel
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.sampled = not _forget_high_water()
        if self.sampled:
            self._stop.clear()
            self._thread = threading.Thread(target=self._look, name="peak-memory", daemon=True)
            self._thread.start()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        else:
            self.resident = _high_water() or psutil.Process().memory_info().rss
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.gpu = torch.cuda.max_memory_allocated()

    def figures(self) -> dict[str, int]:
        """What goes into a run's record, in MiB: peak_memory_mb, with CUDA also peak_gpu_memory_mb."""
        found = {"peak_memory_mb": round(self.resident / MIB)}
        return found if self.gpu is None else {**found, "peak_gpu_memory_mb": round(self.gpu / MIB)}

    def _look(self) -> None:
        process = psutil.Process()
        while True:
            self.resident = max(self.resident, process.memory_info().rss)
            if self._stop.wait(self.period):
                self.resident = max(self.resident, process.memory_info().rss)
                return


def _forget_high_water() -> bool:
    """Let the kernel start a new high-water mark; False where it cannot."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _high_water() is not None


def _high_water() -> int | None:
    """Peak resident bytes of this process since the mark was forgotten; None where no kernel keeps it."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith("VmHWM:")]
    return int(found[0].split()[1]) * 1024 if found else None
