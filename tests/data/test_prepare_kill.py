"""Kill -9 in the middle of a preparation, a process that dies, memory that does not suffice."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from prepare_sources import SmallSource, contents

from aneurysm.data.errors import ReadError, UserError
from aneurysm.data.phantom.dataset import PhantomSource
from aneurysm.data.preparation import workload
from aneurysm.data.preparation.memory import GIB, available_bytes
from aneurysm.data.preparation.prepare import Preparation, load_prepared, prepare_all
from aneurysm.data.preparation.workload import Extent, affordable_jobs, need_of

PREPARATION = Preparation(spacing_mm=2.0)
PHANTOM_SCRIPT = """
import logging, sys
from aneurysm.data.phantom.dataset import PhantomSource
from aneurysm.data.preparation.prepare import Preparation, prepare_all
logging.basicConfig(level="INFO")
root, cache, jobs = sys.argv[1:]
prepare_all(PhantomSource(root, patients=30, seed=3, size=96), Preparation(), cache, int(jobs))
"""


def killed(command: list[str], seconds: float, group: bool, cache: Path | None = None, more: int = 0) -> bool:
    """SIGKILL a preparation, or it and all its workers, `seconds` after it has begun; False when it was done.

    With `cache` it has begun when it has made `more` further cases.
    """
    before = 0 if cache is None else len(list(cache.glob("*.blosc2")))
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "prepared already" in line:
            break
    while cache and process.poll() is None and len(list(cache.glob("*.blosc2"))) < before + more:
        time.sleep(0.002)
    try:
        process.wait(seconds)
        assert process.returncode == 0, said + process.stderr.read()
        return False
    except subprocess.TimeoutExpired:
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        return True
    finally:
        process.stderr.close()


def whole_cases(cache: Path) -> int:
    """How many cases there are, each read to its last voxel."""
    return sum(load_prepared(path).image.size > 0 for path in cache.glob("*.blosc2"))


def finish(command: list[str], cache: Path) -> None:
    """Run to the end, and wait for workers that outlived a killed parent: they finish the case they have."""
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    deadline = time.time() + 30
    while list(cache.glob(".*.part.*")) and time.time() < deadline:
        time.sleep(0.2)


def test_killed_three_times_the_cache_is_the_same_byte_for_byte(tmp_path):
    script = Path(__file__).with_name("prepare_sources.py")
    command = [sys.executable, str(script), str(tmp_path), str(tmp_path / "killed"), "6", "90", "1"]
    started = time.time()
    prepare_all(SmallSource(tmp_path, 6, side=90), PREPARATION, tmp_path / "undisturbed")
    took, rng = time.time() - started, random.Random(1)
    hits = sum(killed(command, rng.uniform(0, took / 3), group=i % 2 == 0) for i in range(3))
    assert hits and whole_cases(tmp_path / "killed") < 6
    finish(command, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    assert whole_cases(tmp_path / "killed") == 6


@pytest.mark.parametrize("cases", [0, 4])  # while workers start, and while they work
def test_no_worker_outlives_a_killed_run(tmp_path, cases):
    script, cache = Path(__file__).with_name("prepare_sources.py"), tmp_path / "cache"
    command = [sys.executable, str(script), str(tmp_path), str(cache), "500", "90", "2"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)

    def workers() -> list[int]:
        """Processes of the run's session that are not the run itself."""
        found = []
        for pid in psutil.pids():
            with suppress(ProcessLookupError, PermissionError, psutil.Error):
                if os.getsid(pid) == process.pid != pid and psutil.Process(pid).status() != "zombie":
                    found.append(pid)
        return found

    deadline = time.time() + 40
    while (len(list(cache.glob("*.blosc2"))) < cases or len(workers()) < 2) and time.time() < deadline:
        time.sleep(0.02)
    assert len(workers()) >= 2
    process.kill()
    process.wait()
    while workers() and time.time() < deadline:
        time.sleep(0.2)
    assert not workers()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_twenty_times_on_thirty_phantoms(tmp_path):
    source = PhantomSource(tmp_path / "data", patients=30, seed=3, size=96)

    def command(jobs: int) -> list[str]:
        root, cache = tmp_path / "data", tmp_path / "killed"
        return [sys.executable, "-c", PHANTOM_SCRIPT, str(root), str(cache), str(jobs)]

    started = time.time()
    prepare_all(source, Preparation(), tmp_path / "undisturbed")
    took, rng = time.time() - started, random.Random(2)
    moments, hits = [], 0
    for attempt in range(20):
        # None or one further case each time, so that all twenty moments lie within the thirty cases.
        moment = rng.uniform(0, took / 30)
        cache = tmp_path / "killed"
        hits += killed(command(1 + attempt % 2), moment, attempt % 4 < 2, cache, more=rng.randint(0, 1))
        moments.append(whole_cases(tmp_path / "killed"))
    finish(command(2), tmp_path / "killed")
    print(f"undisturbed {took:.1f} s; {hits} of 20 kills hit; cases whole after each: {moments}")
    assert hits >= 15
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    assert whole_cases(tmp_path / "killed") == 30


