"""TensorBoard's writer, for a disk that may be full: curves get a gap, the run goes on."""

from __future__ import annotations

import functools
import time
from typing import Any

import megatron.training.global_vars

# every attempt on a full disk leaves an empty file
_PAUSE_SECONDS = 60.0


def outlive_full_disks() -> None:
    """Put `TolerantWriter` in the place of Megatron's writer, if this rank has one."""
    variables = megatron.training.global_vars
    writer = variables.get_tensorboard_writer()
    if writer is not None and not isinstance(writer, TolerantWriter):
        variables._GLOBAL_TENSORBOARD_WRITER = TolerantWriter(writer)


class TolerantWriter:
    """A SummaryWriter whose errors are dropped, and which starts a new file some time after one.

    TensorBoard writes in a thread that an error ends for good; it shows at a later call.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._failed_at: float | None = None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._writer, name)
        return functools.partial(self._call, name) if callable(found) else found

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._failed_at is not None and time.monotonic() < self._failed_at + _PAUSE_SECONDS:
            return None
        try:
            if self._failed_at is not None:
                self._writer = type(self._writer)(log_dir=self._writer.log_dir)
                self._failed_at = None
            return getattr(self._writer, name)(*args, **kwargs)
        except OSError:
            self._failed_at = time.monotonic()
            return None
