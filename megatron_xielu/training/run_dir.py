"""The folder of one run, and whether this recipe may go on in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_xielu.checkpoint.run import check_arguments, open_run
from megatron_xielu.checkpoint.torch_dist import INDEX, TorchDistReader
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe, diff, load_recipe, to_yaml

RECIPE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
_LATEST = "latest_checkpointed_iteration.txt"
# what may differ between two starts of one run: how it is computed, reported and saved, and how
# long it goes on; all else would make it another run
_MAY_CHANGE = (
    "checkpoint.",
    "logging.",
    "parallel.",
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
    return int(path.read_text()) if path.is_file() else 0


def claim(run_dir: Path, recipe: Recipe, *, progress: Callable[[str], None]) -> int:
    """Make or re-enter a run folder and write the recipe into it.

    Returns:
        The step to go on from, 0 for a new run.

    Raises:
        UserError: the folder cannot be written, or holds a run of another recipe or model.
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
        check_arguments(reader, recipe)
        reader.check_files(reader.keys())
    _write(run_dir, recipe)
    _remove_unfinished(run_dir, step, progress)
    return step


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


def _write(run_dir: Path, recipe: Recipe) -> None:
    try:
        (run_dir / LOGS).mkdir(parents=True, exist_ok=True)
        (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
        partial = run_dir / f".{RECIPE}.{os.getpid()}"
        partial.write_text(to_yaml(recipe), encoding="utf-8")
        partial.replace(run_dir / RECIPE)
    except OSError as error:
        raise UserError(
            f"the run folder {run_dir} cannot be written: {error.strerror}. Choose another "
            "--run-dir, or make it writable."
        ) from error


def _remove_unfinished(run_dir: Path, step: int, progress: Callable[[str], None]) -> None:
    # a save that was cut off leaves a folder without its index, which the next save would trip over
    for folder in sorted((run_dir / CHECKPOINTS).glob("iter_*")):
        if int(folder.name.removeprefix("iter_")) > step and not (folder / INDEX).is_file():
            shutil.rmtree(folder)
            progress(f"removed {folder}: its save was cut off")
