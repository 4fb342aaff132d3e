"""Logits of a saved checkpoint from Megatron's own model, on one CPU process in fp32.

Megatron's state is global and its CPU platform changes torch, so `main` wants a process of its own;
`checkpoint.reference` starts one.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import parse_and_validate_args
from megatron.training.initialize import initialize_megatron
from megatron.training.models.gpt import GPTModelBuilder
from torch import Tensor

from megatron_xielu.mcore import cpu_platform, other_checkpoints, patches, safe_load
from megatron_xielu.mcore.activation import XIELUPlaceholder, install
from megatron_xielu.mcore.model_config import model_config
from megatron_xielu.recipes import Recipe, load_recipe, megatron_args
from megatron_xielu.recipes.schema import Parallel


def build_model(recipe: Recipe, workdir: Path) -> GPTModel:
    """The recipe's model on this process alone, in fp32, with its initial weights."""
    single = replace(recipe, parallel=Parallel())
    argv = megatron_args(
        single,
        world_size=1,
        device="cpu",
        run_dir=workdir,
        precision="fp32",
        transformer_impl="local",
    )
    cpu_platform.enable()
    patches.skip_dataset_helper_build()
    with patches.command_line(argv):
        args = parse_and_validate_args()
    initialize_megatron()
    xielu = recipe.xielu
    activation = XIELUPlaceholder(beta=xielu.beta, impl=xielu.impl)
    config = model_config(args, activation if recipe.model.activation == "xielu" else None)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = GPTModelBuilder(config).build_model(groups)
    install(model)
    return model.eval()


def load_weights(model: GPTModel, checkpoint: Path) -> None:
    """Load a torch_dist checkpoint of any layout into a model of this process."""
    safe_load.enable()
    other_checkpoints.enable()
    weights = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint))
    model.load_state_dict(weights["model"])


@torch.inference_mode()
def logits_of(model: GPTModel, prompt: list[int]) -> Tensor:
    """prompt: token ids; returns [tokens, vocab_size]."""
    tokens = torch.tensor([prompt])
    positions = torch.arange(len(prompt))[None]
    logits: Tensor = model(tokens, positions, None)
    return logits[0]


def main(checkpoint: str, recipe: str, prompts: str, out: str) -> None:
    """Write to `out` the list of the logits of each prompt in a JSON file of token ids."""
    with tempfile.TemporaryDirectory() as workdir:
        model = build_model(load_recipe(recipe), Path(workdir))
        load_weights(model, Path(checkpoint))
        logits = [logits_of(model, prompt) for prompt in json.loads(Path(prompts).read_text())]
        torch.save(logits, out)
    torch.distributed.destroy_process_group()
