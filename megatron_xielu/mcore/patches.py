"""The places where Megatron leaves no other way in: one function each, idempotent, named.

Every function replaces or wraps one attribute of one Megatron module; `contract` holds a check of
each of them, and a test fails with the name of the upstream symbol that moved.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import megatron.core.datasets.utils
import megatron.core.distributed.distributed_data_parallel
import megatron.core.optimizer
import megatron.core.optimizer.distrib_optimizer
import megatron.training.ft_integration
import megatron.training.global_vars
import megatron.training.training
import torch
from megatron.core.optimizer import OptimizerConfig, ParamKey

from megatron_xielu.errors import UserError
from megatron_xielu.mcore.adamw import GroupStepAdamW
from megatron_xielu.mcore.chained_state import match_optimizers


@contextmanager
def command_line(argv: Sequence[str]) -> Iterator[None]:
    """Megatron's parser reads `sys.argv`; this lends it one."""
    kept, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        yield
    finally:
        sys.argv = kept


def skip_dataset_helper_build() -> None:
    """Do not run `make` for the dataset helpers when they are built already.

    `megatron.core.datasets.utils.compile_helpers` runs make in the installed package; the wheel
    ships the compiled helpers without the Makefile, and Megatron then exits.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        megatron.core.datasets.utils.compile_helpers = _helpers_are_built


def _helpers_are_built() -> None:
    return None


def mend_optimizers() -> None:
    """All repairs of Megatron's optimizers and their checkpoints; before the model is built."""
    use_group_step_adamw()
    save_padded_buckets_right()
    load_across_expert_optimizers()
    keep_types_apart_on_gloo()


def use_group_step_adamw() -> None:
    """Give Megatron an AdamW its distributed checkpoints can hold, if it has no fused Adam."""
    if megatron.core.optimizer.USING_PYTORCH_OPTIMIZER:
        megatron.core.optimizer.Adam = GroupStepAdamW
        megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = False
        megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE = True


