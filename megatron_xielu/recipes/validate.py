"""The rules a recipe must keep, all checked at once, each broken one with its nearest remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from megatron_xielu.errors import UserError
from megatron_xielu.recipes import fp8
from megatron_xielu.recipes.derived import (
    data_parallel_size,
    embedding_rows,
    head_dim,
    num_query_groups,
)
from megatron_xielu.recipes.nearest import divisors, indivisible, join, multiples
from megatron_xielu.recipes.schema import Recipe, Xielu

_AT_LEAST_ONE = (
    "model.num_layers",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.head_dim",
    "model.rope_scaling_factor",
    "model.ffn_hidden_size",
    "model.seq_length",
    "model.vocab_size",
    "model.padded_vocab_size",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "training.train_iters",
    "training.global_batch_size",
    "training.micro_batch_size",
    "training.seed",
    "checkpoint.save_interval",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "logging.log_interval",
    "logging.eval_interval",
    "health.max_skipped_steps",
    "fp8.amax_history_len",
    "fp8.max_kurtosis",
)
_AT_LEAST_ZERO = (
    "optimizer.min_lr",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "schedule.lr_warmup_iters",
    "schedule.lr_wsd_decay_iters",
    "xielu.lr_mult",
    "data.num_workers",
    "logging.eval_iters",
    "health.every",
    "fp8.bf16_layers_at_start",
    "fp8.bf16_layers_at_end",
    "fp8.watch_interval",
    "fp8.max_saturated",
    "fp8.max_flushed",
)
_ABOVE_ZERO = (
    "model.rope_theta",
    "model.norm_epsilon",
    "model.init_std",
    "optimizer.lr",
    "optimizer.adam_eps",
    "xielu.alpha_p_init",
    "xielu.alpha_n_init",
    "xielu.beta",
)
_ADAM_BETAS = ("optimizer.adam_beta1", "optimizer.adam_beta2")


class RecipeError(UserError):
    """A recipe that cannot be read or run; the message lists every problem on a line of its own."""

    def __init__(self, subject: str, problems: Sequence[str]) -> None:
        super().__init__(subject, tuple(problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        subject, problems = self.args
        return "\n".join([f"{subject}:", *(f"  {problem}" for problem in problems)])


def check(recipe: Recipe, world_size: int) -> None:
    """Raises RecipeError with every rule that `recipe` breaks on `world_size` ranks."""
    if problems := validate(recipe, world_size):
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        raise RecipeError(f"recipe {recipe.name!r} cannot run on {ranks}", problems)


def validate(recipe: Recipe, world_size: int) -> list[str]:
    """Returns one message per broken rule: the value, the rule and the nearest legal values.

    A rule that spans fields is silent while one of them is out of its own bounds.
    """
    return [
        *_bounds(recipe, world_size),
        *_attention(recipe),
        *_vocabulary(recipe),
        *_tensor_parallel(recipe),
        *_sequence_parallel(recipe),
        *_pipeline_parallel(recipe),
        *_batch(recipe, world_size),
        *_schedule(recipe),
        *_optimizer(recipe),
        *_checkpoint(recipe),
        *_xielu(recipe),
        *fp8.problems(recipe),
    ]


def _bounds(recipe: Recipe, world_size: int) -> Iterator[str]:
    def bad(paths: Sequence[str], low: float) -> Iterator[tuple[str, Any]]:
        values = ((path, _field(recipe, path)) for path in paths)
        return ((path, value) for path, value in values if value is not None and value < low)

    if world_size < 1:
        yield f"world_size={world_size} must be at least 1; nearest legal: 1"
    for path, value in bad(_AT_LEAST_ONE, 1):
        yield f"{path}={value} must be at least 1; nearest legal: 1"
    for path, value in bad(_AT_LEAST_ZERO, 0):
        yield f"{path}={value} must not be negative; nearest legal: 0"
    for path in _ABOVE_ZERO:
        if (value := _field(recipe, path)) <= 0:
            yield f"{path}={value} must be greater than 0"
    for path in _ADAM_BETAS:
        if not 0 <= (value := _field(recipe, path)) < 1:
            yield f"{path}={value} must be at least 0 and less than 1; usual: 0.9, 0.95"


def _attention(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    heads, groups = model.num_attention_heads, num_query_groups(model)
    if model.head_dim is None and indivisible(model.hidden_size, heads):
        yield (
            f"model.hidden_size={model.hidden_size} is not divisible by num_attention_heads={heads}"
            f"; nearest legal: {multiples(model.hidden_size, heads)}; or set model.head_dim"
        )
    elif heads > 0 and indivisible(head_dim(model), 2):
        yield (
            f"model.head_dim={head_dim(model)} must be even, RoPE turns channels in pairs; "
            f"nearest legal: {multiples(head_dim(model), 2)}"
        )
    if indivisible(heads, groups):
        yield (
            f"model.num_query_groups={groups} must divide num_attention_heads={heads}; "
            f"legal: {join(divisors(heads))}"
        )
    if model.rope_theta > 0 and model.rope_theta != int(model.rope_theta):
        yield (
            f"model.rope_theta={model.rope_theta} must be a whole number, as Megatron's "
            f"--rotary-base is; nearest legal: {round(model.rope_theta) or 1}"
        )


def _vocabulary(recipe: Recipe) -> Iterator[str]:
    ids, rows = recipe.model.vocab_size, recipe.model.padded_vocab_size
    if ids is not None and rows is not None and 0 < rows < ids:
        yield (
            f"model.padded_vocab_size={rows} is less than vocab_size={ids}, and every id has a "
            f"row; nearest legal: {ids}"
        )


def _tensor_parallel(recipe: Recipe) -> Iterator[str]:
    model, tp = recipe.model, recipe.parallel.tensor_model_parallel_size
    heads, groups = model.num_attention_heads, num_query_groups(model)
    if indivisible(heads, tp):
        yield (
            f"parallel.tensor_model_parallel_size={tp}: num_attention_heads={heads} must be "
            f"divisible by it; legal: {join(divisors(heads))}"
        )
    elif indivisible(groups, tp) and indivisible(tp, groups):
        legal = [g for g in divisors(heads) if g % tp == 0 or tp % g == 0]
        yield (
            f"model.num_query_groups={groups} must be a multiple or a divisor of "
            f"tensor_model_parallel_size={tp}; legal: {join(legal)}"
        )
    for name, size in (
        ("ffn_hidden_size", model.ffn_hidden_size),
        ("padded_vocab_size" if model.padded_vocab_size else "vocab_size", embedding_rows(model)),
    ):
        if size is not None and indivisible(size, tp):
            yield (
                f"model.{name}={size} is not divisible by tensor_model_parallel_size={tp}; "
                f"nearest legal: {multiples(size, tp)}"
            )


def _sequence_parallel(recipe: Recipe) -> Iterator[str]:
    tp, seq_length = recipe.parallel.tensor_model_parallel_size, recipe.model.seq_length
    if not recipe.parallel.sequence_parallel:
        return
    if tp == 1:
        legal = [d for d in divisors(recipe.model.num_attention_heads) if d > 1]
        yield (
            "parallel.sequence_parallel=true needs tensor_model_parallel_size greater than 1, not "
            f"1; legal: sequence_parallel=false, or tensor_model_parallel_size={join(legal)}"
        )
    if indivisible(seq_length, tp):
        yield (
            f"model.seq_length={seq_length} is not divisible by tensor_model_parallel_size={tp}, "
            f"which sequence_parallel needs; nearest legal: {multiples(seq_length, tp)}"
        )


def _pipeline_parallel(recipe: Recipe) -> Iterator[str]:
    pp, layers = recipe.parallel.pipeline_model_parallel_size, recipe.model.num_layers
    if indivisible(layers, pp):
        yield (
            f"parallel.pipeline_model_parallel_size={pp}: num_layers={layers} must be divisible "
            f"by it; legal: {join(divisors(layers))}"
        )


def _batch(recipe: Recipe, world_size: int) -> Iterator[str]:
    tp = recipe.parallel.tensor_model_parallel_size
    pp = recipe.parallel.pipeline_model_parallel_size
    if min(tp, pp, world_size) < 1:
        return
    if indivisible(world_size, tp * pp):
        yield (
            f"world_size={world_size} is not divisible by tensor_model_parallel_size x "
            f"pipeline_model_parallel_size = {tp} x {pp} = {tp * pp}; "
            f"nearest legal: {multiples(world_size, tp * pp)}"
        )
        return
    batch, micro = recipe.training.global_batch_size, recipe.training.micro_batch_size
    dp = data_parallel_size(recipe, world_size)
    if indivisible(batch, micro * dp):
        yield (
            f"training.global_batch_size={batch} is not divisible by micro_batch_size x "
            f"data_parallel_size = {micro} x {dp} = {micro * dp}; "
            f"nearest legal: {multiples(batch, micro * dp)}"
        )


def _schedule(recipe: Recipe) -> Iterator[str]:
    warmup, decay = recipe.schedule.lr_warmup_iters, recipe.schedule.lr_wsd_decay_iters
    steps = recipe.training.train_iters
    if warmup >= steps > 0:
        yield (
            f"schedule.lr_warmup_iters={warmup} must be less than training.train_iters={steps}; "
            f"nearest legal: {steps - 1}"
        )
    elif min(warmup, decay) >= 0 and warmup + decay > steps > 0:
        yield (
            f"schedule.lr_warmup_iters + lr_wsd_decay_iters = {warmup} + {decay} = "
            f"{warmup + decay} is more than training.train_iters={steps}; nearest legal: "
            f"lr_wsd_decay_iters={steps - warmup}, or train_iters={warmup + decay}"
        )
    if recipe.optimizer.min_lr > recipe.optimizer.lr > 0:
        yield (
            f"optimizer.min_lr={recipe.optimizer.min_lr} must not be greater than "
            f"optimizer.lr={recipe.optimizer.lr}; legal: 0 to {recipe.optimizer.lr}"
        )


def _optimizer(recipe: Recipe) -> Iterator[str]:
    if recipe.model.activation != "xielu":
        return
    if recipe.training.precision == "bf16" and not recipe.parallel.use_distributed_optimizer:
        yield (
            "parallel.use_distributed_optimizer=false cannot go with training.precision=bf16: "
            "Megatron's plain bf16 optimizer cannot save the fp32 alphas; legal: true, or fp32"
        )


def _checkpoint(recipe: Recipe) -> Iterator[str]:
    interval, every = recipe.checkpoint.save_interval, recipe.checkpoint.keep_every
    if every is None:
        return
    if recipe.checkpoint.keep_last is None:
        yield (
            f"checkpoint.keep_every={every} means nothing while keep_last=null keeps all steps; "
            "legal: keep_last=2, or keep_every=null"
        )
    if indivisible(every, interval):
        yield (
            f"checkpoint.keep_every={every} is not a multiple of save_interval={interval}, so no "
            f"such step is saved; nearest legal: {multiples(every, interval)}"
        )


def _xielu(recipe: Recipe) -> Iterator[str]:
    if recipe.model.activation != "xielu":
        yield from _without_xielu(recipe)
        return
    # a_n = beta + softplus(alpha_n): no alpha_n gives beta or less
    alpha_n, beta = recipe.xielu.alpha_n_init, recipe.xielu.beta
    if 0 < alpha_n <= beta:
        yield (
            f"xielu.alpha_n_init={alpha_n} must be greater than xielu.beta={beta}; "
            f"the paper's distance gives {beta + 0.3:g}"
        )
    if recipe.xielu.saved_input == "e4m3" and recipe.xielu.impl == "reference":
        yield (
            "xielu.saved_input=e4m3 cannot go with xielu.impl=reference, whose backward is "
            "autograd's; legal: saved_input=exact, or impl=auto, triton, cpu or eager"
        )


def _without_xielu(recipe: Recipe) -> Iterator[str]:
    baseline = f"model.activation={recipe.model.activation}"
    for field in fields(Xielu):
        if (value := getattr(recipe.xielu, field.name)) != field.default:
            yield (
                f"xielu.{field.name}={_yaml(value)} has no meaning with {baseline}; "
                f"legal: {_yaml(field.default)}, or model.activation=xielu"
            )


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _field(recipe: Recipe, path: str) -> Any:
    section, key = path.split(".")
    return getattr(getattr(recipe, section), key)
