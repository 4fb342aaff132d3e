"""Load checkpoints of the swiss-ai fork of Megatron, and of other layers than the model's own.

The fork saved alphas as (layers,) or (layers, 1), often in bf16; here they are (layers, 1) in fp32.
Copying converts the type; the shape is converted by asking for the stored one. TransformerEngine's
modules ask for an extra state, some of which no local layer has saved: they get none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing
import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_xielu.mcore import patches
from megatron_xielu.unpickle import read_index

_EXTRA_STATE = "._extra_state"
_ALPHA = ".activation_func.alpha_"


def enable() -> None:
    """Let `dist_checkpointing.load` read such checkpoints; it says what it converts."""
    patches.wrap(megatron.core.dist_checkpointing, "load", _converting)


def _converting(load: Callable[..., Any]) -> Callable[..., Any]:
    def converted(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        stored = read_index(Path(checkpoint_dir)).state_dict_metadata
        told: set[str] = set()

        def as_stored(value: Any) -> Any:
            if isinstance(value, ShardedObject) and value.key.endswith(_EXTRA_STATE):
                return value if value.unique_key in stored else LocalNonpersistentObject(None)
            if not isinstance(value, ShardedTensor) or _ALPHA not in value.key:
                return value
            entry = stored.get(value.key)
            if not isinstance(entry, TensorStorageMetadata):
                return value
            size, dtype = tuple(entry.size), entry.properties.dtype
            if (size, dtype) != (value.global_shape, value.dtype) and value.key not in told:
                told.add(value.key)
                _tell(f"{value.key}: {size} {dtype}, read as {value.global_shape} {value.dtype}")
            return _flat(value) if size == value.global_shape[:1] else value

        wanted = dict_list_map_outplace(as_stored, sharded_state_dict)
        return load(wanted, checkpoint_dir, *args, **kwargs)

    return converted


def _flat(alpha: ShardedTensor) -> ShardedTensor:
    """One layer's alpha as an entry of a vector of all layers' alphas."""
    return replace(
        alpha,
        local_shape=(1,),
        global_shape=alpha.global_shape[:1],
        global_offset=alpha.global_offset[:1],
        axis_fragmentations=alpha.global_shape[:1],
        prepend_axis_num=0,
    )


def _tell(text: str) -> None:
    if torch.distributed.get_rank() == 0:
        print(f"converted from the checkpoint: {text}", flush=True)
