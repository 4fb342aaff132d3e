"""The planner against the paper's models, transformers' parameter counts and Megatron's FLOPs."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from typing import Any

import pytest

from megatron_xielu.analysis.planner import (
    PEAK_FLOPS,
    count_parameters,
    estimate_memory,
    flops_per_token,
    format_plan,
    peak_flops,
    plan,
)
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import RecipeError, head_dim, load_recipe, num_query_groups
from megatron_xielu.recipes.schema import Model

SMALL = Model(
    num_layers=3,
    hidden_size=64,
    num_attention_heads=8,
    ffn_hidden_size=192,
    seq_length=32,
    vocab_size=1000,
)
GROUPED = Model(
    num_layers=2,
    hidden_size=96,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=24,
    ffn_hidden_size=200,
    seq_length=64,
    vocab_size=512,
    tie_embeddings=False,
)


def test_paper_runs() -> None:
    # arXiv 2411.13010's reference repository; the figures are derived by hand from its yaml files
    small = plan(load_recipe("llama-1.1b-xielu"), 88)
    assert small.parameters == 1_132_537_392
    assert small.parameters_without_embeddings == 906_044_976
    assert small.alphas == 48
    assert small.micro_batches_per_step == 1
    assert small.tokens_per_step == 1_802_240
    assert small.tokens == 126_156_800_000
    assert [f"{flops / 1e9:.3f}" for flops in _flops(small)] == ["6.795", "7.701", "8.607"]

    large = plan(load_recipe("llama-3b-xielu"), 256)
    assert large.parameters == 3_020_048_456
    assert large.parameters_without_embeddings == 2_416_068_680
    assert large.alphas == 72
    assert large.data_parallel_size == 128
    assert large.tokens_per_step == 2_621_440
    assert large.tokens == 125_829_120_000
    assert [f"{flops / 1e9:.3f}" for flops in _flops(large)] == ["16.307", "18.119", "19.931"]
    # 18.119e9 x 125.83e9 / (0.4 x 989.4e12 x 3600)
    assert large.h100_hours == pytest.approx(1600.3, abs=0.05)


def _flops(result: Any) -> tuple[int, int, int]:
    return (
        result.flops_per_token_matmul,
        result.flops_per_token_causal,
        result.flops_per_token_full,
    )


@pytest.mark.parametrize(
    "model",
    [SMALL, GROUPED] + [load_recipe(name).model for name in ("llama-1.1b-xielu", "llama-3b-xielu")],
    ids=["small", "grouped", "1.1b", "3b"],
)
def test_parameters_are_those_of_transformers_arcee(model: Model) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ArceeConfig(**_hugging_face(model))
    assert _count_on_meta(transformers.ArceeForCausalLM, config) == count_parameters(model)


def test_parameters_with_qk_norm_are_those_of_transformers_apertus() -> None:
    transformers = pytest.importorskip("transformers")
    model = Model(**{**vars(GROUPED), "qk_layernorm": True, "head_dim": None})
    config = transformers.ApertusConfig(**_hugging_face(model))
    assert _count_on_meta(transformers.ApertusForCausalLM, config) == count_parameters(model)


def _hugging_face(model: Model) -> dict[str, Any]:
    return {
        "hidden_act": "xielu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": num_query_groups(model),
        "head_dim": head_dim(model),
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        # token ids of the defaults lie outside a small vocabulary
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


def _count_on_meta(model_class: Any, config: Any) -> int:
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(config).parameters())


GATED = replace(GROUPED, activation="swiglu")


def test_parameters_with_a_gate_are_those_of_transformers_llama() -> None:
    transformers = pytest.importorskip("transformers")
    for model in (GATED, load_recipe("llama-1.1b-swiglu").model):
        config = transformers.LlamaConfig(**_hugging_face(model) | {"hidden_act": "silu"})
        assert _count_on_meta(transformers.LlamaForCausalLM, config) == count_parameters(model)
    # as ArceeForCausalLM counts xIELU's, without the alphas
    assert count_parameters(replace(GROUPED, activation="relu2")) == count_parameters(GROUPED) - 4


@pytest.mark.parametrize("size", ["1.1b", "3b"])
def test_the_baselines_cost_what_xielu_costs(size: str) -> None:
    ranks = {"1.1b": 88, "3b": 256}[size]
    ours = plan(load_recipe(f"llama-{size}-xielu"), ranks)
    for activation in ("swiglu", "relu2"):
        other = plan(load_recipe(f"llama-{size}-{activation}"), ranks)
        assert ours.parameters - other.parameters == ours.alphas
        assert _flops(other) == _flops(ours)
        assert (other.tokens, other.flops, other.alphas) == (ours.tokens, ours.flops, 0)
        assert other.memory.total == pytest.approx(ours.memory.total, rel=1e-6)
        text = format_plan(other)
        assert re.search(rf"^  activation +{activation}$", text, re.MULTILINE)
        assert "alphas" not in text


def test_a_gate_s_memory() -> None:
    # of each token: fc1's output, twice as wide, and fc2's input; in FP8 in one byte
    tokens, rest = 5 * 4096, 8 * 1536 * 2
    memory = estimate_memory(load_recipe("llama-1.1b-swiglu"), 88)
    assert memory.activations == 24 * tokens * (rest + (2 + 1) * 6144 * 2)
    fp8 = estimate_memory(load_recipe("llama-1.1b-swiglu", ["fp8.recipe=tensorwise"]), 88)
    rest = 2 * 6 * 1536 + 2 * 1536
    assert fp8.activations == 24 * tokens * (rest + 2 * 6144 * 2 + 6144)
    # in TransformerEngine's modules, which hold both orientations
    weights = GEMM_WEIGHTS["attention"] + 24 * 3 * 1536 * 6144
    assert fp8.fp8_weights == 2 * weights


@pytest.mark.parametrize("model", [SMALL, GROUPED, GATED, load_recipe("llama-3b-xielu").model])
def test_default_flops_are_what_megatron_reports(model: Model) -> None:
    training = pytest.importorskip("megatron.training.training")
    arguments = pytest.importorskip("megatron.training.arguments")
    args = arguments.add_megatron_arguments(argparse.ArgumentParser()).parse_args([])
    args.num_layers, args.hidden_size = model.num_layers, model.hidden_size
    args.num_attention_heads, args.kv_channels = model.num_attention_heads, head_dim(model)
    args.group_query_attention, args.num_query_groups = True, num_query_groups(model)
    args.ffn_hidden_size, args.padded_vocab_size = model.ffn_hidden_size, model.vocab_size
    args.seq_length, args.swiglu = model.seq_length, model.activation == "swiglu"
    reported = training.num_floating_point_operations(args, 1) / model.seq_length
    assert flops_per_token(model) == reported


def test_matmul_flops_are_six_per_weight_and_attention_is_twelve() -> None:
    # 3 layers of 4 x 64 x 64 attention and 2 x 64 x 192 MLP weights, and 1000 x 64 logits
    weights = 3 * (4 * 64 * 64 + 2 * 64 * 192) + 1000 * 64
    scores = 12 * 3 * 64 * 32
    assert flops_per_token(SMALL, attention="none") == 6 * weights
    assert flops_per_token(SMALL, attention="causal") == 6 * weights + scores // 2
    assert flops_per_token(SMALL, attention="full") == 6 * weights + scores


def test_memory_counts_the_bytes_of_each_kind() -> None:
    # 88 ranks, micro-batch 5 x 4096 tokens, 1.13e9 parameters on each rank
    memory = plan(load_recipe("llama-1.1b-xielu"), 88).memory
    parameters, tokens = 1_132_537_392, 5 * 4096
    assert memory.weights == 2 * parameters
    assert memory.gradients == 4 * parameters
    assert memory.optimizer == pytest.approx(12 * parameters / 88)
    # norms 4 x 1536, attention 4 x 1536, xIELU 2 x 9216, of 2 bytes, in 24 layers
    assert memory.activations == 24 * tokens * (8 * 1536 + 2 * 9216) * 2
    assert memory.logits == tokens * 147456 * (2 + 4)
    parts = [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits]
    assert memory.total == sum(parts)

    whole = plan(
        load_recipe("llama-1.1b-xielu", ["parallel.use_distributed_optimizer=false"]), 88
    ).memory
    assert whole.optimizer == 12 * parameters
    assert whole.activations == memory.activations
    recomputing = plan(load_recipe("llama-1.1b-xielu", ["xielu.recompute=true"]), 88).memory
    assert memory.activations - recomputing.activations == 24 * tokens * 9216 * 2
    in_e4m3 = plan(load_recipe("llama-1.1b-xielu", ["xielu.saved_input=e4m3"]), 88).memory
    assert memory.activations - in_e4m3.activations == 24 * tokens * 9216
    fp32 = plan(load_recipe("llama-1.1b-xielu", ["training.precision=fp32"]), 1).memory
    assert fp32.weights == 4 * parameters
    assert fp32.optimizer == 8 * parameters
    assert fp32.activations == 2 * memory.activations
    assert fp32.logits == tokens * 147456 * 4


def test_memory_is_cut_by_the_layout() -> None:
    def memory(*overrides: str, world_size: int) -> Any:
        recipe = load_recipe("llama-3b-xielu", overrides)
        return estimate_memory(recipe, world_size)

    one = memory("parallel.tensor_model_parallel_size=1", world_size=1)
    # tensor and sequence parallelism halve everything but the norms
    two = memory(world_size=2)
    assert two.activations == one.activations / 2
    assert two.logits == one.logits / 2
    assert two.weights == pytest.approx(one.weights / 2, rel=1e-4)
    without_sp = memory("parallel.sequence_parallel=false", world_size=2)
    assert two.activations < without_sp.activations < one.activations
    # four stages of a quarter of the layers, each holding four micro-batches; one of two tables
    staged = memory("parallel.pipeline_model_parallel_size=4", world_size=8)
    assert staged.activations == pytest.approx(two.activations)
    blocks, table = 2_416_068_680 / 2, 147456 * 2048 / 2
    assert staged.weights == pytest.approx(2 * (blocks / 4 + table), rel=1e-3)
    # the local layers' attention keeps no scores either
    assert memory("model.transformer_impl=local", world_size=2).activations == two.activations


GEMM_WEIGHTS = {"attention": 24 * 4 * 1536 * 1536, "mlp": 24 * 2 * 1536 * 9216}
PARAMETERS, TOKENS = 1_132_537_392, 5 * 4096


def fp8_memory(*overrides: str, world_size: int = 88) -> Any:
    return estimate_memory(load_recipe("llama-1.1b-xielu", overrides), world_size)


@pytest.mark.parametrize(
    ("overrides", "per_token"),
    [
        # by layer and token: bf16 inputs of both norms, q, k, v, attention's output and x; FP8
        # inputs of qkv, of proj (delayed alone), of fc1 and of fc2
        (["delayed"], 2 * (2 * 1536 + 4 * 1536 + 9216) + (1536 + 1536 + 1536 + 9216)),
        (["tensorwise"], 2 * (2 * 1536 + 4 * 1536 + 9216) + (1536 + 1536 + 9216)),
        # a float32 scale for 128 values
        (["blockwise"], 2 * (2 * 1536 + 4 * 1536 + 9216) + (1536 + 1536 + 9216) * (1 + 1 / 32)),
        # a byte for 32 values
        (["mxfp8"], 2 * (2 * 1536 + 4 * 1536 + 9216) + (1536 + 1536 + 9216) * (1 + 1 / 32)),
        (["tensorwise", "xielu.recompute=true"], 2 * (6 * 1536 + 9216) + (1536 + 1536)),
        (["tensorwise", "fp8.fused=false"], 2 * (6 * 1536 + 9216) + (1536 + 1536 + 9216)),
        (["tensorwise", "fp8.fc2_input=bf16"], 2 * (6 * 1536 + 2 * 9216) + (1536 + 1536)),
        (
            ["delayed", "fp8.fc2_input=bf16", "xielu.recompute=true"],
            2 * (6 * 1536 + 9216) + 3 * 1536,
        ),
        # only numbers
        (["delayed", "fp8.emulate=true"], 2 * (8 * 1536 + 2 * 9216)),
    ],
)
def test_activations_in_fp8(overrides: list[str], per_token: float) -> None:
    memory = fp8_memory(f"fp8.recipe={overrides[0]}", *overrides[1:])
    assert memory.activations == pytest.approx(24 * TOKENS * per_token, rel=1e-12)


def test_weights_in_fp8() -> None:
    attention, mlp = GEMM_WEIGHTS.values()
    bf16 = fp8_memory()
    assert bf16.fp8_weights == 0
    fused = fp8_memory("fp8.recipe=tensorwise")
    # beside the bf16 weights: both orientations in attention, the transpose in the fused MLP
    assert fused.weights == bf16.weights == 2 * PARAMETERS
    assert fused.fp8_weights == 2 * attention + mlp
    assert fp8_memory("fp8.recipe=tensorwise", "fp8.fused=false").fp8_weights == 2 * (
        attention + mlp
    )
    fc2_in_bf16 = fp8_memory("fp8.recipe=tensorwise", "fp8.fc2_input=bf16")
    assert fc2_in_bf16.fp8_weights == 2 * attention + mlp / 2
    # in their place
    gathered = fp8_memory("fp8.recipe=tensorwise", "fp8.param_gather=true")
    assert gathered.fp8_weights == 2 * (attention + mlp)
    assert gathered.weights == 2 * (PARAMETERS - attention - mlp)
    assert gathered.optimizer == bf16.optimizer == pytest.approx(12 * PARAMETERS / 88)
    blocks = fp8_memory("fp8.recipe=blockwise", "fp8.param_gather=true")
    assert blocks.fp8_weights == pytest.approx(2 * (attention + mlp) * (1 + 4 / 128**2))
    small = fp8_memory("fp8.recipe=mxfp8", "fp8.param_gather=true")
    assert small.fp8_weights == pytest.approx(2 * (attention + mlp) * 33 / 32)
    parts = [getattr(fused, name) for name in vars(fused)]
    assert fused.total == sum(parts)


def test_layers_that_stay_in_bf16_are_counted_so() -> None:
    ends = ["fp8.bf16_layers_at_start=1", "fp8.bf16_layers_at_end=2"]
    mixed = fp8_memory("fp8.recipe=tensorwise", *ends)
    bf16, fp8 = fp8_memory(), fp8_memory("fp8.recipe=tensorwise")
    assert mixed.fp8_weights == pytest.approx(fp8.fp8_weights * 21 / 24)
    expected = (21 * fp8.activations + 3 * bf16.activations) / 24
    assert mixed.activations == pytest.approx(expected)


def test_a_pipeline_holds_the_fused_mlps_weights_once_per_micro_batch() -> None:
    attention, mlp = GEMM_WEIGHTS.values()
    staged = fp8_memory(
        "fp8.recipe=tensorwise",
        "parallel.pipeline_model_parallel_size=4",
        "training.global_batch_size=40",
        world_size=4,
    )
    # a quarter of the layers, four micro-batches of 5 in flight
    assert staged.fp8_weights == 2 * attention / 4 + 4 * mlp / 4


def test_format_shows_fp8() -> None:
    text = format_plan(plan(load_recipe("llama-1.1b-xielu", ["fp8.recipe=delayed"]), 88))
    print(text)
    assert "memory per device, GiB, bf16 and FP8 delayed" in text
    rows = dict(line.rsplit(None, 1) for line in text.splitlines() if line.startswith("  "))
    # 2 x 226,492,416 + 679,477,248 bytes; 24 x 20,480 x 50,688 bytes
    assert rows["  FP8 weights"] == "1.05"
    assert rows["  activations"] == "23.20"
    assert rows["  TFLOP/s of an H100 in FP8"] == "1,978.8"
    assert rows["  TFLOP/s of an H100 in bf16 (MFU)"] == "989.4"
    assert "FP8" not in format_plan(plan(load_recipe("llama-1.1b-xielu"), 88))


def test_plan_refuses_what_cannot_run() -> None:
    with pytest.raises(RecipeError, match="nearest legal: 400, 480"):
        plan(load_recipe("llama-1.1b-xielu"), 16)
    with pytest.raises(UserError, match=r"model\.vocab_size is null.*model\.vocab_size=4096"):
        plan(load_recipe("tiny"), 2)


def test_format_is_aligned_and_complete() -> None:
    text = format_plan(plan(load_recipe("llama-1.1b-xielu"), 88))
    print(text)
    rows = [line for line in text.splitlines() if line.startswith("  ")]
    assert len({len(row) for row in rows}) == 1
    for figure in ("1,132,537,392", "906,044,976", "126,156,800,000", "7,700,742,144", "1,802,240"):
        assert figure in text


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA GH200 120GB", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("cpu", None),
    ],
)
def test_peak_flops(device: str, expected: float | None) -> None:
    assert peak_flops(device) == expected
    assert expected is None or expected in PEAK_FLOPS.values()
