"""The command as a user runs it: real ranks, signals, resumption, and the mistakes it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from tests.conftest import SMALL
from tests.ranks import environment

STEPS = 40
LONG = (
    # forked workers inherit signal handlers, which must not keep a stopped run from ending
    "data.num_workers=1",
    f"training.train_iters={STEPS}",
    "schedule.lr_wsd_decay_iters=10",
    "logging.eval_interval=10",
    "checkpoint.save_interval=1000",
    "parallel.tensor_model_parallel_size=2",
)


def command(run_dir: Path, data: Path, *overrides: str, flags: Sequence[str] = ()) -> list[str]:
    program = [sys.executable, "-m", "megatron_xielu", "pretrain", "--recipe", "tiny"]
    given = [*SMALL, f"data.path={data}", *overrides]
    return [*program, "--run-dir", str(run_dir), *given, *(["--", *flags] if flags else [])]


def run(words: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=environment(), capture_output=True, text=True, timeout=300, cwd=cwd
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def saved(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, the optimizer's included."""
    reader = TorchDistReader(run_dir / "checkpoints" / f"iter_{step:07d}")
    return {key: reader.read(key) for key in sorted(reader.keys())}


def latest(run_dir: Path) -> int:
    return int((run_dir / "checkpoints/latest_checkpointed_iteration.txt").read_text())


