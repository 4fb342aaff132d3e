"""The GPU code that torch.compile generates for the published formula, obtained without a GPU.

torch.compile itself insists on a GPU. So its parts are called one by one: the graphs of forward and
backward are traced and partitioned on the CPU, moved to pretended CUDA tensors, and given to
Inductor with a GPU's properties in place of the driver's. What Inductor writes is executed with
stand-ins for its kernels, which shows their arguments, and each kernel is compiled in all the
configurations of which torch.compile would keep the fastest.

These parts are no public interface. They are those of torch 2.13; where another version refuses,
the figures are missing. It happens in a process of its own, so that nothing else sees the pretence.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from megatron_xielu.bench.ahead import Launch, Size, pretended_driver
from megatron_xielu.ops.reference import xielu_as_published

# what Inductor's choices depend on: those of an H100
PROPERTIES = {
    "name": "NVIDIA H100 80GB HBM3",
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "shared_memory_per_block_optin": 227 << 10,
    "L2_cache_size": 50 << 20,
    "total_memory": 80 << 30,
}


class Unobtainable(Exception):
    """Why this version of torch does not give its code away."""


def launches(rows: int, columns: int, capability: int) -> list[tuple[str, list[Launch]]]:
    """What torch.compile launches for forward and backward, of bfloat16 x of rows x columns.

    Returns:
        For each launch what it belongs to, and the launch in each configuration.

    Raises:
        Unobtainable: torch is not as it is expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "launches"
        arguments = [str(number) for number in (rows, columns, capability)]
        # code for a pretended GPU must not end up where a real one looks for its own
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        done = subprocess.run(
            [sys.executable, "-m", __name__, *arguments, str(result)],
            capture_output=True,
            text=True,
            env={**os.environ, **caches},
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise Unobtainable(f"torch {torch.__version__}: {last}")
        found: list[tuple[str, list[Launch]]] = pickle.loads(result.read_bytes())
        return found


@dataclass(frozen=True)
class _Graph:
    """Of forward or backward, and the tensors that it takes."""

    name: str
    module: fx.GraphModule
    inputs: Sequence[Tensor]


@dataclass(frozen=True)
class _Generated:
    """A kernel as Inductor writes it, and the arguments that it is launched with."""

    name: str
    source: str
    arguments: tuple[Any, ...] = ()

    def compiled(self, capability: int) -> Iterator[Launch]:
        """The launch in each configuration."""
        from torch._inductor.codecache import PyCodeCache
        from torch._inductor.runtime.triton_heuristics import GridExpr
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        tuner = getattr(PyCodeCache.load(self.source), self.name)
        signature, attributes = tuner.triton_meta["signature"], tuner.triton_meta["configs"][0]
        named = dict(zip(tuner.fn.arg_names, self.arguments, strict=False))
        pointers = [name for name, kind in signature.items() if kind != "constexpr"]
        tensors = {
            ordinal: Size(name, named[name].numel(), named[name].element_size())
            for ordinal, name in enumerate(pointers)
            if isinstance(named[name], Tensor)
        }
        for config in tuner.configs:
            constants = {**tuner.triton_meta["constants"], **config.kwargs}
            compiled = compile(
                ASTSource(tuner.fn, signature, constants, attributes),
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            )
            x, y, z = GridExpr.from_meta(tuner.inductor_meta, config).eval_slow(named)
            yield Launch(
                kernel=self.name,
                programs=x * y * z,
                warps=config.num_warps,
                shared=compiled.metadata.shared,
                tensors=tensors,
                cubin=compiled.asm["cubin"],
            )


def _trace(rows: int, columns: int) -> list[_Graph]:
    """The graphs as torch.compile makes them."""
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.compile_fx import _recursive_joint_graph_passes
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode

    graphs: list[_Graph] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(_Graph("backward" if graphs else "forward", gm, example_inputs))
        return make_boxed_func(gm)

    def partition(module: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        _recursive_joint_graph_passes(module)
        return min_cut_rematerialization_partition(module, inputs, compiler="inductor", **options)

    function = aot_function(
        xielu_as_published,
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    with FakeTensorMode():
        shapes = ((rows, columns), (1,), (1,))
        x, *alphas = (torch.empty(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        y = function(x, alphas[0], alphas[1])
        y.backward(torch.empty_like(y))
    return graphs


@contextlib.contextmanager
def _pretended_gpu(capability: int) -> Iterator[None]:
    """torch believes in a GPU, as far as Inductor asks for one before it launches anything."""
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils._triton import has_triton

    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(major=major, minor=minor, **PROPERTIES)
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (major, minor),
        "get_device_properties": properties,
        "get_rng_state": torch.get_rng_state(),
        "set_rng_state": None,
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_DeviceGuard": contextlib.nullcontext(),
    }
    has_triton.cache_clear()
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, a=answer: a))
        asked = staticmethod(lambda *_: properties)
        stack.enter_context(mock.patch.object(CudaInterface, "get_device_properties", asked))
        helper = "torch._inductor.runtime.triton_helpers.set_driver_to_gpu"
        stack.enter_context(mock.patch(helper))
        stack.enter_context(pretended_driver(capability))
        yield


def _generate(graph: _Graph) -> str:
    """The module that Inductor writes."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    class Written(BaseException):
        """Ends the compilation where it would load the module."""

    lower = GraphLowering.codegen

    def codegen(self: GraphLowering) -> None:
        raise Written(lower(self)[0].value)

    for node in graph.module.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", torch.device("cuda", 0))
    graph.module.recompile()
    with FakeTensorMode() as mode, tracing(TracingContext(mode)):
        inputs = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            for t in graph.inputs
        ]
        moved = make_fx(graph.module)(*inputs)
        try:
            with mock.patch.object(GraphLowering, "codegen", codegen):
                compile_fx_inner(moved, inputs, is_backward=graph.name == "backward")
        except Written as written:
            return str(written)
    raise RuntimeError("Inductor wrote no code")


def _execute(code: str, graph: _Graph) -> list[_Generated]:
    """Its kernels in the order in which it launches them."""
    from torch._inductor.async_compile import AsyncCompile

    launched: list[_Generated] = []

    def kernel(_: AsyncCompile, name: str, source: str, **__: Any) -> Any:
        def run(*arguments: Any, stream: int) -> None:
            launched.append(_Generated(name, source, arguments))

        return SimpleNamespace(run=run)

    def allocate(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")

    module: dict[str, Any] = {"__name__": "generated"}
    with mock.patch.multiple(AsyncCompile, triton=kernel, wait=lambda *_: None):
        exec(code, module)
    module |= {
        "empty_strided_cuda": allocate,
        "assert_size_stride": lambda *_: None,
        "copy_if_misaligned": lambda tensor: tensor,
        "get_raw_stream": lambda _: 0,
    }
    module["call"]([allocate(t.shape, t.stride(), t.dtype) for t in graph.inputs])
    return launched


def main(rows: int, columns: int, capability: int, result: Path) -> None:
    """Write what `launches` returns."""
    graphs = _trace(rows, columns)
    with _pretended_gpu(capability):
        found = [
            (graph.name, list(kernel.compiled(capability)))
            for graph in graphs
            for kernel in _execute(_generate(graph), graph)
        ]
    result.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
