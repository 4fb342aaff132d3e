"""What a container of a run sees of its machine: the same for Docker and for Slurm's pyxis."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_xielu.errors import UserError
from megatron_xielu.launch.job import Job
from megatron_xielu.recipes import Recipe, preset_names


@dataclass(frozen=True)
class Mount:
    """A folder or file of the machine, and where it is in the container."""

    source: Path
    target: Path
    read_only: bool = False


def parse(volume: str) -> Mount:
    """FOLDER[:TARGET[:ro]].

    Raises:
        UserError: it is something else.
    """
    source, _, rest = volume.partition(":")
    target, _, mode = rest.partition(":")
    mount = Mount(Path(source), Path(target or source), mode == "ro")
    if mode not in ("", "ro") or not (mount.source.is_absolute() and mount.target.is_absolute()):
        raise UserError(
            f"--volume {volume} must be FOLDER[:TARGET[:ro]] with whole paths, as in "
            "/mnt/books:/data:ro"
        )
    return mount


def mounts(job: Job, recipe: Recipe, given: Sequence[Mount] = ()) -> list[Mount]:
    """What the user gave, and under its own path what else the run reads and writes.

    That is the folder it is started in, the folder that its run folder lies in, its data and the
    file of its recipe. A path that lies in the target of a given mount is one of the container's.

    Raises:
        UserError: a path holds what separates paths from each other.
    """
    wanted = [(Path.cwd(), False), (job.folder(recipe).absolute().parent, False)]
    if recipe.data.path is not None:
        wanted.append((Path(recipe.data.path).absolute(), True))
    if job.recipe not in preset_names():
        wanted.append((Path(job.recipe).absolute(), True))
    found = list(given)
    for path, read_only in wanted:
        if not _holds(given, path):
            # where a link leads to must be there as well
            for each in (path, path.resolve()):
                if not _holds(found, each):
                    found.append(Mount(each, each, read_only))
    for mount in found:
        for path in (mount.source, mount.target):
            if separator := re.search(r'[,:"\n]', str(path)):
                raise UserError(
                    f"{path} cannot be mounted into a container, whose mounts are separated by "
                    f"{separator.group()!r}: give it through a link without one"
                )
    # one mounted later would hide what lies in it
    return sorted(found, key=lambda mount: len(mount.target.parts))


def _holds(found: Sequence[Mount], path: Path) -> bool:
    return any(path.is_relative_to(mount.target) for mount in found)
