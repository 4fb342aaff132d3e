"""`doctor`: what is here, then the checks in their order, each in a process of its own.

An illegal memory access, a crash or a hang of one check ends its process and no other.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

from megatron_xielu import __version__
from megatron_xielu.doctor import machine
from megatron_xielu.doctor.checks import CHECKS, Check
from megatron_xielu.training import isolated
from megatron_xielu.training.transformer_engine import Found, reinstall_command


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
    show_machine(found)
    passed = check_all([check for check in CHECKS if check.quick], found)
    print(f"\n{time.monotonic() - begin:.0f} s in all")
    return 0 if passed else 1


def show_machine(found: Found) -> None:
    """Print what is installed."""
    print(f"megatron-xielu {__version__}")
    print(*machine.parts(found), sep="\n", flush=True)
    if found.error is not None and found.version is not None:
        print(f"\nto mend TransformerEngine:\n  {reinstall_command(found.cuda)}")


def check_all(checks: Sequence[Check], found: Found, workers: int | None = None) -> bool:
    """Run them and print the results in order, each as soon as it is there; whether none failed.

    Args:
        workers: how many run at a time; None means one for every four cores, up to four.
    """
    print("\nchecks", flush=True)
    workers = workers or max(1, min(4, (os.cpu_count() or 1) // 4))
    results = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for result in pool.map(run, checks, repeat(found)):
                results.append(result)
                print(result, flush=True)
        except BaseException:
            # the pool waits for what it runs
            pool.shutdown(wait=False, cancel_futures=True)
            isolated.end_all()
            raise
    failed = [result.check for result in results if result.verdict == "FAIL"]
    for check in failed:
        variables = [f"{name}={value}" for name, value in check.environment.items()]
        print(
            f"\nall that {check.name!r} says:\n  {shlex.join(['env', *variables, *check.command])}"
        )
    print(f"\n{_summary(results)}")
    return not failed


def run(check: Check, found: Found) -> Result:
    """One check in a process of its own, or why this machine cannot run it."""
    reason = check.why_not(found)
    if reason is not None:
        return Result(check, "skipped", reason, 0.0)
    begin = time.monotonic()
    ended = isolated.run(check.command, check.environment, check.seconds)
    if ended.problem is None:
        verdict, said = json.loads(ended.output)
    else:
        verdict, said = "FAIL", ended.problem
    return Result(check, verdict, said, time.monotonic() - begin)


def _summary(results: Sequence[Result]) -> str:
    counts = {
        verdict: sum(result.verdict == verdict for result in results)
        for verdict in ("pass", "FAIL", "skipped")
    }
    return f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skipped']} skipped"
