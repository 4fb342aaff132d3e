"""What one MLP's xIELU meets in a step that is looked at: sums that stay on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_xielu.ops import fp8_reference
from megatron_xielu.ops.fp8_reference import Quantized, Scaling

SUMS = ("inputs", "squares", "fourths", "written", "saturated", "flushed")


class Look:
    """Counts while `on`; otherwise an xIELU pays for one test of a flag in Python.

    Attributes:
        sums: float64, one number for each of SUMS.
        amax: float64, one element; below 0 where nothing was written in FP8.
    """

    def __init__(self) -> None:
        self.on = False
        self.sums: Tensor | None = None
        self.amax: Tensor | None = None

    def begin(self) -> None:
        """Forget what was seen and count from now on."""
        self.on, self.sums, self.amax = True, None, None

    @torch.no_grad()
    def see_input(self, x: Tensor) -> None:
        """xIELU's input, any shape: two reductions, without a temporary tensor of its size."""
        norms = [torch.linalg.vector_norm(x, order, dtype=torch.float32) for order in (2, 4)]
        squares, fourths = (
            norm.double() ** order for norm, order in zip(norms, (2, 4), strict=True)
        )
        self._add(squares.new_tensor(x.numel()), squares, fourths, *squares.new_zeros(3))

    @torch.no_grad()
    def see_output(self, y: Tensor, parts: Quantized, scaling: Scaling) -> None:
        """xIELU's output, and what was written of it in FP8; needs 3 bytes per element meanwhile.

        Args:
            y: in a wider type, of any shape.
            parts: with the data by row.
            scaling: of the data.
        """
        assert parts.rowwise is not None
        # all bits but the sign, so that -0 is 0
        kept = (parts.rowwise.view(torch.uint8) & 0x7F).count_nonzero()
        # the kernel's own where it had to find it
        amax = y.abs().amax() if parts.amax is None else parts.amax
        saturated = (y.abs() > fp8_reference.saturates_above(scaling, y.dtype)).sum()
        none = kept.new_zeros((), dtype=torch.float64)
        self._add(
            none,
            none,
            none,
            none + y.numel(),
            saturated.double(),
            (y.count_nonzero() - kept).double(),
        )
        amax = amax.double().reshape(1)
        self.amax = amax if self.amax is None else torch.fmax(self.amax, amax)

    def _add(self, *numbers: Tensor) -> None:
        found = torch.stack(numbers)
        self.sums = found if self.sums is None else self.sums + found
