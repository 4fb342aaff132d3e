"""Installs what the package needs beside what the base image brings, in `docker build`.

install.py PROJECT EXTRA... writes pip's constraints, installs the dependencies of these extras
under them, and fails if a package of the base has another version afterwards.

NVIDIA's images set a constraint file for pip that contradicts Megatron-Core (packaging), and
without one pip may replace their torch by the package index's. The constraints written here take
the place of the base's, in images built on this one too.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

# compiled against each other in the base image
KEPT = re.compile(
    r"(pytorch-)?(torch|triton)|torchvision|torchaudio|torchao|transformer-engine(-.*)?|apex"
    r"|flash-attn(-.*)?|(nvidia|cuda)-.*"
)


def normalized(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Every distribution here, by normalized name."""
    return {normalized(each.name): each.version for each in importlib.metadata.distributions()}


def kept(base: Mapping[str, str]) -> dict[str, str]:
    """What must stay as it is, of what the base has."""
    return {name: version for name, version in base.items() if KEPT.fullmatch(name)}


def constraints(keep: Mapping[str, str], pinned: str) -> list[str]:
    """The lines of `pinned` (constraints.txt), except where the base decides."""
    ours = [line for line in pinned.splitlines() if "==" in line and not line.startswith("#")]
    lines = [line for line in ours if normalized(line.partition("==")[0]) not in keep]
    return sorted([*lines, *(f"{name}=={version}" for name, version in keep.items())])


def requirements(project: Mapping[str, list[str]], extras: Iterable[str], name: str) -> set[str]:
    """What the extras ask for, where they ask for one another as well."""
    found: set[str] = set()
    for extra in extras:
        for text in project[extra]:
            if own := re.fullmatch(rf"{re.escape(name)}\[(.*)\]", text):
                found |= requirements(project, own[1].split(","), name)
            else:
                found.add(text)
    return found


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """One line for each package of `before` that is another one, or none, in `after`."""
    return [
        f"{name} was {version} and is {after.get(name, 'gone')}"
        for name, version in before.items()
        if after.get(name) != version
    ]


def main(source: Path, *extras: str) -> str | None:
    """Install; what went wrong, or None."""
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    keep = kept(installed())
    if "torch" not in keep:
        return "the base image has no torch; name one that does: --build-arg BASE_IMAGE=..."
    wanted = requirements(project["optional-dependencies"], extras, project["name"])
    # the package itself is built with the pinned setuptools
    wanted |= {*project["dependencies"], "setuptools"}
    Path(os.environ["PIP_CONSTRAINT"]).write_text(
        "\n".join(constraints(keep, (source / "constraints.txt").read_text("utf-8"))) + "\n"
    )
    pip = [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--no-warn-script-location"]
    subprocess.run([*pip, *sorted(wanted)], check=True)
    if wrong := changes(keep, installed()):
        return "the base image's packages changed:\n  " + "\n  ".join(wrong)
    print("kept from the base image:", *(f"\n  {name} {keep[name]}" for name in sorted(keep)))
    for name in ("transformer-engine", "apex"):
        if name not in keep:
            print(f"the base image has no {name}")
    return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
