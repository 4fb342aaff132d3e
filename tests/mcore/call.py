"""Run functions of `checks` or `fp8_checks` on this rank, Megatron's groups ready.

call.py TP OUT NAME ...

Writes each check's traceback, or null, so that one process serves many tests.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch

from megatron_xielu.mcore import cpu_platform
from tests.mcore import checks, fp8_checks


def main(tp: str, out: str, *names: str) -> None:
    if not all(name.startswith("transformer_engine") for name in names):
        cpu_platform.hide_gpu_libraries()
    cpu_platform.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(int(tp))
    results: dict[str, str | None] = {}
    for name in names:
        model_parallel_cuda_manual_seed(1)
        try:
            getattr(checks if hasattr(checks, name) else fp8_checks, name)()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    Path(out, f"rank_{os.environ['RANK']}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
