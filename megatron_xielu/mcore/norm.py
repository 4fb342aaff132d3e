"""RMSNorm for Megatron's local layers, with or without sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, built the way Megatron builds a norm.

    Megatron's own wrapper of torch's norm refuses sequence parallelism. All it takes is the mark
    that makes Megatron sum the weight's gradient over the tensor-parallel ranks, each of which sees
    its own part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
