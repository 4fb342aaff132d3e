"""Models of TransformerEngine's layers beside those of local ones: parameters, marks, files."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

ATTRIBUTES = (
    "tensor_model_parallel",
    "partition_dim",
    "partition_stride",
    "sequence_parallel",
    "allreduce",
)
# TransformerEngine fuses a norm into the linear layer behind it; checkpoints name it so for both
FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def recipe_model(impl: str, *overrides: str) -> Any:
    """The 1.1B recipe with few and narrow layers, by the product's own flags and builder."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_xielu.mcore import patches
    from megatron_xielu.mcore.activation import XIELUPlaceholder
    from megatron_xielu.mcore.layer_specs import install_on_chunks, use_xielu, xielu_layer_spec
    from megatron_xielu.recipes import load_recipe, megatron_args

    tp = parallel_state.get_tensor_model_parallel_world_size()
    small = (
        "model.num_layers=3",
        "model.hidden_size=64",
        "model.num_attention_heads=4",
        "model.ffn_hidden_size=192",
        "model.seq_length=32",
        "model.vocab_size=256",
        "training.global_batch_size=4",
        "training.micro_batch_size=2",
        "logging.eval_iters=0",
        f"parallel.tensor_model_parallel_size={tp}",
        f"parallel.sequence_parallel={str(tp > 1).lower()}",
    )
    recipe = load_recipe("llama-1.1b-xielu", (*small, *overrides))
    argv = megatron_args(
        recipe,
        world_size=torch.distributed.get_world_size(),
        device="cpu",
        run_dir=Path(tempfile.gettempdir()),
        precision="bf16",
        transformer_impl=impl,
    )
    with patches.command_line([*argv, "--mock-data"]), redirect_stdout(io.StringIO()):
        args = parse_args()
        validate_args(args)
    model = gpt_config_from_args(args)
    use_xielu(model.transformer, XIELUPlaceholder(fc2_input=recipe.fp8.fc2_input))
    model.transformer_layer_spec = xielu_layer_spec
    groups = ProcessGroupCollection.use_mpu_process_groups()
    built = GPTModelBuilder(model).build_model(groups, pre_process=True, post_process=True)
    (built,) = install_on_chunks([built])
    return built.bfloat16()


def parameters(model: Any) -> dict[str, tuple[Any, ...]]:
    """Shape, type and attributes by the name that TransformerEngine's layers have."""
    found = {}
    for name, parameter in model.named_parameters():
        for plain, fused in FUSED_NORMS.items():
            name = name.replace(plain, fused)
        marks = {key: getattr(parameter, key, None) for key in ATTRIBUTES}
        # an attribute that is missing means False, and without a cut the other two mean nothing
        cut = bool(marks["tensor_model_parallel"])
        found[name] = (
            tuple(parameter.shape),
            parameter.dtype,
            cut,
            (marks["partition_dim"], marks["partition_stride"]) if cut else None,
            bool(marks["sequence_parallel"]),
            marks["allreduce"] is not False,
        )
    return found


def transformer_engine_models_are_the_local_ones() -> dict[str, int]:
    """Of the 1.1B recipe, shrunk: names, shapes, types, marks of parallelism, keys, alphas, files.

    The number of values compared for each pair, both ways through a checkpoint.
    """
    variants = {
        "bf16": (),
        "delayed, fused": ("fp8.recipe=delayed",),
        "tensorwise, fused": ("fp8.recipe=tensorwise",),
        "blockwise, fused": ("fp8.recipe=blockwise",),
        "tensorwise, modules": ("fp8.recipe=tensorwise", "fp8.fused=false"),
    }
    counts = {}
    for qk_layernorm, tied in product((False, True), (False, True)):
        model = (
            f"model.qk_layernorm={str(qk_layernorm).lower()}",
            f"model.tie_embeddings={str(tied).lower()}",
        )
        local = recipe_model("local", *model)
        expected = parameters(local)
        for name, keys in variants.items():
            other = recipe_model("transformer_engine", *model, *keys)
            check_classes(other, fused="fused" in name)
            assert parameters(other) == expected, differing(parameters(other), expected)
            title = f"{name}{', QK-norm' if qk_layernorm else ''}{', tied' if tied else ''}"
            assert sum("alpha" in key for key in expected) == 6
            counts[title] = through_a_checkpoint(local, other)
            assert through_a_checkpoint(other, local) == counts[title]
    return counts


def check_classes(model: Any, *, fused: bool) -> None:
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    from megatron_xielu.mcore.te_fused_mlp import XIELUFusedMLP

    for layer in model.decoder.layers:
        assert isinstance(layer.self_attention.linear_qkv, TELayerNormColumnParallelLinear)
        assert isinstance(layer.self_attention.linear_proj, TERowParallelLinear)
        assert isinstance(layer.mlp, XIELUFusedMLP) == fused


