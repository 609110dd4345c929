"""The most memory of a run: measured by the kernel, or looked at where the kernel does not tell."""

import json
import time

import numpy as np
import pytest

from aneurysm.runs import memory
from aneurysm.runs.memory import MIB, PeakMemory


def take(mib: int, seconds: float = 0.0) -> None:
    block = np.ones(mib * MIB, dtype=np.uint8)  # written, so that it is resident
    time.sleep(seconds)
    del block


def test_a_peak_that_is_over_again_is_seen():
    with PeakMemory() as before:
        pass
    with PeakMemory() as measured:
        take(200)
    with PeakMemory() as after:
        pass
    assert measured.resident - before.resident == pytest.approx(200 * MIB, rel=0.15)
    assert after.resident < measured.resident - 150 * MIB  # the peak of one run is not that of the next
    assert measured.figures()["peak_memory_mb"] == round(measured.resident / MIB)


def test_without_the_kernels_mark_a_thread_looks(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "nowhere" / "clear_refs")
    with PeakMemory(period=0.01) as before:
        pass
    with PeakMemory(period=0.01) as measured:
        take(200, seconds=0.3)
    assert measured.sampled
    assert measured.resident - before.resident == pytest.approx(200 * MIB, rel=0.15)
    assert measured._thread is None


def test_an_error_inside_still_ends_the_measuring(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "nowhere" / "clear_refs")
    measured = PeakMemory()
    with pytest.raises(RuntimeError), measured:
        raise RuntimeError
    assert measured._thread is None
    assert measured.resident > 0


def test_the_figures_are_plain_numbers():
    with PeakMemory() as measured:
        pass
    figures = json.loads(json.dumps(measured.figures()))
    assert figures["peak_memory_mb"] > 10
    assert ("peak_gpu_memory_mb" in figures) == (measured.gpu is not None)
