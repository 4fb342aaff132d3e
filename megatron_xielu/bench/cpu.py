"""Speed and memory of the CPU kernels, as ratios to what memory alone costs and to others.

Each data type and number of threads is measured in a process of its own, because the threads and
the allocator are set when it starts: transparent huge pages (THP_MEM_ALLOC_ENABLE=1) halve the time
of whatever writes a large fresh tensor, for every contender alike.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from csv import DictWriter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_xielu import __version__
from megatron_xielu.activations import XIELU
from megatron_xielu.bench.timing import Ratio, compare, idle_share
from megatron_xielu.errors import UserError
from megatron_xielu.ops import xielu
from megatron_xielu.ops.cpu import build
from megatron_xielu.ops.reference import inverse_softplus, xielu_as_published, xielu_reference

# 37.7M elements: the MLP of the 1.1B recipe on one sequence of 4096 tokens
SHAPE = (4096, 9216)
MLP_TOKENS, MLP_HIDDEN = 1024, 1536
IDLE = 0.9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """One measured figure and its limit.

    Attributes:
        what: what is compared.
        value: a ratio of times, or bytes per element.
        detail: quartiles and time, for people.
        limit: the gate; None where the figure is only reported.
        at_least: whether the gate is a lower limit.
    """

    what: str
    value: float
    detail: str = ""
    limit: float | None = None
    at_least: bool = False

    @property
    def passed(self) -> bool:
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        if self.limit is None:
            gate = ""
        else:
            sign = ">=" if self.at_least else "<="
            gate = f"{sign} {self.limit:g} {'ok' if self.passed else 'MISSED'}"
        return f"{self.what:<44}{self.value:>8.3f}  {gate:<16}{self.detail}"


def run(
    *, threads: int, dtypes: tuple[str, ...], any_load: bool = False, csv: Path | None = None
) -> bool:
    """Measure, print, and say whether every gate was passed.

    Args:
        threads: of the measured processes.
        dtypes: names in `DTYPES`.
        any_load: measure on a busy machine too, where the figures say little.
        csv: append a line for each figure to this file.

    Raises:
        UserError: the machine is busy, or the kernels cannot be built.
    """
    if reason := build.load():
        raise UserError(f"the CPU kernels cannot be built: {reason}")
    idle = idle_share()
    if idle < IDLE and not any_load:
        raise UserError(
            f"only {idle:.0%} of this machine is idle and timing needs {IDLE:.0%}: end what runs "
            "beside, or print figures anyway with --any-load"
        )
    sets = ", ".join(torch.ops.megatron_xielu_cpu.instruction_sets())
    print(f"{platform.machine()}, {os.cpu_count()} cores, {sets}; torch {torch.__version__}")
    passed = True
    for dtype in dtypes:
        print(f"\n{dtype}, {threads} threads, {SHAPE[0]} x {SHAPE[1]}; median (quartiles) of pairs")
        for row in _in_own_process(dtype, threads):
            print(row, flush=True)
            passed &= row.passed
            if csv is not None:
                _append(csv, dtype, threads, row)
    return passed


def _append(path: Path, dtype: str, threads: int, row: Row) -> None:
    line = {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_name(),
        "threads": threads,
        "torch": torch.__version__,
        "version": __version__,
        "dtype": dtype,
        "shape": f"{SHAPE[0]}x{SHAPE[1]}",
        "what": row.what,
        "value": f"{row.value:.4f}",
        "detail": row.detail,
        "limit": row.limit,
    }
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = DictWriter(file, line)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(line)
    except OSError as error:
        raise UserError(f"--csv: {path} cannot be written: {error.strerror}") from error


def _cpu_name() -> str:
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _in_own_process(dtype: str, threads: int) -> Iterator[Row]:
    environment = {
        **os.environ,
        "THP_MEM_ALLOC_ENABLE": "1",
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
    }
    for part in ("memory", "speed"):
        command = [sys.executable, "-m", "megatron_xielu.bench.cpu", part, dtype, str(threads)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            assert child.stdout is not None
            yield from (Row(**json.loads(line)) for line in child.stdout)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with exit code {child.returncode}")


def memory(dtype: torch.dtype) -> Iterator[Row]:
    """Peak memory of one forward and backward beyond x and dy, in bytes per element."""
    # what the first call of all imports is no memory of the kernels
    small = torch.ones(4, dtype=dtype)
    xielu(small.clone().requires_grad_(), *_alphas()).backward(small)
    x, grad = _filled(dtype).requires_grad_(), _filled(dtype)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    xielu(x, *_alphas()).backward(grad)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = {torch.float32: 8.1, torch.bfloat16: 4.1}[dtype]
    value = (after - before) * 1024 / x.numel()
    yield Row("peak memory beyond x and dy, bytes/element", value, limit=limit)


def speed(dtype: torch.dtype) -> Iterator[Row]:
    """Kernels against memory alone, then forward and backward against others, then an MLP."""
    _refuse_wrong_kernels(dtype)
    x, grad, out = _filled(dtype), _filled(dtype), torch.zeros(SHAPE, dtype=dtype)
    alphas = _alphas()
    yield from _kernels(x, grad, out, alphas)
    del out
    yield from _against_others(x, grad, alphas)
    del x, grad
    yield from _mlp(dtype)


def _kernels(x: Tensor, grad: Tensor, out: Tensor, alphas: tuple[Tensor, ...]) -> Iterator[Row]:
    ops = torch.ops.megatron_xielu_cpu
    limit = 1.10 if x.dtype == torch.float32 else 1.35
    raw = [alpha.detach() for alpha in alphas]
    forward = compare(
        lambda: ops.forward(x, None, raw, 0.5, "xielu", out, True),
        lambda: ops.copy(x, out, True),
        pairs=40,
    )
    yield _row("forward / copy", forward, limit)
    backward = compare(
        lambda: ops.backward(grad, x, None, raw, 0.5, "xielu", out, True),
        lambda: ops.read_two_write_one(x, grad, out, True),
        pairs=40,
    )
    yield _row("backward / read-2-write-1", backward, limit)


def _against_others(x: Tensor, grad: Tensor, alphas: tuple[Tensor, ...]) -> Iterator[Row]:
    x = x.detach().requires_grad_()

    def both(function: Callable[..., Tensor]) -> Callable[[], None]:
        def work() -> None:
            x.grad = None
            function(x, *alphas).backward(grad)

        return work

    ours = both(xielu)
    compiled = compare(both(torch.compile(xielu_reference)), ours, pairs=10)
    limit = 1.7 if x.dtype == torch.float32 else 2.3
    yield _row("torch.compile of the formula / ours", compiled, limit, at_least=True)
    published = compare(both(_published), ours, pairs=3, warmup=1)
    yield _row("published eager code / ours", published, 20, at_least=True)
    silu = compare(lambda: F.silu(x.detach()), lambda: xielu(x.detach(), *alphas), pairs=10)
    yield _row("forward of torch's silu / ours", silu)


def _published(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    # the published module keeps its parameters in the model's type
    return xielu_as_published(x, alpha_p.to(x.dtype), alpha_n.to(x.dtype))


def _mlp(dtype: torch.dtype) -> Iterator[Row]:
    x = torch.randn(MLP_TOKENS, MLP_HIDDEN).to(dtype).requires_grad_()
    up = (torch.randn(SHAPE[1], MLP_HIDDEN) * MLP_HIDDEN**-0.5).to(dtype).requires_grad_()
    down = (torch.randn(MLP_HIDDEN, SHAPE[1]) * SHAPE[1] ** -0.5).to(dtype).requires_grad_()
    grad = torch.randn(MLP_TOKENS, MLP_HIDDEN).to(dtype)
    activation = XIELU()

    def block(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def work() -> None:
            F.linear(function(F.linear(x, up)), down).backward(grad)

        return work

    ratio = compare(block(activation), block(lambda hidden: hidden), pairs=20)
    yield _row(f"MLP {MLP_TOKENS} x {MLP_HIDDEN} x {SHAPE[1]} / without it", ratio, 1.03)


def _row(what: str, ratio: Ratio, limit: float | None = None, *, at_least: bool = False) -> Row:
    return Row(what, ratio.median, f"{ratio}, {ratio.milliseconds:.1f} ms", limit, at_least)


def _refuse_wrong_kernels(dtype: torch.dtype) -> None:
    """A wrong kernel's speed means nothing: y, dx and the alphas' gradients against float64."""
    x, grad = (torch.randn(1 << 18).to(dtype) for _ in range(2))

    def results(function: Callable[..., Tensor], wide: torch.dtype) -> list[Tensor]:
        leaves = [
            x.to(wide),
            *(alpha.detach().to(torch.promote_types(wide, torch.float32)) for alpha in _alphas()),
        ]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(wide))]

    names = ("y", "dx", "alpha_p's gradient", "alpha_n's gradient")
    pairs = zip(results(xielu, dtype), results(xielu_reference, torch.float64), strict=True)
    for name, (got, want) in zip(names, pairs, strict=True):
        error = float(((got.double() - want).abs() / (1 + want.abs())).max())
        # one rounding of y and dx, and of the slope before; sums of many signs for the alphas
        bound = torch.finfo(dtype).eps if got.numel() > 1 else 1e-5
        if not error <= bound:
            raise RuntimeError(f"the CPU kernel's {name} is wrong by {error:.1e} > {bound:.1e}")


def _filled(dtype: torch.dtype) -> Tensor:
    """Normal numbers, written in pieces so that no float32 copy counts as peak memory."""
    tensor = torch.empty(SHAPE, dtype=dtype)
    for rows in tensor.split(128):
        rows.copy_(torch.randn(rows.shape))
    return tensor


def _alphas() -> tuple[Tensor, Tensor]:
    alpha_p, alpha_n = (torch.tensor([inverse_softplus(value)]) for value in (0.8, 0.3))
    return alpha_p.requires_grad_(), alpha_n.requires_grad_()


def main(part: str, dtype: str, threads: int) -> None:
    """Measure one part and print a row of JSON each."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    for row in {"memory": memory, "speed": speed}[part](DTYPES[dtype]):
        print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
