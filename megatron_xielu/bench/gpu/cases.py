"""What `gpu` measures: operations, who does them, and the copies they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_xielu.bench.gpu import copies
from megatron_xielu.bench.gpu.fp8_sides import fp8_sides
from megatron_xielu.bench.gpu.problem import Problem, Results
from megatron_xielu.bench.gpu.sides import Side, Work, sides
from megatron_xielu.ops.dispatch import Impl
from megatron_xielu.ops.triton.quantized import CAPABILITY as FP8_SINCE


@dataclass(frozen=True)
class Contender:
    """One way to do an operation.

    Attributes:
        name: for people.
        work: does it once.
        wrong: says what is wrong with the work's results, or None.
    """

    name: str
    work: Work
    wrong: Callable[[Results], str | None]


@dataclass(frozen=True)
class Operation:
    """What contenders do, and what it costs at least.

    Attributes:
        name: for people.
        bytes: that it has to read and write.
        limits: ways to move as many bytes and compute nothing; the fastest one counts.
        contenders: ours, then its peers.
    """

    name: str
    bytes: int
    limits: tuple[Contender, ...]
    contenders: tuple[Contender, ...]


def operations(problem: Problem, impl: Impl) -> Iterator[Operation]:
    """Those that the problem's device can do.

    Args:
        problem: of 16-bit numbers on a GPU.
        impl: ours, as an argument of `megatron_xielu.xielu`.
    """
    yield from _operations("", problem, sides(problem, impl))
    device = problem.x.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_SINCE:
        yield from _operations("FP8 ", problem, fp8_sides(problem, impl))


def _operations(prefix: str, problem: Problem, sides: list[Side]) -> Iterator[Operation]:
    # FP8 results are half as wide and written twice, so that both kinds move as many bytes
    size, limits = problem.x.nbytes, _Limits(problem)
    for name, nbytes, limit, works in (
        ("forward", 2 * size, limits.copy, [side.forward for side in sides]),
        ("backward", 3 * size, limits.read_two, [side.backward for side in sides]),
        ("forward+backward", 5 * size, limits.both, [side.both for side in sides]),
    ):
        contenders = tuple(
            Contender(side.name, work, partial(problem.wrong, side.allowance, side.activation))
            for side, work in zip(sides, works, strict=True)
            if work is not None
        )
        yield Operation(prefix + name, nbytes, limit(), contenders)


class _Limits:
    """Copies of a problem's tensors, each in several ways."""

    def __init__(self, problem: Problem) -> None:
        self._x, self._grad_y = problem.x, problem.grad_y
        self._out = torch.zeros_like(problem.x)

    def copy(self) -> tuple[Contender, ...]:
        def work(tile: copies.Tile) -> Results:
            copies.copy(self._x, self._out, tile)
            return Results(y=self._out)

        return self._each_tile("read 1, write 1", work, lambda: self._x)

    def read_two(self) -> tuple[Contender, ...]:
        def work(tile: copies.Tile) -> Results:
            copies.read_two(self._x, self._grad_y, self._out, tile)
            return Results(y=self._out)

        return self._each_tile("read 2, write 1", work, self._both_bits)

    def both(self) -> tuple[Contender, ...]:
        def work(tile: copies.Tile) -> Results:
            copies.copy(self._x, self._out, tile)
            copies.read_two(self._x, self._grad_y, self._out, tile)
            return Results(y=self._out)

        return self._each_tile("one after the other", work, self._both_bits)

    def _each_tile(
        self,
        name: str,
        work: Callable[[copies.Tile], Results],
        expected: Callable[[], Tensor],
    ) -> tuple[Contender, ...]:
        def wrong(results: Results) -> str | None:
            same = torch.equal(self._out.view(torch.int16), expected().view(torch.int16))
            # so that the next one cannot pass by what this one wrote
            self._out.zero_()
            return None if same else "the bytes are not those that were to be written"

        return tuple(
            Contender(f"{name}: {tile}", partial(work, tile), wrong) for tile in copies.TILES
        )

    def _both_bits(self) -> Tensor:
        return self._x.view(torch.int16) ^ self._grad_y.view(torch.int16)
