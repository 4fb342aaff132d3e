"""The folder of checkpoints: whole steps or none, whatever is cut off or damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron_xielu.checkpoint import inventory
from megatron_xielu.checkpoint.manifest import MANIFEST
from megatron_xielu.checkpoint.store import LATEST, Store, open_store
from megatron_xielu.errors import UserError

ABOUT = {
    "time": "2026-01-01T00:00:00+0000",
    "world_size": 2,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 1,
    "data_parallel_size": 1,
}
SHARD = "__0_0.distcp"


def write(store: Store, step: int) -> None:
    """A real checkpoint in the folder beside."""
    state = {"weight": torch.full((64,), float(step)), "bias": torch.arange(3) + step}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(store.begin(step)), no_dist=True)


def save(store: Store, step: int) -> None:
    write(store, step)
    names = [path.name for path in store.staging(step).iterdir()]
    store.publish(step, store.describe(step, names), ABOUT)
    store.prune(step)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "checkpoints").mkdir()
    return Store(tmp_path / "checkpoints", recipe="name: test\n")


def leftovers(store: Store) -> list[str]:
    return [
        path.name
        for path in store.folder.iterdir()
        if path.name != LATEST and not path.name.startswith("iter_")
    ]


def test_a_step_appears_whole(store: Store) -> None:
    assert (store.latest(), store.steps()) == (0, [])
    write(store, 5)
    assert store.steps() == []
    save(store, 5)
    assert (store.latest(), store.steps()) == (5, [5])
    assert store.problems(5, checksums=True) == []
    assert (store.path(5) / "recipe.yaml").read_text() == "name: test\n"
    assert leftovers(store) == []


class Cut(BaseException):
    """Stands for a kill."""


def cut_off_at(count: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Let the `count`-th change of the file system, counted from 0, not happen, nor any later."""
    done = [0]

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if done[0] >= count:
                raise Cut
            done[0] += 1
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "rmdir"),
        (Path, "open"),
        (Path, "write_text"),
        (shutil, "rmtree"),
        (os, "fsync"),
    ):
        patch.setattr(owner, name, dying(getattr(owner, name)))
    return done


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the latest step again"])
def test_a_kill_between_any_two_operations_leaves_a_whole_step(again: bool, tmp_path: Path) -> None:
    outcomes = []
    saved = 9 if again else 12
    for count in range(100):
        folder = tmp_path / str(count)
        folder.mkdir()
        store = Store(folder, keep_last=2, recipe="name: test\n")
        for step in (3, 6, 9):
            save(store, step)
        finished = False
        with pytest.MonkeyPatch.context() as patch:
            cut_off_at(count, patch)
            try:
                save(store, saved)
                finished = True
            except (Cut, CheckpointException):
                # torch wraps what is raised while it writes
                pass
        told: list[str] = []
        store.recover(told.append)
        latest = store.latest()
        assert latest in (9, 12)
        assert all(store.problems(step, checksums=True) == [] for step in store.steps())
        # the newest whole step is the one to go on from
        assert latest == max(store.steps())
        assert leftovers(store) == []
        save(store, 15)
        assert store.latest() == 15
        assert store.problems(15, checksums=True) == []
        outcomes.append(latest)
        if finished:
            break
    print(f"cut off at {len(outcomes)} places: {outcomes.count(9)} have step 9 as the latest")
    assert finished
    assert outcomes == sorted(outcomes)
    assert {9, saved} == set(outcomes)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda folder: os.truncate(folder / SHARD, 100),
        f"{SHARD} is cut short: 100 of ",
    ),
    "longer": (
        lambda folder: os.truncate(folder / SHARD, 1 << 20),
        f"{SHARD} is too long: 1,048,576 instead",
    ),
    "bit flipped": (
        lambda folder: flip(folder / SHARD),
        f"{SHARD} has other content than was saved",
    ),
    "missing": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
    "foreign": (
        lambda folder: shutil.copy(folder.parent / "iter_0000003" / SHARD, folder / SHARD),
        f"{SHARD} has other content than was saved",
    ),
    "one too many": (
        lambda folder: shutil.copy(folder / SHARD, folder / "__7_0.distcp"),
        "__7_0.distcp is not one of this checkpoint's files",
    ),
    "index flipped": (
        lambda folder: flip(folder / ".metadata"),
        ".metadata has other content than was saved",
    ),
    "recipe edited": (
        lambda folder: (folder / "recipe.yaml").write_text("name: fake\n"),
        "recipe.yaml has other content than was saved",
    ),
    "manifest torn": (
        lambda folder: os.truncate(folder / MANIFEST, 40),
        f"{MANIFEST} cannot be read",
    ),
    "manifest of another step": (
        lambda folder: shutil.copy(folder.parent / "iter_0000003" / MANIFEST, folder / MANIFEST),
        f"{MANIFEST} is of step 3",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, store: Store) -> None:
    for step in (3, 6):
        save(store, step)
    harm, message = DAMAGES[damage]
    harm(store.path(6))
    problems = store.problems(6, checksums=True)
    print(problems)
    assert len(problems) == 1
    assert message in problems[0]
    assert store.newest_whole(below=6) == 3
    said: list[str] = []
    assert not inventory.verify(store, [], report=said.append)
    assert said[0].startswith("step 3: whole, 3 files, ")
    assert said[1:] == ["step 6: damaged", f"  {problems[0]}"]


