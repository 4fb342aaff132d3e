"""The kernels of xIELU on this machine against float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_xielu.bench.gpu.problem import BETA, ONE_ROUNDING, Problem, Results
from megatron_xielu.doctor.outcome import Failed, Skipped
from megatron_xielu.ops import xielu
from megatron_xielu.ops.dispatch import Impl
from megatron_xielu.ops.fp8_reference import Blockwise, Current, Delayed, Scaling, quantize
from megatron_xielu.ops.reference import REFERENCES

ROWS, COLUMNS = 256, 1024
# float32 round-off next to a tie, as the tests of the FP8 kernels allow
SHARE_ONE_STEP_OFF = 1e-3


def on_cpu() -> str:
    """The C++ kernels."""
    from megatron_xielu.ops.cpu import build

    reason = build.load()
    if reason is not None:
        raise Skipped(f"plain torch computes instead: {reason}")
    return _against_float64("cpu", "cpu", (torch.float32, torch.bfloat16, torch.float16))


def on_gpu() -> str:
    """The Triton kernels."""
    return _against_float64("cuda", "triton", (torch.float32, torch.bfloat16, torch.float16))


def _against_float64(device: str, impl: Impl, dtypes: tuple[torch.dtype, ...]) -> str:
    said = []
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        problem = Problem.random(ROWS, COLUMNS, dtype, device)
        results = _differentiate(problem, impl)
        if wrong := problem.wrong(ONE_ROUNDING, "xielu", results):
            raise Failed(f"{name}: {wrong}")
        assert isinstance(results.y, Tensor)
        exact = REFERENCES["xielu"](
            problem.x.double(), *(alpha.double() for alpha in problem.alphas), BETA
        )
        error = (results.y.double() - exact).abs()
        # of the terms, because near a zero of xIELU they cancel
        size = exact.abs() + BETA * problem.x.double().abs()
        # subnormal numbers have the step of the smallest normal one
        size = size.clamp_min(torch.finfo(dtype).tiny) * torch.finfo(dtype).eps
        said.append(f"{name} {float((error / size).max()):.2f}")
    return f"y off by at most {', '.join(said)} eps of its terms; gradients right"


def _differentiate(problem: Problem, impl: Impl) -> Results:
    x = problem.x.detach().clone().requires_grad_()
    alphas = [alpha.clone().requires_grad_() for alpha in problem.alphas]
    y = xielu(x, *alphas, beta=BETA, impl=impl)
    dx, *grads = torch.autograd.grad(y, (x, *alphas), problem.grad_y)
    return Results(y.detach(), dx, tuple(grads))


def in_fp8() -> str:
    """xIELU written in FP8 by each scaling, byte by byte."""
    from megatron_xielu.ops.family import XIELU
    from megatron_xielu.ops.triton import quantized

    problem = Problem.random(ROWS, COLUMNS, torch.bfloat16, "cuda")
    exact = REFERENCES["xielu"](problem.x.float(), *problem.alphas, BETA)
    scale = torch.full((1,), 8.0, device="cuda")
    scalings: dict[str, Scaling] = {
        "delayed": Delayed(scale),
        "tensorwise": Current(),
        "blockwise": Blockwise(),
    }
    shares = []
    for name, scaling in scalings.items():
        found = quantized.allocate(problem.x, scaling)
        quantized.forward(XIELU, problem.x, None, problem.alphas, BETA, scaling, found)
        expected = quantize(exact, scaling)
        for what in ("rowwise", "columnwise"):
            ours, theirs = getattr(found, what), getattr(expected, what)
            steps = (ours.view(torch.int8).int() - theirs.view(torch.int8).int()).abs()
            share = float((steps > 0).float().mean())
            if int(steps.max()) > 1 or share > SHARE_ONE_STEP_OFF:
                raise Failed(
                    f"{name}: {what} bytes are off by up to {int(steps.max())} steps, "
                    f"{share:.2%} of them; 1 step and {SHARE_ONE_STEP_OFF:.1%} are round-off"
                )
            shares.append(share)
    return f"delayed, tensorwise, blockwise: {max(shares):.4%} of the bytes one step off"


def in_a_graph() -> str:
    """Forward and backward captured in a CUDA graph and replayed on other numbers."""
    problem = Problem.random(ROWS, COLUMNS, torch.bfloat16, "cuda")
    x = torch.zeros_like(problem.x).requires_grad_()
    alphas = [alpha.clone().requires_grad_() for alpha in problem.alphas]

    def work() -> tuple[Tensor, ...]:
        y = xielu(x, *alphas, beta=BETA, impl="triton")
        return (y, *torch.autograd.grad(y, (x, *alphas), problem.grad_y))

    captured, replay = _capture(work)
    with torch.no_grad():
        x.copy_(problem.x)
    replay()
    names = ("y", "dx", "alpha_p's gradient", "alpha_n's gradient")
    differing = [
        name
        for name, ours, eager in zip(names, captured, work(), strict=True)
        if not torch.equal(ours, eager)
    ]
    if differing:
        raise Failed(f"{', '.join(differing)} of the replay have other bits than without a graph")
    return "forward and backward replayed, the same bits"


def _capture(
    work: Callable[[], tuple[Tensor, ...]],
) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # compiles and allocates what must not happen during a capture
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return results, graph.replay
