"""Writes checkpoints of true Megatron models, whose weights any reader can make again by name.

Run as `RANK=.. WORLD_SIZE=.. MASTER_PORT=.. python write_checkpoint.py JOBS.json`, where the file
holds a list of `Job`s as dictionaries. Every weight is `weight_of(key, global shape)`, so that each
layout holds the same global tensors and a test needs no second reader to know them. Beside the
checkpoint of an uncut model lie the logits that Megatron itself computes (logits.pt).
"""

from __future__ import annotations

import json
import math
import os
import sys
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROMPTS = [[5], [1, 2, 3], [7, 200, 11, 42, 42, 0, 199, 250, 3, 17, 8, 9], list(range(100, 132))]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One checkpoint of one run folder, whose recipe.yaml is there already."""

    run_dir: str
    precision: str = "fp32"
    per_layer_keys: bool = False
    """Store `decoder.layers.{i}.` keys instead of one stacked tensor."""
    flags: list[str] = field(default_factory=list)
    """For Megatron, behind those of the recipe."""
    plain: bool = False
    """Leave no recipe.yaml, as plain Megatron."""


def weight_of(key: str, shape: tuple[int, ...]) -> Tensor:
    """The global tensor stored under `key`: the same bits in every layout and every process.

    Norm weights lie around 1, alphas are distinct per layer, matrices are large enough for the
    activation to matter. A per-layer key is a row of its stacked tensor.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    noise = torch.randn(shape, generator=generator)
    if "norm" in key:
        return 1 + 0.1 * noise
    if key.endswith("alpha_p"):
        return 0.2034 + 0.7123 * torch.arange(shape[0]).view(-1, 1)
    if key.endswith("alpha_n"):
        return -1.0502 + 0.5321 * torch.arange(shape[0]).view(-1, 1)
    return noise * (0.5 if "embedding" in key else 1 / math.sqrt(shape[-1]))


def parse(run_dir: Path, recipe: Any, precision: str, more: list[str]) -> Any:
    """Megatron's arguments for this recipe, as a training run would save them."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_xielu.recipes import megatron_args

    flags = megatron_args(
        recipe,
        world_size=int(os.environ["WORLD_SIZE"]),
        device="cpu",
        run_dir=run_dir,
        precision=precision,  # type: ignore[arg-type]
        transformer_impl="local",
    )
    sys.argv = [sys.argv[0], *flags, *more, "--mock-data"]
    args = parse_args()
    validate_args(args)
    return args


def build_model(args: Any) -> torch.nn.Module:
    """This rank's part of the model that the arguments describe, in the project's own layers."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_xielu.mcore.hybrid import finish_norms, xielu_hybrid_spec
    from megatron_xielu.mcore.layer_specs import stock_layer_spec, xielu_layer_spec

    config = gpt_config_from_args(args)
    transformer = config.transformer
    transformer.use_cpu_initialization = True
    common: dict[str, Any] = {
        "config": transformer,
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.seq_length,
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "position_embedding_type": "rope",
        "rotary_base": args.rotary_base,
        "parallel_output": False,
    }
    if args.hybrid_layer_pattern is not None:
        model = HybridModel(
            hybrid_stack_spec=xielu_hybrid_spec(transformer),
            hybrid_layer_pattern=args.hybrid_layer_pattern,
            **common,
        )
        finish_norms([model])
        return model
    stock = args.swiglu or args.squared_relu
    spec = stock_layer_spec(config) if stock else xielu_layer_spec(config)
    return GPTModel(
        transformer_layer_spec=spec,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        **common,
    )


def fill(sharded: dict[str, Any], args: Any) -> None:
    """Put this rank's slice of `weight_of` into every tensor of a sharded state dict."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    # in a hybrid model attention and MLP are layers of their own
    per_layer = 1 if args.hybrid_layer_pattern is None else 2
    entries = list(sharded.values())
    for entry in sharded.values():
        if isinstance(entry, ShardedTensorFactory):
            # gate and up, each cut by itself, as views of what the model holds
            entries += entry.build()
    for entry in entries:
        if not isinstance(entry, ShardedTensor):
            continue
        layer, key, shape = None, entry.key, tuple(entry.global_shape)
        parts = key.replace("final_norm.", "final_layernorm.").split(".")
        if parts[1] == "layers" and parts[2].isdigit():
            layer = int(parts.pop(2)) // per_layer
            shape = (args.num_layers // per_layer, *shape)
        whole = weight_of(".".join(parts), shape)
        whole = whole if layer is None else whole[layer]
        local = (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
        box = tuple(
            slice(start, start + size)
            for start, size in zip(entry.global_offset, local, strict=True)
        )
        entry.data.detach().copy_(whole[box].view_as(entry.data))


def logits_of(model: torch.nn.Module) -> list[Tensor]:
    """Megatron's own logits (tokens, padded vocabulary) of PROMPTS; needs an uncut model."""
    model.eval()
    out = []
    with torch.no_grad():
        for prompt in PROMPTS:
            positions = torch.arange(len(prompt))[None]
            out.append(model(torch.tensor([prompt]), positions, None)[0].float())
    return out


def run(job: Job) -> None:
    """Build, fill, save; the state around the model is what a training run stores beside it."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing import ShardedObject
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_xielu.recipes import load_recipe

    run_dir = Path(job.run_dir)
    recipe = load_recipe(str(run_dir / "recipe.yaml"))
    args = parse(run_dir, recipe, job.precision, job.flags)
    args.consumed_train_samples = 200 * args.global_batch_size
    sizes = (args.pipeline_model_parallel_size, args.tensor_model_parallel_size)
    parallel_state.initialize_model_parallel(sizes[1], sizes[0])
    model_parallel_cuda_manual_seed(1)
    model = build_model(args)
    model = model.bfloat16() if args.bf16 else model
    sharded = model.sharded_state_dict(metadata={"non_homogeneous_layers": job.per_layer_keys})
    fill(sharded, args)
    if torch.distributed.get_world_size() == 1:
        torch.save(logits_of(model), run_dir / "logits.pt")
    coordinates = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    step = run_dir / "checkpoints" / "iter_0000200"
    step.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    state = {
        "model": sharded,
        "optimizer": optimizer_state(sharded),
        "rng_state": ShardedObject("rng_state", [{"seed": 1}], sizes, coordinates, 0),
        "args": args,
        "iteration": 200,
        "checkpoint_version": 3.0,
    }
    dist_checkpointing.save(state, str(step))
    (step.parent / "latest_checkpointed_iteration.txt").write_text("200")
    torch.distributed.barrier()
    if job.plain:
        (run_dir / "recipe.yaml").unlink(missing_ok=True)
    parallel_state.destroy_model_parallel()


def optimizer_state(sharded: dict[str, Any]) -> dict[str, Any]:
    """A part of Adam's state under the names Megatron's optimizer gives it."""
    return {
        f"optimizer.state.exp_avg.{name}": replace(
            entry, key=f"optimizer.state.exp_avg.{entry.key}", data=entry.data.clone()
        )
        for name, entry in sharded.items()
        if name.endswith("linear_proj.weight")
    }


def main(jobs_file: str) -> None:
    """Run every job in this process group."""
    from megatron_xielu.mcore import cpu_platform

    cpu_platform.enable()
    torch.distributed.init_process_group("gloo")
    for job in json.loads(Path(jobs_file).read_text()):
        run(Job(**job))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
