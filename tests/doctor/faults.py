"""Checks that go wrong in every way a check can."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_xielu.doctor.outcome import Failed, Skipped


def crashes() -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return "never"


def raises() -> str:
    raise ValueError("what went wrong")


def fails() -> str:
    print("noise on standard output")
    raise Failed("3 is not 4")


def skips() -> str:
    raise Skipped("there is none")


def hangs(note: str) -> str:
    """With a process of its own, whose number it writes down."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(note).write_text(str(child.pid))
    time.sleep(600)
    return "never"


def meets(folder: str) -> str:
    """Passes if another one is there at the same time."""
    Path(folder, str(os.getpid())).touch()
    for _ in range(200):
        if len(list(Path(folder).iterdir())) == 2:
            return "two at a time"
        time.sleep(0.1)
    raise Failed("alone")


def sees() -> str:
    return f"{os.environ['CUDA_VISIBLE_DEVICES']!r} {'RANK' in os.environ}"
