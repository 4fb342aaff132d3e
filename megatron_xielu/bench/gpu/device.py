"""The device's part of `gpu`: what it is, its clocks, and times that hold on it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# uncounted rounds, in which clocks rise to what they hold under load
WARMUP = 10
Work = Callable[[], object]


@dataclass(frozen=True)
class Clocks:
    """What the GPU says of itself while it works; None where it does not.

    Attributes:
        sm_mhz, memory_mhz: clock rates.
        power_w: power drawn.
    """

    sm_mhz: float | None = None
    memory_mhz: float | None = None
    power_w: float | None = None


@dataclass(frozen=True)
class Timing:
    """What a number of pieces of work took, one after the other, many times.

    Attributes:
        microseconds: of each repetition; times of the same index were taken next to each other.
        clocks: half way.
    """

    microseconds: dict[str, list[float]]
    clocks: Clocks


@dataclass(frozen=True)
class Machine:
    """What the figures belong to; the driver is None where nvidia-smi does not say."""

    gpu: str
    driver: str | None
    torch: str
    triton: str


def unavailable() -> str | None:
    """Why nothing can be measured here, or None."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set, so that Triton compiles nothing"
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for AMD GPUs, and the kernels are NVIDIA's"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA GPU or no driver for it"
    if torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} is sm_{major}{minor}; bf16 needs sm_80 or newer"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed, which torch for CUDA on Linux brings along"
    return None


def machine() -> Machine:
    """The current GPU and the versions of what runs on it."""
    import triton

    return Machine(
        gpu=torch.cuda.get_device_name(),
        driver=ask("driver_version")[0],
        torch=torch.__version__,
        triton=triton.__version__,
    )


def clocks() -> Clocks:
    """As they are at this moment."""
    return Clocks(*(number(text) for text in ask("clocks.sm", "clocks.mem", "power.draw")))


def ask(*fields: str) -> list[str | None]:
    """What nvidia-smi says about the current GPU, None for each field where it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        command += ["--id", f"GPU-{torch.cuda.get_device_properties().uuid}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError, AttributeError, RuntimeError):
        return [None] * len(fields)
    return parse_answer(done.stdout, len(fields))


def parse_answer(answer: str, count: int) -> list[str | None]:
    """The `count` fields of nvidia-smi's one line; None for all if there is no such line."""
    fields = [field.strip() for field in answer.strip().split(",")]
    return [*fields] if len(fields) == count else [None] * count


def number(text: str | None) -> float | None:
    """A number as nvidia-smi prints it; None for "[N/A]" and the like."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


class CudaTimer:
    """Times pieces of work in turn, each from a cold L2 cache and without launch overhead.

    Work is captured in CUDA graphs. Before each repetition the L2 cache is filled with clean data
    by reading; writing would leave lines that the work then has to evict to memory. The host stays
    ahead of the GPU, so that nothing but the work lies between a repetition's two events.
    """

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        # four times the cache, in rows that are summed
        self._filler = torch.ones(4096, max(1, cache // 4096), device="cuda")
        self._sums = torch.empty(4096, device="cuda")
        self._pool = torch.cuda.graph_pool_handle()

    def prepare(self, work: Work) -> Work:
        """The work as a CUDA graph to replay; its results are lost."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # one pool for all: nobody reads the results, so that graphs may overwrite each other's
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            work()
        return graph.replay

    def run(self, prepared: Mapping[str, Work], repetitions: int) -> Timing:
        """Times of every repetition, which runs each work once, another one first each time."""
        names, seen = list(prepared), Clocks()
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {
            name: [] for name in names
        }
        for repetition in range(-WARMUP, repetitions):
            first = repetition % len(names)
            for name in names[first:] + names[:first]:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.sum(self._filler, 1, out=self._sums)
                begin.record()
                prepared[name]()
                end.record()
                if repetition >= 0:
                    events[name].append((begin, end))
            if repetition == repetitions // 2:
                # the queue is full, so that the GPU goes on while its clocks are read
                seen = clocks()
        torch.cuda.synchronize()
        microseconds = {
            name: [1e3 * begin.elapsed_time(end) for begin, end in pairs]
            for name, pairs in events.items()
        }
        return Timing(microseconds, seen)
