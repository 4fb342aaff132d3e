"""What several test files need: a small data folder, a small recipe and a small disk."""

from __future__ import annotations

import pydoc_data.topics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_xielu.ops.cpu import build
from megatron_xielu.recipes import Recipe, load_recipe

# a model that trains five steps in a second; each number differs from the others where it can, so
# that a mix-up of dimensions shows
SMALL = (
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "model.ffn_hidden_size=192",
    "model.seq_length=32",
    "parallel.tensor_model_parallel_size=1",
    "training.train_iters=5",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "schedule.lr_warmup_iters=1",
    "schedule.lr_wsd_decay_iters=2",
    "logging.log_interval=1",
    "logging.eval_interval=5",
    "logging.eval_iters=1",
    "checkpoint.save_interval=5",
)


@pytest.fixture(scope="session", autouse=True)
def cpu_kernels() -> None:
    """Built before the first test, so that none has the builder's notice in its output."""
    build.load()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of about 40,000 tokens of English with 512 ids."""
    prepare = pytest.importorskip("megatron_xielu.data.prepare").prepare
    folder = tmp_path_factory.mktemp("corpus")
    topics = list(pydoc_data.topics.topics.values())
    for index, text in enumerate(topics[:40]):
        (folder / f"{index}.txt").write_text(text)
    return prepare(folder / "data", inputs=sorted(folder.glob("*.txt")), vocab_size=512).path


@pytest.fixture(scope="session")
def small_recipe(data_dir: Path) -> Recipe:
    """`tiny`, made smaller still, on `data_dir`."""
    overrides = (*SMALL, f"data.path={data_dir}", "model.vocab_size=512")
    return load_recipe("tiny", overrides)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB: room for one checkpoint of the small model and part of a second."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    # lazily: a process that was just ended may still hold a file
    subprocess.run(["umount", "-l", str(folder)], check=True)
