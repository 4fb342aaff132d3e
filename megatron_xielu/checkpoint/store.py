"""The folder of a run's checkpoints: a step appears in it whole, or not at all.

A save is written to `.saving/iter_0000020`, gets its manifest, and moves to `iter_0000020` by a
rename. Then Megatron's `latest_checkpointed_iteration.txt` is replaced, which makes it the step
that training goes on from, and the empty `.saving` is removed. Whatever was cut off between two of
these is finished or removed by `recover`, so a kill at any moment leaves the newest whole step.

Step 0 is `release`, as Megatron calls weights alone: training begins from them, with a fresh
optimizer. A conversion writes it, a run never does.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xielu.checkpoint import manifest as manifests
from megatron_xielu.checkpoint.manifest import FileRecord, Manifest
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.errors import UserError
from megatron_xielu.unpickle import INDEX

LATEST = "latest_checkpointed_iteration.txt"
_NEW_LATEST = f".{LATEST}.new"
_WEIGHTS = "release"
_RECIPE = "recipe.yaml"
_SAVING = ".saving"
_REMOVING = ".removing-"
_CORRUPT = ".corrupt"


@dataclass(frozen=True)
class Store:
    """The checkpoints of one run.

    Args:
        folder: the run's `checkpoints`.
        keep_last: how many of the newest steps stay; None keeps all.
        keep_every: steps that are a multiple of it stay as well; None for none.
        recipe: the run's recipe as YAML, put beside every step.
    """

    folder: Path
    keep_last: int | None = None
    keep_every: int | None = None
    recipe: str | None = None

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / (f"iter_{step:07d}" if step else _WEIGHTS)

    def steps(self) -> list[int]:
        """Steps that have a folder, whole or not, in ascending order."""
        names = (path.name for path in self.folder.glob("iter_*"))
        steps = (int(name[5:]) for name in names if re.fullmatch(r"iter_\d{7,}", name))
        return [0] * self.path(0).is_dir() + sorted(step for step in steps if step)

    def latest(self) -> int:
        """The step that training goes on from; 0 if it begins, from weights alone or from none.

        Raises:
            UserError: the file that names it holds no number.
        """
        path = self.folder / LATEST
        if not path.is_file():
            return 0
        text = path.read_text().strip()
        if text == _WEIGHTS and self.path(0).is_dir():
            return 0
        if not text.isdigit():
            whole = max((step for step in self.steps() if not self.problems(step)), default=0)
            raise UserError(
                f"{path} says {text!r} instead of a step number. Write {whole} into it, the newest "
                "whole step, or remove it to start anew."
            )
        return int(text)

    def set_latest(self, step: int) -> None:
        """Make training go on from `step`; what is read is the old number or the new one."""
        self._prepare_latest(step).replace(self.folder / LATEST)
        _sync(self.folder)

    def begin(self, step: int) -> Path:
        """An empty folder to save `step` into; what an earlier attempt left is removed."""
        self.discard()
        staging = self.staging(step)
        staging.mkdir(parents=True)
        if self.recipe is not None:
            (staging / _RECIPE).write_text(self.recipe, encoding="utf-8")
        return staging

    def staging(self, step: int) -> Path:
        """Where `step` is written before it is whole."""
        return self.folder / _SAVING / self.path(step).name

    def discard(self) -> None:
        """Give up the save at work."""
        shutil.rmtree(self.folder / _SAVING, ignore_errors=True)

    def describe(self, step: int, names: Collection[str]) -> dict[str, FileRecord]:
        """Size and checksum of files of the save at work."""
        return manifests.describe(self.staging(step), names)

    def publish(self, step: int, files: Mapping[str, FileRecord], about: Mapping[str, Any]) -> None:
        """Make the saved `step` the latest one.

        Args:
            files: every file of the step, as those who wrote them saw it.

        Raises:
            OSError: the disk is full, or a file is not here as it was written.
            UserError: the step's index names data that was not written.
        """
        staging, final = self.staging(step), self.path(step)
        manifest = Manifest(step, files, about)
        if wrong := manifests.problems(staging, manifest, checksums=False):
            raise OSError(f"{wrong[0]}: do all ranks see the same {self.folder}?")
        TorchDistReader(staging).check_files()
        for name in files:
            _sync(staging / name)
        manifests.save(manifest, staging)
        _sync(staging)
        # a rename needs no room, so nothing can fail between these on a full disk
        latest = self._prepare_latest(step)
        # training went back to an older step and has come here again, or a finished run was started
        replaced = self._set_out(step) if final.exists() else None
        staging.rename(final)
        _sync(self.folder)
        latest.replace(self.folder / LATEST)
        _sync(self.folder)
        (self.folder / _SAVING).rmdir()
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)

    def prune(self, newest: int) -> None:
        """Remove the steps up to `newest` that need not be kept; raises OSError if it cannot."""
        if self.keep_last is None:
            return
        # steps beyond the newest are of a future that was given up; they are the user's to remove
        # and the weights that training began from
        past = [step for step in self.steps() if 0 < step <= newest]
        for step in past[: -self.keep_last]:
            if not self.keep_every or step % self.keep_every:
                self._remove(step)

    def problems(self, step: int, *, checksums: bool = False) -> list[str]:
        """What is wrong with a step, one line each; empty if it is whole.

        Without a manifest, as in checkpoints of other programs, the index says what must be there.
        """
        folder = self.path(step)
        if not folder.is_dir():
            return [f"{folder.name} is missing"]
        try:
            manifest = manifests.load(folder)
            if manifest is None:
                TorchDistReader(folder).check_files()
                return []
        except (UserError, ValueError) as error:
            return [str(error)]
        if manifest.step != step:
            return [f"{manifests.MANIFEST} is of step {manifest.step}"]
        return manifests.problems(folder, manifest, checksums=checksums)

    def recover(self, progress: Callable[[str], None]) -> None:
        """Finish or remove what a killed process left; nothing else may be at work here."""
        for leftover in self.folder.glob(f"{_REMOVING}*"):
            step = int(leftover.name.rpartition("_")[2])
            if step == self.latest() and not self.path(step).exists():
                # it was to be replaced by a new save of the same step
                leftover.rename(self.path(step))
            else:
                shutil.rmtree(leftover)
        saving, prepared = self.folder / _SAVING, self.folder / _NEW_LATEST
        if saving.is_dir():
            cut_off = sorted(saving.iterdir())
            published = prepared.read_text() if prepared.is_file() else ""
            if not cut_off and published.isdigit() and self.path(int(published)).is_dir():
                # the kill came after the rename and before the step became the latest
                self.set_latest(int(published))
            shutil.rmtree(saving)
            for path in cut_off:
                progress(f"removed {path}: its save was cut off")
        prepared.unlink(missing_ok=True)
        for step in self.steps():
            # a save of stock Megatron's, which writes in place and its index last
            if step > self.latest() and not (self.path(step) / INDEX).is_file():
                self._remove(step)
                progress(f"removed {self.path(step)}: its save was cut off")

    def newest_whole(self, below: int) -> int:
        """The newest step before `below` that passes every check, checksums too; 0 for none."""
        older = (step for step in reversed(self.steps()) if step < below)
        return next((step for step in older if not self.problems(step, checksums=True)), 0)

    def set_aside(self, step: int) -> Path:
        """Rename a damaged step so that nothing takes it for one; returns where it is now."""
        aside = self.folder / f"{self.path(step).name}{_CORRUPT}"
        shutil.rmtree(aside, ignore_errors=True)
        if self.path(step).exists():
            self.path(step).rename(aside)
        return aside

    def remove(self, steps: Collection[int]) -> None:
        """Remove steps.

        Raises:
            UserError: one of them does not exist or is the latest; nothing is removed then.
        """
        known = self.steps()
        if unknown := sorted(set(steps) - set(known)):
            raise UserError(
                f"{self.folder} has no step {unknown[0]}; it has "
                f"{', '.join(map(str, known)) or 'none'}"
            )
        if self.latest() in steps:
            raise UserError(
                f"step {self.latest()} is the one that training goes on from, so it is not "
                f"removed: write another step into {self.folder / LATEST} first"
            )
        for step in steps:
            self._remove(step)

    def _prepare_latest(self, step: int) -> Path:
        partial = self.folder / _NEW_LATEST
        with partial.open("w") as file:
            file.write(str(step) if step else _WEIGHTS)
            file.flush()
            os.fsync(file.fileno())
        return partial

    def _remove(self, step: int) -> None:
        shutil.rmtree(self._set_out(step))

    def _set_out(self, step: int) -> Path:
        # under another name first: a removal that is cut off leaves no half step
        removing = self.folder / f"{_REMOVING}{self.path(step).name}"
        shutil.rmtree(removing, ignore_errors=True)
        self.path(step).rename(removing)
        return removing


def open_store(path: Path) -> Store:
    """The checkpoints of a run folder, or of its `checkpoints` folder.

    Raises:
        UserError: there are none.
    """
    for folder in (path / "checkpoints", path):
        if Store(folder).steps():
            return Store(folder)
    raise UserError(f"{path} holds no checkpoint: give a run folder after its first save")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
