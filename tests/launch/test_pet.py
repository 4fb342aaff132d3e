"""`pretrain` as the torchrun that PET_* variables describe, by real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_xielu.errors import UserError
from megatron_xielu.launch import pet
from tests.launch.test_join import TWO_RANKS, check_trained, run_together
from tests.launch.test_launch import own_address
from tests.ranks import environment
from tests.training.test_pretrain import command, latest, metrics


def test_two_nodes_of_kubeflow(data_dir: Path, tmp_path: Path) -> None:
    variables = {"PET_NNODES": 2, "PET_NPROC_PER_NODE": 1, "PET_MASTER_ADDR": own_address()}
    variables |= {"PET_MASTER_PORT": free_port()}
    nodes = [environment(**variables, PET_NODE_RANK=rank) for rank in range(2)]
    ended = run_together(command(tmp_path / "run", data_dir, TWO_RANKS), nodes)
    assert [code for code, _ in ended] == [0, 0], ended
    check_trained(tmp_path / "run")


def test_a_stopped_node_is_to_be_started_again(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = command(folder, data_dir, "training.train_iters=40", "checkpoint.save_interval=2")
    # of one node, as Kubeflow sets them
    variables = environment(PET_NNODES=1, PET_NPROC_PER_NODE=1, PET_MASTER_ADDR="node-0.invalid")
    process = subprocess.Popen(words, env=variables, stderr=subprocess.PIPE, text=True)
    try:
        while len(metrics(folder)) < 5:
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == pet.STOPPED, said
    assert "Traceback" not in said
    stopped_at = latest(folder)
    assert stopped_at == max(r["step"] for r in metrics(folder) if r["type"] == "train") < 40
    ((code, output),) = run_together(words, [variables])
    assert code == 0, output
    assert latest(folder) == 40


def test_a_mistake_ends_a_node_with_2(tmp_path: Path) -> None:
    words = command(tmp_path / "run", tmp_path / "no-data")
    ((code, output),) = run_together(words, [environment(PET_NNODES=1)])
    assert code == 2
    # without another try
    assert output.count("error: ") == output.count("no-data") == 1, output


def test_a_dry_run_of_a_node_starts_nothing(data_dir: Path, tmp_path: Path) -> None:
    words = [*command(tmp_path / "run", data_dir), "--dry-run"]
    ((code, output),) = run_together(words, [environment(PET_NNODES=2, PET_NODE_RANK=1)])
    assert code == 0, output
    assert "Megatron arguments" in output


def test_a_node_without_a_first_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", {"PET_NNODES": "2"})
    with pytest.raises(UserError, match="PET_NNODES=2 needs a meeting point: set PET_MASTER_ADDR"):
        pet.become_torchrun(["pretrain"])
    os.environ["PET_MASTER_ADDR"] = "localhost"
    with pytest.raises(UserError, match=r"PET_MASTER_ADDR localhost is \S+ here, which every node"):
        pet.become_torchrun(["pretrain"])
    os.environ["PET_RDZV_ENDPOINT"] = "node0:x"
    with pytest.raises(UserError, match="PET_RDZV_ENDPOINT node0:x must be HOST or HOST:PORT"):
        pet.become_torchrun(["pretrain"])
    monkeypatch.setattr(pet, "_HEAD_SECONDS", 0.0)
    for head in ("nowhere.invalid", f"{own_address()}:{free_port()}"):
        os.environ |= {"PET_RDZV_ENDPOINT": head, "PET_NODE_RANK": "1"}
        with pytest.raises(SystemExit) as end:
            pet.become_torchrun(["pretrain"])
        assert end.value.code == pet.STOPPED
        problem, remedy = capsys.readouterr().err.splitlines()
        assert problem.startswith(f"error: no answer from the first node {head.split(':')[0]}: ")
        assert remedy.startswith("Start this node again, and those that are lost")


def test_variables_that_are_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pet, "_run", sys.exit)
    given = {"PET_NNODES": "2", "PET_RDZV_BACKEND": "static", "PET_SHUTDOWN_TIMEOUT": "7"}
    monkeypatch.setattr(os, "environ", dict(given))
    with pytest.raises(SystemExit):
        pet.become_torchrun(["pretrain"])
    assert given.items() <= os.environ.items()
    # static needs others, which a user who chose it has set
    assert not {"PET_RDZV_ENDPOINT", "PET_RDZV_CONF", "PET_LOCAL_ADDR"} & {*os.environ}
    given = {"PET_NPROC_PER_NODE": "8", "PET_MAX_RESTARTS": "0"}
    monkeypatch.setattr(os, "environ", dict(given))
    with pytest.raises(SystemExit):
        pet.become_torchrun(["pretrain"])
    assert given.items() <= os.environ.items()
    assert os.environ["PET_RDZV_BACKEND"] == "c10d"


def test_what_a_stopped_rank_ends_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"TORCHELASTIC_RUN_ID": "run", "RANK": "0"})
    # a user's own torchrun: who stopped it knows
    assert pet.stopped_code() == 0
    os.environ["PET_NNODES"] = "2"
    assert pet.stopped_code() == pet.STOPPED
    # in a pod, but started by `pretrain` there
    del os.environ["TORCHELASTIC_RUN_ID"]
    assert pet.stopped_code() == 0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        port: int = found.getsockname()[1]
    return port
