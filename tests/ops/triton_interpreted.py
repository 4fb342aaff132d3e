"""What the Triton kernels promise, as functions of a device: triton_interpreted NAME ...

Triton's interpreter computes CPU tensors, but only in a process that chose it (TRITON_INTERPRET=1)
before the kernels are imported. `test_triton` starts one such process for all checks, whose last
line of output has for each what it printed and its traceback, or null. On a GPU it calls them.

The interpreter truncates where it stores bfloat16, so there results are stored as float32 and
rounded by torch. It does not fuse multiplications with additions, so its errors are the larger.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_xielu import xielu
from megatron_xielu.ops import triton
from megatron_xielu.ops.family import FAMILY, XIELU, Activation, Below
from megatron_xielu.ops.reference import REFERENCES, inverse_softplus

# softplus(alpha_p) and softplus(alpha_n): the usual ones, both small, both large, far apart
COEFFICIENTS = [(0.8, 0.3), (0.05, 0.0123), (3.0, 1.5), (0.2, 7.5)]
BETA = 0.5
EPS = torch.finfo(torch.float32).eps
# relative error of ex2.approx.ftz.f32 at most (PTX ISA)
EX2 = 2.0**-22
# what may be lost of a sum's terms: ten operations in each, 8 in a row, then 1024 in a tree
SUMMATION = (10 + 8 + 10) * EPS / 2
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def raw(activation: Activation, device: str, p: float = 0.8, n: float = 0.3) -> list[Tensor]:
    """Alphas with these coefficients; softplus(alpha_p3) is 0.4."""
    values = {"p3": 0.4, "p2": p, "n": n}
    return [
        torch.tensor(inverse_softplus(values[name]), device=device)
        for name in activation.coefficients
    ]


def beta_of(activation: Activation) -> float:
    return BETA if activation.alphas else 0.0


def compute(
    activation: Activation,
    x: Tensor,
    alphas: Sequence[Tensor],
    bias: Tensor | None = None,
    grad_y: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, dx and the other gradients; grad_y is 1 unless given."""
    beta = beta_of(activation)
    grad_y = torch.ones_like(x) if grad_y is None else grad_y
    if x.is_cuda:
        y = triton.forward(activation, x, bias, alphas, beta)
        grad_x, *grads = triton.backward(activation, grad_y, x, bias, alphas, beta)
        return y, grad_x, grads
    from megatron_xielu.ops.triton.elementwise import launch_backward, launch_forward

    y, grad_x = torch.empty_like(x, dtype=torch.float32), torch.empty_like(x, dtype=torch.float32)
    launch_forward(activation, x, bias, alphas, beta, y)
    grads = launch_backward(activation, grad_y, x, bias, alphas, beta, grad_x)
    return y.to(x.dtype), grad_x.to(x.dtype), grads


