"""`launch slurm`: what the batch script says, what it does after its ranks, and a real Slurm."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_xielu.checkpoint.store import LATEST
from megatron_xielu.errors import UserError
from megatron_xielu.launch import slurm
from megatron_xielu.training import run_dir
from tests.launch.conftest import Cluster, arguments_of, cluster_states
from tests.launch.test_launch import (
    LONG,
    PAPER,
    SAVE_INTERVAL,
    STEPS,
    check_shell,
    check_whole,
    launch,
)
from tests.ranks import ROOT, environment
from tests.training.test_pretrain import latest, metrics, run


def test_the_batch_script_is_sound() -> None:
    given: dict[str, Any] = {"options": ["partition=gpu"], "setup": ["module load cuda"]}
    script = slurm.render(PAPER, time="1-00:00:00", image="repo#image:1", **given)
    # Slurm's notice comes before the ranks' time to save, by its own margin
    assert "#SBATCH --signal=B:USR1@360" in script
    # what is given as a relative path is found
    assert f"#SBATCH --chdir={shlex.quote(str(Path.cwd()))}\n" in script
    check_shell(script)


@pytest.mark.parametrize("time", ["10", "10:00", "0:10:00", "1-0", "1-0:0", "2-12:30:00"])
def test_times_of_slurm(time: str) -> None:
    assert f"#SBATCH --time={time}\n" in slurm.render(PAPER, time=time)


@pytest.mark.parametrize("time", ["banana", "1:2:3:4", "1-", "-1", "1-2-3", "24h", "1.5", ""])
def test_what_is_no_time_of_slurm(time: str) -> None:
    with pytest.raises(UserError, match=f"--time {time} is no time of Slurm's: give MINUTES, "):
        slurm.render(PAPER, time=time)


@pytest.mark.parametrize("time", ["00:05:00", "0", "9:59", "0-0:9:59"])
def test_a_time_in_which_nothing_is_trained(time: str) -> None:
    message = rf"--time {time} is \d+ s, in which .* Give --time 10 \(minutes\) or more\."
    with pytest.raises(UserError, match=message):
        slurm.render(PAPER, time=time)
    with pytest.raises(UserError, match=r"Give --time 65 \(minutes\) or more"):
        slurm.render(replace(PAPER, stop_seconds=3600), time="1:00:00")


def directives(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.+)$", script, re.MULTILINE)


def test_a_sites_own_options_and_its_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.sh").touch()
    options = ["partition=gpu", "--account=a1", "no-kill", "comment=it's #1"]
    setup = ["module load cuda && ulimit -l unlimited", "site.sh"]
    script = slurm.render(PAPER, time="1:00:00", options=options, setup=setup)
    # behind the script's own: the last of two counts
    assert directives(script)[-4:] == [
        *("--partition=gpu", "--account=a1", "--no-kill"),
        f"--comment={shlex.quote(options[-1].partition('=')[2])}",
    ]
    before, _, _ = script.partition("\nsrun ")
    assert f"\n{setup[0]}\n. {tmp_path}/site.sh\n" in before


@pytest.mark.parametrize("option", ["", "-p gpu", "partition gpu", "x=1\n#SBATCH --y", "mem="])
def test_what_is_no_option_of_sbatch(option: str) -> None:
    with pytest.raises(UserError, match="must be a long option of sbatch's, as in --sbatch part"):
        slurm.render(PAPER, time="1:00:00", options=[option])


def test_options_that_the_script_sets_itself() -> None:
    names = [
        re.split(r"[= ]", each)[0].removeprefix("--")
        for each in directives(slurm.render(PAPER, time="1:00:00"))
    ]
    # a site may know better
    for name in {*names, "no-requeue", "array"} - {"gpus-per-node", "exclusive", "mem", "output"}:
        with pytest.raises(UserError, match=f"--sbatch {name}=1: the script sets --{name} itself"):
            slurm.render(PAPER, time="1:00:00", options=[f"{name}=1"])


def run_script(folder: Path, code: int, during: str = "", **programs: str) -> tuple[int, list[str]]:
    """Exit code of the batch script, and which of Slurm's programs it called after the ranks.

    Args:
        code: of the ranks.
        during: what happens while they run; $PPID is the script.
        programs: other programs' bodies, by name.
    """
    bodies = {
        "srun": f"trap : USR1\n{during}\nexit {code}",
        "sbatch": "",
        "scontrol": "",
        "sleep": "",
    }
    for name, body in (bodies | programs).items():
        call = f'echo "{name} $1" >>{shlex.quote(str(folder))}/calls'
        (folder / name).write_text(f"#!/bin/bash\n{call}\n{body}\n")
        (folder / name).chmod(0o755)
    job = replace(PAPER, run_dir=folder / "run")
    (folder / "script").write_text(slurm.render(job, time="1:00:00"))
    done = subprocess.run(
        ["bash", str(folder / "script")],
        env=environment(PATH=f"{folder}{os.pathsep}{os.environ['PATH']}", SLURM_JOB_ID=7),
        timeout=60,
    )
    calls = (folder / "calls").read_text().splitlines()
    (folder / "calls").unlink()
    return done.returncode, [call for call in calls if call.split()[0] in ("sbatch", "scontrol")]


NOTICE = "kill -USR1 $PPID; /bin/sleep 0.2"


def save(folder: Path, step: int) -> str:
    """Shell that does what a save does."""
    tracker = folder / "run" / run_dir.CHECKPOINTS / LATEST
    return f"mkdir -p {tracker.parent}; echo {step} >{tracker}"


def test_the_chain_goes_on_only_from_something_new(tmp_path: Path) -> None:
    next_job = [f"sbatch {tmp_path / 'script'}"]
    assert run_script(tmp_path, 0, f"{NOTICE}; {save(tmp_path, 10)}") == (0, next_job)
    assert run_script(tmp_path, 0, NOTICE) == (1, [])
    # a next job that Slurm does not take is a failure
    ended = run_script(tmp_path, 0, f"{NOTICE}; {save(tmp_path, 20)}", sbatch="exit 1")
    assert ended == (1, next_job)


def test_failures_are_counted_since_the_last_save(tmp_path: Path) -> None:
    again = (3, ["scontrol requeue"])
    assert [run_script(tmp_path, 3) for _ in range(3)] == [again] * 3
    assert run_script(tmp_path, 3) == (3, [])
    # other requeues do not count, and a save begins anew
    assert [run_script(tmp_path, 3, save(tmp_path, 10)) for _ in range(3)] == [again] * 3
    assert run_script(tmp_path, 3) == (3, [])
    assert run_script(tmp_path, 2) == (2, [])


def test_a_run_that_is_over_and_one_that_was_preempted(tmp_path: Path) -> None:
    show = ["scontrol show"]
    over = "echo 'PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=None'"
    assert run_script(tmp_path, 0, scontrol=over) == (0, show)
    preempted = over.replace("None", "2026-01-01T00:00:00")
    assert run_script(tmp_path, 0, scontrol=preempted) == (0, [*show, "scontrol requeue"])


def test_pyxis_gets_the_words_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "it's $HOME `id`"
    folder.mkdir()
    monkeypatch.chdir(folder)
    script = slurm.render(PAPER, time="1:00:00", image="me@repo#image:1")
    words = arguments_of("srun", script, tmp_path / "bin")
    options = {
        name: value
        for name, _, value in (word.partition("=") for word in words)
        if name.startswith("--container-")
    }
    assert options == {
        "--container-image": "me@repo#image:1",
        "--container-mounts": f"/data/x y:/data/x y:ro,{folder}:{folder}",
        "--container-workdir": str(folder),
        # an image's value wins over the script's otherwise
        "--container-env": "CUDA_DEVICE_MAX_CONNECTIONS",
    }
    # which would wait for good under tini; what it runs sets HOME and caches
    assert "--no-container-entrypoint" in words
    entrypoint = re.search(r'^ENTRYPOINT .*"(.+)"\]', (ROOT / "Dockerfile").read_text(), re.M)
    assert entrypoint
    command = words[words.index(entrypoint[1]) :]
    run_dir = str(folder / "runs/llama-3b-xielu")
    assert command[1:] == [
        *("pretrain", "--recipe", "llama-3b-xielu"),
        *("--run-dir", run_dir, "data.path=/data/x y"),
    ]


def submitted(slurm: Cluster, folder: Path, data: Path) -> str:
    """The job's number, of a run on two nodes of one rank."""
    options = ["--nodes", "2", "--gpus-per-node", "1", "--time", "20", "--sbatch", "comment=kept"]
    script = run(launch("slurm", folder, data, *LONG, *options)).stdout
    # these nodes have no GPUs to ask for
    script = script.replace("#SBATCH --gpus-per-node=1\n", "")
    script = script.replace("%x-%j.out", f"{folder.parent}/%j.out")
    found = re.search(r"\d+", slurm.run("sbatch", text=script))
    assert found
    return found.group()


