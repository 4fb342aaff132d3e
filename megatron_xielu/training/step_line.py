"""The text of a step line: columns that stay aligned whatever numbers a run produces."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence


def columns(train_iters: int, *, with_alphas: bool, with_mfu: bool) -> list[tuple[str, int]]:
    """(head, width) of every column; the widths hold every value that a run can produce."""
    heads = [
        ("step/total", max(10, 2 * len(str(train_iters)) + 1)),
        ("done", 6),
        ("tokens", 7),
        ("loss", 8),
        ("grad norm", 9),
        ("lr", 8),
        ("a_p", 11),
        ("a_n", 11),
        ("tok/s", 7),
        ("TFLOP/s", 7),
        ("MFU", 6),
        ("ETA", 8),
        ("finish", 11),
    ]
    left_out = set() if with_alphas else {"a_p", "a_n"}
    left_out |= set() if with_mfu else {"MFU"}
    return [(head, width) for head, width in heads if head not in left_out]


def aligned(cells: Sequence[str], columns: Sequence[tuple[str, int]]) -> str:
    """One line; fewer cells than columns fill the line's left part."""
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, columns, strict=False))


def decimal(value: float | None) -> str:
    """At most 8 characters, such as 2.7134 or 3.00e-05."""
    if value is None:
        return "-"
    fixed = f"{value:.4f}"
    hides_all_digits = 0 < abs(value) < 1e-3
    return f"{value:.2e}" if len(fixed) > 8 or hides_all_digits else fixed


def throughput(tflops: float) -> str:
    """At most 7 characters: a CPU reaches hundredths of a TFLOP/s, a GPU hundreds."""
    if tflops < 1e-3:
        return f"{tflops:.1e}"
    return f"{tflops:.4f}" if tflops < 10 else f"{tflops:.1f}"


def quantity(value: float) -> str:
    """At most 7 characters, such as 512, 1.05M or 125.00B."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999,999 is 1.00M and not 1000.00k
        if value >= 0.999995 * scale:
            return f"{value / scale:.2f}{unit}"
    return f"{value:.0f}"


def lowest_highest(values: Sequence[float]) -> str:
    """At most 11 characters, such as 0.79-0.83; nan if any layer is."""
    if not values:
        return "-"
    if any(math.isnan(value) for value in values):
        return "nan"
    return f"{_short(min(values))}-{_short(max(values))}"


def _short(value: float) -> str:
    candidates = (f"{value:.2f}", f"{value:.0f}", f"{value:.0e}")
    return next((text for text in candidates if len(text) <= 5), candidates[-1])


def perplexity(loss: float) -> str:
    """exp(loss), such as 18.21; the loss is in nats per token."""
    # beyond 700 nats exp overflows, and the number means nothing long before that
    value = math.inf if loss >= 700 else math.exp(loss)
    return f"{value:.2f}" if value < 1e5 else f"{value:.2e}"


def duration(seconds: float) -> str:
    """h:mm:ss below a day, else days and hours; at most 8 characters below 1000 days."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{minute:02d}:{second:02d}"
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02d}h" if days < 1000 else ">999d"


def clock_time(timestamp: float, *, days_ahead: float) -> str:
    """Local time of a moment: 09-22 13:28, or 2029-09-22 where the year is in doubt."""
    pattern = "%m-%d %H:%M" if days_ahead < 300 else "%Y-%m-%d"
    return time.strftime(pattern, time.localtime(timestamp))
