"""What runs inside a rank, because the CPU platform changes the whole process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xielu.recipes import load_recipe, megatron_args


def config(**changes: Any) -> Any:
    """A small transformer's config for local layers."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields: dict[str, Any] = {
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 96,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
    }
    return TransformerConfig(**(fields | changes))


def build(transformer: Any, spec: Any = None) -> Any:
    """A GPTModel of this config on one rank."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    from megatron_xielu.mcore.layer_specs import xielu_layer_spec

    model = GPTModelConfig(
        transformer=transformer,
        transformer_layer_spec=spec or xielu_layer_spec,
        vocab_size=64,
        seq_length=16,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return GPTModelBuilder(model).build_model(groups, pre_process=True, post_process=True)


def logits_and_grads(model: Any) -> torch.Tensor:
    """One forward and backward on fixed tokens; returns the loss per token."""
    tokens = torch.arange(32).reshape(2, 16)
    positions = torch.arange(16)[None].expand(2, -1)
    loss: torch.Tensor = model(tokens, positions, None, labels=tokens)
    loss.sum().backward()
    return loss.detach()


def every_layer_has_its_own_xielu() -> None:
    from megatron_xielu.mcore.activation import ParallelXIELU, installed_activations

    model = build(config())
    found = installed_activations(model)
    assert sorted(found) == [1, 2, 3]
    assert len({id(module) for (module,) in found.values()}) == 3
    names = [name for name, _ in model.named_parameters() if "alpha" in name]
    assert names == [
        f"decoder.layers.{layer}.mlp.activation_func.alpha_{sign}"
        for layer in range(3)
        for sign in "pn"
    ]
    logits_and_grads(model)
    assert all(float(p.grad.abs()) > 0 for n, p in model.named_parameters() if "alpha" in n)
    assert all(isinstance(module, ParallelXIELU) for (module,) in found.values())


def local_layers_use_our_norm_and_attention() -> None:
    from megatron_xielu.mcore.attention import SDPAttention
    from megatron_xielu.mcore.norm import RMSNorm

    model = build(config(qk_layernorm=True))
    norms = {name for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    per_layer = ("input_layernorm", "pre_mlp_layernorm")
    per_layer += ("self_attention.q_layernorm", "self_attention.k_layernorm")
    expected = {f"decoder.layers.{layer}.{name}" for layer in range(3) for name in per_layer}
    assert norms == expected | {"decoder.final_layernorm"}
    cores = [layer.self_attention.core_attention for layer in model.decoder.layers]
    assert all(isinstance(core, SDPAttention) for core in cores)
    logits_and_grads(model)


def an_uninstalled_placeholder_raises() -> None:
    from megatron.training.models.gpt import default_layer_spec

    from megatron_xielu.mcore.activation import install
    from megatron_xielu.mcore.layer_specs import use_xielu

    def stock_spec(model_config: Any, vp_stage: int | None = None) -> Any:
        use_xielu(model_config.transformer)
        return default_layer_spec(model_config, vp_stage)

    model = build(config(), stock_spec)
    with pytest.raises(RuntimeError, match=r"whose xIELU was never installed.*xielu_layer_spec"):
        logits_and_grads(model)
    install(model)
    logits_and_grads(model)


def a_gated_mlp_is_refused() -> None:
    with pytest.raises(ValueError, match="xIELU is not gated: leave out --swiglu"):
        build(config(gated_linear_unit=True))


def experts_get_their_own() -> None:
    from megatron_xielu.mcore.activation import ParallelXIELU, installed_activations

    mixture = {"num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_router_topk": 2}
    mixture |= {"moe_shared_expert_intermediate_size": 64, "moe_grouped_gemm": False}
    model = build(config(**mixture))
    found = [name for name, module in model.named_modules() if isinstance(module, ParallelXIELU)]
    # four experts and the shared one in each of three layers
    assert len(found) == 15
    assert len({id(p) for n, p in model.named_parameters() if "alpha" in n}) == 30
    assert [len(modules) for modules in installed_activations(model).values()] == [5, 5, 5]
    logits_and_grads(model)


def a_module_without_room_for_alphas_is_named() -> None:
    from megatron_xielu.mcore.activation import XIELUPlaceholder, install

    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.activation_func = XIELUPlaceholder()
    with pytest.raises(RuntimeError, match=r"experts \(Module\) has no place for xIELU's"):
        install(model)


def multi_token_prediction_is_reached_by_the_hook() -> None:
    from megatron_xielu.mcore.activation import ParallelXIELU, installed_activations
    from megatron_xielu.mcore.layer_specs import install_on_chunks

    model = build(config(mtp_num_layers=1))
    (model,) = install_on_chunks([model])
    found = [name for name, module in model.named_modules() if isinstance(module, ParallelXIELU)]
    assert len(found) == 4
    assert any(name.startswith("mtp.") for name in found)
    # its layer counts from 1 again and must not stand for the decoder's first
    assert [len(modules) for modules in installed_activations(model).values()] == [1, 1, 1]


def settings_reach_the_modules() -> None:
    from megatron_xielu.mcore.activation import XIELUPlaceholder, installed_activations

    transformer = config()
    transformer.activation_func = XIELUPlaceholder(1.25, 2.0, beta=0.75, impl="reference")
    for (module,) in installed_activations(build(transformer)).values():
        a_p, a_n = module.effective_alphas()
        assert (float(a_p), float(a_n)) == (pytest.approx(1.25), pytest.approx(2.0))
        assert (module.beta, module.impl) == (0.75, "reference")


def attention_equals_megatrons() -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_xielu.mcore.attention import SDPAttention

    generator = torch.Generator().manual_seed(0)
    for groups in (4, 2, 1):
        settings = config(num_query_groups=groups)
        for masked in (False, True):
            results = []
            shapes = [(16, 2, 4, 8), (16, 2, groups, 8), (16, 2, groups, 8)]
            qkv = [torch.randn(shape, generator=generator) for shape in shapes]
            upstream = torch.randn(16, 2, 32, generator=generator)
            # True hides: causal, and the first three tokens are another document
            mask = ~torch.ones(16, 16, dtype=torch.bool).tril()
            mask[3:, :3] = True
            for cls in (DotProductAttention, SDPAttention):
                core = cls(settings, 1, AttnMaskType.causal, "self")
                leaves = [tensor.clone().requires_grad_() for tensor in qkv]
                out = core(*leaves, mask[None, None] if masked else None)
                out.backward(upstream)
                results.append([out.detach(), *(leaf.grad for leaf in leaves)])
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def attention_hands_back_what_torch_cannot_do() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_xielu.mcore.attention import SDPAttention

    core = SDPAttention(config(window_size=(4, 0)), 1, AttnMaskType.causal, "self")
    qkv = [torch.randn(16, 2, 4, 8) for _ in range(3)]
    near = core(*qkv, None)
    qkv[2] = qkv[2].clone()
    qkv[2][0] += 100
    # the last query looks back four tokens, so the first value must not matter to it
    assert torch.equal(core(*qkv, None)[-1], near[-1])


def optimizer_equals_torchs_adamw() -> None:
    from megatron_xielu.mcore.adamw import GroupStepAdamW

    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours = [torch.ones(5, 3).requires_grad_(), torch.ones(1).requires_grad_()]
    theirs = [parameter.detach().clone().requires_grad_() for parameter in ours]
    groups = [{"params": ours, "weight_decay": 0.1}, {"params": []}]
    optimizer = GroupStepAdamW(groups, **settings)
    reference = torch.optim.AdamW(theirs, **settings, fused=True)
    for step in range(4):
        for parameters in (ours, theirs):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.1 + step).sin()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert [group["step"] for group in optimizer.param_groups] == [4, 4]
    assert set(optimizer.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}
    with pytest.raises(ValueError, match="needs TransformerEngine or Apex"):
        GroupStepAdamW(ours, adam_w_mode=False)


def the_cpu_platform_answers_for_cuda() -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.arange(3, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.tensor([1.0], device=torch.device("cuda", 0)).device.type == "cpu"
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor
    assert tensor.pin_memory() is tensor
    assert tensor.to("cuda:0", torch.float64).dtype == torch.float64
    assert tensor.new_zeros(3, device="cuda").device.type == "cpu"
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.type(torch.int32).dtype == torch.int32
    assert torch.nn.Linear(2, 2).cuda(0).weight.device.type == "cpu"
    assert torch.cuda.device_count() == 1
    torch.manual_seed(5)
    first = torch.rand(2)
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.rand(2), first)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert not torch.cuda.is_current_stream_capturing()


def rope_is_scaled_by_the_factor() -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_xielu.mcore import patches
    from megatron_xielu.mcore.activation import XIELUPlaceholder
    from megatron_xielu.mcore.model_config import model_config

    groups = ProcessGroupCollection.use_mpu_process_groups()
    for factor in (None, 8.0, 32.0):
        with patches.command_line(_argv(factor)):
            args = validate_args(parse_args())
        model = GPTModelBuilder(model_config(args, XIELUPlaceholder())).build_model(groups)
        expected = torch.tensor(_llama3_frequencies(500_000.0, 64, factor), dtype=torch.float64)
        got = model.rotary_pos_emb.inv_freq.double()
        # fp32 raises theta to a power, which magnifies a rounding of it by ln(theta)
        close = 2 * math.log(500_000.0) * torch.finfo(torch.float32).eps
        torch.testing.assert_close(got, expected, rtol=close, atol=0)


def _argv(factor: float | None) -> list[str]:
    given = ["model.num_layers=1", "model.vocab_size=64", "model.head_dim=64"]
    given += ["model.rope_theta=500000", "parallel.tensor_model_parallel_size=1"]
    given += ["logging.eval_iters=0"]
    scaled = [] if factor is None else [f"model.rope_scaling_factor={factor}"]
    return megatron_args(
        load_recipe("tiny", [*given, *scaled]),
        world_size=1,
        device="cpu",
        run_dir=Path("run"),
        precision="fp32",
        transformer_impl="local",
    )


def _llama3_frequencies(theta: float, size: int, factor: float | None) -> list[float]:
    """Llama 3.1's rule for a model trained on 8,192 tokens: slow waves are slowed further."""
    frequencies = []
    for channel in range(0, size, 2):
        frequency = theta ** (-channel / size)
        waves = 8192 * frequency / (2 * math.pi)
        kept = min(max((waves - 1) / (4 - 1), 0.0), 1.0)
        scaled = frequency if factor is None else frequency / factor
        frequencies.append(kept * frequency + (1 - kept) * scaled)
    return frequencies


