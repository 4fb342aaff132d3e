"""from-hf at the size of real models: memory and speed."""

from __future__ import annotations

import json
import shutil
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_streaming import EIGHT_B, MAIN, peak_of, timed

from megatron_xielu.checkpoint.from_hf import weights_of
from megatron_xielu.checkpoint.mapping import XIELU_CONSTANTS, hf_shapes
from megatron_xielu.checkpoint.targets import TARGETS, SpecialTokens, hf_config
from megatron_xielu.checkpoint.torch_dist import TorchDistReader


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
def test_8b_in_the_memory_of_two_tensors(big_folder: Path) -> None:
    hf, out = big_folder / "hf", big_folder / "out"
    num_bytes = write_sparse(hf)
    # conversion syncs too
    copying = timed("sh", "-c", f"cp --sparse=never -r {hf} {out} && sync {out}/*")
    shutil.rmtree(out)
    words = [sys.executable, "-c", MAIN, "convert", "from-hf", str(hf), str(out)]
    seconds, spent, output = timed(*words, "--no-verify")
    peaks = [peak_of(output)]
    reader = TorchDistReader(out / "checkpoints/release")
    reader.check_files()
    assert reader.shape("decoder.layers.mlp.linear_fc1.weight") == (32, 21504, 4096)
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
