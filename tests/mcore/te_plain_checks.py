"""xIELU between TransformerEngine's plain modules, on a CPU (TRITON_INTERPRET=1).

Megatron's MLP, TransformerEngine's linears, recipes, quantizers and tensors run. Stood in for is
what `te_checks` names, and the question whether a linear's input is on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_xielu.ops.family import XIELU
from megatron_xielu.ops.fp8_reference import Delayed, amax_of
from megatron_xielu.ops.reference import REFERENCES
from megatron_xielu.ops.saved_input import pack, unpack
from megatron_xielu.ops.triton import quantized
from tests.mcore.te_checks import (
    BETA,
    EPS,
    FFN,
    HIDDEN,
    RECIPES,
    TOKENS,
    Gemm,
    Operand,
    by_oracle,
    check_against_oracle,
    check_summed,
    parts,
    recipe_with,
    scaling_by,
    stood_in,
)


class Plain:
    """Megatron's MLP over two `te.Linear`, with what passed between them.

    Args:
        name: of the recipe, or "none".
        options: of the recipe, other than TransformerEngine's defaults.
        ours: xIELU writes fc2's input; otherwise fc2's quantizer casts the same float32 values.
        settings: the placeholder's.

    A tensor-parallel rank has FFN columns, which are other ones on each.
    """

    def __init__(
        self, name: str, *, options: Any = None, ours: bool = True, **settings: Any
    ) -> None:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TERowParallelLinear,
        )
        from megatron.core.transformer.mlp import MLP, MLPSubmodules
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        from megatron_xielu.mcore.activation import XIELUPlaceholder, install
        from megatron_xielu.mcore.layer_specs import use_xielu
        from tests.mcore.checks import config

        ranks = torch.distributed.get_world_size()
        torch.manual_seed(1)
        # it would go on updating the scales of earlier ones
        FP8GlobalStateManager.reset()
        self.recipe, self.ours = recipe_with(name, **(options or {})), ours
        self.gemms: list[Gemm] = []
        self.cast: list[Any] = []
        half = {"bf16": True, "params_dtype": torch.bfloat16, "fp8": "hybrid"}
        transformer = config(
            transformer_impl="transformer_engine",
            hidden_size=HIDDEN,
            ffn_hidden_size=FFN * ranks,
            tensor_model_parallel_size=ranks,
            gradient_accumulation_fusion=False,
            **half,
        )
        use_xielu(transformer, XIELUPlaceholder(**settings))
        modules = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
        self.mlp = install(MLP(transformer, modules, input_size=HIDDEN))
        self.fc1, self.fc2 = self.mlp.linear_fc1, self.mlp.linear_fc2
        self.activation = self.mlp.activation_func
        assert (self.activation.quantized is None) == self.activation.recompute
        if not ours:
            self.activation.quantized = None
        own = [torch.randn(2, FFN, HIDDEN) for _ in range(ranks)][torch.distributed.get_rank()]
        with torch.no_grad():
            # so that xIELU's input covers both sides of zero
            self.fc1.weight.copy_(0.5 * own[0])
            self.fc2.weight.copy_(0.1 * own[1].T)
            self.activation.alpha_p.fill_(0.3)
            self.activation.alpha_n.fill_(-0.4)
        self.x = torch.randn(*TOKENS, HIDDEN).bfloat16().requires_grad_()
        self.grad_output = torch.randn(*TOKENS, HIDDEN).bfloat16()
        self.elements = TOKENS[0] * TOKENS[1] * FFN
        self.held = 0

    def run(self, *, backward: bool = True, enabled: bool = True) -> Tensor:
        """Forward, and backward unless it is an evaluation, afresh."""
        import transformer_engine.pytorch as te

        self.gemms.clear()
        self.cast.clear()
        self.mlp.zero_grad()
        self.x.grad = None
        enabled = enabled and self.recipe is not None
        saved: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.numel() == self.elements:
                saved[id(tensor)] = tensor
            return tensor

        with on_a_cpu(self), torch.set_grad_enabled(backward):
            with (
                te.autocast(enabled=enabled, recipe=self.recipe),
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            ):
                y, _ = self.mlp(self.x)
            self.held = sum(bytes_of(tensor) for tensor in saved.values())
            if backward:
                y.backward(self.grad_output)
        return y

    def cast_by(self, quantizer: Any, tensor: Tensor) -> Any:
        """What a quantizer that is called returns."""
        from megatron_xielu.mcore.te_quantizers import empty, rows

        if self.ours or quantizer is not self.quantizer(self.fc2, "input"):
            return by_oracle(self, quantizer, tensor)
        result, into = empty(quantizer, tensor)
        x, alphas = rows(self.gemms[0].result), (self.activation.alpha_p, self.activation.alpha_n)
        quantized.forward(XIELU, x, None, alphas, BETA, self.scaling(), into)
        return result

    def quantizer(self, linear: Any, operand: Operand) -> Any:
        """What one of both linears casts an operand with, None before its first forward pass."""
        mode, index = {
            "input": ("scaling_fwd", 0),
            "weight": ("scaling_fwd", 1),
            "grad_output": ("scaling_bwd", 0),
        }[operand]
        own = linear.quantizers[mode]
        return own[index] if own else None

    def by_fc2(self) -> int:
        """How often fc2 has cast its input itself."""
        own = self.quantizer(self.fc2, "input")
        return sum(quantizer is own for quantizer in self.cast)

    def alphas_exact(self) -> list[Tensor]:
        """The gradients of the alphas in float64, of this rank's columns alone."""
        x = unpack(pack(self.gemms[0].result, self.activation.saved_input), torch.bfloat16).double()
        alphas = [self.activation.alpha_p, self.activation.alpha_n]
        leaves = [alpha.detach().double().requires_grad_() for alpha in alphas]
        y = REFERENCES["xielu"](x, *leaves, BETA)
        # fc2 returns it in the layer's type
        grad_y = self.gemms[2].result.double().reshape(y.shape)
        return list(torch.autograd.grad(y, leaves, grad_y))

    def results(self) -> dict[str, Tensor]:
        """Gradients, and the state of delayed scaling."""
        named = {name: each.grad for name, each in self.mlp.named_parameters()}
        found = {**named, "x": self.x.grad, "y": self.gemms[1].result}
        for which in ("fc1", "fc2") if isinstance(self.scaling(), Delayed) else ():
            for key in ("scaling_fwd", "scaling_bwd"):
                state = getattr(self, which).fp8_meta[key]
                found[f"{which} {key} history"] = state.amax_history
                found[f"{which} {key} scale"] = state.scale
        return {name: each.clone() for name, each in found.items()}

    def scaling(self) -> Any:
        """Of fc2's input."""
        if self.recipe is None:
            return None
        return scaling_by(self.recipe, "input", self.quantizer(self.fc2, "input"))


