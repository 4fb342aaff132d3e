"""Run functions of the modules below on this rank, Megatron's groups ready: call.py TP OUT NAME ...

Writes each check's traceback, or what it measured, so that one process serves many tests.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from megatron_xielu.mcore import cpu_platform
from tests.mcore import (
    checks,
    fp8_checks,
    te_checks,
    te_model_checks,
    te_one_rank_checks,
    te_plain_checks,
    watch_checks,
)

MODULES = (
    checks,
    fp8_checks,
    te_checks,
    te_model_checks,
    te_one_rank_checks,
    te_plain_checks,
    watch_checks,
)


def main(tp: str, out: str, *names: str) -> None:
    if not all(name.startswith(("transformer_engine", "on_a_gpu")) for name in names):
        cpu_platform.hide_gpu_libraries()
    cpu_platform.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(int(tp))
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        model_parallel_cuda_manual_seed(1)
        try:
            (check,) = (vars(module)[name] for module in MODULES if name in vars(module))
            results[name] = {"error": None, "measured": check()}
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    Path(out, f"rank_{os.environ['RANK']}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
