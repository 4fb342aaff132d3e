"""`docker run` for one machine: `launch local` in the image, with what it needs of the machine."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_xielu.errors import UserError
from megatron_xielu.launch.job import Job, Setting, name_of, settings
from megatron_xielu.launch.local import meeting_point, own_address, wrapped
from megatron_xielu.launch.mounts import Mount, mounts, parse
from megatron_xielu.recipes import Recipe

# for what is not the save: ending torchrun and writing logs
_MARGIN = 60
_INFINIBAND = Path("/dev/infiniband")
# of the image
_CACHE = Path("/cache")
# what a user sets for the libraries in this shell, of which a container would know nothing
_FORWARDED = ("NCCL_", "TORCH_NCCL_", "GLOO_", "NVTE_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
# names of this machine's network, which a container has only with several machines
_OF_THE_NETWORK = ("NCCL_SOCKET_", "NCCL_IB_", "NCCL_NET", "GLOO_SOCKET_")


def render(
    job: Job, *, image: str, head: str | None = None, volumes: Sequence[str] = (), cpu: bool = False
) -> str:
    """The command of this machine as a shell script, with the reasons.

    In the container `launch local` starts the ranks, so that addresses, process ids and the limits
    of this machine are looked at where they count.

    Args:
        head: where the nodes meet; None on one node.
        volumes: FOLDER[:TARGET[:ro]], besides what the run reads and writes.
        cpu: the container gets no GPUs.

    Raises:
        UserError: the recipe, the meeting point or a volume is wrong.
    """
    recipe = job.load()
    folder = job.folder(recipe).absolute()
    if job.nodes > 1:
        # said here already; the container looks again
        own_address(*meeting_point(job, head))
    given = [parse(volume) for volume in volumes]
    if all(mount.target != _CACHE for mount in given):
        given.append(Mount(_cache(), _CACHE))
    mounted = mounts(job, recipe, given)
    # a bind mount of what is missing is refused
    made = [mount.source for mount in mounted if mount.target in (_CACHE, folder.parent)]
    words = ["docker", "run", "--rm", "--name", name_of(folder)]
    reasons = []
    for option, reason in _options(job, recipe, cpu):
        words += option
        if reason:
            # without its value, which may be of several lines
            reasons.append(f"# {' '.join(option).partition('=')[0]}: {reason}")
    for mount in mounted:
        mode = ",readonly" if mount.read_only else ""
        words += ["--mount", f"type=bind,source={mount.source},target={mount.target}{mode}"]
    words += ["--workdir", str(Path.cwd()), image, *_inner(job, folder, head)]
    lines = ["#!/bin/sh"]
    if job.nodes > 1:
        lines.append(f"# of {job.nodes} nodes this one; the others give the same")
    return "\n".join(
        [*lines, *reasons, f"mkdir -p {shlex.join(map(str, made))}", f"exec {wrapped(words)}", ""]
    )


def _options(job: Job, recipe: Recipe, cpu: bool) -> list[tuple[list[str], str]]:
    """Each with its reason."""
    found: list[tuple[list[str], str]] = []
    if not cpu:
        found += [
            (["--gpus", "all"], ""),
            (["--ulimit", "memlock=-1"], "NCCL locks memory, which needs more than Docker allows"),
            (["--ulimit", "stack=67108864"], "NVIDIA's advice for its PyTorch image"),
            (
                ["--ulimit", "nofile=65536"],
                "ranks open files for each other; Docker 29 allows 1,024",
            ),
        ]
    found.append((["--ipc", "host"], "ranks meet in /dev/shm, of which a container has 64 MB"))
    if job.nodes > 1:
        found.append((["--network", "host"], "the nodes meet at this machine's own address"))
        if _INFINIBAND.exists():
            found.append((["--device", str(_INFINIBAND)], "RDMA, without which NCCL takes TCP"))
    grace = job.stop_seconds + _MARGIN
    reason = f"`docker stop` kills after 10 s otherwise; the ranks get {job.stop_seconds} s to save"
    found.append((["--stop-timeout", str(grace)], reason))
    found.append((["--user", f"{os.getuid()}:{os.getgid()}"], "what is written belongs to you"))
    for setting in _variables(job, recipe):
        found.append((["--env", f"{setting.name}={setting.value}"], setting.reason))
    return found


def _variables(job: Job, recipe: Recipe) -> list[Setting]:
    ours = settings(recipe, job.megatron_flags, job.fabric)
    left_out = {setting.name for setting in ours}
    if job.nodes == 1:
        left_out |= {name for name in os.environ if name.startswith(_OF_THE_NETWORK)}
    theirs = [
        Setting(name, value, "is set in this shell")
        for name, value in sorted(os.environ.items())
        if name.startswith(_FORWARDED) and name not in left_out
    ]
    return [*theirs, *ours]


def _inner(job: Job, folder: Path, head: str | None) -> list[str]:
    words = ["launch", "local", job.recipe, "--submit", "--run-dir", str(folder)]
    words += ["--nodes", str(job.nodes), "--gpus-per-node", str(job.gpus_per_node)]
    words += ["--stop-seconds", str(job.stop_seconds)]
    if job.nodes > 1:
        words += ["--head", str(head)]
    if job.fabric is not None:
        words += ["--fabric", job.fabric]
    words += job.overrides
    return [*words, *(["--", *job.megatron_flags] if job.megatron_flags else [])]


def _cache() -> Path:
    """For compiled kernels, which would be compiled again by each container."""
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser().absolute() / "megatron_xielu-image"


def submit(script: str) -> None:
    """Become the script.

    Raises:
        UserError: there is no docker here.
    """
    if shutil.which("docker") is None:
        raise UserError(
            "docker is not here: keep the script and give it to `sh` on a machine with Docker"
        )
    sys.stdout.flush()
    os.execv("/bin/sh", ["sh", "-c", script])
