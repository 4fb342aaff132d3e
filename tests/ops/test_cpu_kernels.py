"""The C++ kernels where loops end, memory is laid out oddly, or numbers are at the edge of a type.

How accurate they are everywhere else is measured in `bench.accuracy`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_xielu.bench.truth import (
    alpha_gradients,
    coefficients,
    distance,
    rounded,
    truth,
    ulp,
)
from megatron_xielu.ops import functional
from megatron_xielu.ops.cpu import STREAM_BYTES
from megatron_xielu.ops.cpu.build import load
from megatron_xielu.ops.family import FAMILY, XIELU, XIEP, Activation

pytestmark = pytest.mark.skipif(load() is not None, reason="the kernels did not build")

SETS = torch.ops.megatron_xielu_cpu.instruction_sets() if load() is None else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# around the 32 elements of a block, and where 16-bit types start to use a table
SIZES = [0, 1, 31, 32, 33, 1000, 65535, 65536, 65537]


@pytest.fixture(params=SETS, autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.ops.megatron_xielu_cpu.use_instruction_set(request.param)
    yield request.param
    torch.ops.megatron_xielu_cpu.use_instruction_set(SETS[0])


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def alphas_of(activation: Activation) -> list[Tensor]:
    return [torch.tensor(value) for value in (0.3, -0.7, -1.1)[: len(activation.alphas)]]


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator)).to(dtype)


def run(
    activation: Activation, x: Tensor, grad_y: Tensor, bias: Tensor | None = None
) -> list[Tensor]:
    """y, dx, the alphas' gradients, and the bias's if there is one."""
    extra = [] if bias is None else [bias.detach().requires_grad_()]
    inputs = [x.detach().requires_grad_(), *alphas_of(activation), *extra]
    for tensor in inputs:
        tensor.requires_grad_()
    alphas = inputs[1 : 1 + len(activation.alphas)]
    function = getattr(functional, activation.name)
    y = function(inputs[0], *alphas, bias=extra[0] if extra else None, impl="cpu")
    return [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    """Bit for bit, whatever the memory order."""
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", FAMILY.values(), ids=lambda activation: activation.name)
def test_every_size(activation: Activation, dtype: torch.dtype) -> None:
    c = coefficients(activation, alphas_of(activation), 0.5 if activation.alphas else 0.0)
    worst = 0.0
    for size in SIZES:
        x, grad_y = normal((size,), dtype), normal((size,), dtype, seed=1)
        y, dx, *grads = run(activation, x, grad_y)
        exact = truth(activation, x, c)
        slope = grad_y.double() * exact.dx.value
        # 16 bits: one rounding, and before it those of y, or of slope and product, to float32;
        # float32: those of a coefficient, e^x - 1 (two), a product and a sum
        for value, want, terms, roundings in (
            (y, exact.y.value, exact.y.terms, 1.01),
            (dx, slope, grad_y.double().abs() * exact.dx.terms, 2.01),
        ):
            unit = 2.0**-24 * (terms if dtype == torch.float32 else want.abs())
            allowed = ulp(want, dtype) / 2 + (5 if dtype == torch.float32 else roundings) * unit
            error = (value.double() - want).abs() / allowed
            worst = max([worst, *error.tolist()])
        assert y.shape == dx.shape == x.shape
        sums, sizes = alpha_gradients(activation, grad_y, x, alphas_of(activation), c.beta)
        for got, want, terms in zip(grads, sums, sizes, strict=True):
            assert abs(float(got) - want) <= 2.0**-24 * abs(want) + 1e-7 * terms
    print(f"{activation.name} {dtype}: {worst:.3f} of the allowed error")
    assert worst <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1000, 70_000])
def test_views_that_begin_anywhere(dtype: torch.dtype, size: int) -> None:
    x, grad_y = normal((size + 40,), dtype), normal((size + 40,), dtype, seed=1)
    for offset in (1, 2, 3, 31, 33):
        shifted = run(XIELU, x[offset : offset + size], grad_y[3 : 3 + size])
        aligned = run(XIELU, x[offset : offset + size].clone(), grad_y[3 : 3 + size].clone())
        assert same(shifted, aligned), offset


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_orders(dtype: torch.dtype) -> None:
    base, grad = normal((6, 40, 300), dtype), normal((6, 40, 300), dtype, seed=1)
    views = {
        "permuted": lambda t: t.permute(2, 0, 1),
        "every second row": lambda t: t[:, ::2],
        "cut": lambda t: t[..., 5:290].transpose(0, 1),
        "repeated": lambda t: t[:1].expand(6, 40, 300),
        "reversed axes": lambda t: t.mT.contiguous().mT,
    }
    for name, view in views.items():
        x, grad_y = view(base), view(grad)
        dense = run(XIELU, x.contiguous(), grad_y.contiguous())
        for upstream in (grad_y, grad_y.contiguous()):
            got = run(XIELU, x, upstream)
            assert same(got[:2], dense[:2]), name
            # their terms are added in memory order
            for one, other in zip(got[2:], dense[2:], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert got[0].stride() == torch.empty_like(x).stride(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 33, 100, 40_000])
def test_a_bias_of_any_length(dtype: torch.dtype, columns: int) -> None:
    rows = 80_000 // columns
    x, grad_y = normal((rows, columns), dtype), normal((rows, columns), dtype, seed=1)
    bias = normal((columns,), dtype, seed=2)
    y, dx, *grads, grad_bias = run(XIELU, x, grad_y, bias)
    # float32 is added in float32, as its arithmetic is
    wide = x + bias if dtype == torch.float32 else x.double() + bias.double()
    c = coefficients(XIELU, alphas_of(XIELU), 0.5)
    exact = truth(XIELU, wide, c)
    allowed = ulp(exact.y.value, dtype) / 2 + 5 * 2.0**-24 * exact.y.terms
    worst = float(((y.double() - exact.y.value).abs() / allowed).max())
    print(f"{dtype}, {rows} x {columns}: {worst:.3f} of the allowed error")
    assert worst <= 1
    sums, sizes = alpha_gradients(XIELU, grad_y.flatten(), wide.flatten(), alphas_of(XIELU), 0.5)
    for got, want, terms in zip(grads, sums, sizes, strict=True):
        assert abs(float(got) - want) <= 2.0**-24 * abs(want) + 1e-7 * terms
    columns_sum = dx.double().sum(0)
    allowed = ulp(columns_sum, dtype) / 2 + 1e-6 * dx.double().abs().sum(0)
    assert bool(((grad_bias.double() - columns_sum).abs() <= allowed).all())
    # in three dimensions, and in another memory order
    cube = run(XIELU, x[:, None], grad_y[:, None], bias)
    assert same(cube, [y[:, None], dx[:, None], *grads, grad_bias])
    turned = run(XIELU, x.mT.contiguous().mT, grad_y.mT.contiguous().mT, bias)
    assert same(turned[:2], [y, dx])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("copies", [1, 2], ids=["computed", "looked up"])
def test_every_square_is_rounded_like_hardware_does(dtype: torch.dtype, copies: int) -> None:
    # squares are exact in float64 and full of ties, of subnormal numbers and of overflows
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).repeat(copies)
    y, dx = run(FAMILY["relu2"], x, torch.ones_like(x))
    above = x.double().clamp(min=0)
    for name, got, exact in (("y", y, above * above), ("dx", dx, 2 * above)):
        want = rounded(exact, dtype)
        wrong = ~((got.double() == want) | (got.isnan() & want.isnan()))
        ties = (exact / ulp(exact, dtype) % 1 == 0.5) & want.isfinite()
        print(f"{name} {dtype}: {int(wrong.sum())} wrong, {int(ties.sum())} ties")
        assert not wrong.any()
        assert name == "dx" or ties.any()
    assert (y.isinf() & x.isfinite()).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1000, 66_000], ids=["computed", "looked up"])
def test_nans_stay_nans_whatever_their_payload(dtype: torch.dtype, count: int) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    nans = patterns[patterns.isnan()]
    nans = nans.repeat(count // len(nans) + 1)
    ones = torch.ones_like(nans)
    for activation in FAMILY.values():
        y, dx, *grads = run(activation, nans, ones)
        assert bool(y.isnan().all() & dx.isnan().all()), activation.name
        assert all(grad.isnan() for grad in grads), activation.name
        _, dx, *grads = run(activation, ones, nans)
        assert bool(dx.isnan().all()), activation.name
        assert all(grad.isnan() for grad in grads), activation.name
    y, dx, *_ = run(XIELU, nans[:, None], ones[:, None], bias=ones[:1])
    assert bool(y.isnan().all() & dx.isnan().all())


def test_outputs_written_past_the_caches_are_the_same() -> None:
    count = STREAM_BYTES // 4 + 77
    x, grad_y = normal((count + 1,), torch.float32)[1:], normal((count,), torch.float32, seed=1)
    y, dx, *_ = run(XIELU, x, grad_y)
    pieces = [
        run(XIELU, x[begin : begin + 200_000], grad_y[begin : begin + 200_000])
        for begin in range(0, count, 200_000)
    ]
    assert torch.equal(y, torch.cat([piece[0] for piece in pieces]))
    assert torch.equal(dx, torch.cat([piece[1] for piece in pieces]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("restored_threads")
def test_threads_change_no_bit(dtype: torch.dtype, bias: bool) -> None:
    x, grad_y = normal((5001, 33), dtype), normal((5001, 33), dtype, seed=1)
    for activation in FAMILY.values():
        results = []
        for threads in (1, 2, 3, 4, 1):
            torch.set_num_threads(threads)
            results.append(run(activation, x, grad_y, normal((33,), dtype, 2) if bias else None))
        assert all(same(results[0], other) for other in results[1:]), activation.name


@pytest.mark.parametrize("cubic", [False, True])
def test_a_slope_overflows_where_it_must_and_not_before(cubic: bool) -> None:
    activation = XIEP if cubic else XIELU
    x = torch.logspace(15, 38, 4000)
    _, dx, *_ = run(activation, x, torch.ones_like(x))
    c = coefficients(activation, alphas_of(activation), 0.5)
    error = distance(dx, truth(activation, x, c).dx.value, torch.float32)
    print(f"{activation.name}: {float(error.max()):.2f} ULP, {int(dx.isinf().sum())} infinite")
    assert float(error.max()) <= 4
    assert bool(dx.isinf().any()) is cubic


def test_a_slope_keeps_its_digits_where_n_is_close_to_beta() -> None:
    # its limit at -inf is beta - n, here 1e-4 of beta
    alpha_n = torch.tensor(-9.9)
    x = torch.linspace(-40, -15, 1001).requires_grad_()
    y = functional.xielu(x, torch.tensor(0.0), alpha_n, impl="cpu")
    (dx,) = torch.autograd.grad(y.sum(), x)
    c = coefficients(XIELU, [torch.tensor(0.0), alpha_n], 0.5)
    error = distance(dx, truth(XIELU, x.detach(), c).dx.value, torch.float32)
    print(f"{float(error.max()):.2f} ULP at n - beta = {c.n_minus_beta:.1e}")
    assert float(error.max()) <= 4
