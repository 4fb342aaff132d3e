"""tools/bootstrap.sh: which Python it takes, what it says when there is none, and its .venv."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# what the script calls; on its crafted PATH nothing else exists
TOOLS = (
    *("awk", "cat", "cut", "df", "dirname", "grep", "head", "mkdir", "mv", "rm", "sed", "sh"),
    *("sort", "tail", "uname"),
)
# the interpreter under the environment of these tests; its own .venv is no candidate
PYTHON = os.path.realpath(sys.executable)


@dataclass(frozen=True)
class Machine:
    """A checkout and a machine on which only the interpreters that a test adds can be found."""

    folder: Path

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    def bootstrap(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(self.bin), "HOME": str(self.folder), **environment}
        command = [str(self.checkout / "tools/bootstrap.sh"), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    def add_python(
        self, name: str, version: tuple[int, int, int], *, ensurepip: bool = True
    ) -> Path:
        """A real Python that is told to be of another version, or to lack ensurepip."""
        path = self.folder / name if "/" in name else self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        disguise = [f"import sys; sys.version_info = {version}; sys.executable = '{path}'"]
        if not ensurepip:
            disguise.append("sys.modules['ensurepip'] = None")
        # the script asks with -ES -c PROGRAM
        path.write_text(f'#!/bin/sh\nexec {PYTHON} -ES -c "{"; ".join(disguise)}\n$3"\n')
        path.chmod(0o755)
        return path


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.bin.mkdir()
    for tool in TOOLS:
        (machine.bin / tool).symlink_to(shutil.which(tool) or tool)
    tools = machine.checkout / "tools"
    tools.mkdir(parents=True)
    shutil.copy(ROOT / "tools/bootstrap.sh", tools)
    return machine


def test_finds_the_oldest_supported_python(machine: Machine) -> None:
    machine.add_python("python3", (3, 11, 2))
    machine.add_python("python3.13", (3, 13, 1))
    chosen = machine.bootstrap("--find")
    assert chosen.stdout == f"{machine.bin}/python3.13\n", chosen.stderr
    older = machine.add_python("python3.12", (3, 12, 9))
    assert machine.bootstrap("--find").stdout == f"{older}\n"


def test_says_what_was_found_and_what_to_install(machine: Machine) -> None:
    machine.add_python("python", (2, 7, 18))
    machine.add_python("python3", (3, 11, 2))
    # megatron-core 0.19 does not run on it
    machine.add_python("python3.14", (3, 14, 0))
    # a file of that name that is no Python, as pyenv's shims of versions not installed
    (machine.bin / "python3.12").write_text("#!/bin/sh\nexit 127\n")
    (machine.bin / "python3.12").chmod(0o755)
    done = machine.bootstrap()
    assert done.returncode == 2
    assert "no CPython 3.12 or 3.13 with venv in PATH, pyenv or uv; found:" in done.stderr
    assert "3.11.2   too old" in done.stderr
    assert "3.14.0   too new" in done.stderr
    for remedy in ("apt install python3 python3-venv", "uv python install 3.12", "pyenv install"):
        assert remedy in done.stderr
    assert not (machine.checkout / ".venv").exists()


def test_says_so_when_there_is_no_python_at_all(machine: Machine) -> None:
    done = machine.bootstrap()
    assert done.returncode == 2
    assert "found:\n" in done.stderr
    assert "  none\n" in done.stderr


def test_a_python_without_ensurepip_is_explained_and_passed_over(machine: Machine) -> None:
    machine.add_python("python3.12", (3, 12, 3), ensurepip=False)
    done = machine.bootstrap("--find")
    assert done.returncode == 2
    assert "3.12.3   no venv module" in done.stderr
    assert "apt install python3.12-venv" in done.stderr
    whole = machine.add_python("python3.13", (3, 13, 5))
    assert machine.bootstrap("--find").stdout == f"{whole}\n"


def test_looks_into_pyenv(machine: Machine) -> None:
    path = machine.add_python(".pyenv/versions/3.12.9/bin/python3", (3, 12, 9))
    assert machine.bootstrap("--find").stdout == f"{path}\n"
    moved = machine.folder / "elsewhere"
    (machine.folder / ".pyenv").rename(moved)
    found = machine.bootstrap("--find", PYENV_ROOT=str(moved))
    assert found.returncode == 0, found.stderr


def test_asks_uv(machine: Machine) -> None:
    path = machine.add_python("uv-managed/bin/python3.12", (3, 12, 11))
    (machine.bin / "uv").write_text(f"#!/bin/sh\necho {path}\n")
    (machine.bin / "uv").chmod(0o755)
    assert machine.bootstrap("--find").stdout == f"{path}\n"


@pytest.mark.parametrize("as_variable", [True, False])
def test_a_chosen_python_is_taken_or_refused_but_never_replaced(
    machine: Machine, as_variable: bool
) -> None:
    def choose(python: str) -> subprocess.CompletedProcess[str]:
        if as_variable:
            return machine.bootstrap("--find", PYTHON=python)
        return machine.bootstrap("--find", python)

    newer = machine.add_python("python3.13", (3, 13, 1))
    machine.add_python("python3.12", (3, 12, 9))
    assert choose("python3.13").stdout == f"{newer}\n"

    missing = choose("/nowhere/python3.12")
    assert missing.returncode == 2
    assert missing.stderr == "bootstrap: PYTHON=/nowhere/python3.12: there is no such program\n"

    old = machine.add_python("old/python", (3, 9, 1))
    refused = choose(str(old))
    assert refused.returncode == 2
    assert f"PYTHON={old} cannot be used; needed: CPython 3.12 or 3.13" in refused.stderr
    assert "3.9.1    too old" in refused.stderr

    assert "does not run as a Python" in choose("sed").stderr


def test_unknown_option(machine: Machine) -> None:
    done = machine.bootstrap("--fnid")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown option --fnid (usage: tools/bootstrap.sh [--find] [PYTHON])" in done.stderr


def test_finds_a_real_python_on_this_machine() -> None:
    path = os.pathsep.join([os.path.dirname(PYTHON), os.environ["PATH"]])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHON"}
    command = [ROOT / "tools/bootstrap.sh", "--find"]
    env = {**environment, "PATH": path}
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    program = "import ensurepip, sys, venv; assert (3, 12) <= sys.version_info < (3, 14)"
    subprocess.run([found.stdout.strip(), "-c", program], check=True)


# a build backend without requirements, so that the real pip can install a project offline
BACKEND = """
import pathlib, zipfile

