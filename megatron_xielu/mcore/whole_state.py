"""A distributed checkpoint of model, optimizer and schedule, without Megatron's training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.utils import unwrap_model


class WholeState:
    """Everything that decides how a model goes on, in Megatron's fully reshardable format.

    Args:
        chunks: the model's, wrapped for data parallelism.
        optimizer, scheduler: Megatron's.
        distributed: the optimizer is the distributed one.
    """

    def __init__(
        self, chunks: list[Any], optimizer: Any, scheduler: Any, *, distributed: bool
    ) -> None:
        self._chunks, self._optimizer, self._scheduler = chunks, optimizer, scheduler
        self._distributed = distributed

    def save(self, folder: Path, state: dict[str, Any] | None = None) -> None:
        """Write to a folder that exists and is empty.

        Args:
            state: from `sharded`, where the caller has it already.
        """
        content = {k: value for k, value in self._metadata().items() if k != "dp_cp_group"}
        dist_checkpointing.save(state or self.sharded(), str(folder), content_metadata=content)

    def load(self, folder: Path) -> None:
        """Take everything `save` wrote, whatever layout it wrote it in."""
        content = dist_checkpointing.load_content_metadata(str(folder))
        metadata = {**content, "dp_cp_group": self._metadata()["dp_cp_group"]}
        state = dist_checkpointing.load(self.sharded(metadata, is_loading=True), str(folder))
        for chunk, name in zip(unwrap_model(self._chunks), self._names(), strict=True):
            chunk.load_state_dict(state[name], strict=True)
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])

    def sharded(
        self, metadata: dict[str, Any] | None = None, *, is_loading: bool = False
    ) -> dict[str, Any]:
        """Megatron's sharded state of this rank."""
        metadata = metadata or self._metadata()
        state: dict[str, Any] = {
            name: chunk.sharded_state_dict(metadata=metadata)
            for chunk, name in zip(unwrap_model(self._chunks), self._names(), strict=True)
        }
        state["optimizer"] = self._optimizer.sharded_state_dict(
            state, is_loading=is_loading, metadata=metadata
        )
        state["scheduler"] = self._scheduler.state_dict()
        return state

    def _names(self) -> list[str]:
        return [f"model{index}" for index in range(len(self._chunks))]

    def _metadata(self) -> dict[str, Any]:
        # as Megatron's checkpointing with --dist-ckpt-optim-fully-reshardable
        metadata: dict[str, Any] = {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        if self._distributed:
            metadata["distrib_optim_sharding_type"] = "fully_reshardable"
            metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
        return metadata
