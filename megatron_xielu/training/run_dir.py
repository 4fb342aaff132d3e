"""The folder of one run, and whether this recipe may go on in it."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from megatron_xielu.checkpoint.run import check_arguments
from megatron_xielu.checkpoint.store import Store
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.data.manifest import DatasetInfo
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe, diff, load_recipe, to_yaml
from megatron_xielu.training import changes

RECIPE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
FLAGS = "megatron_flags.txt"
BF16_LAYERS = "fp8_bf16_layers.json"
"""The layers that `fp8.on_outlier=bf16_layer` took out of FP8, and from which step on."""


def store(run_dir: Path, recipe: Recipe) -> Store:
    """The run's checkpoints, kept as the recipe says."""
    kept = recipe.checkpoint
    return Store(run_dir / CHECKPOINTS, kept.keep_last, kept.keep_every, to_yaml(recipe))


def latest_step(run_dir: Path) -> int:
    """The step that training goes on from, 0 if it begins."""
    return Store(run_dir / CHECKPOINTS).latest()


def claim(
    run_dir: Path,
    recipe: Recipe,
    *,
    megatron_flags: Sequence[str] = (),
    data: DatasetInfo | None = None,
    allowed: Collection[str] = (),
    progress: Callable[[str], None],
) -> int:
    """Make or re-enter a run folder and write the recipe into it.

    No other process takes the folder until this one and the ranks it starts have ended.

    Args:
        megatron_flags: what the user gave to Megatron beside the recipe, kept for the next start.
        data: what the run reads, if it is a data folder.
        allowed: recipe keys that may change although they change the result.

    Returns:
        An open file that holds the folder's lock; child processes that inherit it hold it too.

    Raises:
        UserError: the folder cannot be written, is in use, or holds a run of another recipe or
            model, or one with layers that this recipe cannot keep out of FP8.
    """
    # weights alone, step 0, are of no run: it may be any that holds them
    has_saved = any(Store(run_dir / CHECKPOINTS).steps())
    if (run_dir / RECIPE).is_file():
        _check_same_run(run_dir, recipe, data, allowed if has_saved else None, progress)
    elif has_saved:
        raise UserError(
            f"{run_dir} has {CHECKPOINTS}/ but no {RECIPE}, so nothing says what they are. Put the "
            "run's recipe back or choose another --run-dir."
        )
    lock = _lock(run_dir)
    checkpoints = store(run_dir, recipe)
    checkpoints.recover(progress)
    step = _whole_step(checkpoints, recipe, progress)
    _check_bf16_layers(run_dir / BF16_LAYERS, recipe, step)
    loaded = checkpoints.path(step)
    if loaded.is_dir():
        reader = TorchDistReader(loaded)
        overridden = _names(megatron_flags) | changes.megatron_names(allowed)
        check_arguments(reader, recipe, overridden=overridden)
    _write(run_dir, recipe, megatron_flags, data, progress)
    return lock


def _whole_step(checkpoints: Store, recipe: Recipe, progress: Callable[[str], None]) -> int:
    """The step to go on from, every byte of it checked; 0 to begin."""
    step = checkpoints.latest()
    saved = step or checkpoints.path(0).is_dir()
    damage = checkpoints.problems(step, checksums=True) if saved else []
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


def _check_bf16_layers(record: Path, recipe: Recipe, step: int) -> None:
    """Raises UserError where layers that left FP8 by `step` would have to go back into it."""
    fp8 = recipe.fp8
    if fp8.recipe == "off" or not record.is_file():
        return
    try:
        layers = [each["layer"] for each in json.loads(record.read_text()) if each["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{record} cannot be read ({error!r}): put back what the run wrote, or remove it to "
            "take all layers back into FP8"
        ) from error
    if layers and not fp8.fused and not fp8.emulate:
        raise UserError(
            f"fp8.fused=false cannot go on with this run: fc2 left FP8 in layer "
            f"{', '.join(map(str, layers))} (fp8.on_outlier=bf16_layer), and TransformerEngine's "
            f"own modules quantize every input. Set fp8.fused=true, or remove {record} to take "
            "them back into FP8."
        )


def _check_same_run(
    run_dir: Path,
    recipe: Recipe,
    data: DatasetInfo | None,
    allowed: Collection[str] | None,
    progress: Callable[[str], None],
) -> None:
    """`allowed` None means that nothing is saved yet, so that everything may change."""
    found = diff(load_recipe(str(run_dir / RECIPE)), recipe)
    in_result = changes.data_changes(found, run_dir, data)
    if allowed is not None:
        changes.check_changes(in_result, run_dir, allowed)
    for change in [*found, *(c for c in in_result if c not in found)]:
        progress(f"changed since the last start: {change}")


def _write(
    run_dir: Path,
    recipe: Recipe,
    flags: Sequence[str],
    data: DatasetInfo | None,
    progress: Callable[[str], None],
) -> None:
    try:
        given = run_dir / FLAGS
        before = given.read_text() if given.is_file() else ""
        if before != shlex.join(flags) and (run_dir / RECIPE).is_file():
            progress(f"Megatron flags since the last start: {before!r} -> {shlex.join(flags)!r}")
        given.write_text(shlex.join(flags))
        if data is not None:
            (run_dir / changes.DATA).write_text(f"{changes.fingerprint(data)}\n")
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
