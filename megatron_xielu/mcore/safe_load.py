"""Let Megatron load a checkpoint only after its pickles were found to run no code.

torch reads a checkpoint's index with plain `pickle.load`, and the objects beside the tensors, such
as random states, with `torch.load(weights_only=False)`: a file from elsewhere could run anything.
Each is read by a restricted unpickler first, and then by torch as before.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from megatron_xielu.errors import UserError
from megatron_xielu.mcore import patches
from megatron_xielu.unpickle import read_index, reason


def enable() -> list[UserError]:
    """Guard every load of this process.

    Returns:
        What was refused so far, filled as it happens: torch turns an error into others of its own.
    """
    refused: list[UserError] = []

    def refuse(what: str, error: Exception) -> UserError:
        refused.append(
            UserError(
                f"{what} is not what Megatron saves and could run code ({reason(error)}). It is "
                "not loaded; get the checkpoint from its source again."
            )
        )
        return refused[-1]

    def after_a_safe_look(read: Callable[..., Metadata]) -> Callable[..., Metadata]:
        def guarded(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
            try:
                read_index(Path(self.path))
            except UserError as error:
                refused.append(error)
                raise
            return read(self, *args, **kwargs)

        return guarded

    def weights_only(load_bytes: Callable[..., None]) -> Callable[..., None]:
        def guarded(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
            try:
                # Megatron has registered the classes its own states consist of
                torch.load(value, weights_only=True)
            except pickle.UnpicklingError as error:
                raise refuse(f"{read_item.storage_index.fqn} of the checkpoint", error) from error
            value.seek(0)
            load_bytes(self, read_item, value)

        return guarded

    def named(load_common: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(checkpoint_dir: str) -> Any:
            try:
                return load_common(checkpoint_dir)
            except pickle.UnpicklingError as error:
                raise refuse(str(Path(checkpoint_dir) / "common.pt"), error) from error

        return guarded

    patches.wrap(FileSystemReader, "read_metadata", after_a_safe_look)
    patches.wrap(DefaultLoadPlanner, "load_bytes", weights_only)
    patches.wrap(serialization, "load_common", named)
    return refused
