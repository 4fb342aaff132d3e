"""Local ranks as child processes, one per device, and what their end means."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

# a rank whose peer died hangs in a collective; it gets this long to notice by itself
_GRACE_SECONDS = 5.0
ERROR_MARK = "error: "
_ERROR_PIPE = "MEGATRON_XIELU_ERROR_PIPE"


def is_rank() -> bool:
    """Whether this process is one rank of a run, started here or by torchrun."""
    return "RANK" in os.environ


def is_child() -> bool:
    """Whether `launch` started this process and reports its end."""
    return _ERROR_PIPE in os.environ


def rank() -> int:
    """This process's rank."""
    return int(os.environ["RANK"])


def local_rank() -> int:
    """This process's rank among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Ranks of this process's run."""
    return int(os.environ["WORLD_SIZE"])


def log_path(log_dir: Path, rank: int) -> Path:
    """The log file of one rank."""
    return log_dir / f"rank_{rank:05d}.log"


def launch(arguments: Sequence[str], nproc: int, log_dir: Path) -> int:
    """Run `python -m megatron_xielu ARGUMENTS` as `nproc` ranks of this machine until they end.

    SIGINT and SIGTERM reach every rank as SIGTERM, which saves and ends the run; a second one ends
    the ranks at once. When a rank fails, the others are ended and its error is printed.

    Returns:
        0, or the exit code of the first rank that failed.
    """
    port = _free_port()
    ranks, errors = [], []
    for rank in range(nproc):
        error, error_end = os.pipe()
        errors.append(error)
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "megatron_xielu", *arguments],
                env=_environment(rank, nproc, port, error_end),
                pass_fds=[error_end],
                # Ctrl-C reaches this process alone
                start_new_session=True,
            )
        )
        os.close(error_end)
    try:
        with _forwarding_signals(ranks):
            failed = _wait(ranks)
    finally:
        _end(ranks)
    messages = [_read(error) for error in errors]
    if failed is None:
        return 0
    code = ranks[failed].returncode
    message = messages[failed] or _explain(failed, code, log_path(log_dir, failed))
    print(f"{ERROR_MARK}{message}", file=sys.stderr, flush=True)
    return code if code in (1, 2) else 1


def report_error(message: str, terminal: TextIO) -> None:
    """Tell the user why this rank fails: through `launch`, which shows one rank's, or directly.

    It does not use the log, which may be on the disk that is full.
    """
    if is_child():
        os.write(int(os.environ[_ERROR_PIPE]), message.encode())
    else:
        print(f"{ERROR_MARK}{message}", file=terminal, flush=True)


@contextmanager
def logged_to(path: Path) -> Iterator[TextIO]:
    """Send this process's stdout and stderr, C++ included, to a file; yields the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with open(path, "ab", buffering=0) as log, os.fdopen(os.dup(1), "w", buffering=1) as terminal:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        try:
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for copy, descriptor in zip(kept, (1, 2), strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)


def _environment(rank: int, nproc: int, port: int, error_end: int) -> Mapping[str, str]:
    threads = max(1, (os.cpu_count() or 1) // nproc)
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        # torch on a CPU: large buffers in huge pages, which page faults otherwise dominate
        "THP_MEM_ALLOC_ENABLE": "1",
    }
    return {
        **defaults,
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _ERROR_PIPE: str(error_end),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _forwarding_signals(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if len(received) == 1 else signal.SIGKILL)
        if len(received) == 1:
            print("stopping after this step; again to stop at once", file=sys.stderr, flush=True)

    kept = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The first rank that failed, or None when all have ended well."""
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in ranks:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _explain(rank: int, code: int, log: Path) -> str:
    if code >= 0:
        return f"rank {rank} ended with exit code {code}; its log is {log}"
    name = signal.Signals(-code).name
    cause = " (the kernel does this when memory runs out)" if name == "SIGKILL" else ""
    return f"rank {rank} was ended by {name}{cause}; its log is {log}"


def _read(descriptor: int) -> str:
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as pipe:
        return pipe.read()
