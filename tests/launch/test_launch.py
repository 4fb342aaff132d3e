"""`launch`: what it renders is valid, and runs by torchrun."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_xielu.errors import UserError
from megatron_xielu.launch import docker, kubernetes, local, slurm
from megatron_xielu.launch.job import Job, name_of, wants_one_connection
from megatron_xielu.recipes import load_recipe
from tests.conftest import SMALL
from tests.ranks import ROOT, environment
from tests.training.test_pretrain import latest, metrics, ranks_of, run, stop_after

TWO_RANKS = "parallel.tensor_model_parallel_size=2"
# long enough for something to happen in its middle
STEPS, SAVE_INTERVAL = 150, 10
LONG = (
    f"training.train_iters={STEPS}",
    "schedule.lr_wsd_decay_iters=10",
    "logging.eval_interval=1000",
    f"checkpoint.save_interval={SAVE_INTERVAL}",
)
PAPER = Job(recipe="llama-3b-xielu", overrides=("data.path=/data/x y",), nodes=2, gpus_per_node=8)


def launch(target: str, run_dir: Path, data: Path, *words: str) -> list[str]:
    program = [sys.executable, "-m", "megatron_xielu", "launch", target, "tiny"]
    return [*program, "--run-dir", str(run_dir), *SMALL, TWO_RANKS, f"data.path={data}", *words]


def test_torchrun_on_one_node(data_dir: Path, tmp_path: Path) -> None:
    words = launch("local", tmp_path / "run", data_dir, "--gpus-per-node", "2")
    script = run(words).stdout
    assert "--shutdown-timeout 300" in script
    done = run([*words, "--submit"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(script)
    assert [r["step"] for r in metrics(tmp_path / "run") if r["type"] == "train"] == [1, 2, 3, 4, 5]


def test_torchrun_does_not_repeat_a_mistake(tmp_path: Path) -> None:
    words = launch("local", tmp_path / "run", tmp_path / "none", "--gpus-per-node", "2", "--submit")
    done = run(words)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == done.stderr.count(f"{tmp_path}/none") == 1
    assert "Traceback" not in done.stderr


def test_a_stopped_torchrun_has_saved(data_dir: Path, tmp_path: Path) -> None:
    words = launch("local", tmp_path / "run", data_dir, *LONG, "--gpus-per-node", "2", "--submit")
    # after a first save, whose helpers stay
    said = stop_after(words, tmp_path / "run", SAVE_INTERVAL + 1, signal.SIGTERM)
    assert re.search(r"stopped at step \d+, saved", said)
    assert "Traceback" not in said


def test_a_rank_that_keeps_dying_is_named(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = "import sys; from megatron_xielu import cli; from megatron_xielu.launch import local;"
    program += "local._RESTARTS = 0; sys.exit(cli.main(sys.argv[1:]))"
    words = launch("local", folder, data_dir, *LONG, "--gpus-per-node", "2", "--submit")
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words[3:]],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while len(metrics(folder)) < 3:
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert said.splitlines()[-1] == (
        "error: rank 1 was ended by SIGKILL (the kernel does this when memory runs out); its log "
        f"is {folder}/logs/rank_00001.log. torchrun had started it again 0 times. The run goes on "
        "from its last save."
    )
    assert "Traceback" not in said


def test_what_is_printed_for_torchrun_can_be_run(data_dir: Path, tmp_path: Path) -> None:
    script = run(launch("local", tmp_path / "run", data_dir, "--gpus-per-node", "2")).stdout
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    # every option is torchrun's
    parsed = script.replace("exec ", "exec echo ").replace("-m megatron_xielu pretrain", "--help")
    parsed = parsed.replace("exec echo", "exec")
    assert subprocess.run(["sh"], input=parsed, text=True, capture_output=True).returncode == 0


def test_the_scripts_of_a_machine_are_sound(tmp_path: Path) -> None:
    head = own_address()
    check_shell(local.render(replace(PAPER, fabric="roce"), head))
    check_shell(docker.render(PAPER, image="image:1", head=head, volumes=[f"{tmp_path}:/x:ro"]))


def test_several_nodes_meet_at_an_address_that_all_see() -> None:
    with pytest.raises(UserError, match=r"--nodes 2 needs a meeting point: give --head HOST"):
        local.render(PAPER, None)
    with pytest.raises(UserError, match=r"--head localhost is \S+ here, which every node takes"):
        local.render(PAPER, "localhost")
    with pytest.raises(UserError, match=r"--head node0:x must be HOST or HOST:PORT"):
        local.render(PAPER, "node0:x")
    with pytest.raises(UserError, match=r"--head nowhere.invalid cannot be reached from here: "):
        local.render(PAPER, "nowhere.invalid")


def test_nodes_that_do_not_come_are_missed_in_a_users_words(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
    program = "import sys; from megatron_xielu import cli; from megatron_xielu.launch import local;"
    program += "local._JOIN_SECONDS = 1; sys.exit(cli.main(sys.argv[1:]))"
    words = ["launch", "local", "tiny", "--run-dir", str(tmp_path / "run"), "--nodes", "2"]
    words += ["--gpus-per-node", "1", "--head", f"{own_address()}:{port}", "--submit"]
    done = run([sys.executable, "-c", program, *words])
    assert done.returncode == 1
    assert "error: not all of 2 nodes came within 1 s. Give the same command on" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        head = f"{own_address()}:{taken.getsockname()[1]}"
        words = launch("local", tmp_path / "run", tmp_path, "--gpus-per-node", "1", "--submit")
        done = run([*words, "--nodes", "2", "--head", head])
    assert done.returncode == 2
    assert f"error: the port of --head {head} is taken on this machine" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_commands_of_the_document(tmp_path: Path) -> None:
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    lines = re.findall(r"^megatron-xielu (launch .*)$", text, re.MULTILINE)
    assert {line.split()[1] for line in lines} == {"local", "docker", "slurm", "k8s"}
    for line in lines:
        words = line.replace("--head node0", f"--head {own_address()}").split()
        done = run([sys.executable, "-m", "megatron_xielu", *words], cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def own_address() -> str:
    """Another one than 127.x, by which nodes could meet."""
    found = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    if not found:
        pytest.skip("this machine has no address but 127.0.0.1")
    return found[0]


def test_a_recipe_that_does_not_fit_is_refused_before_a_scheduler_sees_it() -> None:
    job = Job(recipe="llama-3b-xielu", nodes=1, gpus_per_node=1)
    with pytest.raises(UserError, match="tensor_model_parallel_size"):
        slurm.render(job, time="1:00:00")


def test_one_connection_is_for_tensor_parallelism_without_fsdp() -> None:
    one, two = load_recipe("llama-1.1b-xielu"), load_recipe("llama-3b-xielu")
    assert not wants_one_connection(one, [])
    assert wants_one_connection(one, ["--context-parallel-size", "2"])
    # Megatron's own flag wins over the recipe
    assert wants_one_connection(one, ["--tensor-model-parallel-size=2"])
    assert wants_one_connection(two, [])
    assert not wants_one_connection(two, ["--use-megatron-fsdp"])


def test_the_name_is_that_of_the_run_folder() -> None:
    assert name_of(Path("runs/Llama_3B.a")) == "llama-3b-a"
    with pytest.raises(UserError, match=r"'___' names the job, so it needs 1 to 50 letters"):
        name_of(Path("runs/___"))


def check_shell(script: str) -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run([shellcheck, "-"], input=script, text=True, capture_output=True)
    assert found.returncode == 0, found.stdout


def test_what_is_not_here_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="sbatch is not here: run this on a login node"):
        slurm.submit("")
    with pytest.raises(UserError, match="kubectl is not here: keep the manifest"):
        kubernetes.submit("")
    with pytest.raises(UserError, match="docker is not here: keep the script"):
        docker.submit("")


def check_whole(folder: Path, most_repeated: int, num_steps: int = STEPS) -> None:
    """Every step was trained, and each restart went on from the last save.

    Args:
        most_repeated: steps that a restart may train again.
    """
    steps = [r["step"] for r in metrics(folder) if r["type"] == "train"]
    assert steps == list(range(1, num_steps + 1))
    assert latest(folder) == num_steps
    for repeated, saved in restarts(folder):
        assert repeated <= most_repeated
        assert saved % SAVE_INTERVAL == 0


def restarts(folder: Path) -> list[tuple[int, int]]:
    """Of each that trained steps again: how many, and after which one, by what the run printed."""
    note = r"dropped (\d+) records of an earlier attempt at the steps after (\d+)"
    printed = "".join(path.read_text() for path in sorted(folder.parent.glob("*.out")))
    return [(int(repeated), int(saved)) for repeated, saved in re.findall(note, printed)]
