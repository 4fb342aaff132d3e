"""Conversion at the size of real models: memory and speed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sparse_checkpoint
import torch
from safetensors import safe_open

from megatron_xielu.checkpoint.architecture import Architecture

# Apertus 8B
EIGHT_B = Architecture(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=21504,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=131072,
    tie_embeddings=False,
    qk_layernorm=True,
    activation="xielu",
    norm_epsilon=1e-5,
    rope_theta=500_000.0,
    seq_length=4096,
)
MAIN = (
    "import resource, sys\n"
    "from megatron_xielu.cli import main\n"
    "assert main(sys.argv[1:]) == 0\n"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
)


def copy(source: Path, target: Path) -> float:
    """Seconds in which `cp` writes a folder to disk, holes as zeros."""
    begin = time.monotonic()
    subprocess.run(["cp", "--sparse=never", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    seconds = time.monotonic() - begin
    shutil.rmtree(target)
    return seconds


@pytest.mark.slow
def test_8b_in_the_memory_of_two_tensors(tmp_path: Path) -> None:
    step, out = tmp_path / "iter_0000010", tmp_path / "out"
    num_bytes = sparse_checkpoint.write(step, EIGHT_B, torch.bfloat16)
    # twice: to touch memory first, also that of the file system's cache, is slow
    copying = [copy(step, out) for _ in range(2)][1]
    command = [sys.executable, "-c", MAIN, "convert", "to-hf", str(step), str(out), "--no-verify"]
    begin = time.monotonic()
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.monotonic() - begin
    peak = int(done.stdout.splitlines()[-1]) * 1024
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == 4
    count = 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            count += len(opened.keys())
    # 10 weights and 4 scalars a layer, embedding, norm and output layer
    assert count == 32 * (10 + 4) + 3
    assert sum(file.stat().st_size for file in files) == pytest.approx(num_bytes, rel=1e-4)
    largest = 131072 * 4096 * 2
    print(
        f"{num_bytes / 1e9:.1f} GB in {seconds:.0f} s, {num_bytes / seconds / 1e9:.2f} GB/s; cp of "
        f"the same bytes in {copying:.0f} s, {num_bytes / copying / 1e9:.2f} GB/s; peak memory "
        f"{peak / 1e6:.0f} MB, the largest tensor has {largest / 1e6:.0f} MB"
    )
    assert peak <= 2 * largest + 300e6
