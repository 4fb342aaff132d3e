"""Faults planted in the real command: noticed by all ranks, named, and nothing bad is saved."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_xielu.analysis.plot import _read_curves
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from tests.conftest import SMALL
from tests.ranks import environment

TP = "parallel.tensor_model_parallel_size=2"
PP = "parallel.pipeline_model_parallel_size=2"
PLAIN = "parallel.use_distributed_optimizer=false"
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")


def pretrain(
    run_dir: Path,
    data: Path,
    fault: str,
    *overrides: str,
    nproc: int = 2,
    flags: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """The command with a planted fault; see tests/mcore/faulty_spec.py."""
    words = [sys.executable, "-m", "megatron_xielu", "pretrain", "--recipe", "tiny"]
    words += ["--run-dir", str(run_dir), "--nproc", str(nproc), *SMALL, f"data.path={data}"]
    words += ["logging.eval_iters=0", *overrides, "--", *flags]
    words += ["--spec", "tests.mcore.faulty_spec", "spec"]
    return subprocess.run(
        words, env=environment(FAULT=fault), capture_output=True, text=True, timeout=300
    )


def stopped(done: subprocess.CompletedProcess[str], run_dir: Path, saved: list[int]) -> str:
    """Checks that the run failed once and cleanly; returns what it told the user."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    steps = sorted((run_dir / "checkpoints").glob("iter_*"))
    assert [int(step.name.removeprefix("iter_")) for step in steps] == saved
    if saved:
        assert f"step {saved[-1]} is saved whole" in done.stderr
    # each rank saw it by itself, rather than a broken connection
    logs = sorted((run_dir / "logs").iterdir())
    assert all("errors.UnhealthyRun: step" in log.read_text() for log in logs)
    return done.stderr


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["type"] == kind]


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(run_dir / "checkpoints" / f"iter_{step:07d}")
    return {key: reader.read(key) for key in sorted(reader.keys()) if "rng" not in key}


def test_an_activation_that_is_nan_on_one_rank(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = pretrain(folder, data_dir, "forward:3:4:1", TP, "checkpoint.save_interval=2")
    message = stopped(done, folder, [2])
    assert "step 4: loss nan, gradient norm nan; the optimizer did not take" in message
    place = "first not finite: the output of layer 3, mlp.activation_func (micro-batch 1 of rank 1)"
    assert place in message
    assert [record["step"] for record in records(folder, "train")] == [1, 2, 3]


def test_a_gradient_that_is_nan_on_a_later_stage(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = "backward:3:2:1"
    done = pretrain(folder, data_dir, fault, PP, PLAIN, "optimizer.clip_grad=0")
    message = stopped(done, folder, [])
    # the loss itself was finite, and the layer's number counts the first stage's two
    assert "step 2: loss 6." in message
    assert "the gradient that leaves layer 3, mlp.linear_fc2 (micro-batch 1 of rank 1)" in message


def test_a_skipped_step_changes_nothing_and_the_run_goes_on(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["checkpoint.save_interval=1", "health.on_nonfinite=skip", "health.every=2"]
    done = pretrain(folder, data_dir, "forward:2:3:1", *settings, flags=OVERLAP)
    assert done.returncode == 0, done.stderr
    before, after, last = (tensors(folder, step) for step in (2, 3, 4))
    assert any("exp_avg_sq" in key for key in before)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert [
        key for key in before if "word_embeddings" in key and torch.equal(before[key], last[key])
    ] == []
    (skipped,) = records(folder, "skipped")
    assert (skipped["step"], skipped["loss"], skipped["grad_norm"]) == (3, None, None)
    assert (
        "the output of layer 2, mlp.activation_func (micro-batch 1 of rank 1)" in skipped["where"]
    )
    assert done.stdout.count("skipped: loss nan, grad norm nan") == 1
    assert [record["step"] for record in records(folder, "train")] == [1, 2, 4, 5]
    assert all(None not in (r["loss"], r["grad_norm"]) for r in records(folder, "train"))
    assert len(_read_curves(folder, "run").loss) == 4


def test_a_fault_that_does_not_come_again_is_laid_to_the_hardware(
    data_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = pretrain(folder, data_dir, "once:2:2:0", nproc=1)
    message = stopped(done, folder, [])
    assert "computed again, the same data gives finite numbers: suspect the hardware" in message
    assert "the loss was not finite on ranks: 0" in message


def test_steps_are_skipped_up_to_a_limit(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["health.on_nonfinite=skip", "health.max_skipped_steps=2", "logging.log_interval=4"]
    # as soon as the weights have moved by this rate, nothing is finite any more
    done = pretrain(folder, data_dir, "none:0:0:0", *settings, "optimizer.lr=1e30", nproc=1)
    message = stopped(done, folder, [])
    first, second = (record["step"] for record in records(folder, "skipped"))
    assert second == first + 1
    assert f"step {first + 2}: " in message
    assert "More than 2 steps in a row (health.max_skipped_steps)" in message


def test_a_flipped_bit_of_one_replica(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = pretrain(folder, data_dir, "flip:2:4:1", PLAIN, "checkpoint.save_interval=2")
    message = stopped(done, folder, [2])
    assert "step 4: parameters that must be the same on several ranks are not" in message
    assert "at step 2 all were equal" in message
    # the flipped weight changes gradients, which are averaged: no other copy differs
    assert "layer 2, pre_mlp_layernorm.weight: ranks 0-1 differ (data-parallel copies)" in message
    assert message.count(" differ (") == 1


def test_alphas_that_drift_apart(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = pretrain(folder, data_dir, "no-sum:0:0:0", TP, "health.every=2")
    message = stopped(done, folder, [])
    assert "step 2: parameters that must be the same" in message
    assert "layer 1, mlp.activation_func.alpha_p: ranks 0-1 differ (tensor-parallel" in message
