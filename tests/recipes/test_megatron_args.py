"""The flags of a recipe, parsed and validated by the installed Megatron itself."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_xielu.recipes import Recipe, load_recipe, megatron_args, preset_names

RUN_DIR = Path("runs/a run")
PATHS = {
    "save": "checkpoints",
    "load": "checkpoints",
    "tensorboard_dir": "tensorboard",
    "data_cache_path": "cache",
}


# recipe fields whose upstream name differs, and those that are no field of the parsed arguments
SAME_NAMES: dict[str, dict[str, str]] = {
    "model": {"norm_epsilon": "layernorm_epsilon", "init_std": "init_method_std"},
    "parallel": {},
    "training": {},
    "optimizer": {},
    "schedule": {},
    "data": {},
    "checkpoint": {},
    "logging": {},
    "health": {},
}
UNPARSED: dict[str, set[str]] = {section: set() for section in SAME_NAMES} | {
    "model": {
        "num_query_groups",
        "head_dim",
        "padded_vocab_size",
        "activation",
        "tie_embeddings",
        "rope_theta",
        "rope_scaling_factor",
        "transformer_impl",
    },
    "training": {"precision"},
    "data": {"path"},
    # Megatron writes, what stays and what counts is decided here
    "checkpoint": {"keep_last", "keep_every", "on_corrupt"},
    "health": {"every", "on_nonfinite", "max_skipped_steps"},
}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    arguments = pytest.importorskip("megatron.training.arguments")
    return arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def _argv(recipe: Recipe, **changes: Any) -> list[str]:
    tp = recipe.parallel.tensor_model_parallel_size * recipe.parallel.pipeline_model_parallel_size
    choices: dict[str, Any] = {
        "world_size": tp,
        "device": "cpu",
        "run_dir": RUN_DIR,
        "precision": "fp32",
        "transformer_impl": "local",
    }
    return megatron_args(recipe, **(choices | changes))


GPU = {"device": "cuda", "precision": "bf16", "transformer_impl": "transformer_engine"}


def _recipe(name: str, *overrides: str) -> Recipe:
    given = ["data.path=/data/a corpus", "model.vocab_size=4096", "logging.eval_iters=4"]
    return load_recipe(name, [*given, *overrides])


@pytest.mark.parametrize("platform", [{}, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", preset_names())
def test_megatron_reads_back_the_recipe(
    parser: argparse.ArgumentParser, name: str, platform: dict[str, Any]
) -> None:
    recipe = _recipe(name)
    # an unknown flag or a wrong type would exit
    args = parser.parse_args(_argv(recipe, **platform))
    for section, renamed in SAME_NAMES.items():
        values = vars(getattr(recipe, section))
        for field in sorted(set(values) - UNPARSED[section]):
            assert getattr(args, renamed.get(field, field)) == values[field], f"{section}.{field}"
    assert args.rotary_base == recipe.model.rope_theta
    assert not args.use_rope_scaling
    assert args.kv_channels * args.num_attention_heads == args.hidden_size
    assert args.untie_embeddings_and_output_weights is not recipe.model.tie_embeddings
    assert args.max_position_embeddings == args.seq_length == recipe.model.seq_length
    assert args.padded_vocab_size == args.vocab_size == 4096
    padded = parser.parse_args(_argv(_recipe(name, "model.padded_vocab_size=4224"), **platform))
    assert (padded.padded_vocab_size, padded.vocab_size) == (4224, 4096)
    assert (args.lr_decay_style, args.lr_wsd_decay_style) == ("WSD", "minus_sqrt")
    assert args.lr_decay_iters == args.train_iters
    assert args.train_data_path == ["/data/a corpus/train"]
    assert args.valid_data_path == ["/data/a corpus/valid"]
    for field, folder in PATHS.items():
        assert getattr(args, field) == str(RUN_DIR / folder)
    assert args.transformer_impl == platform.get("transformer_impl", "local")
    assert args.distributed_backend == ("nccl" if platform else "gloo")
    assert (args.bf16, args.fp16) == (bool(platform), False)
    assert args.gradient_accumulation_fusion is False
    assert args.apply_rope_fusion is args.masked_softmax_fusion is bool(platform)
    assert args.disable_jit_fuser is not bool(platform)


def test_ranks_wait_longer_once_they_train(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(_argv(_recipe("tiny")))
    assert args.distributed_timeout_seconds_after_init > 60 * args.distributed_timeout_minutes
    alone = parser.parse_args(_argv(_recipe("tiny", "parallel.tensor_model_parallel_size=1")))
    assert alone.distributed_timeout_seconds_after_init is None


def test_options_reach_their_flags(parser: argparse.ArgumentParser) -> None:
    recipe = _recipe(
        "tiny",
        "model.num_attention_heads=6",
        "model.num_query_groups=2",
        "model.head_dim=64",
        "model.qk_layernorm=true",
        "model.rope_scaling_factor=32",
        "model.tie_embeddings=false",
        "parallel.use_distributed_optimizer=false",
        "parallel.sequence_parallel=true",
        "logging.eval_iters=0",
    )
    args = parser.parse_args(_argv(recipe, gradient_accumulation_fusion=True))
    assert args.group_query_attention
    assert args.num_query_groups == 2
    assert args.kv_channels == 64
    assert args.qk_layernorm
    assert (args.use_rope_scaling, args.rope_scaling_factor) == (True, 32.0)
    assert args.sequence_parallel
    assert args.untie_embeddings_and_output_weights
    assert args.gradient_accumulation_fusion
    assert not args.use_distributed_optimizer
    assert not args.dist_ckpt_optim_fully_reshardable
    # nothing is evaluated, so nothing is read
    assert args.valid_data_path is None
    assert args.train_data_path is not None


def test_overlap_only_where_there_is_something_to_overlap(parser: argparse.ArgumentParser) -> None:
    recipe = _recipe("tiny", "parallel.tensor_model_parallel_size=2")
    for world_size, expected in ((2, False), (4, True)):
        args = parser.parse_args(_argv(recipe, world_size=world_size, **GPU))
        assert args.overlap_grad_reduce is args.overlap_param_gather is expected
    args = parser.parse_args(_argv(recipe, world_size=4))
    assert not args.overlap_grad_reduce
    assert not args.overlap_param_gather


def test_without_data_another_source_can_be_given(parser: argparse.ArgumentParser) -> None:
    recipe = load_recipe("tiny", ["model.vocab_size=4096", "logging.eval_iters=1"])
    args = parser.parse_args([*_argv(recipe), "--mock-data"])
    assert args.train_data_path is None
    assert args.valid_data_path is None


def test_vocabulary_must_be_resolved() -> None:
    with pytest.raises(AssertionError, match="vocab_size"):
        _argv(load_recipe("tiny"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_megatron_builds_the_intended_model(
    parser: argparse.ArgumentParser, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream's own validation and config say Llama: what its defaults would have made is gone."""
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import validate_args

    recipe = _recipe("llama-1.1b-xielu", "data.path=null", "training.global_batch_size=5")
    args = parser.parse_args(_argv(recipe, precision=precision))
    args.rank, args.world_size = 0, 1
    config = gpt_config_from_args(validate_args(args))
    transformer = config.transformer
    assert (config.vocab_size, config.should_pad_vocab) == (4096, False)
    assert config.share_embeddings_and_output_weights
    assert config.position_embedding_type == "rope"
    assert (config.rotary_base, config.rotary_percent) == (500_000, 1.0)
    assert transformer.normalization == "RMSNorm"
    assert transformer.layernorm_epsilon == 1e-6
    assert not transformer.layernorm_zero_centered_gamma
    assert not transformer.rotary_interleaved
    assert not transformer.add_bias_linear
    assert not transformer.add_qkv_bias
    assert not transformer.gated_linear_unit
    assert not transformer.bias_activation_fusion
    assert transformer.hidden_dropout == transformer.attention_dropout == 0.0
    assert transformer.num_query_groups == 16
    assert transformer.kv_channels == 96
    assert transformer.ffn_hidden_size == 9216
    assert transformer.bf16 is (precision == "bf16")
    assert transformer.embedding_init_method_std == transformer.init_method_std == 0.025
    assert args.accumulate_allreduce_grads_in_fp32 is (precision == "bf16")


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("platform", [{}, GPU], ids=["cpu", "gpu"])
def test_baselines_are_megatrons_own_activations(
    parser: argparse.ArgumentParser, activation: str, platform: dict[str, Any]
) -> None:
    from megatron.core.activations import squared_relu
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import validate_args

    one_rank = "parallel.tensor_model_parallel_size=1"
    recipe = _recipe("tiny", f"model.activation={activation}", one_rank)
    args = parser.parse_args(_argv(recipe, **platform))
    # a kernel of TransformerEngine's, which need not be installed here
    args.apply_rope_fusion = False
    args.rank, args.world_size = 0, 1
    transformer = gpt_config_from_args(validate_args(args)).transformer
    silu = torch.nn.functional.silu
    expected = (silu, True, True) if activation == "swiglu" else (squared_relu, False, False)
    assert expected == (
        transformer.activation_func,
        transformer.gated_linear_unit,
        transformer.bias_activation_fusion,
    )


