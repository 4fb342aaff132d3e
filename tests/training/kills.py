"""Kill a run at random moments, start it again, and again, until it ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megatron_xielu.checkpoint.store import Store
from tests.ranks import environment


@dataclass
class Tally:
    """What came of the kills."""

    anywhere: int = 0
    inside_saves: int = 0
    resumed_from: list[int] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.anywhere + self.inside_saves


def run_and_kill(
    words: Sequence[str],
    run_dir: Path,
    ranks_of: Callable[[int], dict[int, int]],
    *,
    kills: int,
    seed: int,
) -> Tally:
    """Run the command until it ends well, with up to `kills` kills of a random rank on the way.

    The first comes inside a save; of the others half do, and half at a random moment after the
    start, which a run may not live to see. After each kill the newest step must be whole to the
    last byte, and no older than it was.
    """
    chance = random.Random(seed)
    tally = Tally()
    target: str | None
    while True:
        target = chance.choice(("anywhere", "inside_saves")) if tally.kills else "inside_saves"
        if tally.kills == kills:
            target = None
        process = subprocess.Popen(
            words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            if target is not None and _wait_for(target, process, run_dir, chance):
                ranks = ranks_of(process.pid)
                with suppress(ProcessLookupError, IndexError):
                    # the moment may be the one at which all of them end
                    os.kill(chance.choice(list(ranks.values())), signal.SIGKILL)
            _, errors = process.communicate(timeout=800)
        finally:
            process.kill()
        if process.returncode == 0:
            return tally
        assert target is not None, errors
        assert "was ended by SIGKILL" in errors, errors
        setattr(tally, target, getattr(tally, target) + 1)
        tally.resumed_from.append(_newest_whole(run_dir))
        assert tally.resumed_from == sorted(tally.resumed_from)


def _wait_for(
    target: str, process: subprocess.Popen[str], run_dir: Path, chance: random.Random
) -> bool:
    """Wait for the moment; returns False where the run ended before it came."""
    staging = run_dir / "checkpoints/.saving"
    # whether it comes while modules are imported, in a step or in a save is left to the clock
    deadline = time.monotonic() + chance.uniform(0.5, 12.0)
    saves_left = chance.randint(0, 5)
    was_saving = False
    while process.poll() is None:
        saving = staging.is_dir()
        if target == "anywhere" and time.monotonic() > deadline:
            return True
        if target == "inside_saves" and saving and not was_saving:
            if not saves_left:
                time.sleep(chance.uniform(0.0, 0.06))
                return True
            saves_left -= 1
        was_saving = saving
        time.sleep(0.001)
    return False


def _newest_whole(run_dir: Path) -> int:
    store = Store(run_dir / "checkpoints")
    latest = store.latest()
    if latest:
        assert store.problems(latest, checksums=True) == []
    return latest
