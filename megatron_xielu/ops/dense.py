"""Memory layouts that an elementwise kernel can walk from the first byte to the last."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the memory order of `like`, which is dense: itself, or a copy where that differs.

    `torch.empty_like(x)` is dense for any x, and has x's own order where x is dense.
    """
    if tensor.stride() == like.stride() or tensor.numel() <= 1:
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
