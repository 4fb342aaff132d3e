"""The CPU benchmark: its statistics and gates; no test here says how fast anything is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

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
    monkeypatch.setattr(cpu, "xielu", lambda x, *_: x * 1.001)
    with pytest.raises(RuntimeError, match="the CPU kernel is wrong by"):
        next(iter(cpu.speed(torch.float32)))


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
