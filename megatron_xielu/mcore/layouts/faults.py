"""Known faults, planted on purpose, so that tests show that the matrix would find them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from megatron.core.transformer import transformer_block, transformer_layer

import megatron_xielu.mcore.activation as activation
from megatron_xielu.mcore.layouts.grid import Layout


@contextmanager
def planted(name: str | None, layout: Layout) -> Iterator[None]:
    """Break one thing of `grid.FAULTS` while a layout is built and trained; None breaks nothing."""
    with ExitStack() as stack:
        if name == "vpp-offset":
            _swap_chunks(stack, layout)
        elif name is not None:
            breaks = {
                "no-tp-sum": _no_sum,
                "tp-mean": _mean,
                "expert-average": _average_experts,
            }[name]
            stack.enter_context(patch.object(activation, "_build", _broken(breaks)))
        yield


def _broken(breaks: Callable[[Any], None]) -> Callable[..., Any]:
    build = activation._build

    def build_broken(*args: Any, **kwargs: Any) -> Any:
        module = build(*args, **kwargs)
        breaks(module)
        return module

    return build_broken


def _no_sum(module: Any) -> None:
    """Each tensor-parallel rank keeps the gradient of its own columns."""
    module.sum_in_backward = False
    for alpha in (module.alpha_p, module.alpha_n):
        alpha.sequence_parallel = False


def _mean(module: Any) -> None:
    """The ranks' gradients are averaged in place of summed."""
    for alpha in (module.alpha_p, module.alpha_n):
        alpha.register_hook(lambda gradient: gradient / module.tp_group.size())


def _average_experts(module: Any) -> None:
    """Data parallelism takes different experts' alphas for copies of one."""
    for alpha in (module.alpha_p, module.alpha_n):
        alpha.allreduce = True


def _swap_chunks(stack: ExitStack, layout: Layout) -> None:
    """A rank's chunks are taken for neighbours: chunk v of rank p for number p * VPP + v."""
    if layout.vpp == 1:
        return

    def wrong(config: Any, vp_stage: int | None = None, pp_rank: int | None = None) -> int:
        rank = right(config, vp_stage=0, pp_rank=pp_rank) // _per_chunk(config)
        return (rank * layout.vpp + (vp_stage or 0)) * _per_chunk(config)

    right = transformer_layer.get_transformer_layer_offset
    for module in (transformer_layer, transformer_block):
        stack.enter_context(patch.object(module, "get_transformer_layer_offset", wrong))


def _per_chunk(config: Any) -> int:
    chunks = config.pipeline_model_parallel_size * config.virtual_pipeline_model_parallel_size
    return int(config.num_layers // chunks)
