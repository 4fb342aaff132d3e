"""Edits the index of a checkpoint, to make checkpoints that Megatron would not write."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex


def edit_index(step: Path, edit: Callable[[Metadata], None]) -> None:
    """Loads `.metadata`, lets `edit` change it, and writes it back."""
    file = step / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))


def rename_keys(step: Path, rename: Callable[[str], str | None]) -> None:
    """Gives every key another name; None removes it."""

    def edit(metadata: Metadata) -> None:
        metadata.state_dict_metadata = {
            new: entry
            for key, entry in metadata.state_dict_metadata.items()
            if (new := rename(key)) is not None
        }
        metadata.storage_data = {
            MetadataIndex(new, index.offset, index.index): info
            for index, info in metadata.storage_data.items()
            if (new := rename(index.fqn)) is not None
        }

    edit_index(step, edit)