def truth(
    activation: Activation,
    x: Tensor,
    alphas: Sequence[Tensor],
    bias: Tensor | None = None,
    grad_y: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same in float64, by autograd of the reference."""
    wanted = [x, *alphas] if bias is None else [x, *alphas, bias]
    wide = [tensor.double().requires_grad_() for tensor in wanted]
    total = wide[0] if bias is None else wide[0] + wide[-1]
    y = REFERENCES[activation.name](total, *wide[1 : 1 + len(alphas)], beta_of(activation))
    grad_y = torch.ones_like(y) if grad_y is None else grad_y.double()
    grad_x, *grads = torch.autograd.grad(y, wide, grad_y)
    return y.detach(), grad_x, grads


def ulp(want: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit of the last place of numbers of a type next to `want`."""
    info = torch.finfo(dtype)
    digits = -round(math.log2(info.eps))
    _, exponent = torch.frexp(want)
    lowest = round(math.log2(info.tiny))
    return torch.ldexp(torch.ones_like(want), (exponent - 1).clamp(min=lowest) - digits)


def error_in_ulp(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| in units of the last place of got's type at `want`."""
    return (got.double() - want).abs() / ulp(want, got.dtype)


def terms(activation: Activation, x: Tensor, alphas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The magnitude of what y and dy/dx are the sum of: their local scale."""
    found = dict(zip(activation.coefficients, (alpha.double() for alpha in alphas), strict=True))
    below = x.double().clamp(max=0)
    excess = torch.nn.functional.softplus(found["n"]) if "n" in found else below.new_zeros(())
    beta = beta_of(activation)
    if activation.below == Below.EXPONENTIAL:
        bent = (excess + beta) * torch.expm1(below).abs()
        y, slope = bent + excess * below.abs(), bent + beta
    else:
        y, slope = excess * below**2 + beta * below.abs(), 2 * excess * below.abs() + beta
    exact_y, exact_slope, _ = truth(activation, x, alphas)
    return torch.where(x > 0, exact_y, y), torch.where(x > 0, exact_slope, slope)


def every_16_bit_value(dtype: torch.dtype, device: str) -> Tensor:
    """All those that a GPU neither flushes nor overflows with."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    magnitude = x.double().abs()
    return x[(magnitude > 2.0**-120) & (magnitude < 1e15)].to(device)


def every_16_bit_value_is_rounded_correctly(name: str, dtype: str, device: str) -> None:
    activation, x = FAMILY[name], every_16_bit_value(DTYPES[dtype], device)
    on_a_gpu = x.is_cuda
    largest = torch.finfo(DTYPES[dtype]).max
    for p, n in COEFFICIENTS if activation.alphas else COEFFICIENTS[:1]:
        alphas = raw(activation, device, p, n)
        got, want = compute(activation, x, alphas), truth(activation, x, alphas)
        worst = []
        for i, scale in enumerate(terms(activation, x, alphas)):
            finite = want[i].abs() < largest
            error = error_in_ulp(got[i], want[i])
            worst.append(float(error[finite].max()))
            # the interpreter's exponential is exact, and a GPU's is not: where the terms cancel,
            # its error is left over
            allowed = 0.501 + on_a_gpu * EX2 * scale / ulp(want[i], x.dtype)
            assert (error <= allowed)[finite].all(), f"p {p}, n {n}: {worst[-1]:.4f} ULP"
        print(f"p {p}, n {n}: y {worst[0]:.4f} ULP, dx {worst[1]:.4f} ULP of {x.numel()} inputs")


def bfloat16_misses_only_where_terms_cancel(device: str) -> None:
    """Fifty random pairs of alphas: y and dx cross zero, and float32 has no more digits there."""
    x = every_16_bit_value(torch.bfloat16, device)
    x = x[(x > -256) & (x < -(2.0**-10))]
    generator = torch.Generator().manual_seed(0)
    missed = [0, 0]
    for alphas in (torch.rand(50, 2, generator=generator) * 8 - 4).to(device):
        got, want = compute(XIELU, x, list(alphas)), truth(XIELU, x, list(alphas))
        for i, scale in enumerate(terms(XIELU, x, list(alphas))):
            missed[i] += int((error_in_ulp(got[i], want[i]) > 0.501).sum())
            # the rounding, and before it that of float32
            bound = want[i].abs() * 2.0**-8 + scale * 4 * EPS
            assert ((got[i].double() - want[i]).abs() <= bound).all()
    print(f"of 50 x {x.numel()} values {missed[0]} of y and {missed[1]} of dx beyond 0.501 ULP")
    assert max(missed) <= 10


def float32_is_accurate(name: str, device: str) -> None:
    activation = FAMILY[name]
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(torch.rand(4000, generator=generator) * 40 - 36)
    uniform = torch.rand(4000, generator=generator) * 4 - 4
    x = torch.cat((spread, -spread, uniform)).to(device)
    for p, n in COEFFICIENTS if activation.alphas else COEFFICIENTS[:1]:
        alphas = raw(activation, device, p, n)
        got, want = compute(activation, x, alphas), truth(activation, x, alphas)
        scales = terms(activation, x, alphas)
        for what, y, exact, scale in zip(("y", "dx"), got, want, scales, strict=False):
            cancels = scale > 4 * exact.abs()
            ulp = float(error_in_ulp(y, exact)[~cancels].max())
            relative = ((y.double() - exact).abs() / scale)[cancels]
            near = float(relative.max()) if relative.numel() else 0.0
            print(f"p {p}, n {n}, {what}: {ulp:.2f} ULP; {near:.1e} of the terms that cancel")
            assert ulp <= 4
            assert near <= 1e-7


def coefficients_are_accurate(dtype: str, device: str) -> None:
    """Far from zero y is that of a coefficient alone: softplus of small, usual and large alphas."""
    from megatron_xielu.ops.triton.elementwise import launch_forward

    x = torch.tensor([2.0**60, -(2.0**60)], device=device).to(DTYPES[dtype])
    worst = 0.0
    for value in torch.linspace(-80, 80, 33).tolist() + torch.linspace(-4, 4, 33).tolist():
        alphas = [torch.tensor(value, device=device)] * 2
        y = torch.empty_like(x, dtype=torch.float32)
        launch_forward(XIELU, x, None, alphas, BETA, y)
        want, _, _ = truth(XIELU, x, alphas)
        worst = max(worst, float((y.double() / want - 1).abs().max()))
    print(f"softplus within {worst:.1e}")
    assert worst <= 2 * EPS


def special_values(dtype: str, device: str) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0], dtype=DTYPES[dtype], device=device)
    limits = {  # of y and dx at -inf
        Below.ZERO: (0.0, 0.0),
        Below.QUADRATIC: (math.inf, -math.inf),
        Below.EXPONENTIAL: (math.inf, -0.3),
    }
    for activation in FAMILY.values():
        y, dx, _ = compute(activation, x, raw(activation, device))
        limit, beta = limits[activation.below], beta_of(activation)
        torch.testing.assert_close(
            y, x.new_tensor([math.inf, limit[0], math.nan, 0, 0]), equal_nan=True
        )
        torch.testing.assert_close(
            dx, x.new_tensor([math.inf, limit[1], math.nan, beta, beta]), equal_nan=True
        )
    _, dx, _ = compute(XIELU, x, raw(XIELU, device), grad_y=torch.full_like(x, math.nan))
    assert dx.isnan().all()


def alpha_gradients_are_those_of_float64(name: str, dtype: str, device: str) -> None:
    activation = FAMILY[name]
    generator = torch.Generator().manual_seed(0)
    count = 10_003 if device == "cpu" else 100_000_003
    x = (torch.randn(count, generator=generator) * 2).to(DTYPES[dtype]).to(device)
    grad_y = torch.randn(count, generator=generator).to(x)
    alphas = raw(activation, device)
    *_, got = compute(activation, x, alphas, grad_y=grad_y)
    *_, want = truth(activation, x, alphas, grad_y=grad_y)
    # the derivatives by the coefficients are positive: this is the sum of their terms' magnitudes
    *_, scale = truth(activation, x, alphas, grad_y=grad_y.abs())
    for i, alpha in enumerate(activation.alphas):
        error = abs(float(got[i]) - float(want[i])) / float(scale[i])
        print(
            f"{alpha}: {error:.1e} of the terms, {float(got[i]) / float(want[i]) - 1:.1e} relative"
        )
        assert error <= SUMMATION


def the_second_stage(device: str) -> None:
    """More partial sums than it takes at once, for alphas and a bias of any type."""
    from megatron_xielu.ops.triton.elementwise import _bias_gradient, alpha_gradients

    generator = torch.Generator().manual_seed(0)
    partials = torch.randn(3, 20_000, generator=generator).to(device)
    # float32 would lose the others beside these
    partials[:, 0], partials[:, -1] = 1e7, -1e7
    activation = FAMILY["xiep"]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        alphas = [torch.tensor(value, dtype=dtype, device=device) for value in (-1.0, 0.5, 2.0)]
        grads = alpha_gradients(activation, partials, alphas)
        sums = partials.double().sum(1)[[1, 0, 2]].tolist()  # of p3, p2 and n
        for got, total, alpha in zip(grads, sums, alphas, strict=True):
            want = total / (1 + math.exp(-float(alpha)))
            # the interpreter truncates where it stores bfloat16
            assert abs(float(got) - want) <= max(torch.finfo(dtype).eps, EPS) * abs(want)
    rows = torch.randn(200, 77, generator=generator).to(device)
    got = _bias_gradient(rows, torch.empty(77, device=device)).double()
    torch.testing.assert_close(got, rows.double().sum(0), rtol=EPS / 2, atol=0)


def sizes_that_no_tile_fits(dtype: str, device: str) -> None:
    """The same values as in a larger tensor, and nothing is written behind the end."""
    from megatron_xielu.ops.triton.elementwise import launch_backward, launch_forward

    generator = torch.Generator().manual_seed(0)
    alphas = raw(XIELU, device)
    x = torch.randn(3 * 8192, generator=generator).to(DTYPES[dtype]).to(device)
    y, dx = (torch.empty_like(x, dtype=torch.float32) for _ in range(2))
    launch_forward(XIELU, x, None, alphas, BETA, y)
    launch_backward(XIELU, x, x, None, alphas, BETA, dx)
    for size in (1, 15, 16, 4097, 8191, 8192, 8208, 16385):
        part = x[:size]
        ragged = [torch.full((size + 64,), 7.0, device=device) for _ in range(2)]
        launch_forward(XIELU, part, None, alphas, BETA, ragged[0][:size])
        grads = launch_backward(XIELU, part, part, None, alphas, BETA, ragged[1][:size])
        for got, want in zip(ragged, (y, dx), strict=True):
            assert torch.equal(got[:size], want[:size]), size
            assert (got[size:] == 7).all(), size
        *_, exact = truth(XIELU, part, alphas, grad_y=part)
        *_, scale = truth(XIELU, part, alphas, grad_y=part.abs())
        for got, want, bound in zip(grads, exact, scale, strict=True):
            assert abs(float(got) - float(want)) <= SUMMATION * float(bound), size
    empty = x[:0].reshape(3, 0)
    assert triton.forward(XIELU, empty, None, alphas, BETA).shape == (3, 0)
    grads = triton.backward(XIELU, empty, empty, x[:0], alphas, BETA)
    assert [tuple(grad.shape) for grad in grads] == [(3, 0), (), (), (0,)]
    assert [grad.item() for grad in grads[1:3]] == [0, 0]


def any_strides(device: str) -> None:
    base = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0)).to(device)
    views = {
        "permuted": base.permute(2, 0, 1),
        "every second": base[:, ::2],
        "a part, transposed": base[..., 3:7].transpose(0, 1),
        "expanded": base[:, :1].expand(4, 6, 10),
        "a scalar": base[0, 0, 0],
    }
    alphas = [alpha.requires_grad_() for alpha in raw(XIELU, device)]
    for what, view in views.items():
        x, flat = view.detach().requires_grad_(), view.detach().contiguous().requires_grad_()
        # a gradient in another memory order than x
        upstream = torch.linspace(-1, 2, x.numel(), device=device).reshape(x.shape[::-1])
        upstream = upstream.permute(tuple(range(x.dim()))[::-1])
        bias = None if x.dim() == 0 else torch.linspace(-1, 1, x.shape[-1], device=device)
        for added in (None, bias):
            y = xielu(x, *alphas, bias=added, impl="triton")
            want = xielu(flat, *alphas, bias=added, impl="triton")
            assert torch.equal(y, want), what
            assert y.stride() == torch.empty_like(x).stride(), what
            grads = torch.autograd.grad(y, (x, *alphas), upstream)
            wanted = torch.autograd.grad(want, (flat, *alphas), upstream)
            assert torch.equal(grads[0], wanted[0]), what
            for got, other in zip(grads[1:], wanted[1:], strict=True):
                torch.testing.assert_close(got, other, rtol=1e-5, atol=1e-5)


