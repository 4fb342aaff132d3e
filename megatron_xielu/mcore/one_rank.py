"""A model that one rank trains step by step, for xIELU and what it is compared with.

Local layers compute in bf16 or emulated FP8 on any machine, TransformerEngine's in bf16 or FP8 on a
GPU. The loss curves of docs/fp8-emulation.md, `doctor` and `bench --training` train it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from megatron_xielu.mcore import fp8_emulation, patches
from megatron_xielu.mcore.activation import ParallelXIELU, XIELUPlaceholder
from megatron_xielu.mcore.fp8_emulation import FP8Settings, Statistics
from megatron_xielu.mcore.layer_specs import (
    install_on_chunks,
    stock_layer_spec,
    use_xielu,
    xielu_layer_spec,
)
from megatron_xielu.mcore.layouts.grid import Layout
from megatron_xielu.mcore.layouts.world import cut
from megatron_xielu.mcore.observer import LOSS
from megatron_xielu.mcore.pretrain import forward_tokens
from megatron_xielu.mcore.whole_state import WholeState
from megatron_xielu.ops.dispatch import Impl

LEARNING_RATE, WARMUP, DECAY_SHARE = 3e-3, 20, 0.2
VALID_BATCHES = 32

Tokens = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Sizes:
    """Of a model and its batch; the defaults are those of the loss curves."""

    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    ffn_hidden_size: int = 768
    """Of an MLP that is not gated; a multiple of 3."""
    seq_length: int = 128
    global_batch_size: int = 8
    init_std: float = 0.025


@dataclass(frozen=True)
class Run:
    """What is trained; equal seeds mean equal weights (where shapes allow) and equal batches."""

    activation: Literal["xielu", "relu2", "swiglu"] = "xielu"
    fp8: FP8Settings = field(default_factory=FP8Settings)
    """Emulated in local layers."""
    seed: int = 1
    micro_batches: int = 1
    """Cuts a step's batch, which changes nothing but the order of roundings."""
    steps: int = 300
    sizes: Sizes = field(default_factory=Sizes)
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    impl: Impl = "auto"
    """Of xIELU."""
    compiled: bool = False
    """xIELU goes through torch.compile, which sees into the impl "reference" alone."""
    fused: bool = False
    """xIELU is an operation of TransformerEngine's fuser; Megatron has none for the others."""
    cuda_graphs: bool = False
    """Megatron captures each of TransformerEngine's layers (--cuda-graph-impl local)."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: the loss in nats per token, and what FP8 did to each operand."""

    loss: float
    statistics: dict[str, Statistics]


@contextmanager
def only_rank(backend: str) -> Iterator[None]:
    """This process as torch's and Megatron's whole world.

    Args:
        backend: gloo or nccl.
    """
    torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        with cut(Layout()):
            yield
    finally:
        torch.distributed.destroy_process_group()


class Training:
    """A model with its optimizer on one rank; Megatron's groups exist.

    With TransformerEngine's layers the newest model alone can train.

    Args:
        run: what to train.
        vocab_size: every token is below it.
    """

    def __init__(self, run: Run, vocab_size: int) -> None:
        self.run = run
        patches.mend_optimizers()
        if run.transformer_impl == "transformer_engine":
            from megatron_xielu.mcore import delayed_scaling

            delayed_scaling.save_as_numbers(needed=run.fp8.recipe == "delayed")
            delayed_scaling.forget_models()
        torch.manual_seed(run.seed)
        # as Megatron's own training sets both for its graphs
        model_parallel_cuda_manual_seed(
            run.seed,
            te_rng_tracker=run.cuda_graphs,
            use_cudagraphable_rng=run.cuda_graphs,
            force_reset_rng=True,
        )
        self._config, self._chunks = _build(run, vocab_size)
        self._optimizer, self._scheduler = _optimizer(run.steps, self._chunks)
        self._config.grad_scale_func = self._optimizer.scale_loss
        self._config.finalize_model_grads_func = finalize_model_grads
        self.parameters = sum(p.numel() for chunk in self._chunks for p in chunk.parameters())
        self._state = WholeState(self._chunks, self._optimizer, self._scheduler, distributed=True)

    def steps(self, tokens: Tokens) -> Iterator[Step]:
        """Train on random windows of a text of token ids, a `Step` each."""
        generator = torch.Generator().manual_seed(1000 + self.run.seed)
        for _ in range(self.run.steps):
            loss = self.step(self._windows(tokens, generator))
            yield Step(loss, fp8_emulation.take_statistics(self._chunks[0]))

    def step(self, batch: Tensor) -> float:
        """One optimizer step; returns the loss before it, in nats per token.

        Args:
            batch: [global_batch_size, seq_length + 1] token ids.
        """
        for chunk in self._chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        loss = self._pass(batch)
        succeeded, _, _ = self._optimizer.step()
        assert succeeded
        self._scheduler.step(increment=1)
        return loss

    def held_out_loss(self, tokens: Tokens) -> float:
        """Nats per token of windows that are the same for all runs."""
        generator = torch.Generator().manual_seed(0)
        for chunk in self._chunks:
            chunk.eval()
        with torch.no_grad():
            losses = [
                self._pass(self._windows(tokens, generator), forward_only=True)
                for _ in range(VALID_BATCHES)
            ]
        return sum(losses) / len(losses)

    def save(self, folder: Path) -> None:
        """A distributed checkpoint in a folder that exists and is empty."""
        self._state.save(folder)

    def load(self, folder: Path) -> None:
        """Go on where `save` was called."""
        self._state.load(folder)

    def alphas(self) -> dict[str, float]:
        """xIELU's parameters by name, before softplus; empty for other activations."""
        return {
            f"{name}.{which}": float(getattr(module, which))
            for chunk in self._chunks
            for name, module in chunk.named_modules()
            if isinstance(module, ParallelXIELU)
            for which in ("alpha_p", "alpha_n")
        }

    def differing(self, other: Training) -> list[str]:
        """The parameters, by name, that have other bits in the other model."""
        pairs = zip(
            self._chunks[0].named_parameters(), other._chunks[0].named_parameters(), strict=True
        )
        return [name for (name, mine), (_, its) in pairs if not torch.equal(mine, its)]

    def _windows(self, tokens: Tokens, generator: torch.Generator) -> Tensor:
        """A batch from random places of a text."""
        length = self.run.sizes.seq_length
        starts = torch.randint(
            len(tokens) - length, (self.run.sizes.global_batch_size,), generator=generator
        )
        return torch.from_numpy(
            np.stack([tokens[start : start + length + 1] for start in starts.tolist()])
        ).long()

    def _pass(self, batch: Tensor, *, forward_only: bool = False) -> float:
        size = self.run.sizes.global_batch_size // self.run.micro_batches
        reported = get_forward_backward_func()(
            forward_step_func=forward_tokens,
            data_iterator=[iter(batch.cuda().split(size))],
            model=self._chunks,
            num_microbatches=self.run.micro_batches,
            seq_length=self.run.sizes.seq_length,
            micro_batch_size=size,
            forward_only=forward_only,
        )
        loss, count = sum(entry[LOSS].double() for entry in reported).tolist()
        return loss / count


