"""A step whose loss or gradient is not finite: not taken, and traced to the layer it began in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer
from megatron.training import get_args
from torch import Tensor, nn

from megatron_xielu.mcore.places import parameters


class OptimizerGuard:
    """Keeps an optimizer from a step whose gradient norm is not finite.

    The norm is the one that Megatron computes for clipping in any case: it is reduced over all
    ranks that share the model, so that they decide alike. The refused step counts as skipped in
    Megatron's loop: neither weights nor Adam's moments nor the learning rate schedule move.

    Args:
        optimizer: what Megatron built; its norm and its step are wrapped on this one object.
    """

    def __init__(self, optimizer: Any, model: Sequence[nn.Module]) -> None:
        if type(optimizer).step is not ChainedOptimizer.step:
            # Megatron-FSDP's and emerging optimizers, which only the user's own flags can choose
            name = type(optimizer).__name__
            print(f"{name} has a step of its own: it is not guarded against nan", flush=True)
        self.optimizer = optimizer
        self.refused = False
        self.norm = 0.0
        self.spoiled: list[str] = []
        """Places of the parameters whose gradient was not finite, in forward order."""
        self._model = model
        self._compute_norm: Callable[[], Any] = optimizer.get_grad_norm
        self._take_step: Callable[[], bool] = optimizer.step_with_ready_grads
        optimizer.get_grad_norm = self._checked_norm
        optimizer.step_with_ready_grads = self._guarded_step

    def _checked_norm(self) -> Any:
        norm = self._compute_norm()
        self.norm = float(norm)
        self.refused = _anywhere(not math.isfinite(self.norm))
        if self.refused:
            # now, because clipping by such a norm changes the gradients
            self.spoiled = spoiled_gradients(self._model)
        return norm

    def _guarded_step(self) -> bool:
        return False if self.refused else self._take_step()


class LossWatch:
    """Makes a loss that is not finite spoil the gradients, for which the ranks have a check.

    The gradient of a sum does not depend on its terms, so that a loss of nan or inf alone could go
    unseen. Here it is multiplied by 1, or by nan: a good step keeps its bits, and no rank has to
    ask another one. The losses of a step stay on the device until someone asks.
    """

    def __init__(self, forward_step: Callable[..., Any]) -> None:
        self._forward_step = forward_step
        self._finite: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Megatron's forward step; see `mcore.pretrain.forward_step`."""
        output, loss_function = self._forward_step(*args, **kwargs)

        def watched(*given: Any, **options: Any) -> Any:
            result = loss_function(*given, **options)
            if not isinstance(result, tuple):
                return result
            loss, *rest = result
            finite = torch.isfinite(loss.detach())
            self._finite.append(finite)
            return loss * torch.where(finite, 1.0, torch.nan).to(loss.dtype), *rest

        return output, watched

    def all_finite(self) -> bool:
        """Whether every loss that this rank computed is finite; true where none is computed."""
        return not self._finite or bool(torch.stack(self._finite).all())


def _anywhere(refused: bool) -> bool:
    """Whether any rank refuses; asked only where the norm is of one of several model copies."""
    copies = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    if get_args().use_distributed_optimizer or copies == 1:
        return refused
    flag = torch.tensor([refused], dtype=torch.int, device="cuda")
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor's elements are; waits for the device."""
    return bool(torch.isfinite(tensor).all())


def spoiled_gradients(model: Sequence[nn.Module]) -> list[str]:
    """Places of this rank's parameters whose gradient is not finite, in forward order."""
    return [
        name
        for name, parameter in parameters(model)
        if (gradient := getattr(parameter, "main_grad", parameter.grad)) is not None
        and not is_finite(gradient)
    ]


def spoiled_weights(model: Sequence[nn.Module]) -> list[str]:
    """Places of this rank's parameters that are not finite themselves."""
    return [name for name, parameter in parameters(model) if not is_finite(parameter.detach())]
