"""Stops a run whose numbers are wrong: copies that differ, a loss or gradient that is not finite.

Every decision is taken by all ranks together, so that none is left waiting for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import megatron.training.training
from megatron.training.global_vars import get_args
from torch import nn

from megatron_xielu.errors import UnhealthyRun
from megatron_xielu.mcore import diagnosis, patches
from megatron_xielu.mcore.nonfinite import LossWatch, OptimizerGuard
from megatron_xielu.mcore.observer import LOSS, Observer
from megatron_xielu.mcore.replicas import Difference, copies, differences

_SHOWN = 5


@dataclass(frozen=True)
class HealthSettings:
    """What is checked and what follows; the recipe's `health` section."""

    every: int = 100
    """Steps between comparisons of copies; 0 for none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped."""


class Health:
    """Wraps Megatron's training step and what follows it.

    Args:
        observer: told of skipped steps.
    """

    def __init__(self, settings: HealthSettings, observer: Observer) -> None:
        self.settings = settings
        self.observer = observer
        self._guard: OptimizerGuard | None = None
        self._skipped_in_a_row = 0
        self._last_equal: int | None = None

    def attach(self) -> None:
        """Wrap the functions of the training loop that this needs."""
        patches.wrap_training("train_step", self._around_train_step)
        patches.wrap_training("post_training_step_callbacks", self._around_callbacks)
        patches.tolerate_repeated_hook_switches()

    def _around_train_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        def watched(
            forward_step: Any, data: Any, model: Any, optimizer: Any, scheduler: Any, config: Any,
            forward_backward: Any, iteration: int, **groups: Any,
        ) -> Any:  # fmt: skip
            if self._guard is None or self._guard.optimizer is not optimizer:
                self._guard = OptimizerGuard(optimizer, model)
            guard, losses = self._guard, LossWatch(forward_step)
            guard.refused = False
            watch = self.observer.watch
            if watch is not None:
                watch.before(model, iteration + 1)
            result = train_step(
                losses, data, model, optimizer, scheduler, config, forward_backward,
                iteration=iteration, **groups,
            )  # fmt: skip
            if guard.refused:
                found = diagnosis.find(
                    losses, guard, forward_step, data, model, config, forward_backward, **groups
                )
                self._refused(iteration + 1, result[0], found)
            else:
                self._skipped_in_a_row = 0
            if watch is not None:
                watch.after(model, iteration + 1, taken=not guard.refused)
            return result

        return watched

    def _refused(self, step: int, loss_dict: Any, found: diagnosis.Diagnosis) -> None:
        self._skipped_in_a_row += 1
        assert self._guard is not None
        loss = float(loss_dict[LOSS]) if LOSS in loss_dict else None
        loss = diagnosis.from_last_rank(loss)
        numbers = f"loss {loss:.4g}, " if loss is not None else ""
        numbers += f"gradient norm {self._guard.norm:.4g}"
        skip = self.settings.on_nonfinite == "skip"
        used_up = self._skipped_in_a_row > self.settings.max_skipped_steps
        if not skip or used_up or found.weights:
            how = "the optimizer did not take this step, and it is not saved"
            raise UnhealthyRun(
                f"step {step}: {numbers}; {how}\n{found}\n"
                + _remedy(found, skip=skip, used_up=used_up, limit=self.settings.max_skipped_steps)
            )
        self.observer.skipped(step, loss, self._guard.norm, found.summary)

    def _around_callbacks(self, callbacks: Callable[..., Any]) -> Callable[..., Any]:
        def checked(model: Any, optimizer: Any, scheduler: Any, iteration: int, *rest: Any) -> Any:
            result = callbacks(model, optimizer, scheduler, iteration, *rest)
            if self._is_due(iteration):
                self._compare(model, optimizer, iteration)
            return result

        return checked

    def _is_due(self, iteration: int) -> bool:
        args = get_args()
        # FSDP's parameters are shards, of which there are no copies
        if not self.settings.every or args.use_megatron_fsdp or args.use_torch_fsdp2:
            return False
        # what is saved has been compared just before
        saves = args.save_interval and iteration % args.save_interval == 0
        return iteration % self.settings.every == 0 or saves or iteration == args.train_iters

    def _compare(self, model: Sequence[nn.Module], optimizer: Any, iteration: int) -> None:
        training = megatron.training.training
        # with overlapped gathers this rank's copy is only complete in the next forward pass
        gathers_late = training.should_disable_forward_pre_hook(get_args()) and any(
            chunk.remove_forward_pre_hook_handles for chunk in model
        )
        if gathers_late:
            training.disable_forward_pre_hook(model, optimizer=optimizer)
        found = differences(copies(model))
        if gathers_late:
            training.enable_forward_pre_hook(model)
        if found:
            raise UnhealthyRun(_describe(found, iteration, self._last_equal))
        self._last_equal = iteration


def _describe(found: Sequence[Difference], step: int, last_equal: int | None) -> str:
    lines = [f"  {difference}" for difference in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"  and {len(found) - _SHOWN} more")
    if last_equal is None:
        since = "this is the first comparison since the start"
    else:
        since = f"at step {last_equal} all were equal"
    return "\n".join(
        [
            f"step {step}: parameters that must be the same on several ranks are not; {since}. "
            "This step is not saved.",
            *lines,
            "A single parameter of one rank points to that machine's memory: take it out. The same "
            "parameter of many layers points to a gradient that is not summed over the ranks, or "
            "to a library that computes differently on them. Then go on from a checkpoint; "
            "health.every=1 finds the first step at which it happens.",
        ]
    )


def _remedy(found: diagnosis.Diagnosis, *, skip: bool, used_up: bool, limit: int) -> str:
    if found.weights:
        return (
            "Weights that are not finite stay so whatever the data: go on from a checkpoint of "
            "before they were, with a lower optimizer.lr."
        )
    if skip and used_up:
        return (
            f"More than {limit} steps in a row (health.max_skipped_steps) could not be taken, so "
            "it is not the data: go on from a checkpoint with a lower optimizer.lr."
        )
    if found.is_transient:
        return (
            "Go on from the checkpoint; if it happens again on the same machine, take it out. "
            "health.on_nonfinite=skip leaves such steps out by itself."
        )
    return (
        "The same command meets the same data again. health.on_nonfinite=skip leaves the step out; "
        "if it comes again and again, lower optimizer.lr or go back to an earlier checkpoint."
    )
