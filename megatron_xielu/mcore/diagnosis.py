"""What all ranks together know about a step that was not finite, in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_xielu.mcore import nonfinite
from megatron_xielu.mcore.nonfinite import LossWatch, OptimizerGuard
from megatron_xielu.mcore.replay import Probe, Sighting, replay, why_impossible

_SHOWN = 4


@dataclass(frozen=True)
class _Known:
    """What one rank knows."""

    loss_finite: bool
    weights: list[str]
    """Places of parameters that are not finite."""
    gradients: list[str]
    """Places of gradients that were not finite in the step itself."""
    again: list[str]
    """The same in the replay."""
    forward: Sighting | None
    backward: Sighting | None


@dataclass(frozen=True)
class Diagnosis:
    """Where a step stopped being finite; the same on every rank.

    Attributes:
        summary: one line.
        weights: places of parameters that are not finite themselves.
        is_transient: the same data gave finite numbers when it was computed again.
    """

    summary: str
    details: tuple[str, ...]
    weights: tuple[str, ...]
    is_transient: bool

    def __str__(self) -> str:
        return "\n".join((self.summary, *self.details))


def find(
    losses: LossWatch,
    guard: OptimizerGuard,
    forward_step: Callable[..., Any],
    data: Any,
    model: Sequence[nn.Module],
    config: Any,
    forward_backward: Callable[..., Any],
    **groups: Any,
) -> Diagnosis:
    """Compute the refused step again and say where it stops being finite.

    All ranks must call it, with what they gave to Megatron's train_step.
    """
    obstacle = why_impossible()
    probe = Probe(model)
    again: list[str] = []
    if obstacle is None:
        step = (LossWatch(forward_step), data, model, guard.optimizer, config, forward_backward)
        probe = replay(*step, **groups)
        again = nonfinite.spoiled_gradients(model)
    weights = nonfinite.spoiled_weights(model)
    known = _Known(
        losses.all_finite(), weights, guard.spoiled, again, probe.forward, probe.backward
    )
    gathered: list[_Known | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, known)
    return _conclude([one for one in gathered if one is not None], obstacle)


def from_last_rank(loss: float | None) -> float | None:
    """The last rank's value, on all ranks; the last pipeline stage alone has the loss."""
    box = [loss]
    torch.distributed.broadcast_object_list(box, src=torch.distributed.get_world_size() - 1)
    return box[0]


def _conclude(ranks: Sequence[_Known], obstacle: str | None) -> Diagnosis:
    weights = _union(known.weights for known in ranks)
    gradients = _union(known.gradients for known in ranks)
    again = _union(known.again for known in ranks)
    forward = min((known.forward for known in ranks if known.forward), default=None)
    backward = min((known.backward for known in ranks if known.backward), default=None)
    bad_losses = [rank for rank, known in enumerate(ranks) if not known.loss_finite]
    is_transient = False
    if forward:
        summary = f"first not finite: {forward}"
    elif backward:
        summary = f"forward is finite; first not finite in backward: {backward}"
    elif again:
        summary = f"first not finite: the gradient of {again[-1]}"
    elif obstacle:
        summary = f"the layer is not known, because {obstacle}"
    elif not gradients:
        summary = "every gradient is finite, but they are so large that their norm is not"
    else:
        summary = "computed again, the same data gives finite numbers: suspect the hardware"
        is_transient = True
    details = []
    if weights:
        details.append(f"weights that are not finite: {_some(weights)}")
    if is_transient or obstacle:
        details.append(f"gradients that were not finite, nearest to the loss: {_some(gradients)}")
        if bad_losses:
            named = ", ".join(map(str, bad_losses[:16]))
            details.append(f"the loss was not finite on ranks: {named}")
    return Diagnosis(summary, tuple(details), tuple(weights), is_transient)


def _union(lists: Any) -> list[str]:
    """Each place once, in order of ranks, which is that of pipeline stages."""
    return list(dict.fromkeys(name for names in lists for name in names))


def _some(places: Sequence[str]) -> str:
    """The last ones: what is behind them got its gradient from them."""
    shown = "; ".join(reversed(places[-_SHOWN:])) or "none"
    return shown if len(places) <= _SHOWN else f"{shown}; and {len(places) - _SHOWN} more"
