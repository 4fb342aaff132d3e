"""What FP8 matrix products need of a recipe's sizes and settings.

The products are those of a layer's four linear modules: queries, keys and values in one (QKV),
attention's projection, and the MLP's two. The embedding and the output layer stay in bf16, so the
vocabulary has no rule here.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd, lcm

from megatron_xielu.recipes.derived import head_dim, num_query_groups
from megatron_xielu.recipes.nearest import indivisible, multiples
from megatron_xielu.recipes.schema import Recipe

# Per-tensor and blockwise: `CanonicalizeGemmInput` (common/gemm/cublaslt_gemm.cu) asks that the
# contracted dimension of each product be a multiple of 16 on Hopper. That is the input's width
# forward, the output's width for the gradient of the input, and the tokens for the gradient of the
# weight. Blocks of 128 may be partial: where `Float8BlockQuantizer.is_quantizable` is false, the
# gather of sequence parallelism falls back to bf16 with a warning.
# MXFP8: `MXFP8Quantizer.create_tensor` (pytorch/csrc/quantizer.cpp) refuses a tensor with either
# dimension no multiple of 32, a rank's piece of a sequence included.
_MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
# of a rank's piece of a sequence before it is gathered: `assert_dim_for_fp8_exec`
_SHARDED_TOKENS = {"delayed": 8, "tensorwise": 8, "blockwise": 8, "mxfp8": 32}


def local_sizes(recipe: Recipe) -> dict[str, int]:
    """What one device multiplies, by the name of the size.

    The recipe's sizes must be divisible as `validate` asks. Tokens are those of a micro-batch; with
    sequence parallelism of the rank's piece.
    """
    model, tp = recipe.model, recipe.parallel.tensor_model_parallel_size
    heads, groups = model.num_attention_heads, num_query_groups(model)
    pieces = tp if recipe.parallel.sequence_parallel else 1
    return {
        "hidden_size": model.hidden_size,
        "QKV": (heads + 2 * groups) * head_dim(model) // tp,
        "projection": heads * head_dim(model) // tp,
        "ffn_hidden_size": model.ffn_hidden_size // tp,
        "tokens": model.seq_length // pieces * recipe.training.micro_batch_size,
    }


def problems(recipe: Recipe) -> Iterator[str]:
    """One message per rule that the recipe breaks; none while `fp8.recipe` is off."""
    if recipe.fp8.recipe == "off":
        return
    yield from _modes(recipe)
    yield from _layers(recipe)
    if _is_divisible(recipe):
        yield from _widths(recipe)
        yield from _tokens(recipe)


def _modes(recipe: Recipe) -> Iterator[str]:
    name = f"fp8.recipe={recipe.fp8.recipe}"
    yield from _watch(recipe) if recipe.model.activation == "xielu" else _baseline(recipe)
    if recipe.fp8.emulate:
        yield from _emulated(recipe)
        return
    if recipe.training.precision == "fp32":
        yield (
            f"training.precision=fp32 cannot go with {name}, which quantizes bf16; "
            "legal: bf16, auto (bf16 on a GPU), or fp8.recipe=off"
        )
    if recipe.model.transformer_impl == "local":
        yield (
            f"model.transformer_impl=local cannot go with {name}: TransformerEngine computes FP8; "
            "legal: transformer_engine, auto, or fp8.recipe=off"
        )
    if recipe.model.activation != "xielu" or recipe.fp8.fused:
        return
    if recipe.fp8.fc2_input == "bf16":
        yield (
            "fp8.fc2_input=bf16 cannot go with fp8.fused=false: TransformerEngine's own modules "
            "quantize every input; legal: fused=true, or fc2_input=fp8"
        )
    if recipe.xielu.recompute:
        yield (
            f"xielu.recompute=true cannot go with {name} and fp8.fused=false: fc2 keeps an FP8 "
            "copy of xIELU's output of its own; legal: fp8.fused=true, or xielu.recompute=false"
        )


def _watch(recipe: Recipe) -> Iterator[str]:
    fp8 = recipe.fp8
    for key in ("max_saturated", "max_flushed"):
        share = getattr(fp8, key)
        if share is not None and share > 1:
            yield f"fp8.{key}={share} is a share of xIELU's output; nearest legal: 1"
    if fp8.on_outlier != "bf16_layer":
        return
    if fp8.param_gather:
        yield (
            "fp8.on_outlier=bf16_layer cannot go with fp8.param_gather=true, where there is no "
            "bf16 weight to go on with; legal: on_outlier=warn or stop, or param_gather=false"
        )
    if not fp8.fused and not fp8.emulate:
        yield (
            "fp8.on_outlier=bf16_layer cannot go with fp8.fused=false: TransformerEngine's own "
            "modules quantize every input; legal: fused=true, or on_outlier=warn or stop"
        )


def _baseline(recipe: Recipe) -> Iterator[str]:
    fp8, activation = recipe.fp8, recipe.model.activation
    if fp8.fc2_input == "bf16" and not fp8.emulate:
        yield (
            f"fp8.fc2_input=bf16 cannot go with model.activation={activation}: TransformerEngine's "
            "own modules quantize every input; legal: fp8, or model.activation=xielu"
        )
    if fp8.on_outlier != "warn":
        yield (
            f"fp8.on_outlier={fp8.on_outlier} cannot go with model.activation={activation}: only "
            "xIELU is watched; legal: warn, or model.activation=xielu"
        )


def _emulated(recipe: Recipe) -> Iterator[str]:
    tp = recipe.parallel.tensor_model_parallel_size
    for setting, is_wrong, legal in (
        (
            f"fp8.recipe={recipe.fp8.recipe}",
            recipe.fp8.recipe == "mxfp8",
            "delayed, tensorwise or blockwise",
        ),
        (
            "model.transformer_impl=transformer_engine",
            recipe.model.transformer_impl == "transformer_engine",
            "local or auto",
        ),
        (f"parallel.tensor_model_parallel_size={tp}", tp > 1, "1"),
        ("fp8.param_gather=true", recipe.fp8.param_gather, "false"),
        (
            f"fp8.bf16_layers_at_start={recipe.fp8.bf16_layers_at_start}",
            recipe.fp8.bf16_layers_at_start > 0,
            "0",
        ),
        (
            f"fp8.bf16_layers_at_end={recipe.fp8.bf16_layers_at_end}",
            recipe.fp8.bf16_layers_at_end > 0,
            "0",
        ),
    ):
        if is_wrong:
            yield f"{setting} is not part of what fp8.emulate=true emulates; legal: {legal}"


def _layers(recipe: Recipe) -> Iterator[str]:
    fp8, pp = recipe.fp8, recipe.parallel.pipeline_model_parallel_size
    ends = {
        "fp8.bf16_layers_at_start": fp8.bf16_layers_at_start,
        "fp8.bf16_layers_at_end": fp8.bf16_layers_at_end,
    }
    if fp8.recipe == "delayed":
        for name, count in ends.items():
            if count > 0:
                yield (
                    f"{name}={count} cannot go with fp8.recipe=delayed, as in Megatron; "
                    "legal: 0, or fp8.recipe=tensorwise"
                )
        return
    if pp < 1:
        return
    most = recipe.model.num_layers // pp
    for name, count in ends.items():
        if count > most > 0:
            yield (
                f"{name}={count} is more than a pipeline stage has, num_layers / "
                f"pipeline_model_parallel_size = {recipe.model.num_layers} / {pp}; "
                f"nearest legal: {most}"
            )
    total = sum(ends.values())
    if min(ends.values()) >= 0 and total >= recipe.model.num_layers > 0:
        yield (
            f"fp8.bf16_layers_at_start + bf16_layers_at_end = {total} leave none of "
            f"{recipe.model.num_layers} layers in FP8; legal: fewer, or fp8.recipe=off"
        )


def _is_divisible(recipe: Recipe) -> bool:
    """Whether the sizes keep the rules that come before FP8's, so that quotients mean something."""
    model, tp = recipe.model, recipe.parallel.tensor_model_parallel_size
    heads, groups = model.num_attention_heads, num_query_groups(model)
    sizes = (model.hidden_size, heads, groups, model.ffn_hidden_size, model.seq_length, tp)
    if min(*sizes, recipe.training.micro_batch_size) < 1 or head_dim(model) < 1:
        return False
    return not (
        (model.head_dim is None and indivisible(model.hidden_size, heads))
        or indivisible(head_dim(model), 2)
        or indivisible(heads, tp)
        or indivisible(heads, groups)
        or (indivisible(groups, tp) and indivisible(tp, groups))
        or indivisible(model.ffn_hidden_size, tp)
        or (recipe.parallel.sequence_parallel and indivisible(model.seq_length, tp))
    )


