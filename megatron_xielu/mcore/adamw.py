"""AdamW with the state layout that Megatron's distributed optimizer saves and loads.

Megatron's distributed checkpoints assume the fused Adam of TransformerEngine or Apex, which counts
steps in the parameter group. With torch's AdamW, which counts them per parameter, Megatron-Core
0.19.2 cannot load the distributed checkpoint it has just saved. This class keeps the first layout
and leaves the arithmetic to torch's fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101); state: `exp_avg`, `exp_avg_sq` per parameter, `step` per group.

    Args:
        adam_w_mode: Megatron passes True for decoupled weight decay, the only mode here.
        capturable: Megatron's switch for optimizer CUDA graphs, which this optimizer has none of.

    Raises:
        ValueError: for adam_w_mode=False or capturable=True.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode:
            raise ValueError(
                "plain Adam (--no-decoupled-weight-decay) needs TransformerEngine or Apex; "
                "leave the flag out for AdamW"
            )
        if capturable:
            raise ValueError("--optimizer-cuda-graph needs TransformerEngine or Apex")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "Megatron computes the loss itself"
        for group in self.param_groups:
            # an empty group counts as well: Megatron expects one step number for all groups
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            states = [self._state_of(param) for param in params]
            adamw(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                # torch adds one to each of these before it uses them
                [torch.full((), group["step"] - 1.0, device=param.device) for param in params],
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state
