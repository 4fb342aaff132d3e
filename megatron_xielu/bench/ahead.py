"""Triton's launches without a GPU: compiled as on one, recorded instead of run.

The kernels' own launch code runs, on tensors of the "meta" device, which have shapes and no memory.
So what is compiled is what a GPU would get: the same data types, constants, warps and divisibility
by 16, with nothing stated a second time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from megatron_xielu.errors import UserError

_numbers = itertools.count()


class Size(NamedTuple):
    """Of a tensor that a kernel gets a pointer to."""

    name: str
    elements: int
    itemsize: int


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: its name.
        programs: how many copies of it run, each a block of `warps` warps of 32 threads.
        shared: bytes of shared memory of a program.
        tensors: those among the arguments, by their ordinal in the compiled kernel.
        cubin: the compiled kernel.
    """

    kernel: str
    programs: int
    warps: int
    shared: int
    tensors: dict[int, Size]
    cubin: bytes

    @property
    def threads(self) -> int:
        """Of one program."""
        return 32 * self.warps


def record(work: Callable[[], object], capability: int) -> list[Launch]:
    """The launches that `work` does, compiled for a GPU of a compute capability such as 90.

    Args:
        work: calls launch code with tensors of the device "meta".

    Raises:
        UserError: Triton is not installed, or its interpreter replaces its compiler.
    """
    with pretended_driver(capability) as recorder:
        work()
    return recorder.launches


@contextlib.contextmanager
def pretended_driver(capability: int) -> Iterator[Recorder]:
    """Triton believes in a GPU of this compute capability.

    Raises:
        UserError: as `record`.
    """
    try:
        from triton.runtime.driver import driver
    except ImportError:
        raise UserError("this needs Triton, which torch for CUDA on Linux brings along") from None
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise UserError("TRITON_INTERPRET is set, so that Triton compiles nothing: unset it")
    recorder = Recorder(capability)
    driver.set_active(recorder)
    try:
        yield recorder
    finally:
        # the next use looks for a GPU again
        driver.set_active(None)


class Recorder:
    """What Triton asks a GPU's driver for while it launches a kernel."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.launches: list[Launch] = []
        # Triton keeps compiled kernels by device, and these must never meet a real one
        self._device = f"sm_{capability}, recorder {next(_numbers)}"
        self.utils = self

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> str:
        return self._device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_properties(self, device: str) -> dict[str, int]:
        # more than any kernel: a limit of some GPU is no reason not to show the code
        return {"max_shared_mem": 1 << 30}

    def load_binary(
        self, name: str, cubin: bytes, shared: int, device: str
    ) -> tuple[object, bytes, int, int, int]:
        """The module, the function, and its registers, spills and most threads."""
        return self, cubin, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        names = source.fn.arg_names

        def launch(x: int, y: int, z: int, stream: int, cubin: bytes, *rest: Any) -> None:
            # packed metadata, launch metadata and two hooks come before the kernel's arguments
            arguments = zip(names, rest[4:], strict=True)
            kept = [pair for pair in arguments if source.signature[pair[0]] != "constexpr"]
            self.launches.append(
                Launch(
                    kernel=source.name,
                    programs=x * y * z,
                    warps=metadata.num_warps,
                    shared=metadata.shared,
                    tensors={
                        ordinal: Size(name, value.numel(), value.element_size())
                        for ordinal, (name, value) in enumerate(kept)
                        if isinstance(value, Tensor)
                    },
                    cubin=cubin,
                )
            )

        return launch