def bias_and_its_gradient(name: str, dtype: str, device: str) -> None:
    activation = FAMILY[name]
    generator = torch.Generator().manual_seed(0)
    alphas = raw(activation, device)
    shapes = [(3, 50, 131)] if device == "cpu" else [(3, 50, 131), (5000, 1), (4096, 9216)]
    for shape in [(7,), (70, 16), *shapes]:
        x = torch.randn(shape, generator=generator).to(DTYPES[dtype]).to(device)
        grad_y = torch.randn(shape, generator=generator).to(x)
        bias = torch.randn(shape[-1], generator=generator).to(x)
        y, dx, grads = compute(activation, x, alphas, bias, grad_y)
        exact_y, exact_dx, exact = truth(activation, x, alphas, bias, grad_y)
        *_, scale = truth(activation, x, alphas, bias, grad_y.abs())
        # one rounding to the type, and the arithmetic of a sum of up to 9 and its cube
        eps = torch.finfo(x.dtype).eps
        torch.testing.assert_close(y.double(), exact_y, rtol=eps / 2, atol=300 * EPS)
        torch.testing.assert_close(dx.double(), exact_dx, rtol=eps / 2, atol=300 * EPS)
        for got, want, bound in zip(grads[:-1], exact[:-1], scale[:-1], strict=True):
            assert abs(float(got) - float(want)) <= SUMMATION * float(bound)
        error = (grads[-1].double() - exact[-1]).abs()
        bound = (exact_dx.abs().flatten(0, -2) if x.dim() > 1 else exact_dx.abs()[None]).sum(0)
        print(f"{name} {shape}: bias's gradient within {float((error / (bound + EPS)).max()):.1e}")
        # the interpreter truncates where it stores bfloat16
        assert (error <= eps * exact[-1].abs() + SUMMATION * bound + 300 * EPS).all()


