"""From a recipe as written to a run as it will be: this machine's choices and the data's size."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megatron_xielu.data.manifest import DatasetInfo
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe, padded_vocab_size
from megatron_xielu.training.transformer_engine import install_command

# Apex's extension; upstream refuses to build the output layer without it
_GRADIENT_FUSION = "fused_weight_gradient_mlp_cuda"


@dataclass(frozen=True)
class Machine:
    """What this machine has to offer."""

    device: Literal["cuda", "cpu"]
    num_gpus: int
    has_transformer_engine: bool
    has_gradient_fusion: bool
    """Apex's extension that adds weight gradients."""
    has_apex: bool = False

    @classmethod
    def detect(cls) -> Machine:
        """Looks at the machine, but touches no GPU and imports no library that would."""
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return cls(
            device="cuda" if num_gpus else "cpu",
            num_gpus=num_gpus,
            has_transformer_engine=_has_module("transformer_engine"),
            has_gradient_fusion=_has_module(_GRADIENT_FUSION),
            has_apex=_has_module("apex.optimizers"),
        )

    @classmethod
    def gpu(cls) -> Machine:
        """A GPU machine as the container has it, for plans made elsewhere."""
        return cls("cuda", num_gpus=0, has_transformer_engine=True, has_gradient_fusion=False)


def fuses_weight_gradients(machine: Machine, transformer_impl: str) -> bool:
    """Whether weight gradients can be added into the main ones by the GEMM that computes them."""
    by_te = machine.has_transformer_engine and transformer_impl == "transformer_engine"
    return machine.device == "cuda" and (machine.has_gradient_fusion or by_te)


def resolve(recipe: Recipe, machine: Machine, data: DatasetInfo | None) -> Recipe:
    """The recipe with nothing left to "auto".

    Args:
        data: the data folder's manifest. Its vocabulary becomes the model's where the recipe names
            none, with rows up to a multiple of 128 whatever the tensor-parallel size is, and its
            held-out tokens become the length of an evaluation.

    Raises:
        UserError: FP8 or TransformerEngine is asked for where it cannot run.
    """
    model = recipe.model
    if model.vocab_size is None and data is not None:
        size = data.vocab_size
        rows = padded_vocab_size(size)
        padded = model.padded_vocab_size or (rows if rows > size else None)
        model = replace(model, vocab_size=size, padded_vocab_size=padded)
    precision = recipe.training.precision
    if precision == "auto":
        precision = "bf16" if machine.device == "cuda" else "fp32"
    path = recipe.data.path
    return replace(
        recipe,
        model=replace(model, transformer_impl=_transformer_impl(recipe, machine)),
        training=replace(recipe.training, precision=precision),
        data=replace(recipe.data, path=None if path is None else str(Path(path).absolute())),
        logging=replace(recipe.logging, eval_iters=_eval_iters(recipe, data)),
    )


def _transformer_impl(recipe: Recipe, machine: Machine) -> Literal["local", "transformer_engine"]:
    impl, fp8 = recipe.model.transformer_impl, recipe.fp8.recipe
    if fp8 != "off" and recipe.fp8.emulate and impl != "transformer_engine":
        return "local"
    if machine.device == "cpu" and fp8 != "off":
        raise UserError(
            f"fp8.recipe={fp8} cannot run here: there is no GPU. Set fp8.recipe=off, or "
            "fp8.emulate=true for its numbers at a CPU's speed; --dry-run --for-gpu makes a plan "
            "for GPUs on any machine."
        )
    if impl == "local" or (impl == "auto" and machine.device == "cpu"):
        return "local"
    if machine.device == "cpu":
        raise UserError(
            "model.transformer_impl=transformer_engine cannot run here: there is no GPU. "
            "Set it to auto or local."
        )
    if machine.has_transformer_engine:
        return "transformer_engine"
    if impl == "auto" and fp8 == "off":
        return "local"
    wanted = "model.transformer_impl=transformer_engine" if fp8 == "off" else f"fp8.recipe={fp8}"
    instead = "set it to auto or local" if fp8 == "off" else "set fp8.recipe=off"
    raise UserError(
        f"{wanted} cannot run here: there is no transformer_engine package. Install it, "
        f"or {instead}:\n  {install_command(torch.version.cuda)}"
    )


def _eval_iters(recipe: Recipe, data: DatasetInfo | None) -> int | None:
    if recipe.logging.eval_iters is not None or data is None:
        return recipe.logging.eval_iters
    # a sequence's last target is the next one's first token
    sequences = (data.valid.tokens - 1) // recipe.model.seq_length
    return max(1, sequences // recipe.training.global_batch_size)


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # of a package that is not there, or is another one of that name
        return False
