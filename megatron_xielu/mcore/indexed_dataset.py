"""Token files in Megatron-Core's format: `PREFIX.bin` holds the ids, `PREFIX.idx` the documents.

Writing and reading ids is Megatron's own code, imported only there: checking a pair of files must
be quick, and must not import Megatron before the CPU platform is enabled.
"""

from __future__ import annotations

import logging
import os
import struct
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_xielu.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
# magic, version, code of the ids' type, sequences, document boundaries
_HEADER = struct.Struct("<9sQBQQ")
# the two that DType.optimal_dtype chooses from
_ID_TYPES: dict[int, type[np.integer[Any]]] = {4: np.int32, 8: np.uint16}
_REMEDY = "Write the data folder again."


@dataclass(frozen=True, kw_only=True)
class Index:
    """What the header of an .idx file says about its .bin file."""

    dtype: type[np.integer[Any]]
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class TokenRange:
    """Smallest and largest id found in `scanned` tokens."""

    lowest: int
    highest: int
    scanned: int


class DatasetWriter:
    """Writes documents of ids below `vocab_size`, in the smallest integer type that holds them.

    A context manager: the files appear under their names, .bin before .idx, when the block
    succeeds; a block that fails leaves neither.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        megatron = _megatron()
        self.documents = 0
        self.tokens = 0
        self._bin, self._idx = bin_path(prefix), idx_path(prefix)
        self._partial_bin, self._partial_idx = (
            path.with_name(path.name + ".partial") for path in (self._bin, self._idx)
        )
        self._builder = megatron.IndexedDatasetBuilder(
            str(self._partial_bin), dtype=megatron.DType.optimal_dtype(vocab_size)
        )

    def add(self, ids: npt.NDArray[np.integer[Any]]) -> None:
        """Append one document of shape (tokens,)."""
        self._builder.add_document(ids, [ids.size])
        self.documents += 1
        self.tokens += ids.size

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        self._builder.finalize(str(self._partial_idx))
        for path in (self._partial_bin, self._partial_idx):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        # an old .idx beside a new .bin would look complete
        self._idx.unlink(missing_ok=True)
        self._partial_bin.replace(self._bin)
        self._partial_idx.replace(self._idx)

    def _discard(self) -> None:
        # on a full disk the last buffer has nowhere to go; the file goes anyway
        with suppress(OSError):
            self._builder.data_file.close()
        self._partial_bin.unlink(missing_ok=True)
        self._partial_idx.unlink(missing_ok=True)


def bin_path(prefix: Path) -> Path:
    """The file of ids."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The file of document boundaries."""
    return prefix.with_name(prefix.name + ".idx")


def read_index(prefix: Path) -> Index:
    """Check that a pair of files is whole and return what it holds, without importing Megatron.

    Raises:
        UserError: a file is missing, foreign or truncated, or there is no document.
    """
    path = idx_path(prefix)
    for part in (bin_path(prefix), path):
        if not part.is_file():
            raise UserError(f"{part} is missing. {_REMEDY}")
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise UserError(f"{path} is truncated: {len(header)} bytes. {_REMEDY}")
        magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(header)
        if magic != _MAGIC or version != _VERSION or code not in _ID_TYPES:
            raise UserError(f"{path} is not an index of token ids in Megatron's format. {_REMEDY}")
        # int32 lengths, int64 offsets, int64 boundaries
        _check_size(path, _HEADER.size + 12 * num_sequences + 8 * num_boundaries)
        lengths = np.fromfile(file, dtype=np.int32, count=num_sequences)
    tokens = int(lengths.sum(dtype=np.int64))
    dtype = _ID_TYPES[code]
    # before the size of .bin: an empty file is right for no document
    if tokens == 0:
        raise UserError(f"{path} lists no document, so there is nothing to train on. {_REMEDY}")
    _check_size(bin_path(prefix), tokens * np.dtype(dtype).itemsize)
    return Index(dtype=dtype, documents=num_boundaries - 1, tokens=tokens)


def open_dataset(prefix: Path) -> IndexedDataset:
    """Megatron's memory-mapped reader of a pair of files that `read_index` has checked.

    Keep it alive as long as the arrays it returns: it unmaps the file when it is deleted, and
    reading an array after that ends the process.

    Raises:
        UserError: as `read_index`.
    """
    read_index(prefix)
    dataset: IndexedDataset = _megatron().IndexedDataset(str(prefix), mmap=True)
    return dataset


def token_id_range(prefix: Path, *, max_tokens: int = 10**9, blocks: int = 1000) -> TokenRange:
    """Smallest and largest id of a checked pair of files.

    Of more than `max_tokens` tokens, that many are read, in evenly spaced blocks.
    """
    index = read_index(prefix)
    ids = np.memmap(bin_path(prefix), dtype=index.dtype, mode="r")
    if ids.size <= max_tokens:
        return TokenRange(lowest=int(ids.min()), highest=int(ids.max()), scanned=ids.size)
    size = max_tokens // blocks
    starts = np.linspace(0, ids.size - size, blocks, dtype=np.int64)
    parts = [ids[start : start + size] for start in starts]
    return TokenRange(
        lowest=min(int(part.min()) for part in parts),
        highest=max(int(part.max()) for part in parts),
        scanned=size * blocks,
    )


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size
    if found != expected:
        kind = "truncated" if found < expected else "longer than its index says"
        raise UserError(f"{path} is {kind}: {expected} bytes expected, {found} found. {_REMEDY}")


def _megatron() -> ModuleType:
    # with a CUDA compiler but no GPU, torch says so wherever it is imported
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # it is about optimizers, and none runs here
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
