"""torchrun on machines that no scheduler manages: the same command on each of them."""

from __future__ import annotations

import ipaddress
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from signal import SIGTERM
from typing import NoReturn

from megatron_xielu.errors import UserError
from megatron_xielu.launch.job import Job, Setting, name_of, settings
from megatron_xielu.launch.join import SIGNALS_TO_HANDLE
from megatron_xielu.launch.preflight import hold_node_id
from megatron_xielu.training.launch import ERROR_MARK, REFUSED, consequence, explain, log_path

PORT = 29400
_RESTARTS = 3
# torch's default, given so that what is said of it is true
_JOIN_SECONDS = 600


def split_endpoint(head: str, option: str = "--head") -> tuple[str, int]:
    """Host and port of HOST or HOST:PORT.

    Args:
        option: how the user gave it.

    Raises:
        UserError: the port is no number.
    """
    host, sign, port = head.partition(":")
    if not host or (sign and not (port.isdecimal() and 0 < int(port) < 1 << 16)):
        raise UserError(f"{option} {head} must be HOST or HOST:PORT, as in node0:{PORT}")
    return host, int(port or PORT)


def meeting_point(job: Job, head: str | None) -> tuple[str, int]:
    """Host and port where the nodes of a job meet.

    Raises:
        UserError: there is none, or the port is no number.
    """
    if head is None:
        raise UserError(
            f"--nodes {job.nodes} needs a meeting point: give --head HOST, the first node's name, "
            "on each of them"
        )
    return split_endpoint(head)


def way_to(host: str, port: int) -> tuple[str, str]:
    """This machine's address on the way to a host, and the host's.

    Raises:
        OSError: there is no way to it.
    """
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        # of UDP: chooses a way and sends nothing
        probe.connect(target)
        return str(probe.getsockname()[0]), str(target[0])


def own_address(host: str, port: int, option: str = "--head") -> tuple[str, bool]:
    """This machine's address on the way to a host, and whether it is that host.

    Args:
        option: how the user gave the host.

    Raises:
        UserError: there is no way to it, or the name stands for every machine itself.
    """
    try:
        address, target = way_to(host, port)
    except OSError as error:
        raise UserError(
            f"{option} {host} cannot be reached from here: {error.strerror}. Give the name or "
            "address of the first node as the others see it."
        ) from error
    if ipaddress.ip_address(target).is_loopback:
        raise UserError(
            f"{option} {host} is {target} here, which every node takes for itself, so that they "
            "would wait for each other for good: give the address by which the others see that "
            "node (/etc/hosts may map its own name to 127.x)"
        )
    return address, address == target


def interface_of(address: str) -> str:
    """The network interface that has an address of this machine's."""
    import psutil

    for name, found in psutil.net_if_addrs().items():
        if address in (each.address for each in found):
            return name
    raise UserError(
        f"no network interface has this machine's address {address}: set GLOO_SOCKET_IFNAME to the "
        "one by which the nodes see each other"
    )


def meeting(host: str, port: int, run: str, *, address: str, is_head: bool) -> dict[str, str]:
    """torchrun's options by which a node meets the others, and meets them again.

    Args:
        run: a name that all nodes of the run give.
        address: this node's own.
        is_head: the others meet at this node.
    """
    return {
        "rdzv-backend": "c10d",
        "rdzv-endpoint": f"{host}:{port}",
        "rdzv-id": run,
        "rdzv-conf": f"is_host={int(is_head)},join_timeout={_JOIN_SECONDS}",
        "local-addr": address,
    }


def torchrun(job: Job, head: str | None) -> tuple[list[Setting], list[str]]:
    """Variables and command for this machine.

    Args:
        head: where the nodes meet; None on one node.

    Raises:
        UserError: the recipe or the meeting point is wrong.
    """
    recipe = job.load()
    folder = job.folder(recipe).absolute()
    variables = settings(recipe, job.megatron_flags, job.fabric)
    words = [sys.executable, "-m", "torch.distributed.run"]
    words += ["--nnodes", str(job.nodes), "--nproc-per-node", str(job.gpus_per_node)]
    if job.nodes == 1:
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        words += ["--local-addr", "127.0.0.1"]
    else:
        host, port = meeting_point(job, head)
        address, is_head = own_address(host, port)
        options = meeting(host, port, name_of(folder), address=address, is_head=is_head)
        words += [word for name, value in options.items() for word in (f"--{name}", value)]
        if "GLOO_SOCKET_IFNAME" not in os.environ:
            reason = "otherwise gloo uses the address of this host's name, which may be 127.x"
            variables.append(Setting("GLOO_SOCKET_IFNAME", interface_of(address), reason))
        if job.fabric == "ethernet" and "NCCL_SOCKET_IFNAME" not in os.environ:
            reason = "the way to the other nodes: NCCL would take any that is not lo or docker"
            # = is for this name, not for all that begin with it
            variables.append(Setting("NCCL_SOCKET_IFNAME", f"={interface_of(address)}", reason))
        reason = "otherwise a node that was replaced never joins again (torch 2.13)"
        variables.append(Setting("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1", reason))
    words += ["--max-restarts", str(_RESTARTS), "--shutdown-timeout", str(job.stop_seconds)]
    words += ["--signals-to-handle", SIGNALS_TO_HANDLE, "-m", "megatron_xielu"]
    return variables, [*words, *job.arguments(folder)]


