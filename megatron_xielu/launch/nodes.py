"""What the ranks of a run must have in common, and in what they differ."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import groupby
from pathlib import Path

import torch

import megatron_xielu
from megatron_xielu.recipes import Recipe

Facts = Mapping[str, Mapping[str, str]]
"""By kind and name; texts, so that a difference can be shown."""

_NOTHING = "nothing"
# these neither hang nor change what is trained
_HARMLESS = {"GPU driver", "GPU memory"}
_REMEDIES = {
    "recipe": "give all nodes the same recipe and overrides",
    "flags": "give all nodes the same Megatron flags",
    "folder": "give all nodes the same --run-dir, on storage that all of them see",
    "data": "use one data folder that all nodes see, or copy it to them again",
    "versions": "install the same versions on all nodes, or start the same image there",
    "machine": "use machines of one kind, or name it to the scheduler",
}
# of hosts in one line
_MOST_HOSTS = 4


@dataclass(frozen=True)
class Record:
    """What one rank says of itself."""

    host: str
    facts: Facts = field(default_factory=dict)
    problem: str | None = None
    """Why this rank cannot start, whatever the others say."""
    address: str | None = None
    """Of its machine, as rank 0's sees it; None where MASTER_ADDR is 127.x, as it may be there."""


def facts(
    recipe: Recipe,
    *,
    megatron_flags: Sequence[str],
    run_dir: Path,
    data: str | None,
    gpu: int | None,
    fuses_weight_gradients: bool,
) -> Facts:
    """What a rank starts with.

    Args:
        recipe: with nothing left to "auto".
        megatron_flags: the user's own.
        data: a fingerprint of what it reads; None for data that are no data folder.
        gpu: this rank's; None on a CPU.
    """
    return {
        "recipe": _leaves(recipe),
        "flags": _by_flag(megatron_flags),
        "folder": {"--run-dir": str(run_dir)},
        "data": {} if data is None else {"data": data[:12]},
        "versions": _versions(gpu is not None, fuses_weight_gradients),
        "machine": {"device": "CPU"} if gpu is None else _gpu(gpu),
    }


def refusal(records: Sequence[Record]) -> str | None:
    """Why these ranks may not start together: one text with the remedies; None if they may."""
    problems: dict[str, list[int]] = {}
    for rank, record in enumerate(records):
        if record.problem is not None:
            problems.setdefault(record.problem, []).append(rank)
    if problems:
        # what the others have in common says little of a rank that came with less
        return "\n".join(
            problem if len(ranks) == len(records) else f"{where(records, ranks)}: {problem}"
            for problem, ranks in problems.items()
        )
    found = [each for each in _differences(records) if each[1] not in _HARMLESS]
    if not found:
        return None
    lines = [f"  {name}: {text}" for _, name, text in found]
    remedies = dict.fromkeys(_REMEDIES[kind] for kind, _, _ in found)
    remedy = "; ".join(remedies)
    return "\n".join(
        [
            "the ranks do not start the same run, so they would hang or train something else:",
            *lines,
            f"{remedy[0].upper()}{remedy[1:]}.",
        ]
    )


def warnings(records: Sequence[Record]) -> list[str]:
    """In what they differ without harm."""
    return [
        f"{name} differs: {text}" for _, name, text in _differences(records) if name in _HARMLESS
    ]


def where(records: Sequence[Record], ranks: Sequence[int]) -> str:
    """Hosts and their ranks: node1 (ranks 8-15)."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(records[rank].host, []).append(rank)
    shown = [f"{host} ({numbers(found)})" for host, found in by_host.items()]
    if len(shown) > _MOST_HOSTS:
        shown[_MOST_HOSTS - 1 :] = [f"{len(shown) - _MOST_HOSTS + 1} more nodes"]
    return ", ".join(shown)


def numbers(ranks: Sequence[int]) -> str:
    """The short form of ascending ranks: ranks 0-3, 8."""
    parts = []
    # within a run without gaps, a rank and its place differ by the same number
    for _, pairs in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        run = [rank for _, rank in pairs]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _differences(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """Kind, name, and who has what."""
    names = {
        (kind, name): None
        for record in records
        for kind, values in record.facts.items()
        for name in values
    }
    found = []
    for kind, name in names:
        values = [record.facts.get(kind, {}).get(name, _NOTHING) for record in records]
        # of as many ranks each, rank 0's: equals stay in their order
        (common, _), *others = Counter(values).most_common()
        odd = [
            f"{where(records, [r for r, value in enumerate(values) if value == other])} has {other}"
            for other, _ in others
        ]
        if odd:
            found.append((kind, name, f"{', '.join(odd)}; the others have {common}"))
    return found


def _leaves(recipe: Recipe) -> dict[str, str]:
    leaves: dict[str, str] = {}
    for section, value in asdict(recipe).items():
        if isinstance(value, dict):
            leaves |= {f"{section}.{key}": str(each) for key, each in value.items()}
        else:
            leaves[section] = str(value)
    return leaves


def _by_flag(words: Sequence[str]) -> dict[str, str]:
    flags: dict[str, str] = {}
    name = "flags"
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            flags[name] = value or "no value"
        else:
            given = flags.get(name, "")
            flags[name] = word if given in ("", "no value") else f"{given} {word}"
    return flags


def _versions(on_gpu: bool, fuses_weight_gradients: bool) -> dict[str, str]:
    found = {
        # a patch release changes nothing that ranks exchange
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "megatron-core": _version("megatron-core"),
        "megatron_xielu": f"{megatron_xielu.__version__} (source {_source()})",
        "TransformerEngine": _version("transformer-engine"),
    }
    if on_gpu:
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["fused weight gradients"] = "on" if fuses_weight_gradients else "off"
        driver = Path("/sys/module/nvidia/version")
        found["GPU driver"] = driver.read_text().strip() if driver.is_file() else _NOTHING
    return found


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return _NOTHING


def _source() -> str:
    """A digest of this package: checkouts of one version may be at different commits."""
    digest = hashlib.sha256()
    folder = Path(megatron_xielu.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _gpu(index: int) -> dict[str, str]:
    found = torch.cuda.get_device_properties(index)
    memory = f"{found.total_memory / (1 << 30):.0f} GiB"
    return {"device": "GPU", "GPU": found.name, "GPU memory": memory}
