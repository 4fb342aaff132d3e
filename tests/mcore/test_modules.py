"""The pieces inside Megatron, each on real ranks of its own process; `checks` holds the bodies."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

PROGRAM = Path(__file__).with_name("call.py")
ONE_RANK = (
    "every_layer_has_its_own_xielu",
    "local_layers_use_our_norm_and_attention",
    "an_uninstalled_placeholder_raises",
    "a_gated_mlp_is_refused",
    "experts_get_their_own",
    "experts_are_summed_over_their_own_group",
    "a_module_without_room_for_alphas_is_named",
    "multi_token_prediction_is_reached_by_the_hook",
    "settings_reach_the_modules",
    "rope_is_scaled_by_the_factor",
    "attention_equals_megatrons",
    "attention_hands_back_what_torch_cannot_do",
    "optimizer_equals_torchs_adamw",
    "the_cpu_platform_answers_for_cuda",
    "norm_carries_the_sequence_parallel_mark",
    "a_look_counts_what_a_tensor_has",
    "a_step_that_is_not_looked_at_costs_nothing",
)


TRANSFORMER_ENGINE = (
    "transformer_engine_layers_get_xielu",
    "transformer_engine_checkpoints_have_the_local_ones_keys",
    "transformer_engine_experts_are_summed_over_their_own_group",
    "transformer_engine_seams_hold",
    "transformer_engine_fused_mlps_get_xielu",
    "transformer_engine_writes_fp8_between_the_linears",
    "transformer_engine_options_of_a_recipe_reach_the_kernels",
    "transformer_engine_without_fp8_gets_bf16",
    "transformer_engine_recomputes_to_the_same_bits",
    "transformer_engine_holds_the_input_in_e4m3",
    "transformer_engine_keeps_fc2_in_bf16",
    "transformer_engine_saves_delayed_scaling",
    "transformer_engine_quantizers_of_other_kinds_work_by_themselves",
    "transformer_engine_backward_in_high_precision_gets_bf16",
    "transformer_engine_models_are_the_local_ones",
    "transformer_engine_hybrid_models_are_the_local_ones",
    "transformer_engine_adds_weight_gradients_for_megatron",
    "transformer_engine_looks_at_what_it_writes",
    "transformer_engine_takes_a_layer_out_of_fp8",
    "transformer_engine_models_of_one_rank_have_the_local_ones_parameters",
    "transformer_engine_models_of_one_rank_are_saved_with_their_histories",
    "transformer_engine_models_of_one_rank_go_on_where_local_ones_stopped",
    "transformer_engine_plain_modules_take_fp8_from_xielu",
    "transformer_engine_options_of_a_recipe_reach_plain_modules",
    "transformer_engine_plain_modules_hold_the_input_in_e4m3",
    "transformer_engine_plain_modules_get_bf16_where_fc2_must_cast",
    "transformer_engine_plain_modules_take_fp8_in_evaluation",
    "transformer_engine_plain_experts_keep_bf16",
    "transformer_engine_plain_modules_cannot_leave_fp8",
)
ON_A_GPU = (
    "on_a_gpu_ours_is_what_the_quantizer_would_write",
    "on_a_gpu_weight_gradients_are_added_by_transformer_engine",
)
TRANSFORMER_ENGINE_TWO_RANKS = (
    "transformer_engine_sums_alphas_over_tensor_parallel_ranks",
    "transformer_engine_plain_modules_sum_alphas_over_tensor_parallel_ranks",
    "transformer_engine_models_are_the_local_ones_on_two_ranks",
)
Results = list[dict[str, dict[str, Any]]]
TWO_RANKS = (
    "tensor_parallel_ranks_draw_different_weights",
    "a_layer_that_cannot_leave_fp8_ends_every_rank",
)


def run_checks(folder: Path, names: Sequence[str], nproc: int, **variables: object) -> Results:
    run_ranks(PROGRAM, [str(nproc), str(folder), *names], nproc, **variables)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(nproc)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_checks(tmp_path_factory.mktemp("one"), ONE_RANK, 1)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_checks(tmp_path_factory.mktemp("two"), TWO_RANKS, 2)


@pytest.fixture(scope="module")
def with_te(tmp_path_factory: pytest.TempPathFactory) -> Results:
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("TransformerEngine is not installed")
    # of the kernels' interpreter
    return run_checks(tmp_path_factory.mktemp("te"), TRANSFORMER_ENGINE, 1, TRITON_INTERPRET=1)


@pytest.fixture(scope="module")
def with_te_on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("TransformerEngine is not installed")
    folder = tmp_path_factory.mktemp("te2")
    return run_checks(folder, TRANSFORMER_ENGINE_TWO_RANKS, 2, TRITON_INTERPRET=1)


@pytest.mark.gpu
@pytest.mark.te
def test_transformer_engine_on_a_gpu(tmp_path: Path) -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("TransformerEngine is not installed")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("there is no GPU that computes every recipe in FP8")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    results = run_checks(tmp_path, ON_A_GPU, 1, CUDA_VISIBLE_DEVICES=visible)
    for check in ON_A_GPU:
        report(results, check)


def report(results: Results, check: str) -> None:
    for rank in results:
        assert rank[check]["error"] is None, rank[check]["error"]
    print(results[0][check]["measured"])


@pytest.mark.te
@pytest.mark.parametrize("check", TRANSFORMER_ENGINE)
def test_with_transformer_engine(check: str, with_te: Results) -> None:
    report(with_te, check)


@pytest.mark.te
@pytest.mark.parametrize("check", TRANSFORMER_ENGINE_TWO_RANKS)
def test_with_transformer_engine_on_two_ranks(check: str, with_te_on_two_ranks: Results) -> None:
    report(with_te_on_two_ranks, check)


@pytest.mark.parametrize("check", ONE_RANK)
def test_on_one_rank(check: str, one_rank: Results) -> None:
    report(one_rank, check)


@pytest.mark.parametrize("check", TWO_RANKS)
def test_on_two_tensor_parallel_ranks(check: str, two_ranks: Results) -> None:
    report(two_ranks, check)
