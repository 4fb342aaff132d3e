"""What becomes of the news of Megatron's loop: terminal, metrics and the last word."""

from __future__ import annotations

from typing import Any, TextIO

from megatron_xielu.analysis.planner import flops_per_token, peak_flops
from megatron_xielu.training import launch, run_dir
from megatron_xielu.training.job import Job
from megatron_xielu.training.report import Reporter, StepMetrics
from megatron_xielu.training.resolve import Machine


class SaveError(Exception):
    """The run is over and its last state could not be saved."""


class Listener:
    """Hands what Megatron's loop tells to the reporter, which only the last rank has."""

    def __init__(self, job: Job, terminal: TextIO) -> None:
        self._job = job
        self._terminal = terminal
        self._reporter: Reporter | None = None
        self._unsaved: str | None = None
        self._told_bound = False

    def begin(self, *, start_step: int, train_iters: int, tokens_per_step: int) -> None:
        self._reporter = Reporter(
            run_dir=self._job.run_dir,
            train_iters=train_iters,
            tokens_per_step=tokens_per_step,
            flops_per_token=flops_per_token(self._job.recipe.model),
            num_devices=self._job.world_size,
            peak_flops=_peak_flops(self._job.machine),
            start_step=start_step,
            with_alphas=self._job.recipe.model.activation == "xielu",
            out=self._terminal,
        )

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._reporter is not None:
            self._reporter.close()

    def note(self, text: str) -> None:
        """Say once what every rank has found."""
        if launch.rank() == 0:
            print(text, file=self._terminal, flush=True)

    def step(self, **numbers: Any) -> None:
        assert self._reporter is not None
        numbers |= {name: tuple(numbers[name]) for name in ("alpha_p", "alpha_n")}
        self._reporter.step(StepMetrics(**numbers))

    def outliers(self, **found: Any) -> None:
        assert self._reporter is not None
        self._reporter.outliers(**found)

    def validation(self, *, step: int, loss: float) -> None:
        assert self._reporter is not None
        self._reporter.validation(step, loss)

    def saved(self, *, step: int, seconds: float) -> None:
        self._unsaved = None

    def save_failed(self, *, step: int, problem: str) -> None:
        self._unsaved = f"step {step} could not be saved: {problem}"
        if self._reporter is not None:
            whole = run_dir.latest_step(self._job.run_dir)
            stays = f"step {whole} stays the newest whole one" if whole else "nothing is saved yet"
            print(f"warning: {self._unsaved}; {stays}", file=self._terminal)

    def check_saved(self) -> None:
        """Raise SaveError if the run's last state is lost."""
        if self._unsaved is not None:
            raise SaveError(self._unsaved)

    def stop_needs(self, *, wait: float, save: float) -> None:
        """Say once what a preemption needs, for a scheduler's notice before the end."""
        if not self._told_bound:
            self._told_bound = True
            # unless told otherwise, torchrun itself does not survive SIGUSR1
            hint = "" if launch.is_of_torchrun() else " (Slurm: --signal=USR1@SECONDS)"
            print(
                f"a stop needs up to {wait + save:.1f} s by what was seen so far: {wait:.1f} s to "
                f"end a step or evaluation batch, {save:.1f} s to save{hint}",
                file=self._terminal,
            )

    def stopped(self, *, trained: bool, seconds: float | None, bound: float) -> None:
        """Say that the run was stopped and where it stands."""
        if self._unsaved is not None:
            # said by `check_saved`
            return
        step = run_dir.latest_step(self._job.run_dir)
        if not trained:
            stands = f"step {step} is saved" if step else "nothing was saved yet"
            text = f"stopped before the first step, {stands}"
        elif seconds is None:
            text = f"stopped at step {step}, saved"
        else:
            text = f"stopped at step {step}, saved, {seconds:.1f} s after the signal"
            text += f" (bound {bound:.1f} s)"
        print(f"{text}; the same command goes on", file=self._terminal)

    def skipped(self, *, step: int, loss: float | None, grad_norm: float, where: str) -> None:
        assert self._reporter is not None
        self._reporter.skipped(step, loss, grad_norm, where)


def _peak_flops(machine: Machine) -> float | None:
    if machine.device == "cpu":
        return None
    import torch

    return peak_flops(torch.cuda.get_device_name(launch.local_rank()))
