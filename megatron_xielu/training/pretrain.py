"""`pretrain`: checks everything first, then runs ranks, here or as one of torchrun's or srun's."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from megatron_xielu.analysis.planner import flops_per_token, format_plan, peak_flops, plan
from megatron_xielu.data.manifest import DatasetInfo, check_dataset, load_info
from megatron_xielu.errors import SharedUserError, UnhealthyRun, UserError
from megatron_xielu.launch import network, nodes
from megatron_xielu.launch.job import wants_one_connection
from megatron_xielu.launch.meeting import Meeting
from megatron_xielu.launch.preflight import (
    await_meeting,
    check_disk,
    check_machine,
    checkpoint_bytes,
    gpu_is_busy,
)
from megatron_xielu.recipes import Recipe, check, fp8_format, load_recipe, megatron_args, to_yaml
from megatron_xielu.signals import StopSignals
from megatron_xielu.training import launch, run_dir, transformer_engine
from megatron_xielu.training.changes import check_keys, fingerprint
from megatron_xielu.training.report import Reporter, StepMetrics
from megatron_xielu.training.resolve import Machine, fuses_weight_gradients, resolve

# Megatron's own ways to name data
_DATA_FLAGS = {
    "--mock-data",
    "--data-path",
    "--train-data-path",
    "--data-args-path",
    "--per-split-data-args-path",
}
# for a rank that ends anyway, and for rank 0, which may be reading data still
_TELLING_SECONDS = 60.0


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    recipe: str
    """A preset's name or a YAML file."""
    overrides: tuple[str, ...] = ()
    run_dir: Path | None = None
    """None means runs/ and the recipe's name."""
    nproc: int | None = None
    """Ranks to start; None means one per GPU, or as many as the model is cut into."""
    megatron_flags: tuple[str, ...] = ()
    allow_changed: tuple[str, ...] = ()
    """Recipe keys that may differ from the saved run's although they change its result."""


@dataclass(frozen=True)
class Job:
    """A request that passed every check."""

    recipe: Recipe
    run_dir: Path
    world_size: int
    machine: Machine
    megatron_flags: tuple[str, ...]
    data: DatasetInfo | None
    allow_changed: tuple[str, ...]

    def argv(self) -> list[str]:
        """Megatron's flags; the user's own come last, and the last one wins."""
        recipe = self.recipe
        flags = megatron_args(
            recipe,
            world_size=self.world_size,
            device=self.machine.device,
            run_dir=self.run_dir,
            precision=recipe.training.precision,  # type: ignore[arg-type]
            transformer_impl=recipe.model.transformer_impl,  # type: ignore[arg-type]
            gradient_accumulation_fusion=fuses_weight_gradients(
                self.machine, recipe.model.transformer_impl
            ),
            # Megatron names its index files by the data's path alone
            cache=self.data.train.sha256[:12] if self.data else "",
        )
        return [*flags, *self.megatron_flags]


def dry_run(request: Request, *, for_gpu: bool = False) -> None:
    """Print the resolved recipe, every derived number and Megatron's arguments; start nothing.

    Args:
        for_gpu: plan for GPUs with TransformerEngine, whatever this machine has.
    """
    recipe = load_recipe(request.recipe, request.overrides)
    # a plan is for any machine, so this one's GPUs set no limit
    machine = Machine.gpu() if for_gpu else Machine.detect()
    has_data = recipe.data.path is not None
    job = _job(request, recipe, machine, check_data=has_data, starting=False)
    print(to_yaml(job.recipe))
    print(format_plan(plan(job.recipe, job.world_size)))
    print(_checkpoints(job.recipe))
    if machine.device == "cuda":
        print(_libraries(job))
    print("\nMegatron arguments:")
    print("\n".join(f"  {line}" for line in _flag_lines(job.argv())))


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
    job = _job(request, recipe, Machine.detect(), check_data=True)
    # a GPU is asked by a rank, because asking takes memory there for as long as a process lives
    activation = _activation(job) if job.machine.device == "cpu" else None
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


