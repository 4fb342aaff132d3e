"""Write a Megatron `torch_dist` checkpoint with torch alone, one part of a tensor after the other.

The folder is what Megatron-Core 0.19 saves and loads: data files (`*.distcp`) whose parts are
`torch.save` streams, an index (`.metadata`, written last) of where each part lies, the small state
beside the tensors as the object `common_state`, and `metadata.json`. torch's own writer keeps every
tensor of a file until the file ends; this one keeps a single part.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_xielu.checkpoint import manifest
from megatron_xielu.checkpoint.manifest import FileRecord
from megatron_xielu.unpickle import INDEX

_CONFIG = "metadata.json"
_FILE_BYTES = 4 * 10**9
"""About the size of a data file, so that several can be read at once."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A whole stored tensor, or one row of it."""

    key: str
    shape: tuple[int, ...]
    """Of the stored tensor."""
    row: int | None
    """This part is `tensor[row]`; None means the whole."""
    dtype: torch.dtype
    load: Callable[[], Tensor]
    """Gives the part when its turn comes."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape that `load` gives."""
        return self.shape if self.row is None else self.shape[1:]

    @property
    def num_bytes(self) -> int:
        """Of the numbers alone."""
        return prod(self.part_shape) * self.dtype.itemsize


def write_checkpoint(
    folder: Path,
    parts: Sequence[Part],
    common_state: Mapping[str, Any],
    objects: Mapping[str, Any] | None = None,
    *,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> dict[str, FileRecord]:
    """Write a checkpoint into a folder that exists.

    Args:
        parts: all of every tensor, in the order in which they are loaded and written. Memory is
            about what the `load` of one of them takes.
        common_state: "args", "iteration" and whatever else is no tensor.
        objects: further objects by their Megatron key, as "...linear_fc1._extra_state/shard_0_2".
        progress: gets the bytes of every part that was written.

    Returns:
        Size and checksum of every file written, taken while the next file is being written.

    Raises:
        OSError: a file cannot be written. The index is not there then.
    """
    index = Metadata({}, storage_data={}, version=CURRENT_DCP_VERSION)
    everything = {"common_state/shard_0_1": dict(common_state), **(objects or {})}
    with ThreadPoolExecutor(1) as pool:
        described: dict[str, Future[dict[str, FileRecord]]] = {}

        def describe(name: str) -> None:
            described[name] = pool.submit(manifest.describe, folder, [name])

        for number, members in enumerate(_files(parts)):
            name = f"__{number}_0.distcp"
            with (folder / name).open("wb") as file:
                if number == 0:
                    for key, value in everything.items():
                        _write_object(file, name, key, value, index)
                for part in members:
                    _write_part(file, name, part, index)
                    progress(part.num_bytes)
            describe(name)
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (folder / _CONFIG).write_text(json.dumps(config))
        describe(_CONFIG)
        (folder / INDEX).write_bytes(pickle.dumps(index))
        describe(INDEX)
        return {name: future.result()[name] for name, future in described.items()}


def _files(parts: Iterable[Part]) -> list[list[Part]]:
    """The parts of each file."""
    ends, total = [], 0
    for part in parts:
        ends.append((total // _FILE_BYTES, part))
        total += part.num_bytes
    return [[part for _, part in members] for _, members in groupby(ends, key=lambda end: end[0])]


def _write_part(file: BinaryIO, name: str, part: Part, index: Metadata) -> None:
    tensor = part.load()
    assert (tuple(tensor.shape), tensor.dtype) == (part.part_shape, part.dtype), part.key
    offsets, sizes = [0] * len(part.shape), list(part.shape)
    if part.row is not None:
        offsets[0], sizes[0] = part.row, 1
    start = file.tell()
    # a view would be saved with all of the memory it looks into
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    try:
        torch.save((tensor if whole else tensor.clone()).view(sizes), file)
    except RuntimeError as error:
        # torch notices a failed write by its own count of bytes, and hides why
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    entry = index.state_dict_metadata.setdefault(
        part.key,
        TensorStorageMetadata(TensorProperties(part.dtype), torch.Size(part.shape), chunks=[]),
    )
    assert isinstance(entry, TensorStorageMetadata)
    entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    place = _StorageInfo(name, start, file.tell() - start)
    index.storage_data[MetadataIndex(part.key, offsets)] = place


def _write_object(file: BinaryIO, name: str, key: str, value: Any, index: Metadata) -> None:
    buffer = io.BytesIO()
    # an object is stored as the list of its local shards
    torch.save([value], buffer)
    start = file.tell()
    file.write(buffer.getbuffer())
    index.state_dict_metadata[key] = BytesStorageMetadata()
    place = _StorageInfo(name, start, file.tell() - start)
    index.storage_data[MetadataIndex(key)] = place
