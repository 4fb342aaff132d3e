"""The package's arrows: who may import whom, read from the source of every module."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_xielu"
# from the bottom up: a part may import its own layer and those below it
LAYERS = (
    {"errors", "folders", "signals", "unpickle"},
    {"ops"},
    {"activations"},
    {"megatron_xielu"},
    {"mcore", "recipes"},
    {"training", "launch", "checkpoint", "analysis", "data", "bench", "integrations"},
    {"doctor"},
    {"cli", "__main__"},
)
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(path: Path) -> Iterator[str]:
    """Names of all imported modules, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0):
                for alias in node.names:
                    name = f"{module}.{alias.name}"
                    yield name if name in MODULES else module
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value)]):
                yield value


def part_of(module: str) -> str:
    """ops for megatron_xielu.ops.reference; the package's own name for its __init__."""
    return [*module.split("."), module][1]


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    part = part_of(module)
    assert part in HEIGHT, f"{module}: give {part} its place in LAYERS of this test"
    for target in imported(MODULES[module]):
        if target.split(".")[0] == PACKAGE.name:
            assert HEIGHT[part_of(target)] <= HEIGHT[part], f"{module} imports {target}"


@pytest.mark.parametrize("module", MODULES)
def test_only_mcore_imports_megatron_and_transformer_engine(module: str) -> None:
    foreign = {"megatron", "transformer_engine", "transformer_engine_torch"}
    found = {target for target in imported(MODULES[module]) if target.split(".")[0] in foreign}
    assert not found or part_of(module) == "mcore", f"{module} imports {found}"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {
        module: {target for target in imported(path) if target in MODULES} - {module}
        for module, path in MODULES.items()
    }
    # raises CycleError, which holds the circle
    TopologicalSorter(graph).prepare()


def checked_in_files() -> list[Path]:
    # with what is about to be added; a copy without git has nothing to say about it
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listing.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_no_file_names_one_machine_or_a_package_index() -> None:
    # the character classes keep this file from matching itself
    rules = {
        "a folder of one machine": r"(?<![\w.$}])/(?:[w]ork|[f]arm|[r]oot|[h]ome/\w+|[U]sers/\w+)/",
        "a package index": r"[p]ypi\.org|[f]iles\.pythonhosted|[r]egistry\.npmjs|/opt/[p]ypi",
    }
    found = []
    for path in checked_in_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        for what, rule in rules.items():
            match = re.search(rule, text)
            if match:
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(ROOT)}:{line}: {what}: {match.group()}")
    assert not found, "\n".join(found)
