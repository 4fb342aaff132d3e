"""FP8 emulation inside a rank; `call.py` runs these."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_xielu.errors import UserError
from megatron_xielu.ops.fp8_reference import Blockwise, Current, Delayed, dequantize, quantize
from tests.mcore.checks import build, config, logits_and_grads

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
EPS = torch.finfo(torch.float32).eps
RECIPES = ("delayed", "tensorwise", "blockwise")
# the root mean square of a rounding error, in half steps, relative to the number that is rounded:
# uniform within half a step, and the number log-uniform between two powers of two
RMS = math.sqrt(1 / 3 * (1 - 1 / 4) / (2 * math.log(2)))
E4M3_HALF_STEP, E5M2_HALF_STEP = 2**-4, 2**-3


def settings(recipe: str, **changes: Any) -> Any:
    from megatron_xielu.mcore.fp8_emulation import FP8Settings

    chosen = FP8Settings(recipe=recipe, format="e4m3" if recipe == "blockwise" else "hybrid")
    return replace(chosen, **changes)


def both_ways(x: Tensor, scaling: Any) -> tuple[Tensor, Tensor]:
    """What FP8 leaves of x by rows and by columns, in float64."""
    found = quantize(x, scaling)
    assert found.rowwise is not None
    assert found.rowwise_scale_inv is not None
    assert found.columnwise is not None
    assert found.columnwise_scale_inv is not None
    rows = dequantize(found.rowwise, found.rowwise_scale_inv, scaling)
    columns = dequantize(found.columnwise, found.columnwise_scale_inv, scaling)
    return rows.double(), columns.T.double()


def an_emulated_linear_is_the_product_of_what_fp8_leaves() -> None:
    """Three products in float64 from operands dequantized by hand, within float32's round-off."""
    from megatron_xielu.mcore.fp8_emulation import EmulatedProduct

    generator = torch.Generator().manual_seed(0)
    for recipe in RECIPES:
        for dtype in (torch.float32, torch.bfloat16):
            x, weight, grad = (
                (size * torch.randn(*shape, generator=generator)).to(dtype)
                for size, shape in ((3, (2, 75, 200)), (0.05, (136, 200)), (0.01, (2, 75, 136)))
            )
            bias = torch.randn(136, generator=generator).to(dtype).requires_grad_()
            x.requires_grad_()
            weight.requires_grad_()
            y = EmulatedProduct(settings(recipe))(input=x, weight=weight, bias=bias)
            y.backward(grad)

            one = torch.ones(1)
            scalings: Any = {
                "delayed": (Delayed(one), Delayed(one), Delayed(one, E5M2)),
                "tensorwise": (Current(), Current(), Current(E5M2)),
                "blockwise": (Blockwise(), Blockwise(square=True), Blockwise()),
            }[recipe]
            flat, upper = x.detach().flatten(0, 1), grad.flatten(0, 1)
            (x_rows, x_columns), (w, _), (g_rows, g_columns) = (
                both_ways(tensor, scaling)
                for tensor, scaling in zip((flat, weight.detach(), upper), scalings, strict=True)
            )
            worst = 0.0
            # one rounding to bf16 of the product, another with the bias
            half = torch.finfo(dtype).eps / 2
            plain = y.detach().flatten(0, 1).double() - bias.detach().double()
            extra = half * y.detach().flatten(0, 1).double().abs()
            for got, left, right, more in (
                (plain, x_rows, w.T, extra),
                (x.grad.flatten(0, 1), g_rows, w, 0.0),
                (weight.grad, g_columns.T, x_columns, 0.0),
            ):
                want = left @ right
                bound = left.shape[1] * EPS * (left.abs() @ right.abs()) + half * want.abs() + more
                error = (got.double() - want).abs() / bound
                worst = max(worst, float(error.max()))
            assert torch.equal(bias.grad, upper.sum(0).to(dtype))
            print(f"{recipe} {dtype}: at most {worst:.2f} of the bound")
            assert worst <= 1


