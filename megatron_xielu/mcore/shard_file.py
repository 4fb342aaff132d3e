"""A file for checkpoint shards whose write errors are raised at its end, not inside the writer.

A write that raises, as on a full disk, leaves a traceback that holds a view of the writer's
BytesIO, and CPython 3.12.1 crashes when it collects the two as garbage
(bytesiobuf_releasebuffer, seen in one failed save of six).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ShardFile:
    """Open for writing; after the first error everything is dropped until `fileno` raises it.

    Args:
        on_error: is told of the first error.
    """

    def __init__(self, path: str | Path, on_error: Callable[[OSError], None]) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
        self._size = 0
        self._error: OSError | None = None
        self._on_error = on_error

    def write(self, data: Any) -> int:
        """Takes all of `data`, bytes or a buffer of bytes."""
        with memoryview(data) as view, view.cast("B") as rest:
            size = len(rest)
            if self._error is None:
                self._error = self._write_all(rest)
        self._size += size
        return size

    def tell(self) -> int:
        """Bytes taken so far."""
        return self._size

    def flush(self) -> None:
        """Nothing is held back."""

    def fileno(self) -> int:
        """For os.fsync, which ends every shard; raises what went wrong while it was written."""
        if self._error is not None:
            raise self._error
        return self._descriptor

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def _write_all(self, data: memoryview) -> OSError | None:
        written = 0
        try:
            # one call writes at most 2 GiB
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
        except OSError as error:
            self._on_error(error)
            return error.with_traceback(None)
        return None
