"""The CPU benchmark: its statistics and gates; no test here says how fast anything is."""

from __future__ import annotations

from collections.abc import Iterator
from csv import DictReader
from pathlib import Path

import pytest
import torch

from megatron_xielu import cli
from megatron_xielu.bench import cpu, timing
from megatron_xielu.bench.cpu import Row
from megatron_xielu.errors import UserError
from megatron_xielu.ops.cpu import build

needs_kernels = pytest.mark.skipif(build.load() is not None, reason="the kernels did not build")


def test_the_ratio_is_that_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    # work and baseline in turn: a warm-up pair, then ratios 2, 2, 3 and 1 on a drifting machine
    took = [9.0, 1.0, 2.0, 1.0, 20.0, 10.0, 6.0, 2.0, 4.0, 4.0]

    def clock() -> Iterator[float]:
        now = 0.0
        for seconds in took:
            yield now
            now += seconds
            yield now

    ticks = clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    calls: list[str] = []
    ratio = timing.compare(
        lambda: calls.append("work"), lambda: calls.append("baseline"), pairs=4, warmup=1
    )
    assert calls == ["work", "baseline"] * 5
    assert (ratio.low, ratio.median, ratio.high) == (1.75, 2.0, 2.25)
    assert ratio.milliseconds == 5000
    assert str(ratio) == "2.000 (1.750-2.250)"


@pytest.mark.parametrize(
    ("row", "passed", "text"),
    [
        (Row("a", 1.05, limit=1.1), True, "<= 1.1 ok"),
        (Row("a", 1.15, limit=1.1), False, "<= 1.1 MISSED"),
        (Row("a", 2.0, limit=1.7, at_least=True), True, ">= 1.7 ok"),
        (Row("a", 1.6, limit=1.7, at_least=True), False, ">= 1.7 MISSED"),
        (Row("a", 9.0), True, "9.000"),
        (Row("a", float("nan"), limit=1.0), False, "MISSED"),
    ],
)
def test_gates(row: Row, passed: bool, text: str) -> None:
    assert row.passed is passed
    assert text in str(row)


@needs_kernels
def test_a_busy_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "idle_share", lambda: 0.31)
    with pytest.raises(UserError, match=r"only 31% of this machine is idle .* --any-load"):
        cpu.run(threads=1, dtypes=("fp32",))


def test_idleness_is_a_share() -> None:
    assert 0 <= timing.idle_share(0.05) <= 1


@needs_kernels
def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.xielu
    wrong = {
        "y": lambda x, *alphas: right(x, *alphas) * 1.001,
        "dx": lambda x, *alphas: right(x, *alphas) + 0.001 * (x - x.detach()),
        "alpha_p's gradient": lambda x, p, n: right(x, p + 0.001 * (p - p.detach()), n),
    }
    for name, kernel in wrong.items():
        monkeypatch.setattr(cpu, "xielu", kernel)
        with pytest.raises(RuntimeError, match=f"the CPU kernel's {name} is wrong by"):
            next(iter(cpu.speed(torch.float32)))


@needs_kernels
def test_figures_are_appended_to_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Row("forward / copy", 1.08, "1.080 (1.0-1.1), 6.0 ms", 1.1), Row("other", 2.0)]
    monkeypatch.setattr(cpu, "_in_own_process", lambda *_: iter(found))
    path = tmp_path / "rows.csv"
    for _ in range(2):
        assert cpu.run(threads=2, dtypes=("bf16",), any_load=True, csv=path)
    lines = list(DictReader(path.read_text().splitlines()))
    assert [line["what"] for line in lines] == ["forward / copy", "other"] * 2
    assert (lines[0]["value"], lines[0]["dtype"], lines[0]["threads"]) == ("1.0800", "bf16", "2")
    with pytest.raises(UserError, match=r"--csv: .*none/rows.csv cannot be written: No such"):
        cpu.run(threads=2, dtypes=("bf16",), any_load=True, csv=tmp_path / "none/rows.csv")


def test_options_of_another_mode_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--static", "sm_90", "--threads", "2"]) == 2
    assert "--threads means nothing with --static; it belongs to --cpu" in capsys.readouterr().err
    assert cli.main(["bench", "--accuracy", "--csv", "rows.csv"]) == 2
    assert "it belongs to --cpu and --gpu" in capsys.readouterr().err


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("dtype", cpu.DTYPES.values(), ids=cpu.DTYPES.keys())
def test_every_figure_is_measured(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SHAPE": (64, 96), "MLP_TOKENS": 16, "MLP_HIDDEN": 32}.items():
        monkeypatch.setattr(cpu, name, value)
    rows = list(cpu.speed(dtype))
    print("\n".join(map(str, rows)))
    assert len(rows) == 6
    assert all(row.value > 0 for row in rows)
