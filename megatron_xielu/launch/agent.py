"""torchrun's agent, which starts the ranks of one machine, where this process is torchrun."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, SimpleElasticAgent, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.launcher import api

from megatron_xielu.training.launch import REFUSED

# how long the agent of a machine whose ranks have ended waits for the others', which may have been
# stopped and never come; torch's 300 s only delay the end
_EXIT_SECONDS = 10


class Agent(LocalElasticAgent):
    """Starts no rank again that refused its input, and knows how the ranks ended."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if REFUSED in (failure.exitcode for failure in result.failures.values()):
            # as torch does for ranks that cannot be killed
            self._remaining_restarts = 0
        return result

    def _exit_barrier(self) -> None:
        # an agent that was stopped never comes, which torch would log as a traceback
        log = logging.getLogger(SimpleElasticAgent.__module__)
        log.disabled = True
        try:
            super()._exit_barrier()
        finally:
            log.disabled = False

    def stopped_well(self, number: int) -> bool:
        """Whether each rank, once it had got this signal, saved, or had not begun to listen."""
        context: Any = self._pcontext
        ranks = context.subprocess_handlers.values() if context else ()
        return all(rank.proc.returncode in (0, -number) for rank in ranks)


@contextmanager
def recorded() -> Iterator[list[Agent]]:
    """Let torchrun use `Agent`; yields those that it makes, of which there is one."""
    made: list[Agent] = []

    def make(**arguments: Any) -> Agent:
        made.append(Agent(exit_barrier_timeout=_EXIT_SECONDS, **arguments))
        return made[-1]

    # what makes the agent, which knows it by this name alone
    module: Any = api
    module.LocalElasticAgent = make
    try:
        yield made
    finally:
        module.LocalElasticAgent = LocalElasticAgent
