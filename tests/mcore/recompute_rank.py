"""One rank that compares models with and without `recompute`: recompute_rank.py TP OUT.

Writes, per case, the gradients that differ in a bit and the bytes that forward leaves allocated.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_xielu.mcore import cpu_platform
from tests.mcore.checks import build, config

MIXTURE = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 48,
    "moe_router_topk": 2,
    "moe_shared_expert_intermediate_size": 64,
    "moe_grouped_gemm": False,
}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
WHOLE = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}


class Allocated(TorchDispatchMode):
    """Knows which of the memory that operations allocated under it is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.own: dict[int, tuple[StorageWeakRef, int]] = {}
        self.others: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self.own:
                self.others[storage._cdata] = StorageWeakRef(storage)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self.others:
                self.own[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self) -> int:
        return sum(size for reference, size in self.own.values() if not reference.expired())


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def held_by(run: Callable[[], Tensor]) -> int:
    """Bytes that `run` leaves allocated until backward, its result aside."""
    with Allocated() as allocated:
        result = run()
    return allocated.bytes() - result.untyped_storage().nbytes()


def peak_of(run: Callable[[], Any]) -> int:
    """The most bytes that the CPU allocator has had out at a time during `run`, above the start."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def models(changes: dict[str, Any], impl: str = "auto", saved_input: str = "exact") -> list[Any]:
    """The same weights and alphas, without and with recompute."""
    from megatron_xielu.mcore.activation import XIELUPlaceholder
    from megatron_xielu.mcore.layer_specs import install_on_chunks

    built = []
    for recompute in (False, True):
        transformer = config(**changes)
        transformer.activation_func = XIELUPlaceholder(
            impl=impl,  # type: ignore[arg-type]
            recompute=recompute,
            saved_input=saved_input,  # type: ignore[arg-type]
        )
        model = build(transformer)
        install_on_chunks([model])
        built.append(model.bfloat16() if transformer.bf16 else model)
    with torch.no_grad():
        for index, (plain, ours) in enumerate(pairs(*built)):
            if "alpha" in plain[0]:
                plain[1].fill_(0.1 + 0.05 * index)
            ours[1].copy_(plain[1])
    return built


def pairs(plain: Any, ours: Any) -> list[Any]:
    return list(zip(plain.named_parameters(), ours.named_parameters(), strict=True))


def compare(
    changes: dict[str, Any], impl: str = "auto", saved_input: str = "exact"
) -> dict[str, Any]:
    from megatron.core.pipeline_parallel.schedules import custom_backward

    built = models(changes, impl, saved_input)
    tokens = torch.arange(32).reshape(2, 16)
    positions = torch.arange(16)[None].expand(2, -1)
    losses, held, computed = [], [], []
    for model in built:
        with counted() as calls:
            # two micro-batches, both forward passes before the first backward, as in a pipeline
            both = [model(t, positions, None, labels=t) for t in (tokens, tokens + 32)]
            for loss in both:
                # torch's own would run without the CPU platform's function mode
                custom_backward(loss.sum(), None)
        losses.append(torch.stack(both))
        computed.append(len(calls))
        held.append(held_by(partial(model, tokens, positions, None, labels=tokens)))
    different = [
        name
        for (name, a), (_, b) in pairs(*built)
        if a.grad is None or not a.grad.any() or not torch.equal(a.grad, b.grad)
    ]
    if not torch.equal(*losses):
        different.append("loss")
    return {"different": different, "held": held, "computed": computed}


@contextmanager
def counted() -> Iterator[list[Tensor]]:
    """Collects the input of every forward pass of xIELU."""
    from megatron_xielu.mcore.activation import ParallelXIELU

    seen: list[Tensor] = []
    forward = ParallelXIELU.forward

    def counting(module: Any, x: Tensor) -> Tensor:
        seen.append(x)
        return forward(module, x)

    ParallelXIELU.forward = counting  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        ParallelXIELU.forward = forward  # type: ignore[method-assign]


def bytes_per_element(dtype: torch.dtype, expert: bool, saved_input: str) -> dict[str, list[float]]:
    """Of one MLP's activation: what forward leaves, and the peak of four MLPs in a row."""
    changes = {"params_dtype": dtype, "bf16": dtype == torch.bfloat16, "ffn_hidden_size": 1024}
    if expert:
        changes |= MIXTURE | {"moe_ffn_hidden_size": 1024}
    held, peak = [], []
    for model in models(changes, saved_input=saved_input):
        mlp = model.decoder.layers[0].mlp
        mlp = mlp.experts.local_experts[0] if expert else mlp
        shape = (256, 32) if expert else (128, 2, 32)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        # Megatron's routers give probabilities in fp32
        scale = (torch.rand(256, requires_grad=True),) if expert else ()

        forward_backward(mlp, x, *scale)
        held.append(held_by(partial(forward, mlp, x, *scale)) / (256 * 1024))
        peak.append(peak_of(partial(forward_backward, mlp, x, *scale)) / (256 * 1024))
    return {"held": held, "peak": peak}


def forward(mlp: Any, *args: Tensor) -> Tensor:
    output: Tensor = mlp(*args)[0]
    return output