def bytes_of(tensor: Any) -> int:
    """What a tensor holds: in FP8 of either copy, without the scales."""
    if not hasattr(tensor, "_fp8_dtype"):
        return int(tensor.nbytes)
    return sum(data.nbytes for data in parts(tensor)[:2] if data is not None)


@contextmanager
def on_a_cpu(plain: Plain) -> Iterator[None]:
    from transformer_engine.pytorch.module import base

    prepare = base.TransformerEngineBaseModule.prepare_forward

    def prepare_forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with patch.object(torch.Tensor, "is_cuda", True):
            prepared: Tensor = prepare(module, x, *args, **kwargs)
        return prepared

    kind = base.TransformerEngineBaseModule
    with stood_in(plain), patch.object(kind, "prepare_forward", prepare_forward):
        yield


def transformer_engine_plain_modules_take_fp8_from_xielu() -> dict[str, float]:
    """fc2's input byte by byte, and everything after it as if fc2 had cast the same itself."""
    counts: dict[str, float] = {}
    for name in RECIPES:
        results = []
        for ours in (True, False):
            plain = Plain(name, ours=ours)
            plain.run()
            # a second time with the scales that the first one's amaxes have set
            scaling = plain.scaling()
            if isinstance(scaling, Delayed):
                assert scaling.scale.ne(1).all()
                scaling = Delayed(scaling.scale.clone(), scaling.dtype)
            plain.run()
            # x and the gradients of both outputs; the weights are those of the first micro-batch
            assert (plain.by_fc2(), len(plain.cast)) == ((0, 3) if ours else (1, 4))
            results.append(plain.results())
            if ours:
                exact, off = check_fc2_input(name, plain, scaling)
                counts[f"{name}: bytes within round-off of a tie, of {2 * exact.numel()}"] = off
                held = counts[f"{name}: bytes held per element"] = plain.held / plain.elements
                # the input of xIELU in bf16, and its output transposed in FP8
                assert held == 3
                kept, *_ = plain.gemms[3].a[1]
                assert kept is None, "fc2 still holds the rowwise data in backward"
                if isinstance(scaling, Delayed):
                    history = plain.fc2.fp8_meta["scaling_fwd"].amax_history[-1, 0].double()
                    torch.testing.assert_close(history, amax_of(exact)[0], rtol=8 * EPS, atol=0)
        one, other = results
        assert one.keys() == other.keys()
        assert all(grad is not None for grad in one.values())
        assert not [key for key in one if not torch.equal(one[key], other[key])]
    return counts


