"""The pieces inside Megatron, each on real ranks of its own process; `checks` holds the bodies."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

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
    "attention_equals_megatrons",
    "attention_hands_back_what_torch_cannot_do",
    "optimizer_equals_torchs_adamw",
    "the_cpu_platform_answers_for_cuda",
    "norm_carries_the_sequence_parallel_mark",
)


TRANSFORMER_ENGINE = (
    "transformer_engine_layers_get_xielu",
    "transformer_engine_checkpoints_have_the_local_ones_keys",
    "transformer_engine_experts_are_summed_over_their_own_group",
)
TWO_RANKS = ("tensor_parallel_ranks_draw_different_weights",)


def run_checks(folder: Path, names: Sequence[str], nproc: int) -> list[dict[str, str | None]]:
    run_ranks(PROGRAM, [str(nproc), str(folder), *names], nproc)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(nproc)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    return run_checks(tmp_path_factory.mktemp("one"), ONE_RANK, 1)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    return run_checks(tmp_path_factory.mktemp("two"), TWO_RANKS, 2)


@pytest.fixture(scope="module")
def with_te(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("TransformerEngine is not installed")
    return run_checks(tmp_path_factory.mktemp("te"), TRANSFORMER_ENGINE, 1)


@pytest.mark.te
@pytest.mark.parametrize("check", TRANSFORMER_ENGINE)
def test_with_transformer_engine(check: str, with_te: list[dict[str, str | None]]) -> None:
    assert with_te[0][check] is None, with_te[0][check]


@pytest.mark.parametrize("check", ONE_RANK)
def test_on_one_rank(check: str, one_rank: list[dict[str, str | None]]) -> None:
    assert one_rank[0][check] is None, one_rank[0][check]


@pytest.mark.parametrize("check", TWO_RANKS)
def test_on_two_tensor_parallel_ranks(check: str, two_ranks: list[dict[str, str | None]]) -> None:
    for rank in two_ranks:
        assert rank[check] is None, rank[check]
