"""Conversion at the size of real models: memory and speed."""

from __future__ import annotations

import os
import resource
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


def timed(*command: str) -> tuple[float, float, str]:
    """Wall and processor seconds of a command, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.monotonic()
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.monotonic() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, spent, done.stdout


def peak_of(output: str) -> int:
    """Bytes of memory, from what MAIN printed last."""
    return int(output.splitlines()[-1]) * 1024


@pytest.mark.slow
def test_8b_in_the_memory_of_two_tensors(big_folder: Path) -> None:
    step, out = big_folder / "iter_0000010", big_folder / "out"
    num_bytes = sparse_checkpoint.write(step, EIGHT_B, torch.bfloat16)
    # twice: to touch memory first, also that of the file system's cache, is slow
    for _ in range(2):
        copying = timed(
            "sh",
            "-c",
            f"cp --sparse=never -r {step} {out} && sync {out}/*",  # conversion syncs too
        )
        shutil.rmtree(out)
    words = [sys.executable, "-c", MAIN, "convert", "to-hf", str(step), str(out)]
    seconds, spent, output = timed(*words, "--no-verify")
    peaks = [peak_of(output)]
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
        f"{num_bytes / 1e9:.1f} GB: {num_bytes / seconds / 1e9:.2f} GB/s in {seconds:.0f} s "
        f"({spent:.0f} s of processors); cp of the same bytes {num_bytes / copying[0] / 1e9:.2f} "
        f"GB/s in {copying[0]:.0f} s ({copying[1]:.0f})"
    )
    shutil.rmtree(out)
    seconds, spent, output = timed(*words)
    assert "tensors are equal bit for bit" in output
    peaks.append(peak_of(output))
    print(
        f"with verification {seconds:.0f} s ({spent:.0f}); peak memory {peaks[0] / 1e6:.0f} MB, "
        f"with verification {peaks[1] / 1e6:.0f} MB, the largest tensor has {largest / 1e6:.0f} MB"
    )
    assert max(peaks) <= 2 * largest + 300e6
