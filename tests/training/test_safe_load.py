"""No file of a checkpoint can run code, whichever folder Megatron is told to load."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_xielu.checkpoint.manifest import MANIFEST
from megatron_xielu.checkpoint.store import Store
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from tests.training.test_pretrain import command, refused, run


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.touched,)


@pytest.fixture(scope="module")
def finished(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(command(folder, data_dir)).returncode == 0
    return folder


def replace_index(step: Path, payload: Payload) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(payload))


def hide_in_index(step: Path, payload: Payload) -> None:
    metadata = FileSystemReader(step).read_metadata()
    metadata.planner_data = payload
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def replace_object(step: Path, payload: Payload, key: str) -> None:
    """Append the payload to the shard that holds an object, and let the index point to it."""
    metadata = FileSystemReader(step).read_metadata()
    index = next(i for i in metadata.storage_data if i.fqn.startswith(key))
    assert isinstance(index, MetadataIndex)
    info = metadata.storage_data[index]
    buffer = io.BytesIO()
    torch.save([payload], buffer)
    shard = step / info.relative_path
    info.offset, info.length = shard.stat().st_size, len(buffer.getvalue())
    with shard.open("ab") as file:
        file.write(buffer.getvalue())
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


FAST = {("index", "load"), ("random state", "resume")}
PLACES: dict[str, Callable[[Path, Payload], None]] = {
    "index": replace_index,
    "inside the index": hide_in_index,
    "common state": lambda step, payload: replace_object(step, payload, "common_state"),
    "legacy common state": lambda step, payload: torch.save(payload, step / "common.pt"),
    "random state": lambda step, payload: replace_object(step, payload, "rng_state"),
}
CASES = [
    pytest.param(place, how, marks=[] if (place, how) in FAST else pytest.mark.slow)
    for place in PLACES
    for how in ("resume", "load")
]


@pytest.mark.parametrize(("place", "how"), CASES)
def test_a_payload_is_refused_and_never_runs(
    place: str, how: str, finished: Path, data_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    step = Store(folder / "checkpoints").path(5)
    touched = tmp_path / "touched"
    PLACES[place](step, Payload(touched))
    # whoever plants it can write the manifest too
    (step / MANIFEST).unlink()
    if how == "resume":
        words = command(folder, data_dir, "checkpoint.save_interval=6")
    else:
        flags = ["--load", str(folder / "checkpoints")]
        words = command(tmp_path / "other", data_dir, flags=flags)
    done = run(words)
    print(done.stderr)
    assert not touched.exists()
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert "trusted source" not in done.stderr


@pytest.mark.slow
def test_what_is_not_loaded_does_not_run(finished: Path, data_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    step = Store(folder / "checkpoints").path(5)
    replace_object(step, Payload(tmp_path / "touched"), "rerun_state")
    (step / MANIFEST).unlink()
    done = run(command(folder, data_dir, "checkpoint.save_interval=6"))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "touched").exists()


def test_the_payload_would_run(finished: Path, tmp_path: Path) -> None:
    step = Path(shutil.copytree(finished / "checkpoints/iter_0000005", tmp_path / "iter_0000005"))
    replace_index(step, Payload(tmp_path / "touched"))
    with pytest.raises(AttributeError):
        FileSystemReader(step).read_metadata()
    assert (tmp_path / "touched").exists()


def test_what_megatron_saves_holds_no_unknown_class(finished: Path) -> None:
    reader = TorchDistReader(finished / "checkpoints/iter_0000005")
    kinds = {key.partition("/")[0] for key in reader.object_keys()}
    print(sorted(kinds))
    assert {"common_state", "rng_state"} <= kinds


def test_the_message_names_the_file(finished: Path, data_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    step = Store(folder / "checkpoints").path(5)
    replace_index(step, Payload(tmp_path / "touched"))
    (step / MANIFEST).unlink()
    assert "names pathlib.Path.touch, which no index needs" in refused(command(folder, data_dir))
