"""How a run is joined where no torchrun starts the ranks: as tasks of `srun`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from megatron_xielu.errors import UserError

STOP_SECONDS = 300
"""What a stopped run gets to end its step and save, before what started it kills it."""
# torch's own list, and what schedulers give as notice: torchrun would die of it and leave its ranks
SIGNALS_TO_HANDLE = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def join_srun() -> None:
    """Give a task of `srun` the variables that torchrun would have set; no-op elsewhere.

    Every task is one rank. A step of a single task stays a plain start, whose ranks are started
    here. MASTER_ADDR and MASTER_PORT that are set already stay.

    Raises:
        UserError: Slurm's variables contradict each other.
    """
    if "RANK" not in os.environ:
        os.environ.update(ranks_variables(os.environ))


def ranks_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables of a task of `srun`; empty where there are not several tasks.

    Raises:
        UserError: Slurm's variables contradict each other.
    """
    # of the step, not of the job: a batch script, which is no rank, sees the job's
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if num_tasks == 1:
        return {}
    job, step = environment["SLURM_JOB_ID"], environment["SLURM_STEP_ID"]
    rank = int(environment["SLURM_PROCID"])
    if rank >= num_tasks:
        raise UserError(
            f"SLURM_PROCID={rank} is no task of a step of {num_tasks}: start pretrain by srun, "
            "without Slurm's variables of another step"
        )
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(
            tasks_of_node(
                environment["SLURM_STEP_TASKS_PER_NODE"], int(environment["SLURM_NODEID"])
            )
        ),
        # where task 0 runs, which serves the others' meeting
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or first_host(environment["SLURM_STEP_NODELIST"]),
        # the same for all tasks, below the ports that Linux gives to clients, and another one for
        # another step on these nodes
        "MASTER_PORT": environment.get("MASTER_PORT")
        or str(20000 + (int(job) + int(step)) % 10000),
    }


def first_host(nodelist: str) -> str:
    """The first host of Slurm's short form: n07 of n[07-09,12],x3."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodelist).split(",")[0]


def tasks_of_node(counts: str, node: int) -> int:
    """How many tasks the node of this number has in Slurm's short form: 1 of 4(x2),1 for node 2."""
    end = 0
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        end += int(times or 1)
        if node < end:
            return int(count)
    raise UserError(
        f"SLURM_STEP_TASKS_PER_NODE={counts} has no node {node}: start pretrain by srun, without "
        "Slurm's variables of another step"
    )