def differing(found: dict[str, Any], expected: dict[str, Any]) -> str:
    return "\n".join(
        f"{name}: {found.get(name)} instead of {expected.get(name)}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    )


def through_a_checkpoint(source: Any, target: Any) -> int:
    """Save one model, load the other, compare all bits; returns the values of this rank."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_xielu.mcore import other_checkpoints

    def shapes(model: Any) -> dict[str, Any]:
        state = model.sharded_state_dict().values()
        return {s.key: s.global_shape for s in state if isinstance(s, ShardedTensor)}

    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            else:
                # the ranks' copies are one number
                parameter.add_(sum(map(ord, name)) / 1000)
        for parameter in target.parameters():
            parameter.zero_()
    assert shapes(source) == shapes(target)
    other_checkpoints.enable()
    folder = shared_folder()
    dist_checkpointing.save(source.sharded_state_dict(), str(folder))
    loaded = dist_checkpointing.load(target.sharded_state_dict(), str(folder))
    target.load_state_dict(loaded)
    mine, its = by_fused_names(source), by_fused_names(target)
    assert mine.keys() == its.keys()
    assert [name for name in mine if not torch.equal(mine[name], its[name])] == []
    return sum(tensor.numel() for tensor in mine.values())


def by_fused_names(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        for plain, fused in FUSED_NORMS.items():
            name = name.replace(plain, fused)
        found[name] = parameter.detach()
    return found


def shared_folder() -> Path:
    names = [tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(names)
    return Path(str(names[0]))


def transformer_engine_models_are_the_local_ones_on_two_ranks() -> dict[str, int]:
    """The same, cut by tensor and sequence parallelism."""
    return transformer_engine_models_are_the_local_ones()


def transformer_engine_hybrid_models_are_the_local_ones() -> int:
    """Megatron's stack spec of TransformerEngine layers, with ours in its MLPs."""
    from megatron_xielu.mcore.activation import ParallelXIELU
    from tests.mcore.checks import config

    models = [
        hybrid(config(num_layers=4, transformer_impl=impl))
        for impl in ("local", "transformer_engine")
    ]
    for model in models:
        assert sum(isinstance(m, ParallelXIELU) for m in model.modules()) == 2
    local, other = models
    assert parameters(other) == parameters(local), differing(parameters(other), parameters(local))
    count = through_a_checkpoint(local, other)
    assert through_a_checkpoint(other, local) == count
    return count


def hybrid(transformer: Any) -> Any:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_xielu.mcore.hybrid import finish_norms, xielu_hybrid_spec
    from megatron_xielu.mcore.layer_specs import install_on_chunks

    model = HybridModel(
        transformer,
        hybrid_stack_spec=xielu_hybrid_spec(transformer),
        vocab_size=64,
        max_sequence_length=16,
        hybrid_layer_pattern="*-*-",
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    if transformer.transformer_impl == "local":
        finish_norms([model])
    (model,) = install_on_chunks([model])
    return model


def transformer_engine_adds_weight_gradients_for_megatron() -> dict[str, float]:
    """mcore's own linear layer without Apex: two micro-batches in an fp32 and a bf16 main_grad.

    Stood in for is the GEMM alone, with TransformerEngine's order of operands.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, layers

    from megatron_xielu.mcore import weight_gradients
    from tests.mcore.checks import config

    measured = {}
    with patch.object(layers, "_grad_accum_fusion_available", False), torch_gemm() as calls:
        fused = config(gradient_accumulation_fusion=True, bf16=True, params_dtype=torch.bfloat16)

        def dummy(shape: list[int], dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype)

        def linear() -> Any:
            return ColumnParallelLinear(
                32, 48, config=fused, init_method=torch.nn.init.ones_, bias=False
            )

        with pytest.raises(RuntimeError, match=weight_gradients.EXTENSION):
            linear()
        assert weight_gradients.use_transformer_engine()
        assert not weight_gradients.use_transformer_engine()
        generator = torch.Generator().manual_seed(1)
        for dtype in (torch.float32, torch.bfloat16):
            module = linear()
            weight = module.weight
            weight.data.copy_(torch.randn(48, 32, generator=generator))
            weight.main_grad = torch.zeros(48, 32, dtype=dtype)
            weight.grad_added_to_main_grad = False
            exact = torch.zeros(48, 32, dtype=torch.float64)
            for _ in range(2):
                x = torch.randn(5, 3, 32, generator=generator).bfloat16().requires_grad_()
                y, _ = module(x)
                grad = torch.randn(5, 3, 48, generator=generator).bfloat16()
                with patch.object(layers, "get_dummy_wgrad", dummy):
                    y.backward(grad)
                exact += grad.flatten(0, 1).double().T @ x.detach().flatten(0, 1).double()
            assert weight.grad_added_to_main_grad
            error = float((weight.main_grad - exact).abs().max() / exact.abs().max())
            # two roundings to the sum's type
            assert error <= 2 * torch.finfo(dtype).eps, error
            measured[str(dtype)] = error
    assert calls == ["NT"] * 4
    return measured


@contextmanager
def torch_gemm() -> Iterator[list[str]]:
    from transformer_engine.pytorch import cpp_extensions

    calls: list[str] = []

    def gemm(a: Tensor, b: Tensor, *, out: Tensor, layout: str, accumulate: bool, **_: Any) -> None:
        calls.append(layout)
        assert (layout, accumulate) == ("NT", True)
        out.add_((b.double().T @ a.double()).to(out.dtype))

    with patch.object(cpp_extensions, "general_gemm", gemm):
        yield calls


def on_a_gpu_weight_gradients_are_added_by_transformer_engine() -> float:
    """TransformerEngine's GEMM itself."""
    from megatron_xielu.mcore.weight_gradients import accumulate

    torch.manual_seed(1)
    x = torch.randn(96, 64, device="cuda").bfloat16()
    grad = torch.randn(96, 48, device="cuda").bfloat16()
    main_grad = torch.ones(48, 64, device="cuda")
    accumulate(x, grad, main_grad)
    accumulate(x, grad, main_grad)
    exact = 1 + 2 * grad.double().T @ x.double()
    error = float((main_grad - exact).abs().max() / exact.abs().max())
    assert error < 1e-5, error
    return error
