"""FP8 in a recipe: the flags as the installed Megatron reads them, and every rule's message."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_xielu.recipes import (
    Recipe,
    RecipeError,
    load_recipe,
    megatron_args,
    to_yaml,
    validate,
)
from megatron_xielu.recipes.fp8 import local_sizes

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
# sizes that differ from each other, all legal for each recipe
BASE = (
    "model.num_layers=4",
    "model.hidden_size=192",
    "model.num_attention_heads=6",
    "model.ffn_hidden_size=768",
    "model.seq_length=256",
    "parallel.tensor_model_parallel_size=2",
    "training.global_batch_size=16",
    "training.micro_batch_size=1",
)


def recipe(*overrides: str) -> Recipe:
    return load_recipe("tiny", [*BASE, *overrides])


def argv(recipe: Recipe) -> list[str]:
    return megatron_args(
        recipe,
        world_size=2,
        device="cuda",
        run_dir=Path("run"),
        precision="bf16",
        transformer_impl="transformer_engine",
    )


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    arguments = pytest.importorskip("megatron.training.arguments")
    return arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def config_of(parser: argparse.ArgumentParser, *overrides: str) -> tuple[Any, Any]:
    """Megatron's own config of a recipe, past its validation, and the parsed arguments."""
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import validate_args

    # tensor parallelism makes Megatron ask the GPU for its architecture
    given = ("parallel.tensor_model_parallel_size=1", "model.vocab_size=4096")
    args = parser.parse_args(argv(recipe(*given, "logging.eval_iters=4", *overrides)))
    # a kernel of TransformerEngine's, which need not be installed here
    args.apply_rope_fusion = False
    args.rank, args.world_size = 0, 2 if "pipeline" in " ".join(overrides) else 1
    return gpt_config_from_args(validate_args(args)).transformer, args


def test_off_is_off(parser: argparse.ArgumentParser) -> None:
    settings = ("fp8.param_gather=true", "fp8.bf16_layers_at_start=1", "fp8.format=e4m3")
    given = argv(recipe("model.vocab_size=4096", "logging.eval_iters=4", "fp8.recipe=off"))
    changed = argv(recipe("model.vocab_size=4096", "logging.eval_iters=4", *settings))
    assert given == changed
    assert not [word for word in given if "fp8" in word or "fuser" in word or "bf16-layer" in word]
    config, args = config_of(parser)
    assert (config.fp8, config.fp8_param, config.first_last_layers_bf16) == (None, False, False)
    assert (args.fp8, config.use_transformer_engine_op_fuser) == (None, False)


@pytest.mark.parametrize("name", RECIPES)
def test_megatron_reads_the_recipe(
    parser: argparse.ArgumentParser, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    config, args = config_of(parser, f"fp8.recipe={name}")
    assert config.fp8_recipe == name
    # TransformerEngine's default of each recipe's class
    assert config.fp8 == {"blockwise": "e4m3", "mxfp8": "e4m3"}.get(name, "hybrid")
    assert config.use_transformer_engine_op_fuser
    assert (config.fp8_param, config.first_last_layers_bf16) == (False, False)
    assert not args.reuse_grad_buf_for_mxfp8_param_ag
    assert config.fp8_dot_product_attention is config.fp8_multi_head_attention is False
    assert not [warning for warning in recwarn if "fp8" in str(warning.message)]
    if name == "delayed":
        assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")


def test_every_key_reaches_megatron(parser: argparse.ArgumentParser) -> None:
    config, args = config_of(
        parser,
        "fp8.recipe=mxfp8",
        "fp8.format=hybrid",
        "fp8.param_gather=true",
        "fp8.bf16_layers_at_start=1",
        "fp8.bf16_layers_at_end=2",
        "fp8.fused=false",
    )
    assert (config.fp8, config.fp8_param, args.fp8_param_gather) == ("hybrid", True, True)
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 2)
    assert not config.use_transformer_engine_op_fuser
    assert args.reuse_grad_buf_for_mxfp8_param_ag
    # at one end only: Megatron's defaults of 1 must not come in
    config, _ = config_of(parser, "fp8.recipe=tensorwise", "fp8.bf16_layers_at_end=3")
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (0, 3)
    delayed = ("fp8.amax_history_len=16", "fp8.amax_compute_algo=most_recent")
    config, _ = config_of(parser, "fp8.recipe=delayed", *delayed)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (16, "most_recent")


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_refused_early_megatron_refuses_too(
    parser: argparse.ArgumentParser, name: str
) -> None:
    """Otherwise a rule of ours would keep something from running that could."""
    delayed = name == "delayed"
    pipeline = ("parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2")
    layers = ("fp8.bf16_layers_at_start=1",) if delayed else ("fp8.bf16_layers_at_end=3", *pipeline)
    expected = "does not support first / last layer" if delayed else "must be between 0 and number"
    with pytest.raises(ValueError, match=expected):
        config_of(parser, f"fp8.recipe={name}", *layers)
    assert validate(recipe(f"fp8.recipe={name}", *layers), 2) != []


