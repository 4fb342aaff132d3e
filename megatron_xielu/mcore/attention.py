"""Core attention of Megatron's local layers through torch's scaled_dot_product_attention."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


class SDPAttention(DotProductAttention):
    """Megatron's DotProductAttention with the arithmetic of one fused torch call.

    Where torch's call cannot express what was asked for (windows, layer-wise scaling, learned
    softmax offsets), the inherited forward does the work.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query: [sq, b, heads/tp, head_dim]; key, value: [sk, b, groups/tp, head_dim].

        attention_mask: True where a key is hidden, broadcast to [b, heads, sq, sk]; None for the
        causal mask. Returns [sq, b, heads/tp * head_dim].
        """
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        if not self._fits_torch(packed_seq_params, attention_bias) or (
            attention_mask is None and causal and query.size(0) != key.size(0)
        ):
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
            )
        dropout = self.attention_dropout.p if self.training else 0.0
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else nullcontext():
            context = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=dropout,
                is_causal=attention_mask is None and causal,
                scale=self.softmax_scale,
                enable_gqa=query.size(2) != key.size(2),
            )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _fits_torch(self, packed_seq_params: Any, attention_bias: Tensor | None) -> bool:
        return (
            packed_seq_params is None
            and attention_bias is None
            and self.config.softmax_type == "vanilla"
            and self.config.window_size is None
            and not self.config.apply_query_key_layer_scaling
        )
