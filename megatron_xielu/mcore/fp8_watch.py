"""Looks at what FP8 does to xIELU's output, layer by layer, before outliers cost a run.

Every `interval` steps all ranks measure one training step, exchange two small tables, and so come
to the same decision. The steps between cost nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.training.global_vars import get_args, get_tensorboard_writer
from torch import nn

from megatron_xielu.errors import SharedUserError, UnhealthyRun, UserError
from megatron_xielu.mcore.activation import ParallelXIELU
from megatron_xielu.mcore.fp8_emulation import EmulatedProduct, Statistics
from megatron_xielu.mcore.observer import Listener, is_reporting_rank
from megatron_xielu.mcore.outliers import SUMS

Numbers = dict[str, list[float | None]]
_SHOWN = 5


@dataclass(frozen=True)
class WatchSettings:
    """When to look and what follows; keys of the recipe's `fp8` section."""

    interval: int = 100
    """Steps from one look to the next; 0 for none."""
    on_outlier: Literal["warn", "bf16_layer", "stop"] = "warn"
    max_saturated: float | None = None
    """Share of xIELU's output that may be too large for FP8's scale; None for any."""
    max_flushed: float | None = None
    """Share of it that may be rounded to zero."""
    max_kurtosis: float | None = None
    """Of xIELU's input: E[x^4] / E[x^2]^2, 3 for normal numbers around zero."""


@dataclass(frozen=True)
class InBf16:
    """A layer whose fc2 left FP8, and from which step on."""

    layer: int
    step: int


class Watch:
    """Is called by the observer of the training loop and around each training step.

    Args:
        listener: told of every look on the reporting rank, and on each rank of layers in bf16.
        record: a file that all ranks read and rank 0 writes: the layers that left FP8, which stay
            out of it whatever `on_outlier` says later. None keeps it for this process alone.
    """

    def __init__(self, settings: WatchSettings, listener: Listener, record: Path | None) -> None:
        self.settings = settings
        self.listener = listener
        self.record = record
        self._in_bf16: list[InBf16] = []

    def start(self, model: Sequence[nn.Module], step: int) -> None:
        """Everything is loaded and training begins after `step`; raises UserError on all ranks."""
        # what a later step decided, this run will meet again
        self._in_bf16 = [each for each in self._read() if each.step <= step]
        self._keep_in_bf16(model, [each.layer for each in self._in_bf16])
        if self._in_bf16:
            layers = ", ".join(str(each.layer) for each in self._in_bf16)
            self.listener.note(f"fc2 stays in bf16 in layer {layers} (fp8.on_outlier)")
        self._write()

    def before(self, model: Sequence[nn.Module], step: int) -> None:
        """This step comes next."""
        if not self._is_due(step):
            return
        for _, mlp in mlps(model):
            mlp.activation_func.look.begin()
            if (product := _emulated(mlp)) is not None:
                product.operands["input"].statistics = Statistics()

    def after(self, model: Sequence[nn.Module], step: int, *, taken: bool) -> None:
        """The step is done, on all ranks.

        Args:
            taken: by the optimizer; numbers that are not finite are not this watch's.

        Raises:
            UnhealthyRun: a threshold is crossed and `on_outlier` is stop.
        """
        if not self._is_due(step):
            return
        for _, mlp in mlps(model):
            mlp.activation_func.look.on = False
        if taken:
            self._judge(model, step, measure(model, get_args().num_layers))

    def _is_due(self, step: int) -> bool:
        return self.settings.interval > 0 and step % self.settings.interval == 0

    def _judge(self, model: Sequence[nn.Module], step: int, numbers: Numbers) -> None:
        crossed = list(self._crossed(numbers))
        if is_reporting_rank():
            _draw(step, numbers)
            self.listener.outliers(
                step=step, numbers=numbers, crossed=_shown([text for _, text in crossed])
            )
        if not crossed or self.settings.on_outlier == "warn":
            return
        if self.settings.on_outlier == "stop":
            raise UnhealthyRun(
                f"step {step}: FP8 loses too much of xIELU's output "
                "(fp8.on_outlier=stop); this step is not saved:\n"
                + "\n".join(f"  {text}" for text in _shown([text for _, text in crossed]))
                + "\nGo on from the last checkpoint in bf16 (fp8.recipe=off --allow-changed "
                "fp8.recipe), with fp8.fc2_input=bf16 (--allow-changed fp8.fc2_input), or with "
                "fp8.on_outlier=bf16_layer, which takes the layers named above out of FP8 alone."
            )
        layers = sorted({layer for layer, _ in crossed} - {each.layer for each in self._in_bf16})
        self._keep_in_bf16(model, layers)
        self._in_bf16 += [InBf16(layer, step) for layer in layers]
        self._write()
        if layers:
            names = ", ".join(map(str, layers))
            self.listener.note(
                f"step {step}: fc2 goes on in bf16 in layer {names} (fp8.on_outlier=bf16_layer)"
            )

    def _crossed(self, numbers: Numbers) -> Iterator[tuple[int, str]]:
        limits = {
            "saturated": self.settings.max_saturated,
            "flushed": self.settings.max_flushed,
            "kurtosis": self.settings.max_kurtosis,
        }
        for name, limit in limits.items():
            for index, value in enumerate(numbers[name]):
                # nan is too much as well
                if limit is not None and value is not None and not value <= limit:
                    yield (
                        index + 1,
                        f"layer {index + 1}: {name} {value:.3g} > {limit:g} (fp8.max_{name})",
                    )

    def _keep_in_bf16(self, model: Sequence[nn.Module], layers: Sequence[int]) -> None:
        """Every rank must call it: what one cannot do, all of them say."""
        problem: str | None = None
        try:
            for number, mlp in mlps(model):
                if number in layers:
                    keep_in_bf16(mlp)
        except UserError as error:
            problem = str(error)
        problems: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(problems, problem)
        if found := next(filter(None, problems), None):
            raise SharedUserError(found)

    def _read(self) -> list[InBf16]:
        if self.record is None or not self.record.is_file():
            return []
        return [InBf16(**each) for each in json.loads(self.record.read_text())]

    def _write(self) -> None:
        if self.record is None or torch.distributed.get_rank() != 0:
            return
        if not self._in_bf16 and not self.record.exists():
            return
        beside = self.record.with_suffix(".new")
        beside.write_text(json.dumps([asdict(each) for each in self._in_bf16]) + "\n")
        os.replace(beside, self.record)


