"""Read a Megatron `torch_dist` checkpoint with torch alone: no Megatron, no process group, no GPU.

A checkpoint folder holds an index (`.metadata`, a pickle) and data files (`*.distcp`). The index
says for every tensor which box of it lies at which bytes of which file, so any slice can be put
together whatever tensor and pipeline parallelism wrote it. Both pickles that are read here, the
index and the saved arguments, may name only the classes they need: a checkpoint from elsewhere can
run no code.
"""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_xielu.checkpoint.saved_tensor import saved_bytes
from megatron_xielu.errors import UserError
from megatron_xielu.unpickle import load_plain, read_index

_COMMON_STATE = "common_state/shard_0_1"
_LEGACY_COMMON_STATE = "common.pt"
_REMEDY = "Copy the checkpoint again, or use another step."


class TorchDistReader:
    """The tensors of one checkpoint folder (`iter_0000200`).

    Args:
        path: the folder that holds `.metadata`.

    Raises:
        UserError: the folder is no finished torch_dist checkpoint. Data files are looked at only
            when they are needed, so that one without its optimizer's files can still be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._reader = FileSystemReader(self.path)
        metadata = read_index(self.path)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._objects: list[str] = []
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                self._objects.append(key)
            else:
                self._tensors[key] = entry

    def keys(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._tensors)

    def object_keys(self) -> list[str]:
        """Names of everything that is stored as bytes: random states, FP8 extra states."""
        return sorted(self._objects)

    def shape(self, key: str) -> tuple[int, ...]:
        """The global shape."""
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """The type the tensor is stored in."""
        return self._entry(key).properties.dtype

    def num_bytes(self, key: str, index: int | None = None) -> int:
        """What `read` returns, in bytes."""
        shape = self.shape(key) if index is None else self.shape(key)[1:]
        return prod(shape) * self.dtype(key).itemsize

    def read(self, key: str, index: int | None = None, buffer: Tensor | None = None) -> Tensor:
        """One whole tensor, or only `tensor[index]` of it.

        Only the chunks that overlap are read. A chunk that lies in the result in one piece goes
        straight to its place; of others memory holds one beside the result.

        Args:
            buffer: bytes that the result is put into, at least `num_bytes`. Memory that was used
                before costs less than new memory, which the system clears first.

        Raises:
            UserError: an unknown key, or a data file that is missing, too short or damaged.
        """
        entry = self._entry(key)
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if index is not None:
            offsets[0], sizes[0] = index, 1
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [box])
        if buffer is None:
            buffer = torch.empty(self.num_bytes(key, index), dtype=torch.uint8)
        used = buffer[: self.num_bytes(key, index)]
        target = used.view(entry.properties.dtype).view(box.sizes)
        stored = sum(torch.Size(item.lengths).numel() for item in items)
        if stored != target.numel():
            raise UserError(
                f"{self.path}: {key} is incomplete, {stored} of {target.numel()} elements are "
                f"stored. Use another step."
            )
        self._check_chunks(item.storage_index for item in items)
        rest = [item for item in items if not self._read_in_place(item, target)]
        self._run(rest, target, key)
        return target if index is None else target.squeeze(0)

    def check_files(self, keys: Iterable[str] | None = None) -> None:
        """Raises UserError naming the first data file that is missing or too short.

        Args:
            keys: only the files of these tensors; None means of everything.
        """
        if keys is None:
            self._check_chunks(self._reader.storage_data)
        else:
            self._check_chunks(
                MetadataIndex(key, chunk.offsets)
                for key in keys
                for chunk in self._entry(key).chunks
            )

    def common_state(self) -> dict[str, Any]:
        """The small state beside the tensors: "args" (Megatron's arguments), "iteration", ...

        Values of classes outside Python's and torch's plain types come back as `Opaque`.
        Returns an empty dictionary if the checkpoint holds none.
        """
        legacy = self.path / _LEGACY_COMMON_STATE
        if legacy.is_file():
            return load_plain(legacy.read_bytes(), legacy)
        if _COMMON_STATE not in self._objects:
            return {}
        index = MetadataIndex(_COMMON_STATE)
        self._check_chunks([index])
        info = self._reader.storage_data[index]
        with (self.path / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            state = load_plain(file.read(info.length), self.path / info.relative_path)
        # a sharded object is stored as the list of its local shards
        return state[0] if isinstance(state, list) else state

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self._tensors:
            near = difflib.get_close_matches(key, self._tensors, n=3, cutoff=0.5)
            hint = f"Nearest names: {', '.join(near)}." if near else "It has no similar name."
            raise UserError(f"{self.path} holds no tensor {key!r}. {hint}")
        return self._tensors[key]

    def _check_chunks(self, indices: Iterable[MetadataIndex]) -> None:
        needed: dict[str, int] = {}
        for index in indices:
            info = self._reader.storage_data[index]
            end = info.offset + info.length
            needed[info.relative_path] = max(end, needed.get(info.relative_path, 0))
        for name, size in sorted(needed.items()):
            self._check_file(self.path / name, size)

    def _check_file(self, file: Path, size: int) -> None:
        if not file.is_file():
            raise UserError(
                f"{file} is missing: the index says it holds part of the model. {_REMEDY}"
            )
        if file.stat().st_size < size:
            raise UserError(
                f"{file} is cut short: {file.stat().st_size} bytes, at least {size} expected. "
                f"{_REMEDY}"
            )

    def _read_in_place(self, item: ReadItem, target: Tensor) -> bool:
        """Reads a chunk into the tensor if its bytes are one run of both; says whether it did."""
        part = _part(target, item)
        if not part.is_contiguous():
            return False
        info = self._reader.storage_data[item.storage_index]
        with (self.path / info.relative_path).open("rb", buffering=0) as file:
            begin = saved_bytes(file, info.offset, info.length, part)
            if begin is None:
                return False
            file.seek(begin)
            room = memoryview(part.reshape(-1).view(torch.uint8).numpy())
            while room:
                # the system reads at most 2 GB at once; the size has been checked
                count = file.readinto(room)
                if not count:
                    return False
                room = room[count:]
        return True

    def _run(self, items: list[ReadItem], target: Tensor, key: str) -> None:
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            names = {self._reader.storage_data[item.storage_index].relative_path for item in items}
            raise UserError(
                f"{self.path}: {key} cannot be read from {', '.join(sorted(names))}, which is "
                f"damaged ({str(error).splitlines()[0]}). {_REMEDY}"
            ) from error


class _Into(DefaultLoadPlanner):
    """Puts every chunk that is read into its place in one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return _part(self._target, read_item)


def _part(target: Tensor, item: ReadItem) -> Tensor:
    """What of a tensor one chunk fills."""
    for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
        target = target.narrow(dim, start, length)
    return target
