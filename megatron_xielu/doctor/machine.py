"""What is installed and found here, beside the versions that this project is tested with."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_xielu.ops.cpu import build
from megatron_xielu.training import transformer_engine
from megatron_xielu.training.resolve import Machine
from megatron_xielu.training.transformer_engine import Found

# names the file where there is no source beside the package; the project's image sets it
VERSIONS_VARIABLE = "MEGATRON_XIELU_VERSIONS"


@dataclass(frozen=True)
class Part:
    """One line of the list; found is None for what is not there."""

    name: str
    found: str | None
    tested: str | None = None
    note: str = ""

    def __str__(self) -> str:
        tested = ""
        if self.tested is not None:
            tested = "as tested" if self.tested == self.found else f"tested with {self.tested}"
        return f"  {self.name:<20}{self.found or 'not found':<36} {tested or self.note}".rstrip()


def parts(transformer_engine_found: Found) -> list[Part]:
    """Everything that matters to a run, whether it is there or not."""
    tested, te = tested_versions(versions_file()), transformer_engine_found
    found = [
        Part("Python", platform.python_version()),
        *(
            Part(name, version(name), tested.get(name))
            for name in ("torch", "megatron-core", "numpy", "transformers")
        ),
        Part("Triton", version("triton"), note="GPU kernels"),
        Part("C++ compiler", _compiler(), note="CPU kernels, built on first use"),
        Part(
            "TransformerEngine",
            te.version,
            # what is wrong with it matters more
            None if _why_not(te) else tested.get("transformer-engine"),
            note=_why_not(te),
        ),
        Part("Apex", _apex(), note="optional: fuses the accumulation of gradients"),
        Part("DeepSpeed", version("deepspeed"), note="optional"),
        Part("CUDA", torch.version.cuda, note="that torch is built for"),
        Part("GPU driver", driver()),
        Part("NCCL", _nccl()),
        Part("cuDNN", _cudnn()),
        Part("CPU cores", str(os.cpu_count())),
    ]
    for name, major, minor in te.gpus:
        found.append(Part("GPU", name, note=f"compute capability {major}.{minor}"))
    if not te.gpus:
        found.append(Part("GPU", None, note=why_no_gpu()))
    return found


def versions_file() -> Path:
    """The tested versions: $MEGATRON_XIELU_VERSIONS, or of the source, which a wheel lacks."""
    if path := os.environ.get(VERSIONS_VARIABLE):
        return Path(path)
    return Path(__file__).parents[2] / "docker/versions.toml"


def tested_versions(path: Path) -> dict[str, str]:
    """Package to version, from docker/versions.toml; empty without the file."""
    if not path.exists():
        return {}
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return {**tables["packages"], **tables["base"]}


def version(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        # a local version (torch 2.13.0+cu130) says how it was built, not what it is
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """The version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def why_no_gpu() -> str:
    """The likeliest reason for which torch sees none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty"
    if driver() is None:
        return "no driver answers (nvidia-smi)"
    return "there is a driver, and torch finds no GPU: is it too old for torch's CUDA?"


def _why_not(te: Found) -> str:
    if te.error is None or te.version is None:
        return "needed for FP8" if te.version is None else ""
    return f"cannot be imported: {te.error}"


def _compiler() -> str | None:
    try:
        command = [build.compiler(), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError, RuntimeError):
        return None
    # without who packaged it
    return re.sub(r" \(.*?\)", "", next(iter(done.stdout.splitlines()), "")) or None


def _apex() -> str | None:
    if Machine.detect().has_gradient_fusion:
        return version("apex") or "present"
    # a package index has another one of this name
    return "without its extensions" if importlib.util.find_spec("apex") else None


def _nccl() -> str | None:
    if torch.version.cuda is None or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _cudnn() -> str | None:
    found = torch.backends.cudnn.version() if torch.version.cuda else None
    return None if found is None else f"{found // 10000}.{found // 100 % 100}.{found % 100}"


def probe() -> Found:
    """TransformerEngine and the GPUs, asked by a process of its own."""
    return transformer_engine.probe()
