"""What is launched: a recipe on some nodes, checked before any scheduler hears of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_xielu.errors import UserError
from megatron_xielu.launch.join import STOP_SECONDS
from megatron_xielu.recipes import Recipe, check, load_recipe

# Megatron's fully sharded data parallelism wants the opposite
_FSDP = {"--use-torch-fsdp2", "--use-megatron-fsdp"}
_CUTS = {"--tensor-model-parallel-size", "--context-parallel-size"}


Fabric = Literal["infiniband", "roce", "efa", "ethernet"]
FABRICS: tuple[str, ...] = get_args(Fabric)
"""What connects the machines."""


@dataclass(frozen=True)
class Setting:
    """An environment variable and why it is set."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run on several machines."""

    recipe: str
    """A preset's name or a YAML file."""
    overrides: tuple[str, ...] = ()
    megatron_flags: tuple[str, ...] = ()
    nodes: int = 1
    gpus_per_node: int = 1
    run_dir: Path | None = None
    """None means runs/ and the recipe's name."""
    stop_seconds: int = STOP_SECONDS
    """What a stopped run gets to end its step and save."""
    fabric: Fabric | None = None
    """None leaves the choice of a network to NCCL."""

    def load(self) -> Recipe:
        """The recipe, on as many ranks.

        Raises:
            UserError: it cannot run on them.
        """
        recipe = load_recipe(self.recipe, self.overrides)
        check(recipe, self.nodes * self.gpus_per_node)
        return recipe

    def folder(self, recipe: Recipe) -> Path:
        """The run folder."""
        return self.run_dir or Path("runs") / recipe.name

    def arguments(self, folder: Path) -> list[str]:
        """Of `megatron-xielu`: the command that every rank runs."""
        words = ["pretrain", "--recipe", self.recipe, "--run-dir", str(folder), *self.overrides]
        return [*words, *(["--", *self.megatron_flags] if self.megatron_flags else [])]


def name_of(folder: Path) -> str:
    """A job's name, which Slurm's chain and Kubernetes know the run by: that of its folder.

    Raises:
        UserError: Kubernetes, whose rules are the stricter ones, would not take it.
    """
    name = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    if not name or len(name) > 50:
        raise UserError(
            f"the run folder's name {folder.name!r} names the job, so it needs 1 to 50 letters, "
            "digits and dashes: choose another --run-dir"
        )
    return name


# the sources of each are in docs/operations.md, Fabrics
_VERBS = Setting("NCCL_NET", "IB", "without RDMA NCCL then fails, instead of going on over TCP")
_NETWORKS: dict[Fabric | None, list[Setting]] = {
    None: [],
    "infiniband": [_VERBS],
    # no NCCL_IB_GID_INDEX: NCCL finds it since 2.21, and it need not be the same on all machines
    "roce": [_VERBS],
    "efa": [
        Setting("NCCL_NET_PLUGIN", "ofi", "NVIDIA's image names another plugin since 26.06"),
        Setting("NCCL_NET", "Libfabric", "without that plugin NCCL fails, not going on over TCP"),
    ],
    "ethernet": [
        Setting("NCCL_NET", "Socket", "TCP is meant: a card that could do RDMA is not tried")
    ],
}


def settings(
    recipe: Recipe, megatron_flags: Sequence[str], fabric: Fabric | None = None
) -> list[Setting]:
    """The variables that matter to every rank, whatever starts it."""
    variables = list(_NETWORKS[fabric])
    if wants_one_connection(recipe, megatron_flags):
        reason = (
            "before Blackwell, tensor and context parallelism rely on kernels starting in order"
        )
        variables.append(Setting("CUDA_DEVICE_MAX_CONNECTIONS", "1", reason))
    return variables


def wants_one_connection(recipe: Recipe, megatron_flags: Collection[str]) -> bool:
    """Whether Megatron asserts CUDA_DEVICE_MAX_CONNECTIONS=1; FSDP asserts that it is not 1."""
    flags = {flag.partition("=")[0] for flag in megatron_flags}
    cut = recipe.parallel.tensor_model_parallel_size > 1 or bool(_CUTS & flags)
    return cut and not _FSDP & flags