def the_public_function(dtype: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 65, generator=generator).to(DTYPES[dtype]).to(device).requires_grad_()
    bias = torch.randn(65, generator=generator).to(x.detach()).requires_grad_()
    upstream = torch.randn(33, 65, generator=generator).to(x.detach())
    for alpha_dtype in (torch.float32, torch.bfloat16, torch.float64):
        alphas = [alpha.to(alpha_dtype).reshape(1).requires_grad_() for alpha in raw(XIELU, device)]
        inputs = (x, *alphas, bias)
        y = xielu(x, *alphas, bias=bias, impl="triton")
        grads = torch.autograd.grad(y, inputs, upstream)
        want = truth(
            XIELU, x.detach(), [a.detach().reshape(()) for a in alphas], bias.detach(), upstream
        )
        assert y.dtype == x.dtype
        assert [(g.dtype, g.shape) for g in grads] == [(i.dtype, i.shape) for i in inputs]
        # the interpreter truncates where it stores bfloat16
        eps = torch.finfo(x.dtype).eps
        torch.testing.assert_close(y.detach().double(), want[0], rtol=eps, atol=8 * EPS)
        torch.testing.assert_close(grads[0].double(), want[1], rtol=eps, atol=8 * EPS)
        last = max(torch.finfo(alpha_dtype).eps, 1e-6)
        for got, exact in zip(grads[1:3], want[2][:2], strict=True):
            torch.testing.assert_close(got.double().reshape(()), exact, rtol=2 * last, atol=1e-5)


