"""A run that is told to stop: from any moment on, whichever process is told, it saves and ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.ranks import environment
from tests.training.test_pretrain import LONG, command, latest, metrics, ranks_of, run

# an evaluation of minutes, which no test waits for
LONG_EVALUATION = "logging.eval_iters=50000"


@contextmanager
def started(words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            for rank in ranks_of(process.pid).values():
                os.kill(rank, signal.SIGKILL)
        process.kill()


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    while not any(r["type"] == "train" and r["step"] >= step for r in metrics(run_dir)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def wait_until_listening(pid: int, number: int) -> None:
    """Until the process has a handler of its own for a signal."""
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE).group(1), 16)  # type: ignore[union-attr]
        if caught >> (number - 1) & 1:
            return
        time.sleep(0.01)


def end_of(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    return output


def as_torchrun(words: Sequence[str]) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*launcher, *words[1:]]


@pytest.fixture(scope="module")
def finished(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(command(folder, data_dir)).returncode == 0
    return folder


def test_an_evaluation_before_the_first_step(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(command(folder, data_dir, LONG_EVALUATION)) as process:
        # made when everything is built
        while not (folder / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        output = end_of(process)
    assert "stopped before the first step, nothing was saved yet" in output
    assert metrics(folder) == []
    assert list((folder / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("where", ["between steps", "after the last step"])
def test_an_evaluation_is_left(where: str, finished: Path, data_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    # a resumed run does not evaluate before its first step
    words = command(folder, data_dir, LONG_EVALUATION, "checkpoint.save_interval=6")
    words += ["--allow-changed", "training.train_iters"]
    if where == "between steps":
        # other pipeline stages wait for each other, so that all must leave at the same batch
        words += ["parallel.pipeline_model_parallel_size=2", "logging.eval_interval=7"]
        words += ["training.train_iters=9"]
    else:
        words += ["training.train_iters=7", "logging.eval_interval=1000"]
    with started(words) as process:
        wait_for_step(process, folder, 7)
        process.send_signal(signal.SIGTERM)
        output = end_of(process)
    print(output[output.index("a stop needs") :])
    found = re.search(r"at step 7, saved, ([\d.]+) s after the signal \(bound ([\d.]+) s", output)
    assert found
    assert latest(folder) == 7
    # once, after the save of step 6
    assert len(re.findall(r"a stop needs up to [\d.]+ s", output)) == 1
    # a loss of a part of the held-out text is no validation loss
    assert not any(r["type"] == "valid" and r["step"] == 7 for r in metrics(folder))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda n: n.name)
def test_every_process_of_a_rank_is_told(
    number: signal.Signals, data_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with started(command(folder, data_dir, *LONG, "checkpoint.save_interval=2")) as process:
        # after a save, whose helpers stay
        wait_for_step(process, folder, 4)
        (rank, *_) = ranks_of(process.pid).values()
        # srun signals a whole step, torchrun a rank's process group
        for each in [*psutil.Process(rank).children(recursive=True), psutil.Process(rank)]:
            each.send_signal(number)
        output = end_of(process)
    step = int(re.search(r"stopped at step (\d+), saved", output).group(1))  # type: ignore[union-attr]
    assert 4 <= step == latest(folder) < 40


def test_one_rank_of_torchruns_is_told(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(as_torchrun(command(folder, data_dir, *LONG))) as process:
        wait_for_step(process, folder, 2)
        # not the rank that reports
        os.kill(ranks_of(process.pid)[0], signal.SIGUSR1)
        output = end_of(process)
    step = int(re.search(r"stopped at step (\d+), saved, [\d.]+ s after", output).group(1))  # type: ignore[union-attr]
    assert 2 <= step == latest(folder) < 40


def test_one_rank_of_torchruns_is_told_before_training(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(as_torchrun(command(folder, data_dir, *LONG))) as process:
        while len(ranks := ranks_of(process.pid)) < 2:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        wait_until_listening(ranks[0], signal.SIGUSR1)
        os.kill(ranks[0], signal.SIGUSR1)
        output = end_of(process)
    assert "stopped before the first step, nothing was saved yet" in output
    assert metrics(folder) == []
    assert list((folder / "checkpoints").iterdir()) == []


def test_the_launcher_is_told_before_it_has_ranks(data_dir: Path, tmp_path: Path) -> None:
    with started(command(tmp_path / "run", data_dir)) as process:
        wait_until_listening(process.pid, signal.SIGUSR1)
        process.send_signal(signal.SIGUSR1)
        output = end_of(process)
    assert re.search("stopped before training began|stopping after this step", output)
    assert metrics(tmp_path / "run") == []
