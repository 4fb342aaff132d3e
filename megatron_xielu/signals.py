"""The signals that ask a run to save and end, remembered from its first moment on."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""What schedulers, a user's Ctrl-C and a closed terminal send; all mean the same."""


def stop_signals() -> list[signal.Signals]:
    """Those that this process listens to: nohup means that a closed terminal must not end a run."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if number != signal.SIGHUP or not ignored]


class StopSignals:
    """Remembers a stop signal, and when it came, instead of dying of it."""

    def __init__(self) -> None:
        self._came_at: float | None = None

    def listen(self, *more: int) -> None:
        """Take over the stop signals of this process, and `more`."""
        for number in {*stop_signals(), *more}:
            signal.signal(number, self._remember)

    def seconds_since(self) -> float | None:
        """Since the first of them came; None while there was none."""
        return None if self._came_at is None else time.monotonic() - self._came_at

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._came_at is None:
            self._came_at = time.monotonic()


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Block the stop signals around the start of a process, which inherits that for good.

    Slurm and a terminal send them to every process of a rank, and one without a handler would die.
    """
    kept = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # Python's own comes with the first other, and its start unblocks SIGINT and SIGTERM
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, kept)
