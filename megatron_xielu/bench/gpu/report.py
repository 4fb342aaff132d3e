"""The figures of `gpu`: ratios, rows of a CSV, and goals."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_xielu import __version__
from megatron_xielu.bench.gpu.device import Machine, Timing
from megatron_xielu.errors import UserError


@dataclass(frozen=True)
class Measured:
    """One operation's figures.

    Attributes:
        operation: its name.
        bytes: that it has to move.
        ours: our name.
        limit: the fastest copy's name; None where no copy was right.
        timing: of all that was timed.
        notes: why others were not, by name.
    """

    operation: str
    bytes: int
    ours: str
    limit: str | None
    timing: Timing
    notes: dict[str, str]

    def ratio(self, name: str, to: str | None) -> float | None:
        """Median of name's times relative to their neighbours of `to`; None without both."""
        times = self.timing.microseconds
        if name not in times or to not in times:
            return None
        return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))


@dataclass(frozen=True)
class Row:
    """One line of the CSV: one way to do one operation. None is an empty cell.

    Attributes:
        version: of this package.
        bytes: that the operation has to move.
        p20_us, p50_us, p80_us: percentiles of its times.
        ratio_to_copy_limit: median of pairs.
        sm_clock_mhz, mem_clock_mhz, power_w: while the operation was measured.
        note: why there are no times.
    """

    date: str
    gpu: str
    driver: str | None
    torch: str
    triton: str
    version: str
    op: str
    implementation: str
    dtype: str
    shape: str
    bytes: int
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    ratio_to_copy_limit: float | None = None
    sm_clock_mhz: float | None = None
    mem_clock_mhz: float | None = None
    power_w: float | None = None
    note: str = ""

    def __str__(self) -> str:
        start = f"  {self.implementation:<48}"
        if self.p50_us is None:
            return start + self.note
        ratio = self.ratio_to_copy_limit
        return (
            f"{start}{self.p50_us:10.1f} us ({self.p20_us:.1f}-{self.p80_us:.1f})"
            f"{self.bytes / self.p50_us / 1e6:8.2f} TB/s"
            + ("" if ratio is None else f"{ratio:9.3f} x the copy")
        )


def rows(measured: Measured, machine: Machine, dtype: str, shape: tuple[int, int]) -> list[Row]:
    """One for each implementation: the fastest copy, those that were timed, the others."""
    clocks = measured.timing.clocks
    common: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **asdict(machine),
        "version": __version__,
        "op": measured.operation,
        "dtype": dtype,
        "shape": f"{shape[0]}x{shape[1]}",
        "bytes": measured.bytes,
    }
    found = []
    for name, times in measured.timing.microseconds.items():
        p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
        ratio = measured.ratio(name, measured.limit)
        found.append(
            Row(
                **common,
                implementation=name,
                p20_us=round(p20, 3),
                p50_us=round(statistics.median(times), 3),
                p80_us=round(p80, 3),
                ratio_to_copy_limit=None if ratio is None else round(ratio, 4),
                sm_clock_mhz=clocks.sm_mhz,
                mem_clock_mhz=clocks.memory_mhz,
                power_w=clocks.power_w,
            )
        )
    for name, note in measured.notes.items():
        found.append(Row(**common, implementation=name, note=note))
    return found


def check_appendable(path: Path) -> None:
    """Refuse a CSV that rows cannot be appended to, before anything is measured.

    Raises:
        UserError: the file cannot be written, or has other columns.
    """
    try:
        with path.open("a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            header = next(csv.reader(file), None)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--csv {path} cannot be appended to: {error}") from error
    if header is not None and header != _columns():
        raise UserError(
            f"--csv {path} has the columns {','.join(header)} instead of {','.join(_columns())}; "
            "name a new file"
        )


def append(path: Path, found: Iterable[Row]) -> None:
    """Add rows to a CSV, and its header where it is empty."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _columns(), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(asdict(row) for row in found)


def _columns() -> list[str]:
    return [column.name for column in fields(Row)]


@dataclass(frozen=True)
class Goal:
    """What ours has to reach in one operation.

    Attributes:
        operation: its name.
        bound: at most so many times as long as the fastest copy of as many bytes, or, with a peer,
            at least so many times as fast as it.
        peer: how its name begins; of several the fastest one counts.
    """

    operation: str
    bound: float
    peer: str | None = None

    def __str__(self) -> str:
        if self.peer is None:
            return f"{self.operation}: <= {self.bound:.2f} x the copy"
        return f"{self.operation}: >= {self.bound:.2f} x as fast as {self.peer!r}"


GOALS = (
    Goal("forward", 1.08),
    Goal("backward", 1.10),
    Goal("FP8 forward", 1.20),
    Goal("forward+backward", 1.35, "torch.compile"),
    Goal("FP8 forward+backward", 1.50, "ours bf16, then"),
)


@dataclass(frozen=True)
class Verdict:
    """Whether a goal was met; None where there was nothing to compare."""

    goal: Goal
    met: bool | None
    found: str

    def __str__(self) -> str:
        word = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        return f"{self.goal}: {word} ({self.found})"


def judge(goal: Goal, measured: Sequence[Measured]) -> Verdict:
    """Compare a goal with the figures."""
    of = next((figures for figures in measured if figures.operation == goal.operation), None)
    if of is None:
        return Verdict(goal, None, "this GPU cannot do it")
    if of.ours not in of.timing.microseconds:
        return Verdict(goal, False, of.notes[of.ours])
    ratios = list(_ratios(goal, of))
    if not ratios:
        return Verdict(goal, None, "there is nothing to compare with")
    ratio = min(ratios)
    met = ratio <= goal.bound if goal.peer is None else ratio >= goal.bound
    return Verdict(goal, met, f"{ratio:.3f}")


def _ratios(goal: Goal, of: Measured) -> Iterator[float]:
    pairs = [(of.ours, of.limit)]
    if goal.peer is not None:
        names = (name for name in of.timing.microseconds if name.startswith(goal.peer))
        pairs = [(name, of.ours) for name in names]
    for name, to in pairs:
        ratio = of.ratio(name, to)
        if ratio is not None:
            yield ratio
