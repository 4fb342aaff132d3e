"""Errors of the implementations against float64: measured, printed, and held to limits.

What may be expected of an implementation follows from its arithmetic. The C++ kernels compute
16-bit types in float64 and must return the nearest number to every result. "eager" and the Triton
kernels compute bfloat16 in float32: where the terms of the formula cancel, that shows after
rounding, by a few of float32's roundings of the terms.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_xielu.bench.peers import BETA, Compute, Peer, Result, differentiated, peers
from megatron_xielu.bench.truth import (
    Coefficients,
    Value,
    alpha_gradients,
    coefficients,
    distance,
    rounded,
    truth,
    ulp,
)
from megatron_xielu.errors import UserError
from megatron_xielu.ops import functional, triton
from megatron_xielu.ops.cpu.build import load
from megatron_xielu.ops.family import FAMILY, XIELU, Activation
from megatron_xielu.ops.reference import compute_dtype, inverse_softplus

PATTERNS = 1 << 16
# one rounding to float32, relative to the rounded number
ROUNDING = 2.0**-24
# terms whose sizes add up to more than this times the result's size cancel
CANCELLING = 3.0
# the C++ kernels where products and sums are rounded one by one
NO_FMA = "cpu without FMA"

# Limits. Of 16-bit results that are rounded once, in ULP:
ROUNDED = 0.501
# of those computed in float32, beyond that half ULP, in roundings of the formula's terms: eager
# rounds a coefficient, e^x - 1 (twice), a product and a sum; a GPU's 2^x alone is off by four
ROUNDINGS = {"eager": 6.0, "triton": 16.0}
# of float32, in ULP, and relative to the terms where they cancel
ULP = 4.0
OF_TERMS = {"cpu": 1e-7, NO_FMA: 1.25e-7, "triton": 1e-7}
# of float32, in roundings of the terms in the way of writing the formula that cancels least
LEAST = 8.0
# of sums, relative
SUM = 1e-6

# a_p, a_n of xIELU: initial values, extreme ones, and those between
PAIRS = (
    (0.8, 0.8),
    (1e-3, 0.5001),
    (1e-3, 100.0),
    (20.0, 0.5001),
    (20.0, 100.0),
    (0.05, 0.52),
    (2.0, 1.25),
    (3.0, 2.0),
    (0.2, 8.0),
)
# of x in the comparison; the last range ends where the result of some peer is infinite
RANGES = (
    (-20.0, -3.2),
    (-3.2, -2.0),
    (-2.0, -0.25),
    (-0.25, -0.03),
    (-0.03, -2e-3),
    (-2e-3, -1e-4),
    (-1e-4, -1e-6),
    (-1e-6, 0.0),
    (1e-38, 1e-3),
    (1e-3, 1.0),
    (1.0, 10.0),
    (10.0, 1e15),
)
# standard deviation of x, and share of dy that has x's sign
DATA = ((1.0, 0.0), (1.0, 0.3), (0.02, 0.0), (0.02, 0.3))


@dataclass(frozen=True)
class Figure:
    """One measured number: a cell of a table.

    Attributes:
        row: what was measured.
        column: the quantity, of which less is better.
        value: the number.
        limit: what it must not exceed; None where it is only reported.
        at: where the number was found, for whoever looks into it.
    """

    row: str
    column: str
    value: float
    limit: float | None = None
    at: str = ""

    @property
    def missed(self) -> bool:
        return self.limit is not None and not self.value <= self.limit

    def __str__(self) -> str:
        number = f"{self.value:.6g}"
        if self.limit is None:
            return number
        return f"{number} {'>' if self.missed else '<='} {self.limit:g}"


def check(figures: Iterable[Figure]) -> list[str]:
    """A line for each figure over its limit."""
    return [
        f"{figure.row}: {figure.column} is {figure} at {figure.at}"
        for figure in figures
        if figure.missed
    ]


def markdown(figures: list[Figure]) -> str:
    """The figures as one table."""
    rows = list(dict.fromkeys(figure.row for figure in figures))
    columns = list(dict.fromkeys(figure.column for figure in figures))
    cells = {(figure.row, figure.column): str(figure) for figure in figures}
    return _table(
        ["", *columns],
        [[row, *(cells.get((row, column), "") for column in columns)] for row in rows],
    )


def run(*, quick: bool) -> bool:
    """Measure, print tables in Markdown, and say whether every limit was kept.

    Args:
        quick: fewer random alphas, and sums over 4 million elements instead of 100 million.

    Raises:
        UserError: the CPU kernels cannot be built.
    """
    drawn, count = (4, 1 << 22) if quick else (40, 100_000_000)
    missed = []
    for title, figures in sections(drawn, count):
        measured = list(figures)
        missed += check(measured)
        print(f"\n### {title}\n\n{markdown(measured)}", flush=True)
    for title, text in comparison(count):
        print(f"\n### {title}\n\n{text}", flush=True)
    print("\n" + ("\n".join(f"MISSED: {line}" for line in missed) or "every limit is kept"))
    return not missed


def sections(drawn: int, count: int) -> Iterator[tuple[str, Iterator[Figure]]]:
    """Title and figures of everything that has limits.

    Args:
        drawn: random sets of alphas beside `PAIRS`.
        count: elements of xIELU's sums; the others' are over 4 million at most.
    """
    here, family = implementations(), FAMILY.values()
    yield (
        f"Every 16-bit input, with {len(PAIRS) + drawn} sets of alphas",
        (
            figure
            for activation in family
            for dtype in (torch.bfloat16, torch.float16)
            for impl in here
            for figure in sixteen_bits(activation, dtype, impl, alpha_sets(activation, drawn))
        ),
    )
    yield (
        f"float32, with {len(PAIRS) + drawn} sets of alphas",
        (
            figure
            for activation in family
            for impl in here
            for figure in float32(activation, impl, alpha_sets(activation, drawn))
        ),
    )
    yield (
        "Infinities, nan and both zeros",
        (
            specials(activation, dtype, impl)
            for activation in family
            for impl in here
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ),
    )
    yield (
        "Gradients of the alphas",
        (
            figure
            for activation in family
            if activation.alphas
            for dtype in (torch.float32, torch.bfloat16)
            for scale, correlation in DATA
            for impl in here
            if impl in ("cpu", "triton")
            for figure in sums(
                activation,
                dtype,
                impl,
                count if activation is XIELU else min(count, 1 << 22),
                scale,
                correlation,
            )
        ),
    )


def implementations() -> list[str]:
    """Those of this machine."""
    gpu = torch.cuda.is_available() and triton.unavailable(torch.empty(0, device="cuda")) is None
    return [
        *(name for name in ("cpu", NO_FMA) if _instruction_sets(name)),
        "eager",
        *(["triton"] if gpu else []),
    ]


def alpha_sets(activation: Activation, drawn: int) -> list[list[Tensor]]:
    """`PAIRS`, and others drawn between their extremes, as float32 alphas before softplus."""
    if not activation.alphas:
        return [[]]
    generator = torch.Generator().manual_seed(0)
    low, high = (
        torch.tensor(ends, dtype=torch.float64).log() for ends in ((1e-3, 1e-4), (20, 99.5))
    )
    random = torch.rand(drawn, 2, generator=generator, dtype=torch.float64)
    effective = [
        *((a_p, a_n - BETA) for a_p, a_n in PAIRS),
        *(low + (high - low) * random).exp().tolist(),
    ]
    return [
        [
            torch.tensor(inverse_softplus({"p3": a_p / 10, "p2": a_p, "n": softplus_n}[name]))
            for name in activation.coefficients
        ]
        for a_p, softplus_n in effective
    ]


# ---- every 16-bit input


def sixteen_bits(
    activation: Activation, dtype: torch.dtype, impl: str, sets: list[list[Tensor]]
) -> Iterator[Figure]:
    """The largest errors over all inputs of a 16-bit type, where dy = 1."""
    x = torch.arange(PATTERNS, dtype=torch.int32).to(torch.uint16).view(dtype)
    counted = _counted(activation, impl, x)
    ulps, roundings = _Largest(), _Largest()
    wrong = total = 0
    for name, value, exact, c in _compared(activation, impl, x, sets):
        error = torch.where(counted, distance(value, exact.value, dtype), 0.0)
        ulps.see(name, error, x, c)
        beyond = (error - 0.5).clamp(min=0) * ulp(exact.value, dtype) / ROUNDING
        roundings.see(name, torch.where(beyond > 0, beyond / exact.terms, 0.0), x, c)
        nearest = rounded(exact.value, dtype)
        wrong += int(((value.double() != nearest) & counted & ~nearest.isnan()).sum())
        total += value.numel()
    row = f"{activation.name} {_short(dtype)} {impl}"
    kernel = impl in ("cpu", NO_FMA)
    once = kernel or compute_dtype(dtype) == torch.float64
    yield from ulps.figures(row, "{}, ULP", ROUNDED if once else None)
    if not once:
        yield from roundings.figures(
            row, "{} beyond half an ULP, roundings of the terms", ROUNDINGS[impl]
        )
    yield Figure(
        row, "not the nearest number, per million", 1e6 * wrong / total, 0 if kernel else None
    )


# ---- float32


def float32(activation: Activation, impl: str, sets: list[list[Tensor]]) -> Iterator[Figure]:
    """The largest errors over all magnitudes and around zero crossings, where dy = 1."""
    ulps, of_terms, roundings, least = _Largest(), _Largest(), _Largest(), _Largest()
    for alphas in sets:
        x = float32_inputs(activation, coefficients(activation, alphas, _beta(activation)))
        counted = _counted(activation, impl, x)
        for name, value, exact, c in _compared(activation, impl, x, [alphas]):
            error = torch.where(counted, distance(value, exact.value, torch.float32), 0.0)
            spacing = ulp(exact.value, torch.float32)
            cancels = exact.terms > CANCELLING * exact.value.abs()
            ulps.see(name, torch.where(cancels, 0.0, error), x, c)
            of_terms.see(name, torch.where(cancels, error * spacing / exact.terms, 0.0), x, c)
            beyond = (error - 0.5).clamp(min=0) * spacing / ROUNDING
            roundings.see(name, torch.where(beyond > 0, beyond / exact.terms, 0.0), x, c)
            least.see(name, torch.where(beyond > 0, beyond / exact.least, 0.0), x, c)
    row = f"{activation.name} {impl}"
    eager = impl == "eager"
    yield from ulps.figures(row, "{}, ULP where terms do not cancel", None if eager else ULP)
    yield from of_terms.figures(row, "{} where they do, relative to them", OF_TERMS.get(impl))
    yield from roundings.figures(row, "{}, roundings of the terms", ROUNDINGS.get(impl))
    yield from least.figures(row, "{}, roundings of the best terms", None if eager else LEAST)


def float32_inputs(activation: Activation, c: Coefficients) -> Tensor:
    """All binades of both signs, the usual range densely, and what lies around zero crossings."""
    generator = torch.Generator().manual_seed(0)

    def uniform(count: int) -> Tensor:
        return torch.rand(count, generator=generator)

    exponents = torch.arange(1, 255, dtype=torch.int32).repeat_interleave(128)
    mantissas = (uniform(len(exponents)) * 2**23).int()
    binades = ((exponents << 23) | mantissas).view(torch.float32)
    below = -binades.sort(descending=True).values
    found = truth(activation, below, c)
    crossings = [
        below[1:][value.value[1:].sign() * value.value[:-1].sign() < 0]
        for value in (found.y, found.dx)
    ]
    around = 1 + torch.cat((uniform(1 << 13), -uniform(1 << 13))) * 2 ** (-24 * uniform(1 << 14))
    return torch.cat(
        (
            binades,
            below,
            torch.randn(1 << 15, generator=generator),
            -20 * uniform(1 << 15),
            -2 * uniform(1 << 15),
            *(crossing * around for crossing in torch.cat(crossings)),
        )
    )


# ---- special values


def specials(activation: Activation, dtype: torch.dtype, impl: str) -> Figure:
    """How many values and slopes are wrong at the infinities, nan and both zeros.

    A nan must also reach the gradients of all alphas, from x and from dy.
    """
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0], dtype=dtype)
    alphas = alpha_sets(activation, 0)[0]
    # the slope at -inf is a difference of two numbers
    limit = ULP if dtype == torch.float32 else ROUNDED
    allowed = torch.where(x == -math.inf, limit, ROUNDED)
    wrong = []
    for name, value, exact, _ in _compared(activation, impl, x, [alphas]):
        off = distance(value, exact.value, dtype) > allowed
        wrong += [f"{name} at {number}" for number in x.expand_as(off)[off].tolist()]
    for place in ("x", "dy"):
        x, grad_y = torch.ones(100, dtype=dtype), torch.ones(100, dtype=dtype)
        (x if place == "x" else grad_y)[37] = math.nan
        for got in results(activation, impl, x, alphas, grad_y):
            nans = got.dx.reshape(-1, 100).isnan()
            if not nans[:, 37].all() or nans.sum() != len(nans):
                wrong.append(f"dx where {place} is nan")
            if not all(math.isnan(gradient) for gradient in got.alpha_gradients):
                wrong.append(f"an alpha's gradient where {place} is nan")
    column = f"wrong in {_short(dtype)}"
    return Figure(
        f"{activation.name} {impl}", column, len(wrong), 0, ", ".join(dict.fromkeys(wrong))
    )


# ---- sums


def sums(
    activation: Activation,
    dtype: torch.dtype,
    impl: str,
    count: int,
    scale: float,
    correlation: float,
) -> Iterator[Figure]:
    """Errors of the alphas' gradients, and whether threads or a second run change their bits.

    Args:
        activation, dtype, impl: what is measured; the initial alphas.
        count: elements.
        scale, correlation: see `data`.
    """
    x, grad_y = data(dtype, count, scale, correlation)
    # in float64, so that the gradients are not rounded to float32 for the parameters
    alphas = [alpha.double() for alpha in alpha_sets(activation, 0)[0]]
    exact, absolute = alpha_gradients(activation, grad_y, x, alphas, _beta(activation))
    compute = _compute(activation, impl)
    runs, threads = [], torch.get_num_threads()
    try:
        for count_of_threads in (1, 1, 2, 3, 4):
            torch.set_num_threads(count_of_threads)
            runs.append(compute(x, alphas, grad_y).alpha_gradients)
    finally:
        torch.set_num_threads(threads)
    row = (
        f"{activation.name} {_short(dtype)} {impl}, {count:.1e} elements, "
        f"x {scale:g}, correlation {correlation:g}"
    )
    for name, got, want, terms in zip(activation.alphas, runs[0], exact, absolute, strict=True):
        # the usual size of a sum whose terms have random signs, if it is smaller by chance
        size = max(abs(want), 2 * terms / math.sqrt(count))
        yield Figure(row, f"{name}, relative error", abs(got - want) / size, SUM, f"{want:g}")
        yield Figure(row, f"{name}, terms / sum", terms / abs(want))
    yield Figure(row, "runs with other bits", sum(run != runs[0] for run in runs), 0)


def data(dtype: torch.dtype, count: int, scale: float, correlation: float) -> tuple[Tensor, Tensor]:
    """x and dy of `count` elements.

    Args:
        dtype: of both.
        count: made in pieces, so that nothing wider than `dtype` is that long.
        scale: standard deviation of x, normal around zero.
        correlation: dy is 0.001 times a standard normal number plus this times x's sign.
    """
    generator = torch.Generator().manual_seed(0)
    x, grad_y = torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype)
    for values, grads in zip(x.split(1 << 20), grad_y.split(1 << 20), strict=True):
        values.copy_(scale * torch.randn(len(values), generator=generator))
        noise = torch.randn(len(grads), generator=generator)
        grads.copy_(1e-3 * (noise + correlation * values.sign()))
    return x, grad_y


# ---- the comparison with others


def comparison(count: int) -> Iterator[tuple[str, str]]:
    """Titles and tables: xIELU in bfloat16, everyone with the same bfloat16 alphas.

    Ours keep them, and so their gradients, in float32.

    Args:
        count: elements of the sums.
    """
    others, missing = peers()
    contenders = [
        *others,
        *(Peer(impl, "ours", _with_float32_alphas(impl)) for impl in ("eager", "cpu")),
    ]
    alphas = [alpha.bfloat16().reshape(1) for alpha in alpha_sets(XIELU, 0)[0]]
    x = torch.arange(PATTERNS, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    exact = truth(XIELU, x, coefficients(XIELU, alphas, BETA))
    found = [peer.compute(x, alphas, torch.ones_like(x)) for peer in contenders]
    names = [peer.name for peer in contenders]
    for title, values, want in (
        ("y", [result.y for result in found], exact.y.value),
        ("dx", [result.dx for result in found], exact.dx.value),
    ):
        errors = [distance(value, want, x.dtype) for value in values]
        rows = []
        for low, high in RANGES:
            inside = (x.double() >= low) & (x.double() <= high)
            cells = [
                f"{float(e[inside].max()):.3g} / {float(e[inside].mean()):.2g}" for e in errors
            ]
            rows.append([f"[{low:g}, {high:g}], {int(inside.sum())}", *cells])
        header = ["x, number of inputs", *names]
        yield f"{title} in bfloat16: largest / mean error in ULP", _table(header, rows)
    rows = []
    for scale, correlation in DATA:
        x, grad_y = data(torch.bfloat16, count, scale, correlation)
        totals, _ = alpha_gradients(XIELU, grad_y, x, alphas, BETA)
        got = [peer.compute(x, alphas, grad_y).alpha_gradients for peer in contenders]
        for i, name in enumerate(XIELU.alphas):
            cells = [f"{abs(result[i] / totals[i] - 1):.1e}" for result in got]
            rows.append([f"{name}, x {scale:g}, correlation {correlation:g}", *cells])
    yield (
        f"Gradients of the alphas over {count:.1e} bfloat16 elements: relative error",
        _table(["", *names], rows),
    )
    sources = [f"- {peer.name}: {peer.source}" for peer in others] + [
        f"- {line}" for line in missing
    ]
    yield "The others", "\n".join(sources)


# ---- parts


def results(
    activation: Activation, impl: str, x: Tensor, alphas: list[Tensor], grad_y: Tensor
) -> Iterator[Result]:
    """What an implementation computes, once for each of its code paths.

    The kernels for CPUs have one for each instruction set, and for more than 65,536 elements of a
    16-bit type another: x and dy are repeated to get there.
    """
    compute = _compute(activation, impl)
    if impl not in ("cpu", NO_FMA):
        yield compute(x, alphas, grad_y)
        return
    names, ops = _instruction_sets(impl), torch.ops.megatron_xielu_cpu
    try:
        for name in names:
            ops.use_instruction_set(name)
            yield compute(x, alphas, grad_y)
            if x.dtype != torch.float32:
                copies = PATTERNS // len(x) + 1
                yield compute(x.repeat(copies), alphas, grad_y.repeat(copies))
    finally:
        ops.use_instruction_set(ops.instruction_sets()[0])


def _instruction_sets(impl: str) -> list[str]:
    """Those of this machine with fused multiply-add, or without it."""
    if reason := load():
        raise UserError(f"the CPU kernels cannot be built: {reason}")
    without = {"baseline"} if platform.machine() == "x86_64" else set()
    names = torch.ops.megatron_xielu_cpu.instruction_sets()
    return [name for name in names if (name in without) == (impl == NO_FMA)]


def _compute(activation: Activation, impl: str) -> Compute:
    """The public function, on the device of an implementation."""
    name = "cpu" if impl == NO_FMA else impl
    compute = differentiated(partial(getattr(functional, activation.name), impl=name))
    if impl != "triton":
        return compute

    def on_gpu(x: Tensor, alphas: Sequence[Tensor], grad_y: Tensor) -> Result:
        result = compute(x.cuda(), [alpha.cuda() for alpha in alphas], grad_y.cuda())
        return Result(result.y.cpu(), result.dx.cpu(), result.alpha_gradients)

    return on_gpu


def _with_float32_alphas(impl: str) -> Compute:
    compute = _compute(XIELU, impl)
    return lambda x, alphas, grad_y: compute(x, [alpha.float() for alpha in alphas], grad_y)


def _compared(
    activation: Activation, impl: str, x: Tensor, sets: list[list[Tensor]]
) -> Iterator[tuple[str, Tensor, Value, Coefficients]]:
    """y and dx (of dy = 1) of every code path, in rows of x's length, beside the exact ones."""
    for alphas in sets:
        c = coefficients(activation, alphas, _beta(activation))
        exact = truth(activation, x, c)
        for got in results(activation, impl, x, alphas, torch.ones_like(x)):
            yield "y", got.y.reshape(-1, len(x)), exact.y, c
            yield "dx", got.dx.reshape(-1, len(x)), exact.dx, c


