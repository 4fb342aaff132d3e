"""Real gloo ranks for tests: start a program once per rank and wait for all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(
    program: Path, arguments: Sequence[str], nproc: int, timeout: float = 300, **variables: object
) -> None:
    """Run `python PROGRAM ARGUMENTS` as `nproc` ranks; a failing rank's output is the error.

    `variables` are put into the ranks' environment.
    """
    # served here, because a port that rank 0 were to open later may be taken then
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), *arguments],
            env=environment(
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE=nproc,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=store.port,
                TORCHELASTIC_USE_AGENT_STORE=True,
                TORCHELASTIC_RESTART_COUNT=0,
                **variables,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(nproc)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for rank, (process, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {nproc}:\n{output[-4000:]}"


def environment(**variables: object) -> dict[str, str]:
    """This process's environment with one thread per rank and no GPU."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        # asserted by Megatron under tensor parallelism
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # after the tests' own: a folder with TransformerEngine, say
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONWARNINGS": "ignore",
        **{name: str(value) for name, value in variables.items()},
    }