def _widths(recipe: Recipe) -> Iterator[str]:
    model, sizes = recipe.model, local_sizes(recipe)
    tp, step = recipe.parallel.tensor_model_parallel_size, _MULTIPLE[recipe.fp8.recipe]
    needed = f"not a multiple of {step}, which fp8.recipe={recipe.fp8.recipe} needs; nearest legal:"
    heads, groups = model.num_attention_heads, num_query_groups(model)
    # the smallest head_dim with which both of attention's widths are legal
    dim_step = lcm(2, *(step * tp // gcd(step * tp, n) for n in (heads, heads + 2 * groups)))
    if model.head_dim is None:
        # it follows from hidden_size, so one remedy serves both
        hidden_step = lcm(step, heads * dim_step)
        remedy = f"model.hidden_size={multiples(model.hidden_size, hidden_step)}"
    else:
        hidden_step = step
        remedy = f"model.head_dim={multiples(model.head_dim, dim_step)}"
    hidden_is_legal = model.hidden_size % step == 0
    if not hidden_is_legal:
        nearest = multiples(model.hidden_size, hidden_step)
        yield f"model.hidden_size={model.hidden_size} is {needed} {nearest}"
    if head_dim(model) % dim_step and (hidden_is_legal or model.head_dim is not None):
        yield (
            f"attention's (heads + 2 groups) x head_dim / TP = {sizes['QKV']} or heads x head_dim "
            f"/ TP = {sizes['projection']} is {needed} {remedy}"
        )
    if sizes["ffn_hidden_size"] % step:
        quotient = f" / TP = {model.ffn_hidden_size} / {tp} = {sizes['ffn_hidden_size']}"
        yield (
            f"model.ffn_hidden_size{quotient if tp > 1 else f'={model.ffn_hidden_size}'} is "
            f"{needed} {multiples(model.ffn_hidden_size, step * tp)}"
        )


def _tokens(recipe: Recipe) -> Iterator[str]:
    tp, micro = recipe.parallel.tensor_model_parallel_size, recipe.training.micro_batch_size
    tokens, seq_length = local_sizes(recipe)["tokens"], recipe.model.seq_length
    if sharded := recipe.parallel.sequence_parallel:
        step = _SHARDED_TOKENS[recipe.fp8.recipe]
    else:
        step, tp = _MULTIPLE[recipe.fp8.recipe], 1
    if tokens % step:
        pieces = (
            f" / TP = {seq_length} x {micro} / {tp}" if sharded else f" = {seq_length} x {micro}"
        )
        yield (
            f"model.seq_length x training.micro_batch_size{pieces} = {tokens} tokens are not a "
            f"multiple of {step}, which fp8.recipe={recipe.fp8.recipe} needs; nearest legal: "
            f"seq_length={multiples(seq_length, tp * step // gcd(step, micro))}"
        )
