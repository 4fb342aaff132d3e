"""Ranks of this machine that add up what each of them has."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from megatron_xielu.doctor.outcome import Failed

# 16 MiB of float32
ELEMENTS = 1 << 22
REPETITIONS = 5


def over_gloo() -> str:
    """Two ranks on the CPU."""
    return _all_reduce("gloo", 2)


def over_nccl() -> str:
    """A rank on every GPU."""
    return _all_reduce("nccl", torch.cuda.device_count())


def _all_reduce(backend: str, count: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (backend, count, folder), nprocs=count)
        seconds, wrong = (Path(folder) / "seconds").read_text().split()
    if int(wrong):
        raise Failed(f"{wrong} of {ELEMENTS} sums over {count} ranks are wrong")
    size = 4 * ELEMENTS
    return (
        f"{count} rank{'s' if count > 1 else ''}: {size / 2**20:.0f} MiB summed right, "
        f"{1e3 * float(seconds):.1f} ms ({size / float(seconds) / 1e9:.1f} GB/s)"
    )


def _rank(rank: int, backend: str, count: int, folder: str) -> None:
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=count
    )
    # small whole numbers, whose sum is exact in any order
    mine = torch.arange(ELEMENTS, device=device, dtype=torch.float32) % 1000 + rank
    expected = count * (torch.arange(ELEMENTS, device=device, dtype=torch.float32) % 1000)
    expected += count * (count - 1) / 2
    times = []
    for _ in range(REPETITIONS):
        total = mine.clone()
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(total)
        # also waits for a GPU
        wrong = int((total != expected).sum())
        times.append(time.perf_counter() - begin)
    if rank == 0:
        (Path(folder) / "seconds").write_text(f"{min(times)} {wrong}")
    dist.barrier()
    dist.destroy_process_group()
