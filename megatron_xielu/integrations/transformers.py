"""The fused xIELU inside models of transformers: Apertus, or Arcee with hidden_act="xielu".

transformers itself stays as it is, and so do all other models in the process: the activation
modules of one model become instances of a subclass that differs in its forward alone. They keep
their parameters and buffers, and with them whatever refers to these: optimizers, sharding and
quantizing wrappers, hooks, checkpoints.
"""

from __future__ import annotations

import math
from typing import get_args

from torch import Tensor, nn
from transformers.activations import ACT2CLS, XIELUActivation

from megatron_xielu.ops import xielu
from megatron_xielu.ops.dispatch import Impl

# stock lets the exponential see at most eps = -1e-6; one this near to zero moves y by less than
# a_n * 1e-5, and only between eps and 0
LARGEST_EPS = 1e-5


class FusedXIELU(XIELUActivation):
    """transformers' module with the forward and backward of `megatron_xielu.xielu`.

    Attributes:
        impl: see `megatron_xielu.xielu`.
    """

    impl: Impl = "auto"

    def forward(self, input: Tensor) -> Tensor:
        """input: any shape, floating point; returns the same shape and dtype."""
        return xielu(input, self.alpha_p, self.alpha_n, beta=self._beta_scalar, impl=self.impl)

    def extra_repr(self) -> str:
        return f"beta={self._beta_scalar}, impl={self.impl}"


def use_fused_xielu[Model: nn.Module](model: Model, *, impl: Impl = "auto") -> Model:
    """Let a loaded model compute xIELU, forward and backward, with the kernels of this package.

    Parameters and buffers stay the same objects under the same names, so that what is saved
    afterwards loads in stock transformers. Outputs are equal within rounding. Their type is always
    the input's; stock lets the alphas' type widen it, which a float16 Arcee does not survive.

    `beta` is read from each module here, once. Call this again after loading weights with another
    beta; otherwise a second call changes nothing but `impl`.

    Args:
        model: any module that holds transformers' `XIELUActivation`, wherever it sits.
        impl: see `megatron_xielu.xielu`.

    Returns:
        The same model.

    Raises:
        TypeError: model is not a module.
        ValueError: model has no such activation, impl is unknown, or an activation cannot be
            replaced: its weights are not loaded yet, its beta or eps cannot be a trained model's,
            or something else has replaced its forward. The model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"use_fused_xielu takes a torch module, got {type(model).__name__}")
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r} is unknown; choose one of {', '.join(get_args(Impl))}")
    found = {
        name or "model": module
        for name, module in model.named_modules()
        if type(module) in (XIELUActivation, FusedXIELU)
    }
    if not found:
        raise ValueError(_nothing_to_replace(model))
    betas = {name: _check(name, module) for name, module in found.items()}
    for name, module in found.items():
        _replace(module, betas[name], impl)
    return model


def _replace(module: XIELUActivation, beta: float, impl: Impl) -> None:
    module.__class__ = FusedXIELU
    assert isinstance(module, FusedXIELU)
    module._beta_scalar, module.impl = beta, impl
    if "_old_forward" in vars(module):
        # accelerate's hooks, set by a device_map over several devices, call what they wrapped
        module._old_forward = FusedXIELU.forward.__get__(module)


def _check(name: str, module: XIELUActivation) -> float:
    """The module's beta, after refusing what would compute something else than stock."""
    if module.beta.is_meta or module.eps.is_meta:
        raise ValueError(
            f"{name} has no values yet (its buffers are on the meta device): load the weights, "
            "then call use_fused_xielu"
        )
    beta, eps = float(module.beta), float(module.eps)
    # transformers leaves buffers that a checkpoint lacks uninitialized
    if not 0 < beta < math.inf:
        raise ValueError(
            f"{name}.beta={beta} must be finite and > 0: it is the slope at zero, 0.5 in all "
            "published models. Does the checkpoint hold it?"
        )
    if not abs(eps) <= LARGEST_EPS:
        raise ValueError(
            f"{name}.eps={eps} must be within {LARGEST_EPS} of zero: the fused kernels do without "
            "this clamp, -1e-6 in all published models. Does the checkpoint hold it?"
        )
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        raise ValueError(
            f"{name}.forward has been replaced by {vars(module)['forward']!r}, which would go on "
            "computing stock's activation: call use_fused_xielu before that replacement"
        )
    return beta


def _nothing_to_replace(model: nn.Module) -> str:
    known = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
    found = sorted({type(module).__name__ for module in model.modules() if type(module) in known})
    return (
        f"{type(model).__name__} has no xIELU to replace: its activations are "
        f"{', '.join(found) or 'none of transformers'}. use_fused_xielu takes models with "
        "transformers' XIELUActivation: Apertus, or Arcee whose config has hidden_act='xielu'"
    )
