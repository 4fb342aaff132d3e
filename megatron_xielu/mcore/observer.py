"""What a run tells about itself: reads Megatron's training loop and hands plain numbers on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import megatron.training.training
import torch
from megatron.core import parallel_state
from megatron.training.global_vars import get_args, get_tensorboard_writer
from torch import nn

from megatron_xielu.mcore import patches
from megatron_xielu.mcore.activation import installed_activations
from megatron_xielu.mcore.datasets import Datasets
from megatron_xielu.mcore.preemption import Preemption
from megatron_xielu.mcore.tensorboard import outlive_full_disks

LOSS = "lm loss"


class Listener(Protocol):
    """Receives the numbers on the reporting rank, the last one, which has the loss."""

    def note(self, text: str) -> None:
        """Something about the run that its user may not expect; told on every rank."""

    def outliers(
        self, *, step: int, numbers: dict[str, list[float | None]], crossed: Sequence[str]
    ) -> None:
        """What FP8 did to xIELU in a step, by layer, and which thresholds were crossed where."""

    def begin(self, *, start_step: int, train_iters: int, tokens_per_step: int) -> None:
        """Everything is built and loaded; the numbers are Megatron's own, flags included."""

    def step(
        self,
        *,
        step: int,
        loss: float,
        grad_norm: float | None,
        lr: float,
        alpha_p: Sequence[float],
        alpha_n: Sequence[float],
        seconds_per_step: float,
    ) -> None:
        """Loss is the interval's mean; alphas are effective values of all layers in order, none
        where the activation is not xIELU."""

    def validation(self, *, step: int, loss: float) -> None:
        """Mean held-out loss in nats per token."""

    def saved(self, *, step: int, seconds: float) -> None:
        """`step` is saved whole; told on every rank."""

    def save_failed(self, *, step: int, problem: str) -> None:
        """`step` could not be saved, what was saved before is untouched; told on every rank."""

    def stop_needs(self, *, wait: float, save: float) -> None:
        """A checkpoint was saved in mid-run; a stop takes `wait` + `save` seconds at most so far.

        `wait` is the longest step or evaluation batch, `save` the longest save.
        """

    def stopped(self, *, trained: bool, seconds: float | None, bound: float) -> None:
        """The run ends before its end.

        Args:
            trained: whether this start got to training, and so has saved.
            seconds: since the signal; None if it was no signal that ended the run.
            bound: what `stop_needs` told, this save included.
        """

    def skipped(self, *, step: int, loss: float | None, grad_norm: float, where: str) -> None:
        """The step was not taken, because its loss or gradient was not finite."""


class StepWatch(Protocol):
    """Looks at training steps from before and after; all ranks call it alike."""

    def start(self, model: Sequence[nn.Module], step: int) -> None:
        """Everything is loaded and training begins after `step`."""

    def before(self, model: Sequence[nn.Module], step: int) -> None:
        """This step comes next."""

    def after(self, model: Sequence[nn.Module], step: int, *, taken: bool) -> None:
        """The step is done; `taken` by the optimizer, or left out."""


