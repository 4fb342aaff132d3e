"""Whether the ranks that hold copies of a parameter still hold the same bits.

Data parallelism copies every parameter; tensor parallelism copies those that it does not cut
(norms, alphas, routers); a pipeline with tied embeddings copies the embedding to its end. Nothing
in training compares the copies, so a wrong gradient sum or a flipped bit would go on unseen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import mpu
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn
from torch.distributed import ProcessGroup, ReduceOp

from megatron_xielu.mcore.places import parameters

_ROW = 1024


@dataclass(frozen=True)
class Copies:
    """Parameters of this rank, by place, that every rank of `group` holds a copy of."""

    kind: str
    group: ProcessGroup
    parameters: Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Difference:
    """One parameter whose copies are not the same bits."""

    place: str
    kind: str
    fingerprints: dict[int, int]
    """By global rank."""

    def __str__(self) -> str:
        ranks = sorted(self.fingerprints)
        (most, count), *_ = Counter(self.fingerprints.values()).most_common()
        if count > len(ranks) / 2:
            odd = [rank for rank in ranks if self.fingerprints[rank] != most]
            others = [rank for rank in ranks if rank not in odd]
            return f"{self.place}: {_named(odd)} against {_named(others)} ({self.kind})"
        return f"{self.place}: {_named(ranks)} differ ({self.kind})"


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """An int64 scalar, on the tensor's device, that depends on every bit and on its place.

    The bytes are read twice as int64 words, in place: words in row r and column c of a 1024-column
    table count odd(r) + even(c) times, modulo 2^64. Any change of a single word changes the sum,
    because an odd factor has an inverse; other changes escape by chance alone, one in 2^64.
    """
    data = tensor.detach()
    if is_float8tensor(data):
        data = data.dequantize()
    flat = data.contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)
    last = torch.zeros(8, dtype=torch.uint8, device=flat.device)
    last[: flat.numel() - whole] = flat[whole:]
    rows = words.numel() // _ROW
    table = words[: rows * _ROW].view(rows, _ROW)
    rest = torch.cat((words[rows * _ROW :], last.view(torch.int64)))
    factors = _factors(rows + rest.numel(), flat.device)
    odd, even = factors | 1, _factors(_ROW, flat.device) & ~1
    return (
        (table.sum(1) * odd[:rows]).sum()
        + (table.sum(0) * even).sum()
        + (rest * odd[rows:]).sum()
    )  # fmt: skip


def _factors(count: int, device: torch.device) -> Tensor:
    # a multiplicative mix of 1, 2, 3 ...; int64 products wrap around
    mixed = torch.arange(1, count + 1, device=device) * -7046029254386353131
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return mixed ^ (mixed >> 32)


def copies(model: Sequence[nn.Module]) -> list[Copies]:
    """What this rank must share with others, by group; groups of one rank are left out."""
    named = list(parameters(model))
    # experts that are spread over ranks, by the mark that keeps them from the dense all-reduce
    dense = [(name, p) for name, p in named if getattr(p, "allreduce", True)]
    expert = [(name, p) for name, p in named if not getattr(p, "allreduce", True)]
    found = [
        Copies(
            "data-parallel copies",
            mpu.get_data_parallel_group(with_context_parallel=True, with_gtp_remat=False),
            dense,
        ),
        Copies("tensor-parallel copies", mpu.get_tensor_model_parallel_group(), _uncut(dense)),
    ]
    if expert:
        data = mpu.get_expert_data_parallel_group(with_gtp_remat=False)
        tensor = mpu.get_expert_tensor_parallel_group()
        found.append(Copies("expert-data-parallel copies", data, expert))
        found.append(Copies("expert-tensor-parallel copies", tensor, _uncut(expert)))
    shared = _shared_embedding(model)
    if shared is not None:
        named_weight = [("the shared embedding", shared)]
        found.append(Copies("pipeline copies", mpu.get_embedding_group(), named_weight))
    return [one for one in found if one.group.size() > 1 and one.parameters]


def _uncut(
    named: Sequence[tuple[str, nn.Parameter]],
) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in named if not getattr(p, "tensor_model_parallel", False)]


def _shared_embedding(model: Sequence[nn.Module]) -> nn.Parameter | None:
    """This rank's copy of the embedding that the ends of a pipeline share, as upstream finds it."""
    if mpu.get_pipeline_model_parallel_world_size() == 1 or not mpu.is_rank_in_embedding_group():
        return None
    holder = model[0] if mpu.is_pipeline_first_stage(ignore_virtual=True) else model[-1]
    inner = get_attr_wrapped_model(holder, "pre_process", return_model_obj=True)
    if not inner.share_embeddings_and_output_weights and not inner.config.mtp_num_layers:
        return None
    weight: nn.Parameter = inner.shared_embedding_or_output_weight()
    return weight


def differences(shared: Sequence[Copies]) -> list[Difference]:
    """Every parameter whose copies differ, the same list on all ranks.

    All ranks of the world must call it. While all is well it costs two reads of the parameters,
    one all-reduce of two int64 per parameter and group, and one read by the host.
    """
    known: dict[int, Tensor] = {}
    bad = torch.zeros(1, dtype=torch.int64, device="cuda")
    compared: list[tuple[Copies, Tensor, Tensor]] = []
    for one in shared:
        for _, parameter in one.parameters:
            if id(parameter) not in known:
                known[id(parameter)] = fingerprint(parameter)
        own = torch.stack([known[id(parameter)] for _, parameter in one.parameters])
        # the largest of ~x is ~ of the smallest x
        extremes = torch.cat((own, ~own))
        torch.distributed.all_reduce(extremes, ReduceOp.MAX, group=one.group)
        largest, smallest = extremes[: len(own)], ~extremes[len(own) :]
        differ = largest != smallest
        bad += differ.any()
        compared.append((one, own, differ))
    torch.distributed.all_reduce(bad, ReduceOp.MAX)
    return _collect(compared) if bad.item() else []


def _collect(compared: Sequence[tuple[Copies, Tensor, Tensor]]) -> list[Difference]:
    mine = [
        (name, one.kind, tuple(torch.distributed.get_process_group_ranks(one.group)), value)
        for one, own, differ in compared
        for (name, _), value, found in zip(
            one.parameters, own.tolist(), differ.tolist(), strict=True
        )
        if found
    ]
    gathered: list[list[tuple[str, str, tuple[int, ...], int]]]
    gathered = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, mine)
    by_copy: dict[tuple[str, str, tuple[int, ...]], dict[int, int]] = {}
    for rank, entries in enumerate(gathered):
        for name, kind, ranks, value in entries:
            by_copy.setdefault((name, kind, ranks), {})[rank] = value
    return [Difference(name, kind, values) for (name, kind, _), values in by_copy.items()]


def _named(ranks: Sequence[int]) -> str:
    shown = list(_ranges(ranks))
    some = ", ".join(shown[:8]) + (" ..." if len(shown) > 8 else "")
    return f"rank {some}" if len(ranks) == 1 else f"ranks {some}"


def _ranges(ranks: Sequence[int]) -> Iterator[str]:
    """1, 2, 3, 7 as 1-3 and 7."""
    start = 0
    for end in range(1, len(ranks) + 1):
        if end == len(ranks) or ranks[end] != ranks[end - 1] + 1:
            yield str(ranks[start]) if end - start == 1 else f"{ranks[start]}-{ranks[end - 1]}"
            start = end
