"""The matrix on this rank: a reference of each model on one rank, then every layout against it.

All ranks of the launch run this together; those that a layout has no use for wait. Each layout
loads the checkpoint that the layout before it in its chain saved right after loading its own, so
the start crosses every layout's save and load; a chain is one model with one format of optimizer
state, because Megatron cannot load one optimizer's state into the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from megatron_xielu.mcore.layouts import compare, model
from megatron_xielu.mcore.layouts.compare import Distance, Step
from megatron_xielu.mcore.layouts.faults import planted
from megatron_xielu.mcore.layouts.grid import Case, Layout, Model
from megatron_xielu.mcore.layouts.trainer import GLOBAL_BATCH, Shard, Trainer, batch
from megatron_xielu.mcore.layouts.world import Ranks, cut

ChainKey = tuple[str, bool, bool]
"""Model, distributed optimizer, bf16."""
START_STEPS = 2
STEPS = 4


@dataclass(frozen=True)
class Row:
    """What one layout showed."""

    case: Case
    distance: Distance
    bound: Distance
    replicas_equal: bool
    """Alphas: the same bits in all copies of one alpha."""
    reshard_equal: bool
    """Parameters, moments, alphas: the bits of the start, after all layouts before it."""

    @property
    def agrees(self) -> bool:
        """Whether this layout computes what one rank does."""
        return self.replicas_equal and self.reshard_equal and self.distance.within(self.bound)


@dataclass
class Chain:
    """A model with one kind of optimizer state, and what one rank made of it."""

    model: Model
    layout: Layout
    """The one-rank layout."""
    folder: Path
    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    bound: Distance = field(default_factory=Distance)
    spread: Distance | None = None
    """bf16: how far runs on one rank are from the fp32 run."""
    saves: int = 0

    def last(self) -> Path:
        """The newest checkpoint; all ranks count alike."""
        return self.folder / f"{self.saves:03d}"


def run(
    cases: Sequence[Case],
    folder: Path,
    backend: str,
    report: Callable[[Row], None],
    fault: str | None = None,
) -> list[Chain]:
    """Run all cases; every rank of the launch calls it with the same arguments.

    Args:
        folder: scratch that all ranks share.
        backend: gloo or nccl.
        report: called on rank 0 with each row as it is finished.
        fault: of `grid.FAULTS`, planted into every layout of more than one rank.

    Returns:
        The chains, with their bounds.
    """
    ranks = Ranks(backend)
    chains: dict[ChainKey, Chain] = {}
    for case in cases:
        key = _chain_key(case)
        if key not in chains:
            name = "-".join(map(str, key)).replace(" ", "-")
            chains[key] = Chain(case.model, _one_rank(case.layout), folder / name)
    with ranks.world(1) as mine:
        for chain in chains.values() if mine else ():
            with _blamed(chain.model, chain.layout):
                _make_reference(chain)
    ranks.meet()
    for chain in chains.values():
        _read_reference(chain)
    for case in sorted(cases, key=lambda case: case.layout.world_size):
        size = case.layout.world_size
        if size == 1:
            continue
        chain = chains[_chain_key(case)]
        # a world for each: its groups keep their threads until it ends
        with ranks.world(size) as mine:
            if mine:
                with _blamed(case.model, case.layout), planted(fault, case.layout):
                    row = _run_case(case, chain)
                if ranks.rank == 0:
                    report(row)
        chain.saves += 1
    with ranks.world(1) as mine:
        for chain in chains.values() if mine else ():
            with _blamed(chain.model, chain.layout):
                report(_back_on_one_rank(chain, chains))
    ranks.meet()
    return list(chains.values())


def _chain_key(case: Case) -> ChainKey:
    return case.model.name, case.layout.distributed, case.layout.bf16


def _one_rank(layout: Layout) -> Layout:
    return Layout(distributed=layout.distributed, bf16=layout.bf16)


@contextmanager
def _blamed(model: Model, layout: Layout) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"{model.name}, {layout}: {error}") from error


def _run_case(case: Case, chain: Chain) -> Row:
    with cut(case.layout), closing(Trainer(case.model, case.layout)) as trainer:
        trainer.load(chain.last())
        target = chain.folder / f"{chain.saves + 1:03d}"
        start = _save(trainer, target)
        moved = set(compare.differing(map(_piece, start), chain.start))
        steps = _train(trainer)
        end = trainer.shards()
        return Row(
            case,
            _largest_of_all(
                Distance.largest(
                    [
                        compare.of_steps(steps, chain.steps),
                        compare.of_tensors(map(_piece, end), chain.end),
                    ]
                )
            ),
            chain.bound,
            replicas_equal=_replicas_equal(end),
            reshard_equal=not _anywhere(bool(moved)),
        )


def _back_on_one_rank(chain: Chain, chains: Mapping[ChainKey, Chain]) -> Row:
    """One rank loads what the last layout saved; both optimizers on one rank are compared too."""
    row = _run_case(Case(chain.model, chain.layout), chain)
    plain = chains.get((chain.model.name, False, False))
    if plain is None or not chain.layout.distributed or chain.layout.bf16:
        return row
    # each of the two made its own start, so the steps before it count as well
    other = Distance.largest(
        [
            compare.of_steps(chain.steps, plain.steps),
            compare.of_tensors(
                ((key, (), chain.end[key]) for key in plain.end),
                plain.end,
            ),
        ]
    )
    return replace(
        row,
        distance=Distance.largest([row.distance, other]),
        bound=chain.bound.times(math.sqrt((START_STEPS + STEPS) / STEPS)),
    )


def _make_reference(chain: Chain) -> None:
    chain.folder.mkdir(parents=True)
    with cut(chain.layout), closing(Trainer(chain.model, chain.layout)) as trainer:
        for number in range(START_STEPS):
            trainer.step(batch(number))
        chain.start = _whole(_save(trainer, chain.last()))
        chain.steps = _train(trainer)
        chain.end = _whole(trainer.shards())
    elements = sum(tensor.numel() for tensor in chain.end.values())
    chain.bound = compare.round_off(model.NUM_LAYERS, STEPS, elements)
    if chain.layout.bf16:
        chain.spread = _spread(chain)
        # each of two runs within the spread of the exact one: twice that from each other
        chain.bound = chain.spread.times(2)
    torch.save(
        {
            "start": chain.start,
            "end": chain.end,
            "steps": [(step.loss, step.grad_norm) for step in chain.steps],
            "bound": [getattr(chain.bound, name) for name in compare.NUMBERS],
        },
        chain.folder / "reference.pt",
    )


def _read_reference(chain: Chain) -> None:
    saved = torch.load(chain.folder / "reference.pt", weights_only=True)
    chain.start, chain.end = saved["start"], saved["end"]
    chain.steps = [Step(*step) for step in saved["steps"]]
    chain.bound = Distance(*saved["bound"])


def _spread(chain: Chain) -> Distance:
    """The largest distance of bf16 runs on one rank, each cut otherwise, from the fp32 run."""
    exact_layout = replace(chain.layout, distributed=False, bf16=False)
    with cut(exact_layout), closing(Trainer(chain.model, exact_layout)) as exact:
        exact.plant(chain.start, START_STEPS)
        exact_steps = _train(exact)
        exact_end = _whole(exact.shards())
    # a bf16 run keeps its parameters twice, rounded and exact
    reference = {key: exact_end[_exact_key(key, exact_end)] for key in chain.end}
    samples = []
    for micro_batches in (1, 2, 4, GLOBAL_BATCH):
        with (
            cut(chain.layout),
            closing(Trainer(chain.model, chain.layout, micro_batches)) as trainer,
        ):
            trainer.load(chain.last())
            steps = _train(trainer)
            samples.append(compare.of_steps(steps, exact_steps))
            samples.append(compare.of_tensors(map(_piece, trainer.shards()), reference))
    return Distance.largest(samples)


def _exact_key(key: str, exact: dict[str, Tensor]) -> str:
    return key if key in exact else compare.parameter_of(key)[1]


def _train(trainer: Trainer) -> list[Step]:
    steps = [trainer.step(batch(START_STEPS + number)) for number in range(STEPS)]
    trainer.finish()
    return steps


def _save(trainer: Trainer, folder: Path) -> list[Shard]:
    if distributed.get_rank() == 0:
        folder.mkdir()
    distributed.barrier()
    return trainer.save(folder)


def _piece(shard: Shard) -> tuple[str, tuple[slice | int, ...], Tensor]:
    return shard.key, shard.slices, shard.data


def _whole(shards: Sequence[Shard]) -> dict[str, Tensor]:
    """The tensors that one rank's shards make up."""
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if shard.key not in tensors:
            tensors[shard.key] = torch.full(shard.shape, torch.nan, dtype=shard.data.dtype)
        tensors[shard.key][shard.slices] = shard.data
    return tensors


def _largest_of_all(distance: Distance) -> Distance:
    """Over all ranks; NaN counts as the largest."""
    values = torch.tensor([getattr(distance, name) for name in compare.NUMBERS], device="cuda")
    values = values.double().nan_to_num(nan=torch.inf)
    distributed.all_reduce(values, op=distributed.ReduceOp.MAX)
    return Distance(*values.tolist())


def _anywhere(flag: bool) -> bool:
    value = torch.tensor(int(flag), device="cuda")
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return bool(value)


def _replicas_equal(shards: Sequence[Shard]) -> bool:
    """Whether every alpha has one value on all ranks that hold it."""
    mine = [
        (shard.key, str(shard.slices), float(shard.data).hex())
        for shard in shards
        if compare.is_alpha(shard.key)
    ]
    all_ranks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(all_ranks, mine)
    seen = {entry for rank in all_ranks for entry in rank}
    return len(seen) == len({(key, place) for key, place, _ in seen})