def test_a_checkpoint_without_a_manifest_is_judged_by_its_index(store: Store) -> None:
    save(store, 3)
    (store.path(3) / MANIFEST).unlink()
    assert store.problems(3, checksums=True) == []
    assert "by its index" in inventory._verdict(store, 3, [])
    os.truncate(store.path(3) / SHARD, 100)
    assert f"{SHARD} is cut short" in store.problems(3)[0]


def test_what_is_kept(tmp_path: Path) -> None:
    kept = {}
    for name, last, every in (("all", None, None), ("last", 2, None), ("every", 2, 6)):
        folder = tmp_path / name
        folder.mkdir()
        store = Store(folder, last, every)
        for step in range(2, 16, 2):
            save(store, step)
        kept[name] = store.steps()
    assert kept["all"] == [2, 4, 6, 8, 10, 12, 14]
    assert kept["last"] == [12, 14]
    assert kept["every"] == [6, 12, 14]


def test_weights_alone_are_step_0(tmp_path: Path) -> None:
    store = Store(tmp_path, keep_last=1)
    save(store, 0)
    assert store.path(0).name == (tmp_path / LATEST).read_text() == "release"
    assert (store.latest(), store.steps()) == (0, [0])
    assert store.problems(0, checksums=True) == []
    store.recover(print)
    for step in (2, 4):
        save(store, step)
    # whence training began is not one of the newest steps, nor is it in their way
    assert (store.latest(), store.steps()) == (4, [0, 4])
    store.set_latest(0)
    assert (tmp_path / LATEST).read_text() == "release"
    assert store.latest() == 0


def test_going_back_to_an_older_step(store: Store) -> None:
    for step in (2, 4, 6):
        save(store, step)
    store.set_latest(2)
    store.recover(print)
    # what the user went back from is not taken for newer, and the future stays until it comes again
    assert store.latest() == 2
    assert store.steps() == [2, 4, 6]
    save(store, 4)
    assert (store.latest(), store.steps()) == (4, [2, 4, 6])
    assert store.problems(4, checksums=True) == []


def test_a_kill_after_going_back_does_not_take_the_future_for_the_latest(tmp_path: Path) -> None:
    outcomes = []
    for count in range(100):
        folder = tmp_path / str(count)
        folder.mkdir()
        store = Store(folder)
        for step in (2, 4, 6):
            save(store, step)
        store.set_latest(2)
        finished = False
        with pytest.MonkeyPatch.context() as patch:
            cut_off_at(count, patch)
            try:
                save(store, 4)
                finished = True
            except (Cut, CheckpointException):
                pass
        store.recover(print)
        outcomes.append(store.latest())
        assert store.problems(store.latest(), checksums=True) == []
        if finished:
            break
    print(f"cut off at {len(outcomes)} places: {outcomes.count(2)} stand at step 2")
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {2, 4}


def test_a_file_that_rank_0_does_not_see_as_it_was_written(store: Store) -> None:
    write(store, 2)
    names = [path.name for path in store.staging(2).iterdir()]
    files = store.describe(2, names)
    os.truncate(store.staging(2) / SHARD, 10)
    with pytest.raises(OSError, match=r"cut short.*do all ranks see the same"):
        store.publish(2, files, ABOUT)
    assert store.latest() == 0
    # and one that nobody described
    write(store, 2)
    files = store.describe(2, names)
    (store.staging(2) / SHARD).unlink()
    files.pop(SHARD)
    with pytest.raises(UserError, match=f"{SHARD} is missing"):
        store.publish(2, files, ABOUT)
    assert store.steps() == []


def test_removing(store: Store) -> None:
    for step in (2, 4, 6):
        save(store, step)
    with pytest.raises(UserError, match="has no step 5; it has 2, 4, 6"):
        store.remove([2, 5])
    with pytest.raises(UserError, match="step 6 is the one that training goes on from"):
        store.remove([2, 6])
    assert store.steps() == [2, 4, 6]
    store.remove([2, 4])
    assert store.steps() == [6]
    assert leftovers(store) == []


def test_the_name_of_the_latest_step_must_be_a_number(store: Store) -> None:
    save(store, 2)
    save(store, 4)
    (store.folder / LATEST).write_text("")
    flip(store.path(4) / SHARD)
    os.truncate(store.path(4) / SHARD, 10)
    with pytest.raises(UserError, match=r"says '' instead of a step number\. Write 2 into it"):
        store.latest()


def test_the_table(store: Store, tmp_path: Path) -> None:
    save(store, 2)
    save(store, 4)
    os.truncate(store.path(2) / SHARD, 10)
    (store.path(4) / MANIFEST).unlink()
    table = inventory.table(open_store(tmp_path))
    print(table)
    head, damaged, plain = table.splitlines()
    assert head.split() == ["step", "size", "files", "saved", "ranks", "state"]
    assert "2: TP 2, PP 1, DP 1  damaged: __0_0.distcp is cut short: 10 of" in damaged
    assert plain.endswith("-  whole, latest")
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_store(tmp_path / "nothing")
