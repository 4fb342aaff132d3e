"""Run unmodified Megatron-Core without a GPU: "cuda" means "cpu".

Megatron names the CUDA device in factory calls, moves modules with `.cuda()` and asks `torch.cuda`
for streams, generators and properties. `enable` answers all of that for a machine without a GPU:

- a torch function mode rewrites every `device=` that names CUDA, `Tensor.cuda` and `Tensor.to`;
- the functions of `torch.cuda` that Megatron calls get a CPU meaning.

It changes the whole process, so only what runs a Megatron model calls it, before the model is
built. Where a GPU is present it changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.overrides import TorchFunctionMode


def hide_gpu_libraries() -> None:
    """Let Megatron find neither TransformerEngine nor Apex if there is no GPU.

    Megatron takes their kernels wherever it can import them, and they only run on GPUs. This has to
    come before Megatron is imported.
    """
    if not torch.cuda.is_available():
        for name in ("transformer_engine", "apex"):
            # None is what makes an import fail
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def enable() -> bool:
    """Make "cuda" mean "cpu" for this process if it has no GPU; returns whether it does."""
    if _enabled or torch.cuda.is_available():
        return bool(_enabled)
    # the CUDA build's compiler asks the driver for its version
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    torch._dynamo.config.disable = True
    _replace_cuda_functions()
    _enabled.append(CudaMeansCpu())
    _enabled[0].__enter__()
    return True


class CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device arguments of torch functions and tensor methods."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = torch.device("cpu")
        if func in _REPLACED_METHODS:
            return _REPLACED_METHODS[func](*args, **kwargs)
        return func(*args, **kwargs)


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _tensor_cuda(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor


def _tensor_to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    args = tuple(torch.device("cpu") if _names_cuda(arg) else arg for arg in args)
    return tensor.to(*args, **kwargs)


def _tensor_type(tensor: Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    # gradient clipping asserts on the name torch.cuda.FloatTensor
    if dtype is None:
        return tensor.type().replace("torch.", "torch.cuda.", 1)
    if isinstance(dtype, str):
        dtype = dtype.replace("torch.cuda.", "torch.")
    return tensor.type(dtype, **kwargs)


def _all_to_all_single(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    # Megatron moves split sizes to the host only from tensors that say they are on the GPU
    args = tuple(arg.tolist() if isinstance(arg, Tensor) else arg for arg in args)
    for name, value in kwargs.items():
        kwargs[name] = value.tolist() if isinstance(value, Tensor) else value
    return torch.distributed.all_to_all_single(output, input, *args, **kwargs)


_REPLACED_METHODS: dict[Any, Callable[..., Any]] = {
    torch.distributed.all_to_all_single: _all_to_all_single,
    Tensor.cuda: _tensor_cuda,
    Tensor.to: _tensor_to,
    Tensor.type: _tensor_type,
    Tensor.pin_memory: _tensor_cuda,
}


class _Stream:
    """A stream or event on a device that does everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def _in_order(self, *args: Any, **kwargs: Any) -> None:
        return None

    synchronize = wait = wait_stream = wait_event = record = _in_order

    def record_event(self, event: Any = None) -> _Stream:
        return event or self

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


@contextlib.contextmanager
def _no_context(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _answer(value: Any) -> Callable[..., Any]:
    # a function of its own per name: torch.compile's tables refuse one object under two names
    def answer(*args: Any, **kwargs: Any) -> Any:
        return value

    return answer


def _replace_cuda_functions() -> None:
    stream = _Stream()
    properties = SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=os.cpu_count() or 1
    )
    cuda: Any = torch.cuda
    constants = {
        "is_available": True,
        # Megatron's generator changes wait until CUDA is there
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "cpu",
        "get_device_capability": (0, 0),
        "get_device_properties": properties,
        "current_stream": stream,
        "default_stream": stream,
        "is_current_stream_capturing": False,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "set_device": None,
        "set_stream": None,
        "synchronize": None,
        "empty_cache": None,
        "ipc_collect": None,
        "reset_peak_memory_stats": None,
    }
    for name, value in constants.items():
        setattr(cuda, name, _answer(value))
    cuda.memory_stats = lambda *_, **__: defaultdict(int)
    # one generator serves both devices; torch.manual_seed would call these two again
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = lambda *_, **__: torch.default_generator.get_state()
    cuda.set_rng_state = lambda new_state, *_, **__: torch.default_generator.set_state(new_state)
    cuda.default_generators = (torch.default_generator,)
    cuda.Stream, cuda.Event = _Stream, type("_Event", (_Stream,), {})
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.device = _no_context
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(cuda.random, name, getattr(cuda, name))
    cuda.nvtx.range = lambda *_, **__: contextlib.nullcontext()
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _answer(None))
    for name in ("Float", "Double", "Half", "BFloat16", "Byte", "Int", "Long", "Bool"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    # a DataLoader asks here whether pinning memory has any use
    torch.accelerator.is_available = _answer(False)


_enabled: list[CudaMeansCpu] = []