def stop_after(words: Sequence[str], run_dir: Path, step: int, number: int) -> str:
    """Start the command, send it a signal once it has reported `step`; returns its output."""
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        while not any(r["step"] >= step for r in metrics(run_dir) if r["type"] == "train"):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def test_a_stopped_run_goes_on_to_the_same_bits(data_dir: Path, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    done = run(command(straight, data_dir, *LONG))
    assert done.returncode == 0, done.stderr

    words = command(stopped, data_dir, *LONG)
    for number, step in ((signal.SIGTERM, 4), (signal.SIGINT, 14)):
        output = stop_after(words, stopped, step, number)
        assert "stopping after this step" in output
        at = int(re.search(r"stopped at step (\d+), saved", output).group(1))  # type: ignore[union-attr]
        assert step <= at == latest(stopped) < STEPS
    done = run(words)
    assert done.returncode == 0, done.stderr

    expected, got = saved(straight, STEPS), saved(stopped, STEPS)
    assert any("exp_avg_sq" in key for key in expected)
    assert any("alpha_p" in key for key in expected)
    assert expected.keys() == got.keys()
    different = [key for key in expected if not torch.equal(expected[key], got[key])]
    print(f"{len(expected)} tensors, optimizer included: {len(different)} differ")
    assert not different

    kept = ("type", "step", "loss", "grad_norm", "lr", "alpha_p", "alpha_n")
    rows = [[{k: r.get(k) for k in kept} for r in metrics(d)] for d in (straight, stopped)]
    assert [r["step"] for r in rows[0] if r["type"] == "train"] == list(range(1, STEPS + 1))
    assert rows[0] == rows[1]


def test_what_a_run_leaves_and_shows(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run(command(folder, data_dir, "parallel.pipeline_model_parallel_size=2"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("xIELU by cpu (fused kernel for cpu tensors of torch.float32)") == 1
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    kept = {
        "data.sha256",
        "cache",
        "checkpoints",
        "logs",
        "megatron_flags.txt",
        "metrics.jsonl",
        "recipe.yaml",
    }
    assert names == kept | {"tensorboard"}
    assert sorted(path.name for path in (folder / "logs").iterdir()) == [
        "rank_00000.log",
        "rank_00001.log",
    ]
    lines = [line for line in done.stdout.splitlines() if re.match(r" +\d/5 ", line)]
    assert [line.split()[0] for line in lines] == ["0/5", "1/5", "2/5", "3/5", "4/5", "5/5", "5/5"]
    records = [record for record in metrics(folder) if record["type"] == "train"]
    # the layers of both pipeline stages
    assert all(len(r["alpha_p"]) == len(r["alpha_n"]) == 4 for r in records)
    assert all(0.7 < value < 0.9 for r in records for value in r["alpha_p"] + r["alpha_n"])
    assert len(set(records[-1]["alpha_p"])) == 4

    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    layers = {f"xielu/alpha_{sign}/layer_{layer}" for sign in "pn" for layer in range(4)}
    assert layers | {"lm loss", "learning-rate", "grad-norm", "throughput"} <= tags
    shown = [event.value for event in board.Scalars("xielu/alpha_n/layer_3")]
    assert shown == pytest.approx([record["alpha_n"][3] for record in records])
    assert [event.step for event in board.Scalars("lm loss")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "kind", [pytest.param("plain optimizer", marks=pytest.mark.slow), "bf16, other layout"]
)
def test_resumption_of_other_optimizers_and_layouts(
    kind: str, data_dir: Path, tmp_path: Path
) -> None:
    if kind == "plain optimizer":
        first = second = ["parallel.use_distributed_optimizer=false"]
    else:
        first = ["training.precision=bf16", "parallel.tensor_model_parallel_size=2"]
        second = ["training.precision=bf16", "parallel.pipeline_model_parallel_size=2"]
    # a constant rate, so that the first half does not depend on the run's length
    constant = ["schedule.lr_wsd_decay_iters=0", "checkpoint.save_interval=3"]
    constant.append("training.train_iters=6")
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    done = run(command(straight, data_dir, *constant, *first))
    assert done.returncode == 0, done.stderr
    done = run(command(cut, data_dir, *constant, *first, flags=["--exit-interval", "3"]))
    assert done.returncode == 0, done.stderr
    assert latest(cut) == 3
    done = run(command(cut, data_dir, *constant, *second))
    assert done.returncode == 0, done.stderr
    losses = [[r["loss"] for r in metrics(f) if r["type"] == "train"] for f in (straight, cut)]
    off = max(abs(a - b) for a, b in zip(*losses, strict=True))
    print(f"{kind}: largest loss difference {off:.2e}")
    if kind == "plain optimizer":
        assert losses[0] == losses[1]
    else:
        # bf16 weights and other sums; a lost optimizer state is off by hundredths
        assert losses[1] == pytest.approx(losses[0], abs=2e-3)


def test_the_optimizer_of_a_run_cannot_be_exchanged(finished: Path, data_dir: Path) -> None:
    words = command(finished, data_dir, "parallel.use_distributed_optimizer=false")
    assert "parallel.use_distributed_optimizer: true -> false" in refused(words)


def test_torchrun_joins_the_same_path(data_dir: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    words = command(here, data_dir, "parallel.tensor_model_parallel_size=2")
    assert run(words).returncode == 0
    words[words.index(str(here))] = str(there)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher += ["-m", "megatron_xielu", *words[3:], "parallel.tensor_model_parallel_size=2"]
    done = run(launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("xIELU by cpu") == 1
    first, second = ([r.get("loss") for r in metrics(folder)] for folder in (here, there))
    assert first == second


def test_flags_after_the_separator_win(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run(command(folder, data_dir, flags=["--train-iters", "2", "--log-interval", "2"]))
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in metrics(folder) if r["type"] == "train"] == [2]
    assert re.search(r"^ +2/2 +100", done.stdout, re.MULTILINE)
    message = refused(command(tmp_path / "typo", data_dir, flags=["--train-iter", "2"]))
    assert "Megatron refuses its arguments" in message
    assert "--train-iter" in message


def test_the_alphas_own_learning_rate(data_dir: Path, tmp_path: Path) -> None:
    moves = []
    for multiplier in ("1", "10"):
        folder = tmp_path / multiplier
        done = run(command(folder, data_dir, f"xielu.lr_mult={multiplier}"))
        assert done.returncode == 0, done.stderr
        start, *_, end = (r["alpha_p"] for r in metrics(folder) if r["type"] == "train")
        moves.append(max(abs(b - a) for a, b in zip(start, end, strict=True)))
    print(f"largest move of a_p: {moves[0]:.5f}, with ten times the rate {moves[1]:.5f}")
    assert moves[1] > 5 * moves[0]


def test_fp8_is_emulated_without_a_gpu(data_dir: Path, tmp_path: Path) -> None:
    losses = {}
    for name in ("off", "blockwise"):
        folder = tmp_path / name
        done = run(command(folder, data_dir, f"fp8.recipe={name}", "fp8.emulate=true"))
        assert done.returncode == 0, done.stderr
        assert ("FP8 is emulated (blockwise, e4m3)" in done.stdout) == (name == "blockwise")
        losses[name] = [r["loss"] for r in metrics(folder) if r["type"] == "train"]
    print(losses)
    # a product's relative error is about that of e4m3, 2^-4, and the loss's far below
    for plain, emulated in zip(*losses.values(), strict=True):
        assert 0 < abs(plain - emulated) < 2**-4 * plain


@pytest.mark.te
def test_a_machine_with_transformer_engine_and_no_gpu(data_dir: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("transformer_engine") is None or torch.cuda.is_available():
        pytest.skip("needs TransformerEngine and no GPU")
    done = run(command(tmp_path / "run", data_dir, "parallel.tensor_model_parallel_size=2"))
    assert done.returncode == 0, done.stderr
    wanted = "model.transformer_impl=transformer_engine"
    message = refused(command(tmp_path / "te", data_dir, wanted))
    assert f"{wanted} cannot run here: there is no GPU" in message


# what a user can get wrong: nothing starts, exit code 2, and no traceback


def refused(words: Sequence[str]) -> str:
    done = run(words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


@pytest.fixture
def own_data(data_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_dir, tmp_path / "data"))


def test_recipe_mistakes_are_reported_together(data_dir: Path, tmp_path: Path) -> None:
    words = command(tmp_path / "run", data_dir)
    typos = ["model.num_layer=4", "training.seed=yes"]
    message = refused([*words, *typos])
    assert "model.num_layer: unknown key; did you mean model.num_layers?" in message
    assert "training.seed: expected an integer, got true" in message
    mistakes = ["parallel.tensor_model_parallel_size=3", "training.global_batch_size=9"]
    message = refused([*words, *mistakes])
    assert "parallel.tensor_model_parallel_size=3" in message
    assert "training.global_batch_size=9" in message
    assert not (tmp_path / "run").exists()


def test_an_activation_kernel_that_this_machine_has_not(data_dir: Path, tmp_path: Path) -> None:
    message = refused(command(tmp_path / "run", data_dir, "xielu.impl=triton"))
    assert "xielu.impl=triton cannot be used" in message
    assert "Triton computes CUDA tensors" in message
    assert not (tmp_path / "run").exists()


def test_fp8_on_a_machine_without_a_gpu(data_dir: Path, tmp_path: Path) -> None:
    for dry_run in ([], ["--dry-run"]):
        words = [*command(tmp_path / "run", data_dir, "fp8.recipe=tensorwise"), *dry_run]
        assert refused(words) == (
            "error: fp8.recipe=tensorwise cannot run here: there is no GPU. Set fp8.recipe=off, or "
            "fp8.emulate=true for its numbers at a CPU's speed; --dry-run --for-gpu makes a plan "
            "for GPUs on any machine.\n"
        )
    assert not (tmp_path / "run").exists()


def test_missing_and_truncated_data(own_data: Path, tmp_path: Path) -> None:
    message = refused(command(tmp_path / "run", tmp_path / "nowhere"))
    assert f"no data folder at {tmp_path / 'nowhere'}" in message
    binary = own_data / "train.bin"
    binary.write_bytes(binary.read_bytes()[:-100])
    message = refused(command(tmp_path / "run", own_data))
    assert str(binary) in message
    assert "truncated" in message
    (own_data / "train.idx").unlink()
    assert "train.idx" in refused(command(tmp_path / "run", own_data))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_does_not_fit(own_data: Path, tmp_path: Path) -> None:
    words = command(tmp_path / "run", own_data)
    assert "512 ids but model.vocab_size is 256" in refused([*words, "model.vocab_size=256"])
    (own_data / "tokenizer/tokenizer.json").write_text("{}")
    assert "is not the tokenizer that made this data" in refused(words)


@pytest.fixture(scope="module")
def finished(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(command(folder, data_dir)).returncode == 0
    return folder


def test_a_folder_with_another_recipes_run(finished: Path, data_dir: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    words = command(finished, data_dir, "training.seed=7", "model.ffn_hidden_size=128")
    message = refused(words)
    assert f"{finished} holds a run of another recipe" in message
    assert "training.seed: 42 -> 7  (--allow-changed training.seed)" in message
    assert "model.ffn_hidden_size: 192 -> 128  (can never change" in message
    # allowing it is of no use
    assert "can never change" in refused([*words, "--allow-changed", "model.ffn_hidden_size"])
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before


def test_a_checkpoint_of_another_model(finished: Path, data_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("num_layers: 4", "num_layers: 2"))
    message = refused(command(folder, data_dir, "model.num_layers=2"))
    assert "num_layers: 4 in the checkpoint, 2 by the recipe" in message
    recipe.unlink()
    assert "has checkpoints/ but no recipe.yaml" in refused(command(folder, data_dir))


def test_a_damaged_checkpoint_is_named(finished: Path, data_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (shard,) = (folder / "checkpoints/iter_0000005").glob("__0_0.distcp")
    shard.write_bytes(shard.read_bytes()[:1000])
    assert "__0_0.distcp" in refused(command(folder, data_dir))


def test_a_finished_run_only_evaluates(finished: Path, data_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = metrics(folder)
    done = run(command(folder, data_dir))
    assert done.returncode == 0, done.stderr
    assert metrics(folder) == before


def trained(run_dir: Path) -> list[list[Any]]:
    names = ("step", "loss", "grad_norm", "alpha_p", "alpha_n")
    rows = [[record.get(name) for name in names] for record in metrics(run_dir)]
    assert any(row[2] is not None for row in rows)
    return rows


def test_recomputing_the_activation_changes_no_bit(
    finished: Path, data_dir: Path, tmp_path: Path
) -> None:
    done = run(command(tmp_path / "run", data_dir, "xielu.recompute=true"))
    assert done.returncode == 0, done.stderr
    assert trained(tmp_path / "run") == trained(finished)
    ours, plain = saved(tmp_path / "run", 5), saved(finished, 5)
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[key], plain[key]) for key in plain)


@pytest.mark.slow
def test_recomputing_changes_no_bit_in_bf16_on_two_ranks(data_dir: Path, tmp_path: Path) -> None:
    cut = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
    for recompute in ("false", "true"):
        short = ("training.train_iters=3", "training.precision=bf16", *cut)
        words = command(tmp_path / recompute, data_dir, *short, f"xielu.recompute={recompute}")
        assert run(words).returncode == 0
    assert trained(tmp_path / "true") == trained(tmp_path / "false")


def test_recompute_may_change_and_is_ignored_where_megatron_recomputes_all(
    finished: Path, data_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    flags = ["--recompute-granularity", "selective", "--recompute-modules", "mlp"]
    done = run(command(folder, data_dir, "xielu.recompute=true", flags=flags))
    assert done.returncode == 0, done.stderr
    assert "changed since the last start: xielu.recompute: false -> true" in done.stdout
    note = "xielu.recompute=true is ignored: --recompute-granularity selective "
    assert done.stdout.count(f"{note}--recompute-modules mlp recomputes every MLP") == 1


def test_a_longer_run_goes_on_and_says_what_changed(
    finished: Path, data_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    words = command(folder, data_dir, "training.train_iters=7")
    assert "add --allow-changed training.train_iters" in refused(words)
    done = run([*words, "--allow-changed", "training.train_iters"])
    assert done.returncode == 0, done.stderr
    assert "changed since the last start: training.train_iters: 5 -> 7" in done.stdout
    steps = [record["step"] for record in metrics(folder) if record["type"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6, 7]


def test_data_that_moved_and_other_data(
    finished: Path, own_data: Path, data_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    done = run(command(folder, own_data))
    assert done.returncode == 0, done.stderr
    assert f"data.path: '{data_dir}' -> '{own_data}'" in done.stdout
    manifest = own_data / "dataset.json"
    text = manifest.read_text()
    digest = json.loads(text)["train"]["sha256"]
    # as if the folder had been written again from other text
    manifest.write_text(text.replace(digest, digest[::-1]))
    message = refused(command(folder, own_data))
    assert f"data.path: {own_data} holds other data" in message
    assert "add --allow-changed data.path" in message


def test_an_unknown_key_cannot_be_allowed(data_dir: Path, tmp_path: Path) -> None:
    words = command(tmp_path / "run", data_dir, "--allow-changed", "optimizer.rl")
    assert "--allow-changed optimizer.rl: no key of a recipe; did you mean" in refused(words)


def test_a_run_folder_without_write_permission(data_dir: Path, small_disk: Path) -> None:
    # root may write everywhere but on a file system that is read-only
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    message = refused(command(small_disk / "run", data_dir))
    assert f"the run folder {small_disk / 'run'} cannot be written: Read-only file sys" in message


def test_a_run_folder_that_cannot_be_written(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = refused(command(tmp_path / "file" / "run", data_dir))
    assert f"the run folder {tmp_path / 'file' / 'run'} cannot be written" in message


def test_a_killed_rank_ends_the_run_with_its_name(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = command(folder, data_dir, *LONG, "training.train_iters=2000")
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while len(metrics(folder)) < 3:
            assert process.poll() is None
            time.sleep(0.05)
        children = ranks_of(process.pid)
        # not the one that is polled first, so that the blame does not come by chance
        os.kill(children[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "error: rank 1 was ended by SIGKILL (the kernel does this when memory runs" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in children.values())


def test_a_rank_ends_when_its_data_workers_die_before_it() -> None:
    program = """
import time
from torch.utils.data import DataLoader
from megatron_xielu.training import pretrain
active = pretrain.multiprocessing.active_children
class Slow:
    def __init__(self, child):
        self.child = child
    def kill(self):
        self.child.kill()
        time.sleep(0.5)
pretrain.multiprocessing.active_children = lambda: map(Slow, active())
batches = iter(DataLoader(range(8), num_workers=1))
next(batches)
pretrain._exit(3)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (3, "")


def ranks_of(launcher: int) -> dict[int, int]:
    """The process ids of a launcher's ranks, by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for pid in children:
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            # torchrun has other children too, which come and go
            continue
        rank = dict(v.split(b"=", 1) for v in variables if b"=" in v).get(b"RANK")
        if rank is not None:
            found[int(rank)] = int(pid)
    return found


def test_a_stop_before_training_begins_is_no_failure(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(folder, data_dir), env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        # printed just before the ranks start, which then import for seconds
        while "run folder" not in process.stdout.readline():
            assert process.poll() is None
        while not ranks_of(process.pid):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert metrics(folder) == []


def test_a_second_ctrl_c_ends_at_once(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = command(folder, data_dir, *LONG, "training.train_iters=2000")
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        while len(metrics(folder)) < 3:
            assert process.poll() is None
            time.sleep(0.05)
        # so that they cannot have saved and ended in between
        for pid in ranks_of(process.pid).values():
            os.kill(pid, signal.SIGSTOP)
        assert process.stderr is not None
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "stopping after this step; Ctrl-C now stops at once\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    text = "stopped at once, without a save; the same command goes on from the last one"
    assert said == f"error: {text}\n"
    assert process.returncode == 1


def test_ranks_end_with_their_launcher_and_the_folder_is_locked_until_then(
    data_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = command(folder, data_dir, *LONG, "training.train_iters=2000")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, env=environment(), **quiet)
    try:
        while len(metrics(folder)) < 3:
            assert process.poll() is None
            time.sleep(0.05)
        assert f"{folder} is in use by another process" in refused(words)
        ranks = ranks_of(process.pid)
    finally:
        process.kill()
        process.wait()
    # the launcher is gone: its ranks save and end, and only then may another one go on
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert latest(folder) >= 3


def test_megatrons_own_data_flags_need_no_data_folder(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "megatron_xielu", "pretrain", "--recipe", "tiny", *SMALL]
    program += ["--run-dir", str(tmp_path / "run")]
    assert "data.path is not set" in refused(program)
    flags = ["--", "--mock-data", "--split", "80,20,0"]
    message = refused([*program, *flags])
    assert "model.vocab_size would come from the data" in message
    done = run([*program, "model.vocab_size=128", *flags])
    assert done.returncode == 0, done.stderr


DRY_RUNS = {
    "llama-1.1b-xielu": ("1,132,537,392", "126,156,800,000", "8,606,711,808"),
    "llama-3b-xielu": ("3,020,048,456", "125,829,120,000", "19,931,332,608"),
}


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run_of_the_papers_recipes(name: str, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "megatron_xielu", "pretrain", "--recipe", name, "--dry-run"]
    done = run(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for number in (*DRY_RUNS[name], "--lr-wsd-decay-style minus_sqrt", "activation: xielu"):
        assert number in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_gpus_on_any_machine(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "megatron_xielu", "pretrain", "--recipe", "llama-1.1b-xielu"]
    program += ["--for-gpu", "--nproc", "88"]
    done = run(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("precision: bf16", "--bf16", "--transformer-impl transformer_engine"):
        assert text in done.stdout
    for text in ("--distributed-backend nccl", "--overlap-param-gather", "GiB, bf16"):
        assert text in done.stdout
    each = "checkpoints: 15.9 GB each, 70 in all; at most"
    assert f"{each} 70 on the disk, 1,109.9 GB\n" in done.stdout
    # 2 and the one that is being written, and 20, 40 and 60 thousand
    done = run([*program, "checkpoint.keep_last=2", "checkpoint.keep_every=20000"], cwd=tmp_path)
    assert f"{each} 6 on the disk, 95.1 GB\n" in done.stdout


def test_a_plan_for_fp8_on_any_machine(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "megatron_xielu", "pretrain", "--recipe", "llama-3b-xielu"]
    program += ["--for-gpu", "--nproc", "2", "fp8.recipe=blockwise"]
    done = run([*program, "fp8.bf16_layers_at_end=2"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("--fp8-recipe blockwise", "--fp8-format e4m3", "--num-layers-at-end-in-bf16 2"):
        assert text in done.stdout
    wrong = ["model.ffn_hidden_size=12296", "model.seq_length=4092", "training.micro_batch_size=1"]
    # the precision is known once the machine is
    wrong += ["parallel.use_distributed_optimizer=false"]
    assert "fp8.recipe" not in refused([*program, *wrong[-1:]])
    message = refused([*program, *wrong])
    assert "model.ffn_hidden_size / TP = 12296 / 2 = 6148 is not a multiple of 16" in message
    assert "nearest legal: 12288, 12320" in message
    assert "4092 x 1 / 2 = 2046 tokens are not a multiple of 8" in message
    assert "nearest legal: seq_length=4080, 4096" in message
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_what_a_run_uses(data_dir: Path, tmp_path: Path) -> None:
    done = run([*command(tmp_path / "run", data_dir), "--dry-run"])
    assert done.returncode == 0, done.stderr
    assert "--distributed-backend gloo" in done.stdout
    assert "vocab_size: 512" in done.stdout
    assert f"--train-data-path {data_dir / 'train'}" in done.stdout
    assert not (tmp_path / "run").exists()