def forward_backward(mlp: Any, x: Tensor, *scale: Tensor) -> None:
    """Four MLPs in a row, whose outputs all live at once."""
    for _ in range(4):
        x = forward(mlp, x, *scale)
    x.sum().backward()


def steps_aside() -> dict[str, Any]:
    """What else may hold or own the tensors between activation and fc2."""
    plain, ours = (model.decoder.layers[0].mlp for model in models({}))
    x = torch.randn(16, 2, 32, requires_grad=True)
    seen: dict[str, Any] = {}
    weight = ours.linear_fc2.weight
    with told() as seen["offloading"], torch.autograd.graph.save_on_cpu():
        offloaded = forward(ours, x)
    kept: list[Tensor] = []
    hook = ours.activation_func.register_forward_hook(lambda module, args, y: kept.append(y))
    once = forward(ours, x)
    hook.remove()
    # fc2's, the nearest to the output
    node = next(node for node in nodes(once) if "Linear" in type(node).__name__)
    # fused gradient accumulation leaves attributes on the parameter that it finds there
    seen["weight is the parameter"] = any(t is weight for t in node.saved_tensors)
    expected = forward(plain, x)
    (grad,) = torch.autograd.grad(expected.sum(), plain.linear_fc2.weight)
    grads = [
        torch.autograd.grad(out.sum(), weight, retain_graph=True)[0]
        for out in (offloaded, once, once)
    ]
    seen["equal gradients"] = all(torch.equal(grad, other) for other in grads)
    y = plain.activation_func(plain.linear_fc1(x)[0])
    seen["the output is whole for others"] = torch.equal(kept[0], y)
    with torch.no_grad():
        seen["without gradients"] = torch.equal(forward(ours, x), expected)
    weight.requires_grad_(False)
    with told() as seen["frozen"]:
        forward(ours, x).sum().backward()
    return seen


class TorchLinear(torch.nn.Linear):
    """An fc2 of torch's, which saves a view of its input with two dimensions."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


def another_linear() -> dict[str, Any]:
    from megatron_xielu.mcore.recompute import recompute_output

    mlp = models({})[0].decoder.layers[0].mlp
    mlp.linear_fc2 = TorchLinear(96, 32, bias=False)
    x = torch.randn(16, 2, 32, requires_grad=True)
    grads, held = [], []
    for recompute in (False, True):
        if recompute:
            recompute_output(mlp)
        held.append(held_by(partial(forward, mlp, x)))
        out = forward(mlp, x)
        grads.append(torch.autograd.grad(out.sin().sum(), (x, *mlp.parameters())))
    different = [i for i, (a, b) in enumerate(zip(*grads, strict=True)) if not torch.equal(a, b)]
    return {"different": different, "held": held}


@contextmanager
def told() -> Iterator[list[str]]:
    """Collects this package's warnings."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught if "xielu" in str(w.message)]


def nodes(output: Tensor) -> Iterator[Any]:
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            yield node
            waiting += [parent for parent, _ in node.next_functions]


def main(tp: int, out: Path) -> None:
    cpu_platform.hide_gpu_libraries()
    cpu_platform.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tp)
    model_parallel_cuda_manual_seed(1)
    cut = {"tensor_model_parallel_size": tp}
    kinds: dict[str, dict[str, Any]] = {
        "dense": {},
        "mixture": MIXTURE,
        "mtp": {"mtp_num_layers": 1},
    }
    cases = {
        f"{kind}, {'bf16' if half else 'fp32'}{', SP' if sp else ''}": (
            {**fields, **cut, **half, "sequence_parallel": sp},
            "auto",
        )
        for kind, fields in kinds.items()
        for half in ({}, BF16)
        for sp in ((False, True) if tp > 1 else (False,))
        # under tensor parallelism Megatron refuses a mixture without it, and MTP's local norms with
        if tp == 1 or kind == "dense" or sp == (kind == "mixture")
    }
    seen: dict[str, Any] = {}
    if tp == 1:
        cases |= {f"impl {impl}": ({}, impl) for impl in ("cpu", "eager", "reference")}
        cases |= {
            "bias": ({"add_bias_linear": True}, "auto"),
            "megatron mlp": (WHOLE, "auto"),
            "megatron mlp, mixture": (WHOLE | MIXTURE, "auto"),
            "megatron moe, mixture": (WHOLE | MIXTURE | {"recompute_modules": ["moe"]}, "auto"),
            "megatron full": (FULL | {"recompute_method": "uniform"}, "auto"),
            "megatron block": (FULL | {"recompute_method": "block"}, "auto"),
        }
        seen["bytes"] = {
            ", ".join(
                [
                    "expert" if expert else "MLP",
                    str(dtype).removeprefix("torch."),
                    *([] if how == "exact" else [how]),
                ]
            ): bytes_per_element(dtype, expert, how)
            for how in ("exact", "e4m3")
            for expert in (False, True)
            for dtype in (torch.bfloat16, torch.float32)
        }
        seen["aside"] = steps_aside()
        seen["another linear"] = another_linear()
    seen["e4m3"] = {
        name: compare({**fields, **cut, "sequence_parallel": tp > 1}, saved_input="e4m3")
        for name, fields in {"fp32": {}, "bf16": BF16}.items()
    }
    seen["cases"] = {name: compare(*case) for name, case in cases.items()}
    (out / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
