"""What memory alone costs on a GPU: kernels that move bytes and compute next to nothing.

They move 32-bit words in 128-bit pieces, whatever the tensors hold. The fastest of several tilings
is the limit that a kernel of equal traffic is compared with.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes is decided where it is launched)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """What one program moves: 32-bit words, by so many warps."""

    words: int
    warps: int

    def __str__(self) -> str:
        return f"{self.words} words, {self.warps} warps"


TILES = (Tile(1024, 4), Tile(2048, 4), Tile(4096, 4), Tile(4096, 8), Tile(8192, 8))


@triton.jit
def copy_kernel(x, y, count, WORDS: tl.constexpr):
    """y = x for `count` words."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    tl.store(y + word, tl.load(x + word, mask=word < count), mask=word < count)


@triton.jit
def read_two_kernel(a, b, y, count, WORDS: tl.constexpr):
    """y = a ^ b for `count` words."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    both = tl.load(a + word, mask=word < count) ^ tl.load(b + word, mask=word < count)
    tl.store(y + word, both, mask=word < count)


def copy(x: Tensor, y: Tensor, tile: Tile) -> None:
    """Copy x to y: contiguous, of the same size, which is a multiple of 4 bytes."""
    words = _words(x)
    grid = (triton.cdiv(words.numel(), tile.words),)
    copy_kernel[grid](words, _words(y), words.numel(), WORDS=tile.words, num_warps=tile.warps)


def read_two(a: Tensor, b: Tensor, y: Tensor, tile: Tile) -> None:
    """Write the exclusive or of a's and b's bits to y; all as in `copy`."""
    words = _words(a)
    grid = (triton.cdiv(words.numel(), tile.words),)
    read_two_kernel[grid](
        words, _words(b), _words(y), words.numel(), WORDS=tile.words, num_warps=tile.warps
    )


def _words(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.int32)