def test_off_survives_yaml(tmp_path: Path) -> None:
    """YAML 1.1 reads a bare off as false."""
    path = tmp_path / "recipe.yaml"
    assert recipe("fp8.recipe=off").fp8.recipe == "off"
    path.write_text(to_yaml(recipe("fp8.recipe=tensorwise")) + "\n")
    assert load_recipe(str(path)).fp8.recipe == "tensorwise"
    path.write_text(to_yaml(load_recipe(str(path), ["fp8.recipe=off"])))
    assert load_recipe(str(path)) == recipe()


RULES = [
    (
        ["fp8.recipe=delayed", "model.hidden_size=204", "model.head_dim=32"],
        "model.hidden_size=204 is not a multiple of 16, which fp8.recipe=delayed needs; "
        "nearest legal: 192, 208",
    ),
    # head_dim follows from hidden_size, so the nearest numbers are legal for attention as well
    (
        ["fp8.recipe=tensorwise", "model.hidden_size=204"],
        "model.hidden_size=204 is not a multiple of 16, which fp8.recipe=tensorwise needs; "
        "nearest legal: 192, 288",
    ),
    (
        ["fp8.recipe=blockwise", "model.hidden_size=240"],
        "attention's (heads + 2 groups) x head_dim / TP = 360 or heads x head_dim / TP = 120 is "
        "not a multiple of 16, which fp8.recipe=blockwise needs; nearest legal: "
        "model.hidden_size=192, 288",
    ),
    (
        ["fp8.recipe=tensorwise", "model.head_dim=36"],
        "attention's (heads + 2 groups) x head_dim / TP = 324 or heads x head_dim / TP = 108 is "
        "not a multiple of 16, which fp8.recipe=tensorwise needs; nearest legal: "
        "model.head_dim=32, 48",
    ),
    (
        ["fp8.recipe=tensorwise", "model.ffn_hidden_size=776"],
        "model.ffn_hidden_size / TP = 776 / 2 = 388 is not a multiple of 16, which "
        "fp8.recipe=tensorwise needs; nearest legal: 768, 800",
    ),
    (
        [
            "fp8.recipe=mxfp8",
            "model.ffn_hidden_size=784",
            "parallel.tensor_model_parallel_size=1",
        ],
        "model.ffn_hidden_size=784 is not a multiple of 32, which fp8.recipe=mxfp8 needs; "
        "nearest legal: 768, 800",
    ),
    # 8 tokens more than 256 pass TransformerEngine's Python, and not cuBLAS in the weight gradient
    (
        ["fp8.recipe=delayed", "model.seq_length=264"],
        "model.seq_length x training.micro_batch_size = 264 x 1 = 264 tokens are not a multiple "
        "of 16, which fp8.recipe=delayed needs; nearest legal: seq_length=256, 272",
    ),
    (
        ["fp8.recipe=tensorwise", "model.seq_length=250", "training.micro_batch_size=4"],
        "model.seq_length x training.micro_batch_size = 250 x 4 = 1000 tokens are not a multiple "
        "of 16, which fp8.recipe=tensorwise needs; nearest legal: seq_length=248, 252",
    ),
    (
        ["fp8.recipe=blockwise", "model.seq_length=264", "parallel.sequence_parallel=true"],
        "model.seq_length x training.micro_batch_size / TP = 264 x 1 / 2 = 132 tokens are not a "
        "multiple of 8, which fp8.recipe=blockwise needs; nearest legal: seq_length=256, 272",
    ),
    (
        ["fp8.recipe=mxfp8", "model.seq_length=288", "parallel.sequence_parallel=true"],
        "model.seq_length x training.micro_batch_size / TP = 288 x 1 / 2 = 144 tokens are not a "
        "multiple of 32, which fp8.recipe=mxfp8 needs; nearest legal: seq_length=256, 320",
    ),
    (
        ["fp8.recipe=tensorwise", "training.precision=fp32"],
        "training.precision=fp32 cannot go with fp8.recipe=tensorwise, which quantizes bf16; "
        "legal: bf16, auto (bf16 on a GPU), or fp8.recipe=off",
    ),
    (
        ["fp8.recipe=tensorwise", "model.transformer_impl=local"],
        "model.transformer_impl=local cannot go with fp8.recipe=tensorwise: TransformerEngine "
        "computes FP8; legal: transformer_engine, auto, or fp8.recipe=off",
    ),
    (
        ["fp8.recipe=tensorwise", "model.activation=relu2", "fp8.fc2_input=bf16"],
        "fp8.fc2_input=bf16 cannot go with model.activation=relu2: TransformerEngine's own modules "
        "quantize every input; legal: fp8, or model.activation=xielu",
    ),
    (
        ["fp8.recipe=tensorwise", "model.activation=swiglu", "fp8.on_outlier=stop"],
        "fp8.on_outlier=stop cannot go with model.activation=swiglu: only xIELU is watched; "
        "legal: warn, or model.activation=xielu",
    ),
    (
        ["fp8.recipe=tensorwise", "fp8.fc2_input=bf16", "fp8.fused=false"],
        "fp8.fc2_input=bf16 cannot go with fp8.fused=false: TransformerEngine's own modules "
        "quantize every input; legal: fused=true, or fc2_input=fp8",
    ),
    # Megatron gathers FP8 weights from its distributed optimizer alone, which bf16 needs anyway
    (
        [
            "fp8.recipe=tensorwise",
            "fp8.param_gather=true",
            "training.precision=bf16",
            "parallel.use_distributed_optimizer=false",
        ],
        "parallel.use_distributed_optimizer=false cannot go with training.precision=bf16: "
        "Megatron's plain bf16 optimizer cannot save the fp32 alphas; legal: true, or fp32",
    ),
    (
        ["fp8.recipe=delayed", "fp8.bf16_layers_at_end=2"],
        "fp8.bf16_layers_at_end=2 cannot go with fp8.recipe=delayed, as in Megatron; "
        "legal: 0, or fp8.recipe=tensorwise",
    ),
    (
        [
            "fp8.recipe=tensorwise",
            "fp8.bf16_layers_at_start=3",
            "parallel.tensor_model_parallel_size=1",
            "parallel.pipeline_model_parallel_size=2",
        ],
        "fp8.bf16_layers_at_start=3 is more than a pipeline stage has, num_layers / "
        "pipeline_model_parallel_size = 4 / 2; nearest legal: 2",
    ),
    (
        [
            "fp8.recipe=tensorwise",
            "fp8.bf16_layers_at_start=3",
            "fp8.bf16_layers_at_end=1",
        ],
        "fp8.bf16_layers_at_start + bf16_layers_at_end = 4 leave none of 4 layers in FP8; "
        "legal: fewer, or fp8.recipe=off",
    ),
    (
        ["fp8.recipe=delayed", "fp8.fused=false", "xielu.recompute=true"],
        "xielu.recompute=true cannot go with fp8.recipe=delayed and fp8.fused=false: fc2 keeps an "
        "FP8 copy of xIELU's output of its own; legal: fp8.fused=true, or xielu.recompute=false",
    ),
    (
        ["fp8.recipe=delayed", "fp8.emulate=true"],
        "parallel.tensor_model_parallel_size=2 is not part of what fp8.emulate=true emulates; "
        "legal: 1",
    ),
    *(
        (
            [f"fp8.recipe={name}", "fp8.emulate=true", one_rank, setting],
            f"{setting} is not part of what fp8.emulate=true emulates; legal: {legal}",
        )
        for one_rank in ["parallel.tensor_model_parallel_size=1"]
        for name, setting, legal in (
            ("mxfp8", "fp8.recipe=mxfp8", "delayed, tensorwise or blockwise"),
            ("delayed", "fp8.param_gather=true", "false"),
            ("blockwise", "fp8.bf16_layers_at_end=1", "0"),
            (
                "blockwise",
                "model.transformer_impl=transformer_engine",
                "local or auto",
            ),
        )
    ),
    (
        ["fp8.bf16_layers_at_start=-1"],
        "fp8.bf16_layers_at_start=-1 must not be negative; nearest legal: 0",
    ),
    (
        ["fp8.amax_history_len=0"],
        "fp8.amax_history_len=0 must be at least 1; nearest legal: 1",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), RULES)