def check_fc2_input(title: str, plain: Plain, scaling: Any) -> tuple[Tensor, int]:
    """What fc2 read, byte by byte; xIELU's output in float64, and how many bytes are near a tie."""
    assert [gemm.layout for gemm in plain.gemms] == ["TN", "TN", "NN", "NT", "NN", "NT"]
    x, y = plain.gemms[0].result, plain.gemms[1].b
    alphas = [plain.activation.alpha_p, plain.activation.alpha_n]
    exact = REFERENCES["xielu"](
        x.double().flatten(0, -2), *(alpha.detach().double() for alpha in alphas), BETA
    )
    row, _, scale, _ = y[1]
    assert row is not None
    # the transpose is what the weight's gradient was computed from
    kept = plain.gemms[3].a
    off = check_against_oracle(title, (y[0], [row, kept[1][1], scale, kept[1][3]]), exact, scaling)
    assert off <= 1e-3 * 2 * exact.numel()
    return exact, off


def transformer_engine_options_of_a_recipe_reach_plain_modules() -> dict[str, float]:
    """Powers of two, epsilon and the shape of blocks, of fc2's input."""
    from transformer_engine.common.recipe import QParams

    changes = {
        "tensorwise, powers of two": {"fp8_quant_fwd_inp": QParams(power_2_scale=True)},
        "tensorwise, epsilon": {"fp8_quant_fwd_inp": QParams(amax_epsilon=1e4)},
        "blockwise, any scale": {"fp8_quant_fwd_inp": QParams(amax_epsilon=12.0)},
        "blockwise, squares": {"x_block_scaling_dim": 2, "w_block_scaling_dim": 1},
    }
    counts = {}
    for title, options in changes.items():
        plain = Plain(title.partition(",")[0], options=options)
        plain.run()
        assert not plain.by_fc2()
        _, counts[title] = check_fc2_input(title, plain, plain.scaling())
    return counts


def transformer_engine_plain_modules_sum_alphas_over_tensor_parallel_ranks() -> None:
    """In bf16 and from fc2's input in FP8, which gets parts of one summed tensor as alphas."""
    for name, recompute in itertools.product(("none", *RECIPES), (False, True)):
        plain = Plain(name, recompute=recompute)
        assert plain.activation.sum_in_backward
        plain.run()
        written_by_us = name != "none" and not recompute
        assert (plain.by_fc2() == 0) == (name == "none" or written_by_us)
        alphas = plain.activation.alpha_p, plain.activation.alpha_n
        check_summed(f"{name}, recompute={recompute}", alphas, plain.alphas_exact())


