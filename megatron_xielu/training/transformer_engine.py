"""Whether this machine's TransformerEngine and GPUs can do what a run asks of them.

Its import fails in many ways (an extension built for another torch, libraries of another CUDA, a
package without its extension), and Megatron takes some of them for a machine without it. So a
process of its own tries the import before any rank starts, which keeps this one off the GPUs too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from megatron_xielu.errors import UserError

MIN_VERSION = Version("2.17")
"""The first whose operation fuser takes joint fusions from outside."""

_PROBE = "megatron_xielu.mcore.te_probe"
# of an import that takes a few seconds where the disk is fast
_PATIENCE = 120


@dataclass(frozen=True)
class Needs:
    """What a recipe needs of a GPU; capabilities and versions as (major, minor)."""

    capability: tuple[int, int]
    below: tuple[int, int] = (1000, 0)
    cuda: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        text = f"compute capability {_dotted(self.capability)} or newer"
        if self.below < (1000, 0):
            text += f" and below {_dotted(self.below)}"
        if self.cuda > (0, 0):
            text += f", and CUDA {_dotted(self.cuda)} or newer"
        return text


# check_fp8_support, check_fp8_block_scaling_support and check_mxfp8_support in
# transformer_engine.pytorch.quantization
NEEDS = {
    "delayed": Needs((8, 9)),
    "tensorwise": Needs((8, 9)),
    "blockwise": Needs((9, 0), cuda=(12, 9)),
    "mxfp8": Needs((10, 0), below=(12, 0)),
}


@dataclass(frozen=True)
class Found:
    """What importing TransformerEngine gave on this machine."""

    version: str | None
    error: str | None
    """The exception's type and text."""
    cuda: str | None
    """The version that torch is built for."""
    gpus: tuple[tuple[str, int, int], ...]
    """Name and compute capability."""
    memory: tuple[int, ...] = ()
    """Bytes of each GPU."""


def probe() -> Found:
    """Imports TransformerEngine in another process; takes a few seconds."""
    command = [sys.executable, "-m", _PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        error = f"the process that imported it did not end within {_PATIENCE} s"
        return Found(None, error, None, ())
    if done.returncode:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        said = done.stderr.strip().splitlines()[-1:]
        error = ": ".join([f"the process that imported it ended with {how}", *said])
        return Found(None, error, None, ())
    found = json.loads(done.stdout.splitlines()[-1])
    gpus = tuple((name, major, minor) for name, major, minor in found.pop("gpus"))
    memory = tuple(found.pop("memory"))
    return Found(**found, gpus=gpus, memory=memory)


def check(fp8_recipe: str, found: Found) -> None:
    """Raises UserError where a run with TransformerEngine would fail on what was found.

    Args:
        fp8_recipe: the recipe's `fp8.recipe`.
    """
    wanted, instead = "model.transformer_impl=transformer_engine", "model.transformer_impl=local"
    if fp8_recipe != "off":
        wanted, instead = f"fp8.recipe={fp8_recipe}", "fp8.recipe=off model.transformer_impl=local"
    name = f"TransformerEngine {found.version}" if found.version else "TransformerEngine"
    remedy = f"Install it anew, or set {instead}:\n  {reinstall_command(found.cuda)}"
    if found.error is not None:
        raise UserError(
            f"{wanted} cannot run here: {name} cannot be imported:\n  {found.error}\n{remedy}"
        )
    if _release(found.version) < MIN_VERSION:
        raise UserError(
            f"{wanted} cannot run here: this is {name}, and {MIN_VERSION} or newer is needed. "
            f"{remedy}"
        )
    if fp8_recipe != "off":
        _check_gpus(fp8_recipe, found)


def can_run(fp8_recipe: str, capability: tuple[int, int], cuda: str | None) -> bool:
    """Whether a GPU of this capability can, with torch built for this version of CUDA."""
    needs = NEEDS[fp8_recipe]
    return needs.capability <= capability < needs.below and _version(cuda) >= needs.cuda


def install_command(cuda: str | None) -> str:
    """The shell command that installs TransformerEngine for torch's version of CUDA."""
    return (
        "pip install --no-build-isolation --no-cache-dir "
        f'"transformer-engine[core_cu{_version(cuda)[0] or 13},pytorch]>={MIN_VERSION}"'
    )


def reinstall_command(cuda: str | None) -> str:
    """The same after removing what is there, so that its extension is built for this torch."""
    names = ("transformer-engine", "transformer-engine-torch")
    cores = ("transformer-engine-cu12", "transformer-engine-cu13")
    return f"pip uninstall -y {' '.join([*names, *cores])}\n  {install_command(cuda)}"


def _check_gpus(fp8_recipe: str, found: Found) -> None:
    def able(recipe: str) -> list[bool]:
        return [can_run(recipe, (major, minor), found.cuda) for _, major, minor in found.gpus]

    if all(able(fp8_recipe)):
        return
    name, major, minor = found.gpus[able(fp8_recipe).index(False)]
    legal = [recipe for recipe in NEEDS if all(able(recipe))]
    raise UserError(
        f"fp8.recipe={fp8_recipe} needs {NEEDS[fp8_recipe]}; this machine has {name} "
        f"({major}.{minor}) and torch for CUDA {found.cuda}. "
        f"Legal here: fp8.recipe={', '.join([*legal, 'off'])}"
    )


def _release(version: str | None) -> Version:
    try:
        # a build of 2.17.0.dev0 has what 2.17 has
        return Version(Version(version or "0").base_version)
    except InvalidVersion:
        return Version("0")


def _version(cuda: str | None) -> tuple[int, int]:
    major, minor, *_ = [*(cuda or "0").split("."), "0"]
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
