"""Matrices a few rows at a time, so that no whole one is held in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from types import EllipsisType

from torch import Tensor

_NUMBERS = 2**22
"""Of a block, unless one row is longer: 17 MB in fp32."""

Round = Callable[[str, Tensor], Tensor]
"""Rows of a tensor by Hugging Face's name of it, or of its first part, to what is computed with."""


def row_ranges(shape: Sequence[int]) -> Iterator[slice | EllipsisType]:
    """What to index a tensor of this shape with for one block after the other."""
    if not shape:
        yield ...
        return
    step = max(1, _NUMBERS // max(1, prod(shape[1:])))
    for begin in range(0, shape[0], step):
        yield slice(begin, min(begin + step, shape[0]))


def row_blocks(tensor: Tensor) -> Iterator[Tensor]:
    """The blocks of a tensor, which share its memory."""
    for rows in row_ranges(tensor.shape):
        yield tensor[rows]


def linear(x: Tensor, blocks: Iterable[Tensor], rows: int) -> Tensor:
    """x (..., columns) by the transpose of a matrix of `rows` that comes in blocks; in fp32."""
    y = x.new_empty(*x.shape[:-1], rows)
    end = 0
    for block in blocks:
        begin, end = end, end + len(block)
        # a part of its own, kept, would lie where the next block in fp32 could have its memory
        y[..., begin:end] = x @ block.float().T
    assert end == rows
    return y