def test_a_process_that_dies_is_named_and_the_others_go_on(tmp_path, caplog):
    source = SmallSource(tmp_path, 8, exits=("s002",), kills=("s005",))
    with caplog.at_level(logging.INFO):
        paths = prepare_all(source, PREPARATION, tmp_path / "cache", jobs=2)
    assert list(paths) == ["s000", "s001", "s003", "s004", "s006", "s007"]
    failed = json.loads((tmp_path / "cache" / "failed.json").read_text())
    assert set(failed) == {"s002", "s005"}
    assert "EXIT(7)" in failed["s002"] and "SIGKILL" in failed["s005"]
    assert "prepared 8 of 8 cases, 2 skipped" in caplog.text
    assert not (tmp_path / "cache" / ".running").exists()
    assert all(load_prepared(path).series_uid == uid for uid, path in paths.items())


@pytest.mark.slow
def test_all_processes_die(tmp_path):
    source = SmallSource(tmp_path, 2, exits=("s000", "s001"))
    with pytest.raises(ReadError, match=r"s000: the process that prepared it died \(EXIT\(7\)\)"):
        prepare_all(source, PREPARATION, tmp_path / "cache", jobs=2)


def test_a_file_cut_short_is_prepared_again(tmp_path, caplog):
    source, cache = SmallSource(tmp_path, 2), tmp_path / "cache"
    paths = prepare_all(source, PREPARATION, cache)
    before = contents(cache)
    paths["s001"].write_bytes(before[paths["s001"].name][:-100])
    (cache / f".123.part.{paths['s000'].name}").write_bytes(b"half")  # what a killed process leaves
    assert prepare_all(source, PREPARATION, cache) == paths and contents(cache) == before
    assert "prepared again" in caplog.text


def test_equal_cases_give_equal_bytes_whatever_the_processes(tmp_path):
    source = SmallSource(tmp_path, 3)
    for jobs in (1, 2):
        prepare_all(source, PREPARATION, tmp_path / str(jobs), jobs)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_fewer_processes_when_memory_would_not_suffice(tmp_path, caplog):
    large = Extent((300, 512, 512), (0.6, 0.4, 0.4))
    one = need_of(large, 0.75, crop=True, margin_mm=6.0).memory
    assert 0.9 * GIB < one < 2 * GIB
    needs = {f"s{i}": need_of(large, 0.75, True, 6.0) for i in range(10)}
    assert affordable_jobs(needs, 8, memory_bytes=3 * one) == 3
    assert affordable_jobs(needs, 8, memory_bytes=8 * one) == 8
    assert affordable_jobs(needs, 2, memory_bytes=one // 2) == 1 and "preparing with 1" in caplog.text
    assert affordable_jobs({"s0": needs["s0"]}, 4, memory_bytes=one) == 4  # one case needs no second
    assert affordable_jobs({}, 4, memory_bytes=one) == 4
    # A coarser grid takes less, no crop more, an unknown size is taken as a large one.
    assert need_of(large, 1.5, True, 6.0).memory < one < need_of(large, 0.5, True, 6.0).memory
    assert need_of(None, 0.75, True, 6.0).memory > one
    assert need_of(large, None, False, 0.0).disk > 78_000_000
    source = SmallSource(tmp_path, 3, extent=large)
    caplog.clear()
    paths = prepare_all(source, PREPARATION, tmp_path / "cache", jobs=2, memory_bytes=int(1.5 * one))
    assert len(paths) == 3 and "preparing with 1" in caplog.text


def test_a_full_disk_is_told_before_the_start(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 10_000_000})()
    monkeypatch.setattr(workload.shutil, "disk_usage", lambda _: usage)
    source = SmallSource(tmp_path, 30, extent=Extent((300, 512, 512), (0.6, 0.4, 0.4)))
    with pytest.raises(UserError, match=r"30 prepared cases take up to .* free"):
        prepare_all(source, PREPARATION, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.blosc2"))


def test_memory_of_a_control_group_counts(tmp_path):
    limit, usage = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text(f"{3 * GIB}\n")
    usage.write_text(f"{2 * GIB + GIB // 2}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 4}\n")
    assert available_bytes(((str(limit), str(usage)),)) == min(GIB // 2 + GIB // 4, available_bytes(()))
    limit.write_text("max\n")
    assert available_bytes(((str(limit), str(usage)),)) > GIB // 8


@pytest.fixture
def without_dask(monkeypatch) -> Iterator[None]:
    for name in ("distributed", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    yield


def test_backends_that_are_not_there(tmp_path, without_dask):
    source = SmallSource(tmp_path, 1)
    for backend, message in (
        ("dask", r"pip install 'aneurysm\[dask\]'"),
        ("ray", r"pip install 'aneurysm\[ray\]'"),
        ("slurm", "one of loky, dask, ray, not 'slurm'"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_all(source, PREPARATION, tmp_path / "cache", jobs=2, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_the_same_bytes_from_a_cluster(tmp_path, backend):
    pytest.importorskip({"dask": "distributed", "ray": "ray"}[backend], reason=f"{backend} is not installed")
    source = SmallSource(tmp_path, 5)
    prepare_all(source, PREPARATION, tmp_path / "loky")
    prepare_all(source, PREPARATION, tmp_path / backend, jobs=2, backend=backend)
    assert contents(tmp_path / backend) == contents(tmp_path / "loky")
