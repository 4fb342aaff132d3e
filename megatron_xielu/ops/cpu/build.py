"""Builds the kernels of `csrc` once per machine and loads them.

The library is built by torch's extension builder into a cache folder, under a name made of the
sources, the flags and torch's version. It holds the kernels of every instruction set and picks
among them when it is loaded, so it may be built in an image and run on another machine:
`python -m megatron_xielu.ops.cpu` does that and prints where it lies.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
# contraction is what makes a fused multiply-add of a * b + c; GCC does so by default, clang not
# across statements
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-Wno-psabi")
CACHE_VARIABLE = "MEGATRON_XIELU_CACHE"

_logger = logging.getLogger("megatron_xielu")


@functools.cache
def load() -> str | None:
    """Load the kernels, building them if this machine has not; why that failed, or None.

    A failure is reported once, as a warning of the logger "megatron_xielu".
    """
    try:
        torch.ops.load_library(built())
    except (OSError, RuntimeError) as error:
        _logger.warning("the CPU kernels of xIELU are not used, plain torch is: %s", error)
        return str(error)
    return None


def cache_folder() -> Path:
    """Where built libraries lie: $MEGATRON_XIELU_CACHE, or megatron_xielu in the user's cache."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "megatron_xielu"


def built() -> Path:
    """The library for this version, built now if it is not there.

    Several processes may ask at once: one builds, the others wait. A library appears under its name
    whole or not at all, and a builder that was killed leaves nothing that blocks the next.

    Raises:
        RuntimeError: there is no C++ compiler, or it failed; the message ends with its output.
        OSError: the cache folder cannot be written.
    """
    library = cache_folder() / f"xielu_cpu-{_key()}.so"
    if library.exists():
        return library
    if shutil.which(compiler()) is None:
        raise RuntimeError(
            f"no C++ compiler ({compiler()!r} was looked for): install one (Debian: apt install "
            "g++), or name a program in CXX, without options"
        )
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        # released by the system when the process ends, however it ends
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _logger.warning("building the CPU kernels of xIELU, once: about 20 s (%s)", library)
            for left in library.parent.glob(f"{library.stem}-*"):
                # whoever held the lock before and was killed
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(
                prefix=f"{library.stem}-", dir=library.parent
            ) as folder:
                os.replace(_compile(Path(folder)), library)
    return library


def compiler() -> str:
    """The command that compiles the kernels: CXX, or the system's."""
    return os.environ.get("CXX") or "c++"


def _key() -> str:
    digest = hashlib.sha256()
    for text in (torch.__version__, platform.system(), platform.machine(), *FLAGS):
        digest.update(text.encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return f"torch{torch.__version__.split('+')[0]}-{digest.hexdigest()[:16]}"


def _compile(folder: Path) -> Path:
    """Run torch's builder in a process of its own, because it is configured by global state."""
    command = [sys.executable, __file__, str(folder), *map(str, sorted(SOURCES.glob("*.cpp")))]
    # the flags are ours alone: the library's name does not tell of others
    flags = ("CFLAGS", "CPPFLAGS", "CXXFLAGS", "LDFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in flags}
    run = subprocess.run(
        command,
        cwd=folder,
        env={**environment, "CXX": compiler()},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    libraries = list(folder.glob("*.so"))
    if run.returncode != 0 or len(libraries) != 1:
        raise RuntimeError(f"building the CPU kernels failed:\n{run.stdout[-4000:]}")
    return libraries[0]


def _compile_here(folder: str, sources: list[str]) -> None:
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension, CppExtension, is_ninja_available

    # torch brings the OpenMP library that GCC's code calls; linking one would add its threads, and
    # clang's code calls another, so that it gets one thread
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    threads = [] if "clang" in version or platform.system() != "Linux" else ["-fopenmp"]
    extension = CppExtension("xielu_cpu", sources, extra_compile_args=[*FLAGS, *threads])
    builder = BuildExtension.with_options(use_ninja=is_ninja_available())
    command = builder(Distribution({"name": "xielu_cpu", "ext_modules": [extension]}))
    command.build_lib, command.build_temp = folder, os.path.join(folder, "objects")
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    _compile_here(sys.argv[1], sys.argv[2:])
