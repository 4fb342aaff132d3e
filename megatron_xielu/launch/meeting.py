"""Where the ranks of a run compare themselves, before they share a process group.

It goes through the store that torch's process group meets at as well, so that it needs no
collective: a rank that is missing can be named, and ranks that could not share one learn why.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from megatron_xielu.errors import SharedUserError, UnhealthyRun
from megatron_xielu.launch import nodes
from megatron_xielu.launch.nodes import Record

# Megatron's default for what it waits for itself
_SECONDS = 600.0
# to hear of the verdict, before rank 0 and the store that it serves may be gone
_HEARING_SECONDS = 10.0
# a synchronised clock is right within milliseconds; times in the nodes' logs are in seconds
_CLOCKS_APART = 1.0
# torchrun's nodes write the time every 5 seconds, and the others take one for dead whose last time
# is 15 seconds old by their own clocks (torch 2.13, dynamic_rendezvous.py)
_CLOCKS_HANG = 10.0


class Meeting:
    """The ranks of a run, as long as this object lives: rank 0 serves the store until then.

    Args:
        rank, world_size: this process's.
        seconds: what a rank is waited for.
        clock: this machine's, which is compared too.

    Raises:
        DistNetworkError: rank 0 cannot be reached at MASTER_ADDR and MASTER_PORT.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        seconds: float = _SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.rank = rank
        self.elsewhere: str | None = None
        """An address of another machine than rank 0's, once a comparison has heard of one."""
        self._world_size = world_size
        self._seconds = seconds
        self._clock = clock
        # as torch's env:// does it, but without a wait for all, which would not say who is missing
        served_elsewhere = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size,
            is_master=rank == 0 and not served_elsewhere,
            timeout=timedelta(seconds=2 * seconds),
            multi_tenant=not served_elsewhere,
            wait_for_workers=False,
        )
        # not by attempt: torchrun's nodes count their restarts each for itself
        self._store = PrefixStore("megatron_xielu", store)

    def compare(self, record: Record, about: str) -> list[str]:
        """Hear on all ranks whether they can go on together.

        Args:
            record: of this rank.
            about: a name for this comparison, the same on all ranks and used once.

        Returns:
            What differs without harm, on rank 0; nothing on the others.

        Raises:
            SharedUserError: they cannot; the text is the same on all ranks.
            UnhealthyRun: a rank is missing; likewise.
        """
        store = PrefixStore(about, self._store)
        store.set(f"record/{self.rank}", json.dumps(asdict(record)))
        if self.rank == 0:
            verdict, harmless = self._judge(store)
            store.set("verdict", json.dumps(verdict))
            self._clear(store)
        else:
            harmless = []
            store.get("go")
            store.set(f"clock/{self.rank}", repr(self._clock()))
            verdict = json.loads(store.get("verdict"))
            store.set(f"heard/{self.rank}", "")
        self.elsewhere = verdict.get("elsewhere", self.elsewhere)
        match verdict:
            case {"refused": str(text)}:
                raise SharedUserError(text)
            case {"missing": str(text)}:
                raise UnhealthyRun(text)
        return harmless

    def _judge(self, store: PrefixStore) -> tuple[dict[str, str], list[str]]:
        keys = [f"record/{rank}" for rank in range(self._world_size)]
        try:
            store.wait(keys, timedelta(seconds=self._seconds))
        except DistStoreError:
            store.set("go", "")
            return {"missing": self._missing(store, keys)}, []
        records = [Record(**json.loads(store.get(key))) for key in keys]
        refused = nodes.refusal(records)
        if refused is not None:
            # a rank with a problem may be gone by now, and would tell no time
            store.set("go", "")
            return {"refused": refused}, []
        clocks, apart = clocks_apart(records, self._clocks(store))
        if apart > _CLOCKS_HANG and "TORCHELASTIC_RUN_ID" in os.environ:
            refused = (
                f"{clocks}: torchrun's nodes take each other for dead where they are "
                f"{_CLOCKS_HANG:.0f} s apart or more, and lose them. Start a time service on all "
                "nodes (chronyd; `chronyc tracking` shows how it stands)"
            )
            return {"refused": refused}, []
        harmless = nodes.warnings(records)
        if clocks:
            harmless.append(
                f"{clocks}: nothing here waits for a clock, but the times in their logs do not "
                "fit together (`chronyc tracking` shows how a node's clock stands)"
            )
        addresses = [record.address for record in records if record.address is not None]
        return {"elsewhere": addresses[0]} if addresses else {}, harmless

    def _clocks(self, store: PrefixStore) -> list[tuple[float, float]]:
        """How far each rank's clock is ahead of this one's, between two bounds.

        A rank reads its clock after "go" is set and before its answer is here. How long anyone
        waited only widens the bounds.
        """
        before = self._clock()
        store.set("go", "")
        bounds = [(0.0, 0.0)]
        for rank in range(1, self._world_size):
            clock = float(store.get(f"clock/{rank}"))
            bounds.append((clock - self._clock(), clock - before))
        return bounds

    def _missing(self, store: PrefixStore, keys: Sequence[str]) -> str:
        here = {rank for rank, key in enumerate(keys) if store.check([key])}
        missing = [rank for rank in range(self._world_size) if rank not in here]
        hosts = sorted({json.loads(store.get(keys[rank]))["host"] for rank in here})
        return (
            f"{nodes.numbers(missing)} of {self._world_size} did not come within "
            f"{self._seconds:.0f} s; the others are on {', '.join(hosts)}. A rank that is missing "
            "was not started or has failed: its own node's output says why"
        )

    def _clear(self, store: PrefixStore) -> None:
        """Wait until all have heard, and leave nothing.

        torchrun may keep a store for the ranks that it starts again.
        """
        # those that are missing, or had a problem and ended, do not hear
        with contextlib.suppress(DistStoreError):
            heard = [f"heard/{rank}" for rank in range(1, self._world_size)]
            store.wait(heard, timedelta(seconds=_HEARING_SECONDS))
        for name in ("record", "clock", "heard"):
            for rank in range(self._world_size):
                store.delete_key(f"{name}/{rank}")
        store.delete_key("go")
        store.delete_key("verdict")


def clocks_apart(
    records: Sequence[Record], bounds: Sequence[tuple[float, float]]
) -> tuple[str, float]:
    """Which nodes' clocks are surely more than a second from rank 0's, and the most seconds.

    Args:
        bounds: of each rank, between which numbers of seconds its clock is ahead.

    Returns:
        An empty text and 0 where none is.
    """
    found: dict[str, float] = {}
    for record, (low, high) in zip(records, bounds, strict=True):
        # what is sure, not what is likeliest
        sure = max(low, -high, 0.0)
        if sure > _CLOCKS_APART and record.host not in found:
            found[record.host] = low if low > 0 else high
    if not found:
        return "", 0.0
    shown = [
        f"{host}'s is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}"
        for host, ahead in found.items()
    ]
    if len(shown) > 4:
        shown[3:] = [f"{len(shown) - 3} more are off"]
    text = f"against {records[0].host}'s clock {', '.join(shown)}"
    return text, max(map(abs, found.values()))
