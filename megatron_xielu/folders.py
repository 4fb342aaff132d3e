"""Write a folder or a file beside its final place, then rename it: complete or not at all."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target` that takes its place when the block succeeds.

    A folder that `target` already names is replaced; if the block or the replacement fails it stays
    as it was and the new folder is removed. Files are on disk before they become visible.

    Raises:
        OSError: the disk is full, or the place cannot be written to.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(target, "new")
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        _move(partial, target)
    finally:
        # after Ctrl-C too; nothing is left to remove when the rename succeeded
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yields a path beside `target` for a file that takes its place when the block succeeds.

    If the block fails nothing is left. The file is on disk before it becomes visible.

    Raises:
        OSError: the disk is full, or the place cannot be written to.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(target, "new")
    try:
        yield partial
        _sync_one(partial)
        partial.rename(target)
        _sync_one(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def leftovers(target: Path) -> list[Path]:
    """What writers of `target` left that were killed, or that are still at work."""
    target = target.resolve()
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.*-*"))


def _sibling(target: Path, purpose: str) -> Path:
    return target.with_name(f".{target.name}.{purpose}-{secrets.token_hex(4)}")


def _sync(folder: Path) -> None:
    """Wait until a folder, its files and its folders are on disk."""
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(partial: Path, target: Path) -> None:
    previous = _sibling(target, "old") if target.is_dir() else None
    if previous is None:
        partial.rename(target)
    else:
        target.rename(previous)
        try:
            partial.rename(target)
        except BaseException:
            previous.rename(target)
            raise
        shutil.rmtree(previous, ignore_errors=True)
