"""Work in a process of its own, so that a crash or a hang of it is a result and not an end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

_running: set[int] = set()
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        output: its standard output.
        problem: None after exit code 0, else one line for people.
    """

    output: str
    problem: str | None


def run(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> Ended:
    """Run a command and end it, with everything that it started, after so many seconds.

    Args:
        environment: variables besides this process's own, of which those of a rank are left out.
    """
    variables = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    with tempfile.TemporaryFile("w+") as errors:
        output, problem = "", None
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**variables, "PYTHONWARNINGS": "ignore", **environment},
            text=True,
            start_new_session=True,
        ) as process:
            _running.add(process.pid)
            try:
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                problem = f"did not end within {seconds:.0f} s"
            finally:
                # its own children too, after Ctrl-C as well
                _kill(process.pid)
                _running.discard(process.pid)
        if problem is None and process.returncode:
            code = process.returncode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            problem = f"ended by {how}"
        if problem is not None:
            errors.seek(0)
            # torch marks the lines of a rank that ends by an exception
            said = [re.sub(r"^\[rank\d+\]: *", "", line).strip() for line in errors if line.strip()]
            problem = ": ".join([problem, *said[-1:]])
    return Ended(output, problem)


def end_all() -> None:
    """End what other threads' calls of `run` wait for, so that they return."""
    for group in list(_running):
        _kill(group)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
