"""Write a safetensors file tensor by tensor, in any order.

The library's `save_file` wants all tensors at once. The format is simple enough: the length of a
JSON header as 8 bytes, the header (name to dtype, shape, offsets), then the bytes of the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """A file of the given tensors; as a context manager it ends whole or with an error.

    Args:
        path: must not exist.
        specs: every tensor by name.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self._specs = dict(specs)
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        # readers view the bytes as numbers, so wider ones come first: all are aligned then
        for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
            begin, end = end, end + spec.num_bytes
            self._offsets[name] = begin
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._begin = 8 + len(text)
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor, contiguous and of its spec's shape and type, into its place."""
        spec = self._specs.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), name
        self._file.seek(self._begin + self._offsets[name])
        self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        assert error is not None or not self._specs, f"not written: {sorted(self._specs)[:3]}"
