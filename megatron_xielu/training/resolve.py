"""From a recipe as written to a run as it will be: this machine's choices and the data's size."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megatron_xielu.data.manifest import DatasetInfo
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe

_VOCAB_MULTIPLE = 128
# Apex's extension; upstream refuses to build the output layer without it
_GRADIENT_FUSION = "fused_weight_gradient_mlp_cuda"


@dataclass(frozen=True)
class Machine:
    """What this machine has to offer."""

    device: Literal["cuda", "cpu"]
    num_gpus: int
    has_transformer_engine: bool
    has_gradient_fusion: bool

    @classmethod
    def detect(cls) -> Machine:
        """Looks at the machine, but touches no GPU and imports no library that would."""
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return cls(
            device="cuda" if num_gpus else "cpu",
            num_gpus=num_gpus,
            has_transformer_engine=_has_module("transformer_engine"),
            has_gradient_fusion=_has_module(_GRADIENT_FUSION),
        )

    @classmethod
    def gpu(cls) -> Machine:
        """A GPU machine as the container has it, for plans made elsewhere."""
        return cls("cuda", num_gpus=0, has_transformer_engine=True, has_gradient_fusion=False)


def resolve(recipe: Recipe, machine: Machine, data: DatasetInfo | None) -> Recipe:
    """The recipe with nothing left to "auto".

    Args:
        data: the data folder's manifest. Its vocabulary, rounded up to a multiple of 128 whatever
            the tensor-parallel size is, becomes the model's where the recipe names none, and its
            held-out tokens become the length of an evaluation.

    Raises:
        UserError: TransformerEngine is asked for where it cannot run.
    """
    model = recipe.model
    impl = model.transformer_impl
    usable = machine.device == "cuda" and machine.has_transformer_engine
    if impl == "auto":
        impl = "transformer_engine" if usable else "local"
    elif impl == "transformer_engine" and not usable:
        reason = "no GPU" if machine.device == "cpu" else "no transformer_engine package"
        raise UserError(
            f"model.transformer_impl=transformer_engine cannot run here: there is {reason}. "
            "Set it to auto or local."
        )
    vocab_size = model.vocab_size
    if vocab_size is None and data is not None:
        vocab_size = -(-data.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    precision = recipe.training.precision
    if precision == "auto":
        precision = "bf16" if machine.device == "cuda" else "fp32"
    path = recipe.data.path
    return replace(
        recipe,
        model=replace(model, transformer_impl=impl, vocab_size=vocab_size),
        training=replace(recipe.training, precision=precision),
        data=replace(recipe.data, path=None if path is None else str(Path(path).absolute())),
        logging=replace(recipe.logging, eval_iters=_eval_iters(recipe, data)),
    )


def _eval_iters(recipe: Recipe, data: DatasetInfo | None) -> int | None:
    if recipe.logging.eval_iters is not None or data is None:
        return recipe.logging.eval_iters
    # a sequence's last target is the next one's first token
    sequences = (data.valid.tokens - 1) // recipe.model.seq_length
    return max(1, sequences // recipe.training.global_batch_size)


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