class Observer:
    """Wraps Megatron's logging and evaluation; its own output and TensorBoard scalars stay.

    Args:
        listener: called on the last rank alone, every `log_interval` steps and at evaluations.
        datasets: the run's dataset provider.
        preemption: is asked before the first step, leaves evaluations and times saves.
        evaluate_first: also evaluate before the first step of a new run.
        has_alphas: the model's activation is xIELU.
        watch: looks at what FP8 does, if it is there.
    """

    def __init__(
        self,
        listener: Listener,
        datasets: Datasets,
        preemption: Preemption,
        *,
        evaluate_first: bool,
        has_alphas: bool = True,
        watch: StepWatch | None = None,
    ) -> None:
        self.listener = listener
        self.datasets = datasets
        self.preemption = preemption
        self.trained = False
        """Whether training has begun."""
        self.step = 0
        """The last step that was taken or left out."""
        self.evaluate_first = evaluate_first
        self.has_alphas = has_alphas
        self.watch = watch
        self.model: Sequence[nn.Module] = ()
        self._losses: list[torch.Tensor] = []
        self._grad_norm: Any = None
        self._interval_start = 0.0
        self._valid_loss: float | None = None
        self._last_valid_step = -1
        self._last_step = 0
        self._valid_data: Any = None

    def attach(self) -> None:
        """Wrap the functions of the training loop that this needs."""
        patches.wrap_training("train", self._around_train)
        patches.wrap_training("training_log", self._around_training_log)
        patches.wrap_training("evaluate", self._around_evaluate)
        patches.wrap_training("evaluate_and_print_results", self._around_evaluate_and_print)
        patches.wrap_training("save_checkpoint_and_time", self._around_save)

    def skipped(self, step: int, loss: float | None, grad_norm: float, where: str) -> None:
        """Tell of a step that was not taken; every rank may call it."""
        if is_reporting_rank():
            self.listener.skipped(step=step, loss=loss, grad_norm=grad_norm, where=where)

    def _around_train(self, train: Callable[..., Any]) -> Callable[..., Any]:
        def observed(
            forward_step: Any, model: Any, optimizer: Any, scheduler: Any, train_data: Any,
            valid_data: Any, process_non_loss: Any, config: Any, *args: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            self.preemption.exit_if_asked()
            outlive_full_disks()
            self.model = model
            self._valid_data = valid_data
            run = get_args()
            self.step = self._last_step = run.iteration
            if is_reporting_rank():
                self.listener.begin(
                    start_step=run.iteration,
                    train_iters=run.train_iters,
                    tokens_per_step=run.global_batch_size * run.seq_length,
                )
            if self.watch is not None:
                self.watch.start(model, run.iteration)
            if self.evaluate_first and run.iteration == 0 and run.do_valid:
                megatron.training.training.evaluate_and_print_results(
                    "initialization", forward_step, valid_data, model, 0, process_non_loss, config
                )
                self.preemption.exit_if_asked()
            self.trained = True
            self.preemption.start_clock()
            self._interval_start = time.perf_counter()
            return train(
                forward_step, model, optimizer, scheduler, train_data, valid_data,
                process_non_loss, config, *args, **kwargs,
            )  # fmt: skip

        return observed

    def _around_training_log(self, training_log: Callable[..., Any]) -> Callable[..., Any]:
        def observed(
            loss_dict: Any, total_loss_dict: Any, learning_rate: Any, iteration: int,
            loss_scale: Any, report_memory: Any, skipped: Any, grad_norm: Any, *args: Any,
            **kwargs: Any,
        ) -> Any:  # fmt: skip
            result = training_log(
                loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory,
                skipped, grad_norm, *args, **kwargs,
            )  # fmt: skip
            self.step = iteration
            if not skipped:
                self._grad_norm = grad_norm
                if LOSS in loss_dict:
                    self._losses.append(loss_dict[LOSS].detach())
            if iteration % get_args().log_interval == 0:
                self._report_step(iteration, learning_rate, self._grad_norm)
            return result

        return observed

    def _around_evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def observed(forward_step: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
            if data is self._valid_data:
                data = self.datasets.from_the_first(data)
            losses, *rest = self.preemption.evaluate(evaluate, forward_step, data, *args, **kwargs)
            # nothing comes back when the time is up or the run is to stop
            if losses and LOSS in losses:
                self._valid_loss = float(losses[LOSS])
            return losses, *rest

        return observed

    def _around_evaluate_and_print(self, report: Callable[..., Any]) -> Callable[..., Any]:
        report = self._off_the_clock(report)

        def observed(
            prefix: str, forward_step: Any, data: Any, model: Any, iteration: int, *args: Any,
            **kwargs: Any,
        ) -> None:  # fmt: skip
            if data is not self._valid_data:
                report(prefix, forward_step, data, model, iteration, *args, **kwargs)
                return
            # Megatron evaluates once more after the last step, even if that step just did
            if iteration == self._last_valid_step:
                return
            self._last_valid_step = iteration
            self._valid_loss = None
            report(prefix, forward_step, data, model, iteration, *args, **kwargs)
            if is_reporting_rank() and self._valid_loss is not None:
                self.listener.validation(step=iteration, loss=self._valid_loss)

        return observed

    def _around_save(self, save: Callable[..., Any]) -> Callable[..., Any]:
        save = self._off_the_clock(save)

        def observed(iteration: int, *args: Any, **kwargs: Any) -> Any:
            with self.preemption.saving():
                result = save(iteration, *args, **kwargs)
            # what an asynchronous save takes is known once it is published
            known = not get_args().async_save or self.preemption.longest_publication > 0
            in_mid_run = iteration < get_args().train_iters and not self.preemption.agreed and known
            if in_mid_run and is_reporting_rank():
                told = self.preemption
                self.listener.stop_needs(
                    wait=told.longest_wait, save=told.bound() - told.longest_wait
                )
            return result

        return observed

    def _off_the_clock(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The speed of a step leaves out what happens between steps."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self._interval_start += time.perf_counter() - begin
            return result

        return timed

    def _report_step(self, iteration: int, lr: float | None, grad_norm: float | None) -> None:
        layers = get_args().num_layers
        alpha_p, alpha_n = gather_alphas(self.model, layers) if self.has_alphas else ([], [])
        losses, self._losses = self._losses, []
        begin, self._interval_start = self._interval_start, time.perf_counter()
        steps, self._last_step = iteration - self._last_step, iteration
        if not is_reporting_rank() or not losses:
            return
        # reading the loss waits for the device, so the clock is read after it
        loss = float(torch.stack(losses).mean())
        self._interval_start = time.perf_counter()
        seconds = (self._interval_start - begin) / steps
        writer = get_tensorboard_writer()
        if writer is not None:
            for layer, (a_p, a_n) in enumerate(zip(alpha_p, alpha_n, strict=True)):
                writer.add_scalar(f"xielu/alpha_p/layer_{layer}", a_p, iteration)
                writer.add_scalar(f"xielu/alpha_n/layer_{layer}", a_n, iteration)
            tokens = get_args().global_batch_size * get_args().seq_length
            writer.add_scalar("throughput/tokens_per_second", tokens / seconds, iteration)
        self.listener.step(
            step=iteration,
            loss=loss,
            grad_norm=None if grad_norm is None else float(grad_norm),
            lr=float(lr or 0.0),
            alpha_p=alpha_p,
            alpha_n=alpha_n,
            seconds_per_step=seconds,
        )


def gather_alphas(model: Sequence[nn.Module], num_layers: int) -> tuple[list[float], list[float]]:
    """Effective (a_p, a_n) of every decoder layer, in order, from all pipeline stages.

    Of a mixture it is the mean over the experts of one rank. A collective over the pipeline group:
    every rank must call it.
    """
    alphas = torch.zeros(2, num_layers, device="cuda")
    for chunk in model:
        for layer_number, activations in installed_activations(chunk).items():
            effective = [torch.cat(activation.effective_alphas()) for activation in activations]
            alphas[:, layer_number - 1] = torch.stack(effective).mean(0)
    torch.distributed.all_reduce(alphas, group=parallel_state.get_pipeline_model_parallel_group())
    return alphas[0].tolist(), alphas[1].tolist()


def is_reporting_rank() -> bool:
    """Whether the listener is called here: on the last rank, which has the loss."""
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
