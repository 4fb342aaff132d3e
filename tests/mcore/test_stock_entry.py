"""A Megatron entry script of a user's own trains xIELU through --spec alone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.recipes import Recipe, megatron_args
from tests.ranks import environment

SPEC = ("--spec", "megatron_xielu.mcore.layer_specs", "xielu_layer_spec")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_spec_is_all_it_takes(small_recipe: Recipe, tmp_path: Path, precision: str) -> None:
    done, alphas = train(small_recipe, tmp_path, precision, sharded=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert alphas is not None
    assert alphas.shape == (4, 1)
    assert alphas.dtype == torch.float32
    assert alphas.unique().numel() == 4
    assert float((alphas - 0.2033824).abs().max()) < 0.1


def test_an_optimizer_that_cannot_save_is_refused(small_recipe: Recipe, tmp_path: Path) -> None:
    done, _ = train(small_recipe, tmp_path, "bf16", sharded=False)
    assert done.returncode != 0
    assert "alphas stay fp32 in a bf16 or fp16 model" in done.stderr
    assert "add --use-distributed-optimizer" in done.stderr


def train(
    recipe: Recipe, folder: Path, precision: str, *, sharded: bool
) -> tuple[subprocess.CompletedProcess[str], torch.Tensor | None]:
    """Five steps of the stock script; its result and the alphas it saved."""
    parallel = dataclasses.replace(recipe.parallel, use_distributed_optimizer=sharded)
    flags = megatron_args(
        dataclasses.replace(recipe, parallel=parallel),
        world_size=1,
        device="cpu",
        run_dir=folder,
        precision="bf16" if precision == "bf16" else "fp32",
        transformer_impl="local",
    )
    start = flags.index("--train-data-path")
    del flags[start : start + 4]
    program = [sys.executable, str(Path(__file__).with_name("stock_pretrain.py"))]
    rank = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    done = subprocess.run(
        [*program, *flags, *SPEC, "--mock-data", "--eval-iters", "0"],
        env=environment(**rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=0),
        capture_output=True,
        text=True,
        timeout=300,
    )
    saved = folder / "checkpoints" / "iter_0000005"
    if not saved.is_dir():
        return done, None
    return done, TorchDistReader(saved).read("decoder.layers.mlp.activation_func.alpha_p")
