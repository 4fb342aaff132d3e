"""Speed of the GPU kernels against copies of as many bytes and against everything else there is.

Whoever can do an operation is checked against float64 first, and what is wrong is not timed. The
rest run in turn, so that a GPU whose clocks change slows all alike, and the figures that decide are
medians of the ratios of neighbours.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from megatron_xielu.bench.gpu import device
from megatron_xielu.bench.gpu.device import Clocks, Timing, Work
from megatron_xielu.bench.gpu.report import (
    GOALS,
    Measured,
    Row,
    append,
    check_appendable,
    judge,
    rows,
)
from megatron_xielu.errors import UserError

if TYPE_CHECKING:
    # it needs Triton
    from megatron_xielu.bench.gpu.cases import Contender, Operation

# x in the MLP of the 1.1B recipe, of five sequences of 4096 tokens
TOKENS, COLUMNS = 5 * 4096, 9216
# what the published code, run eagerly, and the checks need at most
BYTES_PER_ELEMENT = 100
REPETITIONS = 100
# enough to find the fastest of several copies
TRIALS = 20


class Timer(Protocol):
    """What `measure` needs of `device.CudaTimer`."""

    def prepare(self, work: Work) -> Work: ...

    def run(self, prepared: Mapping[str, Work], repetitions: int) -> Timing: ...


def run(*, csv: Path | None = None) -> bool:
    """Measure on the current GPU, print, and say whether no goal was missed.

    Args:
        csv: append a row for each implementation of each operation to this file.

    Raises:
        UserError: there is no GPU to measure on, or the file cannot be appended to.
    """
    if reason := device.unavailable():
        raise UserError(
            f"bench --gpu cannot measure here: {reason}. Run it on a machine with an NVIDIA GPU "
            "that nothing else uses; without one, --static sm_90 reads the machine code of the "
            "kernels and --cpu times those for CPUs"
        )
    if csv is not None:
        check_appendable(csv)
    measured = measure_all(fitting_tokens(torch.cuda.mem_get_info()[0]), csv)
    verdicts = [judge(goal, measured) for goal in GOALS]
    print("\ngoals", *verdicts, sep="\n  ")
    return all(verdict.met is not False for verdict in verdicts)


def measure_all(tokens: int, csv: Path | None, repetitions: int = REPETITIONS) -> list[Measured]:
    """Every operation on the current GPU, printed and appended as soon as it is measured."""
    from megatron_xielu.bench.gpu.cases import operations
    from megatron_xielu.bench.gpu.problem import Problem

    machine, timer = device.machine(), device.CudaTimer()
    print(f"{machine.gpu}, driver {machine.driver}, torch {machine.torch}, Triton {machine.triton}")
    problem = Problem.random(tokens, COLUMNS, torch.bfloat16, "cuda")
    measured = []
    for operation in operations(problem, "triton"):
        measured.append(measure(operation, timer, repetitions))
        found = rows(measured[-1], machine, "bf16", (tokens, COLUMNS))
        show(measured[-1], found)
        if csv is not None:
            append(csv, found)
    return measured


def fitting_tokens(free_bytes: int) -> int:
    """`TOKENS`, halved until the measurement fits the memory."""
    tokens = TOKENS
    while tokens > 1 and tokens * COLUMNS * BYTES_PER_ELEMENT > free_bytes:
        tokens //= 2
    return tokens


def measure(operation: Operation, timer: Timer, repetitions: int = REPETITIONS) -> Measured:
    """Check whoever does the operation, then time those that are right."""
    notes: dict[str, str] = {}
    works = dict(_right(operation.limits, timer, notes))
    limit = None
    if works:
        trials = timer.run(works, TRIALS).microseconds
        limit = min(works, key=lambda name: statistics.median(trials[name]))
        works = {limit: works[limit]}
    works |= _right(operation.contenders, timer, notes)
    timing = timer.run(works, repetitions) if works else Timing({}, Clocks())
    ours = operation.contenders[0].name
    return Measured(operation.name, operation.bytes, ours, limit, timing, notes)


def _right(
    contenders: Iterable[Contender], timer: Timer, notes: dict[str, str]
) -> Iterator[tuple[str, Work]]:
    """Name and prepared work of those whose results are right; of the others why not, in notes."""
    for contender in contenders:
        try:
            wrong = contender.wrong(contender.work())
            if wrong is None:
                yield contender.name, timer.prepare(contender.work)
            else:
                notes[contender.name] = f"not timed, for it is wrong: {wrong}"
        except Exception as error:
            # whatever ails one of them, the others are measured
            reason = str(error).strip().partition("\n")[0]
            notes[contender.name] = f"not timed: {type(error).__name__}: {reason}"


def show(measured: Measured, found: Sequence[Row]) -> None:
    """Print an operation's table."""
    clocks = measured.timing.clocks
    print(
        f"\n{measured.operation}, {found[0].shape} {found[0].dtype}, {measured.bytes / 1e9:.2f} GB;"
        f" SM {clocks.sm_mhz} MHz, memory {clocks.memory_mhz} MHz, {clocks.power_w} W"
    )
    print(*found, sep="\n", flush=True)
