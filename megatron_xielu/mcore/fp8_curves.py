"""One small training run in bf16 or emulated FP8, for xIELU and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
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
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig, default_layer_spec
from torch import Tensor

from megatron_xielu.mcore import fp8_emulation, patches
from megatron_xielu.mcore.fp8_emulation import FP8Settings, Statistics
from megatron_xielu.mcore.layer_specs import (
    install_on_chunks,
    use_torch_kernels,
    use_xielu,
    xielu_layer_spec,
)
from megatron_xielu.mcore.norm import RMSNorm
from megatron_xielu.mcore.observer import LOSS
from megatron_xielu.mcore.pretrain import forward_tokens

# the gated MLP has 3 matrices where the others have 2: equal parameters
FFN_HIDDEN_SIZE = {"xielu": 768, "relu2": 768, "swiglu": 512}
HIDDEN_SIZE, NUM_HEADS = 128, 4
SEQ_LENGTH, GLOBAL_BATCH = 128, 8
LEARNING_RATE, WARMUP, DECAY_SHARE = 3e-3, 20, 0.2
VALID_BATCHES = 32

Tokens = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Run:
    """What is trained; equal seeds mean equal weights (where shapes allow) and equal batches."""

    activation: Literal["xielu", "relu2", "swiglu"] = "xielu"
    fp8: FP8Settings = field(default_factory=FP8Settings)
    seed: int = 1
    micro_batches: int = 1
    """Cuts a step's batch, which changes nothing but the order of roundings."""
    steps: int = 300
    num_layers: int = 4


@dataclass(frozen=True)
class Step:
    """One optimizer step: the loss in nats per token, and what FP8 did to each operand."""

    loss: float
    statistics: dict[str, Statistics]


class Training:
    """A model with its optimizer on one rank; Megatron's groups exist.

    Args:
        run: what to train.
        vocab_size: every token is below it.
    """

    def __init__(self, run: Run, vocab_size: int) -> None:
        self.run = run
        patches.mend_optimizers()
        torch.manual_seed(run.seed)
        model_parallel_cuda_manual_seed(run.seed, force_reset_rng=True)
        self._config, self._chunks = _build(run, vocab_size)
        self._optimizer, self._scheduler = _optimizer(run.steps, self._chunks)
        self._config.grad_scale_func = self._optimizer.scale_loss
        self._config.finalize_model_grads_func = finalize_model_grads
        self.parameters = sum(p.numel() for chunk in self._chunks for p in chunk.parameters())

    def steps(self, tokens: Tokens) -> Iterator[Step]:
        """Train on random windows of a text of token ids, a `Step` each."""
        generator = torch.Generator().manual_seed(1000 + self.run.seed)
        for _ in range(self.run.steps):
            for chunk in self._chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self._optimizer.zero_grad()
            loss = self._pass(_windows(tokens, generator))
            succeeded, _, _ = self._optimizer.step()
            assert succeeded
            self._scheduler.step(increment=1)
            yield Step(loss, fp8_emulation.take_statistics(self._chunks[0]))

    def held_out_loss(self, tokens: Tokens) -> float:
        """Nats per token of windows that are the same for all runs."""
        generator = torch.Generator().manual_seed(0)
        for chunk in self._chunks:
            chunk.eval()
        with torch.no_grad():
            losses = [
                self._pass(_windows(tokens, generator), forward_only=True)
                for _ in range(VALID_BATCHES)
            ]
        return sum(losses) / len(losses)

    def _pass(self, batch: Tensor, *, forward_only: bool = False) -> float:
        size = GLOBAL_BATCH // self.run.micro_batches
        reported = get_forward_backward_func()(
            forward_step_func=forward_tokens,
            data_iterator=[iter(batch.split(size))],
            model=self._chunks,
            num_microbatches=self.run.micro_batches,
            seq_length=SEQ_LENGTH,
            micro_batch_size=size,
            forward_only=forward_only,
        )
        loss, count = sum(entry[LOSS].double() for entry in reported).tolist()
        return loss / count


def _build(run: Run, vocab_size: int) -> tuple[TransformerConfig, list[Any]]:
    fields: dict[str, Any] = {
        "num_layers": run.num_layers,
        "hidden_size": HIDDEN_SIZE,
        "num_attention_heads": NUM_HEADS,
        "ffn_hidden_size": FFN_HIDDEN_SIZE[run.activation],
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.025,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
    }
    if run.activation == "relu2":
        fields["activation_func"] = squared_relu
    if run.activation == "swiglu":
        fields |= {"activation_func": F.silu, "gated_linear_unit": True}
    transformer = TransformerConfig(**fields)
    spec = _layer_spec
    if run.activation == "xielu":
        use_xielu(transformer)
        spec = xielu_layer_spec
    model = GPTModelConfig(
        transformer=transformer,
        transformer_layer_spec=spec,
        vocab_size=vocab_size,
        seq_length=SEQ_LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    if run.activation == "xielu":
        model.pre_wrap_hooks.append(install_on_chunks)
    model.pre_wrap_hooks.append(partial(fp8_emulation.install_on_chunks, settings=run.fp8))
    chunks = GPTModelBuilder(model).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True
        ),
        data_parallel_random_init=False,
    )
    return transformer, chunks


def _layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Megatron's own layers, with the attention and norm that xIELU's have."""
    layer = default_layer_spec(config, vp_stage)
    use_torch_kernels(layer.submodules, config.transformer)
    layers = [layer] * config.transformer.num_layers
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


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


def _windows(tokens: Tokens, generator: torch.Generator) -> Tensor:
    """[GLOBAL_BATCH, SEQ_LENGTH + 1] ids from random places."""
    starts = torch.randint(len(tokens) - SEQ_LENGTH, (GLOBAL_BATCH,), generator=generator)
    return torch.from_numpy(
        np.stack([tokens[start : start + SEQ_LENGTH + 1] for start in starts.tolist()])
    ).long()
