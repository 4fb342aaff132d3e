"""Saves of real runs: whole or not at all, whatever is killed, full or damaged."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from megatron_xielu.checkpoint import manifest as manifests
from megatron_xielu.checkpoint.run import arguments_of
from megatron_xielu.checkpoint.store import Store
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.recipes import load_recipe
from tests.ranks import environment
from tests.training.kills import run_and_kill
from tests.training.test_pretrain import command, latest, metrics, ranks_of, refused, run, saved

TP2 = "parallel.tensor_model_parallel_size=2"
OFTEN = ("checkpoint.save_interval=2", "logging.eval_interval=1000", TP2)


def length(steps: int) -> list[str]:
    return [f"training.train_iters={steps}", "schedule.lr_wsd_decay_iters=5"]


def assert_same_end(folder: Path, straight: Path, step: int) -> None:
    """Every tensor, optimizer included, and every record of the two runs."""
    expected, got = saved(straight, step), saved(folder, step)
    assert expected.keys() == got.keys()
    different = [key for key in expected if not torch.equal(expected[key], got[key])]
    assert not different, different[:5]
    kept = ("step", "loss", "grad_norm", "lr", "alpha_p", "alpha_n")
    rows = [[[r.get(k) for k in kept] for r in metrics(f)] for f in (folder, straight)]
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def straight(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs, which keeps its last steps."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    words = command(folder, data_dir, *OFTEN, *length(20), "checkpoint.keep_last=3")
    done = run([*words, "checkpoint.keep_every=8"])
    assert done.returncode == 0, done.stderr
    return folder


def test_a_step_holds_its_manifest_and_its_recipe(straight: Path) -> None:
    store = Store(straight / "checkpoints")
    assert store.steps() == [8, 16, 18, 20]
    assert sorted(p.name for p in store.folder.iterdir() if p.name.startswith(".")) == []
    manifest = manifests.load(store.path(20))
    assert manifest is not None
    assert manifest.step == 20
    kinds = {".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json", "recipe.yaml"}
    assert set(manifest.files) == kinds
    assert manifest.about["world_size"] == manifest.about["tensor_model_parallel_size"] == 2
    assert load_recipe(str(store.path(20) / "recipe.yaml")).training.train_iters == 20
    # Megatron's saved arguments name the run's folder and not the one beside it
    assert store.problems(20, checksums=True) == []


def test_a_checkpoint_counts_tokens_whatever_changes(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fixed = ("logging.eval_iters=0", "schedule.lr_wsd_decay_iters=1")
    first = ("training.train_iters=2", "training.global_batch_size=8", "model.seq_length=64")
    then = ("training.train_iters=3", "training.global_batch_size=4", "model.seq_length=32")
    # Megatron's own flag is what counts
    two = ["--global-batch-size", "2"]
    for keys, flags, tokens in ((first, two, 2 * 2 * 64), (then, [], 2 * 2 * 64 + 4 * 32)):
        words = command(folder, data_dir, *fixed, *keys)
        for key in keys:
            words += ["--allow-changed", key.partition("=")[0]]
        done = run([*words, "--", *flags] if flags else words)
        assert done.returncode == 0, done.stderr
        args = arguments_of(TorchDistReader(Store(folder / "checkpoints").path(latest(folder))))
        assert args["consumed_train_tokens"] == tokens


def test_kills_of_ranks(data_dir: Path, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = command(folder, data_dir, *OFTEN, *length(20), "checkpoint.keep_last=3")
    words.append("checkpoint.keep_every=8")
    tally = run_and_kill(words, folder, ranks_of, kills=3, seed=1)
    print(tally)
    assert tally.inside_saves
    assert_same_end(folder, straight, 20)


LONG = 80


@pytest.fixture(scope="module")
def long_straight(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "run"
    done = run(command(folder, data_dir, *OFTEN, *length(LONG), "checkpoint.keep_last=2"))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ten", range(5))
def test_fifty_kills_of_ranks(
    ten: int, data_dir: Path, long_straight: Path, tmp_path: Path
) -> None:
    kills = 0
    for attempt in range(40):
        folder = tmp_path / str(attempt)
        words = command(folder, data_dir, *OFTEN, *length(LONG), "checkpoint.keep_last=2")
        if ten % 2:
            words.append("checkpoint.async_save=true")
        seed = 100 * ten + attempt
        tally = run_and_kill(words, folder, ranks_of, kills=10 - kills, seed=seed)
        kills += tally.kills
        print(f"{'async' if ten % 2 else 'sync'}: {tally}")
        assert_same_end(folder, long_straight, LONG)
        shutil.rmtree(folder)
        if kills == 10:
            break
    assert kills == 10


# tests/checkpoint/test_store.py names more kinds of harm, without a run
@pytest.mark.parametrize(
    "harm",
    [
        "flipped",
        pytest.param("truncated", marks=pytest.mark.slow),
        pytest.param("missing", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_step_is_refused_and_the_older_one_offered_or_taken(
    harm: str, straight: Path, data_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(straight, tmp_path / "run"))
    shard = folder / "checkpoints/iter_0000020/__1_0.distcp"
    if harm == "truncated":
        os.truncate(shard, 1000)
    elif harm == "missing":
        shard.unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 4
        shard.write_bytes(content)
    words = command(folder, data_dir, *OFTEN, *length(20))
    message = refused(words)
    print(message)
    assert f"{shard.parent} is damaged" in message
    assert "  __1_0.distcp " in message
    assert "Step 18 is whole: checkpoint.on_corrupt=older goes on from it" in message
    assert latest(folder) == 20
    done = run([*words, "checkpoint.on_corrupt=older"])
    assert done.returncode == 0, done.stderr
    assert "going on from step 18" in done.stdout
    assert (folder / "checkpoints/iter_0000020.corrupt").is_dir()
    assert_same_end(folder, straight, 20)


def test_nothing_whole_is_left(straight: Path, data_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(straight, tmp_path / "run"))
    for shard in folder.glob("checkpoints/*/__1_0.distcp"):
        os.truncate(shard, 1000)
    words = command(folder, data_dir, *OFTEN, *length(20), "checkpoint.on_corrupt=older")
    message = refused(words)
    assert "No older step is whole" in message
    assert latest(folder) == 20


def test_asynchronous_saves_are_of_the_step_they_name(
    straight: Path, data_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = command(folder, data_dir, *OFTEN, *length(20), "checkpoint.async_save=true")
    done = run(words)
    assert done.returncode == 0, done.stderr
    log = (folder / "logs/rank_00000.log").read_text()
    assert "scheduled an async checkpoint save at iteration       4" in log
    store = Store(folder / "checkpoints")
    assert store.steps() == list(range(2, 21, 2))
    assert all(store.problems(step, checksums=True) == [] for step in store.steps())
    # a known fault elsewhere: every later save holds the first one's weights
    weight = "decoder.layers.mlp.linear_fc1.weight"
    values = [saved(folder, step)[weight] for step in store.steps()]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(values))
    for step in (8, 16, 18, 20):
        expected, got = saved(straight, step), saved(folder, step)
        assert all(torch.equal(expected[key], got[key]) for key in expected)


def fill(disk: Path) -> Path:
    """Leave no room on a file system."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_run_outlives_a_full_disk(
    mode: str, straight: Path, data_dir: Path, small_disk: Path, tmp_path: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    folder = small_disk / "run"
    words = command(folder, data_dir, *OFTEN, *length(20))
    if mode == "async":
        words.append("checkpoint.async_save=true")
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(words, env=environment(), stdout=out, stderr=subprocess.STDOUT)
    try:
        while not (folder / "checkpoints/iter_0000004").is_dir():
            assert process.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.002)
        filler = fill(small_disk)
        while (said := (tmp_path / "out").read_text()).count("could not be saved") < 2:
            assert process.poll() is None, said
            time.sleep(0.002)
        stays = latest(folder)
        assert Store(folder / "checkpoints").problems(stays, checksums=True) == []
        filler.unlink()
        assert process.wait(timeout=120) == 0, (tmp_path / "out").read_text()
    finally:
        process.kill()
    said = (tmp_path / "out").read_text()
    print("\n".join(line for line in said.splitlines() if line.startswith("warning")))
    assert "could not be saved: [Errno 28] No space left on device" in said
    assert f"step {stays} stays the newest whole one" in said
    assert "Traceback" not in said
    assert_same_end(folder, straight, 20)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"train"' in line] == [*range(1, 21)]


def test_a_run_whose_end_cannot_be_saved_fails(data_dir: Path, small_disk: Path) -> None:
    # a start wants room for three saves
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    folder = small_disk / "run"
    words = command(folder, data_dir, *length(12), "checkpoint.save_interval=3", TP2)
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while not (folder / "checkpoints/iter_0000003").is_dir():
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        filler = fill(small_disk)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1, said
    assert "error: step 12 could not be saved: [Errno 28] No space left on device" in said
    stays = latest(folder)
    assert 3 <= stays < 12
    assert f"step {stays} is saved whole, and training can go on from it" in said
    assert "Traceback" not in said
    assert all(torch.isfinite(tensor.float()).all() for tensor in saved(folder, stays).values())
    # with room the same command goes on
    filler.unlink()
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert latest(folder) == 12


def test_flags_that_decide_what_recipes_decide(data_dir: Path, tmp_path: Path) -> None:
    words = command(tmp_path / "run", data_dir)
    message = refused([*words, "--", "--save-retain-interval", "10"])
    assert "set checkpoint.keep_last and checkpoint.keep_every instead" in message
    message = refused([*words, "--", "--save", str(tmp_path)])
    assert "choose where to save by --run-dir" in message
