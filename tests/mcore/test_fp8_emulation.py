"""FP8 training in numbers: on a rank of its own, because the CPU platform changes the process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_xielu.recipes import Recipe, to_yaml
from tests.mcore.test_modules import Results, report, run_checks
from tests.ranks import run_ranks

CHECKS = (
    "an_emulated_linear_is_the_product_of_what_fp8_leaves",
    "the_error_of_a_product_is_that_of_its_operands_formats",
    "off_is_as_if_it_were_not_there",
    "four_products_of_each_layer_are_emulated",
    "what_cannot_be_emulated_is_refused",
    "delayed_scales_follow_the_steps_of_a_layer",
    "statistics_count_what_was_lost",
    "each_recipe_learns_as_bf16_does",
)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_checks(tmp_path_factory.mktemp("one"), CHECKS, 1)


@pytest.mark.parametrize("check", CHECKS)
def test_on_one_rank(check: str, one_rank: Results) -> None:
    report(one_rank, check)


def test_tensor_parallelism_is_refused(tmp_path: Path) -> None:
    check = "tensor_parallelism_is_refused"
    report(run_checks(tmp_path, [check], 2), check)


def test_the_setting_reaches_pretraining(small_recipe: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        small_recipe,
        parallel=dataclasses.replace(small_recipe.parallel, tensor_model_parallel_size=1),
    )
    program = Path(__file__).with_name("pretrain_rank.py")
    losses = {}
    for fp8 in ("off", "delayed"):
        folder = tmp_path / fp8
        folder.mkdir()
        (folder / "recipe.yaml").write_text(to_yaml(recipe))
        arguments = [str(folder / "recipe.yaml"), str(folder), str(folder), "--emulated-fp8", fp8]
        run_ranks(program, [*arguments, "--", "--exit-interval", "3"], 1)
        seen = json.loads((folder / "rank_0.json").read_text())
        losses[fp8] = [step["loss"] for step in seen["steps"]]
    print(losses)
    assert all(a != b for a, b in zip(losses["off"], losses["delayed"], strict=True))
