"""Ratios of times that hold on a machine whose speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """Time of one piece of work relative to another's, over pairs run one after the other."""

    median: float
    low: float
    """Lower quartile of the pairs' ratios."""
    high: float
    """Upper quartile."""
    milliseconds: float
    """Median time of the first piece of work."""

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def compare(work: Work, baseline: Work, *, pairs: int, warmup: int = 2) -> Ratio:
    """Run both in turn and take the ratio of each pair, so that a slow moment slows both.

    Args:
        pairs: at least 2.
        warmup: pairs that are not counted.
    """
    seconds = []
    for _ in range(warmup + pairs):
        seconds.append((_time(work), _time(baseline)))
    counted = seconds[warmup:]
    ratios = [a / b for a, b in counted]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high, 1e3 * statistics.median(a for a, _ in counted))


def idle_share(seconds: float = 1.0) -> float:
    """Share of all cores' time in which none of them had work; 1 where the system does not say."""
    before = _cpu_times()
    time.sleep(seconds)
    after = _cpu_times()
    if before is None or after is None:
        return 1.0
    idle, total = after[0] - before[0], after[1] - before[1]
    return idle / total if total else 1.0


def _time(work: Work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _cpu_times() -> tuple[int, int] | None:
    """Clock ticks (idle and waiting for disks, all), from /proc/stat."""
    try:
        line = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return None
    ticks = [int(word) for word in line.split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