def test_one_broken_rule_gives_one_message(overrides: list[str], message: str) -> None:
    assert validate(recipe(*overrides), 2) == [message]
    if "fp8.recipe" in overrides[0] and "bf16:" not in message:
        assert validate(recipe(*overrides, "fp8.recipe=off"), 2) == []


def sizes() -> Iterator[Recipe]:
    """Recipes that keep every other rule, around the edges of FP8's."""
    base = recipe("parallel.tensor_model_parallel_size=1")
    for (
        heads,
        groups,
        head_dim,
        hidden_size,
        ffn_hidden_size,
        seq_length,
        micro,
        tp,
    ) in itertools.product(
        (6, 8), (2, 4), (None, 20, 32), (192, 216, 240), (768, 784), (256, 264, 272), (1, 2), (1, 2)
    ):
        model = replace(
            base.model,
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim,
            hidden_size=hidden_size,
            ffn_hidden_size=ffn_hidden_size,
            seq_length=seq_length,
        )
        for sequence_parallel in (False, True)[:tp]:
            given = replace(
                base,
                model=model,
                parallel=replace(
                    base.parallel,
                    tensor_model_parallel_size=tp,
                    sequence_parallel=sequence_parallel,
                ),
                training=replace(base.training, micro_batch_size=micro),
            )
            if validate(given, 2) == []:
                yield given


