"""What docker/versions.toml says, everything else says too, and what the build makes of it."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import megatron_xielu
from megatron_xielu.doctor import machine

ROOT = Path(__file__).parents[2]
VERSIONS = tomllib.loads((ROOT / "docker/versions.toml").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
INSTALL = runpy.run_path(str(ROOT / "docker/install.py"))


def test_the_constraints_pin_them() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert {f"{name}=={version}" for name, version in VERSIONS["packages"].items()} <= {*lines}


def test_the_project_accepts_them() -> None:
    tested = {**VERSIONS["packages"], **VERSIONS["base"]}
    extras = PROJECT["optional-dependencies"].values()
    ranges = [Requirement(text) for texts in (PROJECT["dependencies"], *extras) for text in texts]
    seen = {each.name: each.specifier for each in ranges if each.name in tested}
    assert seen.keys() == tested.keys()
    for name, specifier in seen.items():
        assert tested[name] in specifier, name
    pythons = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert pythons == VERSIONS["python"]


def test_the_dockerfile_has_them() -> None:
    assert re.findall(r"^ARG BASE_IMAGE=(.*)$", DOCKERFILE, re.MULTILINE) == [
        VERSIONS["base_image"]
    ]
    labels = dict(re.findall(r'megatron_xielu\.tested\.([\w-]+)="(.*?)"', DOCKERFILE))
    assert labels == {name: VERSIONS["packages"][name] for name in ("torch", "megatron-core")}
    assert f'image.version="{megatron_xielu.__version__}"' in DOCKERFILE


def test_the_documentation_lists_them() -> None:
    text = (ROOT / "docs/docker.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `?([\w-]+)`? \| `?([\w./:-]+)`? \|", text, re.MULTILINE))
    expected = {"base": VERSIONS["base_image"], **VERSIONS["packages"], **VERSIONS["base"]}
    assert {name: shown.get(name) for name in expected} == expected


def test_ci_installs_them() -> None:
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert f" transformer-engine=={VERSIONS['base']['transformer-engine']} " in ci


def test_doctor_compares_with_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tested = machine.tested_versions(machine.versions_file())
    assert tested == {**VERSIONS["packages"], **VERSIONS["base"]}
    # as in the image, where the package stands alone
    monkeypatch.setenv(machine.VERSIONS_VARIABLE, str(tmp_path / "versions.toml"))
    shutil.copy(ROOT / "docker/versions.toml", tmp_path)
    assert machine.versions_file().parent == tmp_path
    assert machine.tested_versions(machine.versions_file()) == tested


def test_the_dockerfile_builds_everywhere() -> None:
    """Without what only some builders know, or what needs a frontend to be downloaded."""
    assert not re.search(r"^#\s*syntax=|<<|--link|--mount|--chmod", DOCKERFILE, re.MULTILINE)


def test_the_builder_gets_only_what_the_dockerfile_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert next(line for line in lines if not line.startswith("#")) == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word.partition("/")[0]
        for words in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE)
        for word in words.split()
    }
    assert copied == allowed


def test_the_bases_compiled_packages_stay_and_ours_are_pinned() -> None:
    base = {"torch": "2.14.0a0+nv26.8", "apex": "0.1", "nvidia-nccl-cu13": "2.29", "numpy": "1.26"}
    keep = INSTALL["kept"](base)
    assert keep.keys() == {"torch", "apex", "nvidia-nccl-cu13"}
    lines = INSTALL["constraints"](keep, "# tested\ntorch==2.13.0\nPyYAML==6.0.3\nnumpy==2.5.5\n")
    kept = ["apex==0.1", "numpy==2.5.5", "nvidia-nccl-cu13==2.29", "torch==2.14.0a0+nv26.8"]
    assert lines == sorted([*kept, "PyYAML==6.0.3"])


def test_a_package_of_the_base_that_changed_is_named() -> None:
    before = {"torch": "2.14", "apex": "0.1", "triton": "3.7"}
    assert INSTALL["changes"](before, {"torch": "2.13", "triton": "3.7"}) == [
        "torch was 2.14 and is 2.13",
        "apex was 0.1 and is gone",
    ]


def test_extras_of_extras_are_installed() -> None:
    extras = PROJECT["optional-dependencies"]
    found = INSTALL["requirements"](extras, ["gguf"], PROJECT["name"])
    assert {*extras["hf"][1:], *extras["recipes"], *extras["gguf"][1:]} == found


def lint(program: str, *words: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run([program, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_finds_nothing() -> None:
    scripts = ["docker/entrypoint.sh", ".ci/run", "tools/bootstrap.sh"]
    lint("shellcheck", *scripts, *map(str, (ROOT / "examples").glob("*.sh")))


def test_hadolint_finds_nothing() -> None:
    lint("hadolint", "Dockerfile")
