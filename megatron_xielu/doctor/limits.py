"""What this machine allows a run, apart from what it computes."""

from __future__ import annotations

import ipaddress
import resource
import socket
from pathlib import Path

from megatron_xielu.doctor.outcome import Failed
from megatron_xielu.errors import UserError
from megatron_xielu.launch.preflight import check_machine

_GPU = Path("/dev/nvidiactl")
# a host of eight GPUs
_RANKS = 8


def enough() -> str:
    """Open files, shared and locked memory for 8 ranks, and what this host's name stands for."""
    try:
        check_machine(world_size=_RANKS, shared_memory=_GPU.exists())
    except UserError as error:
        raise Failed(str(error)) from error
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = f"enough for {_RANKS} ranks, {files:,} open files"
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return f"{said}; this host's name has no address: with several, use `launch local`"
    if ipaddress.ip_address(address).is_loopback:
        said += f"; this host's name is {address}: with several, use `launch local`"
    return said
