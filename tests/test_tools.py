"""The scripts in tools/ run; what they measure is not judged here."""

from __future__ import annotations

import re
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
