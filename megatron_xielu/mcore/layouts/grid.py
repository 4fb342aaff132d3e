"""Which models and layouts there are, and why each other combination is none. No Megatron here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True)
class Model:
    """A small model; its sizes are in `build`."""

    name: str
    kind: Literal["gpt", "hybrid"] = "gpt"
    tied: bool = False
    """The embedding is the output layer too."""
    experts: bool = False
    """Experts with a shared one (SequentialMLP) in place of the dense MLP."""
    mtp: bool = False
    """One layer that predicts the token after the next."""


MODELS = (
    Model("dense tied", tied=True),
    Model("dense untied"),
    Model("hybrid", kind="hybrid"),
    Model("MoE", experts=True),
    Model("MTP", mtp=True),
)


@dataclass(frozen=True, order=True)
class Layout:
    """How a model is cut; the numbers are ranks along each dimension."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Model chunks per pipeline rank."""
    dp: int = 1
    sp: bool = False
    ep: int = 1
    etp: int = 1
    """Tensor parallelism of the experts."""
    distributed: bool = False
    """The distributed optimizer."""
    overlap: bool = False
    """Gradient reduction, and with the distributed optimizer parameter gathering, overlapped."""
    bf16: bool = False

    @property
    def world_size(self) -> int:
        """Ranks it needs."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        numbers = {"TP": self.tp, "PP": self.pp, "VPP": self.vpp, "DP": self.dp}
        numbers |= {"EP": self.ep, "ETP": self.etp}
        words = [f"{name}{number}" for name, number in numbers.items() if number > 1]
        words = words or ["one rank"]
        flags = {"SP": self.sp, "dist-opt": self.distributed, "overlap": self.overlap}
        flags["bf16"] = self.bf16
        return " ".join([*words, *(name for name, is_set in flags.items() if is_set)])


AXES: dict[str, Sequence[int | bool]] = {
    "tp": (1, 2, 4),
    "pp": (1, 2),
    "vpp": (1, 2),
    "dp": (1, 2),
    "sp": (False, True),
    "ep": (1, 2),
    "etp": (1, 2),
    "distributed": (False, True),
    "overlap": (False, True),
    "bf16": (False, True),
}
assert list(AXES) == [field.name for field in fields(Layout)]


def why_not(layout: Layout, model: Model, nproc: int) -> str | None:
    """The reason a combination is not run; None if it is."""
    rules = (
        (
            layout.world_size > nproc,
            f"more than {nproc} ranks",
        ),
        (
            layout.vpp > 1 and layout.pp == 1,
            "virtual pipeline chunks without pipeline parallelism",
        ),
        (
            layout.sp and layout.tp == 1,
            "sequence parallelism without tensor parallelism",
        ),
        (
            layout.overlap and layout.dp == 1,
            "nothing to overlap without data parallelism",
        ),
        (
            layout.ep * layout.etp > 1 and not model.experts,
            "expert parallelism without experts",
        ),
        (
            layout.tp * layout.dp % (layout.ep * layout.etp) != 0,
            "the ranks of the experts (EP x ETP) do not divide those of the rest (TP x DP)",
        ),
        (
            model.experts and layout.tp > 1 and not layout.sp,
            "Megatron refuses experts under TP without SP (moe_layer.MoELayer.forward)",
        ),
        (
            layout.ep > 1 and layout.etp > 1,
            "EP with expert TP gathers unequal numbers of tokens, which gloo cannot (NCCL untried)",
        ),
        (
            model.kind == "hybrid" and layout.vpp > 1,
            "Megatron's HybridModelBuilder knows no virtual pipeline",
        ),
        (
            model.mtp and layout.sp,
            "the norms of Megatron's MTP block refuse SP without TransformerEngine "
            "(torch_norm.WrappedTorchNorm)",
        ),
        (
            layout.bf16 and not layout.distributed,
            "Megatron's plain optimizer cannot save fp32 alphas of a bf16 model",
        ),
        (
            layout.bf16 and model.experts,
            "rounding to bf16 sends tokens to other experts, which no spread of roundings bounds",
        ),
    )
    return next((reason for applies, reason in rules if applies), None)


def combinations() -> Iterator[Layout]:
    """Every combination of the axes' values, legal or not."""
    for values in itertools.product(*AXES.values()):
        yield Layout(**dict(zip(AXES, values, strict=True)))  # type: ignore[arg-type]


def legal(model: Model, nproc: int) -> list[Layout]:
    """Every layout of a model on up to `nproc` ranks, those of one world size side by side."""
    found = [layout for layout in combinations() if why_not(layout, model, nproc) is None]
    return sorted(found, key=lambda layout: (layout.bf16, layout.world_size, layout))


FAULTS: dict[str, Callable[[Layout], bool]] = {
    "no-tp-sum": lambda layout: layout.tp > 1,
    "tp-mean": lambda layout: layout.tp > 1,
    "expert-average": lambda layout: layout.ep > 1,
    "vpp-offset": lambda layout: layout.vpp > 1,
}
"""Faults that `faults.planted` knows, and the layouts in which each shows."""


@dataclass(frozen=True)
class Case:
    """One row of the matrix."""

    model: Model
    layout: Layout

    def __str__(self) -> str:
        return f"{self.model.name}, {self.layout}"


def full(nproc: int) -> list[Case]:
    """Every legal layout of every model."""
    return [Case(model, layout) for model in MODELS for layout in legal(model, nproc)]


def quick(nproc: int) -> list[Case]:
    """Few cases in which every model and every value of every axis that `nproc` allows comes up."""
    candidates = full(nproc)
    missing = set().union(*map(_values, candidates))
    chosen = []
    while missing:
        # the first of the best: those with fewer ranks stand before the others
        best = max(candidates, key=lambda case: len(_values(case) & missing))
        chosen.append(best)
        missing -= _values(best)
    return sorted(chosen, key=candidates.index)


def with_fault(fault: str, nproc: int) -> list[Case]:
    """One case per setting of sequence parallelism in which a fault shows, as small as may be."""
    shows = FAULTS[fault]
    found: dict[bool, Case] = {}
    for case in full(nproc):
        if shows(case.layout) and not case.layout.bf16:
            found.setdefault(case.layout.sp, case)
    return list(found.values())


def _values(case: Case) -> set[tuple[str, object]]:
    layout = case.layout
    # on one rank nothing is cut; it is the reference of its model
    if layout.world_size == 1:
        return set()
    values = {(axis, getattr(layout, axis)) for axis in AXES}
    # gathering of parameters is overlapped with the distributed optimizer only
    gathers = layout.distributed and layout.overlap
    return {("model", case.model.name), ("overlapped gathering", gathers), *values}
