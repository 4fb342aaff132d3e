"""What a person sees of the saved steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_xielu.checkpoint import manifest as manifests
from megatron_xielu.checkpoint.store import Store
from megatron_xielu.errors import UserError

_WIDTHS = (9, 11, 6, 25, 22)


def table(store: Store) -> str:
    """A line per step: size, files, when and by which ranks it was saved, and its state.

    The state follows from names and sizes; `verify` reads the files.
    """
    latest = store.latest()
    rows = [_row("step", "size", "files", "saved", "ranks", "state")]
    for step in store.steps():
        problems = store.problems(step)
        rows.append(_row(str(step), *_numbers(store, step), _state(problems, step == latest)))
    return "\n".join(rows)


def verify(store: Store, steps: Sequence[int], *, report: Callable[[str], None]) -> bool:
    """Read every file of some steps, or of all; returns whether all of it is as it was saved.

    Raises:
        UserError: a step that is not there.
    """
    known = store.steps()
    if unknown := sorted(set(steps) - set(known)):
        raise UserError(
            f"{store.folder} has no step {unknown[0]}; it has {', '.join(map(str, known))}"
        )
    sound = True
    for step in steps or known:
        problems = store.problems(step, checksums=True)
        sound = sound and not problems
        report(f"step {step}: {_verdict(store, step, problems)}")
        for problem in problems:
            report(f"  {problem}")
    return sound


def _verdict(store: Store, step: int, problems: Sequence[str]) -> str:
    if problems:
        return "damaged"
    manifest = manifests.load(store.path(step))
    if manifest is None:
        return "complete by its index; without a manifest nothing more can be told"
    return f"whole, {len(manifest.files)} files, {_size(manifest.size)}"


def _state(problems: Sequence[str], latest: bool) -> str:
    state = f"damaged: {problems[0]}" if problems else "whole"
    return f"{state}, latest" if latest else state


def _numbers(store: Store, step: int) -> tuple[str, str, str, str]:
    try:
        manifest = manifests.load(store.path(step))
    except ValueError:
        manifest = None
    if manifest is None:
        return "-", "-", "-", "-"
    about = manifest.about
    ranks = (
        f"{about['world_size']}: TP {about['tensor_model_parallel_size']}, "
        f"PP {about['pipeline_model_parallel_size']}, DP {about['data_parallel_size']}"
    )
    return _size(manifest.size), str(len(manifest.files)), about["time"], ranks


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def _row(*cells: str) -> str:
    *aligned, last = cells
    parts = [cell.rjust(width) for cell, width in zip(aligned, _WIDTHS, strict=True)]
    return "  ".join([*parts, last])
