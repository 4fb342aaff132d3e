"""The stop signals: who hears them."""

from __future__ import annotations

import subprocess
import sys

from tests.ranks import environment

# in a new process: Python's resource tracker, which unblocks signals, starts once
HELPER = """
import multiprocessing, os
from megatron_xielu.signals import STOP_SIGNALS, kept_from_children
with kept_from_children():
    manager = multiprocessing.get_context("spawn").Manager()
queue = manager.Queue()
for number in STOP_SIGNALS:
    os.kill(manager._process.pid, number)
queue.put("alive")
print(queue.get())
"""


def test_a_helper_process_outlives_what_is_sent_to_all_of_a_rank() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELPER],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "alive\n", done.stderr
