"""Which checks there are, what each needs of a machine, and how long it may take."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

from megatron_xielu.doctor.machine import why_no_gpu
from megatron_xielu.training.transformer_engine import NEEDS, Found, can_run


@dataclass(frozen=True)
class Check:
    """One feature.

    Attributes:
        name: as it is printed.
        function: module:function, which returns what it measured and raises `Failed` or `Skipped`.
        argument: of the function, if it has one.
        gpu: it needs a GPU; otherwise it runs as if there were none.
        capability: that every GPU needs.
        te: it needs TransformerEngine.
        fp8: the recipe that TransformerEngine must be able to compute.
        seconds: after which it is ended.
        quick: `doctor` runs it, not `bench --training` alone.
    """

    name: str
    function: str
    argument: str | None = None
    gpu: bool = False
    capability: tuple[int, int] = (0, 0)
    te: bool = False
    fp8: str | None = None
    seconds: float = 60
    quick: bool = True

    @property
    def command(self) -> list[str]:
        """What runs it."""
        words = [sys.executable, "-m", f"{_HERE}.child", self.function]
        return words if self.argument is None else [*words, self.argument]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that it needs besides those that are there."""
        connections = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        return connections if self.gpu else {"CUDA_VISIBLE_DEVICES": "", **connections}

    def why_not(self, found: Found) -> str | None:
        """Why it cannot run on this machine; None if it can."""
        if not self.gpu:
            return None
        if not found.gpus:
            return f"no GPU: {why_no_gpu()}"
        for name, *capability in found.gpus:
            if tuple(capability) < self.capability:
                needed = ".".join(map(str, self.capability))
                return f"{name} has no capability {needed}"
        if self.te and found.version is None:
            return "TransformerEngine is not installed"
        if self.te and found.error is not None:
            return f"TransformerEngine cannot be imported: {found.error}"
        if self.fp8 is not None:
            able = [can_run(self.fp8, (major, minor), found.cuda) for _, major, minor in found.gpus]
            if not all(able):
                return f"needs {NEEDS[self.fp8]}"
        return None


_HERE = "megatron_xielu.doctor"
_KERNELS, _RANKS, _TRAINING = (f"{_HERE}.{name}" for name in ("kernels", "ranks", "training"))
_FP8 = ("delayed", "tensorwise", "blockwise")
# bfloat16 needs 8.0
_on_gpu = partial(Check, gpu=True, capability=(8, 0))
CHECKS = (
    # the first one may have to compile
    Check("CPU kernels", f"{_KERNELS}:on_cpu", seconds=240),
    Check("limits", f"{_HERE}.limits:enough"),
    Check("2 ranks over gloo", f"{_RANKS}:over_gloo"),
    Check("training step", f"{_TRAINING}:learns", "local"),
    Check("checkpoint", f"{_TRAINING}:resumes", "local off"),
    Check("FP8 emulated", f"{_TRAINING}:emulates"),
    _on_gpu("GPU kernels", f"{_KERNELS}:on_gpu"),
    _on_gpu("FP8 kernels", f"{_KERNELS}:in_fp8", capability=NEEDS["delayed"].capability),
    _on_gpu("CUDA graph", f"{_KERNELS}:in_a_graph"),
    _on_gpu("all GPUs over NCCL", f"{_RANKS}:over_nccl"),
    _on_gpu("training step on a GPU", f"{_TRAINING}:learns", "local"),
    _on_gpu(
        "training step, TransformerEngine", f"{_TRAINING}:learns", "transformer_engine", te=True
    ),
    *(
        _on_gpu(f"FP8 {name}, fused", f"{_TRAINING}:fused_is_unfused", name, te=True, fp8=name)
        for name in _FP8
    ),
    *(
        _on_gpu(
            f"FP8 {name}, exact resume",
            f"{_TRAINING}:resumes",
            f"transformer_engine {name}",
            te=True,
            fp8=name,
            # the one that keeps a history
            quick=name == "delayed",
        )
        for name in _FP8
    ),
    _on_gpu(
        "CUDA graphs of the layers",
        f"{_TRAINING}:captured_is_not_captured",
        te=True,
        seconds=120,
        quick=False,
    ),
    Check("layouts of one rank", f"{_TRAINING}:layouts", seconds=600, quick=False),
    _on_gpu("layouts of one rank on a GPU", f"{_TRAINING}:layouts", seconds=600, quick=False),
)