def _job(
    request: Request, recipe: Recipe, machine: Machine, *, check_data: bool, starting: bool = True
) -> Job:
    parallel = recipe.parallel
    pieces = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    world_size = request.nproc or (machine.num_gpus if starting else 0) or pieces
    if launch.is_rank():
        world_size = launch.world_size()
    elif starting and 0 < machine.num_gpus < max(world_size, pieces):
        raise UserError(
            f"the run needs {max(world_size, pieces)} GPUs (tensor x pipeline parallelism is "
            f"{pieces}), this machine has {machine.num_gpus}: set --nproc and "
            "parallel.tensor_model_parallel_size to what it has, or use more machines with torchrun"
        )
    check(recipe, world_size)
    data = _data(recipe, request.megatron_flags) if check_data else None
    resolved = resolve(recipe, machine, data)
    check(resolved, world_size)
    _check_resolved(resolved)
    _check_transformer_engine(resolved, machine)
    folder = (request.run_dir or Path("runs") / recipe.name).absolute()
    allowed = request.allow_changed
    return Job(resolved, folder, world_size, machine, request.megatron_flags, data, allowed)


def _check_transformer_engine(recipe: Recipe, machine: Machine) -> None:
    # a plan for GPUs needs none; of a machine's ranks one asks, or the process that starts them
    if launch.is_child() or (launch.is_rank() and launch.local_rank() > 0) or not machine.num_gpus:
        return
    if recipe.model.transformer_impl == "transformer_engine":
        transformer_engine.check(recipe.fp8.recipe, transformer_engine.probe())


def _check_resolved(recipe: Recipe) -> None:
    derived = {
        "model.vocab_size": recipe.model.vocab_size,
        "logging.eval_iters": recipe.logging.eval_iters,
    }
    missing = [name for name, value in derived.items() if value is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} would come from the data, but data.path is not set: set it, "
            f"or give {' '.join(f'{name}=NUMBER' for name in missing)}"
        )


def _data(recipe: Recipe, flags: Sequence[str]) -> DatasetInfo | None:
    if recipe.data.path is None:
        if _DATA_FLAGS.intersection(flags):
            return None
        raise UserError(
            "data.path is not set: write a data folder with `megatron-xielu prepare-data DIR` and "
            "give data.path=DIR"
        )
    folder = Path(recipe.data.path)
    # one process of a machine reads the files, the others only need the manifest
    if launch.is_child() or (launch.is_rank() and launch.local_rank() > 0):
        return load_info(folder)
    return check_dataset(folder, vocab_size=recipe.model.vocab_size, progress=print)