def the_error_of_a_product_is_that_of_its_operands_formats() -> None:
    """Two operands with independent errors: sqrt(2) of the root mean square of one."""
    from megatron_xielu.mcore.fp8_emulation import EmulatedProduct

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 512, generator=generator)
    weight = torch.randn(384, 512, generator=generator)
    exact = x.double() @ weight.double().T
    for recipe in ("tensorwise", "blockwise"):
        y = EmulatedProduct(settings(recipe))(x, weight, None)
        found = float((y.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        want = math.sqrt(2) * RMS * E4M3_HALF_STEP
        print(f"{recipe}: relative error {found:.4f}, expected {want:.4f}")
        # normal numbers are not quite log-uniform
        assert abs(found / want - 1) < 0.1


def off_is_as_if_it_were_not_there() -> None:
    from megatron_xielu.mcore.fp8_emulation import install, take_statistics

    model = build(config())
    plain = logits_and_grads(model)
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert install(model, settings("off")) is model
    assert torch.equal(logits_and_grads(model), plain)
    assert all(map(torch.equal, grads, (p.grad for p in model.parameters())))
    assert take_statistics(model) == {}


def four_products_of_each_layer_are_emulated() -> None:
    from megatron_xielu.mcore.fp8_emulation import install, take_statistics

    for fc2_input, products in (("fp8", 4), ("bf16", 3)):
        model = build(config())
        keys = list(model.state_dict())
        plain = logits_and_grads(model)
        install(model, settings("tensorwise", fc2_input=fc2_input))
        assert not torch.equal(logits_and_grads(model), plain)
        found = take_statistics(model)
        names = ["self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1"]
        names += ["mlp.linear_fc2"] * (products == 4)
        assert list(found) == [
            f"decoder.layers.{layer}.{name}.{kind}"
            for layer in range(3)
            for name in names
            for kind in ("input", "weight", "grad_output")
        ]
        assert all(statistics.elements > 0 for statistics in found.values())
        assert all(statistics.elements == 0 for statistics in take_statistics(model).values())
        assert list(model.state_dict()) == keys


def what_cannot_be_emulated_is_refused() -> None:
    from megatron_xielu.mcore.fp8_emulation import install

    with pytest.raises(UserError, match="--transformer-impl local"):
        install(nn.Linear(2, 2), settings("delayed"))
    model = build(config())
    model.decoder.layers[1].mlp.linear_fc1.gradient_accumulation_fusion = True
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.linear_fc1 adds .*-fusion"):
        install(model, settings("delayed"))


def tensor_parallelism_is_refused() -> None:
    from megatron_xielu.mcore.fp8_emulation import install

    model = build(config(tensor_model_parallel_size=2))
    with pytest.raises(UserError, match=r"into 2 parts .*tensor_model_parallel_size=1"):
        install(model, settings("blockwise"))


def delayed_scales_follow_the_steps_of_a_layer() -> None:
    """Inputs of 4, 2 and 1 with a history of 2; gradients in e5m2; an evaluation between."""
    from megatron_xielu.mcore.fp8_emulation import EmulatedProduct

    product = EmulatedProduct(settings("delayed", amax_history_len=2))
    weight = torch.full((2, 2), 0.5, requires_grad=True)
    scales = {name: operand.delayed for name, operand in product.operands.items()}
    assert [scale.scale.item() for scale in scales.values()] == [1, 1, 1]

    def step(size: float) -> tuple[float, ...]:
        y = product(torch.full((2, 2), size), weight, None)
        y.backward(torch.full((2, 2), size))
        return tuple(scale.scale.item() for scale in scales.values())

    assert step(4.0) == (448 / 4, 448 / 0.5, 57344 / 4)
    assert step(2.0) == (448 / 4, 448 / 0.5, 57344 / 4)
    assert step(1.0) == (448 / 2, 448 / 0.5, 57344 / 2)
    with torch.no_grad():
        product(torch.full((2, 2), 8.0), weight, None)
    # nothing moved, but the next step's amax is already 8
    assert scales["input"].scale.item() == 448 / 2
    assert step(1.0) == (448 / 8, 448 / 0.5, 57344 / 1)


def statistics_count_what_was_lost() -> None:
    from megatron_xielu.mcore.fp8_emulation import Operand, Statistics

    # 464 lies half way to the value that would come next, the smallest number is 2^-9
    x = torch.tensor([[0.0, 448, 464, 465, -9000, math.nan, 2**-10, -(2**-9), 2**-11]])
    delayed = Operand(settings("delayed"), "input")
    delayed(x, training=False)
    assert delayed.statistics == Statistics()
    delayed(x, training=True)
    # 2^-10 is a tie, which goes to zero
    assert delayed.statistics == Statistics(amax=9000.0, elements=9, saturated=2, flushed=2)
    delayed(x[:, :2], training=True)
    # the scale is 448 / 9000 now
    assert delayed.statistics == Statistics(amax=9000.0, elements=11, saturated=2, flushed=2)
    assert delayed.statistics.saturated_share == 2 / 11
    gradients = Operand(settings("delayed"), "grad_output")
    gradients(torch.tensor([[61440.0, 61441, 1e30, 1e-9]]), training=True)
    assert (gradients.statistics.saturated, gradients.statistics.flushed) == (2, 1)
    current = Operand(settings("tensorwise"), "input")
    current(torch.tensor([[1e6, 1.0]]), training=True)
    assert current.statistics == Statistics(amax=1e6, elements=2, flushed=1)
    current(torch.tensor([[math.inf, 1.0]]), training=True)
    assert current.statistics == Statistics(amax=math.inf, elements=4, saturated=1, flushed=1)
    blocks = Operand(settings("blockwise"), "input")
    far = torch.zeros(1, 256)
    far[0, 0], far[0, 1], far[0, 255] = 1e6, 1.0, 1.0
    blocks(far, training=True)
    # the 1 in the other block has a scale of its own
    assert blocks.statistics == Statistics(amax=1e6, elements=256, flushed=1)


def each_recipe_learns_as_bf16_does() -> None:
    """20 steps: what the loss falls by may differ by the relative error of an update, if at all.

    Each product adds the errors of two operands; a layer has 4 forward and 4 backward on the way of
    a gradient. Taken as independent, and each as if all of the signal passed through it, they add
    up to rho in the root mean square, relative to the gradient. To first order an update is off by
    that share, and so is what the loss falls by.
    """
    from megatron_xielu.mcore.fp8_emulation import FP8Settings
    from megatron_xielu.mcore.one_rank import Run, Sizes, Training

    # each token follows from the one before it, three times out of four
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 64, 20_000)
    for index in np.flatnonzero(generator.random(len(tokens) - 1) < 0.75):
        tokens[index + 1] = (5 * tokens[index] + 1) % 64
    # warm-up has to be shorter than the whole
    run = Run(steps=21, sizes=Sizes(num_layers=2))
    losses = {}
    for recipe in get_args(FP8Settings.__annotations__["recipe"]) or ("off", *RECIPES):
        training = Training(replace(run, fp8=settings(recipe)), vocab_size=64)
        losses[recipe] = [step.loss for step in training.steps(tokens)][:20]
    plain = losses.pop("off")
    fall = plain[0] - plain[-1]
    print(f"bf16: {plain[0]:.4f} to {plain[-1]:.4f}")
    assert fall > 0.5
    for recipe, found in losses.items():
        backward = E4M3_HALF_STEP if recipe == "blockwise" else E5M2_HALF_STEP
        squares = 4 * 2 * E4M3_HALF_STEP**2 + 4 * (E4M3_HALF_STEP**2 + backward**2)
        rho = RMS * math.sqrt(run.sizes.num_layers * squares)
        worst = max(abs(a - b) for a, b in zip(found, plain, strict=True))
        print(f"{recipe}: {found[-1]:.4f}, differs by {worst:.4f} <= {rho:.3f} * {fall:.3f}")
        assert 0 < worst <= rho * fall
        assert found[-1] < found[0] - fall / 2
