"""The folder of one run, and whether this recipe may go on in it."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_xielu.checkpoint.run import check_arguments, open_run
from megatron_xielu.checkpoint.torch_dist import INDEX, TorchDistReader
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe, diff, load_recipe, to_yaml

RECIPE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
FLAGS = "megatron_flags.txt"
_LATEST = "latest_checkpointed_iteration.txt"
# what may differ between two starts of one run: how it is computed, reported and saved, and how
# long it goes on; all else would make it another run
_MAY_CHANGE = (
    "checkpoint.",
    "logging.",
    "parallel.pipeline_model_parallel_size",
    "parallel.sequence_parallel",
    "parallel.tensor_model_parallel_size",
    "schedule.",
    "data.path",
    "data.num_workers",
    "model.transformer_impl",
    "training.micro_batch_size",
    "training.precision",
    "training.train_iters",
    "xielu.impl",
)


def latest_step(run_dir: Path) -> int:
    """The step of the newest whole checkpoint, 0 if there is none."""
    path = run_dir / CHECKPOINTS / _LATEST
    if not path.is_file():
        return 0
    text = path.read_text().strip()
    if not text.isdigit():
        whole = [_step_of(folder) for folder in _step_folders(run_dir) if _is_whole(folder)]
        raise UserError(
            f"{path} says {text!r} instead of a step number: its last write was cut off. Write "
            f"{max(whole, default=0)} into it, the newest whole step, or remove it to start anew."
        )
    return int(text)


def claim(
    run_dir: Path,
    recipe: Recipe,
    *,
    megatron_flags: Sequence[str] = (),
    progress: Callable[[str], None],
) -> int:
    """Make or re-enter a run folder and write the recipe into it.

    No other process takes the folder until this one and the ranks it starts have ended.

    Args:
        megatron_flags: what the user gave to Megatron beside the recipe, kept for the next start.

    Returns:
        An open file that holds the folder's lock; child processes that inherit it hold it too.

    Raises:
        UserError: the folder cannot be written, is in use, or holds a run of another recipe or
            model.
    """
    step = latest_step(run_dir)
    if (run_dir / RECIPE).is_file():
        _check_same_run(run_dir, recipe, progress)
    elif (run_dir / CHECKPOINTS).exists():
        raise UserError(
            f"{run_dir} has {CHECKPOINTS}/ but no {RECIPE}, so nothing says what they are. Put the "
            "run's recipe back or choose another --run-dir."
        )
    if step:
        checkpoint = open_run(run_dir)
        reader = TorchDistReader(checkpoint.path)
        check_arguments(reader, recipe, overridden=_names(megatron_flags))
        reader.check_files(reader.keys())
    lock = _write(run_dir, recipe, megatron_flags, progress)
    _remove_unfinished(run_dir, step, progress)
    return lock


def _check_same_run(run_dir: Path, recipe: Recipe, progress: Callable[[str], None]) -> None:
    changes = diff(load_recipe(str(run_dir / RECIPE)), recipe)
    refused = [change for change in changes if not change.startswith(_MAY_CHANGE)]
    if refused:
        raise UserError(
            f"{run_dir} holds a run of another recipe:\n"
            + "\n".join(f"  {change}" for change in refused)
            + f"\nGo on with {run_dir / RECIPE}, or choose another --run-dir."
        )
    for change in changes:
        progress(f"changed since the last start: {change}")


def _write(
    run_dir: Path, recipe: Recipe, flags: Sequence[str], progress: Callable[[str], None]
) -> int:
    try:
        (run_dir / LOGS).mkdir(parents=True, exist_ok=True)
        (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
        lock = _lock(run_dir)
        given = run_dir / FLAGS
        before = given.read_text() if given.is_file() else ""
        if before != shlex.join(flags) and (run_dir / RECIPE).is_file():
            progress(f"Megatron flags since the last start: {before!r} -> {shlex.join(flags)!r}")
        given.write_text(shlex.join(flags))
        partial = run_dir / f".{RECIPE}.{os.getpid()}"
        partial.write_text(to_yaml(recipe), encoding="utf-8")
        partial.replace(run_dir / RECIPE)
        return lock
    except OSError as error:
        raise UserError(
            f"the run folder {run_dir} cannot be written: {error.strerror}. Choose another "
            "--run-dir, or make it writable."
        ) from error


def _lock(run_dir: Path) -> int:
    descriptor = os.open(run_dir / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"{run_dir} is in use by another process: wait for it, end it, or choose another "
            "--run-dir. To start many ranks by a scheduler, use torchrun."
        ) from None
    return descriptor


def _names(flags: Sequence[str]) -> set[str]:
    """Megatron's names of the arguments that flags set: --rotary-percent 0.5 is rotary_percent."""
    return {word.removeprefix("--").replace("-", "_") for word in flags if word.startswith("--")}


def _step_folders(run_dir: Path) -> list[Path]:
    folders = (run_dir / CHECKPOINTS).glob("iter_*")
    return sorted(folder for folder in folders if re.fullmatch(r"iter_\d{7,}", folder.name))


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))


def _is_whole(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def _remove_unfinished(run_dir: Path, step: int, progress: Callable[[str], None]) -> None:
    # no save can be at work: the folder is locked
    for folder in _step_folders(run_dir):
        if _step_of(folder) > step and not _is_whole(folder):
            shutil.rmtree(folder)
            progress(f"removed {folder}: its save was cut off")