def build_editable(directory, config_settings=None, metadata_directory=None):
    if pathlib.Path("broken").exists():
        raise SystemExit("ERROR: this build is broken")
    name = "demo-1-py3-none-any.whl"
    info = {
        "METADATA": "Metadata-Version: 2.1\\nName: demo\\nVersion: 1\\n",
        "WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(pathlib.Path(directory, name), "w") as wheel:
        for file, text in info.items():
            wheel.writestr(f"demo-1.dist-info/{file}", text)
    return name
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


@pytest.fixture
def project(machine: Machine) -> Machine:
    for name, text in (
        ("pyproject.toml", PROJECT),
        ("backend.py", BACKEND),
        ("constraints.txt", ""),
    ):
        (machine.checkout / name).write_text(text)
    return machine


def bootstrap_offline(machine: Machine, python: str = PYTHON) -> subprocess.CompletedProcess[str]:
    offline: Mapping[str, str] = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    return machine.bootstrap(python, **offline)


def test_makes_keeps_and_finishes_the_environment(project: Machine) -> None:
    made = bootstrap_offline(project)
    assert made.returncode == 0, made.stderr
    assert f"making .venv with {PYTHON}" in made.stdout
    assert "ready: Python 3." in made.stdout
    venv = project.checkout / ".venv"
    (info,) = venv.glob("lib/python3*/site-packages/demo-1.dist-info")

    start = time.perf_counter()
    again = bootstrap_offline(project)
    print(f"a second run takes {time.perf_counter() - start:.3f} s")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")

    # as an interrupted run leaves it: the stamp unfinished, a package without its RECORD
    folder, _ = (venv / "stamp").read_text().splitlines()
    (venv / "stamp").write_text(f"{folder}\nunfinished\n")
    (info / "RECORD").unlink()
    finished = bootstrap_offline(project)
    assert finished.returncode == 0, finished.stderr
    assert "making" not in finished.stdout
    assert "ready" in finished.stdout
    assert (info / "RECORD").exists()

    (project.checkout / "constraints.txt").write_text("# changed\n")
    (project.checkout / "broken").touch()
    failed = bootstrap_offline(project)
    assert failed.returncode == 1
    assert "ERROR: " in failed.stderr
    assert "the log is .venv/bootstrap.log" in failed.stderr
    assert "this build is broken" in (venv / "bootstrap.log").read_text()
    (project.checkout / "broken").unlink()

    # a failure is not taken for done by the next run
    definition = project.checkout / "pyproject.toml"
    definition.write_text(PROJECT.replace("requires = []", 'requires = ["setuptools"]'))
    nobody = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    unreachable = project.bootstrap(PIP_CONFIG_FILE=os.devnull, **nobody)
    assert unreachable.returncode == 1
    assert "pip could not reach its package index" in unreachable.stderr


def test_an_environment_of_another_folder_is_made_anew(project: Machine) -> None:
    venv = project.checkout / ".venv"
    venv.mkdir()
    (venv / "stamp").write_text("/elsewhere\n0123\n")
    (venv / "bin").mkdir()
    (venv / "bin/python").symlink_to(PYTHON)
    done = bootstrap_offline(project)
    assert done.returncode == 0, done.stderr
    assert "making .venv anew: it was made in another folder" in done.stdout
    assert not (project.checkout / ".venv.old").exists()


def test_a_foreign_environment_that_is_unfit_is_left_alone(project: Machine) -> None:
    keepsake = project.checkout / ".venv/keepsake"
    keepsake.parent.mkdir()
    keepsake.touch()
    done = bootstrap_offline(project)
    assert done.returncode == 2
    assert (
        ".venv is not from this script and cannot be used: its Python does not run" in done.stderr
    )
    assert "move or delete that folder" in done.stderr
    assert keepsake.exists()
