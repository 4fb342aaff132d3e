"""Read a Megatron `torch_dist` checkpoint with torch alone: no Megatron, no process group, no GPU.

A checkpoint folder holds an index (`.metadata`, a pickle) and data files (`*.distcp`). The index
says for every tensor which box of it lies at which bytes of which file, so any slice can be put
together whatever tensor and pipeline parallelism wrote it. Both pickles that are read here, the
index and the saved arguments, may name only the classes they need: a checkpoint from elsewhere can
run no code.
"""

from __future__ import annotations

import argparse
import difflib
import io
import pathlib
import pickle
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_xielu.errors import UserError

INDEX = ".metadata"
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
        metadata = _read_index(self.path)
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

    def read(self, key: str, index: int | None = None) -> Tensor:
        """One whole tensor, or only `tensor[index]` of it.

        Only the chunks that overlap are read; memory is the result and the largest chunk.

        Raises:
            UserError: an unknown key, or a data file that is missing, too short or damaged.
        """
        entry = self._entry(key)
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if index is not None:
            offsets[0], sizes[0] = index, 1
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [box])
        target = torch.empty(box.sizes, dtype=entry.properties.dtype)
        stored = sum(torch.Size(item.lengths).numel() for item in items)
        if stored != target.numel():
            raise UserError(
                f"{self.path}: {key} is incomplete, {stored} of {target.numel()} elements are "
                f"stored. Use another step."
            )
        self._check_chunks(item.storage_index for item in items)
        self._run(items, target, key)
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
            return _load_plain(legacy.read_bytes(), legacy)
        if _COMMON_STATE not in self._objects:
            return {}
        index = MetadataIndex(_COMMON_STATE)
        self._check_chunks([index])
        info = self._reader.storage_data[index]
        with (self.path / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            state = _load_plain(file.read(info.length), self.path / info.relative_path)
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

    def _run(self, items: list[ReadItem], target: Tensor, key: str) -> None:
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            names = {self._reader.storage_data[item.storage_index].relative_path for item in items}
            raise UserError(
                f"{self.path}: {key} cannot be read from {', '.join(sorted(names))}, which is "
                f"damaged ({str(error).splitlines()[0]}). {_REMEDY}"
            ) from error


class Opaque:
    """Stands for a value whose class is not loaded."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Into(DefaultLoadPlanner):
    """Puts every chunk that is read into its place in one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dim, start, length)
        return view


def _read_index(path: Path) -> Metadata:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; a checkpoint is a folder like iter_0000200.")
    index = path / INDEX
    if not index.is_file():
        raise UserError(
            f"{path} is not a finished torch_dist checkpoint: it has no {INDEX} file, which is "
            f"written last. Use another step, or save with --ckpt-format torch_dist."
        )
    try:
        metadata = _IndexUnpickler(io.BytesIO(index.read_bytes())).load()
    except UserError:
        raise
    except Exception as error:
        # a damaged pickle fails in many ways, none of which tells the user more than its name
        raise UserError(f"{index} is damaged ({type(error).__name__}). {_REMEDY}") from error
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise UserError(f"{index} is not the index of a torch_dist checkpoint.")
    return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Allows the classes an index consists of; Megatron's own additions become `Opaque`."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.partition(".")[0] == "megatron":
            return Opaque
        raise UserError(
            f"The checkpoint's {INDEX} names {module}.{name}, which no index needs and which could "
            f"run code. It is not read; get the checkpoint from its source again."
        )


_INDEX_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}


def _load_plain(data: bytes, source: Path) -> Any:
    """`torch.load` of plain values only; other classes are replaced by `Opaque`, never imported."""
    # the answer must not depend on what else this process has imported: Megatron, once it is, has
    # registered its classes
    registered = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        return _load_registering(data, source)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(registered)


def _load_registering(data: bytes, source: Path) -> Any:
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    known = {"argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath"}
    allowed: list[Any] = [argparse.Namespace, types.SimpleNamespace, pathlib.PosixPath]
    allowed += [(Opaque, name) for name in unknown if name not in known]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"The saved arguments in {source} cannot be read ({str(error).splitlines()[0]}). "
            f"{_REMEDY}"
        ) from error