def mlps(model: Sequence[nn.Module]) -> Iterator[tuple[int, Any]]:
    """(number of the decoder layer from 1, MLP with xIELU) of this rank's model chunks."""
    for chunk in model:
        for block in chunk.modules():
            if isinstance(block, TransformerBlock):
                for layer in block.layers:
                    for mlp in layer.modules():
                        if isinstance(mlp, MLP) and isinstance(mlp.activation_func, ParallelXIELU):
                            yield layer.layer_number, mlp


def measure(model: Sequence[nn.Module], num_layers: int) -> Numbers:
    """What the MLPs' looks have seen, of all ranks, by layer; every rank must call it.

    Returns:
        For each layer, None where nothing was written in FP8 by xIELU or the emulation: `amax` of
        xIELU's output; the shares of it that are `saturated` and `flushed` to zero; `kurtosis` of
        its input, E[x^4] / E[x^2]^2; and `alpha_p`, the effective a_p, of a mixture the largest.
    """
    sums = torch.zeros(num_layers, len(SUMS), dtype=torch.float64, device="cuda")
    most = torch.full((num_layers, 2), -1.0, dtype=torch.float64, device="cuda")
    for number, mlp in mlps(model):
        look, row = mlp.activation_func.look, number - 1
        a_p, _ = mlp.activation_func.effective_alphas()
        most[row, 1] = torch.fmax(most[row, 1], a_p.detach().double().squeeze())
        if look.sums is not None:
            sums[row] += look.sums
        if look.amax is not None:
            most[row, 0] = torch.fmax(most[row, 0], look.amax.squeeze())
        if (product := _emulated(mlp)) is not None:
            seen = product.operands["input"].statistics
            sums[row, 3:] += sums.new_tensor([seen.elements, seen.saturated, seen.flushed])
            most[row, 0] = max(float(most[row, 0]), seen.amax)
    # of tensor and data parallelism each rank has a part, of the pipeline its own layers
    torch.distributed.all_reduce(sums)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    numbers: Numbers = {
        name: [] for name in ("amax", "saturated", "flushed", "kurtosis", "alpha_p")
    }
    for (inputs, squares, fourths, written, saturated, flushed), (amax, a_p) in zip(
        sums.tolist(), most.tolist(), strict=True
    ):
        numbers["amax"].append(amax if written else None)
        numbers["saturated"].append(saturated / written if written else None)
        numbers["flushed"].append(flushed / written if written else None)
        numbers["kurtosis"].append(inputs * fourths / squares**2 if squares else None)
        numbers["alpha_p"].append(a_p if a_p >= 0 else None)
    return numbers


def keep_in_bf16(mlp: Any) -> None:
    """From now on an MLP's second product is not computed in FP8.

    Raises:
        UserError: its layers are TransformerEngine's plain modules, which always cast.
    """
    if _emulated(mlp) is not None:
        for name in ("_forward_impl", "get_extra_state", "set_extra_state"):
            vars(mlp.linear_fc2).pop(name, None)
        return
    if mlp.activation_func.fc2_input == "bf16":
        return
    if type(mlp).__name__ != "XIELUFusedMLP":
        raise UserError(
            "a layer of this run went on with fc2 in bf16 (fp8.on_outlier=bf16_layer), which "
            "TransformerEngine's plain modules cannot; set fp8.fused=true, or remove "
            "fp8_bf16_layers.json from the run folder to take it back into FP8"
        )
    # the modules take over what the operations have of delayed scaling, and hand it to the new ones
    for linear in (mlp.linear_fc1, mlp.linear_fc2):
        linear.set_extra_state(linear.get_extra_state())
    mlp.activation_func.fc2_input = "bf16"
    # built anew by the next forward pass
    mlp._fused_impl = None


def _emulated(mlp: Any) -> EmulatedProduct | None:
    product = vars(mlp.linear_fc2).get("_forward_impl")
    return product if isinstance(product, EmulatedProduct) else None


def _draw(step: int, numbers: Numbers) -> None:
    if (writer := get_tensorboard_writer()) is not None:
        for name, values in numbers.items():
            for layer, value in enumerate(values):
                if value is not None:
                    writer.add_scalar(f"fp8/{name}/layer_{layer}", value, step)


def _shown(lines: Sequence[str]) -> list[str]:
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [*lines[:_SHOWN], *more]