def _build(run: Run, vocab_size: int) -> tuple[TransformerConfig, list[Any]]:
    transformer = TransformerConfig(**_fields(run))
    spec = stock_layer_spec
    if run.activation == "xielu":
        settings = XIELUPlaceholder(impl=run.impl, fc2_input=run.fp8.fc2_input)
        use_xielu(transformer, settings)
        spec = xielu_layer_spec
    model = GPTModelConfig(
        transformer=transformer,
        transformer_layer_spec=spec,
        vocab_size=vocab_size,
        seq_length=run.sizes.seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    if run.activation == "xielu":
        model.pre_wrap_hooks.append(install_on_chunks)
    if run.compiled:
        model.pre_wrap_hooks.append(_compile_activations)
    if run.transformer_impl == "local":
        model.pre_wrap_hooks.append(partial(fp8_emulation.install_on_chunks, settings=run.fp8))
    chunks = GPTModelBuilder(model).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True
        ),
        data_parallel_random_init=False,
    )
    return transformer, chunks


def _fields(run: Run) -> dict[str, Any]:
    sizes, local = run.sizes, run.transformer_impl == "local"
    # the gated MLP has 3 matrices where the others have 2: equal parameters
    ffn = sizes.ffn_hidden_size * 2 // 3 if run.activation == "swiglu" else sizes.ffn_hidden_size
    fields: dict[str, Any] = {
        "num_layers": sizes.num_layers,
        "hidden_size": sizes.hidden_size,
        "num_attention_heads": sizes.num_attention_heads,
        "ffn_hidden_size": ffn,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": sizes.init_std,
        "transformer_impl": run.transformer_impl,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": not local,
        "persist_layer_norm": not local,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": not local,
        "apply_rope_fusion": not local,
        "cross_entropy_loss_fusion": not local,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
    }
    if run.activation == "relu2":
        fields["activation_func"] = squared_relu
    if run.activation == "swiglu":
        fields |= {"activation_func": F.silu, "gated_linear_unit": True}
        fields["bias_activation_fusion"] = not local
    if run.cuda_graphs:
        fields |= {"cuda_graph_impl": "local", "use_te_rng_tracker": True}
    if local:
        return fields
    fields["use_transformer_engine_op_fuser"] = run.fused
    if run.fp8.recipe != "off":
        fields |= {
            "fp8": run.fp8.format,
            "fp8_recipe": run.fp8.recipe,
            "fp8_amax_history_len": run.fp8.amax_history_len,
            "fp8_amax_compute_algo": run.fp8.amax_compute_algo,
        }
    return fields


def _compile_activations(chunks: list[Any]) -> list[Any]:
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ParallelXIELU):
                module.compile(dynamic=False)
    return chunks


def _optimizer(steps: int, chunks: list[Any]) -> tuple[Any, OptimizerParamScheduler]:
    config = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        min_lr=0.0,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
    )
    overrides = {**get_standard_config_overrides(config), **patches.alpha_group(config)}
    optimizer = get_megatron_optimizer(config, chunks, overrides)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LEARNING_RATE,
        min_lr=0.0,
        lr_warmup_steps=WARMUP,
        lr_decay_steps=steps,
        lr_decay_style="WSD",
        wsd_decay_steps=int(DECAY_SHARE * steps),
        lr_wsd_decay_style="minus_sqrt",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    return optimizer, scheduler