@pytest.mark.parametrize("name", RECIPES)
def test_the_rules_are_the_sizes_and_the_remedies_keep_them(name: str) -> None:
    """Refused are exactly the recipes with an illegal size, and each remedy mends its message."""
    step, known, refused, mended = MULTIPLE[name], 0, 0, 0
    for plain in sizes():
        given = replace(plain, fp8=replace(plain.fp8, recipe=name))
        widths = local_sizes(given)
        tokens = widths.pop("tokens")
        sharded = given.parallel.sequence_parallel and name != "mxfp8"
        legal = not any(w % step for w in widths.values()) and not tokens % (8 if sharded else step)
        messages = validate(given, 2)
        assert (messages == []) == legal, (given, messages)
        known += 1
        refused += not legal
        for message in messages:
            key, values = remedy(message)
            for value in values:
                mended += 1
                other = replace(given, model=replace(given.model, **{key: value}))
                rest = validate(other, 2)
                # the other broken rules stay, and no new one comes
                assert {m.split("=")[0] for m in rest} <= {m.split("=")[0] for m in messages}
                assert len(rest) < len(messages), (message, rest)
    print(f"{name}: {known} recipes, {refused} refused, {mended} remedies tried")
    assert known > refused > 100


def remedy(message: str) -> tuple[str, list[int]]:
    """The model's key and the values that a message offers."""
    key, _, values = message.partition("nearest legal: ")[2].rpartition("=")
    if not key:
        key = re.split("[= ]", message)[0]
    return key.removeprefix("model."), [int(value) for value in values.split(", ")]


def test_what_the_watch_cannot_do_is_refused() -> None:
    def said(*keys: str) -> str:
        return "\n".join(validate(load_recipe("tiny", ["fp8.recipe=tensorwise", *keys]), 2))

    assert "fp8.max_flushed=1.5 is a share of xIELU's output; nearest legal: 1" in said(
        "fp8.max_flushed=1.5"
    )
    assert "fp8.max_saturated=-1.0 must not be negative" in said("fp8.max_saturated=-1")
    assert "fp8.max_kurtosis=0.5 must be at least 1" in said("fp8.max_kurtosis=0.5")
    layer = "fp8.on_outlier=bf16_layer"
    assert "where there is no bf16 weight to go on with" in said(layer, "fp8.param_gather=true")
    assert "TransformerEngine's own modules quantize" in said(layer, "fp8.fused=false")
    assert "on_outlier" not in said(layer)
    assert "expected one of warn, bf16_layer, stop" in message("fp8.on_outlier=panic")


def message(key: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe("tiny", [key])
    return str(error.value)