def wait_for_step(slurm: Cluster, job: str, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(r["type"] == "train" and r["step"] >= step for r in metrics(folder)):
        said = slurm.wait(job, "PENDING", "RUNNING")
        assert time.monotonic() < deadline, said
        time.sleep(0.2)


@pytest.mark.slow
def test_a_job_whose_time_is_over_is_saved_and_its_next_one_goes_on(
    slurm: Cluster, data_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submitted(slurm, folder, data_dir)
    wait_for_step(slurm, job, folder, 12)
    # as --signal=B:USR1 does, whose clock has minutes
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    begin = time.monotonic()
    slurm.wait(job, "COMPLETED")
    print(f"saved and over {time.monotonic() - begin:.1f} s after the notice")
    following = str(int(job) + 1)
    assert slurm.wait(following, "COMPLETED")["Comment"] == "kept"
    print(f"the next job had finished {time.monotonic() - begin:.1f} s after it")
    assert "its next job goes on" in (tmp_path / f"{job}.out").read_text()
    check_whole(folder, most_repeated=0)


@pytest.mark.slow
def test_a_user_stops_a_job_which_saves_and_ends_the_chain(
    slurm: Cluster, data_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submitted(slurm, folder, data_dir)
    wait_for_step(slurm, job, folder, 12)
    slurm.run("scancel", "--batch", "--signal=TERM", job)
    slurm.wait(job, "COMPLETED")
    steps = [r["step"] for r in metrics(folder) if r["type"] == "train"]
    assert latest(folder) == len(steps) < STEPS
    assert slurm.run("squeue", "--noheader") == ""


@pytest.mark.slow
def test_a_preempted_job_is_saved_and_goes_on(
    slurm: Cluster, data_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submitted(slurm, folder, data_dir)
    wait_for_step(slurm, job, folder, 12)
    begin = time.monotonic()
    urgent = ["--partition=urgent", "--nodes=2", f"--output={tmp_path}/urgent"]
    slurm.run("sbatch", *urgent, "--wrap=true")
    slurm.wait(job, "PENDING")
    print(f"saved and requeued {time.monotonic() - begin:.1f} s after the other job came")
    said = slurm.wait(job, "COMPLETED")
    assert int(said["Restarts"]) == 1
    assert "pre-empted and saved: requeued" in (tmp_path / f"{job}.out").read_text()
    check_whole(folder, most_repeated=0)


@pytest.mark.slow
def test_a_lost_node_requeues_the_job_which_goes_on(
    slurm: Cluster, data_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submitted(slurm, folder, data_dir)
    wait_for_step(slurm, job, folder, 15)
    begin = time.monotonic()
    kill_node(slurm, "n2")
    slurm.wait(job, "PENDING")
    print(f"requeued {time.monotonic() - begin:.1f} s after the kill")
    slurm.start("n2")
    slurm.wait(job, "RUNNING")
    print(f"started again {time.monotonic() - begin:.1f} s after the kill")
    said = slurm.wait(job, "COMPLETED")
    print(f"over {time.monotonic() - begin:.1f} s after the kill")
    assert int(said["Restarts"]) == 1
    check_whole(folder, most_repeated=SAVE_INTERVAL)


def kill_node(slurm: Cluster, name: str) -> None:
    """Its daemon and all that it started."""
    daemon = slurm.daemons[name]
    marks = {f"SLURMD_NODENAME={name}", f"SLURM_CONF={slurm.folder}/slurm.conf"}
    victims = [daemon.pid]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((folder / "environ").read_bytes().decode().split("\0"))
        except (OSError, UnicodeDecodeError):
            continue
        if marks <= variables:
            victims.append(int(folder.name))
    assert len(victims) > 1
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    daemon.wait()


@pytest.mark.slow
def test_a_mistake_is_not_requeued(slurm: Cluster, data_dir: Path, tmp_path: Path) -> None:
    job = submitted(slurm, tmp_path / "run", tmp_path / "no-data")
    said = slurm.wait(job, "FAILED")
    assert said["ExitCode"] == "2:0", (tmp_path / f"{job}.out").read_text()
    assert said["Restarts"] == "0"
    assert cluster_states(slurm) == ["idle", "idle"]
