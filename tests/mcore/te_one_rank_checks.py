"""The models that `doctor` and `bench --training` train on a GPU, built on a CPU."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch


def transformer_engine_models_of_one_rank_have_the_local_ones_parameters() -> dict[str, int]:
    """Every variant and recipe; which MLP each gets, and what of FP8 the config says."""
    from megatron.core.extensions.transformer_engine import TEFusedMLP

    from megatron_xielu.mcore.activation import ParallelXIELU
    from megatron_xielu.mcore.fp8_emulation import FP8Settings
    from megatron_xielu.mcore.one_rank import Run, Sizes, Training

    sizes = Sizes(num_layers=1, hidden_size=64, ffn_hidden_size=192, seq_length=32)
    counts = {}
    for activation in ("xielu", "swiglu", "relu2"):
        local = Training(Run(activation, sizes=sizes), 128).parameters
        for recipe in ("off", "delayed", "tensorwise", "blockwise"):
            settings = FP8Settings(recipe, "e4m3" if recipe == "blockwise" else "hybrid")
            fused = activation == "xielu" and recipe != "off"
            training = Training(
                Run(
                    activation,
                    settings,
                    sizes=sizes,
                    transformer_impl="transformer_engine",
                    fused=fused,
                ),
                128,
            )
            assert training.parameters == local, (activation, recipe)
            (mlp,) = (
                module
                for chunk in training._chunks
                for name, module in chunk.named_modules()
                if name.endswith(".mlp")
            )
            assert isinstance(mlp, TEFusedMLP) == fused, (activation, recipe)
            assert isinstance(mlp.activation_func, ParallelXIELU) == (activation == "xielu")
            config: Any = training._config
            assert config.fp8 == (None if recipe == "off" else settings.format)
            if recipe != "off":
                assert config.fp8_recipe == recipe
        counts[activation] = local
    # the gated MLP is two thirds as wide; xIELU has two alphas
    assert counts["swiglu"] == counts["relu2"] == counts["xielu"] - 2
    compiled = Training(
        replace(
            Run(sizes=sizes, transformer_impl="transformer_engine"),
            impl="reference",
            compiled=True,
        ),
        128,
    )
    assert all(
        module._compiled_call_impl is not None
        for chunk in compiled._chunks
        for module in chunk.modules()
        if isinstance(module, ParallelXIELU)
    )
    return counts


def transformer_engine_models_of_one_rank_are_saved_with_their_histories() -> int:
    """Histories and weights go through the checkpoint to a model of another seed."""
    from megatron_xielu.mcore.fp8_emulation import FP8Settings
    from megatron_xielu.mcore.one_rank import Run, Sizes, Training

    run = Run(
        fp8=FP8Settings("delayed", amax_history_len=4),
        sizes=Sizes(num_layers=1, hidden_size=64, ffn_hidden_size=192, seq_length=32),
        transformer_impl="transformer_engine",
        fused=True,
    )
    first = Training(run, 128)
    _init_histories(first)
    for number, history in enumerate(_histories(first), start=1):
        history.fill_(float(number))
    with tempfile.TemporaryDirectory() as folder:
        # moments are made for loading, or by a step, which needs a GPU
        first._state.save(Path(folder), first._state.sharded(is_loading=True))
        second = Training(replace(run, seed=2), 128)
        assert second.differing(first)
        second.load(Path(folder))
    # whose fp32 values are the optimizer's own, which is empty without a step
    assert all(".alpha_" in name for name in second.differing(first))
    found = [sorted(set(history.flatten().tolist())) for history in _histories(second)]
    assert found == [[float(number)] for number in range(1, len(found) + 1)]
    # of qkv, proj, fc1 and fc2, forward and backward
    assert len(found) == 8
    return len(found)


def transformer_engine_models_of_one_rank_go_on_where_local_ones_stopped() -> dict[str, int]:
    """The optimizer's state too, in both directions: what is loaded is saved again, bit for bit."""
    from megatron_xielu.checkpoint.torch_dist import TorchDistReader
    from megatron_xielu.mcore import other_checkpoints
    from megatron_xielu.mcore.one_rank import Run, Sizes, Training

    other_checkpoints.enable()
    local = Run(sizes=Sizes(num_layers=2, hidden_size=64, ffn_hidden_size=192, seq_length=32))
    te = replace(local, transformer_impl="transformer_engine", seed=2)
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / each for each in ("local", "TransformerEngine", "local again")]
        for folder in folders:
            folder.mkdir()
        stopped = Training(local, 128)
        _fill(stopped)
        stopped.save(folders[0])
        for run, source, folder in zip((te, local), folders, folders[1:], strict=False):
            training = Training(replace(run, seed=run.seed + 1), 128)
            training.load(source)
            training.save(folder)
        first, *others = (TorchDistReader(folder) for folder in folders)
        expected = {key: first.read(key) for key in first.keys()}  # noqa: SIM118
        counts = {}
        for other in others:
            assert other.keys() == sorted(expected)
            assert [k for k, v in expected.items() if not torch.equal(v, other.read(k))] == []
            counts[other.path.name] = sum(tensor.numel() for tensor in expected.values())
    parameters = [key for key in expected if not key.startswith("optimizer.")]
    for kind in ("exp_avg", "exp_avg_sq", "param"):
        found = [tensor for key, tensor in expected.items() if f"state.{kind}." in key]
        assert len(found) == len(parameters), kind
        assert all(tensor.any() for tensor in found), kind
    return counts


def _fill(training: Any) -> None:
    """An optimizer's state as after steps, which need a GPU here: moments, and its own weights."""
    # makes the moments
    training._state.sharded(is_loading=True)
    for optimizer in training._optimizer.chained_optimizers:
        for state in optimizer.optimizer.state.values():
            for tensor in (state["exp_avg"], state["exp_avg_sq"]):
                tensor.normal_()
        for group in optimizer.shard_fp32_from_float16_groups:
            for parameter in group:
                parameter.data.add_(1e-4 * torch.randn_like(parameter))


def _init_histories(training: Any) -> None:
    """What a first forward pass makes."""
    from megatron.core.fp8_utils import get_fp8_recipe

    for module in _linears(training):
        module.fp8_meta.setdefault("num_gemms", 1)
        module.init_fp8_meta_tensors(get_fp8_recipe(training._config))


def _linears(training: Any) -> list[Any]:
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    return [
        module
        for module in training._chunks[0].modules()
        if isinstance(module, TransformerEngineBaseModule) and hasattr(module, "weight")
    ]


def _histories(training: Any) -> list[Any]:
    return [
        module.fp8_meta[key].amax_history
        for module in _linears(training)
        for key in ("scaling_fwd", "scaling_bwd")
    ]
