"""A recipe as Megatron-Core 0.19's own command line.

Only strings: Megatron is not imported here. Flags whose upstream default already says what a recipe
means (no sliding window, rotary_percent 1, cross-document attention) are left out; every
other decision is spelled out, so that a change of an upstream default changes no run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from megatron_xielu.recipes.derived import (
    data_parallel_size,
    fp8_format,
    head_dim,
    num_query_groups,
)
from megatron_xielu.recipes.schema import Model, Recipe

# of a collective, whose other ranks may be gone for good
_START_MINUTES = 10
_STEP_SECONDS = 30 * 60

Flags = Mapping[str, str | int | float | bool | Path]


def megatron_args(
    recipe: Recipe,
    *,
    world_size: int,
    device: Literal["cuda", "cpu"],
    run_dir: Path,
    precision: Literal["fp32", "bf16"],
    transformer_impl: Literal["local", "transformer_engine"],
    gradient_accumulation_fusion: bool = False,
    cache: str = "",
) -> list[str]:
    """Returns the flags of a run that passed `check`, with the derived choices resolved.

    `model.vocab_size` must be set. `gradient_accumulation_fusion` needs Apex's extension
    `fused_weight_gradient_mlp_cuda`, without which upstream refuses to build the output layer, or
    `mcore.weight_gradients` in its place.
    `cache` is a folder below run_dir/cache for the dataset's index files.
    The recipe's `xielu` and `health` sections and `fp8.fc2_input` have no upstream flags and are
    not part of it.
    """
    flags: list[str] = []
    for group in (
        _model(recipe.model),
        _training(recipe),
        _parallel(recipe, world_size, device),
        _data(recipe, run_dir / "cache" / cache),
        _checkpoint(recipe, run_dir, device),
        _logging(recipe, run_dir),
        _precision(precision),
        _fp8(recipe),
        _platform(device, precision, transformer_impl, gradient_accumulation_fusion),
    ):
        flags += _to_argv(group)
    return flags


def _model(model: Model) -> Flags:
    assert model.vocab_size is not None, "resolve model.vocab_size from the data first"
    groups = num_query_groups(model)
    return {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--ffn-hidden-size": model.ffn_hidden_size,
        # xIELU has no flag: `mcore` puts it in place of upstream's default
        "--swiglu": model.activation == "swiglu",
        "--squared-relu": model.activation == "relu2",
        "--num-attention-heads": model.num_attention_heads,
        "--kv-channels": head_dim(model),
        "--group-query-attention": groups != model.num_attention_heads,
        "--num-query-groups": groups,
        "--seq-length": model.seq_length,
        "--max-position-embeddings": model.seq_length,
        "--position-embedding-type": "rope",
        # upstream parses an integer; `check` has seen to it that nothing is lost
        "--rotary-base": int(model.rope_theta),
        **_rope_scaling(model),
        "--normalization": "RMSNorm",
        "--norm-epsilon": model.norm_epsilon,
        "--qk-layernorm": model.qk_layernorm,
        "--disable-bias-linear": True,
        "--attention-dropout": 0.0,
        "--hidden-dropout": 0.0,
        "--init-method-std": model.init_std,
        "--untie-embeddings-and-output-weights": not model.tie_embeddings,
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": model.vocab_size,
        # upstream would pad by tensor_model_parallel_size, and then no other one could resume
        "--padded-vocab-size": model.padded_vocab_size or model.vocab_size,
    }


def _rope_scaling(model: Model) -> Flags:
    if model.rope_scaling_factor is None:
        return {}
    return {"--use-rope-scaling": True, "--rope-scaling-factor": model.rope_scaling_factor}


def _training(recipe: Recipe) -> Flags:
    training, optimizer, schedule = recipe.training, recipe.optimizer, recipe.schedule
    return {
        "--train-iters": training.train_iters,
        "--micro-batch-size": training.micro_batch_size,
        "--global-batch-size": training.global_batch_size,
        "--seed": training.seed,
        "--optimizer": "adam",
        "--lr": optimizer.lr,
        "--min-lr": optimizer.min_lr,
        "--adam-beta1": optimizer.adam_beta1,
        "--adam-beta2": optimizer.adam_beta2,
        "--adam-eps": optimizer.adam_eps,
        "--weight-decay": optimizer.weight_decay,
        "--clip-grad": optimizer.clip_grad,
        "--lr-decay-style": "WSD",
        "--lr-decay-iters": training.train_iters,
        "--lr-warmup-iters": schedule.lr_warmup_iters,
        "--lr-wsd-decay-iters": schedule.lr_wsd_decay_iters,
        "--lr-wsd-decay-style": schedule.lr_wsd_decay_style,
        # upstream's check raises on one rank alone; mcore.health decides on all of them
        "--no-check-for-nan-in-loss-and-grad": True,
        # the recipe decides the schedule of a resumed run too, so that a run can be prolonged
        "--override-opt-param-scheduler": True,
    }


def _parallel(recipe: Recipe, world_size: int, device: str) -> Flags:
    parallel = recipe.parallel
    sharded = parallel.use_distributed_optimizer
    overlap = device == "cuda" and data_parallel_size(recipe, world_size) > 1
    return {
        "--tensor-model-parallel-size": parallel.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": parallel.pipeline_model_parallel_size,
        "--sequence-parallel": parallel.sequence_parallel,
        "--use-distributed-optimizer": sharded,
        # the default layout of its checkpoint can only be read at the same TP and PP
        "--dist-ckpt-optim-fully-reshardable": sharded,
        "--overlap-grad-reduce": overlap,
        "--overlap-param-gather": overlap and sharded,
        **(_timeouts() if world_size > 1 else {}),
    }


def _timeouts() -> Flags:
    return {
        # Megatron's own default: rank 0 writes the index of the data while the others wait
        "--distributed-timeout-minutes": _START_MINUTES,
        # from the second step on, mistakes are over, and a storage that stalls may come back
        "--distributed-timeout-seconds-after-init": _STEP_SECONDS,
    }


def _data(recipe: Recipe, cache: Path) -> Flags:
    flags: dict[str, str | int | float | bool | Path] = {
        "--num-workers": recipe.data.num_workers,
        # attention is causal throughout, and a mask costs seq_length^2 bytes per sample
        "--no-create-attention-mask-in-dataloader": True,
        "--data-cache-path": cache,
    }
    if recipe.data.path is not None:
        folder = Path(recipe.data.path)
        flags["--train-data-path"] = folder / "train"
        if recipe.logging.eval_iters != 0:
            flags["--valid-data-path"] = folder / "valid"
    return flags


def _checkpoint(recipe: Recipe, run_dir: Path, device: str) -> Flags:
    # without a GPU the flag is refused, and pretrain switches it on by itself
    async_save = recipe.checkpoint.async_save and device == "cuda"
    return {
        "--save": run_dir / "checkpoints",
        "--load": run_dir / "checkpoints",
        "--save-interval": recipe.checkpoint.save_interval,
        "--ckpt-format": "torch_dist",
        "--exit-signal-handler": True,
        "--async-save": async_save,
        "--use-persistent-ckpt-worker": async_save,
        **({"--async-strategy": "mcore"} if async_save else {}),
    }


def _logging(recipe: Recipe, run_dir: Path) -> Flags:
    assert recipe.logging.eval_iters is not None, "resolve logging.eval_iters from the data first"
    return {
        "--log-interval": recipe.logging.log_interval,
        # the curves of TensorBoard have the same points as metrics.jsonl
        "--tensorboard-log-interval": recipe.logging.log_interval,
        "--log-throughput": True,
        "--log-timers-to-tensorboard": True,
        "--eval-interval": recipe.logging.eval_interval,
        "--eval-iters": recipe.logging.eval_iters,
        "--tensorboard-dir": run_dir / "tensorboard",
    }


def _precision(precision: str) -> Flags:
    bf16 = precision == "bf16"
    return {"--bf16": bf16, "--accumulate-allreduce-grads-in-fp32": bf16}


def _fp8(recipe: Recipe) -> Flags:
    fp8 = recipe.fp8
    if fp8.recipe == "off" or fp8.emulate:
        return {}
    flags: dict[str, str | int | float | bool | Path] = {
        "--fp8-format": fp8_format(fp8),
        "--fp8-recipe": fp8.recipe,
        "--fp8-param-gather": fp8.param_gather,
        # TransformerEngine cannot lay MXFP8 weights into a buffer of the optimizer's
        "--reuse-grad-buf-for-mxfp8-param-ag": fp8.param_gather and fp8.recipe == "mxfp8",
        # slice by slice, each would be loaded with a scale of its own
        "--no-stream-ckpt-dequant": fp8.recipe == "tensorwise",
        # of a dense model it only chooses the MLP's class, for which our layers bring xIELU
        "--use-transformer-engine-op-fuser": fp8.fused and recipe.model.activation == "xielu",
    }
    if fp8.recipe == "delayed":
        # upstream's own defaults are the last amax alone, not TransformerEngine's
        flags["--fp8-amax-history-len"] = fp8.amax_history_len
        flags["--fp8-amax-compute-algo"] = fp8.amax_compute_algo
    if fp8.bf16_layers_at_start or fp8.bf16_layers_at_end:
        flags["--first-last-layers-bf16"] = True
        flags["--num-layers-at-start-in-bf16"] = fp8.bf16_layers_at_start
        flags["--num-layers-at-end-in-bf16"] = fp8.bf16_layers_at_end
    return flags


def _platform(
    device: str, precision: str, transformer_impl: str, gradient_accumulation_fusion: bool
) -> Flags:
    local, cpu = transformer_impl == "local", device == "cpu"
    return {
        "--transformer-impl": transformer_impl,
        "--distributed-backend": "gloo" if cpu else "nccl",
        "--no-gradient-accumulation-fusion": not gradient_accumulation_fusion,
        # the fused kernels of the local layers are Apex's; softmax in bf16 loses too much
        "--no-masked-softmax-fusion": local,
        "--no-persist-layer-norm": local,
        "--no-rope-fusion": local,
        "--attention-softmax-in-fp32": local,
        # the fused one rounds the gradient of fp32 logits to bf16
        "--cross-entropy-loss-fusion": not cpu and precision == "bf16",
        # torch.compile needs a driver with a CUDA build of torch
        "--disable-jit-fuser": cpu,
    }


def _to_argv(flags: Flags) -> list[str]:
    argv: list[str] = []
    for flag, value in flags.items():
        if value is True:
            argv.append(flag)
        elif value is not False:
            argv += [flag, str(value)]
    return argv