def transformer_engine_plain_modules_hold_the_input_in_e4m3() -> dict[str, float]:
    held = {}
    for name in ("delayed", "tensorwise", "blockwise"):
        plain = Plain(name, saved_input="e4m3")
        exact = Plain(name)
        for each in (plain, exact):
            each.run()
        assert torch.equal(plain.gemms[1].result, exact.gemms[1].result)
        alphas = (plain.activation.alpha_p, plain.activation.alpha_n)
        for alpha, expected in zip(alphas, plain.alphas_exact(), strict=True):
            torch.testing.assert_close(alpha.grad.double(), expected, rtol=1e-5, atol=0)
        held[name] = plain.held / plain.elements
        assert held[name] == 2
    return held


def transformer_engine_plain_modules_get_bf16_where_fc2_must_cast() -> None:
    """Without FP8, with a backward in high precision, and inside recomputation."""
    from transformer_engine.common import recipe as recipes
    from transformer_engine.pytorch import distributed

    for name, enabled in (("none", True), ("delayed", False)):
        plain = Plain(name)
        plain.run(enabled=enabled)
        assert plain.gemms[1].b.dtype == torch.bfloat16
        assert not plain.cast
    plain = Plain("tensorwise")
    plain.recipe = recipes.Float8CurrentScaling(backward_override="high_precision")
    plain.run()
    assert plain.by_fc2() == 1
    plain = Plain("tensorwise")
    with distributed.activation_recompute_forward(activation_recompute=True):
        plain.run(backward=False)
    assert plain.by_fc2() == 1
    plain = Plain("tensorwise")
    plain.fc2.save_original_input = True
    plain.run()
    # fc2's own cast, of the input once more in backward
    assert plain.by_fc2() == 2


def transformer_engine_plain_modules_take_fp8_in_evaluation() -> None:
    """Without gradients, and with a frozen fc2: no transpose is written."""
    for name in RECIPES:
        plain = Plain(name)
        plain.run(backward=False)
        assert not plain.by_fc2()
        row, column, *_ = plain.gemms[1].b[1]
        assert (row is not None, column is None) == (True, True)
        plain = Plain(name)
        plain.fc2.weight.requires_grad_(False)
        plain.run()
        assert plain.gemms[1].b[1][1] is None
        assert plain.x.grad is not None
        assert plain.activation.alpha_p.grad is not None


def transformer_engine_plain_experts_keep_bf16() -> None:
    """The router's probabilities multiply what an expert's xIELU returns."""
    from megatron_xielu.mcore.activation import ParallelXIELU
    from tests.mcore.checks import build, config

    experts = {"num_moe_experts": 2, "moe_grouped_gemm": False, "moe_ffn_hidden_size": 96}
    model = build(
        config(
            transformer_impl="transformer_engine",
            moe_layer_freq=[0, 1, 1],
            bf16=True,
            params_dtype=torch.bfloat16,
            fp8="hybrid",
            **experts,
        )
    )
    found = {
        name: module.quantized is not None
        for name, module in model.named_modules()
        if isinstance(module, ParallelXIELU)
    }
    assert len(found) == 5
    assert [name for name, writes in found.items() if writes] == [
        "decoder.layers.0.mlp.activation_func"
    ]


def transformer_engine_plain_modules_cannot_leave_fp8() -> None:
    """A layer that the outlier watch took out of FP8 would silently be back in it."""
    from megatron_xielu.errors import UserError
    from megatron_xielu.mcore.fp8_watch import keep_in_bf16

    mlp = Plain("tensorwise").mlp
    with pytest.raises(UserError, match=r"fp8\.fused=true.*fp8_bf16_layers\.json"):
        keep_in_bf16(mlp)
    assert mlp.activation_func.fc2_input == "fp8"
