"""The documents point to what exists, and name commands and figures that are there."""

from __future__ import annotations

import csv
import itertools
import json
import math
import pydoc_data.topics
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_xielu import cli
from megatron_xielu.analysis.planner import count_parameters, estimate_memory, flops_per_token
from megatron_xielu.doctor.checks import CHECKS
from megatron_xielu.launch.preflight import checkpoint_bytes
from megatron_xielu.mcore.layouts import grid
from megatron_xielu.recipes import load_recipe, preset_names, validate
from megatron_xielu.recipes.fp8 import local_sizes
from tests.conftest import SMALL
from tests.ranks import environment

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
        assert args.run is cli.checks._bench, line


def test_convert_commands_exist() -> None:
    lines = [
        line
        for document in DOCUMENTS
        for line in re.findall(
            r"^megatron-xielu ((?:convert|verify) .*)$", document.read_text("utf-8"), re.MULTILINE
        )
    ]
    assert len(lines) >= 5
    for line in lines:
        cli._parser().parse_args(line.split())
    options = (ROOT / "docs/convert.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\| `(--[a-z-]+)", options, re.MULTILINE))
    help_text = subprocess.run(
        [sys.executable, "-m", "megatron_xielu", "convert", "to-hf", "--help"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown == set(re.findall(r"^  (--[a-z-]+)", help_text, re.MULTILINE))


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


def test_gpu_figures_are_those_of_the_table() -> None:
    with (ROOT / "docs/benchmarks/gpu.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["p50_us"]]
    measured = {
        (f"{float(row['p50_us']):.1f}", f"{float(row['ratio_to_copy_limit']):.3f}") for row in rows
    }
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| \| us \|.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    lines = [tuple(cell.strip() for cell in line.split("|")[2:4]) for line in table.splitlines()]
    assert lines
    assert set(lines) <= measured


def test_the_layout_table_is_of_the_matrix_and_all_agree() -> None:
    text = (ROOT / "docs/layouts.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    megatron-xielu (doctor .*)$", text, re.MULTILINE)
    args = cli._parser().parse_args(command.split())
    assert args.run is cli.checks._doctor
    assert args.layouts
    rows = re.findall(r"^\| ([^|]+, [^|]+) \|.*\| (\w+) \| (\w+) \|$", text, re.MULTILINE)
    assert {name for name, *_ in rows} == {str(case) for case in grid.full(4)}
    assert {flag for _, *flags in rows for flag in flags} == {"yes"}


def test_the_doctors_samples_have_every_check() -> None:
    text = (ROOT / "docs/doctor.md").read_text(encoding="utf-8")
    shown = [
        re.findall(r"^  (\S.*?) +(pass|FAIL|skipped) ", sample, re.MULTILINE)
        for sample in re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    ]
    without_gpu, on_a_gpu = ([name for name, _ in sample] for sample in shown)
    assert without_gpu == [check.name for check in CHECKS if check.quick]
    assert {verdict for _, verdict in shown[0]} == {"pass", "skipped"}
    # the matrix of layouts has a page of its own
    assert on_a_gpu == [check.name for check in CHECKS if check.gpu and check.seconds < 600]
    assert {verdict for _, verdict in shown[1]} == {"pass"}


def test_the_fp8_sizes_are_those_of_the_presets() -> None:
    text = (ROOT / "docs/fp8.md").read_text(encoding="utf-8")
    table = [
        line.strip("|").split("|") for line in text.splitlines() if line.startswith("| llama-")
    ]
    seen = set()
    for name, tp, *cells in ([cell.strip() for cell in row] for row in table):
        layout = [
            f"parallel.tensor_model_parallel_size={tp}",
            f"parallel.sequence_parallel={tp != '1'}",
        ]
        sizes = list(local_sizes(load_recipe(name, layout)).values())

        def runs(fp8: str, name: str = name, layout: list[str] = layout, tp: int = int(tp)) -> bool:
            return validate(load_recipe(name, [*layout, f"fp8.recipe={fp8}"]), tp) == []

        by_16 = {runs(fp8) for fp8 in ("delayed", "tensorwise", "blockwise")}
        flags = [by_16 == {True}, runs("mxfp8"), not any(size % 128 for size in sizes)]
        words = ["yes" if flag else "no" for flag in flags]
        assert cells == [*(f"{size:,}" for size in sizes), *words]
        seen.add((name, int(tp)))
    # 16 heads: every degree of tensor parallelism that both have
    presets = [name for name in preset_names() if name.startswith("llama-")]
    ours = [name for name in presets if name.endswith("-xielu")]
    assert seen == {(name, tp) for name in ours for tp in (1, 2, 4, 8, 16)}
    # the baselines run in FP8 wherever xIELU does
    for name, (_, tp) in itertools.product(set(presets) - set(ours), seen):
        layout = [f"parallel.tensor_model_parallel_size={tp}", "parallel.sequence_parallel=false"]
        for fp8 in ("delayed", "tensorwise", "blockwise", "mxfp8"):
            assert validate(load_recipe(name, [*layout, f"fp8.recipe={fp8}"]), tp) == []


def test_the_baselines_are_those_of_the_presets() -> None:
    text = (ROOT / "docs/baselines.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(llama\S+)` \| (.*) \|$", text, re.MULTILINE)
    for name, cells in rows:
        model = load_recipe(name).model
        figures = (model.ffn_hidden_size, count_parameters(model), flops_per_token(model))
        assert cells.split(" | ") == [f"{figure:,}" for figure in figures]
    assert {name for name, _ in rows} == {n for n in preset_names() if n.startswith("llama-")}


def test_the_comparison_of_activations_runs(tmp_path: Path) -> None:
    lines = [{"text": text} for text in pydoc_data.topics.topics.values() if len(text) > 2000]
    (tmp_path / "books.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = (ROOT / "docs/baselines.md").read_text(encoding="utf-8")
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    # of the sizes in the document the widths alone
    small = " ".join(["tiny", *(each for each in SMALL if "ffn_hidden_size" not in each)])
    for line in (line for line in commands if line):
        assert line.startswith("megatron-xielu ")
        words = shlex.split(line.replace(" tiny ", f" {small} "))[1:]
        done = subprocess.run(
            [sys.executable, "-m", "megatron_xielu", *words],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "activations.png").stat().st_size > 10_000


def test_the_fp8_defaults_are_those_of_a_recipe(tmp_path: Path) -> None:
    text = (ROOT / "docs/fp8.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"```yaml\n(fp8:\n.*?)```", text, re.DOTALL)
    preset = ROOT / "megatron_xielu/recipes/presets/tiny.yaml"
    path = tmp_path / "recipe.yaml"
    path.write_text(preset.read_text(encoding="utf-8") + section)
    assert load_recipe(str(path)) == load_recipe("tiny")
    keys = set(re.findall(r"^  (\w+):", section, re.MULTILINE))
    assert keys == set(vars(load_recipe("tiny").fp8))


def test_the_fp8_memory_is_the_plans() -> None:
    text = (ROOT / "docs/fp8.md").read_text(encoding="utf-8")
    (_, *section) = text.partition("## Memory and MFU")
    rows = re.findall(r"^\| (bf16|`\w.*?) \| ([\d,]+) \| (.*) \|$", "".join(section), re.MULTILINE)
    assert len(rows) == 6
    for name, per_token, cells in rows:
        words = name.replace("`", "").split(", ")
        settings = [f"fp8.{word}" if word.startswith("param") else word for word in words[1:]]
        fp8 = "off" if words[0] == "bf16" else words[0]
        recipe = load_recipe("llama-1.1b-xielu", [f"fp8.recipe={fp8}", *settings])
        memory = estimate_memory(recipe, 88)
        assert per_token == f"{memory.activations / (24 * 5 * 4096):,.0f}", name
        found = [memory.activations, memory.weights, memory.fp8_weights]
        shown = [f"{size / 2**30:.2f}" if size else "" for size in found]
        assert [cell.strip() for cell in cells.split("|")] == shown, name


OPERATIONS = (ROOT / "docs/operations.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    (_, text) = OPERATIONS.split(f"## {title}\n")
    return text.partition("\n## ")[0]


def test_the_storage_is_that_of_the_presets() -> None:
    rows = re.findall(r"^\| (llama\S+) \| (.*) \|$", section("Storage"), re.MULTILINE)
    for name, cells in rows:
        # as on GPUs
        recipe = load_recipe(name, ["training.precision=bf16"])
        training, size = recipe.training, checkpoint_bytes(recipe) / 1e9
        saves = training.train_iters // recipe.checkpoint.save_interval
        tokens = training.train_iters * training.global_batch_size * recipe.model.seq_length
        figures = [f"{size:.1f}", str(saves), f"{saves * size / 1e3:.1f}"]
        figures += [f"{size:.1f} s", f"{size / 10:.1f} s", f"{4 * tokens / 1e9:.0f}"]
        assert cells.split(" | ") == figures
    assert [name for name, _ in rows] == [n for n in preset_names() if n.endswith("-xielu")]


def test_every_variable_is_explained() -> None:
    ways = (
        r'environ(?:ment)?(?:\.get|\.setdefault|\.pop)?[\[(]"([A-Z]\w+)"',
        r'"([A-Z_]+)" (?:not )?in os\.environ',
        r'Setting\(\s*"([A-Z]\w+)"',
        r'_VARIABLE = "([A-Z]\w+)"',
        r'^ +"([A-Z]+_[A-Z_]+)": ',
    )
    found = {
        name
        for path in (ROOT / "megatron_xielu").rglob("*.py")
        for way in ways
        for name in re.findall(way, path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(found) > 20
    assert not {name for name in found if name not in OPERATIONS}


@pytest.mark.slow
def test_the_checklist_can_be_gone_through(data_dir: Path, tmp_path: Path) -> None:
    text = section("Checklist before a 100-GPU-day run")
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    small = ["model.vocab_size=512", *SMALL, "parallel.tensor_model_parallel_size=2"]
    here = {
        "--recipe llama-1.1b-xielu": f"--recipe tiny {' '.join(small)}",
        "--nproc 88": "--nproc 2",
        "/data/books": str(data_dir),
    }
    outputs = {}
    for line in lines:
        assert line.startswith("megatron-xielu ")
        words = line
        for written, meant in here.items():
            words = words.replace(written, meant)
        # whose output docs/doctor.md shows
        if words == "megatron-xielu doctor":
            assert cli._parser().parse_args(["doctor"]).run is cli.checks._doctor
            continue
        done = subprocess.run(
            [sys.executable, "-m", "megatron_xielu", *shlex.split(words)[1:]],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        outputs[line] = done.stdout
    plan, first, _, further, _, verified = outputs.values()
    assert re.search(r"^checkpoints: .* in all; at most", plan, re.MULTILINE)
    assert "a stop needs up to" in first
    metrics = (tmp_path / "runs/rehearsal/metrics.jsonl").read_text().splitlines()
    trained = [record for record in map(json.loads, metrics) if record["type"] == "train"]
    assert [record["step"] for record in trained] == [1, 2, 3, 4]
    assert trained[0]["loss"] == pytest.approx(math.log(512), abs=0.1)
    for name in ("alpha_p", "alpha_n"):
        assert all(alpha != 0.8 for alpha in trained[1][name])
    assert "training.train_iters" in further
    assert "same token 100.00%" in verified
