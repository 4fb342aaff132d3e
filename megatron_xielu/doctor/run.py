"""`doctor`: what is here, then the checks one after the other, each in a process of its own.

An illegal memory access, a crash or a hang of one check ends its process and no other.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TextIO

from megatron_xielu import __version__
from megatron_xielu.doctor import machine
from megatron_xielu.doctor.checks import CHECKS, Check
from megatron_xielu.training.transformer_engine import Found, reinstall_command

Line = tuple[str, str]


@dataclass(frozen=True)
class Result:
    """What a check said.

    Attributes:
        check: which one.
        verdict: pass, FAIL or skipped.
        said: what was measured, what is wrong, or why it was skipped.
        seconds: what it took.
    """

    check: Check
    verdict: str
    said: str
    seconds: float

    def __str__(self) -> str:
        took = "" if self.verdict == "skipped" and not self.seconds else f"{self.seconds:.1f} s"
        return f"  {self.check.name:<34}{self.verdict:<9}{took:>7}  {self.said}"


def doctor() -> int:
    """Print what is installed and the quick checks; 1 if one of them fails, else 0."""
    begin = time.monotonic()
    found = machine.probe()
    print(f"megatron-xielu {__version__}")
    print(*machine.parts(found), sep="\n", flush=True)
    if found.error is not None and found.version is not None:
        print(f"\nto mend TransformerEngine:\n  {reinstall_command(found.cuda)}")
    print("\nchecks", flush=True)
    results = check_all([check for check in CHECKS if check.quick], found)
    failed = [result.check for result in results if result.verdict == "FAIL"]
    for check in failed:
        variables = [f"{name}={value}" for name, value in check.environment.items()]
        print(
            f"\nall that {check.name!r} says:\n  {shlex.join(['env', *variables, *check.command])}"
        )
    print(f"\n{_summary(results)}, {time.monotonic() - begin:.0f} s")
    return int(bool(failed))


def check_all(checks: Sequence[Check], found: Found) -> list[Result]:
    """Run them in order, each result printed as soon as it is there."""
    results = []
    for check in checks:
        results.append(run(check, found))
        print(results[-1], flush=True)
    return results


def run(check: Check, found: Found) -> Result:
    """One check in a process of its own, or why this machine cannot run it."""
    reason = check.why_not(found)
    if reason is not None:
        return Result(check, "skipped", reason, 0.0)
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **check.environment}
    # of a scheduler, say; a check starts its own ranks
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    with tempfile.TemporaryFile("w+") as log:
        begin = time.monotonic()
        process = subprocess.Popen(
            check.command,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=check.seconds)
            line = _line(process.returncode, output, log)
        except subprocess.TimeoutExpired:
            line = ("FAIL", f"did not end within {check.seconds:.0f} s{_last_line(log)}")
        finally:
            # its own ranks too, after Ctrl-C as well
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return Result(check, *line, time.monotonic() - begin)


def _line(code: int, output: str, log: TextIO) -> Line:
    if code == 0:
        verdict, said = json.loads(output)
        return verdict, said
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return "FAIL", f"ended by {how}{_last_line(log)}"


def _last_line(log: TextIO) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    return f": {lines[-1]}" if lines else ""


def _summary(results: Sequence[Result]) -> str:
    counts = {
        verdict: sum(result.verdict == verdict for result in results)
        for verdict in ("pass", "FAIL", "skipped")
    }
    return f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skipped']} skipped"
