"""Checkpoints of Megatron models, written once per session by one and by two gloo ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import LAYOUTS, recipe_of
from torch.distributed import TCPStore
from write_checkpoint import Job

from megatron_xielu.recipes import to_yaml


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are so small that more threads only wait for each other."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture
def big_folder(tmp_path: Path) -> Iterator[Path]:
    """Where a copy of the 8B model fits; emptied even after a failure, which may have filled it."""
    needed, free = 17e9, shutil.disk_usage(tmp_path).free
    if free < needed:
        pytest.skip(f"{free / 1e9:.1f} GB are free, and the model needs {needed / 1e9:.0f} GB")
    yield tmp_path
    for path in tmp_path.iterdir():
        shutil.rmtree(path)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder of each layout; not to be changed."""
    root = tmp_path_factory.mktemp("runs")
    jobs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for name, (_, parallel, options) in LAYOUTS.items():
        (root / name).mkdir()
        (root / name / "recipe.yaml").write_text(to_yaml(recipe_of(name)))
        size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        jobs[size].append(asdict(Job(run_dir=str(root / name), **options)))
    for world_size, batch in jobs.items():
        (root / f"jobs{world_size}.json").write_text(json.dumps(batch))
        _launch(root / f"jobs{world_size}.json", world_size)
    return {name: root / name for name in LAYOUTS}


@pytest.fixture
def copy_run(runs: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies a run folder, to damage it."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(runs[name], tmp_path / name))

    return copy


def _launch(jobs: Path, world_size: int) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                str(Path(__file__).parent / "write_checkpoint.py"),
                jobs,
            ],
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
                "OMP_NUM_THREADS": "1",
                # Megatron refuses tensor parallelism without it
                "CUDA_DEVICE_MAX_CONNECTIONS": "1",
                "PYTHONPATH": str(root),
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in ranks:
            process.kill()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 320 tokens with <eos> = 0, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([Path(__file__).read_text()], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(folder)
    return folder
