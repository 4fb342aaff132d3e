"""The state of FP8 delayed scaling in checkpoints: of fused operations too, and as numbers.

TransformerEngine keeps the amax history of its modules in `_extra_state` as a pickle, which it
refuses to load by itself, and Megatron saves none of the operations of its fused MLP. Here every
module's state is a safetensors file in the same place, and a fused MLP's linears hold the state of
the operations that work for them, so that checkpoints go from fused MLPs to plain ones and back.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_recipe
from torch import Tensor
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.quantization import (
    DelayedScalingRecipeState,
    FP8GlobalStateManager,
)

from megatron_xielu.errors import UserError
from megatron_xielu.mcore import patches

_OPERATION = "_megatron_xielu_operation"
# TransformerEngine's names for what its modules and operations keep of forward and backward
_MODES = {"scaling_fwd": "forward", "scaling_bwd": "backward"}
# of a module with one GEMM: input, weight and output; their gradients but the weight's
_PLACES = {"scaling_fwd": 3, "scaling_bwd": 2}
_PICKLE = 0x80


def save_as_numbers(*, needed: bool = True) -> None:
    """Let TransformerEngine's modules put delayed scaling into checkpoints without a pickle.

    Args:
        needed: the run has delayed scaling, and not only a checkpoint that may have it.

    Raises:
        UserError: it is needed and safetensors is not installed.
    """
    if needed and importlib.util.find_spec("safetensors") is None:
        raise UserError(
            "checkpoints hold the state of FP8 delayed scaling by safetensors, which is not "
            "installed: pip install safetensors"
        )
    patches.wrap(TransformerEngineBaseModule, "get_extra_state", _around_get)
    patches.wrap(TransformerEngineBaseModule, "set_extra_state", _around_set)


def forget_models() -> None:
    """Leave the histories of the models that were made so far alone from now on.

    TransformerEngine updates all that it knows of at the end of each forward pass, of models that
    train no more as well.
    """
    FP8GlobalStateManager.reset()


def belongs_to(operation: Any, linear: Any) -> None:
    """From now on an operation computes what a linear module stands for.

    The operation goes on with what was loaded into the module; the module saves what the operation
    has.
    """
    # no submodule, so not by setattr
    linear.__dict__[_OPERATION] = operation
    states = _states(linear.fp8_meta)
    if not states:
        return
    operation.reset_recipe_state(recipe=next(iter(states.values())).recipe)
    if operation._fp8_metas is None:
        # it computes in bf16
        return
    for key, mode in _MODES.items():
        _fill(operation._fp8_metas[mode][key], states[key].scale, states[key].amax_history)


def _around_get(get: Callable[..., Any]) -> Callable[..., Any]:
    def got(module: Any) -> Any:
        states = _states(module.fp8_meta)
        operation = module.__dict__.get(_OPERATION)
        if operation is not None and operation._fp8_metas is not None:
            states = _states(
                {key: (operation._fp8_metas[mode] or {}).get(key) for key, mode in _MODES.items()}
            )
        if not states:
            return get(module)
        from safetensors.torch import save

        tensors = {}
        for key, state in states.items():
            missing = _PLACES[key] - len(state.scale)
            tensors[f"{key}.scale"] = F.pad(state.scale.cpu(), (0, max(0, missing)), value=1.0)
            tensors[f"{key}.amax_history"] = F.pad(state.amax_history.cpu(), (0, max(0, missing)))
        return torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)

    return got


def _around_set(set_state: Callable[..., Any]) -> Callable[..., Any]:
    def taken(module: Any, state: Any) -> None:
        if not isinstance(state, Tensor) or not state.numel() or int(state[0]) == _PICKLE:
            set_state(module, state)
            return
        recipe = get_fp8_recipe(module.config) if module.config.fp8 else None
        if recipe is None or not recipe.delayed():
            # a run that goes on in bf16 or with another recipe
            return
        from safetensors.torch import load

        tensors = load(state.cpu().numpy().tobytes())
        gemms = len(tensors["scaling_fwd.scale"]) // _PLACES["scaling_fwd"]
        # otherwise the first forward's to say
        module.fp8_meta.setdefault("num_gemms", gemms)
        module.init_fp8_meta_tensors(recipe)
        for key, found in _states(module.fp8_meta).items():
            _fill(found, tensors[f"{key}.scale"], tensors[f"{key}.amax_history"])
        if (operation := module.__dict__.get(_OPERATION)) is not None:
            belongs_to(operation, module)

    return taken


def _states(metas: Any) -> dict[str, DelayedScalingRecipeState]:
    return {
        key: metas[key] for key in _MODES if isinstance(metas.get(key), DelayedScalingRecipeState)
    }


def _fill(state: DelayedScalingRecipeState, scale: Tensor, history: Tensor) -> None:
    """Take over values in place, which quantizers and the reduction over ranks point into.

    A module has places for its output and its input's gradient, the last ones, which an operation
    has not. A history of another length keeps its newest entries.
    """
    tensors = min(len(state.scale), len(scale))
    steps = min(len(state.amax_history), len(history))
    state.scale[:tensors].copy_(scale[:tensors])
    # row 0 is the current step's, the last row the newest of the others
    state.amax_history[0, :tensors].copy_(history[0, :tensors])
    if steps > 1:
        state.amax_history[1 - steps :, :tensors].copy_(history[1 - steps :, :tensors])
