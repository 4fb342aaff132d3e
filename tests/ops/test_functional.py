"""xIELU against the formula in float64: values, all three gradients, corners and refusals."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from megatron_xielu import XIELU, xielu
from megatron_xielu.ops import functional, library
from megatron_xielu.ops.cpu import build
from megatron_xielu.ops.dispatch import Impl
from megatron_xielu.ops.family import FAMILY, Activation
from megatron_xielu.ops.reference import inverse_softplus, xielu_reference
from megatron_xielu.recipes.schema import Xielu

CPU = pytest.param(
    "cpu", marks=pytest.mark.skipif(build.load() is not None, reason="the kernels did not build")
)
IMPLS = [CPU, "eager", "reference"]
FUSED_IMPLS = [CPU, "eager"]  # those with a backward of their own
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
        x, flat_x = (t.detach().requires_grad_() for t in (view, view.contiguous()))
        y, flat_y = (xielu(t, *alphas, impl=impl) for t in (x, flat_x))
        assert torch.equal(y, flat_y)
        assert y.stride() == torch.empty_like(view).stride()
        # an upstream gradient in another memory order than x
        upstream = torch.linspace(-1, 1, x.numel()).reshape(x.shape[::-1]).permute(2, 1, 0)
        (dx,) = torch.autograd.grad(y, x, upstream)
        (flat_dx,) = torch.autograd.grad(flat_y, flat_x, upstream.contiguous())
        assert torch.equal(dx, flat_dx)


@pytest.mark.parametrize("impl", FUSED_IMPLS)
def test_nothing_is_kept_but_the_input_and_the_alphas(impl: str) -> None:
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = inputs(torch.bfloat16, 4096)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        xielu(x, *raw(0.8, 0.8), impl=impl)
    assert sorted(tensor.numel() for tensor in saved) == [1, 1, 4096]
    # the input itself, no copy
    assert x.data_ptr() in {tensor.data_ptr() for tensor in saved}


@pytest.mark.parametrize("impl", FUSED_IMPLS)
def test_the_input_is_not_written_to(impl: str) -> None:
    x = inputs(torch.float32, 100)
    before = x.detach().clone()
    y = xielu(x, *raw(0.8, 0.8), impl=impl)
    y.sum().backward()
    assert torch.equal(x, before)


@pytest.mark.parametrize("impl", FUSED_IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", FAMILY.values(), ids=FAMILY.keys())
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_the_family_agrees_with_its_references(
    impl: str, dtype: torch.dtype, activation: Activation, with_bias: bool
) -> None:
    x = inputs(dtype, 3 * 7001).detach().reshape(3, 7001)
    upstream = torch.linspace(-1, 2, x.numel()).reshape(x.shape).to(dtype)
    bias = torch.linspace(-1, 1, 7001).to(dtype) if with_bias else None
    alphas = [torch.tensor([value]) for value in (0.3, -1.1, 0.7)[: len(activation.alphas)]]
    names = ["y", "dx", *activation.alphas, *(["dbias"] if with_bias else [])]

    def run(wide: bool, impl: str) -> list[torch.Tensor]:
        tensors = [x, *alphas] + ([] if bias is None else [bias])
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in tensors]
        added = leaves[-1] if with_bias else None
        function = getattr(functional, activation.name)
        y = function(leaves[0], *leaves[1 : 1 + len(alphas)], bias=added, impl=impl)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]

    rounding = torch.finfo(dtype).eps
    for name, got, want in zip(names, run(False, impl), run(True, "reference"), strict=True):
        # a sum of n terms; a bias gradient sums the three rows of dx, which were rounded
        scale = want.abs().max() if got.numel() > 1 else want.abs()
        error = float(((got.double() - want).abs() / scale).max())
        bound = 1e-5 if got.dtype == torch.float32 else rounding * (2 if name == "dbias" else 1)
        print(f"{activation.name} {impl} {dtype} {name}: {error:.1e} of {bound:.1e}")
        assert got.dtype == (torch.float32 if name in activation.alphas else dtype)
        assert error <= bound


@pytest.mark.parametrize("alphas", [torch.bfloat16, torch.float32])
def test_published_numerics_are_those_of_the_published_code_to_the_bit(alphas: torch.dtype) -> None:
    x, (alpha_p, alpha_n) = inputs(torch.bfloat16), raw(0.8, 0.8, alphas)
    y = xielu(x, alpha_p, alpha_n, reference_numerics=True)
    # written out once more; the literal rounds to bfloat16 as the published buffer does
    a_p, a_n = F.softplus(alpha_p), 0.5 + F.softplus(alpha_n)
    clamped = torch.min(x, torch.tensor(-1e-6, dtype=torch.bfloat16))
    above, below = a_p * x * x + 0.5 * x, a_n * torch.expm1(clamped) - a_n * x + 0.5 * x
    published = torch.where(x > 0, above, below)
    assert published.dtype == alphas
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, published.bfloat16())
    zero = torch.zeros(1, requires_grad=True)
    (slope,) = torch.autograd.grad(xielu(zero, *raw(0.8, 0.8), reference_numerics=True), zero)
    # what a comparison should know: beta - a_n instead of beta
    assert float(slope) == pytest.approx(-0.3, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_numerics_of_a_single_number_are_a_single_number(dtype: torch.dtype) -> None:
    x, alphas = torch.tensor(1.5, dtype=dtype, requires_grad=True), raw(0.8, 0.8)
    y = xielu(x, *alphas, reference_numerics=True)
    assert (y.shape, y.dtype) == ((), dtype)
    # 0.8 * 1.5^2 + 0.5 * 1.5
    torch.testing.assert_close(y.detach(), torch.tensor(2.55, dtype=dtype))
    grads = torch.autograd.grad(y, (x, *alphas))
    found = [(grad.shape, grad.dtype) for grad in grads]
    assert found == [((), dtype), ((1,), torch.float32), ((1,), torch.float32)]


@pytest.mark.parametrize("impl", FUSED_IMPLS)
def test_torch_knows_the_operations(impl: str) -> None:
    x = torch.randn(6, 16).requires_grad_()
    alphas = [torch.tensor(0.2, requires_grad=True), torch.tensor(-1.0, requires_grad=True)]
    bias = torch.randn(16, requires_grad=True)
    for added in (None, bias):
        torch.library.opcheck(library.forward, (x, added, alphas, 0.5, "xielu", impl))
    permuted = x.detach().t().requires_grad_()
    torch.library.opcheck(library.forward, (permuted, None, alphas, 0.5, "xielu", impl))


@pytest.mark.parametrize("shape", [(40, 64), (3, 33)])
def test_compiled_without_a_graph_break(shape: tuple[int, ...]) -> None:
    x, alphas = torch.randn(shape, requires_grad=True), raw(0.8, 0.8)

    def block(x: torch.Tensor, *alphas: torch.Tensor) -> torch.Tensor:
        return xielu(x * 2, *alphas) + 1

    compiled = torch.compile(block, fullgraph=True)
    results = []
    for function in (block, compiled):
        y = function(x, *alphas)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *alphas))))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-6, atol=1e-6)


def test_exported_with_a_dynamic_batch() -> None:
    module = XIELU()
    batch = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(module, (torch.randn(4, 8),), dynamic_shapes=batch)
    x = torch.randn(7, 8)
    assert torch.equal(exported.module()(x), module(x))
    assert "megatron_xielu.forward" in str(exported.graph)


@pytest.mark.parametrize("impl", FUSED_IMPLS)
def test_derivatives_that_kernels_do_not_have_are_refused(impl: str) -> None:
    x, alphas = torch.linspace(-1, 1, 5), [alpha.detach() for alpha in raw(0.8, 0.8)]

    def function(x: torch.Tensor) -> torch.Tensor:
        return xielu(x, *alphas, impl=impl)

    for transform in (
        lambda: torch.func.jvp(function, (x,), (torch.ones(5),)),
        lambda: torch.func.grad(lambda x: function(x).sum())(x),
        lambda: torch.func.vmap(function)(x),
    ):
        with pytest.raises(RuntimeError, match=r'transforms .* use impl="reference"'):
            transform()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode derivatives"):
        function(forward_ad.make_dual(x, torch.ones(5)))
    _, tangent = torch.func.jvp(
        lambda x: xielu(x, *alphas, impl="reference"), (x,), (torch.ones(5),)
    )
    assert float(tangent[2]) == 0.5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_inputs_of_vanishing_coefficients(impl: str, dtype: torch.dtype) -> None:
    if impl == "cpu" and dtype == torch.float64:
        impl = "auto"
    x = torch.tensor([-math.inf, math.inf], dtype=dtype)
    # softplus of it is zero in every type
    alpha = torch.tensor([-1000.0])
    assert xielu(x, alpha, alpha, impl=impl).tolist() == [math.inf, math.inf]


def test_meta_tensors_have_a_shape_and_no_kernel() -> None:
    x = torch.empty(5, 3, device="meta", dtype=torch.bfloat16)
    alpha = torch.empty(1, device="meta")
    for impl in get_args(Impl):
        y = xielu(x, alpha, alpha, impl=impl)
        assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")


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


X, ALPHA = torch.ones(2, 3), torch.zeros(1)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((X.long(), ALPHA, ALPHA), {}, TypeError, "x is torch.int64; it must be one of float64"),
        ((X.to(torch.float8_e4m3fn), ALPHA, ALPHA), {}, TypeError, "x is torch.float8_e4m3fn"),
        ((X, ALPHA, ALPHA.int()), {}, TypeError, "alpha_n is torch.int32"),
        ((X, torch.ones(2), ALPHA), {}, ValueError, r"alpha_p must hold one .* shape \(2,\)"),
        ((X, ALPHA, ALPHA.to("meta")), {}, ValueError, r"alpha_n is on meta .* \.to\('cpu'\)"),
        ((X, ALPHA, ALPHA), {"impl": "fast"}, ValueError, "impl='fast' is unknown; choose one"),
        (
            (X.double(), ALPHA, ALPHA),
            {"impl": "cpu"},
            ValueError,
            "no CPU kernel for torch.float64",
        ),
        ((X, ALPHA, ALPHA), {"impl": "triton"}, ValueError, "impl='triton' cannot compute this"),
        (
            (X, ALPHA, ALPHA),
            {"bias": torch.ones(3).bfloat16()},
            TypeError,
            r"bias is torch.bfloat16 and x is torch.float32; cast .* \.to\(torch.float32\)",
        ),
        ((X, ALPHA, ALPHA), {"bias": torch.ones(2)}, ValueError, r"shape \(2,\), .* needs \(3,\)"),
        ((X, 0.2, ALPHA), {}, TypeError, "alpha_p must be a dense tensor, got float"),
        ((X.to_sparse(), ALPHA, ALPHA), {}, TypeError, "x must be a dense tensor, got torch.sp"),
        ((X, ALPHA, ALPHA), {"beta": math.nan}, ValueError, "beta=nan must be finite"),
        (
            (X, ALPHA, ALPHA),
            {"impl": "cpu", "reference_numerics": True},
            ValueError,
            "reference_numerics=True is plain torch, but impl='cpu'",
        ),
    ],
)
def test_bad_input_is_refused_with_the_remedy(
    arguments: tuple[object, ...],
    settings: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as refusal:
        xielu(*arguments, **settings)  # type: ignore[arg-type]
    print(refusal.value)


def test_the_recipes_know_the_same_implementations() -> None:
    assert get_args(get_type_hints(Xielu)["impl"]) == get_args(Impl)


@pytest.mark.parametrize("value", [1e-6, 0.3, 0.8, 5.0, 100.0, 1000.0])
def test_inverse_softplus(value: float) -> None:
    back = torch.nn.functional.softplus(torch.tensor(inverse_softplus(value), dtype=torch.float64))
    assert float(back) == pytest.approx(value, rel=1e-12)
