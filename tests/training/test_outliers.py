"""The watch of FP8's outliers in the real command, with FP8 emulated and an outlier planted."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from tests.conftest import SMALL
from tests.ranks import environment

EMULATED = ("fp8.recipe=tensorwise", "fp8.emulate=true", "logging.eval_iters=0")


def pretrain(
    run_dir: Path, data: Path, *overrides: str, fault: str = "outlier:3:0:0", nproc: int = 1
) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "megatron_xielu", "pretrain", "--recipe", "tiny"]
    words += ["--run-dir", str(run_dir), "--nproc", str(nproc), *SMALL, f"data.path={data}"]
    words += [*EMULATED, *overrides, "--", "--spec", "tests.mcore.faulty_spec", "spec"]
    return subprocess.run(
        words, env=environment(FAULT=fault), capture_output=True, text=True, timeout=300
    )


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["type"] == kind]


def losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run_dir, "train")}


def scalars(run_dir: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_a_warning_names_the_layer_and_the_run_goes_on(data_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pipeline = "parallel.pipeline_model_parallel_size=2"
    keys = ("fp8.watch_interval=2", "fp8.max_kurtosis=50", pipeline)
    done = pretrain(run, data_dir, *keys, nproc=2)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "FP8 outlier" in line]
    print(*lines, sep="\n")
    # two quantities at each of two looks
    assert len(lines) == 4
    assert all("layer 3: " in line for line in lines)
    assert any("> 0.01 (fp8.max_flushed)" in line for line in lines)
    assert any("> 50 (fp8.max_kurtosis)" in line for line in lines)
    look = records(run, "fp8")[0]
    assert look["flushed"][2] > 0.5 > 0.01 > max(look["flushed"][:2] + look["flushed"][3:])
    assert look["amax"][2] > 1e3 > max(look["amax"][:2])
    assert len(losses(run)) == 5


def test_a_stop_ends_all_ranks_and_names_the_remedy(data_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = ("fp8.watch_interval=3", "fp8.on_outlier=stop", "checkpoint.save_interval=2")
    done = pretrain(run, data_dir, *keys, nproc=2)
    print(done.stderr)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "step 3: FP8 loses too much of xIELU's output" in done.stderr
    assert "layer 3: flushed" in done.stderr
    assert "--allow-changed fp8.recipe" in done.stderr
    assert "step 2 is saved whole" in done.stderr
    logs = sorted((run / "logs").iterdir())
    assert all("errors.UnhealthyRun: step 3" in log.read_text() for log in logs)


@pytest.mark.slow
def test_a_layer_goes_on_in_bf16_and_a_resumed_run_too(data_dir: Path, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    keys = (
        "fp8.watch_interval=2",
        "fp8.on_outlier=bf16_layer",
        "checkpoint.save_interval=3",
        "training.train_iters=6",
    )
    done = pretrain(straight, data_dir, *keys, nproc=2)
    assert done.returncode == 0, done.stderr
    assert "step 2: fc2 goes on in bf16 in layer 3 (fp8.on_outlier=bf16_layer)" in done.stdout
    kept = json.loads((straight / "fp8_bf16_layers.json").read_text())
    assert kept == [{"layer": 3, "step": 2}]
    looks = {look["step"]: look for look in records(straight, "fp8")}
    assert looks[2]["flushed"][2] > 0.5
    assert looks[4]["flushed"][2] is looks[4]["amax"][2] is None
    assert None not in looks[4]["kurtosis"]
    # in FP8 to the end it is another run
    warned = tmp_path / "warned"
    assert pretrain(warned, data_dir, *keys, "fp8.on_outlier=warn", nproc=2).returncode == 0
    assert losses(warned)[2] == losses(straight)[2]
    assert losses(warned)[3] != losses(straight)[3]

    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints/iter_0000006")
    (resumed / "checkpoints/latest_checkpointed_iteration.txt").write_text("3")
    # another rule for the future leaves it as it is
    done = pretrain(resumed, data_dir, *keys, "fp8.on_outlier=warn", nproc=2)
    assert done.returncode == 0, done.stderr
    assert "fc2 stays in bf16 in layer 3" in done.stdout
    assert losses(resumed) == losses(straight)
    readers = [TorchDistReader(run / "checkpoints/iter_0000006") for run in (straight, resumed)]
    keys = readers[0].keys()
    assert all(readers[0].read(key).equal(readers[1].read(key)) for key in keys)


@pytest.mark.slow
def test_from_fp8_to_bf16_and_back_without_outliers(data_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # the fault is in a layer that the model does not have
    plain = "outlier:9:0:0"

    def until(steps: int, *words: str) -> str:
        length = (f"training.train_iters={steps}", "--allow-changed", "training.train_iters")
        done = pretrain(run, data_dir, *length, "fp8.watch_interval=2", *words, fault=plain)
        assert done.returncode == 0, done.stderr
        assert "FP8 outlier" not in done.stdout
        return done.stdout

    until(4)
    off = until(6, "fp8.recipe=off", "--allow-changed", "fp8.recipe")
    assert "fp8.recipe: 'tensorwise' -> 'off'" in off
    assert "FP8 is emulated" not in off
    back = until(8, "--allow-changed", "fp8.recipe")
    assert "fp8.recipe: 'off' -> 'tensorwise'" in back
    assert "FP8 is emulated (tensorwise" in back
    assert sorted(losses(run)) == list(range(1, 9))

    looks = records(run, "fp8")
    assert [look["step"] for look in looks] == [2, 4, 8]
    for look in looks:
        print({name: look[name] for name in ("amax", "saturated", "flushed", "kurtosis")})
        assert look["saturated"] == [0.0] * 4
        assert max(look["flushed"]) < 0.01
        # nearly normal numbers
        assert all(2.5 < value < 4 for value in look["kurtosis"])
        assert all(math.isclose(value, 0.8, rel_tol=0.05) for value in look["alpha_p"])
    assert "fp8/flushed/layer_2" in scalars(run)
