"""Process groups of any size among the ranks that were started once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from megatron_xielu.mcore.layouts.grid import Layout

# the others wait this long for a rank that works alone, and for one that died
PATIENCE = timedelta(minutes=10)


class Ranks:
    """The ranks of this launch, met at one store.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are in the environment, as torchrun sets them.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.store, self.rank, self.count = next(rendezvous("env://"))
        self.store.set_timeout(PATIENCE)
        self._worlds = 0

    @contextmanager
    def world(self, size: int) -> Iterator[bool]:
        """The first `size` ranks as torch's world; yields whether this rank is one of them."""
        self._worlds += 1
        if self.rank >= size:
            yield False
            return
        distributed.init_process_group(
            self.backend,
            # a fresh name space: torch leaves the keys of a group that was destroyed
            store=PrefixStore(f"world{self._worlds}", self.store),
            rank=self.rank,
            world_size=size,
            timeout=PATIENCE,
        )
        try:
            yield True
        finally:
            parallel_state.destroy_model_parallel()
            distributed.destroy_process_group()
            # cycles hold groups, and groups hold threads
            gc.collect()

    def meet(self) -> None:
        """Wait until every rank of the launch is here."""
        with self.world(self.count):
            distributed.barrier()


@contextmanager
def cut(layout: Layout) -> Iterator[None]:
    """Megatron's process groups for a layout whose size is the world's."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        unset_num_microbatches_calculator()
