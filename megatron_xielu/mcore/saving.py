"""Saves that count only when they are whole, and a run that outlives one that fails.

Megatron writes a checkpoint in place and calls it the latest by a write that is not atomic. Here
its own save goes to a folder beside; then every rank describes the files it wrote, rank 0 checks
that all of them are there and publishes the step. A write that fails on any rank, as on a full
disk, is a warning on all of them: what was saved before stays, and the next interval tries again.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import megatron.core.dist_checkpointing.serialization
import megatron.training.checkpointing
import megatron.training.training
import megatron.training.wandb_utils
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.training import get_args
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from megatron_xielu import __version__
from megatron_xielu.errors import UserError
from megatron_xielu.mcore import patches
from megatron_xielu.mcore.observer import Listener, is_reporting_rank
from megatron_xielu.mcore.preemption import Preemption
from megatron_xielu.mcore.shard_file import ShardFile
from megatron_xielu.mcore.token_count import TokenCount
from megatron_xielu.signals import kept_from_children

_UNKNOWN = "a rank could not write; the logs say why"


def _around_queue(get_queue: Callable[..., Any]) -> Callable[..., Any]:
    def started(*args: Any, **kwargs: Any) -> Any:
        # it serves every save of this process by a process of its own
        with kept_from_children():
            return get_queue(*args, **kwargs)

    return started


class Store(Protocol):
    """Where checkpoints go; used by rank 0 alone, but for `staging` and `describe`."""

    @property
    def folder(self) -> Path:
        """All of them."""

    def begin(self, step: int) -> Path:
        """Make an empty folder for a save."""

    def path(self, step: int) -> Path:
        """Where it is once it is published."""

    def staging(self, step: int) -> Path:
        """The folder of a save at work."""

    def describe(self, step: int, names: list[str]) -> Mapping[str, Any]:
        """Size and checksum of files in it."""

    def publish(self, step: int, files: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Make the save the latest one; OSError or UserError if it is not whole."""

    def prune(self, newest: int) -> None:
        """Remove older steps that need not be kept."""

    def discard(self) -> None:
        """Give the save up."""


