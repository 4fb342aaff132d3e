"""One model, cut in every way, computes one thing: loss, gradients, parameters and alphas."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.recipes import Recipe, to_yaml
from tests.ranks import run_ranks

PROGRAM = Path(__file__).with_name("pretrain_rank.py")
STEPS = 5
FRESH = ("--finetune", "--no-load-optim", "--no-load-rng")
LAYOUTS = {
    "TP=2": (2, {"tensor_model_parallel_size": 2}),
    "TP=4": (4, {"tensor_model_parallel_size": 4}),
    "TP=2 SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP=2": (2, {"pipeline_model_parallel_size": 2}),
    "TP=2 PP=2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "DP=2 dist. optimizer": (2, {}),
}


@dataclasses.dataclass
class Result:
    """What a run's ranks saw, and the tensors it saved."""

    ranks: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]

    def column(self, name: str) -> list[float]:
        """One number per step; only the last rank has them."""
        return [step[name] for step in self.ranks[-1]["steps"]]


class Trainer:
    """Runs the small recipe from one initial checkpoint under any layout."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        # an epsilon near the gradients' size: Adam divides by their root mean square, which would
        # blow the round-off of a parameter with next to no gradient up to a whole learning rate
        optimizer = dataclasses.replace(recipe.optimizer, adam_eps=1e-3)
        self.recipe = dataclasses.replace(recipe, optimizer=optimizer)
        self.folder = folder
        self._initialize()

    def _initialize(self) -> None:
        start = self.folder / "start"
        # a learning rate of zero: the checkpoint of step 1 is the initialization
        flags = ["--spec", "tests.mcore.distinct_alphas", "spec", "--lr", "0", "--train-iters", "2"]
        flags += ["--lr-warmup-iters", "0", "--lr-wsd-decay-iters", "1", "--lr-decay-iters", "2"]
        self._run("start", 1, {}, [*flags, "--exit-interval", "1", "--save-interval", "1"])
        self.start = start / "checkpoints"

    def train(self, name: str, nproc: int, parallel: dict[str, Any], fault: str = "") -> Result:
        flags = ["--load", str(self.start), *FRESH]
        return self._run(name, nproc, parallel, flags, fault)

    def _run(
        self, name: str, nproc: int, parallel: dict[str, Any], flags: list[str], fault: str = ""
    ) -> Result:
        folder = self.folder / name.replace(" ", "_")
        folder.mkdir()
        cut = dataclasses.replace(self.recipe.parallel, **parallel)
        recipe = folder / "recipe.yaml"
        recipe.write_text(to_yaml(dataclasses.replace(self.recipe, parallel=cut)))
        planted = ["--fault", fault] if fault else []
        arguments = [str(recipe), str(folder), str(folder / "seen"), *planted, "--", *flags]
        run_ranks(PROGRAM, arguments, nproc)
        seen = [
            json.loads((folder / "seen" / f"rank_{rank}.json").read_text())
            for rank in range(nproc)
            if (folder / "seen").exists()
        ]
        saved = sorted((folder / "checkpoints").glob("iter_*"))[-1]
        reader = TorchDistReader(saved)
        names = [key for key in sorted(reader.keys()) if not key.startswith("optimizer.")]
        return Result(seen, {key: reader.read(key) for key in names})


@pytest.fixture(scope="module")
def trainer(small_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(small_recipe, tmp_path_factory.mktemp("parallel"))


@pytest.fixture(scope="module")
def single(trainer: Trainer) -> Result:
    return trainer.train("one rank", 1, {})


def differences(result: Result, single: Result) -> dict[str, float]:
    """Largest differences, each relative to what fp32 resolves of the number compared."""
    eps = torch.finfo(torch.float32).eps

    def of_steps(name: str) -> float:
        pairs = zip(result.column(name), single.column(name), strict=True)
        return max(abs(a - b) / abs(b) for a, b in pairs) / eps

    assert result.tensors.keys() == single.tensors.keys()
    return {
        "loss": of_steps("loss"),
        "grad norm": of_steps("grad_norm"),
        "parameters": max(
            float((result.tensors[key] - single.tensors[key]).abs().max() / tensor.abs().max())
            for key, tensor in single.tensors.items()
        )
        / eps,
        "alphas": max(
            float((result.tensors[key] - single.tensors[key]).abs().max())
            for key in single.tensors
            if "alpha_" in key
        )
        / eps,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_computes_what_one_rank_does(layout: str, trainer: Trainer, single: Result) -> None:
    nproc, parallel = LAYOUTS[layout]
    result = trainer.train(layout, nproc, parallel)
    measured = differences(result, single)
    print(f"\n{layout:22s}" + "".join(f"  {k} {v:7.1f} eps" for k, v in measured.items()))
    # sums in another order, five steps in a row; a missing all-reduce is thousands of eps
    assert all(value <= 32 for value in measured.values()), measured


def test_the_steps_train_and_the_alphas_move(single: Result) -> None:
    assert len(single.column("loss")) == STEPS
    assert single.column("loss")[-1] < single.column("loss")[0] - 0.1
    raw = single.tensors["decoder.layers.mlp.activation_func.alpha_p"].flatten()
    start = torch.tensor([0.2, 0.5, 0.8, 1.1])
    assert raw.shape == (4,)
    assert torch.all((raw - start).abs() > 1e-4)
    assert torch.all((raw - start).abs() < 0.1)
    effective = torch.nn.functional.softplus(raw).tolist()
    assert single.ranks[-1]["steps"][-1]["alpha_p"] == pytest.approx(effective, abs=1e-6)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "SP"])
def test_a_missing_sum_over_tensor_parallel_ranks_would_show(
    sequence_parallel: bool, trainer: Trainer, single: Result
) -> None:
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    result = trainer.train(f"no sum {sequence_parallel}", 2, parallel, fault="no-sum")
    measured = differences(result, single)
    print(f"\nwithout the sum         alphas {measured['alphas']:.0f} eps")
    assert measured["alphas"] > 1_000
    first, second = (rank["alphas"] for rank in result.ranks)
    assert first != second


@pytest.mark.parametrize("layout", ["TP=2", "TP=4", "TP=2 SP", "TP=2 PP=2"])
def test_alphas_are_bit_equal_on_all_tensor_parallel_ranks(layout: str, trainer: Trainer) -> None:
    nproc, parallel = LAYOUTS[layout]
    folder = trainer.folder / layout.replace(" ", "_") / "seen"
    if not folder.exists():
        trainer.train(layout, nproc, parallel)
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(nproc)]
    by_layer: dict[str, set[tuple[str, ...]]] = {}
    for rank in ranks:
        for layer, alphas in rank["alphas"].items():
            by_layer.setdefault(layer, set()).add(tuple(alphas))
    assert sorted(by_layer) == ["1", "2", "3", "4"]
    assert {layer: len(values) for layer, values in by_layer.items()} == dict.fromkeys("1234", 1)
    assert len(set.union(*by_layer.values())) == 4


def test_bf16_training_keeps_exact_fp32_alphas(trainer: Trainer) -> None:
    training = dataclasses.replace(trainer.recipe.training, precision="bf16")
    half = Trainer.__new__(Trainer)
    half.recipe = dataclasses.replace(trainer.recipe, training=training)
    half.folder, half.start = trainer.folder, trainer.start
    result = half.train("bf16", 2, {"tensor_model_parallel_size": 2})
    assert result.tensors["decoder.layers.mlp.linear_fc1.weight"].dtype == torch.bfloat16
    alphas = result.tensors["decoder.layers.mlp.activation_func.alpha_p"]
    assert alphas.dtype == torch.float32
    # bf16 has eight bits: its grid around these values is far coarser than the moves
    assert not torch.equal(alphas, alphas.bfloat16().float())
    assert {kind for rank in result.ranks for *_, kind in rank["alphas"].values()} == {
        "torch.float32"
    }
