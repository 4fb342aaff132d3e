"""What an export wrote: another one replaces it only while it is still exactly that.

`megatron_xielu_export.json` lies in the folder and holds size and time of every other file, so that
nothing which was put there later is lost: fine-tuned weights, checkpoints of a trainer, notes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_xielu.errors import UserError

MANIFEST = "megatron_xielu_export.json"
_FORMAT = 2
_REMEDY = "Nothing is overwritten: choose a new folder, or move that one away."
_SHOWN = 5


def save(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of a folder that has everything else.

    Args:
        about: what was exported, for people.
    """
    content = {"format": _FORMAT, **about, "files": _files(folder)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def refuse_changed(out_dir: Path) -> None:
    """Raises UserError where something exists that is no export, or no longer what it wrote."""
    if not out_dir.exists():
        return
    path = out_dir / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{out_dir} exists and is not an export of this program (it has no {MANIFEST}). "
            + _REMEDY
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written = content["files"] if content["format"] == _FORMAT else None
    except (ValueError, KeyError, TypeError):
        written = None
    if not isinstance(written, dict):
        raise UserError(
            f"{path} does not list what the export wrote, as of an older version of this program, "
            f"so nobody knows what was put there later. {_REMEDY}"
        )
    found = _files(out_dir)
    differences = {
        "added": found.keys() - written.keys(),
        "changed": {name for name in found.keys() & written.keys() if found[name] != written[name]},
        "removed": written.keys() - found.keys(),
    }
    if any(differences.values()):
        told = "; ".join(f"{what}: {_shown(names)}" for what, names in differences.items() if names)
        raise UserError(f"{out_dir} is no longer what the export wrote ({told}). {_REMEDY}")


def _files(folder: Path) -> dict[str, dict[str, int]]:
    """What lies in a folder beside the manifest; folders end with a slash."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST:
            stat = path.lstat()
            name = f"{path.name}/" if path.is_dir() else path.name
            found[name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return found


def _shown(names: set[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more