def render(job: Job, head: str | None) -> str:
    """The command of this machine as a shell script, with the reasons."""
    variables, words = torchrun(job, head)
    lines = ["#!/bin/sh"]
    if job.nodes > 1:
        lines += [
            f"# of {job.nodes} nodes this one; the others give the same `megatron-xielu launch`",
            "# --local-addr: a host name may stand for 127.x, where every node meets itself alone",
            "# is_host: which node serves the meeting, which torchrun guesses from host names",
        ]
    lines += [
        f"# --shutdown-timeout: ranks get {job.stop_seconds} s to save after a signal, not 30",
        "# --signals-to-handle: by default SIGUSR1 kills torchrun and leaves its ranks",
    ]
    for setting in variables:
        lines += [f"# {setting.reason}", f"export {setting.name}={shlex.quote(setting.value)}"]
    return "\n".join([*lines, f"exec {wrapped(words)}", ""])


def wrapped(words: Sequence[str]) -> str:
    """A shell's command with one option per line."""
    text = shlex.join(words[:3])
    for word in words[3:]:
        text += (" \\\n  " if word.startswith("-") else " ") + shlex.quote(word)
    return text


def run(job: Job, head: str | None) -> NoReturn:
    """Be this machine's torchrun until the run is over, and end this process.

    The exit code is 0 where the run is done or was stopped and saved, 2 where it cannot start as it
    was given, which is not tried again, and else 1.

    Raises:
        UserError: it could not be told from another one, or its port is taken.
    """
    variables, words = torchrun(job, head)
    if job.nodes > 1:
        hold_node_id(words[words.index("--local-addr") + 1])
    for setting in variables:
        os.environ[setting.name] = setting.value
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import (
        RendezvousConnectionError,
        RendezvousTimeoutError,
    )
    from torch.distributed.run import main

    from megatron_xielu.launch.agent import recorded
    from megatron_xielu.training.run_dir import LOGS

    try:
        # within this process, because what torchrun raises is a long traceback without a remedy
        with recorded() as agents:
            main(words[words.index("torch.distributed.run") + 1 :])
    except SignalException as stop:
        # the ranks have said what became of them
        sys.exit(0 if all(agent.stopped_well(stop.sigval) for agent in agents) else 1)
    except ChildFailedError as error:
        if REFUSED in (failure.exitcode for failure in error.failures.values()):
            # a rank has said why
            sys.exit(REFUSED)
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        # torch's own times are too coarse to tell who was first; it ends the others by SIGTERM
        rank = min(codes, key=lambda rank: (codes[rank] == -SIGTERM, consequence(codes[rank])))
        log = log_path(job.folder(job.load()) / LOGS, rank)
        problem = f"{explain(rank, codes[rank], log)}. torchrun had started it again "
        problem += f"{_RESTARTS} times."
    except RendezvousConnectionError as error:
        cause = str(error.__cause__ or error).partition("\n")[0]
        if "EADDRINUSE" in cause:
            raise UserError(
                f"the port of --head {head} is taken on this machine, by another run's torchrun or "
                f"by another program: give another one on every node, as in --head HOST:{PORT + 1}"
            ) from error
        problem = (
            f"no answer from the head {head}: {cause}\nIs the same command running there, and does "
            "a firewall let its port through? If the head was lost, give the command again on "
            "every node; if only the way to it was, on this one."
        )
    except RendezvousTimeoutError:
        problem = (
            f"not all of {job.nodes} nodes came within {_JOIN_SECONDS} s. Give the same command on "
            "each of them, or on others in place of those that are lost."
        )
    else:
        sys.exit(0)
    print(f"{ERROR_MARK}{problem} The run goes on from its last save.", file=sys.stderr)
    sys.exit(1)
