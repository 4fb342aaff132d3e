"""The yardsticks of the accuracy bench, the arithmetic of others, and the limits themselves."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from megatron_xielu.bench import accuracy
from megatron_xielu.bench.accuracy import Figure, alpha_sets, check, markdown
from megatron_xielu.bench.peers import cuda_scalar, cuda_vector, peers, published_extension
from megatron_xielu.bench.truth import coefficients, distance, rounded, truth, ulp
from megatron_xielu.ops import functional
from megatron_xielu.ops.cpu.build import load
from megatron_xielu.ops.family import FAMILY, XIELU, Activation, Below
from megatron_xielu.ops.reference import REFERENCES, inverse_softplus, xielu_as_published

needs_kernels = pytest.mark.skipif(load() is not None, reason="the kernels did not build")
every_activation = pytest.mark.parametrize(
    "activation", FAMILY.values(), ids=lambda activation: activation.name
)


def beta_of(activation: Activation) -> float:
    return 0.5 if activation.alphas else 0.0


# ---- truth


@every_activation
def test_truth_is_right_to_its_last_places(activation: Activation) -> None:
    mp = pytest.importorskip("mpmath")
    mp.mp.dps = 60
    magnitudes = 10 ** torch.linspace(-30, 2, 129, dtype=torch.float64)
    # and both sides of where y and dx cross zero for n = 0.8
    around = -torch.tensor([2.6, 0.98, 0.5, 0.4999, 0.6931], dtype=torch.float64)
    x = torch.cat((magnitudes, -magnitudes, around))
    worst = 0.0
    for alphas in alpha_sets(activation, 0):
        c = coefficients(activation, alphas, beta_of(activation))
        found = truth(activation, x, c)
        named = dict(zip(activation.coefficients, alphas, strict=True))
        beta = mp.mpf(c.beta)
        p2, p3, n = (
            mp.log1p(mp.exp(float(named[name]))) if name in named else mp.mpf(default)
            for name, default in (("p2", 1), ("p3", 0), ("n", 0))
        )
        for i, value in enumerate(map(mp.mpf, x.tolist())):
            if value > 0:
                y = p3 * value**3 + p2 * value**2 + beta * value
                dx = 3 * p3 * value**2 + 2 * p2 * value + beta
            elif activation.below == Below.EXPONENTIAL:
                y = (beta + n) * (mp.expm1(value) - value) + beta * value
                dx = (beta + n) * mp.expm1(value) + beta
            elif activation.below == Below.QUADRATIC:
                y, dx = n * value**2 + beta * value, 2 * n * value + beta
            else:
                y = dx = mp.mpf(0)
            for got, want in ((found.y, y), (found.dx, dx)):
                error = abs(mp.mpf(float(got.value[i])) - want)
                assert error <= 1e-15 * mp.mpf(float(got.least[i])), (float(value), c)
                worst = max(worst, float(error / (abs(want) + mp.mpf("1e-300"))))
    print(f"{activation.name}: largest relative error {worst:.1e}")
    # the nearest input to a zero crossing here is 1e-3 of the terms away
    assert worst < 1e-12


@every_activation
def test_truth_is_the_reference(activation: Activation) -> None:
    x = torch.cat((torch.linspace(-8, 8, 401), torch.zeros(1))).double().requires_grad_()
    for alphas in alpha_sets(activation, 0):
        raw = [alpha.double().requires_grad_() for alpha in alphas]
        y = REFERENCES[activation.name](x, *raw, beta_of(activation))
        dx, *grads = torch.autograd.grad(y.sum(), (x, *raw))
        found = truth(activation, x.detach(), coefficients(activation, alphas, beta_of(activation)))
        for got, want in ((found.y, y.detach()), (found.dx, dx)):
            assert bool(((got.value - want).abs() <= 1e-14 * got.terms).all())
        # softplus' = sigmoid
        for name, alpha, grad in zip(activation.coefficients, alphas, grads, strict=True):
            total = float(found.by_coefficient[name].sum()) * float(torch.sigmoid(alpha.double()))
            assert float(grad) == pytest.approx(total, rel=1e-9)


def test_values_at_the_infinities_are_limits() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan])
    for name, above, below, slope in (
        ("xielu", math.inf, math.inf, -0.3),
        ("xiprelu", math.inf, math.inf, -math.inf),
        ("xiep", math.inf, math.inf, -0.3),
        ("relu2", math.inf, 0.0, 0.0),
    ):
        activation = FAMILY[name]
        c = coefficients(activation, alpha_sets(activation, 0)[0], beta_of(activation))
        found = truth(activation, x, c)
        assert found.y.value[:2].tolist() == [above, below]
        assert found.dx.value[:2].tolist() == [math.inf, pytest.approx(slope, abs=1e-7)]
        assert found.y.value[2].isnan()
        assert found.dx.value[2].isnan()


def test_cancellation_is_that_of_the_best_way_to_write_a_sum() -> None:
    c = coefficients(XIELU, alpha_sets(XIELU, 0)[1], 0.5)  # n = 0.5001
    found = truth(XIELU, torch.tensor([-20.0], dtype=torch.float64), c)
    # beta - n e^0 ..., but n e^x - (n - beta) does not cancel
    assert float(found.dx.terms) == pytest.approx(1.0, rel=1e-3)
    assert float(found.dx.least) == pytest.approx(1e-4, rel=1e-3)
    assert float(found.dx.value) == pytest.approx(-1e-4, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ulp_and_rounding(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    every = torch.arange(1, 0x7F00 if dtype != torch.float16 else 0x7C00, dtype=torch.int32)
    if dtype == torch.float32:
        numbers = (every << 16).view(dtype).double()
    else:
        numbers = every.to(torch.uint16).view(dtype).double()
        assert torch.equal(ulp(numbers, dtype)[:-1], numbers.diff())
    assert ulp(torch.tensor([0.0, 1.0, -1.5]).double(), dtype).tolist() == [
        info.smallest_normal * info.eps,
        info.eps,
        info.eps,
    ]
    half = ulp(numbers, dtype) / 2
    even = torch.arange(1, len(numbers) + 1) % 2 == 0
    for sign in (-1.0, 1.0):
        assert torch.equal(rounded(sign * (numbers + 0.99 * half), dtype), sign * numbers)
        tie = rounded(sign * (numbers + half), dtype)
        if dtype != torch.float32:
            assert torch.equal(tie == sign * numbers, even)
    largest = torch.tensor([info.max], dtype=torch.float64)
    edge = largest + ulp(largest, dtype) / 2
    assert rounded(edge, dtype).item() == math.inf
    assert rounded(edge * (1 - 1e-15), dtype).item() == info.max


def test_rounding_once_is_not_rounding_twice() -> None:
    # above the middle of 1 and its successor by less than float32 sees
    value = torch.tensor([1 + 2.0**-8 + 2.0**-30], dtype=torch.float64)
    assert rounded(value, torch.bfloat16).item() == 1 + 2.0**-7
    assert value.bfloat16().item() == 1


def test_distance() -> None:
    inf, nan = math.inf, math.nan
    exact = torch.tensor([1.0, 1.0, 1.0, 1e39, 1e39, nan, nan, inf, 0.0], dtype=torch.float64)
    value = torch.tensor([1.0, 1 + 2**-7, inf, inf, 3e38, nan, 1.0, inf, 2**-133])
    assert distance(value, exact, torch.bfloat16).tolist() == [0, 1, inf, 0, inf, 0, inf, 0, 1]


# ---- others


def test_facts_about_others() -> None:
    alphas = [alpha.bfloat16().reshape(1) for alpha in alpha_sets(XIELU, 0)[0]]
    x = torch.tensor([0.0, -1e-3, math.nan, 2.0], dtype=torch.bfloat16)
    one = torch.ones_like(x)
    published = xielu_as_published(x.requires_grad_(), *alphas)
    (slope,) = torch.autograd.grad(published.sum(), x)
    # the clamp: neither zero nor its slope are right
    assert published[0].item() == pytest.approx(-8e-7, rel=0.01)
    assert slope[0].item() == pytest.approx(-0.3, rel=0.01)

    x = x.detach()
    scalar, vector = (kernel(x, one, *alphas) for kernel in (cuda_scalar, cuda_vector))
    assert scalar[1][0].item() == vector[1][0].item() == 0.5
    # e^x rounded to 8 bits before the 1 is taken away: the sign is lost
    assert scalar[0][1].item() == pytest.approx(-5e-4, rel=0.01)
    assert vector[0][1].item() > 0
    # packed minimum drops a nan
    assert scalar[1][2].isnan()
    assert vector[1][2].item() == 0.5
    for y, dx, by_p, by_n in (scalar, vector):
        assert y[3].item() == pytest.approx(0.8 * 4 + 1, rel=0.01)
        assert dx[3].item() == pytest.approx(1.6 * 2 + 0.5, rel=0.01)
        assert by_p[3].item() == pytest.approx(4 * float(torch.sigmoid(alphas[0])), rel=0.01)
        assert by_n[3].item() == 0
        assert y.dtype == dx.dtype == by_p.dtype == by_n.dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", [cuda_scalar, cuda_vector])
def test_emulated_kernels_compute_the_formula(kernel: accuracy.Compute) -> None:
    alphas = [torch.tensor([inverse_softplus(v)]).bfloat16() for v in (0.8, 0.3)]
    x = torch.cat((torch.linspace(-1.9, -0.25, 500), torch.linspace(0.25, 8, 500))).bfloat16()
    grad_y = torch.linspace(-2, 2, len(x)).bfloat16()
    y, dx, *terms = kernel(x, grad_y, *alphas)
    exact = truth(XIELU, x, coefficients(XIELU, alphas, 0.5))
    slopes = [float(torch.sigmoid(alpha.double())) for alpha in alphas]
    wanted = {
        "y": (y, exact.y.value, exact.y.terms),
        "dx": (dx, grad_y.double() * exact.dx.value, exact.dx.terms),
        "p": (terms[0], grad_y.double() * exact.by_coefficient["p2"] * slopes[0], x.double() ** 2),
        "n": (terms[1], grad_y.double() * exact.by_coefficient["n"] * slopes[1], x.double().abs()),
    }
    for name, (got, want, scale) in wanted.items():
        worst = float(((got.double() - want).abs() / (2 * scale + want.abs())).max() * 2**8)
        print(f"{name}: {worst:.2f} bf16 roundings of the terms")
        assert worst < 5


def test_the_extension_is_named_where_it_is_missing() -> None:
    if importlib.util.find_spec("xielu"):
        pytest.skip("it is installed")
    with pytest.raises(ImportError, match="nickjbrowning/XIELU cannot be loaded"):
        published_extension(vector=True)


def test_peers_are_listed_with_their_sources() -> None:
    found, missing = peers()
    names = [peer.name for peer in found]
    assert names[0] == "paper's code"
    assert ("transformers" in names) is not any("transformers" in line for line in missing)
    assert all(peer.source for peer in found)


# ---- limits


@needs_kernels
@every_activation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["cpu", accuracy.NO_FMA, "eager"])
def test_every_16_bit_input(activation: Activation, dtype: torch.dtype, impl: str) -> None:
    figures = list(accuracy.sixteen_bits(activation, dtype, impl, alpha_sets(activation, 1)[::3]))
    print(markdown(figures))
    assert not check(figures)


@needs_kernels
@every_activation
@pytest.mark.parametrize("impl", ["cpu", accuracy.NO_FMA, "eager"])
def test_float32(activation: Activation, impl: str) -> None:
    figures = list(accuracy.float32(activation, impl, alpha_sets(activation, 0)))
    print(markdown(figures))
    assert not check(figures)


@needs_kernels
@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["cpu", accuracy.NO_FMA, "eager"])
def test_special_values(activation: Activation, dtype: torch.dtype, impl: str) -> None:
    figure = accuracy.specials(activation, dtype, impl)
    print(figure.row, figure, figure.at)
    assert not check([figure])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["xielu", "xiprelu", "xiep"])
def test_sums(name: str, dtype: torch.dtype) -> None:
    for scale, correlation in accuracy.DATA:
        figures = list(accuracy.sums(FAMILY[name], dtype, "cpu", 1 << 20, scale, correlation))
        print(markdown(figures))
        assert not check(figures)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_a_hundred_million(dtype: torch.dtype) -> None:
    for scale, correlation in accuracy.DATA:
        figures = list(accuracy.sums(XIELU, dtype, "cpu", 100_000_000, scale, correlation))
        print(markdown(figures))
        assert not check(figures)


@needs_kernels
@pytest.mark.slow
def test_the_command_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.run(quick=True)
    printed = capsys.readouterr().out
    print(printed)
    assert "every limit is kept" in printed
    assert "| CUDA, vector |" in printed


@needs_kernels
def test_the_instruction_set_is_restored() -> None:
    x, c = torch.ones(3), alpha_sets(XIELU, 0)[0]
    list(accuracy.results(XIELU, accuracy.NO_FMA, x, c, x))
    fast = accuracy.results(XIELU, "cpu", x, c, x)
    first = next(iter(accuracy.results(XIELU, "cpu", x, c, x)))
    y = functional.xielu(x, *c, impl="cpu")
    assert torch.equal(first.y, y)
    assert len(list(fast)) == len(accuracy._instruction_sets("cpu"))


def test_a_wrong_kernel_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def published(x: Tensor, *alphas: Tensor, impl: str) -> Tensor:
        return xielu_as_published(x, *(alpha.to(x.dtype) for alpha in alphas))

    monkeypatch.setattr(functional, "xielu", published)
    sets = alpha_sets(XIELU, 0)[:1]
    missed = check(accuracy.sixteen_bits(XIELU, torch.bfloat16, "eager", sets))
    print(*missed, sep="\n")
    assert len(missed) == 2
    assert all("roundings of the terms is" in line and "n = 0.8" in line for line in missed)
    missed = check(accuracy.sixteen_bits(XIELU, torch.float16, "eager", sets))
    assert any(line.startswith("xielu float16 eager: y, ULP is inf > 0.501") for line in missed)
    special = accuracy.specials(XIELU, torch.bfloat16, "eager")
    print(special.at)
    assert special.missed
    for fact in ("y at -inf", "dx at 0.0", "dx at -0.0", "y at 0.0"):
        assert fact in special.at


def test_figures_as_a_table() -> None:
    figures = [
        Figure("a", "u", 0.25, 0.5),
        Figure("a", "v", 3.0),
        Figure("b", "u", 0.75, 0.5, "x = 1"),
        Figure("b", "w", math.nan, 1.0),
    ]
    assert markdown(figures).splitlines() == [
        "|  | u | v | w |",
        "| --- | --- | --- | --- |",
        "| a | 0.25 <= 0.5 | 3 |  |",
        "| b | 0.75 > 0.5 |  | nan > 1 |",
    ]
    assert check(figures) == ["b: u is 0.75 > 0.5 at x = 1", "b: w is nan > 1 at "]
