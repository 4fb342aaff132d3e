"""The scripts in tools/ run; what they measure is not judged here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import environment

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "ratio"),
    [
        ("bench_training.py", ["--steps", "2"], r"ratio +(\d+\.\d+) "),
        (
            "bench_transformers.py",
            ["--layers", "2", "--hidden", "64", "--pairs", "2"],
            r"(\d\.\d+)",
        ),
    ],
)
def test_a_benchmark_ends_with_ratios(script: str, arguments: list[str], ratio: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / script), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    found = re.findall(ratio, done.stdout)
    assert found
    assert all(float(text) > 0 for text in found)


def test_the_fp8_curves_are_drawn_from_the_table_in_the_documents(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs/benchmarks/fp8_emulation.csv", tmp_path / "curves.csv")
    command = [sys.executable, str(ROOT / "tools/fp8_emulation.py"), "--draw"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "curves")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.count("\n") == 11
    assert done.stdout in (ROOT / "docs/fp8-emulation.md").read_text(encoding="utf-8")


def test_the_clients_table_in_the_documents_is_what_was_seen(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    record = json.loads((ROOT / "docs/benchmarks/clients.json").read_text())
    page = (ROOT / "docs/clients.md").read_text(encoding="utf-8")

    def run(*arguments: str) -> str:
        command = [sys.executable, str(tmp_path / "tools/clients_table.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert f"begins -->\n{run()}<!-- the table ends" in page
    (client,) = [name for name in record if name.startswith("mlx")]
    record[client]["models"]["Arcee"] = {"figures": [{"name": "logits", "value": 5e-5, "limit": 1}]}
    (tmp_path / "seen.json").write_text(json.dumps({client: record[client]}))
    run(str(tmp_path / "seen.json"))
    changed = (tmp_path / "docs/clients.md").read_text(encoding="utf-8")
    differing = set(changed.splitlines()) ^ set(page.splitlines())
    assert len(differing) == 2
    assert all(line.startswith(f"| {client} |") for line in differing)
    assert any("| yes: logits 5.0e-05 |" in line for line in differing)


@pytest.mark.slow
def test_an_fp8_run_reports_every_interval(tmp_path: Path) -> None:
    from megatron_xielu.data.prepare import prepare

    prepare(tmp_path / "data", vocab_size=512)
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tools/fp8_emulation.py"), "--folder", str(tmp_path)),
            *("--one", "swiglu", "blockwise", "1", "1"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["step"] for row in rows] == list(range(10, 301, 10))
    assert rows[-1]["held_out_loss"] < rows[0]["loss"]
    assert all(0 <= row["gradients_flushed"] < 1 for row in rows)