def _run_rank(request: Request, recipe: Recipe, signals: StopSignals) -> NoReturn:
    try:
        job = _job_of_rank(request, recipe)
    except UserError as error:
        _tell_others(error)
        raise
    if launch.local_rank() == 0 and launch.rank() > 0 and _several_machines(job):
        await_meeting(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    launch.end_with_parent()
    log = launch.log_path(job.run_dir / run_dir.LOGS, launch.rank())
    with launch.logged_to(log) as terminal:
        try:
            _train(job, terminal, signals)
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
    _exit(0)


def _job_of_rank(request: Request, recipe: Recipe) -> Job:
    job = _job(request, recipe, Machine.detect(), check_data=True)
    if not launch.is_child() and launch.local_rank() == 0:
        _check_limits(job, ranks=launch.local_world_size())
        if launch.rank() == 0:
            _claim(job)
            check_disk(job.recipe, job.run_dir, run_dir.latest_step(job.run_dir))
    return job


def _several_machines(job: Job) -> bool:
    return launch.local_world_size() < job.world_size


def _tell_others(error: UserError) -> None:
    """Let a mistake, which may be this machine's alone, end all ranks with one message."""
    if launch.is_child() or launch.world_size() == 1:
        return
    # where rank 0 or others are missing, this rank's own message has to do
    with contextlib.suppress(RuntimeError, UnhealthyRun):
        meeting = Meeting(launch.rank(), launch.world_size(), _TELLING_SECONDS)
        meeting.compare(nodes.Record(socket.gethostname(), problem=str(error)), "start")


def _meet(job: Job, terminal: TextIO) -> Meeting | None:
    """Compare the ranks, before Megatron waits for them all; None where there is one."""
    gpu = launch.local_rank() if job.machine.device == "cuda" else None
    problem = None if gpu is None else _busy(gpu)
    if job.world_size == 1:
        if problem is not None:
            raise UserError(problem)
        return None
    facts = nodes.facts(
        job.recipe,
        megatron_flags=job.megatron_flags,
        run_dir=job.run_dir,
        data=None if job.data is None else fingerprint(job.data),
        gpu=gpu,
        fuses_weight_gradients=fuses_weight_gradients(
            job.machine, job.recipe.model.transformer_impl
        ),
    )
    meeting = Meeting(launch.rank(), job.world_size)
    for text in meeting.compare(nodes.Record(socket.gethostname(), facts, problem), "start"):
        print(f"warning: {text}", file=terminal, flush=True)
    return meeting


def _busy(gpu: int) -> str | None:
    import torch

    # the memory of such a one is the machine's, of which other programs always have some
    if torch.cuda.get_device_properties(gpu).is_integrated:
        return None
    return gpu_is_busy(gpu, partial(torch.cuda.mem_get_info, gpu))


def _check_network(meeting: Meeting, log: Path | None, terminal: TextIO) -> None:
    """Refuse what NCCL chose between machines; it has made a communicator by now.

    Args:
        log: what NCCL said; None where another rank reads it, or the user.
    """
    said = log.read_text(errors="replace") if log is not None and log.exists() else ""
    problem = network.fell_back(said, os.environ)
    meeting.compare(nodes.Record(socket.gethostname(), problem=problem), "network")
    if meeting.rank == 0 and (chosen := network.chosen(said)):
        print(f"NCCL between machines: {chosen}", file=terminal, flush=True)


def _exit(code: int) -> NoReturn:
    # torch's handler raises for a data loader's worker that was killed, which would keep this
    # process from its end
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Megatron's saving starts a process that would outlive this one: nothing is joined
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _activation(job: Job) -> str:
    """Which implementation of xIELU the run gets, and why; the CPU kernels are built by now."""
    if job.recipe.model.activation != "xielu":
        return f"model.activation={job.recipe.model.activation}, Megatron's own"
    import torch

    from megatron_xielu.ops.dispatch import describe

    recipe = job.recipe
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.training.precision]
    try:
        found = describe(job.machine.device, dtype, recipe.xielu.impl)
    except ValueError as error:
        raise UserError(f"xielu.impl={recipe.xielu.impl} cannot be used: {error}") from error
    return f"xIELU by {found}{_fp8_results(recipe, job.megatron_flags)}"


def _fp8_results(recipe: Recipe, megatron_flags: Sequence[str] = ()) -> str:
    """Who writes what the MLP's second product reads under FP8, for each kind of layer."""
    fp8 = recipe.fp8
    if fp8.recipe == "off" or fp8.emulate:
        return ""
    cast = "in bf16, which TransformerEngine casts to FP8"
    flags = {flag.partition("=")[0] for flag in megatron_flags}
    if fp8.fc2_input == "bf16":
        dense = "in bf16 for fc2 (fp8.fc2_input)"
    elif fp8.recipe == "mxfp8":
        dense = f"{cast} (mxfp8: has no kernel of ours)"
    elif fp8.fused:
        dense = f"in FP8 for fc2, and for fc1 in backward ({fp8.recipe} scaling)"
    else:
        dense = f"in FP8 for fc2 ({fp8.recipe} scaling, fp8.fused=false)"
        if "--recompute-granularity" in flags:
            dense += ", but in bf16 where Megatron recomputes it"
    kinds = [f"dense MLPs: {dense}"]
    if "--num-experts" in flags:
        kinds.append(f"experts: {cast} (the router's probabilities come between)")
    ends = {"first": fp8.bf16_layers_at_start, "last": fp8.bf16_layers_at_end}
    if any(ends.values()):
        layers = " and ".join(f"{which} {count}" for which, count in ends.items() if count)
        kinds.append(f"{layers} layers: in bf16")
    return "".join(f"; {kind}" for kind in kinds)


