"""How `nets.py` measures: times in interleaved rounds, memory in a process of its own.

Memory on the CPU is the high-water mark of the resident set while the case runs, above what was resident
before it; the kernel's mark is set back first, and freed tensors go back to the system at once
(MALLOC_MMAP_THRESHOLD_), so that the mark follows what is alive. `saved` is what the graph keeps for the
backward pass, in bytes of distinct storages, weights excluded: the same on every machine.

As a command: python benchmarks/nets_measure.py '<case as JSON>' prints one JSON line, for `memory` below.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nets_cases import Case, made, mean_square, run
from torch import Tensor, nn


@dataclass(frozen=True)
class Times:
    """Seconds of every round of one side."""

    wall: list[float]
    cpu: list[float]  # of all threads, and waiting ones spin

    @property
    def counted(self) -> list[float]:
        """CPU seconds where one thread does all, as they tell least of who else is busy; else wall time."""
        return self.cpu if torch.get_num_threads() == 1 and not torch.cuda.is_available() else self.wall

    @property
    def median(self) -> float:
        return statistics.median(self.counted)

    @property
    def best(self) -> float:
        return min(self.counted)


def in_turns(sides: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, Times]:
    """Run all sides once per round, each beginning with another one; one round before is not counted."""
    names, times = list(sides), {name: Times([], []) for name in sides}
    for i in range(-1, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            synchronise(device)
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            synchronise(device)
            if i >= 0:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    return times


def synchronise(device: str) -> None:
    """Wait for what a GPU still has to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ratio(over: Times, under: Times) -> float:
    """Median over the rounds of one side's time over the other's in the same round."""
    return statistics.median(a / b for a, b in zip(over.counted, under.counted, strict=True))


def cpu_ratio(over: Times, under: Times) -> float:
    """The same of CPU seconds."""
    return statistics.median(a / b for a, b in zip(over.cpu, under.cpu, strict=True))


def saved_bytes(net: nn.Module, image: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass, weights and input excluded."""
    outside = {p.untyped_storage().data_ptr() for p in (*net.parameters(), *net.buffers(), image)}
    kept: dict[int, Tensor] = {}  # the tensors themselves, or an address could be used twice

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in outside:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = mean_square(net(image))
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del loss
    return total


def memory(case: Case, threads: int) -> dict[str, Any]:
    """Peak and saved bytes of a case: on the CPU from a fresh process, on a GPU from the allocator."""
    if case.device.startswith("cuda"):
        return measured(case)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__)), json.dumps(case.words())]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{case} could not be measured:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def measured(case: Case) -> dict[str, Any]:
    """`memory` in this process."""
    net, image = made(case)
    side = min(case.size, 32 if case.part == "encoder" else 64)  # instance norm needs more than a voxel
    run(case, net, image[..., :side, :side, :side].contiguous())  # libraries are loaded now
    net.zero_grad(set_to_none=True)
    if case.device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(case, net, image)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        before = resident("VmRSS")
        run(case, net, image)
        peak = resident("VmHWM") - before
    return {"peak": peak, "saved": saved_bytes(net, image) if case.backward else 0}


def resident(entry: str) -> int:
    """Bytes of an entry of /proc/self/status (Linux only)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"This kernel does not say {entry}.")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(json.dumps(measured(Case(**json.loads(sys.argv[1])))))
