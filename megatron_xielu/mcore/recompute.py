"""fc2's input is not kept for backward, but computed again from the activation's own input.

The one tensor that fc2 saved is replaced by the way to make it again. Megatron's output-discarding
checkpoint empties the output's memory instead, under everybody who still holds the output, fills it
by a C++ extension compiled at the first backward, and copies random states for a function that has
none. torch's default saved-tensor hooks around fc2 would hand its backward a weight without the
attributes that the fused gradient accumulation and DDP leave on it; hooks on the one saved tensor
leave the weight, and whatever else is saved, alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def recompute_output(mlp: MLP) -> None:
    """Let an MLP with an installed xIELU keep the activation's input alone, not its output.

    Works for any fc2 that saves its input as it is: Megatron's linear layers, and
    TransformerEngine's outside FP8. For an expert the product of output and router probability,
    which is fc2's input there, is made again as well. Inside Megatron's own recomputation nothing
    is done. Gradients keep their bits.
    """
    exchange = _Exchange()
    mlp.register_forward_pre_hook(exchange.begin, with_kwargs=True)
    mlp.activation_func.register_forward_hook(exchange.activated)
    mlp.linear_fc2.register_forward_hook(exchange.projected)


def recomputed_by_megatron(config: TransformerConfig) -> str | None:
    """Megatron's setting that recomputes every MLP as a whole, or None; ours saves nothing then."""
    if config.recompute_granularity == "full" and config.recompute_method == "uniform":
        return "--recompute-granularity full --recompute-method uniform"
    if config.recompute_granularity == "selective":
        modules = config.recompute_modules or []
        # a mixture's experts are recomputed by a name of their own
        all_mlps = {"mlp"} if config.num_moe_experts is None else {"mlp", "moe"}
        if all_mlps.issubset(modules):
            return f"--recompute-granularity selective --recompute-modules {' '.join(modules)}"
    return None


class _Exchange:
    """What one MLP's forward pass leaves between its activation and its fc2."""

    def __init__(self) -> None:
        self.scale: Tensor | None = None
        self.made: tuple[Tensor, Callable[[], Tensor]] | None = None

    def begin(self, mlp: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.made = None
        self.scale = args[1] if len(args) > 1 else kwargs.get("per_token_scale")

    def activated(self, activation: Any, args: tuple[Tensor], y: Tensor) -> None:
        self.made = None
        if y.requires_grad and y.numel():
            self.made = y, activation.again(args[0], y)

    def projected(self, fc2: nn.Module, args: tuple[Tensor], outputs: Any) -> None:
        made, scale = self.made, self.scale
        self.made = self.scale = None
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        if made is None or output.grad_fn is None or is_checkpointing():
            return
        # those of activation offloading: asking for a saved tensor would bring it back
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            _warn("other hooks hold what fc2 saves (activation offloading)")
            return
        y, make = made
        again = {_storage(y): make}
        ends = {y.grad_fn}
        if scale is not None:
            again[_storage(args[0])] = partial(_scaled, make, scale.detach())
            ends.add(scale.grad_fn)
        if not _replace(output.grad_fn, ends, again):
            _warn("fc2 saves no input, or a copy of its own (FP8)")


def _scaled(make: Callable[[], Tensor], scale: Tensor) -> Tensor:
    # as MLP.forward computes an expert's
    y = make()
    return (y * scale.unsqueeze(-1)).to(y.dtype)


class _Again:
    """Stands for a saved tensor: how to make its memory again, and how it lies therein."""

    def __init__(self, make: Callable[[], Tensor], tensor: Tensor) -> None:
        self.make = make
        self.layout = (tensor.size(), tensor.stride(), tensor.storage_offset())

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.make().as_strided(*self.layout)


def _replace(start: Any, ends: set[Any], again: dict[int, Callable[[], Tensor]]) -> int:
    """Replace the tensors in `again`, by storage, that nodes from `start` down to `ends` saved."""
    count, seen, waiting = 0, set(ends), [start]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for saved, tensor in _saved(node):
            make = again.get(_storage(tensor))
            if make is not None:
                saved.register_hooks(partial(_Again, make), _Again.__call__)
                count += 1
        waiting += [parent for parent, _ in node.next_functions]
    return count


def _saved(node: Any) -> Iterator[tuple[Any, Tensor]]:
    """Every tensor that an autograd node saved, with torch's handle of it."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        pairs = list(zip(node._raw_saved_tensors, node.saved_tensors, strict=True))
    else:
        names = [name for name in dir(node) if name.startswith("_raw_saved_")]
        pairs = [(getattr(node, name), getattr(node, name.removeprefix("_raw"))) for name in names]
    yield from ((saved, tensor) for saved, tensor in pairs if isinstance(tensor, Tensor))


def _storage(tensor: Tensor) -> int:
    # not the address of its data, which subclasses have none of
    return int(tensor.untyped_storage()._cdata)


def _warn(reason: str) -> None:
    warnings.warn(f"xielu.recompute saves nothing here: {reason}", stacklevel=2)