def tensor_parallel_ranks_draw_different_weights() -> None:
    from megatron.core import parallel_state

    weight = build(config()).decoder.layers[0].mlp.linear_fc1.weight.detach()
    both = [torch.empty_like(weight) for _ in range(2)]
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather(both, weight.contiguous(), group=group)
    assert not torch.equal(*both)


def norm_carries_the_sequence_parallel_mark() -> None:
    from megatron_xielu.mcore.norm import RMSNorm

    plain = RMSNorm(config(), 32, eps=1e-6)
    marked = RMSNorm(config(sequence_parallel=True, tensor_model_parallel_size=2), 32)
    assert (plain.weight.sequence_parallel, marked.weight.sequence_parallel) == (False, True)
    x = torch.randn(5, 32)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(plain(x), expected)


def experts_are_summed_over_their_own_group(impl: str = "local") -> None:
    from megatron_xielu.mcore.activation import ParallelXIELU

    mixture = {"num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_router_topk": 2}
    mixture |= {"moe_shared_expert_intermediate_size": 64, "moe_grouped_gemm": False}
    cut = {"sequence_parallel": True, "tensor_model_parallel_size": 2}
    model = build(config(transformer_impl=impl, **mixture, **cut))
    marked = {
        name: module.alpha_p.sequence_parallel
        for name, module in model.named_modules()
        if isinstance(module, ParallelXIELU)
    }
    # Megatron sums what is marked over the dense group, which is not an expert's
    assert len(marked) == 15
    assert all(mark is ("shared_experts" in name) for name, mark in marked.items())


