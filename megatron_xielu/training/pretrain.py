"""`pretrain`: checks everything first, then runs ranks, here or as one of torchrun's or srun's."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from megatron_xielu.analysis.planner import format_plan, plan
from megatron_xielu.errors import SharedUserError, UnhealthyRun, UserError
from megatron_xielu.launch import network, pet
from megatron_xielu.launch.job import wants_one_connection
from megatron_xielu.launch.preflight import await_meeting, check_disk, check_machine
from megatron_xielu.recipes import Recipe, fp8_format, load_recipe, to_yaml
from megatron_xielu.signals import StopSignals
from megatron_xielu.training import announce, launch, run_dir
from megatron_xielu.training.changes import check_keys
from megatron_xielu.training.job import Job, Request, make_job
from megatron_xielu.training.listener import Listener, SaveError
from megatron_xielu.training.meet import check_network, compare_ranks, tell_others
from megatron_xielu.training.resolve import Machine


def dry_run(request: Request, *, for_gpu: bool = False) -> None:
    """Print the resolved recipe, every derived number and Megatron's arguments; start nothing.

    Args:
        for_gpu: plan for GPUs with TransformerEngine, whatever this machine has.
    """
    recipe = load_recipe(request.recipe, request.overrides)
    # a plan is for any machine, so this one's GPUs set no limit
    machine = Machine.gpu() if for_gpu else Machine.detect()
    has_data = recipe.data.path is not None
    job = make_job(request, recipe, machine, check_data=has_data, starting=False)
    print(to_yaml(job.recipe))
    print(format_plan(plan(job.recipe, job.world_size)))
    print(announce.checkpoints(job.recipe))
    if machine.device == "cuda":
        print(announce.libraries(job))
    print("\nMegatron arguments:")
    print("\n".join(f"  {line}" for line in announce.flag_lines(job.argv())))


def pretrain(request: Request, signals: StopSignals | None = None) -> int:
    """Train; returns the exit code of the ranks.

    Args:
        signals: of a rank, what it was sent so far.

    Raises:
        UserError: something about the request is wrong; nothing was started or written.
    """
    recipe = load_recipe(request.recipe, request.overrides)
    check_keys(request.allow_changed)
    if launch.is_rank():
        # read when the GPU is first touched
        if wants_one_connection(recipe, request.megatron_flags):
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        _run_rank(request, recipe, signals or StopSignals())
    try:
        with launch.stopping_at_once():
            return _start_ranks(request, recipe)
    except launch.Stopped:
        print("stopped before training began; the same command begins it", file=sys.stderr)
        return 0


def _start_ranks(request: Request, recipe: Recipe) -> int:
    job = make_job(request, recipe, Machine.detect(), check_data=True)
    # a GPU is asked by a rank, because asking takes memory there for as long as a process lives
    activation = announce.activation(job) if job.machine.device == "cpu" else None
    _check_limits(job, ranks=job.world_size)
    lock = _claim(job)
    check_disk(job.recipe, job.run_dir, run_dir.latest_step(job.run_dir))
    print(format_plan(plan(job.recipe, job.world_size)))
    if activation is not None:
        print(activation)
    ranks = "1 rank" if job.world_size == 1 else f"{job.world_size} ranks"
    print(f"\nrun folder {job.run_dir}, {ranks}, logs in {run_dir.LOGS}/\n", flush=True)
    # the ranks read the resolved recipe, so that all of them see the same run
    arguments = ["pretrain", "--recipe", str(job.run_dir / run_dir.RECIPE)]
    arguments += ["--run-dir", str(job.run_dir), "--", *job.megatron_flags]
    logs = job.run_dir / run_dir.LOGS
    return launch.launch(arguments, job.world_size, logs, keep_open=[lock])


def _check_limits(job: Job, *, ranks: int) -> None:
    shared = job.machine.device == "cuda" and ranks > 1
    check_machine(world_size=job.world_size, shared_memory=shared)


def _run_rank(request: Request, recipe: Recipe, signals: StopSignals) -> NoReturn:
    try:
        job = _job_of_rank(request, recipe)
    except UserError as error:
        tell_others(error)
        raise
    if launch.local_rank() == 0 and launch.rank() > 0 and _several_machines(job):
        await_meeting(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    launch.end_with_parent()
    log = launch.log_path(job.run_dir / run_dir.LOGS, launch.rank())
    with launch.logged_to(log) as terminal:
        try:
            stopped = _train(job, terminal, signals)
        # torch's CheckpointException is no Exception
        except BaseException as error:
            # the log may be on the disk that is full
            with contextlib.suppress(OSError):
                traceback.print_exc()
                sys.stderr.flush()
            # all ranks have the same to say of these; `launch` shows one
            shared = isinstance(error, UnhealthyRun | SharedUserError)
            if launch.is_child() or launch.rank() == 0 or not shared:
                launch.report_error(_describe(error, job, log), terminal)
            # without the other ranks no collective ends, so nothing may wait for one on exit
            _exit(2 if isinstance(error, UserError) else 1)
    # a data loader's workers inherit the handler that makes a signal a request, so that Python
    # would wait for them for good; they end by themselves once this process is gone
    _exit(pet.stopped_code() if stopped else 0)


def _job_of_rank(request: Request, recipe: Recipe) -> Job:
    job = make_job(request, recipe, Machine.detect(), check_data=True)
    if not launch.is_child() and launch.local_rank() == 0:
        _check_limits(job, ranks=launch.local_world_size())
        if launch.rank() == 0:
            _claim(job)
            check_disk(job.recipe, job.run_dir, run_dir.latest_step(job.run_dir))
    return job


def _several_machines(job: Job) -> bool:
    return launch.local_world_size() < job.world_size


def _exit(code: int) -> NoReturn:
    # torch's handler raises for a data loader's worker that was killed, which would keep this
    # process from its end
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Megatron's saving starts a process that would outlive this one: nothing is joined
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _claim(job: Job) -> int:
    return run_dir.claim(
        job.run_dir,
        job.recipe,
        megatron_flags=job.megatron_flags,
        data=job.data,
        allowed=job.allow_changed,
        progress=print,
    )


def _train(job: Job, terminal: TextIO, signals: StopSignals) -> bool:
    """Whether a signal has stopped it."""
    # held as long as the ranks use its store
    meeting = compare_ranks(job, terminal)
    joined = None
    if meeting is not None and job.machine.device == "cuda" and _several_machines(job):
        nccl_log = job.run_dir / run_dir.LOGS / f"nccl_{launch.rank():05d}.log"
        # one rank speaks for its machine
        speaks = launch.local_rank() == 0 and network.ask_nccl(os.environ, nccl_log)
        joined = partial(check_network, meeting, nccl_log if speaks else None, terminal)
    # only now, in the rank's own log: Megatron says much while it is imported
    import torch

    from megatron_xielu.mcore import cpu_platform

    cpu_platform.hide_gpu_libraries()
    from megatron_xielu.mcore.health import HealthSettings
    from megatron_xielu.mcore.pretrain import pretrain as megatron_pretrain

    if launch.rank() == 0 and not (launch.is_child() and job.machine.device == "cpu"):
        print(announce.activation(job), file=terminal, flush=True)
        if job.machine.device == "cuda":
            print(announce.libraries(job), file=terminal, flush=True)
    with Listener(job, terminal) as listener:
        stopped = megatron_pretrain(
            job.argv(),
            _placeholder(job.recipe),
            listener,
            alpha_lr_mult=job.recipe.xielu.lr_mult,
            evaluate_first=job.recipe.logging.eval_iters != 0,
            store=run_dir.store(job.run_dir, job.recipe),
            async_save=job.recipe.checkpoint.async_save,
            signals=signals,
            emulated_fp8=_emulated_fp8(job.recipe),
            watch=_watch(job.recipe),
            watch_record=job.run_dir / run_dir.BF16_LAYERS,
            health=HealthSettings(**dataclasses.asdict(job.recipe.health)),
            joined=joined,
        )
        listener.check_saved()
    torch.distributed.destroy_process_group()
    return stopped


def _watch(recipe: Recipe) -> Any:
    from megatron_xielu.mcore.fp8_watch import WatchSettings

    fp8 = recipe.fp8
    if fp8.recipe == "off" or recipe.model.activation != "xielu":
        return None
    return WatchSettings(
        fp8.watch_interval,
        fp8.on_outlier,
        fp8.max_saturated,
        fp8.max_flushed,
        fp8.max_kurtosis,
    )


def _placeholder(recipe: Recipe) -> Any:
    from megatron_xielu.mcore.activation import XIELUPlaceholder

    xielu = recipe.xielu
    if recipe.model.activation != "xielu":
        return None
    return XIELUPlaceholder(
        xielu.alpha_p_init,
        xielu.alpha_n_init,
        xielu.beta,
        xielu.impl,
        recompute=xielu.recompute,
        fc2_input=recipe.fp8.fc2_input,
        saved_input=xielu.saved_input,
    )


def _emulated_fp8(recipe: Recipe) -> Any:
    from megatron_xielu.mcore.fp8_emulation import FP8Settings

    fp8 = recipe.fp8
    # the check of the recipe has refused mxfp8
    if not fp8.emulate or fp8.recipe == "off" or fp8.recipe == "mxfp8":
        return FP8Settings()
    return FP8Settings(
        fp8.recipe,
        fp8_format(fp8),
        fp8.amax_history_len,
        fp8.amax_compute_algo,
        fp8.fc2_input,
    )


def _describe(error: BaseException, job: Job, log: Path) -> str:
    if isinstance(error, UserError):
        return str(error)
    step = 0
    with contextlib.suppress(UserError, OSError):
        step = run_dir.latest_step(job.run_dir)
    saved = f"step {step} is saved whole, and training can go on from it"
    if not step:
        saved = "nothing was saved yet"
    if isinstance(error, SaveError):
        return f"{error}\nmake room and give the same command again: {saved}"
    if _is_disk_full(error, job.run_dir):
        return f"the disk of {job.run_dir} is full; make room: {saved}"
    if isinstance(error, UnhealthyRun):
        return f"{error}\n{saved}; the whole story is in {log.parent}"
    summary = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    return f"rank {launch.rank()}: {summary}\n{saved}; the whole story is in {log}"


def _is_disk_full(error: BaseException, folder: Path) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    if any(isinstance(e, OSError) and e.errno in full for e in _chain(error)):
        return True
    # checkpoint writers report through strings and other ranks' exceptions
    return "No space left" in str(error) or shutil.disk_usage(folder).free < 4096


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
