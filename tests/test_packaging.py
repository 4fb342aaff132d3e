"""What pyproject.toml and constraints.txt promise, and what a built wheel holds."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {
    extra: [Requirement(text) for text in texts]
    for extra, texts in PROJECT["optional-dependencies"].items()
}
CORE = [Requirement(text) for text in PROJECT["dependencies"]]
ALL = [*CORE, *(requirement for extra in EXTRAS.values() for requirement in extra)]
# the distributions that bring modules of another name
DISTRIBUTIONS = {
    "google": "protobuf",
    "megatron": "megatron-core",
    "transformer_engine": "transformer-engine",
    "yaml": "pyyaml",
}


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def bootstrap_extras() -> list[str]:
    script = (ROOT / "tools/bootstrap.sh").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in script if line.startswith("extras="))
    return line.removeprefix("extras=").split(",")


def test_the_core_depends_on_torch_alone() -> None:
    assert [requirement.name for requirement in CORE] == ["torch"]


def test_nothing_depends_on_the_unrelated_apex_of_the_package_index() -> None:
    names = {canonicalize_name(requirement.name) for requirement in ALL} | pins().keys()
    assert not {name for name in names if name.split("-")[0] == "apex"}


def test_extras_refer_to_extras_that_exist() -> None:
    for extra, requirements in EXTRAS.items():
        for requirement in requirements:
            if requirement.name == PROJECT["name"]:
                assert requirement.extras <= EXTRAS.keys(), f"{extra}: {requirement}"


def test_every_constraint_is_one_exact_version_that_our_ranges_accept() -> None:
    ranges = {canonicalize_name(requirement.name): requirement for requirement in ALL}
    for name, pin in pins().items():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        if name in ranges:
            assert specifier.version in ranges[name].specifier, f"{pin} against {ranges[name]}"


def test_what_bootstrap_installs_is_constrained() -> None:
    chosen = [*CORE, *(r for extra in bootstrap_extras() for r in EXTRAS[extra])]
    direct = {canonicalize_name(requirement.name) for requirement in chosen} - {PROJECT["name"]}
    assert direct <= pins().keys(), f"add to constraints.txt: {direct - pins().keys()}"


def test_megatron_range_is_the_one_the_code_checks() -> None:
    contract = importlib.import_module("megatron_xielu.mcore.contract")
    (requirement,) = (r for r in EXTRAS["megatron"] if r.name == "megatron-core")
    lowest, below = contract.MEGATRON_CORE
    assert requirement.specifier == SpecifierSet(f">={lowest},<{below}")


def test_every_imported_package_is_declared() -> None:
    declared = {canonicalize_name(requirement.name) for requirement in ALL}
    # torch depends on setuptools, and its Linux builds on triton, at the one version they work with
    declared |= {"megatron-xielu", "setuptools", "triton"}
    for path in sorted((ROOT / "megatron_xielu").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names:
                name = canonicalize_name(DISTRIBUTIONS.get(top, top))
                assert name in declared, f"{path.relative_to(ROOT)} imports {top}: no extra has it"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    for package in ("megatron_xielu", "tests"):
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    # torch depends on setuptools, so the build needs no download
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", out, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_package_and_its_data_only(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = ROOT / "megatron_xielu"
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == expected, "name the missing files in [tool.setuptools.package-data]"
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    version = importlib.import_module("megatron_xielu").__version__
    assert f"\nVersion: {version}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.12\n" in metadata


def test_console_script_starts_the_command_line(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "megatron-xielu = megatron_xielu.cli:main" in wheel.read(name).decode()
    assert callable(importlib.import_module("megatron_xielu.cli").main)


IMPORT_GUARD = """
import sys
from importlib.metadata import packages_distributions, requires
from packaging.requirements import Requirement

def closure(name, known):
    if name not in known:
        known.add(name)
        for text in requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                closure(requirement.name.lower().replace("_", "-"), known)
    return known

distributions = {name for root in sys.argv[2].split(",") for name in closure(root, set())}
allowed = {"megatron_xielu"} | sys.stdlib_module_names | {
    module
    for module, owners in packages_distributions().items()
    if distributions & {owner.lower().replace("_", "-") for owner in owners}
}
# what computing the above has brought in must not be served from the cache
for name in [name for name in sys.modules if name.split(".")[0] == "packaging"]:
    del sys.modules[name]

class Guard:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in allowed and not top.startswith("__editable__"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Guard())
exec(sys.argv[1])
"""


def run_with_only(distributions: str, program: str) -> str:
    """Runs a program for which nothing but these distributions and what they need exists."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_GUARD, program, distributions]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_guard_blocks_what_torch_does_not_need() -> None:
    program = """
for name in ("yaml", "megatron.core", "transformers", "numpy"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        print(error)
"""
    assert run_with_only("torch", program).count("is blocked") == 4


def test_the_core_works_with_torch_alone() -> None:
    program = """
import torch
from megatron_xielu import XIELU, xielu
import megatron_xielu.activations, megatron_xielu.errors, megatron_xielu.ops
x = torch.linspace(-2, 2, 5, requires_grad=True)
XIELU()(x).sum().backward()
print(x.grad.tolist())
"""
    # 2 a_p x + beta above zero and a_n (e^x - 1) + beta below, with a_p = a_n = 0.8, beta = 0.5
    expected = [-0.191732, -0.005696, 0.5, 2.1, 3.7]
    assert ast.literal_eval(run_with_only("torch", program)) == pytest.approx(expected, abs=1e-6)


def test_recipes_plans_and_checkpoints_need_no_megatron() -> None:
    program = """
import megatron_xielu.analysis.planner, megatron_xielu.checkpoint
from megatron_xielu.recipes import load_recipe, preset_names
print(*(load_recipe(name).name for name in preset_names()))
"""
    assert "tiny" in run_with_only("torch,pyyaml", program).split()
