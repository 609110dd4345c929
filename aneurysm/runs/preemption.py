"""Leaving when the scheduler says so: save where the training is, and say that it wants to go on.

A cluster takes a machine back with SIGTERM, seconds to minutes before it kills; `sbatch --signal=USR1@120`
sends SIGUSR1 at a time of one's own choice. Both mean the same here. Within a fit the step under way is
finished, a checkpoint is written and the process leaves with exit code 75, "temporary failure, try again"
(EX_TEMPFAIL of sysexits.h). Everything outside of a fit writes its files whole or not at all, so there the
process leaves at once, with the same code. The same command goes on from there.

A handler that something else has installed is left alone, SIGUSR2 is never touched: submitit listens to both
on its own account.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

log = logging.getLogger(__name__)

EXIT_CODE = os.EX_TEMPFAIL  # 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """The process was asked to leave and what it did can be taken up again; exit code 75.

    Not an `Exception`: a sweep must end with it rather than go on with its next job.
    """

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class Request:
    """Notes that this process has been asked to leave."""

    def __init__(self) -> None:
        self.made = False
        self.handlers: dict[int, Any] = {}  # signal -> what should happen while a fit runs

    def note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if not self.made:
            name = signal.Signals(number).name
            log.warning("%s: finishing this step, writing a checkpoint and leaving.", name)
        self.made = True

    def reinstall(self) -> None:
        """Put the handlers back that were there when the `deferred` block began.

        Lightning composes handlers of its own into them when a fit starts: those raise SystemExit without a
        code before there is a checkpoint, and start a broadcast from within a handler.
        """
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def leave_when_asked() -> None:
    """From now on this process leaves at once, with `Preempted`, when a signal asks it to."""
    if _can_handle():
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _leave)


@contextmanager
def deferred() -> Iterator[Request]:
    """Within this block being asked to leave only makes a note, for someone to read at a good moment."""
    request, before = Request(), {}
    if _can_handle():
        before = {n: h for n in SIGNALS if (h := signal.getsignal(n)) is not None}
        ours = (signal.SIG_DFL, _leave)
        request.handlers = {n: request.note if h in ours else h for n, h in before.items()}
        request.reinstall()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _can_handle() -> bool:
    return threading.current_thread() is threading.main_thread()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    log.warning("%s: leaving. The same command goes on from here.", signal.Signals(number).name)
    raise Preempted
