from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_xielu.checkpoint.saved_tensor import saved_bytes

WHOLE = torch.arange(24, dtype=torch.bfloat16).view(4, 6)


def save(path: Path, tensor: object) -> tuple[int, int]:
    """Saves behind other bytes, as chunks lie in a file; returns offset and length."""
    with path.open("wb") as file:
        file.write(b"another chunk")
        offset = file.tell()
        torch.save(tensor, file)
        length = file.tell() - offset
        file.write(b"one more")
    return offset, length


def test_the_bytes_are_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    offset, length = save(path, WHOLE)
    with path.open("rb") as file:
        begin = saved_bytes(file, offset, length, WHOLE)
    assert begin is not None
    content = path.read_bytes()[begin : begin + WHOLE.nbytes]
    assert torch.equal(torch.frombuffer(bytearray(content), dtype=torch.bfloat16), WHOLE.view(-1))


@pytest.mark.parametrize(
    ("saved", "like"),
    [
        (WHOLE.T, WHOLE.T),
        (WHOLE[1:], WHOLE[1:]),
        (WHOLE.float(), WHOLE),
        (WHOLE, WHOLE.view(6, 4)),
        ({"tensor": WHOLE}, WHOLE),
    ],
    ids=["transposed", "part of a storage", "other type", "other shape", "no tensor"],
)
def test_what_is_no_plain_run_is_left_to_torch(tmp_path: Path, saved: object, like: Tensor) -> None:
    offset, length = save(tmp_path / "file", saved)
    with (tmp_path / "file").open("rb") as file:
        assert saved_bytes(file, offset, length, like) is None


def test_a_damaged_chunk_is_left_to_torch(tmp_path: Path) -> None:
    path = tmp_path / "file"
    offset, length = save(path, WHOLE)
    os.truncate(path, offset + length // 2)
    with path.open("rb") as file:
        assert saved_bytes(file, offset, length, WHOLE) is None