class Saving:
    """Wraps Megatron's save; loading stays Megatron's.

    Args:
        store: keeps the checkpoints of the folder that `--save` names.
        listener: gets the outcome of every save, on every rank.
        preemption: learns how long a save takes.
    """

    def __init__(self, store: Store, listener: Listener, preemption: Preemption) -> None:
        self.store = store
        self.preemption = preemption
        self.listener = listener
        self._tokens = TokenCount()
        self._staged_step: int | None = None
        self._scheduled_step = 0
        self._problem: str | None = None
        self._at_work = False
        self._began = 0.0
        self._tell_wandb: Callable[..., None] | None = None
        # a pipe that a writer forked from here has as well
        self._reasons: Any = multiprocessing.get_context("fork").SimpleQueue()

    def attach(self, args: Any) -> None:
        """Wrap the functions of Megatron that save.

        Raises:
            UserError: an argument of Megatron's decides what is decided here.
        """
        if args.save_retain_interval is not None:
            raise UserError(
                f"--save-retain-interval {args.save_retain_interval} is Megatron's own removal of "
                "checkpoints: set checkpoint.keep_last and checkpoint.keep_every instead"
            )
        if args.ckpt_format != "torch_dist" or getattr(args, "dataloader_save", None):
            raise UserError(
                f"--ckpt-format {args.ckpt_format} and --dataloader-save cannot be checked and "
                "published as a whole: leave them out"
            )
        if Path(args.save) != self.store.folder:
            raise UserError(
                f"--save {args.save} is another folder than the run's {self.store.folder}: choose "
                "where to save by --run-dir; --load may name any folder"
            )
        checkpointing = megatron.training.checkpointing
        self._tokens.attach()
        patches.wrap_training("save_checkpoint", self._around_save)
        patches.wrap_training("maybe_finalize_async_save", self._around_finalize)
        patches.wrap(checkpointing, "get_checkpoint_name", self._around_name)
        patches.wrap(checkpointing, "get_checkpoint_tracker_filename", self._around_tracker)
        patches.wrap(checkpointing, "schedule_async_save", self._around_schedule)
        patches.wrap(
            megatron.training.wandb_utils, "on_save_checkpoint_success", self._around_wandb
        )
        # what only rank 0 writes: an error must not leave the others waiting for it
        patches.wrap(FileSystemWriter, "finish", self._remembering)
        filesystem_async.open = self._open_shard
        patches.wrap(filesystem_async, "get_write_results_queue", _around_queue)
        serialization = megatron.core.dist_checkpointing.serialization
        patches.wrap(serialization, "save_config", self._remembering)

    def _around_save(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def saved(iteration: int, *args: Any, **kwargs: Any) -> None:
            if kwargs.get("non_persistent_ckpt"):
                save(iteration, *args, **kwargs)
                return
            self._tokens.update()
            # a save that is still being written uses the same folder beside
            megatron.training.training.maybe_finalize_async_save(blocking=True)
            self._began, self._at_work = time.perf_counter(), True
            self._problem = self._begin(iteration)
            if self._problem is None:
                try:
                    with self._staged(iteration):
                        save(iteration, *args, **kwargs)
                except CheckpointException:
                    self._problem = self._problem or _UNKNOWN
                if get_args().async_save and self._problem is None:
                    # the rest follows once everything is written
                    return
            self._finish(iteration)

        return saved

    def _begin(self, step: int) -> str | None:
        """Make the folder, and let every rank try to write into it; what is wrong, on all ranks."""
        problem = self._on_rank_0(lambda: self.store.begin(step))
        if problem is None:
            # an error in Megatron's planning would end one rank and leave the others waiting
            probe = self.store.staging(step) / f".probe_{torch.distributed.get_rank()}"
            try:
                probe.write_bytes(b"x")
                probe.unlink()
            except OSError as error:
                problem = f"{error}; do all ranks see the same {self.store.folder}?"
        return self._anyones(problem)

    @contextmanager
    def _staged(self, step: int) -> Iterator[None]:
        self._staged_step = step
        try:
            yield
        finally:
            self._staged_step = None

    def _around_name(self, get_name: Callable[..., str]) -> Callable[..., str]:
        def staged(checkpoints_path: str, *args: Any, **kwargs: Any) -> str:
            if self._staged_step is None:
                return get_name(checkpoints_path, *args, **kwargs)
            return str(self.store.staging(self._staged_step))

        return staged

    def _around_tracker(self, get_filename: Callable[..., str]) -> Callable[..., str]:
        def staged(checkpoints_path: str) -> str:
            # Megatron calls a step the latest before it was checked; `publish` does it instead
            return get_filename(checkpoints_path) if self._staged_step is None else os.devnull

        return staged

    def _around_schedule(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        def scheduled(request: Any) -> None:
            if self._staged_step is not None:
                self._scheduled_step = self._staged_step
                request.add_finalize_fn(partial(self._finish, self._staged_step))
            schedule(request)

        return scheduled

    def _around_finalize(self, finalize: Callable[..., Any]) -> Callable[..., Any]:
        def finalized(*args: Any, **kwargs: Any) -> None:
            try:
                finalize(*args, **kwargs)
            except CheckpointException:
                self._problem = self._problem or _UNKNOWN
                self._finish(self._scheduled_step)

        return finalized

    def _around_wandb(self, tell: Callable[..., None]) -> Callable[..., None]:
        self._tell_wandb = tell

        def told(*args: Any, **kwargs: Any) -> None:
            # of a folder that is about to be renamed; `_finish` tells of the published one
            if not self._at_work:
                tell(*args, **kwargs)

        return told

    def _remembering(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(*args: Any, **kwargs: Any) -> Any:
            try:
                return write(*args, **kwargs)
            except OSError as error:
                if not self._at_work:
                    raise
                self._note(error)

        return remembered

    def _open_shard(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        # stands for `open` in the module that writes shards
        return ShardFile(path, self._note) if mode == "wb" else open(path, mode, **kwargs)

    def _note(self, error: OSError) -> None:
        # Megatron's own report of it holds no reason; a forked writer's memory is not this one
        self._problem = self._problem or str(error)
        self._reasons.put(str(error))

    def _finish(self, step: int) -> None:
        """Publish a step that every rank has written, or give it up; called on all ranks."""
        problem = self._describe_and_publish(step)
        self._problem, self._at_work = None, False
        if problem is None:
            if left := self._on_rank_0(lambda: self.store.prune(step)):
                print(f"older checkpoints could not be removed: {left}", flush=True)
            if self._tell_wandb is not None and is_reporting_rank():
                folder = str(self.store.folder)
                tracker = megatron.training.checkpointing.get_checkpoint_tracker_filename(folder)
                self._tell_wandb(str(self.store.path(step)), tracker, folder, step)
            seconds = time.perf_counter() - self._began
            self.preemption.longest_publication = max(self.preemption.longest_publication, seconds)
            self.listener.saved(step=step, seconds=seconds)
        else:
            self._on_rank_0(self.store.discard)
            self.listener.save_failed(step=step, problem=problem)

    def _describe_and_publish(self, step: int) -> str | None:
        files: Mapping[str, Any] = {}
        while not self._reasons.empty():
            reason = self._reasons.get()
            self._problem = reason if self._problem == _UNKNOWN else self._problem
        if self._problem is None:
            try:
                files = self.store.describe(step, self._own_files(step))
            except OSError as error:
                self._problem = str(error)
        everyones: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyones, (self._problem, files))
        problems = [problem for problem, _ in everyones if problem]
        if problems:
            return _clearest(problems)
        every_file = {name: record for _, files in everyones for name, record in files.items()}
        return self._on_rank_0(lambda: self.store.publish(step, every_file, _about()))

    def _own_files(self, step: int) -> list[str]:
        """This rank's shards; rank 0's are the files that belong to no rank as well."""
        rank = torch.distributed.get_rank()
        names = [path.name for path in self.store.staging(step).iterdir()]
        owners = {name: re.match(r"__(\d+)_\d+\.distcp$", name) for name in names}
        return [name for name, owner in owners.items() if int(owner[1] if owner else 0) == rank]

    def _anyones(self, problem: str | None) -> str | None:
        """On every rank, the problem of whichever has one."""
        everyones: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyones, problem)
        found = [one for one in everyones if one]
        return _clearest(found) if found else None

    def _on_rank_0(self, action: Callable[[], object]) -> str | None:
        """Do it on rank 0; returns on every rank what went wrong."""
        problem: list[str | None] = [None]
        if torch.distributed.get_rank() == 0:
            try:
                action()
            except (OSError, UserError) as error:
                problem = [str(error)]
        torch.distributed.broadcast_object_list(problem, src=0)
        return problem[0]


def _clearest(problems: Sequence[str]) -> str:
    # the rank whose write failed knows the reason, the others only that there is one
    return min(problems, key=lambda problem: problem == _UNKNOWN)


def _about() -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": torch.distributed.get_world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
        "megatron-xielu": __version__,
    }
