"""xIELU inside Megatron's MLPs: a placeholder in the config, the module in its place.

Every Megatron MLP ends in `self.activation_func(x)`, a plain function it takes from its config. The
config gets a placeholder that carries xIELU's settings and raises when it is called; `install` then
replaces the placeholder of every built MLP by a module of its own, with its own two parameters. An
MLP that `install` did not reach cannot silently train another activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from megatron_xielu.activations import XIELU
from megatron_xielu.mcore.outliers import Look
from megatron_xielu.mcore.recompute import recompute_output
from megatron_xielu.ops import saved_input, xielu
from megatron_xielu.ops.dispatch import Impl
from megatron_xielu.ops.saved_input import SavedInput, xielu_from_e4m3


@dataclass(frozen=True)
class XIELUPlaceholder:
    """Stands in `TransformerConfig.activation_func` until `install` has run."""

    alpha_p_init: float = 0.8
    alpha_n_init: float = 0.8
    beta: float = 0.5
    impl: Impl = "auto"
    recompute: bool = False
    """Keep xIELU's output from forward to backward no longer than fc2 needs it."""
    fc2_input: Literal["fp8", "bf16"] = "fp8"
    """bf16: under FP8, xIELU's output and fc2's GEMM stay in bf16."""
    saved_input: SavedInput = "exact"
    """e4m3: what xIELU's backward, and a recomputed output, know of its input."""

    def __call__(self, x: Tensor) -> Tensor:
        raise RuntimeError(
            "an MLP was reached whose xIELU was never installed: build the layers with "
            "megatron_xielu.mcore.layer_specs.xielu_layer_spec, or pass the built model to "
            "megatron_xielu.mcore.activation.install before training"
        )


class ParallelXIELU(XIELU):
    """xIELU whose alphas get the same, whole gradient on every tensor-parallel rank.

    A rank holds ffn_hidden_size / tp columns, so its gradient of the replicated alphas covers those
    columns alone and the ranks' gradients must be summed. With sequence parallelism the parameters
    carry the mark that Megatron sums for (together with the norms, once a step); otherwise, and for
    experts, whose group is not the dense one, the sum is part of backward.

    Args:
        settings: the placeholder's values.
        tp_group: the ranks that share this MLP's columns.
        sequence_parallel: the config's flag.
        is_expert: the MLP is an expert of a mixture.
    """

    def __init__(
        self,
        settings: XIELUPlaceholder,
        tp_group: torch.distributed.ProcessGroup,
        *,
        sequence_parallel: bool,
        is_expert: bool = False,
    ) -> None:
        super().__init__(settings.alpha_p_init, settings.alpha_n_init, settings.beta, settings.impl)
        self.tp_group = tp_group
        self.recompute, self.fc2_input = settings.recompute, settings.fc2_input
        self.saved_input = settings.saved_input
        self.look = Look()
        # xIELU as fc2's quantizer asks for it, or None for the layer's own type: te_plain_mlp
        self.quantized: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor | None] | None = None
        summed_by_megatron = sequence_parallel and not is_expert
        self.sum_in_backward = tp_group.size() > 1 and not summed_by_megatron
        for alpha in (self.alpha_p, self.alpha_n):
            alpha.sequence_parallel = summed_by_megatron  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., ffn_hidden_size / tp]."""
        if self.look.on and torch.is_grad_enabled():
            self.look.see_input(x)
        alpha_p, alpha_n = self.alpha_p, self.alpha_n
        if self.sum_in_backward:
            # both alphas in one all-reduce
            both = copy_to_tensor_model_parallel_region(
                torch.cat((self.alpha_p, self.alpha_n)), self.tp_group
            )
            alpha_p, alpha_n = both[:1], both[1:]
        if self.quantized is not None:
            y = self.quantized(x, (alpha_p, alpha_n))
            if y is not None:
                return y
        if self.saved_input == "e4m3" and torch.is_grad_enabled():
            return xielu_from_e4m3(x, alpha_p, alpha_n, beta=self.beta, impl=self.impl)
        return xielu(x, alpha_p, alpha_n, beta=self.beta, impl=self.impl)

    def again(self, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        """How to compute y, the output of x, once more from what is kept for backward anyway."""
        # without the module's hooks, which would take it for another forward pass
        if self.saved_input == "e4m3":
            return saved_input.again(y, self.forward)
        return partial(self.forward, x.detach())

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Both alphas as Megatron checkpoint shards, replicated over `tp_group`.

        Without it Megatron would take each tensor-parallel rank's copy for the original.
        """
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            sharded_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


