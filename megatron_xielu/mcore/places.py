"""Places in a model by names that every rank understands: layers count from 1 over the pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from megatron.core import mpu
from torch import nn

_WRAPPERS = re.compile(r"^(?:module\.)+")
_LAYER = re.compile(r"^(?P<layer>(?P<block>.*?)layers\.(?P<index>\d+))(?:\.(?P<inside>.+))?$")


def place(chunk: nn.Module, path: str) -> str:
    """`layer 7, mlp.linear_fc1` for a dotted path to a module or parameter of a model chunk."""
    found = _LAYER.match(path)
    if found is None:
        return _WRAPPERS.sub("", path)
    layer = chunk.get_submodule(found["layer"])
    number = getattr(layer, "layer_number", int(found["index"]) + 1)
    # multi-token prediction counts its layers from 1 again
    kind = "MTP layer" if _WRAPPERS.sub("", found["block"]).startswith("mtp") else "layer"
    return f"{kind} {number}, {found['inside']}" if found["inside"] else f"{kind} {number}"


def parameters(model: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """(place, parameter) of all of this rank's model chunks, in forward order of each chunk."""
    for chunk in model:
        for path, parameter in chunk.named_parameters():
            yield place(chunk, path), parameter


def pipeline_position(chunk_index: int) -> int:
    """Where this rank's chunk stands among all chunks of the pipeline, from 0."""
    stages = int(mpu.get_pipeline_model_parallel_world_size())
    return chunk_index * stages + int(mpu.get_pipeline_model_parallel_rank())
