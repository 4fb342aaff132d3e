"""`xielu.recompute`: the same bits with fewer bytes held; `recompute_rank` holds the cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

PROGRAM = Path(__file__).with_name("recompute_rank.py")
# cases in which Megatron recomputes every MLP as a whole
WHOLE = ("megatron mlp", "megatron moe, mixture", "megatron full")


def run(folder: Path, tp: int) -> list[dict[str, Any]]:
    run_ranks(PROGRAM, [str(tp), str(folder)], tp)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(tp)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("one"), 1)[0]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("two"), 2)


def check(name: str, case: dict[str, Any]) -> None:
    (plain, ours), calls = case["held"], case["computed"]
    print(f"{name:24} held {plain:7} -> {ours:7} B, xIELU computed {calls[0]} -> {calls[1]} times")
    assert not case["different"]
    if name in WHOLE:
        assert (plain, calls[0]) == (ours, calls[1])
    else:
        assert ours < plain
        assert calls[0] < calls[1]


def test_gradients_keep_their_bits(one_rank: dict[str, Any]) -> None:
    for name, case in one_rank["cases"].items():
        check(name, case)


def test_gradients_keep_their_bits_on_two_ranks(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        for name, case in rank["cases"].items():
            check(name, case)


def test_an_input_in_e4m3_changes_fc2s_weights_alone(
    one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]
) -> None:
    """With recompute fc2's input is made from e4m3 as well; all else is as without recompute."""
    weights = [f"decoder.layers.{layer}.mlp.linear_fc2.weight" for layer in range(3)]
    for rank in (one_rank, *two_ranks):
        assert rank["e4m3"].keys() == {"fp32", "bf16"}
        for case in rank["e4m3"].values():
            assert case["different"] == weights
            assert case["held"][1] < case["held"][0]


@pytest.mark.parametrize(("case", "kept", "outputs"), [("dense", 1, 1), ("mixture", 1, 2)])
def test_one_extra_pass_per_tensor_that_is_not_kept(
    case: str, kept: int, outputs: int, one_rank: dict[str, Any]
) -> None:
    """An expert's y and its product with the probability are made one by one."""
    plain, ours = one_rank["cases"][f"{case}, fp32"]["computed"]
    # three layers, two micro-batches; a mixture has four experts, and a shared one like a dense MLP
    experts = 4 if case == "mixture" else 0
    assert plain == 3 * 2 * (experts + 1)
    assert ours == plain + 3 * 2 * (experts * outputs + kept)


MODEL = {
    # kind and type: bytes per element kept without and with recompute
    "MLP, bfloat16": (4, 2),
    "MLP, float32": (8, 4),
    "expert, bfloat16": (6, 2),
    "expert, float32": (12, 4),
    "MLP, bfloat16, e4m3": (3, 1),
    "MLP, float32, e4m3": (5, 1),
    "expert, bfloat16, e4m3": (5, 1),
    "expert, float32, e4m3": (9, 1),
}


@pytest.mark.parametrize("row", MODEL)
def test_bytes_held_are_those_of_the_model(row: str, one_rank: dict[str, Any]) -> None:
    held, peak = one_rank["bytes"][row]["held"], one_rank["bytes"][row]["peak"]
    print(
        f"{row:23} B/element held {held[0]:.2f} -> {held[1]:.2f}; "
        f"peak of 4 MLPs in a row {peak[0]:.2f} -> {peak[1]:.2f}"
    )
    assert held == pytest.approx(MODEL[row], rel=0.02)
    # while one layer's backward runs its output is there again, those of the other three are not
    saved = MODEL[row][0] - MODEL[row][1]
    assert peak[0] - peak[1] >= 3 * saved * 0.98


def test_a_linear_layer_that_saves_a_view(one_rank: dict[str, Any]) -> None:
    seen = one_rank["another linear"]
    assert not seen["different"]
    # fp32, 16 x 2 tokens, ffn_hidden_size 96
    assert seen["held"][0] - seen["held"][1] == 4 * 32 * 96


def test_steps_aside_where_others_hold_the_tensors(one_rank: dict[str, Any]) -> None:
    seen = one_rank["aside"]
    assert seen["weight is the parameter"]
    assert seen["equal gradients"]
    assert seen["the output is whole for others"]
    assert seen["without gradients"]
    (message,) = seen["offloading"]
    assert message.endswith("other hooks hold what fc2 saves (activation offloading)")
    (message,) = seen["frozen"]
    assert message.startswith("xielu.recompute saves nothing here: fc2 saves no input")
