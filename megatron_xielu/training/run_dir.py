"""The folder of one run, and whether this recipe may go on in it."""

from __future__ import annotations

import fcntl
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_xielu.checkpoint.run import check_arguments
from megatron_xielu.checkpoint.store import Store
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe, diff, load_recipe, to_yaml

RECIPE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
FLAGS = "megatron_flags.txt"
# what may differ between two starts of one run: how it is computed, reported and saved, and how
# long it goes on; all else would make it another run
_MAY_CHANGE = (
    "checkpoint.",
    "health.",
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


def store(run_dir: Path, recipe: Recipe) -> Store:
    """The run's checkpoints, kept as the recipe says."""
    kept = recipe.checkpoint
    return Store(run_dir / CHECKPOINTS, kept.keep_last, kept.keep_every, to_yaml(recipe))


def latest_step(run_dir: Path) -> int:
    """The step that training goes on from, 0 if there is none."""
    return Store(run_dir / CHECKPOINTS).latest()


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
    if (run_dir / RECIPE).is_file():
        _check_same_run(run_dir, recipe, progress)
    elif Store(run_dir / CHECKPOINTS).steps():
        raise UserError(
            f"{run_dir} has {CHECKPOINTS}/ but no {RECIPE}, so nothing says what they are. Put the "
            "run's recipe back or choose another --run-dir."
        )
    lock = _lock(run_dir)
    checkpoints = store(run_dir, recipe)
    checkpoints.recover(progress)
    if step := _whole_step(checkpoints, recipe, progress):
        reader = TorchDistReader(checkpoints.path(step))
        check_arguments(reader, recipe, overridden=_names(megatron_flags))
    _write(run_dir, recipe, megatron_flags, progress)
    return lock


def _whole_step(checkpoints: Store, recipe: Recipe, progress: Callable[[str], None]) -> int:
    """The step to go on from, every byte of it checked; 0 to start anew."""
    step = checkpoints.latest()
    damage = checkpoints.problems(step, checksums=True) if step else []
    if not damage:
        return step
    found = "\n".join(f"  {problem}" for problem in damage)
    older = checkpoints.newest_whole(below=step)
    remedy = "copy the step here again"
    if not older:
        remedy = f"No older step is whole: {remedy}, or remove {checkpoints.folder} to start anew."
    elif recipe.checkpoint.on_corrupt == "stop":
        remedy = f"Step {older} is whole: checkpoint.on_corrupt=older goes on from it; or {remedy}."
    if not older or recipe.checkpoint.on_corrupt == "stop":
        raise UserError(f"{checkpoints.path(step)} is damaged:\n{found}\n{remedy}")
    aside = checkpoints.set_aside(step)
    checkpoints.set_latest(older)
    progress(f"step {step} is damaged, now {aside}:\n{found}\ngoing on from step {older}")
    return older


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
) -> None:
    try:
        given = run_dir / FLAGS
        before = given.read_text() if given.is_file() else ""
        if before != shlex.join(flags) and (run_dir / RECIPE).is_file():
            progress(f"Megatron flags since the last start: {before!r} -> {shlex.join(flags)!r}")
        given.write_text(shlex.join(flags))
        partial = run_dir / f".{RECIPE}.{os.getpid()}"
        partial.write_text(to_yaml(recipe), encoding="utf-8")
        partial.replace(run_dir / RECIPE)
    except OSError as error:
        raise _not_writable(run_dir, error) from error


def _lock(run_dir: Path) -> int:
    try:
        (run_dir / LOGS).mkdir(parents=True, exist_ok=True)
        (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
        descriptor = os.open(run_dir / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise _not_writable(run_dir, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"{run_dir} is in use by another process: wait for it, end it, or choose another "
            "--run-dir. To start many ranks by a scheduler, use torchrun."
        ) from None
    return descriptor


def _not_writable(run_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"the run folder {run_dir} cannot be written: {error.strerror}. Choose another "
        "--run-dir, or make it writable."
    )


def _names(flags: Sequence[str]) -> set[str]:
    """Megatron's names of the arguments that flags set: --rotary-percent 0.5 is rotary_percent."""
    return {word.removeprefix("--").replace("-", "_") for word in flags if word.startswith("--")}
