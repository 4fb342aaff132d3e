"""Local ranks as child processes, one per device, and what their end means."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from megatron_xielu.signals import stop_signals

# a rank whose peer died hangs in a collective; it gets this long to notice by itself
_GRACE_SECONDS = 5.0
ERROR_MARK = "error: "
REFUSED = 2
"""The exit code of what cannot be done as it was asked for, and cannot be tried again."""
_PR_SET_PDEATHSIG = 1
_ERROR_PIPE = "MEGATRON_XIELU_ERROR_PIPE"


class Stopped(BaseException):
    """A signal came before there was a rank to tell; like KeyboardInterrupt, no Exception."""


def is_rank() -> bool:
    """Whether this process is one rank of a run, started here, by torchrun or by srun."""
    return "RANK" in os.environ


def is_child() -> bool:
    """Whether `launch` started this process and reports its end."""
    return _ERROR_PIPE in os.environ


def is_of_torchrun() -> bool:
    """Whether torchrun started this rank."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def end_with_parent() -> None:
    """Let this rank get SIGTERM when the process that started it dies (Linux)."""
    if is_child() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def rank() -> int:
    """This process's rank."""
    return int(os.environ["RANK"])


def local_rank() -> int:
    """This process's rank among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Ranks of this process's run on its machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))


def world_size() -> int:
    """Ranks of this process's run."""
    return int(os.environ["WORLD_SIZE"])


def log_path(log_dir: Path, rank: int) -> Path:
    """The log file of one rank."""
    return log_dir / f"rank_{rank:05d}.log"


def launch(
    arguments: Sequence[str], nproc: int, log_dir: Path, *, keep_open: Sequence[int] = ()
) -> int:
    """Run `python -m megatron_xielu ARGUMENTS` as `nproc` ranks of this machine until they end.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP reach every rank as SIGTERM, which saves and ends the run;
    SIGINT after another of them ends the ranks at once. When a rank fails, the others are ended and
    its error is printed.

    Args:
        keep_open: file descriptors that the ranks inherit.

    Returns:
        0, or the exit code of the rank that failed.
    """
    store = _store()
    ranks: list[subprocess.Popen[bytes]] = []
    errors: list[int] = []
    ended: list[int] = []
    try:
        with _forwarding_signals(ranks) as signals:
            for rank in range(nproc):
                error, error_end = os.pipe()
                errors.append(error)
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "megatron_xielu", *arguments],
                        env=_environment(rank, nproc, store.port, error_end),
                        pass_fds=[error_end, *keep_open],
                        # Ctrl-C reaches this process alone
                        start_new_session=True,
                    )
                )
                os.close(error_end)
            if signals:
                # it came while a rank was being started, which was not in the list yet
                for process in ranks:
                    process.send_signal(signal.SIGTERM)
            _wait(ranks)
            ended = _settle(ranks)
    finally:
        _kill(ranks)
    messages = [_read(error) for error in errors]
    failed = [rank for rank in ended if ranks[rank].returncode]
    # a rank that was stopped before Python could listen ends by the signal itself, which ends the
    # others' attempts to reach it
    if not failed or (signals and any(ranks[r].returncode == -signal.SIGTERM for r in failed)):
        return 0
    rank = min(failed, key=lambda rank: consequence(ranks[rank].returncode, messages[rank]))
    code = ranks[rank].returncode
    message = messages[rank] or explain(rank, code, log_path(log_dir, rank))
    if _at_once(signals):
        message = "stopped at once, without a save; the same command goes on from the last one"
    print(f"{ERROR_MARK}{message}", file=sys.stderr, flush=True)
    return code if code in (1, 2) else 1


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Raise `Stopped` at a stop signal; `launch` has its own way while there are ranks."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped

    kept = {number: signal.signal(number, stop) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


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
    """Send this process's stdout and stderr, C++ included, to a file; yields the terminal.

    What a full disk does not take of them is dropped, so that a log cannot end a run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with open(path, "ab", buffering=0) as log, os.fdopen(os.dup(1), "w", buffering=1) as terminal:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (_log_stream(descriptor) for descriptor in (1, 2))
        try:
            yield terminal
        finally:
            sys.stdout, sys.stderr = streams
            sys.stdout.flush()
            sys.stderr.flush()
            for copy, descriptor in zip(kept, (1, 2), strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)


class _Log(io.RawIOBase):
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Any) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return len(data)


def _log_stream(descriptor: int) -> TextIO:
    return io.TextIOWrapper(_Log(descriptor), errors="backslashreplace", write_through=True)  # type: ignore[type-var]


def _environment(rank: int, nproc: int, port: int, error_end: int) -> Mapping[str, str]:
    threads = max(1, _num_cpus() // nproc)
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
        # torch's names for a store that is served by who started the ranks
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        _ERROR_PIPE: str(error_end),
    }


def _num_cpus() -> int:
    # what this process may use, which in a container is less than what there is
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _store() -> Any:
    """Where the ranks meet, served here: a port that rank 0 opened later might be taken by then."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextmanager
def _forwarding_signals(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if _at_once(received) else signal.SIGTERM)
        if len(received) == 1:
            text = "stopping after this step; Ctrl-C now stops at once"
            print(text, file=sys.stderr, flush=True)

    kept = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        yield received
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _at_once(signals: Sequence[int]) -> bool:
    # a scheduler gives notice by one signal and may repeat it by another while ranks save
    return signal.SIGINT in signals[1:]


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have ended well or one has failed."""
    while True:
        codes = [process.poll() for process in ranks]
        if any(codes) or all(code == 0 for code in codes):
            return
        time.sleep(0.05)


def _settle(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """The ranks that end by themselves within the grace period, which shows who was first."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(0.05)
    return [rank for rank, process in enumerate(ranks) if process.returncode is not None]


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        # the rank's session holds its data loader workers too
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def consequence(code: int, message: str = "") -> int:
    """How likely a rank's end only follows from another's: 0 for what came from outside."""
    if code < 0:
        return 0
    return 2 if "onnection closed by peer" in message or "onnection reset" in message else 1


def explain(rank: int, code: int, log: Path) -> str:
    """How a rank ended that has said nothing itself."""
    if code >= 0:
        return f"rank {rank} ended with exit code {code}; its log is {log}"
    name = signal.Signals(-code).name
    cause = " (the kernel does this when memory runs out)" if name == "SIGKILL" else ""
    return f"rank {rank} was ended by {name}{cause}; its log is {log}"


def _read(descriptor: int) -> str:
    # the process has ended, but a worker it left may still hold the other end
    os.set_blocking(descriptor, False)
    with suppress(BlockingIOError), os.fdopen(descriptor, "rb", buffering=0) as pipe:
        return (pipe.read(1 << 16) or b"").decode(errors="replace")
    return ""