def _checkpoints(recipe: Recipe) -> str:
    """What the saves of a run take on the disk."""
    steps, keep = recipe.training.train_iters, recipe.checkpoint
    saves = kept = -(-steps // keep.save_interval)
    if keep.keep_last is not None:
        more = steps // math.lcm(keep.save_interval, keep.keep_every) if keep.keep_every else 0
        # an old one goes when the new one is whole
        kept = min(saves, keep.keep_last + 1 + more)
    size = checkpoint_bytes(recipe)
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
    return (
        f"checkpoints: {size / unit:,.1f} {name} each, {saves:,} in all; at most {kept:,} on the "
        f"disk, {kept * size / unit:,.1f} {name}"
    )


def _libraries(job: Job) -> str:
    """Whose optimizer and weight gradients a run on GPUs gets; empty for one on CPUs."""
    machine = job.machine
    if machine.device == "cpu":
        return ""
    # the order in which Megatron looks for one
    adam = "torch's fused AdamW (neither TransformerEngine nor Apex is installed)"
    if machine.has_transformer_engine:
        adam = "TransformerEngine's FusedAdam"
    elif machine.has_apex:
        adam = "Apex's FusedAdam"
    why_not = "neither Apex's extension nor TransformerEngine's layers are there"
    fused = fuses_weight_gradients(machine, job.recipe.model.transformer_impl)
    if "--no-gradient-accumulation-fusion" in job.megatron_flags:
        fused, why_not = False, "--no-gradient-accumulation-fusion"
    if not fused:
        # a bf16 gradient is written and read again
        cost = "4 bytes of traffic more per parameter and micro-batch"
        return (
            f"optimizer: {adam}; weight gradients: added in a pass of their own, {cost} ({why_not})"
        )
    by = "Apex's extension" if machine.has_gradient_fusion else "TransformerEngine's GEMM"
    return f"optimizer: {adam}; weight gradients: added by {by}"


def _claim(job: Job) -> int:
    return run_dir.claim(
        job.run_dir,
        job.recipe,
        megatron_flags=job.megatron_flags,
        data=job.data,
        allowed=job.allow_changed,
        progress=print,
    )


def _train(job: Job, terminal: TextIO, signals: StopSignals) -> None:
    # held as long as the ranks use its store
    meeting = _meet(job, terminal)
    joined = None
    if meeting is not None and job.machine.device == "cuda" and _several_machines(job):
        nccl_log = job.run_dir / run_dir.LOGS / f"nccl_{launch.rank():05d}.log"
        # one rank speaks for its machine
        speaks = launch.local_rank() == 0 and network.ask_nccl(os.environ, nccl_log)
        joined = partial(_check_network, meeting, nccl_log if speaks else None, terminal)
    # only now, in the rank's own log: Megatron says much while it is imported
    import torch

    from megatron_xielu.mcore import cpu_platform

    cpu_platform.hide_gpu_libraries()
    from megatron_xielu.mcore.health import HealthSettings
    from megatron_xielu.mcore.pretrain import pretrain as megatron_pretrain

    if launch.rank() == 0 and not (launch.is_child() and job.machine.device == "cpu"):
        print(_activation(job), file=terminal, flush=True)
        if job.machine.device == "cuda":
            print(_libraries(job), file=terminal, flush=True)
    with _Listener(job, terminal) as listener:
        megatron_pretrain(
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
            watch_record=job.run_dir / "fp8_bf16_layers.json",
            health=HealthSettings(**dataclasses.asdict(job.recipe.health)),
            joined=joined,
        )
        listener.check_saved()
    torch.distributed.destroy_process_group()


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


class SaveError(Exception):
    """The run is over and its last state could not be saved."""


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


class _Listener:
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

    def __enter__(self) -> _Listener:
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


def _flag_lines(argv: Sequence[str]) -> Iterator[str]:
    line: list[str] = []
    for word in argv:
        if word.startswith("--") and line:
            yield shlex.join(line)
            line = []
        line.append(word)
    if line:
        yield shlex.join(line)
