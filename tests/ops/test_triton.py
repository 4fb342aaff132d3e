"""The Triton kernels: in Triton's interpreter anywhere, and the same checks on a GPU."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_xielu import xielu
from megatron_xielu.ops import dispatch, triton
from megatron_xielu.ops.family import XIELU
from tests.ops.triton_interpreted import CHECKS, SLOW_CHECKS, compute, raw, truth

pytest.importorskip("triton", reason="Triton is not installed")

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


@functools.cache
def interpreted(names: tuple[str, ...]) -> dict[str, tuple[str, str | None]]:
    """What each check printed, and its traceback or None, from one process for all of them."""
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "tests.ops.triton_interpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, *names], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name: str) -> None:
    printed, failure = interpreted(tuple(CHECKS))[name]
    print(printed)
    assert failure is None, failure


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CHECKS)
def test_more_in_the_interpreter(name: str) -> None:
    printed, failure = interpreted(tuple(SLOW_CHECKS))[name]
    print(printed)
    assert failure is None, failure


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("name", CHECKS | SLOW_CHECKS)
    def test_check(self, name: str) -> None:
        (CHECKS | SLOW_CHECKS)[name]("cuda")

    def test_it_is_what_auto_takes(self) -> None:
        for dtype in triton.DTYPES:
            assert (
                dispatch.choose(torch.empty(0, device="cuda", dtype=dtype), "auto")[0] == "triton"
            )

    @pytest.mark.parametrize("biased", [False, True])
    def test_the_same_bits_every_time(self, biased: bool) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        x, grad_y = torch.randn(2, 4096, 9216, generator=generator, device="cuda").bfloat16()
        bias = x[0].clone() if biased else None
        first = compute(XIELU, x, raw(XIELU, "cuda"), bias, grad_y)
        for _ in range(5):
            again = compute(XIELU, x, raw(XIELU, "cuda"), bias, grad_y)
            for a, b in zip((*first[:2], *first[2]), (*again[:2], *again[2]), strict=True):
                assert torch.equal(a, b)

    def test_cuda_graph(self) -> None:
        x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        alphas = [alpha.requires_grad_() for alpha in raw(XIELU, "cuda")]
        inputs = (x, *alphas)

        def step() -> tuple[torch.Tensor, ...]:
            y = xielu(x, *alphas, impl="triton")
            return (y, *torch.autograd.grad(y, inputs, torch.ones_like(y)))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            alphas[1].fill_(2.0)
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)

    def test_torch_compile_keeps_one_graph(self) -> None:
        x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        bias = torch.randn(512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        inputs = (x, *(alpha.requires_grad_() for alpha in raw(XIELU, "cuda")), bias)

        def function(
            x: torch.Tensor, p: torch.Tensor, n: torch.Tensor, b: torch.Tensor
        ) -> torch.Tensor:
            return xielu(x, p, n, bias=b, impl="triton")

        results = []
        for run in (function, torch.compile(function, fullgraph=True)):
            y = run(*inputs)
            results.append((y, *torch.autograd.grad(y, inputs, torch.ones_like(y))))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("biased", [False, True])
    def test_more_than_2_to_the_31_elements(self, biased: bool) -> None:
        columns = 4096
        rows = 2**31 // columns + 3
        if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * columns:
            pytest.skip("needs 22 GB of free GPU memory")
        x = torch.zeros(rows, columns, device="cuda", dtype=torch.bfloat16)
        x[-3:] = torch.randn(3, columns, device="cuda")
        bias = torch.zeros(columns, device="cuda", dtype=x.dtype) if biased else None
        alphas = raw(XIELU, "cuda")
        y, dx, grads = compute(XIELU, x, alphas, bias, grad_y=x)
        want_y, want_dx, want = truth(XIELU, x[-3:], alphas, bias, grad_y=x[-3:])
        torch.testing.assert_close(y[-3:].double(), want_y, rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(dx[-3:].double(), want_dx, rtol=2**-8, atol=1e-6)
        assert not y[:-3].any()
        for got, exact in zip(grads[:2], want[:2], strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)

    def test_another_device_than_the_current_one(self) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        x = torch.randn(100, device="cuda:1")
        y = xielu(x, *raw(XIELU, "cuda:1"), impl="triton")
        torch.testing.assert_close(y, xielu(x, *raw(XIELU, "cuda:1"), impl="reference"))


def test_a_cpu_tensor_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"x is on cpu; move it to a GPU or use impl=\"auto\""):
        xielu(torch.ones(3), *raw(XIELU, "cpu"), impl="triton")


def test_a_type_without_a_kernel_is_named() -> None:
    with pytest.raises(ValueError, match=r"no Triton kernel for torch.float64; use impl=\"eager\""):
        xielu(torch.ones(3, dtype=torch.float64), *raw(XIELU, "cpu"), impl="triton")


def test_a_missing_or_old_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = triton._unusable_triton.__wrapped__
    assert reason() is None
    monkeypatch.setattr("triton.__version__", "3.2.0")
    assert "Triton 3.2.0 is too old; the kernels need 3.3" in (reason() or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'not installed; "pip install triton"' in (reason() or "")


def test_old_and_foreign_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = triton._unsuitable_gpu.__wrapped__
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    assert "8.0 or newer, and T4 has 7.5" in (reason(torch.device("cuda", 0)) or "")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "NVIDIA" in (reason(torch.device("cuda", 0)) or "")


def test_importing_the_package_imports_no_kernel() -> None:
    code = (
        "import sys, megatron_xielu; "
        "assert not [m for m in sys.modules if m.split('.')[0] == 'triton'"
        " or m.startswith('megatron_xielu.ops.triton.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
