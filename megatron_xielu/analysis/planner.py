"""What a recipe costs before it runs: parameters, tokens, FLOPs, GPU-hours and memory.

Every figure is arithmetic on the recipe, with no measurement in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_xielu.errors import UserError
from megatron_xielu.recipes.derived import (
    data_parallel_size,
    embedding_rows,
    head_dim,
    num_query_groups,
)
from megatron_xielu.recipes.schema import Model, Recipe
from megatron_xielu.recipes.validate import check

PEAK_FLOPS: dict[str, float] = {
    "A100": 312e12,
    "H100": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989.4e12,
    "H200 NVL": 835e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}
"""Dense bf16 FLOP/s by a part of the device's name, from NVIDIA's data sheets ("H100 Tensor Core
GPU" and so on). From Hopper on they print the rate with 2:4 sparsity; this is half of it.
"""

FP8_RATE = 2.0
"""FP8 FLOP/s by those of bf16, dense, in the same data sheets from Hopper on."""

_PLANNED_MFU = 0.40
# bytes per element with the scales: float32 for each 1 x 128 values, one byte for each 32
_FP8_ACTIVATION = {"delayed": 1, "tensorwise": 1, "blockwise": 1 + 4 / 128, "mxfp8": 1 + 1 / 32}
# float32 for each 128 x 128 weights
_FP8_WEIGHT = {**_FP8_ACTIVATION, "blockwise": 1 + 4 / 128**2}
_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the fullest device at the end of a micro-batch's forward pass."""

    weights: float
    """In bf16 or fp32."""
    fp8_weights: float
    """What the layers' FP8 products read, by row and transposed."""
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Bytes, without the allocator's slack, communication buffers and the CUDA context."""
        held = self.weights + self.fp8_weights + self.gradients + self.optimizer
        return held + self.activations + self.logits


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The derived numbers of one recipe on one world size."""

    name: str
    activation: str
    world_size: int
    data_parallel_size: int
    micro_batches_per_step: int
    parameters: int
    parameters_without_embeddings: int
    alphas: int
    tokens_per_step: int
    steps: int
    tokens: int
    tokens_per_parameter: float
    flops_per_token_matmul: int
    flops_per_token_causal: int
    flops_per_token_full: int
    flops: int
    """Of the whole run, with causal attention."""
    h100_hours: float
    """At 40 % of an H100 SXM's dense bf16 peak."""
    precision: str
    fp8: str
    """The recipe's; off where it is emulated."""
    memory: Memory


def plan(recipe: Recipe, world_size: int) -> Plan:
    """Raises RecipeError where the recipe cannot run on `world_size` ranks, UserError where it has
    no vocabulary size yet."""
    check(recipe, world_size)
    model, training = recipe.model, recipe.training
    dp = data_parallel_size(recipe, world_size)
    parameters = count_parameters(model)
    tokens_per_step = training.global_batch_size * model.seq_length
    tokens = tokens_per_step * training.train_iters
    flops = flops_per_token(model) * tokens
    return Plan(
        name=recipe.name,
        activation=model.activation,
        world_size=world_size,
        data_parallel_size=dp,
        micro_batches_per_step=training.global_batch_size // (training.micro_batch_size * dp),
        parameters=parameters,
        parameters_without_embeddings=parameters - _embeddings(model),
        alphas=_alphas(model) * model.num_layers,
        tokens_per_step=tokens_per_step,
        steps=training.train_iters,
        tokens=tokens,
        tokens_per_parameter=tokens / parameters,
        flops_per_token_matmul=flops_per_token(model, attention="none"),
        flops_per_token_causal=flops_per_token(model, attention="causal"),
        flops_per_token_full=flops_per_token(model, attention="full"),
        flops=flops,
        h100_hours=flops / (_PLANNED_MFU * PEAK_FLOPS["H100"]) / 3600,
        precision=_precision(recipe),
        fp8=_fp8(recipe),
        memory=estimate_memory(recipe, world_size),
    )


def count_parameters(model: Model) -> int:
    """All trained numbers: embeddings, blocks, norms and the two alphas of each layer."""
    layer = _matmul_weights(model) + _layer_vectors(model)
    return _embeddings(model) + model.num_layers * layer + model.hidden_size


def flops_per_token(
    model: Model, *, attention: Literal["none", "causal", "full"] = "causal"
) -> int:
    """FLOPs of forward and backward per token, embedding look-ups and elementwise work left out.

    6 per weight of a matmul, the output layer included, plus the attention scores and values:
    nothing ("none"), the half that the causal mask leaves ("causal", what Megatron-Core 0.19
    reports as TFLOP/s), or 12 x layers x heads x head_dim x seq_length ("full", PaLM's MFU,
    arXiv 2204.02311 appendix B).
    """
    weights = model.num_layers * _matmul_weights(model) + _vocab_size(model) * model.hidden_size
    per_position = {"none": 0, "causal": 6, "full": 12}[attention]
    channels = model.num_attention_heads * head_dim(model)
    return 6 * weights + per_position * model.num_layers * channels * model.seq_length


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of `torch.cuda.get_device_name()`, or None if it is not in the table."""
    # a MIG slice carries the whole device's name
    matches = [key for key in PEAK_FLOPS if key.lower() in device_name.lower()]
    if not matches or "MIG" in device_name:
        return None
    return PEAK_FLOPS[max(matches, key=len)]


def estimate_memory(recipe: Recipe, world_size: int) -> Memory:
    """A byte model of the fullest pipeline stage.

    Weights in the run's precision, gradients in fp32; AdamW's two moments in fp32, and with bf16 a
    fp32 copy of the weights, both cut by the data parallel size under the distributed optimizer.
    Activations are what each matmul and norm keeps for its backward pass; of recomputation
    only `xielu.recompute` counts, not Megatron's flags.
    Logits of fp32 exist once. In bf16 they exist as they are and twice in fp32: Megatron's fused
    loss, compiled by torch, writes their exponentials beside the copy in fp32. On an H100 that had
    64.30 GiB allocated it asked for 11.25 GiB more, 4 bytes for each of 20,480 x 147,456.

    Under FP8 (read in TransformerEngine 2.20's module/linear.py, module/layernorm_linear.py and
    ops/basic/basic_linear.py) a product keeps its input as an FP8 transpose; attention's output
    stays in bf16 for attention's own backward, and only delayed scaling keeps an FP8 copy besides.
    Weights have an FP8 copy by row and one transposed. TransformerEngine's modules keep both beside
    the bf16 weights over the micro-batches of a step; the operations of a fused MLP make both with
    each micro-batch and hold the transposed one until its backward. With `fp8.param_gather` both
    are the weights, and there are no bf16 ones.
    """
    model, training, parallel = recipe.model, recipe.training, recipe.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = data_parallel_size(recipe, world_size)
    bf16 = _precision(recipe) == "bf16"
    parameters = _parameters_per_device(model, tp, pp)
    tokens = training.micro_batch_size * model.seq_length
    # 1F1B: the first stage holds one micro-batch per stage, as far as there are that many
    in_flight = min(pp, training.global_batch_size // (training.micro_batch_size * dp))
    share = _share_in_fp8(recipe)
    kept = share * _activation_bytes_per_token(recipe, _fp8(recipe))
    kept += (1 - share) * _activation_bytes_per_token(recipe, "off")
    # of the layers that are in FP8
    attention, mlp = (
        share * model.num_layers / pp * weights / tp
        for weights in (_attention_weights(model), _mlp_weights(model))
    )
    in_bf16, fp8_weights = parameters, 0.0
    if share:
        byte = _FP8_WEIGHT[_fp8(recipe)]
        # Megatron's other activations stay between TransformerEngine's modules
        is_fused = recipe.fp8.fused and model.activation == "xielu"
        held_by_mlp: float = 2 if recipe.fp8.param_gather or not is_fused else in_flight
        if recipe.fp8.fc2_input == "bf16" and not recipe.fp8.param_gather:
            # fc2 computes with the weight as it is
            held_by_mlp /= 2
        fp8_weights = byte * (2 * attention + held_by_mlp * mlp)
        if recipe.fp8.param_gather:
            in_bf16 -= attention + mlp
    return Memory(
        weights=(2 if bf16 else 4) * in_bf16,
        fp8_weights=fp8_weights,
        gradients=4 * parameters,
        optimizer=(12 if bf16 else 8)
        * parameters
        / (dp if parallel.use_distributed_optimizer else 1),
        activations=kept * tokens * in_flight * model.num_layers / pp,
        logits=(10 if bf16 else 4) * tokens * _vocab_size(model) / tp,
    )


def format_plan(plan: Plan) -> str:
    """The plan as aligned text for a terminal."""
    memory = plan.memory
    unit, unit_name = (_GIB, "GiB") if memory.total >= _GIB else (_MIB, "MiB")
    in_fp8 = plan.fp8 != "off"
    memory_of = {
        "weights": memory.weights,
        **({"FP8 weights": memory.fp8_weights} if in_fp8 else {}),
        "gradients": memory.gradients,
        "optimizer state": memory.optimizer,
        "activations": memory.activations,
        "logits": memory.logits,
        "total": memory.total,
    }
    sections = {
        f"{plan.name} on {plan.world_size:,} devices": {
            "data parallel size": f"{plan.data_parallel_size:,}",
            "micro-batches per step": f"{plan.micro_batches_per_step:,}",
        },
        "model": {
            "activation": plan.activation,
            "parameters": f"{plan.parameters:,}",
            "without embeddings": f"{plan.parameters_without_embeddings:,}",
            **({"alphas": f"{plan.alphas:,}"} if plan.alphas else {}),
        },
        "tokens": {
            "tokens per step": f"{plan.tokens_per_step:,}",
            "steps": f"{plan.steps:,}",
            "tokens": f"{plan.tokens:,}",
            "tokens per parameter": f"{plan.tokens_per_parameter:,.1f}",
        },
        "compute, forward and backward": {
            "FLOPs per token, matmuls": f"{plan.flops_per_token_matmul:,}",
            "+ causal attention (Megatron)": f"{plan.flops_per_token_causal:,}",
            "+ full attention (PaLM)": f"{plan.flops_per_token_full:,}",
            "FLOPs of the run (Megatron)": f"{plan.flops:.4g}",
            **_h100_hours(plan),
            **(_fp8_peak() if in_fp8 else {}),
        },
        f"memory per device, {unit_name}, {_precisions(plan)}": {
            name: f"{size / unit:,.2f}" for name, size in memory_of.items()
        },
    }
    rows = [row for section in sections.values() for row in section.items()]
    label_width = max(len(label) for label, _ in rows)
    value_width = max(len(value) for _, value in rows)
    lines = []
    for title, section in sections.items():
        lines.append(title)
        for label, value in section.items():
            lines.append(f"  {label:<{label_width}}  {value:>{value_width}}")
    return "\n".join(lines)


def _h100_hours(plan: Plan) -> dict[str, str]:
    # a run of seconds is no matter of H100s
    if plan.h100_hours < 0.1:
        return {}
    return {
        f"H100-hours at {_PLANNED_MFU:.0%} MFU": f"{plan.h100_hours:,.2f}",
        f"hours on {plan.world_size:,} H100s": f"{plan.h100_hours / plan.world_size:,.2f}",
    }


def _fp8_peak() -> dict[str, str]:
    bf16 = PEAK_FLOPS["H100"] / 1e12
    return {
        "TFLOP/s of an H100 in bf16 (MFU)": f"{bf16:,.1f}",
        "TFLOP/s of an H100 in FP8": f"{FP8_RATE * bf16:,.1f}",
    }


def _precisions(plan: Plan) -> str:
    return plan.precision if plan.fp8 == "off" else f"{plan.precision} and FP8 {plan.fp8}"


def _matmul_weights(model: Model) -> int:
    """Of one layer."""
    return _attention_weights(model) + _mlp_weights(model)


def _attention_weights(model: Model) -> int:
    """Of one layer: query, key, value and output projections."""
    heads = 2 * model.num_attention_heads + 2 * num_query_groups(model)
    return model.hidden_size * heads * head_dim(model)


def _mlp_weights(model: Model) -> int:
    """Of one layer: two matrices, or three with a gate."""
    return (2 + _is_gated(model)) * model.hidden_size * model.ffn_hidden_size


def _is_gated(model: Model) -> bool:
    return model.activation == "swiglu"


def _alphas(model: Model) -> int:
    """Of one layer."""
    return 2 if model.activation == "xielu" else 0


def _layer_vectors(model: Model) -> int:
    """Of one layer, what tensor parallelism replicates: norms and alphas."""
    qk_norms = 2 * head_dim(model) if model.qk_layernorm else 0
    return 2 * model.hidden_size + qk_norms + _alphas(model)


def _embeddings(model: Model) -> int:
    return _vocab_size(model) * model.hidden_size * (1 if model.tie_embeddings else 2)


def _vocab_size(model: Model) -> int:
    rows = embedding_rows(model)
    if rows is None:
        raise UserError(
            "model.vocab_size is null: it comes from the data's tokenizer once data.path is read; "
            "to plan without data give it, for example model.vocab_size=4096"
        )
    return rows


def _precision(recipe: Recipe) -> str:
    # a plan is about GPUs, where auto means bf16
    return "bf16" if recipe.training.precision == "auto" else recipe.training.precision


def _parameters_per_device(model: Model, tp: int, pp: int) -> float:
    matrices = model.num_layers / pp * _matmul_weights(model)
    # with pipeline parallelism the first stage has the embedding and the last the output layer,
    # a copy of it where they are tied
    tables = _embeddings(model) if pp == 1 else _vocab_size(model) * model.hidden_size
    vectors = model.num_layers / pp * _layer_vectors(model) + model.hidden_size
    return (matrices + tables) / tp + vectors


def _fp8(recipe: Recipe) -> str:
    return "off" if recipe.fp8.emulate else recipe.fp8.recipe


def _share_in_fp8(recipe: Recipe) -> float:
    """Of the layers."""
    if _fp8(recipe) == "off":
        return 0.0
    in_bf16 = recipe.fp8.bf16_layers_at_start + recipe.fp8.bf16_layers_at_end
    return max(0, recipe.model.num_layers - in_bf16) / recipe.model.num_layers


def _activation_bytes_per_token(recipe: Recipe, fp8: str) -> float:
    """What one layer keeps per token on one device, in bytes."""
    model, parallel = recipe.model, recipe.parallel
    tp = parallel.tensor_model_parallel_size
    element = 2.0 if _precision(recipe) == "bf16" else 4.0
    product_input = element if fp8 == "off" else _FP8_ACTIVATION[fp8]
    # both norms' inputs and outputs
    hidden = 2 * model.hidden_size * (element + product_input)
    if parallel.sequence_parallel:
        hidden /= tp
    # queries, keys, values and attention's output; both kinds of layers keep no scores
    channels = (2 * model.num_attention_heads + 2 * num_query_groups(model)) * head_dim(model)
    attention = channels * element
    if fp8 == "delayed":
        attention += model.num_attention_heads * head_dim(model) * product_input
    # the activation's input, twice as wide with a gate, and its output; of its input ReLU squared
    # keeps what is above zero
    output = element if recipe.fp8.fc2_input == "bf16" else product_input
    before = 1 if recipe.xielu.saved_input == "e4m3" else (1 + _is_gated(model)) * element
    kept = before + (0 if recipe.xielu.recompute else output)
    return hidden + (attention + kept * model.ffn_hidden_size) / tp
