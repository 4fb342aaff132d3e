"""`pretrain` as tasks of `srun`, by real processes."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_xielu.errors import UserError
from megatron_xielu.launch.join import first_host, ranks_variables, tasks_of_node
from tests.launch.conftest import Cluster
from tests.ranks import environment
from tests.training.test_pretrain import command, metrics

TWO_RANKS = "parallel.tensor_model_parallel_size=2"
# of a task as Slurm 22.05 sets them
TASK = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "n[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}


def run_together(
    words: Sequence[str], environments: Sequence[dict[str, str]]
) -> list[tuple[int, str]]:
    """Exit code and output of the same command in each of the environments, at the same time."""
    started = [
        subprocess.Popen(
            words, env=each, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for each in environments
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [(p.returncode, output) for p, output in zip(started, outputs, strict=True)]


def check_trained(folder: Path) -> None:
    assert [r["step"] for r in metrics(folder) if r["type"] == "train"] == [1, 2, 3, 4, 5]
    assert {path.name for path in (folder / "logs").iterdir()} >= {
        "rank_00000.log",
        "rank_00001.log",
    }


def test_two_tasks_of_srun(data_dir: Path, tmp_path: Path) -> None:
    here = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0"}
    here |= {"SLURM_STEP_TASKS_PER_NODE": "2"}
    tasks = [
        environment(**TASK | here | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in "01"
    ]
    ended = run_together(command(tmp_path / "run", data_dir, TWO_RANKS), tasks)
    assert [code for code, _ in ended] == [0, 0], ended
    check_trained(tmp_path / "run")


def test_the_variables_of_a_task() -> None:
    assert ranks_variables(TASK) == {
        "RANK": "4",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n07",
        "MASTER_PORT": "23457",
    }
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert given.items() <= ranks_variables(TASK | given).items()


def test_one_task_and_a_batch_script_start_their_ranks_themselves() -> None:
    assert ranks_variables(TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == {}
    batch = {k: v for k, v in TASK.items() if "STEP" not in k} | {"SLURM_NTASKS": "6"}
    assert ranks_variables(batch) == {}


def test_variables_of_another_step_are_refused() -> None:
    with pytest.raises(UserError, match=r"SLURM_PROCID=7 is no task of a step of 6: start"):
        ranks_variables(TASK | {"SLURM_PROCID": "7"})
    with pytest.raises(UserError, match=r"SLURM_STEP_TASKS_PER_NODE=4,2 has no node 2: start"):
        ranks_variables(TASK | {"SLURM_NODEID": "2"})


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [("n1", "n1"), ("n[07-09,12],x3", "n07"), ("b,a", "b"), ("r[2,4]n[1-3]-ib", "r2n1-ib")],
)
def test_the_first_host_of_a_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def test_the_tasks_of_a_node() -> None:
    assert [tasks_of_node("4(x2),1,2(x3)", node) for node in range(6)] == [4, 4, 1, 2, 2, 2]


@pytest.mark.slow
def test_two_nodes_of_a_real_slurm(slurm: Cluster, data_dir: Path, tmp_path: Path) -> None:
    words = command(tmp_path / "run", data_dir, TWO_RANKS)
    script = f"#!/bin/bash\nsrun {shlex.join(words)}\n"
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/out"]
    job = re.search(r"\d+", slurm.run("sbatch", *options, text=script)).group()  # type: ignore[union-attr]
    said = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert said["JobState"] == "COMPLETED", (tmp_path / "out").read_text()
    check_trained(tmp_path / "run")
