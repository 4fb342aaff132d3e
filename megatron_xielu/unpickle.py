"""Read the pickles of a checkpoint without running what they name.

A pickle may call any function it names. Those of a torch_dist checkpoint, its index and the small
objects beside the tensors, need a few classes, and no others are looked up here.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import pickle
import types
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_xielu.errors import UserError

INDEX = ".metadata"
_REMEDY = "Copy the checkpoint again, or use another step."


class Opaque:
    """Stands for a value whose class is not loaded."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_index(path: Path) -> Metadata:
    """The index of a checkpoint folder.

    Raises:
        UserError: the folder is no finished checkpoint, the index is damaged, or it names something
            that could run code.
    """
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
    """Allows the classes an index consists of; those of older Megatrons become `Opaque`."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if f"{module}.{name}" in _OPAQUE_CLASSES:
            return Opaque
        raise UserError(
            f"The checkpoint's {INDEX} names {module}.{name}, which no index needs and which could "
            f"run code. It is not read; get the checkpoint from its source again."
        )


_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_OPAQUE_CLASSES = {f"{_MEGATRON}.MCoreMetadata", f"{_MEGATRON}.MCoreSavePlan"}
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


def load_plain(data: bytes, source: Path) -> Any:
    """`torch.load` of plain values only; other classes are replaced by `Opaque`, never imported."""
    # the answer must not depend on what else this process has imported: Megatron, once it is, has
    # registered its classes
    registered = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        return _load_registered(data, source)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(registered)


def _load_registered(data: bytes, source: Path) -> Any:
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    known = {"argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath"}
    allowed: list[Any] = [argparse.Namespace, types.SimpleNamespace, pathlib.PosixPath]
    allowed += [(Opaque, name) for name in unknown if name not in known]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"The saved arguments in {source} cannot be read ({reason(error)}). {_REMEDY}"
        ) from error


def reason(error: Exception) -> str:
    """Why torch does not load a pickle, without its advice to load it anyway."""
    lines = str(error).splitlines()
    named = [line for line in lines if "GLOBAL" in line or "WeightsUnpickler" in line]
    return (named or lines)[0].strip().partition(". ")[0]
