"""A run that goes on from a checkpoint is the run that never stopped, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.recipes import Recipe, to_yaml
from tests.ranks import run_ranks

PROGRAM = Path(__file__).with_name("pretrain_rank.py")
HALF, STEPS = 10, 20
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP=2, emulated FP8": {"use_distributed_optimizer": True},
    "TP=2": {"tensor_model_parallel_size": 2},
    "PP=2": {"pipeline_model_parallel_size": 2},
    "DP=2": {"use_distributed_optimizer": True},
}


def train(recipe: Recipe, folder: Path, *options: str) -> list[dict[str, Any]]:
    """Two ranks in a run folder, from its latest checkpoint if it has one; what they saw."""
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    seen = folder / "seen"
    run_ranks(PROGRAM, [str(folder / "recipe.yaml"), str(folder), str(seen), *options], 2)
    return [json.loads((seen / f"rank_{rank}.json").read_text()) for rank in range(2)]


# the command's own test of resumption in tests/training has TP=2
@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[] if "DP" in name else pytest.mark.slow) for name in LAYOUTS],
)
def test_ten_and_ten_steps_are_twenty(layout: str, small_recipe: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        small_recipe,
        parallel=dataclasses.replace(small_recipe.parallel, **LAYOUTS[layout]),
        training=dataclasses.replace(small_recipe.training, train_iters=STEPS),
        schedule=dataclasses.replace(small_recipe.schedule, lr_wsd_decay_iters=HALF + 3),
        checkpoint=dataclasses.replace(small_recipe.checkpoint, save_interval=HALF),
    )
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    straight.mkdir()
    options = ["--emulated-fp8", "delayed"] if "FP8" in layout else []
    whole = train(recipe, straight, *options)
    # the same processes' first ten steps, as a killed run leaves them
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "seen")
    shutil.rmtree(resumed / f"checkpoints/iter_{STEPS:07d}")
    (resumed / "checkpoints/latest_checkpointed_iteration.txt").write_text(str(HALF))
    second = train(recipe, resumed, *options)

    for before, after in zip(whole, second, strict=True):
        rows = [row for row in before["steps"] if row["step"] > HALF]
        kept = ("step", "loss", "grad_norm", "lr", "alpha_p", "alpha_n")
        numbers = [[{k: r[k] for k in kept} for r in part] for part in (rows, after["steps"])]
        assert numbers[0] == numbers[1]
        assert [pair for pair in before["served"] if pair[0] > HALF] == after["served"]
        assert before["alphas"] == after["alphas"]
    # the reporting rank has the numbers, and some rank read the data
    assert [row["step"] for row in second[-1]["steps"]] == list(range(HALF + 1, STEPS + 1))
    samples = [index for rank in second for step, index in rank["served"] if step == STEPS]
    assert len(set(samples)) == recipe.training.global_batch_size

    readers = [TorchDistReader(f / f"checkpoints/iter_{STEPS:07d}") for f in (straight, resumed)]
    keys, again = (reader.keys() for reader in readers)
    assert keys == again
    assert any("exp_avg_sq" in key for key in keys)
    differ = [k for k in keys if not torch.equal(*(r.read(k) for r in readers))]
    print(f"\n{layout}: {len(keys)} tensors, {len(differ)} differ")
    assert not differ