def transformer_engine_layers_get_xielu() -> None:
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    from megatron_xielu.mcore.activation import installed_activations

    half = {"bf16": True, "params_dtype": torch.bfloat16}
    model = build(config(transformer_impl="transformer_engine", **half)).bfloat16()
    assert sorted(installed_activations(model)) == [1, 2, 3]
    for layer in model.decoder.layers:
        assert isinstance(layer.mlp.linear_fc1, TELayerNormColumnParallelLinear)
        assert isinstance(layer.mlp.linear_fc2, TERowParallelLinear)
        assert layer.mlp.activation_func.alpha_p.dtype == torch.float32
    with pytest.raises(Exception, match=r"(?i)cuda"):
        logits_and_grads(model)


def transformer_engine_checkpoints_have_the_local_ones_keys() -> None:
    from megatron.core.dist_checkpointing import ShardedTensor

    shapes = []
    for impl in ("local", "transformer_engine"):
        state = build(config(transformer_impl=impl)).sharded_state_dict()
        tensors = [value for value in state.values() if isinstance(value, ShardedTensor)]
        shapes.append({tensor.key: tensor.global_shape for tensor in tensors})
    assert shapes[0] == shapes[1]
    assert shapes[0]["decoder.layers.mlp.activation_func.alpha_p"] == (3, 1)
    assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" in shapes[0]


def transformer_engine_experts_are_summed_over_their_own_group() -> None:
    experts_are_summed_over_their_own_group("transformer_engine")
