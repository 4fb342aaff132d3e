"""Stopping early: all ranks agree on it, between two steps or in the middle of an evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training.dist_signal_handler import all_gather_item
from megatron.training.global_vars import get_timers
from torch import nn

from megatron_xielu.mcore import patches
from megatron_xielu.signals import StopSignals


class EvaluationStopped(Exception):
    """Leaves Megatron's evaluation on all ranks at once."""


class Preemption:
    """Takes the place of Megatron's signal handler, which its loop asks after every step.

    A signal that came before Megatron listens counts, whichever rank got it. What is measured here
    says how long a stop can take: the longest time between two questions, and the longest save.

    Args:
        signals: what this process was sent.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self.longest_wait = 0.0
        """Seconds of the longest step or evaluation batch since `start_clock`."""
        self.longest_save = 0.0
        """Seconds of the longest save; 0 before the first."""
        self.longest_publication = 0.0
        """Seconds from the begin of a save until it counted; longer than it where it is async."""
        self._asked_at: float | None = None
        self._last_poll = time.monotonic()

    def attach(self) -> None:
        """Have Megatron's loop, and its evaluation, ask this object."""
        patches.use_signal_handler(self, self.signals.listen)
        patches.before_each_evaluation_batch(self._leave_evaluation)

    @property
    def agreed(self) -> bool:
        """Whether the ranks have agreed to stop; it needs no other rank to know."""
        return self._asked_at is not None

    def seconds_since_signal(self) -> float | None:
        """On the clock of whichever rank got the first signal; None without one."""
        return None if self._asked_at is None else time.monotonic() - self._asked_at

    def bound(self) -> float:
        """Seconds from a signal to a saved checkpoint at most, by what was seen so far."""
        return self.longest_wait + max(self.longest_save, self.longest_publication)

    def signals_received(self) -> list[bool]:
        """For each rank whether it was sent a signal. A collective: every rank must call it."""
        since = self.signals.seconds_since()
        of_ranks = all_gather_item(-1.0 if since is None else since, dtype=torch.float32)
        now = time.monotonic()
        self.longest_wait = max(self.longest_wait, now - self._last_poll)
        self._last_poll = now
        if self._asked_at is None and max(of_ranks) >= 0:
            self._asked_at = now - max(of_ranks)
        return [seconds >= 0 for seconds in of_ranks]

    def exit_if_asked(self) -> None:
        """End the process in Megatron's way, with code 0 and nothing saved. A collective."""
        if any(self.signals_received()):
            raise SystemExit(0)

    def start_clock(self) -> None:
        """Training begins: what came before says nothing about a later stop."""
        self.longest_wait = 0.0
        self._last_poll = time.monotonic()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure a save, which is no part of the wait."""
        begin = time.monotonic()
        yield
        seconds = time.monotonic() - begin
        self.longest_save = max(self.longest_save, seconds)
        self._last_poll += seconds

    def evaluate(
        self,
        evaluate: Callable[..., Any],
        forward_step: Any,
        data: Any,
        model: Sequence[nn.Module],
        process_non_loss: Any,
        config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Megatron's `evaluate`; a stop makes it end as it does when its time limit is over."""
        mode = get_rerun_state_machine().get_mode()
        try:
            return evaluate(forward_step, data, model, process_non_loss, config, *args, **kwargs)
        except EvaluationStopped:
            # what the rest of the function would have done
            for chunk in model:
                chunk.train()
            get_rerun_state_machine().set_mode(mode)
            config.timers = get_timers()
            get_timers()("evaluate").stop()
            return None, None, True

    def _leave_evaluation(self) -> None:
        if any(self.signals_received()):
            raise EvaluationStopped
