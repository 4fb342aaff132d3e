"""What the writer writes, torch's own reader reads, and a write that fails leaves no index."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megatron_xielu.checkpoint import manifest, torch_dist_writer
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.checkpoint.torch_dist_writer import Part, write_checkpoint
from tests.limits import file_limit

STATE = {"iteration": 0, "args": argparse.Namespace(num_layers=2)}
WHOLE = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
STACKED = torch.arange(24.0).view(2, 3, 4)


def parts() -> list[Part]:
    # rows of a larger tensor, one of them transposed and back: views, which must not drag along
    # what they look into
    rows = [
        Part(key="stacked", shape=(2, 3, 4), row=row, dtype=torch.float32, load=load)
        for row, load in ((1, lambda: STACKED[1]), (0, lambda: STACKED[0].T.contiguous().T))
    ]
    whole = Part(key="whole", shape=(5, 3), row=None, dtype=torch.bfloat16, load=lambda: WHOLE)
    return [whole, *rows]


@pytest.mark.parametrize("file_bytes", [10**9, 40])
def test_torch_reads_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int
) -> None:
    monkeypatch.setattr(torch_dist_writer, "_FILE_BYTES", file_bytes)
    told: list[int] = []
    files = write_checkpoint(tmp_path, parts(), STATE, {"a/shard_0_1": None}, progress=told.append)

    state = {"whole": torch.empty(5, 3, dtype=torch.bfloat16), "stacked": torch.empty(2, 3, 4)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["whole"], WHOLE)
    assert torch.equal(state["stacked"], STACKED)
    reader = TorchDistReader(tmp_path)
    assert reader.common_state() == STATE
    assert torch.equal(reader.read("stacked", 1), STACKED[1])
    assert reader.object_keys() == ["a/shard_0_1", "common_state/shard_0_1"]

    assert told == [30, 48, 48]
    assert files == manifest.describe(tmp_path, os.listdir(tmp_path))
    data = [name for name in files if name.endswith(".distcp")]
    assert len(data) == (1 if file_bytes > 100 else 2)
    # 126 bytes of numbers, and what torch.save puts around each
    assert sum(files[name].size for name in data) < 10_000


def test_a_write_that_fails_is_an_os_error_and_leaves_no_index(tmp_path: Path) -> None:
    with file_limit(300), pytest.raises(OSError, match="File too large"):
        write_checkpoint(tmp_path, parts(), STATE)
    assert not (tmp_path / ".metadata").exists()


def test_a_part_that_cannot_be_read_leaves_no_index(tmp_path: Path) -> None:
    def load() -> Tensor:
        raise ValueError("damaged")

    broken = Part(key="x", shape=(1,), row=None, dtype=torch.float32, load=load)
    with pytest.raises(ValueError, match="damaged"):
        write_checkpoint(tmp_path, [*parts(), broken], STATE)
    assert not (tmp_path / ".metadata").exists()
