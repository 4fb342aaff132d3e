"""What would let a run hang is refused before it starts, by the real limits and sockets."""

from __future__ import annotations

import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_xielu.errors import UserError
from megatron_xielu.launch import preflight
from megatron_xielu.recipes import Recipe
from tests.ranks import environment
from tests.training.test_pretrain import command, refused, run


@contextmanager
def limit(which: int, soft: int) -> Iterator[None]:
    kept = resource.getrlimit(which)
    resource.setrlimit(which, (soft, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, kept)


def check_machine(tmp_path: Path, world_size: int = 2, **paths: Path) -> None:
    missing = {"shm": tmp_path / "no-shm", "infiniband": tmp_path / "no-infiniband"}
    preflight.check_machine(world_size=world_size, shared_memory=True, **missing | paths)


def test_little_shared_memory(small_disk: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 0\.00 GiB free, .* --ipc=host or --shm-size=1g"):
        check_machine(tmp_path, shm=small_disk)


def test_few_open_files(tmp_path: Path) -> None:
    with limit(resource.RLIMIT_NOFILE, 1024):
        check_machine(tmp_path, world_size=192)
        with pytest.raises(UserError, match=r"1024 open files are allowed, .* ulimit -n 1028 "):
            check_machine(tmp_path, world_size=193)


def test_little_locked_memory_where_there_is_infiniband(tmp_path: Path) -> None:
    with limit(resource.RLIMIT_MEMLOCK, 65536):
        check_machine(tmp_path)
        status = tmp_path / "status"
        # capability 14 and no other, then all but that
        status.write_text("CapInh:\t0000000000000000\nCapEff:\t0000000000004000\n")
        check_machine(tmp_path, infiniband=tmp_path, status=status)
        status.write_text("CapInh:\t0000000000004000\nCapEff:\t000001ffffffbfff\n")
        with pytest.raises(UserError, match=r"64 KiB of locked memory .* ulimit -l unlimited"):
            check_machine(tmp_path, infiniband=tmp_path, status=status)


def test_a_gpu_that_another_program_uses() -> None:
    gib = 1 << 30
    # this rank's own context
    assert preflight.gpu_is_busy(3, lambda: (78 * gib, 79 * gib), seconds=0) is None
    said = preflight.gpu_is_busy(3, lambda: (38 * gib, 79 * gib), seconds=0)
    assert str(said).startswith("GPU 3 has 41.0 of 79.0 GiB taken before the run starts")
    assert "`nvidia-smi` names the processes" in str(said)


def test_a_gpu_whose_last_run_is_ending() -> None:
    free = iter([10 << 30, 10 << 30, 79 << 30])
    assert preflight.gpu_is_busy(0, lambda: (next(free), 80 << 30)) is None
    # it was looked at again until it was free, and no more
    assert next(free, None) is None


def test_a_disk_for_less_than_three_saves(
    small_recipe: Recipe, data_dir: Path, small_disk: Path
) -> None:
    def recipe(**kept: int) -> Recipe:
        training = replace(small_recipe.training, train_iters=10, precision="fp32")
        return replace(
            small_recipe,
            training=training,
            checkpoint=replace(small_recipe.checkpoint, save_interval=2, **kept),
        )

    size = preflight.checkpoint_bytes(recipe()) / 1e6
    message = rf"next 3 saves need {3 * size:.1f} MB \({size:.1f} MB each\): make room"
    with pytest.raises(UserError, match=message):
        preflight.check_disk(recipe(), small_disk, 0)
    # one is left
    preflight.check_disk(recipe(), small_disk, 8)
    preflight.check_disk(recipe(), small_disk, 10)
    with pytest.raises(UserError, match="next 2 saves need"):
        preflight.check_disk(recipe(keep_last=1), small_disk, 0)
    run_dir = small_disk / "run"
    assert "the next 3 saves need" in refused(
        command(run_dir, data_dir, "checkpoint.save_interval=1")
    )


def test_the_size_of_a_save_is_what_is_computed(
    small_recipe: Recipe, data_dir: Path, tmp_path: Path
) -> None:
    assert run(command(tmp_path / "run", data_dir, "training.precision=fp32")).returncode == 0
    shards = (tmp_path / "run/checkpoints/iter_0000005").glob("*.distcp")
    saved = sum(path.stat().st_size for path in shards)
    recipe = replace(small_recipe, training=replace(small_recipe.training, precision="fp32"))
    # beside the tensors, what describes them, which for a small model counts
    assert 1.0 < saved / preflight.checkpoint_bytes(recipe) < 1.15


def test_a_meeting_point_that_does_not_answer() -> None:
    with socket.socket() as bound:
        # not listening
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        message = rf"MASTER_ADDR=localhost \(port {port}\) .* is this machine, not rank 0's"
        with pytest.raises(UserError, match=message):
            preflight.await_meeting("localhost", port, seconds=0)
        bound.listen()
        preflight.await_meeting("localhost", port, seconds=0)


def test_a_meeting_point_without_an_address() -> None:
    with pytest.raises(UserError, match=r"MASTER_ADDR=nowhere.invalid cannot be resolved here"):
        preflight.await_meeting("nowhere.invalid", 1)


def test_a_rank_of_another_machine_that_would_meet_itself(data_dir: Path, tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        variables = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        words = [sys.executable, "-c", SHORT, *command(tmp_path / "run", data_dir)[3:]]
        done = subprocess.run(
            words,
            env=environment(
                **variables, MASTER_ADDR="127.0.0.1", MASTER_PORT=bound.getsockname()[1]
            ),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2, done.stderr
    assert "is this machine, not rank 0's" in done.stderr


# one second instead of a minute
SHORT = """
import sys
from megatron_xielu.launch import preflight
preflight._OWN_MEETING_SECONDS = 1.0
from megatron_xielu.cli import main
sys.exit(main())
"""


def test_two_torchruns_that_look_the_same() -> None:
    program = (
        "from megatron_xielu.launch.preflight import hold_node_id as hold\nhold('10.0.0.1', 7)"
    )
    waiting = f"{program}\nprint('held', flush=True)\ninput()"
    words = [sys.executable, "-c"]
    with subprocess.Popen(
        [*words, waiting],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        second = subprocess.run(
            [*words, program], env=environment(), capture_output=True, text=True
        )
        first.communicate("\n")
    assert re.search(r"another torchrun at 10\.0\.0\.1 has the process id 7 too", second.stderr)
    assert subprocess.run([*words, program], env=environment()).returncode == 0
