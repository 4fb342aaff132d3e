"""A shard's write errors: raised at its end, once, and never inside the writer."""

from __future__ import annotations

import errno
import gc
import io
import os
from pathlib import Path

import pytest
import torch

from megatron_xielu.mcore.shard_file import ShardFile

FULL = Path("/dev/full")


def test_it_holds_what_a_plain_file_would(tmp_path: Path) -> None:
    tensor = torch.arange(100_000, dtype=torch.float32).view(100, 1000)
    plain = io.BytesIO()
    torch.save(tensor, plain)
    with ShardFile(tmp_path / "shard", pytest.fail) as file:
        file.write(memoryview(torch.arange(3, dtype=torch.int64).numpy()))
        torch.save(tensor, file)
        size = file.tell()
        os.fsync(file.fileno())
    written = (tmp_path / "shard").read_bytes()
    assert size == len(written)
    assert written[24:] == plain.getvalue()


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_full_disk_shows_at_the_end() -> None:
    errors: list[OSError] = []
    for _ in range(20):
        with ShardFile(FULL, errors.append) as file:
            # what a shard holds beside tensors: a view of a BytesIO, whose collection together with
            # an exception's traceback crashes CPython
            file.write(io.BytesIO(bytes(5000)).getbuffer())
            torch.save(torch.zeros(10_000), file)
            assert file.tell() > 45_000
            with pytest.raises(OSError, match="No space left"):
                os.fsync(file.fileno())
        gc.collect()
    assert [error.errno for error in errors] == [errno.ENOSPC] * 20
