"""Conversion at the size of real models: memory and speed.

Both directions in one file, so that processes which share the tests never fill the disk at once.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import pytest
import sparse_checkpoint
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.from_hf import weights_of
from megatron_xielu.checkpoint.mapping import XIELU_CONSTANTS, hf_shapes
from megatron_xielu.checkpoint.targets import TARGETS, SpecialTokens, hf_config
from megatron_xielu.checkpoint.torch_dist import TorchDistReader

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
LARGEST = EIGHT_B.vocab_size * EIGHT_B.hidden_size * 2
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


def say_speed(
    num_bytes: int, converting: tuple[float, float], copying: tuple[float, float]
) -> None:
    """Print both, each by its wall and processor seconds."""
    (seconds, spent), (cp_seconds, cp_spent) = converting, copying
    print(
        f"{num_bytes / 1e9:.1f} GB: {num_bytes / seconds / 1e9:.2f} GB/s in {seconds:.0f} s "
        f"({spent:.0f} s of processors); cp of the same bytes {num_bytes / cp_seconds / 1e9:.2f} "
        f"GB/s in {cp_seconds:.0f} s ({cp_spent:.0f})"
    )


def check_memory(peak: int, words: list[str]) -> None:
    """Convert as users do by default, with verification; `peak` is without it."""
    seconds, spent, output = timed(*words)
    assert "tensors are equal bit for bit" in output
    verified = peak_of(output)
    print(
        f"with verification {seconds:.0f} s ({spent:.0f}); peak memory {peak / 1e6:.0f} MB, "
        f"with verification {verified / 1e6:.0f} MB, the largest tensor has {LARGEST / 1e6:.0f} MB"
    )
    assert max(peak, verified) <= 2 * LARGEST + 300e6


@pytest.mark.slow
def test_8b_to_hugging_face_in_the_memory_of_two_tensors(big_folder: Path) -> None:
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
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == 4
    count = 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            count += len(opened.keys())
    # 10 weights and 4 scalars a layer, embedding, norm and output layer
    assert count == 32 * (10 + 4) + 3
    assert sum(file.stat().st_size for file in files) == pytest.approx(num_bytes, rel=1e-4)
    say_speed(num_bytes, (seconds, spent), copying[:2])
    shutil.rmtree(out)
    check_memory(peak_of(output), words)


def write_sparse(folder: Path) -> int:
    """A folder of Apertus 8B whose weights are a hole, which reads as zeros; returns its bytes."""
    folder.mkdir()
    target = TARGETS["apertus"]
    config = hf_config(target, EIGHT_B, SpecialTokens(), torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for placement in weights_of(EIGHT_B):
        for name, shape in hf_shapes(placement, EIGHT_B, target).items():
            begin, end = end, end + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "weights.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    constants = {
        name.format(i=layer): torch.tensor(value)
        for layer in range(EIGHT_B.num_layers)
        for name, value in XIELU_CONSTANTS.items()
    }
    save_file(constants, folder / "constants.safetensors")
    return end


@pytest.mark.slow
def test_8b_from_hugging_face_in_the_memory_of_two_tensors(big_folder: Path) -> None:
    hf, out = big_folder / "hf", big_folder / "out"
    num_bytes = write_sparse(hf)
    # conversion syncs too
    copying = timed("sh", "-c", f"cp --sparse=never -r {hf} {out} && sync {out}/*")
    shutil.rmtree(out)
    words = [sys.executable, "-c", MAIN, "convert", "from-hf", str(hf), str(out)]
    seconds, spent, output = timed(*words, "--no-verify")
    reader = TorchDistReader(out / "checkpoints/release")
    reader.check_files()
    assert reader.shape("decoder.layers.mlp.linear_fc1.weight") == (32, 21504, 4096)
    say_speed(num_bytes, (seconds, spent), copying[:2])
    shutil.rmtree(out)
    check_memory(peak_of(output), words)
