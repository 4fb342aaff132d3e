"""The family's formulas as device functions of Triton kernels: the counterpart of `csrc/simd.inl`.

A kernel names what it computes with three compile-time values: CUBIC and BELOW of `ops.family`, and
the ARITHMETIC of its storage type.

    "fast"    float32, with the GPU's own approximation of 2^x. Its error is invisible once results
              are rounded to bfloat16, and these are the kernels that must not be limited by
              arithmetic: one transcendental instruction per element.
    "single"  float32, with an exponential that is accurate to its last bits, for float32.
    "double"  float64, for float16 where results cross zero, which float32 cannot round correctly.

Every half of x contributes exactly nothing to the other half's results.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a device function takes and returns is decided where it is compiled)

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from megatron_xielu.ops.family import Activation, Below

_QUADRATIC = tl.constexpr(int(Below.QUADRATIC))
_EXPONENTIAL = tl.constexpr(int(Below.EXPONENTIAL))
# how far from zero the "fast" arithmetic computes e^x - 1 as a polynomial, which does not cancel;
# this far down because y or dy/dx crosses zero there when n is large
_NEAR = tl.constexpr(-0.625)
# Triton's interpreter, which computes on CPUs for tests, knows no inline assembly
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


def arithmetic(activation: Activation, dtype: torch.dtype) -> str:
    """The ARITHMETIC of a storage type."""
    if dtype == torch.float16 and activation.below != Below.ZERO:
        return "double"
    return "fast" if dtype == torch.bfloat16 else "single"


@triton.jit
def load_coefficients(
    alpha_p2,
    alpha_p3,
    alpha_n,
    beta,
    CUBIC: tl.constexpr,
    BELOW: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):
    """The tuple (beta, p2, p3, n, n - beta) that `value` and `gradient` take, in the arithmetic.

    The alphas are pointers to one element each of any floating type, None where the activation has
    none; beta is a scalar, best a float64 one (annotate a kernel's argument with tl.float64).
    """
    WIDE: tl.constexpr = tl.float64 if ARITHMETIC == "double" else tl.float32
    beta = tl.cast(beta, WIDE)
    p2 = tl.full([], 1.0, WIDE)
    p3 = tl.full([], 0.0, WIDE)
    n = p3
    excess = p3
    if alpha_p2 is not None:
        p2 = _softplus(tl.load(alpha_p2), ARITHMETIC)
    if CUBIC:
        p3 = _softplus(tl.load(alpha_p3), ARITHMETIC)
    if alpha_n is not None:
        excess = _softplus(tl.load(alpha_n), ARITHMETIC)
        n = excess
        if BELOW == _EXPONENTIAL:
            n = excess + beta
    return beta, p2, p3, n, excess


@triton.jit
def widen(x, ARITHMETIC: tl.constexpr):
    """Loaded elements, or a bias, in the arithmetic's type."""
    return x.to(tl.float64) if ARITHMETIC == "double" else x.to(tl.float32)


@triton.jit
def widen_pairs(x, ARITHMETIC: tl.constexpr):
    """The same with one instruction per bfloat16, where the compiler takes three per pair.

    After `widen`, though, it compares the pair at once, which is worth more in `value`.
    """
    if _INTERPRETED or x.dtype != tl.bfloat16:
        wide = widen(x, ARITHMETIC)
    else:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return wide


@triton.jit
def value(x, coefficients, CUBIC: tl.constexpr, BELOW: tl.constexpr, ARITHMETIC: tl.constexpr):
    """The activation of x, which is widened already; y is in the arithmetic's type."""
    beta, p2, p3, n, excess = coefficients
    if BELOW == _EXPONENTIAL:
        if ARITHMETIC == "fast":
            y = _fast_value(x, beta, p2, p3, n, excess, CUBIC)
        elif ARITHMETIC == "single":
            y = tl.where(
                x > 0.0,
                _polynomial(x, beta, p2, p3, CUBIC),
                _single_value(_below(x), beta, n, excess),
            )
        else:
            below = _below(x)
            y = _polynomial(_above(x), beta, p2, p3, CUBIC)
            y += n * (tl.exp(below) - 1.0) - excess * below
    elif BELOW == _QUADRATIC:
        y = x * tl.fma(tl.where(x > 0.0, p2, n), x, beta)
    else:
        y = _polynomial(_above(x), beta, p2, p3, CUBIC)
    return y


@triton.jit
def gradient(x, coefficients, CUBIC: tl.constexpr, BELOW: tl.constexpr, ARITHMETIC: tl.constexpr):
    """dy/dx and the derivatives of y by p2, p3 and n, in the arithmetic's type.

    Those that the activation does not have are there too and mean nothing; what a kernel does not
    use costs nothing.
    """
    beta, p2, p3, n, excess = coefficients
    above = _above(x)
    below = _below(x)
    square = above * above
    slope = beta
    by_n = below
    if BELOW == _QUADRATIC:
        slope = tl.fma(2.0 * n, below, slope)
        by_n = below * below
    if BELOW == _EXPONENTIAL:
        if ARITHMETIC == "fast":
            near = below > _NEAR
            q = _near_zero(below, 1.0)
            expm1 = _fast_exp(below) - 1.0
            by_n = tl.where(near, below * below * q, expm1 - below)
            expm1 = tl.where(near, tl.fma(below * below, q, below), expm1)
        elif ARITHMETIC == "single":
            scale, r, tail = _exponential(below)
            by_n = _expm1_minus(scale, r, tail, below)
            # n (e^x - 1) + beta near zero, n e^x - (n - beta) far from it, where the slope's limit
            # beta - n may be small beside beta; both ways cancel alike where e^x is 1/2
            far = below < -0.69314718
            expm1 = tl.fma(scale, r + tail, scale - tl.where(far, 0.0, 1.0))
            slope = tl.where(far, -excess, beta)
        else:
            expm1 = tl.exp(below) - 1.0
            by_n = expm1 - below
        slope = tl.fma(n, expm1, slope)
    by_above = 2.0 * p2
    if CUBIC:
        # not 3 p3 x^2, whose x^2 overflows before the product does
        by_above = tl.fma(3.0 * p3, above, by_above)
    slope = tl.fma(by_above, above, slope)
    return slope, square, square * above, by_n


@triton.jit
def _above(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _below(x):
    return tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _polynomial(x, beta, p2, p3, CUBIC: tl.constexpr):
    """The half x > 0."""
    slope = p2
    if CUBIC:
        slope = tl.fma(p3, x, p2)
    return x * tl.fma(slope, x, beta)


@triton.jit
def _single_value(x, beta, n, excess):
    """The half x <= 0 of the exponential ones."""
    # near zero n (e^x - 1 - x) + beta x, far from it n (e^x - 1) - (n - beta) x: each where the
    # other one cancels; the second one also has the right limit at -inf
    far = x < -1.5
    scale, r, tail = _exponential(x)
    expm1 = _expm1_minus(scale, r, tail, tl.where(far, 0.0, x))
    return tl.fma(n, expm1, x * tl.where(far, -excess, beta))


@triton.jit
def _fast_value(x, beta, p2, p3, n, excess, CUBIC: tl.constexpr):
    above = p2
    if CUBIC:
        above = tl.fma(p3, x, above)
    near = x * tl.fma(tl.where(x > 0.0, above, _near_zero(x, n)), x, beta)
    far = n * _fast_exp(x) - tl.fma(excess, x, n)
    return tl.where(x > _NEAR, near, far)


@triton.jit
def _near_zero(x, n):
    """n (e^x - 1 - x) / x^2 from _NEAR to 0: minimax of degree 4, relative error below 7e-8.

    n is multiplied into the polynomial's coefficients, which happens once.
    """
    q = tl.fma(x, n * 0.001113330311, n * 0.008187577462)
    q = tl.fma(x, q, n * 0.04163439857)
    q = tl.fma(x, q, n * 0.1666641304)
    return tl.fma(x, q, n * 0.4999999677)


@triton.jit
def _fast_exp(x):
    t = x * 1.4426950408889634
    if _INTERPRETED:
        result = tl.exp2(t)
    else:
        # tl.exp2 spends three more instructions on subnormal results, which vanish beside 1
        result = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _exponential(x):
    """e^x for x <= 0 in parts, scale (1 + r + tail), in float32."""
    # below, the scale would be subnormal, and e^x - 1 rounds to -1 anyway
    x = tl.maximum(x, -87.0, propagate_nan=tl.PropagateNan.ALL)
    # adding 1.5 * 2^23 leaves the rounded sum in the low bits
    shifted = tl.fma(x, 1.44269504, 12582912.0)
    k = shifted - 12582912.0
    # ln 2 in two parts, of which the first has 15 bits, so that its product with k is exact
    r = tl.fma(k, -0.693145751953125, x)
    r = tl.fma(k, -1.4286068203094172e-06, r)
    scale = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    # (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2: minimax of degree 5, relative error below 2e-9
    q = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    q = tl.fma(q, r, 8.3334519073e-3)
    q = tl.fma(q, r, 4.1665795894e-2)
    q = tl.fma(q, r, 1.6666665459e-1)
    q = tl.fma(q, r, 5.0000001201e-1)
    return scale, r, r * r * q


@triton.jit
def _expm1_minus(scale, r, tail, shift):
    """e^x - 1 - shift, without cancellation where shift is x or 0."""
    return tl.fma(scale, tail, tl.fma(scale, r, (scale - 1.0) - shift))


@triton.jit
def _softplus(alpha, ARITHMETIC: tl.constexpr):
    """log(1 + e^alpha), of which small values keep all their digits."""
    if ARITHMETIC == "fast":
        alpha = alpha.to(tl.float32)
        scale, r, tail = _exponential(-tl.abs(alpha))
        e = tl.fma(scale, r + tail, scale)
        # log(1 + e) / e: minimax of degree 9, relative error below 5e-9
        q = tl.fma(e, -0.003244045815, 0.01985159663)
        q = tl.fma(e, q, -0.0569598758)
        q = tl.fma(e, q, 0.1060370031)
        q = tl.fma(e, q, -0.1530562741)
        q = tl.fma(e, q, 0.1967595507)
        q = tl.fma(e, q, -0.2495413781)
        q = tl.fma(e, q, 0.33329963)
        q = tl.fma(e, q, -0.4999990246)
        q = tl.fma(e, q, 0.9999999953)
        result = tl.fma(e, q, tl.maximum(alpha, 0.0))
    else:
        alpha = alpha.to(tl.float64)
        e = tl.exp(-tl.abs(alpha))
        result = tl.where(e < 1e-8, e, tl.log(1.0 + e)) + tl.maximum(alpha, 0.0)
        if ARITHMETIC == "single":
            # zero times an infinite x would be no number
            result = tl.maximum(result.to(tl.float32), 1.17549435e-38)
    return result
