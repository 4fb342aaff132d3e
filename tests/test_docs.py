"""The documents point to what exists, and name commands and figures that are there."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from megatron_xielu import cli
from megatron_xielu.mcore.layouts import grid

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_bench_commands_exist(document: Path) -> None:
    for line in re.findall(r"megatron-xielu (bench[^`\n]*)", document.read_text(encoding="utf-8")):
        args = cli._parser().parse_args(line.split())
        assert args.run is cli._bench, line


def test_cpu_figures_are_those_of_the_table() -> None:
    with (ROOT / "docs/benchmarks/cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8").replace("*", "")
    for what, line in {
        "forward / copy": "forward / a copy",
        "backward / read-2-write-1": "backward / reading two",
    }.items():
        (cells,) = re.findall(rf"^\| {line}[^|]*\|([^|]*)\|[^|]*\|([^|]*)\|", text, re.MULTILINE)
        for dtype, cell in zip(("fp32", "bf16"), cells, strict=True):
            found = [float(r["value"]) for r in rows if (r["what"], r["dtype"]) == (what, dtype)]
            assert [f"{value:.2f}" for value in found] == [word.strip() for word in cell.split(",")]


def test_the_layout_table_is_of_the_matrix_and_all_agree() -> None:
    text = (ROOT / "docs/layouts.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    megatron-xielu (doctor .*)$", text, re.MULTILINE)
    args = cli._parser().parse_args(command.split())
    assert args.run is cli._doctor
    assert args.layouts
    rows = re.findall(r"^\| ([^|]+, [^|]+) \|.*\| (\w+) \| (\w+) \|$", text, re.MULTILINE)
    assert {name for name, *_ in rows} == {str(case) for case in grid.full(4)}
    assert {flag for _, *flags in rows for flag in flags} == {"yes"}
