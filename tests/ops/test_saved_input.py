"""The input that is kept in e4m3: what is lost of it, and what that does to the gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_xielu.ops import xielu
from megatron_xielu.ops.reference import REFERENCES
from megatron_xielu.ops.saved_input import pack, unpack, xielu_from_e4m3

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALPHA_P, ALPHA_N, BETA = 0.3, -0.4, 0.5


def inputs(spread: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x of a layer and the gradient of its output: normal numbers, some 20 times as large."""
    generator = torch.Generator().manual_seed(1)
    x, grad_y = (torch.randn(512, 384, generator=generator) for _ in range(2))
    x[::97, ::31] *= 20
    return (spread * x).to(dtype), grad_y.to(dtype)


def largest_error(x: Tensor) -> Tensor:
    """Of each element in e4m3: half a step of its 3 bits of mantissa, or of the smallest step."""
    x = x.double()
    return torch.fmax(2**-4 * x.abs(), 2**-10 * x.abs().max() / 448)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept(dtype: torch.dtype) -> None:
    x, _ = inputs(1.0, dtype)
    data, scale_inv = pack(x, "e4m3")
    assert (data.shape, data.dtype) == (x.shape, torch.float8_e4m3fn)
    assert (scale_inv.shape, scale_inv.dtype) == ((1,), torch.float32)
    restored = unpack((data, scale_inv), dtype)
    assert restored.dtype == dtype
    # what x's own type makes of the restored number comes on top
    slack = 1 + 16 * torch.finfo(dtype).eps
    assert ((restored.double() - x.double()).abs() <= slack * largest_error(x)).all()
    (kept,) = pack(x, "exact")
    assert kept is x


def test_pieces_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = inputs(1.0, torch.bfloat16)
    x = x[:, :375].transpose(0, 1)
    whole = pack(x, "e4m3")
    monkeypatch.setattr("megatron_xielu.ops.saved_input._PIECE", 1000)
    for one, other in zip(whole, pack(x, "e4m3"), strict=True):
        assert torch.equal(one.float(), other.float())
    assert torch.equal(unpack(whole, x.dtype).float(), (whole[0].float() * whole[1]).to(x.dtype))


def test_numbers_that_are_not_finite_and_none_at_all() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    restored = unpack(pack(x, "e4m3"), x.dtype)
    assert torch.isnan(restored[0])
    assert restored[1:].tolist() == [448, -448, 1]
    for empty in (torch.zeros(0), torch.zeros(3, 0), torch.zeros(2, 2)):
        assert torch.equal(unpack(pack(empty, "e4m3"), empty.dtype), empty)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_what_is_kept(dtype: torch.dtype, spread: float) -> None:
    x, grad_y = inputs(spread, dtype)
    alphas = torch.tensor([ALPHA_P, ALPHA_N], dtype=torch.float64)
    results = {}
    for how in ("exact", "e4m3"):
        leaves = [x.clone(), *alphas.float()]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = (
            xielu(*leaves, beta=BETA)
            if how == "exact"
            else xielu_from_e4m3(*leaves, beta=BETA, impl="auto")
        )
        results[how] = [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]
    assert torch.equal(results["exact"][0], results["e4m3"][0])

    true_x, *true_alphas = (leaf.double().requires_grad_() for leaf in (x, *alphas))
    y = REFERENCES["xielu"](true_x, *true_alphas, BETA)
    truth = torch.autograd.grad(y, (true_x, *true_alphas), grad_y.double())
    # an alpha's gradient nearly cancels here, so its error is compared with the terms of the sum
    wide, slope = x.double(), torch.sigmoid(alphas)
    terms = [
        slope[0] * wide.clamp(min=0) ** 2,
        slope[1] * (wide.expm1() - wide).where(wide <= 0, 0),
    ]
    scales = [truth[0].norm(), *((grad_y.double() * term).norm() for term in terms)]
    for how, (_, *grads) in results.items():
        errors = [
            float((grad.double() - true).norm() / scale)
            for grad, true, scale in zip(grads, truth, scales, strict=True)
        ]
        print(f"{dtype} {spread} {how}: dx, alpha_p, alpha_n off by", *(f"{e:.1e}" for e in errors))

    # what moves x by at most this moves the slope by that times the largest second derivative
    moved, g = largest_error(x), grad_y.double().abs()
    a_p, a_n = math.log1p(math.exp(ALPHA_P)), BETA + math.log1p(math.exp(ALPHA_N))
    rounding = torch.finfo(dtype).eps * truth[0].abs() + torch.finfo(dtype).tiny
    _, dx, *d_alphas = results["e4m3"]
    # ... and x's own type rounds what was restored
    slack = 1 + 16 * torch.finfo(dtype).eps
    assert (
        (dx.double() - truth[0]).abs() <= slack * max(2 * a_p, a_n) * g * moved + rounding
    ).all()
    # d/dx of x^2 and of expm1(x) - x is below 2 |x| and 1
    bounds = [2 * x.double().abs() * moved + moved**2, moved]
    for found, true, bound, alpha in zip(d_alphas, truth[1:], bounds, alphas, strict=True):
        assert float((found - true).abs()) <= slack * float(
            (torch.sigmoid(alpha) * g * bound).sum()
        )
