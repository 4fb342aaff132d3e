"""What would let a run hang or fail later, found before it starts, each with its remedy."""

from __future__ import annotations

import ipaddress
import os
import re
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_xielu.analysis.planner import count_parameters
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe

_GIB = 1 << 30
# NVIDIA's container guide starts torch with --shm-size=1g
_SHM = _GIB
# RDMA registers buffers of NCCL's, which the common default of 64 KiB to 8 MiB does not hold
_MEMLOCK = 64 << 20
# of a rank alone (libraries, logs, data), and for each peer: an allowance, not a measurement
_FILES, _FILES_PER_PEER = 256, 4
# task 0 of srun serves the meeting only after it has read the data
_MEETING_SECONDS = 300.0
_OWN_MEETING_SECONDS = 60.0
# this rank's own context, a desktop's and a monitor's; a program that computes takes more
_GPU_TAKEN = 2 * _GIB
# until the memory of a run that was killed is free again
_GPU_SECONDS = 30.0
# linux/capability.h
_CAP_IPC_LOCK = 14


def check_machine(
    *,
    world_size: int,
    shared_memory: bool,
    shm: Path = Path("/dev/shm"),
    infiniband: Path = Path("/dev/infiniband"),
    status: Path = Path("/proc/self/status"),
) -> None:
    """Refuse limits of this machine that a run would meet later.

    Args:
        shared_memory: its ranks pass data through `shm`, as NCCL does between GPUs.
        status: the kernel's words on this process.

    Raises:
        UserError: with all that is too low.
    """
    problems = []
    if shared_memory and shm.is_dir() and (free := shutil.disk_usage(shm).free) < _SHM:
        problems.append(
            f"{shm} has {free / _GIB:.2f} GiB free, and NCCL between GPUs needs "
            "1 GiB: start the container with --ipc=host or --shm-size=1g (Kubernetes: an emptyDir "
            "of medium Memory at /dev/shm)"
        )
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES + _FILES_PER_PEER * world_size
    if files != resource.RLIM_INFINITY and files < needed:
        problems.append(
            f"{files} open files are allowed, and {world_size} ranks may need {needed} each: "
            f"ulimit -n {needed} (docker: --ulimit nofile={needed})"
        )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    little = locked != resource.RLIM_INFINITY and locked < _MEMLOCK
    if infiniband.exists() and little and not _may_lock_all(status):
        problems.append(
            f"{locked / 1024:.0f} KiB of locked memory are allowed, too little for {infiniband}: "
            "ulimit -l unlimited (docker: --ulimit memlock=-1, or --cap-add IPC_LOCK)"
        )
    if problems:
        raise UserError("\n".join(problems))


def _may_lock_all(status: Path) -> bool:
    """Whether this process has the capability that makes the limit of locked memory void."""
    found = re.search(r"^CapEff:\s*(\w+)$", status.read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> _CAP_IPC_LOCK & 1)


def gpu_is_busy(
    index: int, memory: Callable[[], tuple[int, int]], seconds: float = _GPU_SECONDS
) -> str | None:
    """Why a rank should not start on its GPU: another program has memory there; None if not.

    Args:
        index: of the GPU, as torch counts.
        memory: free and all bytes, as `torch.cuda.mem_get_info` gives them.
        seconds: what a run that was killed gets to let go of it.
    """
    deadline = time.monotonic() + seconds
    while True:
        free, total = memory()
        if total - free <= _GPU_TAKEN:
            return None
        if time.monotonic() > deadline:
            return (
                f"GPU {index} has {(total - free) / _GIB:.1f} of {total / _GIB:.1f} GiB taken "
                f"before the run starts (up to {_GPU_TAKEN / _GIB:.0f} are let pass): `nvidia-smi` "
                "names the processes; end them, or choose other GPUs (CUDA_VISIBLE_DEVICES)"
            )
        time.sleep(0.5)


def checkpoint_bytes(recipe: Recipe) -> int:
    """A save's size, computed: the weights, and AdamW's fp32 copy of them with its two moments.

    Megatron's distributed optimizer saves that copy of fp32 weights too.
    """
    return count_parameters(recipe.model) * (14 if recipe.training.precision == "bf16" else 16)


def check_disk(recipe: Recipe, run_dir: Path, step: int) -> None:
    """Refuse a disk without room for the next three saves, or as many as there will be at a time.

    Args:
        step: that training goes on from.

    Raises:
        UserError: with what is there and what is needed.
    """
    saves = -(-(recipe.training.train_iters - step) // recipe.checkpoint.save_interval)
    if recipe.checkpoint.keep_last is not None:
        # an old one goes when the new one is whole
        saves = min(saves, recipe.checkpoint.keep_last + 1)
    saves = max(0, min(saves, 3))
    size, free = checkpoint_bytes(recipe), shutil.disk_usage(run_dir).free
    if free < saves * size:
        raise UserError(
            f"the disk of {run_dir} has {_size(free)} free, and the next {saves} saves need "
            f"{_size(saves * size)} ({_size(size)} each): make room, choose another --run-dir, or "
            "keep fewer (checkpoint.keep_last)"
        )


def await_meeting(host: str, port: int, seconds: float | None = None) -> None:
    """Wait until rank 0's machine answers; torch would wait in silence, and for good at itself.

    Args:
        seconds: at most; None means 5 minutes, or one for an address of this machine.

    Raises:
        UserError: it cannot be resolved or does not answer.
    """
    try:
        target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4]
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={host} cannot be resolved here ({error.strerror}): set it to an address "
            "of rank 0's machine; in a container without a network, to 127.0.0.1"
        ) from error
    own = ipaddress.ip_address(str(target[0])).is_loopback
    if seconds is None:
        seconds = _OWN_MEETING_SECONDS if own else _MEETING_SECONDS
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((str(target[0]), port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                why = f"MASTER_ADDR={host} (port {port}) does not answer: {error}. "
                if own:
                    why += (
                        f"{target[0]} is this machine, not rank 0's, whose host name stands for "
                        "127.x there: give torchrun there --local-addr ADDRESS, as "
                        "`megatron-xielu launch local` does, or set MASTER_ADDR"
                    )
                else:
                    why += "Is rank 0 running, and does a firewall let this port through?"
                raise UserError(why) from error
        time.sleep(0.5)


def hold_node_id(address: str, pid: int | None = None) -> None:
    """Refuse to be a torchrun that another one of this machine cannot be told from.

    torchrun's nodes are known by address and process id. Two containers on a host's own network
    have the same address and often the same process ids, and would wait for a second node for good.
    The name is held, through `exec`, until the process ends.

    Args:
        pid: of the torchrun to come; None means this process.

    Raises:
        UserError: another one has it.
    """
    if sys.platform != "linux":
        return
    pid = os.getpid() if pid is None else pid
    # of the abstract kind, which belongs to a network and not to a file system
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(f"\0megatron-xielu {address} {pid}")
    except OSError as error:
        holder.close()
        raise UserError(
            f"another torchrun at {address} has the process id {pid} too, so that the nodes would "
            "take them for one and wait for good: give containers addresses of their own instead "
            "of --network host, or run one per machine"
        ) from error
    holder.set_inheritable(True)
    holder.detach()


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
