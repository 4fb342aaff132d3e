"""One rank of a pretraining run; writes what it saw as JSON.

pretrain_rank.py RECIPE RUN_DIR OUT [--fault NAME] [--emulated-fp8 NAME] [-- MEGATRON FLAGS]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_xielu.recipes import load_recipe, megatron_args


class Recorder:
    """A listener that keeps everything."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.valid: list[dict[str, Any]] = []

    def begin(self, **numbers: Any) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def step(self, **numbers: Any) -> None:
        self.steps.append(numbers)

    def validation(self, **numbers: Any) -> None:
        self.valid.append(numbers)

    def saved(self, **numbers: Any) -> None:
        pass

    def save_failed(self, **numbers: Any) -> None:
        raise AssertionError(f"no save may fail here: {numbers}")

    def stop_needs(self, **numbers: Any) -> None:
        pass

    def stopped(self, **numbers: Any) -> None:
        pass

    def skipped(self, **numbers: Any) -> None:
        raise AssertionError(f"a step was skipped: {numbers}")


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fault")
    parser.add_argument("--emulated-fp8", default="off")
    args = parser.parse_args(sys.argv[1:split])
    recipe = load_recipe(args.recipe)
    argv = megatron_args(
        recipe,
        world_size=int(os.environ["WORLD_SIZE"]),
        device="cpu",
        run_dir=args.run_dir,
        precision="bf16" if recipe.training.precision == "bf16" else "fp32",
        transformer_impl="local",
    )

    from megatron_xielu.mcore import cpu_platform

    cpu_platform.hide_gpu_libraries()
    import megatron_xielu.mcore.activation as activation
    import megatron_xielu.mcore.model_config as model_config
    import megatron_xielu.mcore.pretrain as pretrain
    from megatron_xielu.mcore.fp8_emulation import FP8Settings
    from megatron_xielu.mcore.health import HealthSettings

    if args.fault:
        plant(args.fault, activation)
    chunks: list[Any] = []
    install = model_config.install_on_chunks
    model_config.install_on_chunks = lambda built: chunks.extend(built) or install(built)
    served = record_samples()
    recorder = Recorder()
    joined: list[int] = []
    pretrain.pretrain(
        [*argv, *sys.argv[split + 1 :]],
        activation.XIELUPlaceholder(
            beta=recipe.xielu.beta, impl=recipe.xielu.impl, recompute=recipe.xielu.recompute
        ),
        recorder,
        alpha_lr_mult=recipe.xielu.lr_mult,
        # a planted fault runs to the end, so that its size can be seen
        health=HealthSettings(every=0 if args.fault else recipe.health.every),
        emulated_fp8=FP8Settings(args.emulated_fp8),
        joined=lambda: joined.append(torch.distributed.get_world_size()),
    )
    assert joined == [int(os.environ["WORLD_SIZE"])]
    alphas = {
        number: [
            float(module.alpha_p).hex(),
            float(module.alpha_n).hex(),
            str(module.alpha_p.dtype),
        ]
        for chunk in chunks
        for number, (module,) in activation.installed_activations(chunk).items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    seen = {"steps": recorder.steps, "valid": recorder.valid, "alphas": alphas, "served": served}
    (args.out / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(seen))


def record_samples() -> list[tuple[int, int]]:
    """Fills with (step, index) of each sample that the training set serves to this rank."""
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split
    from megatron.training import get_args

    served: list[tuple[int, int]] = []
    get = GPTDataset.__getitem__

    def recorded(dataset: Any, index: Any) -> Any:
        if dataset.index_split == Split.train:
            served.append((get_args().curr_iteration + 1, int(index)))
        return get(dataset, index)

    GPTDataset.__getitem__ = recorded
    return served


def plant(fault: str, activation: Any) -> None:
    """Break one thing on purpose, so that a test shows that it would notice."""
    build = activation._build

    def broken(mlp: Any, **known: Any) -> Any:
        module = build(mlp, **known)
        if fault == "no-sum":
            module.sum_in_backward = False
            for alpha in (module.alpha_p, module.alpha_n):
                alpha.sequence_parallel = False
        return module

    activation._build = broken


if __name__ == "__main__":
    main()
