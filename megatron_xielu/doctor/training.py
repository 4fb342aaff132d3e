"""Small models that train on this machine: that they learn, resume, and agree with each other."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_xielu.doctor.outcome import Failed

if TYPE_CHECKING:
    from megatron_xielu.mcore.one_rank import Run, Training

VOCAB_SIZE = 512
STEPS = 4
# nats: what rounding y to bf16 before FP8 may change, 30 times what an H100 showed (0.0006). FP8
# itself changes these losses by less in the emulation
PARITY = 0.02


def learns(transformer_impl: Any) -> str:
    """Some steps on one batch: the loss falls from that of a guess, and the alphas move."""
    with _training() as (run, start):
        training = start(replace(run, transformer_impl=transformer_impl))
        before = training.alphas()
        losses = [training.step(_batch(run)) for _ in range(STEPS)]
        moved = sum(before[name] != value for name, value in training.alphas().items())
    guess = math.log(VOCAB_SIZE)
    said = f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {moved} of {len(before)} alphas moved"
    # weights of the initial size make logits that are small beside 1
    if not (abs(losses[0] - guess) < 0.1 and losses[-1] < losses[0] and moved == len(before)):
        raise Failed(f"{said}; it should begin near {guess:.3f} and fall, and all should move")
    return said


def resumes(arguments: str) -> str:
    """Steps, a checkpoint, another model that loads it, the rest: bit for bit the straight run."""
    transformer_impl, fp8 = arguments.split()
    _choose_deterministic_kernels()
    with _training() as (run, start), tempfile.TemporaryDirectory() as folder:
        run = _with(run, transformer_impl, fp8)
        straight = start(run)
        expected = [straight.step(_batch(run, number)) for number in range(2 * STEPS)]
        first = start(run)
        losses = [first.step(_batch(run, number)) for number in range(STEPS)]
        first.save(Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        # what does not come from the file is another model's
        second = start(replace(run, seed=2))
        second.load(Path(folder))
        losses += [second.step(_batch(run, number)) for number in range(STEPS, 2 * STEPS)]
        differing = second.differing(straight)
    if losses != expected or differing:
        unequal = [a != b for a, b in zip(losses, expected, strict=True)]
        where = f"the loss differs from step {unequal.index(True)} on" if any(unequal) else ""
        raise Failed(
            f"{STEPS} + {STEPS} steps are not {2 * STEPS}: {where or 'losses are equal'}, "
            f"{len(differing)} parameters differ {', '.join(differing[:2])}"
        )
    return f"{size / 1e6:.1f} MB saved and loaded; {STEPS} + {STEPS} steps are {2 * STEPS} by bits"


def emulates() -> str:
    """FP8's numbers in the local layers."""
    with _training() as (run, start):
        losses = {}
        for recipe in ("off", "delayed", "tensorwise", "blockwise"):
            training = start(_with(run, "local", recipe))
            losses[recipe] = [training.step(_batch(run)) for _ in range(STEPS)]
    plain = losses.pop("off")
    off = {name: _apart(found, plain) for name, found in losses.items()}
    said = ", ".join(f"{name} {value:.4f}" for name, value in off.items())
    # none would mean that nothing was quantized
    if not all(0 < value < PARITY for value in off.values()):
        raise Failed(f"losses differ from bf16's by {said} nats; it should be 0 to {PARITY}")
    return f"losses differ from bf16's by {said} nats"


def fused_is_unfused(recipe: str) -> str:
    """xIELU that writes FP8 itself against xIELU in bf16 that TransformerEngine casts."""
    losses = {}
    with _training() as (run, start):
        run = _with(run, "transformer_engine", recipe)
        for fused in (False, True):
            training = start(replace(run, fused=fused))
            losses[fused] = [training.step(_batch(run)) for _ in range(STEPS)]
    apart = _apart(losses[True], losses[False])
    if not apart <= PARITY:
        raise Failed(f"losses differ by {apart:.4f} nats, more than {PARITY}")
    return f"losses within {apart:.4f} nats of the unfused ones"


def captured_is_not_captured() -> str:
    """Megatron's own CUDA graphs, one for each layer, from the same checkpoint as without."""
    with _training() as (run, start), tempfile.TemporaryDirectory() as folder:
        run = _with(run, "transformer_engine", "off")
        plain = start(run)
        plain.step(_batch(run))
        plain.save(Path(folder))
        losses = [plain.step(_batch(run)) for _ in range(STEPS)]
        captured = start(replace(run, cuda_graphs=True))
        captured.load(Path(folder))
        apart = _apart([captured.step(_batch(run)) for _ in range(STEPS)], losses)
    if not apart <= PARITY:
        raise Failed(f"losses differ by {apart:.4f} nats, more than {PARITY}")
    return f"losses within {apart:.4f} nats of those without graphs"


def layouts() -> str:
    """`doctor --layouts` as far as one rank goes: every kind of model, both optimizers."""
    from megatron_xielu.training import layouts as matrix

    if matrix.layouts(matrix.Request(nproc=1)):
        raise Failed("a layout disagrees; megatron-xielu doctor --layouts --nproc 1 shows which")
    return "every kind of model trains, saves and loads"


@contextmanager
def _training() -> Iterator[tuple[Run, Callable[[Run], Training]]]:
    """Megatron on this process alone; yields a small run, and what builds a model of one."""
    logging.disable(logging.WARNING)
    from megatron_xielu.mcore import cpu_platform

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    cpu_platform.hide_gpu_libraries()
    cpu_platform.enable()
    from megatron_xielu.mcore import contract
    from megatron_xielu.mcore.one_rank import Run, Sizes, Training, only_rank

    contract.check_version()
    # widths and tokens that every FP8 recipe takes
    run = Run(steps=100, sizes=Sizes(num_layers=2, hidden_size=128, seq_length=128))
    with only_rank(backend):
        yield run, lambda run: Training(run, VOCAB_SIZE)


def _with(run: Run, transformer_impl: Any, fp8: Any) -> Run:
    from megatron_xielu.mcore.fp8_emulation import FP8Settings

    settings = FP8Settings(fp8, "e4m3" if fp8 == "blockwise" else "hybrid")
    fused = transformer_impl == "transformer_engine" and fp8 != "off"
    return replace(run, transformer_impl=transformer_impl, fp8=settings, fused=fused)


def _batch(run: Run, number: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    shape = (run.sizes.global_batch_size, run.sizes.seq_length + 1)
    return torch.randint(VOCAB_SIZE, shape, generator=generator)


def _choose_deterministic_kernels() -> None:
    # read when the first kernel of each library is chosen
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _apart(some: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))
