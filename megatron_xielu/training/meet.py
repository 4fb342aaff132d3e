"""How the ranks of a run meet: they compare themselves, and the network between them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from functools import partial
from pathlib import Path
from typing import TextIO

from megatron_xielu.errors import UnhealthyRun, UserError
from megatron_xielu.launch import network, nodes
from megatron_xielu.launch.local import interface_of, way_to
from megatron_xielu.launch.meeting import Meeting
from megatron_xielu.launch.preflight import gpu_is_busy
from megatron_xielu.training import launch
from megatron_xielu.training.changes import fingerprint
from megatron_xielu.training.job import Job
from megatron_xielu.training.resolve import fuses_weight_gradients

# for a rank that ends anyway, and for rank 0, which may be reading data still
_TELLING_SECONDS = 60.0


def tell_others(error: UserError) -> None:
    """Let a mistake, which may be this machine's alone, end all ranks with one message."""
    if launch.is_child() or launch.world_size() == 1:
        return
    # where rank 0 or others are missing, this rank's own message has to do
    with contextlib.suppress(RuntimeError, UnhealthyRun):
        meeting = Meeting(launch.rank(), launch.world_size(), _TELLING_SECONDS)
        meeting.compare(nodes.Record(socket.gethostname(), problem=str(error)), "start")


def compare_ranks(job: Job, terminal: TextIO) -> Meeting | None:
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
    # on one machine gloo's own choice is right
    address = _own_address() if launch.local_world_size() < job.world_size else None
    record = nodes.Record(socket.gethostname(), facts, problem, address)
    for text in meeting.compare(record, "start"):
        print(f"warning: {text}", file=terminal, flush=True)
    _choose_interface(address, meeting.elsewhere)
    return meeting


def _own_address() -> str | None:
    """This machine's on the way to rank 0's; None where that is 127.x."""
    try:
        address, _ = way_to(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except OSError:
        return None
    return None if ipaddress.ip_address(address.partition("%")[0]).is_loopback else address


def _choose_interface(address: str | None, elsewhere: str | None) -> None:
    """Let gloo take the network that the machines see each other by.

    By itself it takes the address of the host's name, which Debian's /etc/hosts makes 127.0.1.1.
    """
    # where neither is found, gloo's own choice has to do
    with contextlib.suppress(OSError, UserError):
        if address is None and elsewhere is not None:
            address, _ = way_to(elsewhere, int(os.environ["MASTER_PORT"]))
        if address is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
            os.environ["GLOO_SOCKET_IFNAME"] = interface_of(address)


def _busy(gpu: int) -> str | None:
    import torch

    # the memory of such a one is the machine's, of which other programs always have some
    if torch.cuda.get_device_properties(gpu).is_integrated:
        return None
    return gpu_is_busy(gpu, partial(torch.cuda.mem_get_info, gpu))


def check_network(meeting: Meeting, log: Path | None, terminal: TextIO) -> None:
    """Refuse what NCCL chose between machines; it has made a communicator by now.

    Args:
        log: what NCCL said; None where another rank reads it, or the user.
    """
    said = log.read_text(errors="replace") if log is not None and log.exists() else ""
    problem = network.fell_back(said, os.environ)
    meeting.compare(nodes.Record(socket.gethostname(), problem=problem), "network")
    if meeting.rank == 0 and (chosen := network.chosen(said)):
        print(f"NCCL between machines: {chosen}", file=terminal, flush=True)
