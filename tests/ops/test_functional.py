"""xIELU against the formula in float64: values, all three gradients, corners and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_xielu import xielu
from megatron_xielu.ops.reference import inverse_softplus, xielu_reference

IMPLS = ["cpu", "eager", "reference"]
WIDE_IMPLS = ["eager", "reference"]  # those that compute float64
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ALPHAS = [(0.8, 0.8), (0.05, 0.51), (3.0, 2.0), (0.2, 8.0)]


def raw(a_p: float, a_n: float, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    values = (inverse_softplus(a_p), inverse_softplus(a_n - 0.5))
    return [torch.tensor([value], dtype=dtype, requires_grad=True) for value in values]


def inputs(dtype: torch.dtype, count: int = 20_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator, dtype=torch.float64) * 2
    return x.to(dtype).requires_grad_()


def truth(x: float, a_p: float, a_n: float, beta: float = 0.5) -> tuple[float, float]:
    """The formula and its derivative, written out once more."""
    if x > 0:
        return a_p * x * x + beta * x, 2 * a_p * x + beta
    return a_n * (math.expm1(x) - x) + beta * x, a_n * math.expm1(x) + beta


@pytest.mark.parametrize("impl", WIDE_IMPLS)
@pytest.mark.parametrize(("a_p", "a_n"), ALPHAS)
def test_float64_is_the_formula(impl: str, a_p: float, a_n: float) -> None:
    x = inputs(torch.float64, 500)
    alphas = raw(a_p, a_n, torch.float64)
    y = xielu(x, *alphas, impl=impl)
    (dx,) = torch.autograd.grad(y.sum(), x)
    expected = torch.tensor([truth(value, a_p, a_n) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(torch.stack((y.detach(), dx), 1), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", WIDE_IMPLS)
def test_gradients_are_those_of_finite_differences(impl: str) -> None:
    x = inputs(torch.float64, 40).detach().reshape(5, 8).requires_grad_()
    alphas = raw(0.7, 1.3, torch.float64)
    assert torch.autograd.gradcheck(lambda *args: xielu(*args, impl=impl), (x, *alphas))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("a_p", "a_n"), ALPHAS)
def test_storage_types_are_within_their_rounding(
    impl: str, dtype: torch.dtype, a_p: float, a_n: float
) -> None:
    if impl == "cpu" and dtype == torch.float64:
        impl = "auto"
    x, alphas = inputs(dtype), raw(a_p, a_n)
    upstream = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).to(dtype)
    y = xielu(x, *alphas, impl=impl)
    grads = torch.autograd.grad(y, (x, *alphas), upstream)

    exact_x = x.detach().double().requires_grad_()
    exact_alphas = [alpha.detach().double().requires_grad_() for alpha in alphas]
    exact_y = xielu_reference(exact_x, *exact_alphas)
    exact = torch.autograd.grad(exact_y, (exact_x, *exact_alphas), upstream.double())

    assert y.dtype == dtype
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]
    # one rounding to the storage type, and fp32 arithmetic on terms as large as a_n or a_p x^2
    rounding = torch.finfo(dtype).eps / 2
    arithmetic = 8 * torch.finfo(torch.float32).eps * (1 + a_p + a_n)
    for name, got, want in (("y", y.detach(), exact_y.detach()), ("dx", grads[0], exact[0])):
        scale = 1 + exact_x.detach().abs()
        error = (got.double() - want).abs() - rounding * want.abs()
        worst = float((error / (arithmetic * scale)).max())
        print(f"{name} {dtype} {impl}: {worst:.2f} of the arithmetic's bound above one rounding")
        assert worst <= 1
    for got, want in zip(grads[1:], exact[1:], strict=True):
        terms = upstream.double().abs().sum() * (1 + exact_x.detach().abs().max()) ** 2
        assert abs(float(got) - float(want)) <= 1e-6 * float(terms)
        assert float(got) == pytest.approx(float(want), rel=2e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_slope_at_and_around_zero_is_beta(impl: str) -> None:
    x = torch.tensor([0.0, -0.0, -1e-7, 1e-7, -1e-20, 1e-20], requires_grad=True)
    y = xielu(x, *raw(0.8, 0.8), impl=impl)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.full_like(dx, 0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(y.detach(), x.detach() / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_infinities_and_nan(impl: str) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan], requires_grad=True)
    y = xielu(x, *raw(0.8, 0.8), impl=impl)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y[:2].tolist() == [math.inf, math.inf]
    assert y[2].isnan()
    assert dx[0] == math.inf
    assert float(dx[1]) == pytest.approx(0.5 - 0.8, abs=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (7, 5, 3)])
def test_any_shape(impl: str, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, -1.5, requires_grad=True)
    alphas = raw(0.8, 0.8)
    y = xielu(x, *alphas, impl=impl)
    grads = torch.autograd.grad(y.sum(), (x, *alphas))
    assert y.shape == x.shape == grads[0].shape
    assert [grad.shape for grad in grads[1:]] == [(1,), (1,)]
    assert float(grads[2]) == pytest.approx(
        x.numel() * (math.expm1(-1.5) + 1.5) * float(torch.sigmoid(alphas[1].detach())), rel=1e-6
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_permuted_and_strided_input(impl: str) -> None:
    base = inputs(torch.float32, 24 * 10).detach().reshape(4, 6, 10)
    alphas = raw(0.9, 1.1)
    for view in (base.permute(2, 0, 1), base[:, ::2], base[..., 3:7].transpose(0, 1)):
        x = view.detach().requires_grad_()
        y = xielu(x, *alphas, impl=impl)
        flat = xielu(view.contiguous(), *alphas, impl=impl)
        assert torch.equal(y, flat)


def test_eager_keeps_nothing_but_the_input_and_the_alphas() -> None:
    saved: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    x = inputs(torch.bfloat16, 4096)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        xielu(x, *raw(0.8, 0.8), impl="eager")
    assert sorted(shape.numel() for shape in saved) == [1, 1, 4096]


def test_the_input_is_not_written_to() -> None:
    x = inputs(torch.float32, 100)
    before = x.detach().clone()
    y = xielu(x, *raw(0.8, 0.8), impl="eager")
    y.sum().backward()
    assert torch.equal(x, before)


def test_autocast_and_fp32_alphas_beside_bf16_input() -> None:
    alphas = raw(0.8, 0.8)
    with torch.autocast("cpu", torch.bfloat16):
        y = xielu(torch.randn(8, 4, dtype=torch.bfloat16, requires_grad=True), *alphas)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert alphas[0].grad is not None
    assert alphas[0].grad.dtype == torch.float32


def test_second_derivatives_are_refused() -> None:
    x = inputs(torch.float64, 4)
    (dx,) = torch.autograd.grad(xielu(x, *raw(0.8, 0.8)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivatives .* use impl="reference"'):
        dx.sum().backward()


def test_bad_input_is_named() -> None:
    x, (alpha_p, alpha_n) = torch.ones(3), raw(0.8, 0.8)
    with pytest.raises(TypeError, match=r"x is torch.int64; it must be one of float64, float32"):
        xielu(torch.ones(3, dtype=torch.int64), alpha_p, alpha_n)
    with pytest.raises(ValueError, match=r"alpha_n must hold one element, got shape \(2,\)"):
        xielu(x, alpha_p, torch.ones(2))
    with pytest.raises(ValueError, match=r"impl='fast' is unknown; choose one of auto, "):
        xielu(x, alpha_p, alpha_n, impl="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1e-6, 0.3, 0.8, 5.0, 100.0, 1000.0])
def test_inverse_softplus(value: float) -> None:
    back = torch.nn.functional.softplus(torch.tensor(inverse_softplus(value), dtype=torch.float64))
    assert float(back) == pytest.approx(value, rel=1e-12)