def test_schedule_is_the_papers() -> None:
    """Upstream's scheduler with these flags is warmup, flat, 1 - sqrt, at the paper's steps."""
    scheduler = pytest.importorskip("megatron.core.optimizer_param_scheduler")
    recipe = _recipe("llama-1.1b-xielu")
    steps, schedule = recipe.training.train_iters, recipe.schedule
    group = {"lr": 0.0, "weight_decay": 0.0}
    wsd = scheduler.OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=0.0,
        max_lr=recipe.optimizer.lr,
        min_lr=recipe.optimizer.min_lr,
        lr_warmup_steps=schedule.lr_warmup_iters,
        lr_decay_steps=steps,
        lr_decay_style="WSD",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=schedule.lr_wsd_decay_iters,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )

    def lr(step: int) -> float:
        wsd.num_steps = step
        return wsd.get_lr(group)

    # the paper's: 2,000 warm-up steps, flat to step 55,500, then 1 - sqrt to 0 at step 70,000
    assert [lr(1000), lr(2000), lr(55_500)] == [4e-4, 8e-4, 8e-4]
    assert lr(62_750) == pytest.approx(8e-4 * (1 - math.sqrt(0.5)), rel=1e-12)
    assert lr(70_000) == 0.0


def test_an_asynchronous_save_is_megatrons_on_gpus_alone(parser: argparse.ArgumentParser) -> None:
    recipe = _recipe("tiny", "checkpoint.async_save=true")
    args = parser.parse_args(_argv(recipe, **GPU))
    assert (args.async_save, args.use_persistent_ckpt_worker) == (True, True)
    assert args.async_strategy == "mcore"
    assert parser.parse_args(_argv(recipe)).async_save is False