def save_padded_buckets_right() -> None:
    """Let the distributed optimizer save the state of each parameter where gradients have buckets.

    `DistributedOptimizer.sharded_param_state_fully_reshardable` (Megatron-Core 0.19.2) gathers the
    state without the padding between buckets, then looks parameters up at their places in the
    padded buffer: with more than one bucket it saves shifted moments and fp32 parameters, without
    a word. Buckets are padded to a multiple of 128 and of the data-parallel size, which alphas of
    one element alone make necessary.
    """
    optimizer = megatron.core.optimizer.distrib_optimizer.DistributedOptimizer
    save = _unwrapped(optimizer.sharded_param_state_fully_reshardable)

    @functools.wraps(save)
    def unpadded(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = _without_padding(buffer)
            return save(self, *args, **kwargs)
        finally:
            for buffer, index_map in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = index_map

    optimizer.sharded_param_state_fully_reshardable = unpadded


def _without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    before = [0, *itertools.accumulate(padding)]
    return {
        param: (start - before[bucket], end - before[bucket], bucket)
        for param, (start, end, bucket) in buffer.param_index_map.items()
    }


def load_across_expert_optimizers() -> None:
    """Let `ChainedOptimizer.load_state_dict` take the state of another number of optimizers.

    Experts that are spread over ranks have an optimizer of their own, others have not.
    """
    optimizer = megatron.core.optimizer.ChainedOptimizer
    load = _unwrapped(optimizer.load_state_dict)

    @functools.wraps(load)
    def matched(self: Any, state_dict: Any) -> None:
        load(self, match_optimizers(self, state_dict))

    optimizer.load_state_dict = matched


def keep_types_apart_on_gloo() -> None:
    """Let no bucket group hold parameters of two types where gloo gathers them.

    torch 2.13's gloo gives wrong values from a coalesced all-gather of tensors of several types,
    and a virtual pipeline puts all of a chunk's buckets into one group, which
    `megatron.core.distributed.distributed_data_parallel.partition_buckets` gathers so: bf16 weights
    and fp32 alphas. NCCL gathers each with its own type.
    """

    def apart(partition: Callable[..., Any]) -> Callable[..., Any]:
        def partitioned(buffers: Any, force_single_bucket_group: bool = False, **flags: Any) -> Any:
            on_gloo = torch.distributed.get_backend() == "gloo"
            return partition(buffers, force_single_bucket_group and not on_gloo, **flags)

        return partitioned

    wrap(megatron.core.distributed.distributed_data_parallel, "partition_buckets", apart)


def group_alphas(lr_mult: float | None = None) -> None:
    """Give the alphas an optimizer parameter group of their own, and a learning rate.

    `megatron.training.training.get_megatron_optimizer_config` is where Megatron decides on
    per-parameter overrides, without a place to add one. The group matters at any rate: Megatron's
    distributed optimizer puts the fp32 parameters of a group first and later indexes them in their
    old order, so fp32 alphas among bf16 norms would break its checkpoints.

    Args:
        lr_mult: learning rate relative to the other parameters; None leaves what was set before,
            which is 1 at first.
    """
    training = megatron.training.training
    build = _unwrapped(training.get_megatron_optimizer_config)
    if lr_mult is None and build is not training.get_megatron_optimizer_config:
        return
    multiplier = 1.0 if lr_mult is None else lr_mult

    @functools.wraps(build)
    def with_alphas(args: Any) -> tuple[Any, dict[Any, Any]]:
        _check_optimizer_can_save(args)
        config, overrides = build(args)
        return config, {**(overrides or {}), **alpha_group(config, multiplier)}

    training.get_megatron_optimizer_config = with_alphas


def alpha_group(config: OptimizerConfig, multiplier: float = 1.0) -> dict[ParamKey, Any]:
    """The `config_overrides` entry that makes the alphas a parameter group of their own.

    Args:
        multiplier: learning rate relative to the other parameters.
    """
    # loading a checkpoint tells groups apart by these values; without the last two this group
    # would look like the norms'
    own = {"max_lr": config.lr * multiplier, "min_lr": config.min_lr * multiplier}
    own |= {"start_wd": 0.0, "end_wd": 0.0}
    return {ParamKey(name="*.activation_func.alpha_*"): own}


def _check_optimizer_can_save(args: Any) -> None:
    sharded = args.use_distributed_optimizer or args.use_megatron_fsdp or args.use_torch_fsdp2
    if (args.bf16 or args.fp16) and not sharded:
        raise UserError(
            "xIELU's alphas stay fp32 in a bf16 or fp16 model, and Megatron's plain optimizer "
            "cannot save such a mixture: add --use-distributed-optimizer"
        )


def wrap_training(
    name: str, make_wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Wrap function `name` of `megatron.training.training`, once however often it is called."""
    wrap(megatron.training.training, name, make_wrapper)


def wrap(
    owner: Any, name: str, make_wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Wrap function `name` of a module or class, once however often it is called."""
    original = _unwrapped(getattr(owner, name))
    setattr(owner, name, functools.wraps(original)(make_wrapper(original)))


def use_signal_handler(handler: Any, listen: Callable[[int], None]) -> None:
    """Let Megatron's loop ask `handler.signals_received()` after every step.

    Megatron makes its own handler when its globals are set, and forgets a signal that came before.

    Args:
        listen: called with the number of Megatron's --exit-signal instead.
    """

    def set_signal_handler(exit_signal: int) -> None:
        listen(exit_signal)
        megatron.training.global_vars._GLOBAL_SIGNAL_HANDLER = handler

    original = _unwrapped(megatron.training.global_vars._set_signal_handler)
    wrapper = functools.wraps(original)(set_signal_handler)
    megatron.training.global_vars._set_signal_handler = wrapper


def before_each_evaluation_batch(action: Callable[[], None]) -> None:
    """Call `action` on every rank before each batch of Megatron's evaluation.

    `megatron.training.ft_integration.on_eval_step_start` is what Megatron calls there, outside the
    pipeline's schedule, so that `action` may hold a collective and may raise on all ranks.
    """
    original = _unwrapped(megatron.training.ft_integration.on_eval_step_start)

    @functools.wraps(original)
    def with_action() -> None:
        action()
        original()

    megatron.training.ft_integration.on_eval_step_start = with_action


def tolerate_repeated_hook_switches() -> None:
    """Let Megatron switch off hooks that are off, and on those that are on.

    With overlapped parameter gathers, `megatron.training.training.train` switches the forward hooks
    on after the first step that was not skipped, but an evaluation before that switches them off
    and on regardless and fails (KeyError).
    """
    wrap_training("disable_forward_pre_hook", functools.partial(_for_chunks, with_hooks=True))
    wrap_training("enable_forward_pre_hook", functools.partial(_for_chunks, with_hooks=False))


def _for_chunks(switch: Callable[..., None], *, with_hooks: bool) -> Callable[..., None]:
    def switched(model_chunks: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        chosen = [
            chunk
            for chunk in model_chunks
            if bool(chunk.remove_forward_pre_hook_handles) == with_hooks
        ]
        if chosen:
            switch(chosen, *args, **kwargs)

    return switched


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(function, "__wrapped__", function)
