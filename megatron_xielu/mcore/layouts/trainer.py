"""One layout of one model on this rank: load, train, save, and say what this rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_xielu.mcore import patches
from megatron_xielu.mcore.layouts import model as models
from megatron_xielu.mcore.layouts.compare import Step, parameter_of
from megatron_xielu.mcore.layouts.grid import Layout, Model
from megatron_xielu.mcore.observer import LOSS
from megatron_xielu.mcore.pretrain import forward_tokens
from megatron_xielu.mcore.whole_state import WholeState

GLOBAL_BATCH = 8
# the fewest that a virtual pipeline of two stages takes
MICRO_BATCHES = 2
# Adam divides by the root mean square of a gradient. An epsilon near the gradients' size keeps it
# from blowing the round-off of a parameter with next to no gradient up to a whole learning rate.
ADAM_EPS = 1e-3
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Shard:
    """This rank's piece of one saved tensor."""

    key: str
    slices: tuple[slice | int, ...]
    """Where it lies in the whole."""
    shape: tuple[int, ...]
    """Of the whole."""
    data: Tensor
    """On the CPU."""


class Trainer:
    """The model of one layout with its optimizer.

    Args:
        micro_batches: how many each data-parallel rank cuts its share of the batch into.
    """

    def __init__(self, model: Model, layout: Layout, micro_batches: int = MICRO_BATCHES) -> None:
        self.layout = layout
        self.micro_batch = GLOBAL_BATCH // layout.dp // micro_batches
        patches.mend_optimizers()
        self.config, self.chunks = models.build(model, layout)
        self.optimizer, self.scheduler = _optimizer(layout, self.chunks)
        self._state = WholeState(
            self.chunks, self.optimizer, self.scheduler, distributed=layout.distributed
        )
        self._connect()

    def _connect(self) -> None:
        """What `megatron.training.training.train` sets on the config before its first step."""
        config = self.config
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        if self.layout.overlap:
            config.no_sync_func = _one_or_all([chunk.no_sync for chunk in self.chunks])

    def close(self) -> None:
        """Let the model go; its groups' threads end with it."""
        for chunk in self.chunks:
            # the wrapper and the graphs that a token dispatcher keeps hold each other through
            # autograd's C++ side, which Python's collector does not see
            chunk.__dict__.clear()

    def step(self, tokens: Tensor) -> Step:
        """One optimizer step on a whole batch.

        Args:
            tokens: [GLOBAL_BATCH, SEQ_LENGTH + 1], the same on all ranks.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        share = GLOBAL_BATCH // self.layout.dp
        first = parallel_state.get_data_parallel_rank() * share
        micro_batches = tokens[first : first + share].cuda().split(self.micro_batch)
        reported = get_forward_backward_func()(
            forward_step_func=forward_tokens,
            # every chunk of a virtual pipeline reads the batch from its beginning
            data_iterator=[iter(micro_batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            seq_length=models.SEQ_LENGTH,
            micro_batch_size=self.micro_batch,
            forward_only=False,
        )
        succeeded, grad_norm, _ = self.optimizer.step()
        assert succeeded
        self.scheduler.step(increment=1)
        return Step(_mean_loss(reported), float(grad_norm))

    def finish(self) -> None:
        """Bring the parameters up to date, which overlapped gathering leaves to the next step."""
        if self.layout.overlap and self.layout.distributed:
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()

    def save(self, folder: Path) -> list[Shard]:
        """A distributed checkpoint of model, optimizer and schedule; returns what it wrote.

        Args:
            folder: exists and is empty.
        """
        state = self._state.sharded()
        shards = _shards(state)
        self._state.save(folder, state)
        return shards

    def load(self, folder: Path) -> None:
        """Take everything `save` wrote, whatever layout it wrote it in."""
        self._state.load(folder)

    def plant(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take the fp32 values of a start of another precision; one rank, plain optimizer, fp32.

        Args:
            tensors: whole tensors by checkpoint key; a parameter's fp32 copy in the optimizer's
                state stands before the parameter.
            steps: optimizer steps that led there.
        """
        state = self._state.sharded(is_loading=True)
        exact = {
            name: tensor
            for key, tensor in tensors.items()
            for kind, name in [parameter_of(key)]
            if kind in ("param", "fp32_param")
        }
        for value in _sharded_tensors(state):
            whole = exact[value.key] if value.key in exact else tensors[value.key]
            value.data.detach().copy_(whole[value.global_slice()])
        for group in self.optimizer.param_groups:
            group["step"] = steps

    def shards(self) -> list[Shard]:
        """Copies of this rank's pieces of everything a checkpoint holds."""
        return _shards(self._state.sharded())


def _sharded_tensors(state: dict[str, Any]) -> list[ShardedTensor]:
    # experts' layers are split into their tensors only here
    apply_factories(state)
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


def _shards(state: dict[str, Any]) -> list[Shard]:
    return [
        Shard(
            value.key,
            value.global_slice(),
            tuple(value.global_shape),
            value.data.detach().cpu().clone(),
        )
        for value in _sharded_tensors(state)
    ]


def batch(step: int) -> Tensor:
    """The tokens of one step: [GLOBAL_BATCH, SEQ_LENGTH + 1], always the same."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (GLOBAL_BATCH, models.SEQ_LENGTH + 1)
    # few distinct tokens, so that there is something to learn in a few steps
    return torch.randint(0, models.VOCAB // 4, shape, generator=generator)


def _optimizer(layout: Layout, chunks: list[Any]) -> tuple[Any, OptimizerParamScheduler]:
    config = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        min_lr=LEARNING_RATE,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_eps=ADAM_EPS,
        clip_grad=1.0,
        bf16=layout.bf16,
        params_dtype=torch.bfloat16 if layout.bf16 else torch.float32,
        use_distributed_optimizer=layout.distributed,
        overlap_param_gather=layout.overlap and layout.distributed,
    )
    overrides = {**get_standard_config_overrides(config), **patches.alpha_group(config)}
    optimizer = get_megatron_optimizer(config, chunks, overrides)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LEARNING_RATE,
        min_lr=LEARNING_RATE,
        lr_warmup_steps=0,
        lr_decay_steps=1000,
        lr_decay_style="constant",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1000,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def _mean_loss(reported: list[dict[str, Tensor]]) -> float:
    """Of all tokens; in float64, so that reporting adds no round-off of its own."""
    total = torch.zeros(2, dtype=torch.float64, device="cuda")
    for entry in reported:
        total += entry[LOSS].double()
    # only the last stages have a loss; the other ranks add zeros, tensor-parallel copies cancel
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1])


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions
