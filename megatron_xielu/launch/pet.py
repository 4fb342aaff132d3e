"""A node that PET_* variables describe, as on Kubernetes: `pretrain` is torchrun there."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from megatron_xielu.errors import UserError
from megatron_xielu.launch.join import SIGNALS_TO_HANDLE, STOP_SECONDS
from megatron_xielu.launch.local import interface_of, meeting, own_address, split_endpoint
from megatron_xielu.launch.preflight import hold_node_id
from megatron_xielu.training import launch

STOPPED = 75
"""The exit code of what is to be started again and go on; EX_TEMPFAIL of sysexits.h.

Kubernetes would not start a pod again that ended with 0, and the others would wait for it.
"""
_RESTARTS = 3
_PORT = 29500
# the first node may be pulling its image, or be started again
_HEAD_SECONDS = 600.0


def is_node() -> bool:
    """Whether PET_* describe a torchrun that nobody has started."""
    return not launch.is_rank() and _is_described()


def stopped_code() -> int:
    """The exit code of a rank that has saved because of a signal, before the run's last step."""
    return STOPPED if launch.is_of_torchrun() and _is_described() else 0


def _is_described() -> bool:
    return bool({"PET_NNODES", "PET_NPROC_PER_NODE"} & {*os.environ})


def become_torchrun(words: Sequence[str]) -> NoReturn:
    """Be this node's torchrun until the run is over, and end this process.

    Variables that are set stay. The exit code is 0 where the run is done, `STOPPED` where a signal
    stopped it or this node has lost the others, 2 where the ranks refuse what they were given, and
    else 1.

    Args:
        words: of `megatron-xielu`: the command of every rank.

    Raises:
        UserError: the variables name no meeting point, or one at 127.x.
    """
    defaults = {
        "PET_SHUTDOWN_TIMEOUT": str(STOP_SECONDS),
        "PET_SIGNALS_TO_HANDLE": SIGNALS_TO_HANDLE,
        # with c10d a replaced node joins again only so (torch 2.13)
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    # torchrun's own default knows no second meeting, so that no node could be replaced
    if "PET_RDZV_BACKEND" not in os.environ:
        defaults |= {"PET_MAX_RESTARTS": str(_RESTARTS), **_meeting(os.environ)}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    sys.stdout.flush()
    _run(["-m", "megatron_xielu", *words])


def _meeting(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables by which this node meets the others; waits for the first one."""
    if environment.get("PET_NNODES", "1") in ("1", "1:1"):
        return {
            "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ENDPOINT": "127.0.0.1:0",
            "PET_LOCAL_ADDR": "127.0.0.1",
        }
    if "PET_RDZV_ENDPOINT" in environment:
        given = f"PET_RDZV_ENDPOINT={environment['PET_RDZV_ENDPOINT']}"
    elif "PET_MASTER_ADDR" in environment:
        given = f"PET_MASTER_ADDR={environment['PET_MASTER_ADDR']}"
        given += f":{environment.get('PET_MASTER_PORT', _PORT)}"
    else:
        raise UserError(
            f"PET_NNODES={environment['PET_NNODES']} needs a meeting point: set PET_MASTER_ADDR to "
            "the name of the first node"
        )
    option, _, head = given.partition("=")
    host, port = split_endpoint(head, option)
    _wait(lambda: socket.getaddrinfo(host, port), host)
    address, is_head = own_address(host, port, option)
    # the name of a node that was replaced may still have its old address
    number = environment.get("PET_NODE_RANK", environment.get("JOB_COMPLETION_INDEX"))
    if number is not None:
        is_head = number == "0"
    if not is_head:
        # torchrun would give up after a minute
        _wait(lambda: socket.create_connection((host, port), timeout=5).close(), host)
    hold_node_id(address)
    # every run has a first node of its own, so its name tells runs from each other
    options = meeting(host, port, host, address=address, is_head=is_head)
    variables = {f"PET_{o.upper().replace('-', '_')}": value for o, value in options.items()}
    # otherwise gloo uses the address of this host's name, which may be 127.x
    return {**variables, "GLOO_SOCKET_IFNAME": interface_of(address)}


def _wait(reach: Callable[[], object], host: str) -> None:
    deadline = time.monotonic() + _HEAD_SECONDS
    while True:
        try:
            reach()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                _end_parted(f"no answer from the first node {host}: {error}")
        time.sleep(1)


def _run(words: Sequence[str]) -> NoReturn:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import (
        RendezvousConnectionError,
        RendezvousTimeoutError,
    )
    from torch.distributed.run import main

    from megatron_xielu.launch.agent import recorded

    try:
        with recorded():
            main(words)
    except SignalException:
        # the ranks have said what became of them
        sys.exit(STOPPED)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        sys.exit(next((code for code in (launch.REFUSED, STOPPED) if code in codes), 1))
    except RendezvousConnectionError as error:
        cause = str(error.__cause__ or error).partition("\n")[0]
        _end_parted(f"no answer from the first node: {cause}")
    except RendezvousTimeoutError:
        _end_parted(f"not all of {os.environ['PET_NNODES']} nodes came in time")
    sys.exit(0)


def _end_parted(problem: str) -> NoReturn:
    text = "Start this node again, and those that are lost: the run goes on from its last save."
    print(f"{launch.ERROR_MARK}{problem}\n{text}", file=sys.stderr, flush=True)
    sys.exit(STOPPED)