def _each(
    function: Callable[..., None], names: Sequence[str], dtypes: Sequence[str] = ()
) -> dict[str, Callable[[str], None]]:
    if not dtypes:
        return {f"{function.__name__}-{name}": partial(function, name) for name in names}
    return {
        f"{function.__name__}-{name}-{dtype}": partial(function, name, dtype)
        for name in names
        for dtype in dtypes
    }


_HALVES = ("bfloat16", "float16")
_TRAINED = [name for name, activation in FAMILY.items() if activation.alphas]
_OTHERS = [name for name in FAMILY if name != "xielu"]

CHECKS: dict[str, Callable[[str], None]] = {
    **_each(every_16_bit_value_is_rounded_correctly, ["xielu"], _HALVES),
    **_each(float32_is_accurate, ["xielu"]),
    **_each(coefficients_are_accurate, ["bfloat16", "float32"]),
    **_each(special_values, list(DTYPES)),
    **_each(alpha_gradients_are_those_of_float64, ["xielu"], list(DTYPES)),
    "the_second_stage": the_second_stage,
    **_each(sizes_that_no_tile_fits, ["bfloat16"]),
    "any_strides": any_strides,
    **_each(bias_and_its_gradient, ["xielu", "xiep"], ["bfloat16"]),
    **_each(the_public_function, list(DTYPES)),
}
SLOW_CHECKS: dict[str, Callable[[str], None]] = {
    **_each(every_16_bit_value_is_rounded_correctly, _OTHERS, _HALVES),
    "bfloat16_misses_only_where_terms_cancel": bfloat16_misses_only_where_terms_cancel,
    **_each(float32_is_accurate, _OTHERS),
    **_each(alpha_gradients_are_those_of_float64, _TRAINED[1:], list(DTYPES)),
    **_each(sizes_that_no_tile_fits, ["float16", "float32"]),
    **_each(bias_and_its_gradient, list(FAMILY), ["float16", "float32"]),
    **_each(bias_and_its_gradient, ["xiprelu", "relu2"], ["bfloat16"]),
}


def main(*names: str) -> None:
    torch.set_num_threads(1)
    results: dict[str, tuple[str, str | None]] = {}
    for name in names:
        printed, failure = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            try:
                (CHECKS | SLOW_CHECKS)[name]("cpu")
            except Exception:
                failure = traceback.format_exc()
        results[name] = (printed.getvalue(), failure)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
