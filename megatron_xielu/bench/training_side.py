"""One variant of `bench --training` in a process of its own: training_side JSON; prints JSON."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import logging
import os
import statistics
import sys
import time
from typing import Any

import torch


def main(words: str) -> None:
    """Train a model and say what its steps took."""
    result = os.dup(1)
    # whatever else is printed is no result
    os.dup2(2, 1)
    os.write(result, json.dumps(measure(**json.loads(words))).encode())
    os._exit(0)


def measure(
    *,
    run: dict[str, Any],
    sizes: dict[str, Any],
    fp8: dict[str, Any],
    vocab_size: int,
    warmup: int,
    steps: int,
) -> dict[str, Any]:
    """Seconds of each step after the warm-up, peak memory, and what the machine is.

    Args:
        run, sizes, fp8: the fields of `Run`, `Sizes` and `FP8Settings` that are not at their
            default.
        vocab_size: of the model.
        warmup, steps: how many steps are left out, and counted.
    """
    logging.disable(logging.WARNING)
    from megatron_xielu.mcore import cpu_platform

    on_gpu = torch.cuda.is_available()
    cpu_platform.hide_gpu_libraries()
    cpu_platform.enable()
    from megatron_xielu.mcore.fp8_emulation import FP8Settings
    from megatron_xielu.mcore.one_rank import Run, Sizes, Training, only_rank

    what = Run(**run, sizes=Sizes(**sizes), fp8=FP8Settings(**fp8), steps=10_000)
    generator = torch.Generator().manual_seed(0)
    shape = (what.sizes.global_batch_size, what.sizes.seq_length + 1)
    with only_rank("nccl" if on_gpu else "gloo"):
        training = Training(what, vocab_size)
        batch = torch.randint(vocab_size, shape, generator=generator).cuda()
        clock = _on_a_gpu if on_gpu else _on_a_cpu
        losses: list[float] = []
        for _ in range(warmup):
            losses.append(training.step(batch))
        # what the first steps allocate once is part of the peak
        seconds = clock(lambda: losses.append(training.step(batch)), steps)
        return {
            "seconds": seconds,
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "parameters": training.parameters,
            "loss": statistics.fmean(losses[-steps:]),
            **_machine(on_gpu),
        }


def _on_a_gpu(step: Any, count: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]


def _on_a_cpu(step: Any, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _machine(on_gpu: bool) -> dict[str, str | None]:
    from megatron_xielu.bench.gpu.device import ask

    te = None
    if on_gpu:
        try:
            te = importlib.metadata.version("transformer_engine")
        except importlib.metadata.PackageNotFoundError:
            te = None
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "driver": ask("driver_version")[0] if on_gpu else None,
        "torch": torch.__version__,
        "transformer_engine": te,
    }


if __name__ == "__main__":
    main(sys.argv[1])
