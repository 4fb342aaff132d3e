"""Training begins from a Hugging Face folder where the model that it came from stands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_xielu.checkpoint.store import Store
from megatron_xielu.checkpoint.to_hf import convert_to_hf
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.data.prepare import prepare
from tests.conftest import SMALL
from tests.ranks import environment

DOCUMENT = Path(__file__).parents[2] / "docs/convert-from-hf.md"
ALPHA = "decoder.layers.mlp.activation_func.alpha_p"
TRAINING = [
    word for word in SMALL if word.startswith(("training", "schedule", "logging", "checkpoint"))
]


def commands() -> list[list[str]]:
    """Those of the document: convert, pretrain."""
    (block,) = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    return [line.split()[1:] for line in block.strip().splitlines()]


def run(words: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_xielu", *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
    )


def pretrain(recipe: object, run_dir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(["pretrain", "--recipe", str(recipe), "--run-dir", str(run_dir), *words])


def metrics(run_dir: Path, kind: str) -> dict[int, dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r for r in map(json.loads, lines) if r["type"] == kind}


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose alphas have left their initial values."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = pretrain("tiny", folder, *SMALL, f"data.path={data_dir}", "xielu.lr_mult=10")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def converted(trained: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model after a detour; not to be changed."""
    root = tmp_path_factory.mktemp("converted")
    convert_to_hf(trained, root / "models/books", progress=lambda line: None)
    (root / "data").mkdir()
    (root / "data/books").symlink_to(data_dir)
    convert, _ = commands()
    done = run(convert, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "tensors are equal bit for bit" in done.stdout
    return root / "runs/more"


@pytest.mark.parametrize(
    ("how", "tolerance"),
    [
        ("parallel.tensor_model_parallel_size=1", 0),
        # fp32 sums of two halves are of other order
        ("parallel.tensor_model_parallel_size=2", 1e-6),
        pytest.param("parallel.pipeline_model_parallel_size=2", 1e-6, marks=pytest.mark.slow),
        # the fp32 weights rounded, by half of bf16's step at most
        ("training.precision=bf16", 2**-8),
    ],
)
def test_the_first_loss_is_the_trained_models(
    trained: Path, converted: Path, data_dir: Path, tmp_path: Path, how: str, tolerance: float
) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "run"))
    words = [*TRAINING, f"data.path={data_dir}", how, "checkpoint.save_interval=2"]
    done = pretrain(folder / "recipe.yaml", folder, *words, "optimizer.lr=1e-3")
    assert done.returncode == 0, done.stderr
    before = metrics(trained, "valid")
    after = metrics(folder, "valid")
    print(f"{how}: {before[0]['loss']} -> {before[5]['loss']}, converted {after[0]['loss']}")
    assert before[5]["loss"] < before[0]["loss"] - 0.1
    assert after[0]["loss"] == pytest.approx(before[5]["loss"], rel=tolerance)

    # a run like any other from here on: its own schedule, optimizer and steps
    assert sorted(metrics(folder, "train")) == [1, 2, 3, 4, 5]
    store = Store(folder / "checkpoints")
    assert (store.steps(), store.latest()) == ([0, 2, 4, 5], 5)
    alphas = [TorchDistReader(store.path(step)).read(ALPHA) for step in (0, 5)]
    assert torch.equal(
        alphas[0], TorchDistReader(Store(trained / "checkpoints").path(5)).read(ALPHA)
    )
    assert alphas[1].dtype == torch.float32
    # trained on from there: five steps of Adam at 1e-3, not from the optimizer's initial copy
    assert 0 < float((alphas[0] - alphas[1]).abs().max()) < 6e-3


def test_the_document_s_second_command_trains_and_goes_on(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted.parents[1], tmp_path / "here", symlinks=True)
    _, train = commands()
    for _ in range(2):
        done = run(train, cwd=tmp_path / "here")
        assert done.returncode == 0, done.stderr
    # the second start finds the run at its end
    steps = metrics(tmp_path / "here/runs/more", "train")
    assert list(steps) == [10, 20]
    assert steps[10]["loss"] > steps[20]["loss"]


def test_padding_is_left_out_after_training_and_ids_without_a_token_are_not(
    converted: Path, data_dir: Path, tmp_path: Path
) -> None:
    books = Path(shutil.copytree(converted.parents[1] / "models/books", tmp_path / "books"))
    # 500 rows, which Megatron pads to 512, and a tokenizer of 300 ids
    content = load_file(books / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    save_file(content | {embedding: content[embedding][:500].clone()}, books / "model.safetensors")
    config = json.loads((books / "config.json").read_text())
    changes = {"vocab_size": 500, "eos_token_id": [0, 7]}
    (books / "config.json").write_text(json.dumps(config | changes))
    texts = sorted(data_dir.parent.glob("*.txt"))
    data = prepare(tmp_path / "data", inputs=texts[:5], vocab_size=300, progress=lambda line: None)
    for file in data.tokenizer.iterdir():
        shutil.copy(file, books)
    assert run(["convert", "from-hf", str(books), str(tmp_path / "run")]).returncode == 0
    words = [*TRAINING, f"data.path={data.path}", "training.train_iters=3", "logging.eval_iters=1"]
    done = pretrain(tmp_path / "run" / "recipe.yaml", tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    done = run(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "back")])
    assert done.returncode == 0, done.stderr
    assert "step 3 of" in done.stdout
    trained = load_file(tmp_path / "back" / "model.safetensors")
    assert trained[embedding].shape == (500, 64)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: back[key] for key in changes} == changes
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def test_another_model_or_damage_is_refused(
    converted: Path, data_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "run"))
    words = [*TRAINING, f"data.path={data_dir}"]
    done = pretrain(folder / "recipe.yaml", folder, *words, "model.rope_theta=20000")
    assert done.returncode == 2
    assert "rotary_base: 10000 in the checkpoint, 20000.0 by the recipe" in done.stderr
    shard = folder / "checkpoints/release/__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    done = pretrain(folder / "recipe.yaml", folder, *words)
    assert done.returncode == 2
    assert "__0_0.distcp has other content than was saved" in done.stderr