class _Largest:
    """The largest number seen of each quantity, and where."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, str]] = {}

    def see(self, name: str, numbers: Tensor, x: Tensor, c: Coefficients) -> None:
        largest, index = numbers.reshape(-1, len(x)).amax(0).max(0)
        if name not in self._found or float(largest) > self._found[name][0]:
            place = f"x = {float(x[index]):.9g}, p2 = {c.p2:.6g}, p3 = {c.p3:.6g}, n = {c.n:.6g}"
            self._found[name] = float(largest), place

    def figures(self, row: str, column: str, limit: float | None) -> Iterator[Figure]:
        for name, (value, place) in self._found.items():
            yield Figure(row, column.format(name), value, limit, place)


def _counted(activation: Activation, impl: str, x: Tensor) -> Tensor:
    """Inputs that an implementation promises to compute well."""
    if impl == "eager" and activation.cubic and compute_dtype(x.dtype) == torch.float32:
        # it squares x, which overflows beyond
        return ~(x.abs() >= 2.0**63) | x.isinf()
    if impl == "triton":
        # results below may be subnormal, which a GPU may flush to zero
        return ~(x.abs() <= 2.0**-120) | (x == 0)
    return torch.ones_like(x, dtype=torch.bool)


def _beta(activation: Activation) -> float:
    # relu2 is not trained and has no slope at zero
    return BETA if activation.alphas else 0.0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
