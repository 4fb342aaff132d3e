"""What a whole checkpoint consists of, written last and checked before anything is loaded.

`manifest.json` lies in the step's folder and holds the size and SHA-256 of every other file. Each
rank describes the files it wrote, so the work is spread as the writing was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_FORMAT = 1
_SHARD_SUFFIX = ".distcp"


@dataclass(frozen=True)
class FileRecord:
    """One file as it was written; size in bytes."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """One step's files by name, and what wrote them."""

    step: int
    files: Mapping[str, FileRecord]
    about: Mapping[str, Any]
    """When, from how many ranks in which layout, by which versions; for people."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())


def describe(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and checksum of files of `folder`; raises OSError where one cannot be read."""
    return {name: _describe(folder / name) for name in names}


def save(manifest: Manifest, folder: Path) -> None:
    """Write the manifest into `folder`, on disk before this returns."""
    content = {"format": _FORMAT, **asdict(manifest)}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def load(folder: Path) -> Manifest | None:
    """The manifest of a step's folder; None if it has none, as stock Megatron's do not.

    Raises:
        ValueError: there is one that cannot be read.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"{path} has format {content['format']}, known is {_FORMAT}")
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        return Manifest(content["step"], files, content["about"])
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error


def problems(folder: Path, manifest: Manifest, *, checksums: bool) -> list[str]:
    """What is wrong with the files of a step, one line each, in the order of their names.

    Args:
        checksums: also read every byte; without it, a look at the sizes.
    """
    found = [_size_problem(folder, name, record) for name, record in manifest.files.items()]
    strangers = [
        f"{path.name} is not one of this checkpoint's files"
        for path in folder.glob(f"*{_SHARD_SUFFIX}")
        if path.name not in manifest.files
    ]
    if checksums:
        sound = [name for name, wrong in zip(manifest.files, found, strict=True) if wrong is None]
        found += _checksum_problems(folder, manifest, sound)
    return sorted([problem for problem in found if problem] + strangers)


def _describe(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(os.fstat(file.fileno()).st_size, digest)


def _size_problem(folder: Path, name: str, record: FileRecord) -> str | None:
    try:
        size = (folder / name).stat().st_size
    except FileNotFoundError:
        return f"{name} is missing"
    if size < record.size:
        return f"{name} is cut short: {size:,} of {record.size:,} bytes"
    if size > record.size:
        return f"{name} is too long: {size:,} instead of {record.size:,} bytes"
    return None


def _checksum_problems(folder: Path, manifest: Manifest, names: Sequence[str]) -> list[str | None]:
    def check(name: str) -> str | None:
        try:
            same = _describe(folder / name) == manifest.files[name]
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return None if same else f"{name} has other content than was saved"

    # hashing releases Python's lock, so threads use all cores
    with ThreadPoolExecutor() as pool:
        return list(pool.map(check, names))
