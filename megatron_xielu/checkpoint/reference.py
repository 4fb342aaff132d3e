"""What the trained model itself answers: Megatron's logits, from a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_xielu.checkpoint.run import RunCheckpoint
from megatron_xielu.recipes import to_yaml

_PROGRAM = """
import sys
from megatron_xielu.mcore import cpu_platform
cpu_platform.hide_gpu_libraries()
from megatron_xielu.mcore.evaluate import main
main(*sys.argv[1:])
"""
# whatever job this is a part of
_ALONE = {
    "CUDA_VISIBLE_DEVICES": "",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
_LINES_SHOWN = 15


def megatron_logits(run: RunCheckpoint) -> Callable[[list[list[int]]], list[Tensor]]:
    """A function from prompts to fp32 logits [tokens, padded vocabulary] of a run's checkpoint.

    It runs on the CPU whatever the machine has, in exact fp32, and needs Megatron-Core.

    Raises:
        RuntimeError: from the returned function, when the process fails; the message has its end.
    """
    assert run.recipe is not None, "open_recipe sees to it"
    described = to_yaml(run.recipe)

    def logits(prompts: list[list[int]]) -> list[Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            recipe, asked, answer = (
                Path(folder, name) for name in ("recipe.yaml", "prompts.json", "logits.pt")
            )
            recipe.write_text(described, encoding="utf-8")
            asked.write_text(json.dumps(prompts))
            files = (run.path, recipe, asked, answer)
            done = subprocess.run(
                [sys.executable, "-c", _PROGRAM, *map(str, files)],
                env={**os.environ, **_ALONE},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                end = "\n".join(done.stderr.splitlines()[-_LINES_SHOWN:])
                raise RuntimeError(f"Megatron could not evaluate {run.path}:\n{end}")
            tensors: list[Tensor] = torch.load(answer, weights_only=True)
            return tensors

    return logits
