"""Building the CPU kernels: once, whole or not at all, and without a compiler not at all.

The builder is the real one; most tests give it a small source, which it compiles in a second.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_xielu.ops.cpu import build

SMALL = 'extern "C" int answer() { return 42; }\n'
BUILD = """
import sys
from pathlib import Path
from megatron_xielu.ops.cpu import build
build.SOURCES = Path(sys.argv[1])
print(build.built())
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "small.cpp").write_text(SMALL)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MEGATRON_XIELU_CACHE", str(folder))
    return folder


def start(program: str, *arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    return out.strip(), err


def compiler(folder: Path, script: str) -> str:
    """A compiler of our own, called in place of the machine's."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_processes_that_ask_at_once_build_once(sources: Path, cache: Path) -> None:
    results = [end(process) for process in [start(BUILD, sources) for _ in range(3)]]
    libraries = {out for out, _ in results}
    assert len(libraries) == 1, results
    assert sum("building the CPU kernels" in err for _, err in results) == 1
    (library,) = cache.glob("*.so")
    assert {str(library)} == libraries
    # a fourth finds it there
    out, err = end(start(BUILD, sources))
    assert (out, "building" in err) == (str(library), False)


def test_other_sources_are_another_library(sources: Path, cache: Path) -> None:
    first, _ = end(start(BUILD, sources))
    (sources / "small.cpp").write_text(SMALL.replace("42", "43"))
    second, _ = end(start(BUILD, sources))
    assert first != second
    assert len(list(cache.glob("*.so"))) == 2


def test_a_killed_builder_blocks_nobody(sources: Path, cache: Path, tmp_path: Path) -> None:
    slow = compiler(tmp_path, "touch started; exec sleep 600")
    builder = start(BUILD, sources, CXX=slow)
    while not list(cache.glob("*/started")):
        assert builder.poll() is None, end(builder)
        time.sleep(0.05)
    process = psutil.Process(builder.pid)
    for part in [process, *process.children(recursive=True)]:
        part.kill()
    end(builder)
    assert list(cache.glob("*/started"))
    out, err = end(start(BUILD, sources))
    assert Path(out).exists(), err
    # what the dead one left is gone
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock"}


def test_what_the_compiler_says_is_passed_on(sources: Path, cache: Path) -> None:
    (sources / "small.cpp").write_text("int broken(\n")
    _, err = end(start(BUILD, sources))
    assert "building the CPU kernels failed" in err
    assert "small.cpp:1" in err
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


def test_without_a_compiler_plain_torch_takes_over_and_says_so_once(cache: Path) -> None:
    program = """
import torch
from megatron_xielu import xielu
x, alpha = torch.linspace(-2, 2, 5), torch.zeros(1)
assert torch.equal(xielu(x, alpha, alpha), xielu(x, alpha, alpha, impl="eager"))
xielu(x, alpha, alpha)
try:
    xielu(x, alpha, alpha, impl="cpu")
except ValueError as error:
    print(error)
"""
    out, err = end(start(program, CXX="no-such-compiler"))
    assert err.count("plain torch is") == 1, err
    assert "'no-such-compiler' was looked for" in err
    assert "impl='cpu' cannot compute this" in out
    assert "apt install g++" in out
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_no_failure(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    program = """
import torch
from megatron_xielu import xielu
print(xielu(torch.ones(3), torch.zeros(1), torch.zeros(1)).tolist())
"""
    out, err = end(start(program))
    assert out == "[1.1931471824645996, 1.1931471824645996, 1.1931471824645996]"
    assert "the CPU kernels of xIELU are not used" in err


def test_a_library_built_before_needs_no_compiler(sources: Path, cache: Path) -> None:
    """As in an image: built there, the folder read-only, no compiler."""
    first, _ = end(start(BUILD, sources, CXX=""))
    for path in cache.iterdir():
        path.chmod(0o444)
    cache.chmod(0o555)
    try:
        out, err = end(start(BUILD, sources, CXX="no-such-compiler"))
    finally:
        cache.chmod(0o755)
    assert (out, err) == (first, "")


def test_flags_from_elsewhere_do_not_reach_the_library(sources: Path, cache: Path) -> None:
    out, err = end(start(BUILD, sources, CXXFLAGS="--no-such-flag", CFLAGS="--no-such-flag"))
    assert Path(out).exists(), err


def test_the_command_that_builds_ahead_of_time() -> None:
    command = [sys.executable, "-W", "error", "-m", "megatron_xielu.ops.cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == build.built()


@pytest.mark.slow
def test_the_real_kernels_build_from_nothing(cache: Path) -> None:
    program = "from megatron_xielu.ops.cpu import build; assert build.load() is None"
    _, err = end(start(program))
    assert len(list(cache.glob("*.so"))) == 1, err
    assert "warning" not in err.replace("No CUDA runtime", "")
