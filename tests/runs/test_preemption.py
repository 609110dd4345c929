"""A command that is asked to leave ends with exit code 75, and a sweep ends with it."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from aneurysm.runs.preemption import EXIT_CODE, Preempted, deferred, leave_when_asked

SCRIPT = """
import time
from aneurysm.command_line import entry_point

def run(cfg):
    print("begun", cfg.seed, flush=True)
    time.sleep(60)

entry_point("train", run)()
"""


@pytest.mark.parametrize("arguments", [["seed=3"], ["-m", "seed=3,4"]], ids=["one run", "sweep"])
def test_a_command_outside_of_a_fit_leaves_at_once_and_takes_its_sweep_along(tmp_path, arguments):
    command = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments, f"paths.outputs={tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert command.stdout is not None
    said = []
    for line in command.stdout:
        said.append(line)
        if line.startswith("begun"):
            os.kill(command.pid, signal.SIGTERM)
    assert command.wait(60) == EXIT_CODE == 75
    assert [line.strip() for line in said if line.startswith("begun")] == ["begun 3"]
    assert any("SIGTERM: leaving" in line for line in said)
    assert not any("Traceback" in line or "failed" in line for line in said)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        leave_when_asked()
        outside = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Preempted):
            os.kill(os.getpid(), signal.SIGTERM)
        with deferred() as request:
            assert not request.made
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.made
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Lightning puts its own in their place
            request.reinstall()
            assert signal.getsignal(signal.SIGTERM) == request.note
        assert signal.getsignal(signal.SIGTERM) is outside
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_in_a_thread_nothing_is_handled():
    seen = []

    def work():
        leave_when_asked()
        with deferred() as request:
            seen.append(request.handlers)

    thread = threading.Thread(target=work)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert seen == [{}] and signal.getsignal(signal.SIGTERM) is before
