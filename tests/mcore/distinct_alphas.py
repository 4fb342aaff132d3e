"""A layer spec whose layers start with alphas of their own, for Megatron's --spec."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from megatron_xielu.mcore.layer_specs import xielu_layer_spec


def spec(config: Any, vp_stage: int | None = None) -> Any:
    """xielu_layer_spec; layer i starts at alpha_p = 0.2 + 0.3 i, alpha_n = -1 + 0.2 i."""
    block = xielu_layer_spec(config, vp_stage)
    numbers = itertools.count()

    for layer in {id(layer): layer for layer in block.layer_specs}.values():
        layer.submodules.mlp = _numbered(layer.submodules.mlp, numbers)
    return block


def _numbered(build_mlp: Any, numbers: Any) -> Any:
    @torch.no_grad()
    def build(*args: Any, **kwargs: Any) -> Any:
        mlp = build_mlp(*args, **kwargs)
        index = next(numbers)
        mlp.activation_func.alpha_p.fill_(0.2 + 0.3 * index)
        mlp.activation_func.alpha_n.fill_(-1.0 + 0.2 * index)
        return mlp

    return build