def install(model: nn.Module) -> nn.Module:
    """Give every MLP of a built model its own xIELU; MLPs that have one are left alone.

    Raises:
        ValueError: an MLP is gated, which xIELU is not made for.
        RuntimeError: a module still holds the placeholder afterwards.
    """
    mixtures = [module for module in model.modules() if isinstance(module, SequentialMLP)]
    experts = {id(expert) for mixture in mixtures for expert in mixture.local_experts}
    for mlp in model.modules():
        if isinstance(mlp, MLP) and isinstance(mlp.activation_func, XIELUPlaceholder):
            mlp.activation_func = _build(mlp, is_expert=id(mlp) in experts)
            if type(mlp).__name__ == "TEFusedMLP":
                _use_fused_operation(mlp)
            elif mlp.activation_func.recompute:
                recompute_output(mlp)
            elif mlp.config.fp8 and id(mlp) not in experts and _of_transformer_engine(mlp):
                _write_fc2_input(mlp)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "activation_func", None), XIELUPlaceholder):
            raise RuntimeError(
                f"{name} ({type(module).__name__}) has no place for xIELU's parameters; use layers "
                "whose feed-forward is an MLP (for experts: SequentialMLP, without grouped GEMM)"
            )
    return model


def _build(mlp: MLP, *, is_expert: bool) -> ParallelXIELU:
    if mlp.config.gated_linear_unit:
        raise ValueError(
            "xIELU is not gated: leave out --swiglu and widen ffn_hidden_size to 1.5 times the "
            "gated MLP's for equal parameters and FLOPs"
        )
    module = ParallelXIELU(
        mlp.activation_func,
        mlp.tp_group,
        sequence_parallel=mlp.config.sequence_parallel,
        is_expert=is_expert,
    )
    for alpha in (module.alpha_p, module.alpha_n):
        # false for experts spread over ranks: data parallelism must not average different experts
        alpha.allreduce = getattr(mlp.linear_fc1.weight, "allreduce", True)  # type: ignore[attr-defined]
    return module


def _use_fused_operation(mlp: MLP) -> None:
    # it needs TransformerEngine
    from megatron_xielu.mcore.te_fused_mlp import XIELUFusedMLP

    # Megatron's spec and a user's own name the class themselves
    mlp.__class__ = XIELUFusedMLP


def _of_transformer_engine(mlp: MLP) -> bool:
    kinds = type(mlp.linear_fc2).__mro__
    return any(kind.__module__.startswith("transformer_engine.") for kind in kinds)


def _write_fc2_input(mlp: MLP) -> None:
    # it needs TransformerEngine
    from megatron_xielu.mcore.te_plain_mlp import write_fc2_input

    write_fc2_input(mlp)


def installed_activations(model: nn.Module) -> dict[int, list[ParallelXIELU]]:
    """The decoder layers of a pipeline stage, by 1-based number, with their xIELUs on this rank.

    A dense layer has one, a mixture one per expert. Layers of multi-token prediction, which count
    from 1 again, are no decoder layers.
    """
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    return {
        layer.layer_number: [m for m in layer.modules() if isinstance(m, ParallelXIELU)]
        for block in blocks
        for layer in block.layers
    }
