"""What a run says of itself before it begins."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence

from megatron_xielu.errors import UserError
from megatron_xielu.launch.preflight import checkpoint_bytes
from megatron_xielu.recipes import Recipe
from megatron_xielu.training.job import Job
from megatron_xielu.training.resolve import fuses_weight_gradients


def activation(job: Job) -> str:
    """Which implementation of xIELU the run gets, and why; the CPU kernels are built by now."""
    if job.recipe.model.activation != "xielu":
        return f"model.activation={job.recipe.model.activation}, Megatron's own"
    import torch

    from megatron_xielu.ops.dispatch import describe

    recipe = job.recipe
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.training.precision]
    try:
        found = describe(job.machine.device, dtype, recipe.xielu.impl)
    except ValueError as error:
        raise UserError(f"xielu.impl={recipe.xielu.impl} cannot be used: {error}") from error
    return f"xIELU by {found}{fp8_results(recipe, job.megatron_flags)}"


def fp8_results(recipe: Recipe, megatron_flags: Sequence[str] = ()) -> str:
    """Who writes what the MLP's second product reads under FP8, for each kind of layer."""
    fp8 = recipe.fp8
    if fp8.recipe == "off" or fp8.emulate:
        return ""
    cast = "in bf16, which TransformerEngine casts to FP8"
    flags = {flag.partition("=")[0] for flag in megatron_flags}
    if fp8.fc2_input == "bf16":
        dense = "in bf16 for fc2 (fp8.fc2_input)"
    elif fp8.recipe == "mxfp8":
        dense = f"{cast} (mxfp8: has no kernel of ours)"
    elif fp8.fused:
        dense = f"in FP8 for fc2, and for fc1 in backward ({fp8.recipe} scaling)"
    else:
        dense = f"in FP8 for fc2 ({fp8.recipe} scaling, fp8.fused=false)"
        if "--recompute-granularity" in flags:
            dense += ", but in bf16 where Megatron recomputes it"
    kinds = [f"dense MLPs: {dense}"]
    if "--num-experts" in flags:
        kinds.append(f"experts: {cast} (the router's probabilities come between)")
    ends = {"first": fp8.bf16_layers_at_start, "last": fp8.bf16_layers_at_end}
    if any(ends.values()):
        layers = " and ".join(f"{which} {count}" for which, count in ends.items() if count)
        kinds.append(f"{layers} layers: in bf16")
    return "".join(f"; {kind}" for kind in kinds)


def checkpoints(recipe: Recipe) -> str:
    """What the saves of a run take on the disk."""
    steps, keep = recipe.training.train_iters, recipe.checkpoint
    saves = kept = -(-steps // keep.save_interval)
    if keep.keep_last is not None:
        more = steps // math.lcm(keep.save_interval, keep.keep_every) if keep.keep_every else 0
        # an old one goes when the new one is whole
        kept = min(saves, keep.keep_last + 1 + more)
    size = checkpoint_bytes(recipe)
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
    return (
        f"checkpoints: {size / unit:,.1f} {name} each, {saves:,} in all; at most {kept:,} on the "
        f"disk, {kept * size / unit:,.1f} {name}"
    )


def libraries(job: Job) -> str:
    """Whose optimizer and weight gradients a run on GPUs gets; empty for one on CPUs."""
    machine = job.machine
    if machine.device == "cpu":
        return ""
    # the order in which Megatron looks for one
    adam = "torch's fused AdamW (neither TransformerEngine nor Apex is installed)"
    if machine.has_transformer_engine:
        adam = "TransformerEngine's FusedAdam"
    elif machine.has_apex:
        adam = "Apex's FusedAdam"
    why_not = "neither Apex's extension nor TransformerEngine's layers are there"
    fused = fuses_weight_gradients(machine, job.recipe.model.transformer_impl)
    if "--no-gradient-accumulation-fusion" in job.megatron_flags:
        fused, why_not = False, "--no-gradient-accumulation-fusion"
    if not fused:
        # a bf16 gradient is written and read again
        cost = "4 bytes of traffic more per parameter and micro-batch"
        return (
            f"optimizer: {adam}; weight gradients: added in a pass of their own, {cost} ({why_not})"
        )
    by = "Apex's extension" if machine.has_gradient_fusion else "TransformerEngine's GEMM"
    return f"optimizer: {adam}; weight gradients: added by {by}"


def flag_lines(argv: Sequence[str]) -> Iterator[str]:
    """Each flag with its values."""
    line: list[str] = []
    for word in argv:
        if word.startswith("--") and line:
            yield shlex.join(line)
            line = []
        line.append(word)
    if line:
        yield shlex.join(line)
