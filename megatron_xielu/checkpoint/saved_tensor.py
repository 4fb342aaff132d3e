"""Where in a file `torch.save` put the numbers of a tensor.

`torch.load` would hold them twice, in a tensor of its own and in the one they belong into.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import BinaryIO

import torch
from torch import Tensor

_LOCAL_HEADER = 30
"""Bytes before the name in a zip file's local header; the lengths of name and extra end it."""


def saved_bytes(file: BinaryIO, offset: int, length: int, like: Tensor) -> int | None:
    """The position in `file` of the bytes of a tensor that was saved at `offset`.

    Returns None where they are no plain run: not of this shape and type, not contiguous, part of a
    larger storage, compressed, or damaged. Then `torch.load` is the judge.
    """
    window = _Window(file, offset, length)
    try:
        with torch.serialization.skip_data():
            saved = torch.load(io.BufferedReader(window), map_location="cpu", weights_only=True)
        with zipfile.ZipFile(_Window(file, offset, length)) as archive:
            records = [info for info in archive.infolist() if "/data/" in info.filename]
    except (RuntimeError, OSError, pickle.UnpicklingError, zipfile.BadZipFile):
        return None
    if len(records) != 1 or not isinstance(saved, Tensor):
        return None
    (record,) = records
    plain = record.compress_type == zipfile.ZIP_STORED and record.file_size == like.nbytes
    same = saved.shape == like.shape and saved.dtype == like.dtype and saved.is_contiguous()
    if not (plain and same):
        return None
    window.seek(record.header_offset)
    header = window.read(_LOCAL_HEADER)
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return offset + record.header_offset + _LOCAL_HEADER + names


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + position
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._offset + self._position)
        room = min(len(buffer), self._length - self._position)
        count = self._file.readinto(memoryview(buffer)[:room])  # type: ignore[attr-defined]
        self._position += count
        return int(count)
