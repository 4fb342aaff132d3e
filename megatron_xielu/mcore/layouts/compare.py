"""How far one run is from another, in units of what fp32 resolves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
_OPTIMIZER = re.compile(r"optimizer\.state\.(\w+)\.(.+)")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ALPHA = re.compile(r"\.activation_func\.alpha_[pn]$")
_LAYER = re.compile(r"layers\.\d+\.")
# forward: qkv, scores, values, output, fc1, xIELU, fc2 and a norm; backward twice as many
_SUMS_PER_LAYER = 24


@dataclass(frozen=True)
class Step:
    """What one optimizer step told; equal on all ranks."""

    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Distance:
    """Largest differences of two runs, in fp32 eps.

    Losses and gradient norms are relative to the reference's, tensors to the largest entry that the
    reference's tensor has in any layer: one layer's moment of an alpha is a single number and may
    lie next to zero by cancellation. Alphas, which are of order one, are absolute.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    parameters: float = 0.0
    moments: float = 0.0
    alphas: float = 0.0

    def within(self, bound: Distance) -> bool:
        """Whether each number is at most the bound's; NaN is not."""
        return all(a <= b for a, b in zip(astuple(self), astuple(bound), strict=True))

    def times(self, factor: float) -> Distance:
        """Each number multiplied."""
        return Distance(*(factor * value for value in astuple(self)))

    @staticmethod
    def largest(distances: Iterable[Distance]) -> Distance:
        """The largest of each number; NaN, which compares to nothing, counts as the largest."""
        return Distance(*map(_largest, zip(*map(astuple, distances), strict=True)))


NUMBERS = tuple(field.name for field in fields(Distance))


def is_alpha(key: str) -> bool:
    """Whether a checkpoint key is a parameter of xIELU's (and not a moment of one)."""
    return not key.startswith("optimizer.") and _ALPHA.search(key) is not None


def parameter_of(key: str) -> tuple[str, str]:
    """What a checkpoint key holds: ("", parameter) or (state of the optimizer, its parameter)."""
    match = _OPTIMIZER.fullmatch(key)
    return (match[1], match[2]) if match else ("", key)


def of_steps(steps: Sequence[Step], reference: Sequence[Step]) -> Distance:
    """Losses and gradient norms of runs with equally many steps."""
    pairs = list(zip(steps, reference, strict=True))
    return Distance(
        loss=_largest(_relative(a.loss, b.loss) for a, b in pairs),
        grad_norm=_largest(_relative(a.grad_norm, b.grad_norm) for a, b in pairs),
    )


def of_tensors(
    pieces: Iterable[tuple[str, tuple[slice | int, ...], Tensor]], reference: Mapping[str, Tensor]
) -> Distance:
    """Pieces of saved tensors, by key and place, against the whole ones.

    Raises:
        KeyError: the reference has no tensor of that name.
    """
    scales: dict[str, float] = {}
    for key, whole in reference.items():
        largest = float(whole.abs().max())
        scales[_in_any_layer(key)] = max(largest, scales.get(_in_any_layer(key), 0.0))
    found: dict[str, list[float]] = {"parameters": [], "moments": [], "alphas": []}
    for key, place, data in pieces:
        whole = reference[key].double()
        difference = float((data.double() - whole[place]).abs().max())
        state, _ = parameter_of(key)
        if is_alpha(key):
            found["alphas"].append(difference / EPS)
            continue
        kind = "moments" if state in _MOMENTS else "parameters"
        # a moment of an expert that no token went to is zero in both
        scale = scales[_in_any_layer(key)]
        found[kind].append(difference / scale / EPS if scale else difference / EPS)
    return Distance(**{kind: _largest(values) for kind, values in found.items()})


def differing(
    pieces: Iterable[tuple[str, tuple[slice | int, ...], Tensor]], reference: Mapping[str, Tensor]
) -> Iterator[str]:
    """Keys of pieces that are not bit for bit the reference's."""
    for key, place, data in pieces:
        if key not in reference or not torch.equal(data, reference[key][place]):
            yield key


def round_off(num_layers: int, steps: int, elements: int) -> Distance:
    """What another order of summation may change in fp32, in eps.

    One sum in another order differs by two roundings, each uniform within eps/2: sqrt(2/12) eps in
    the root mean square. A step passes through 24 sums per layer, each of which adds such an error
    of its own, so errors grow with the square root of their number. The largest of n such errors
    lies at sqrt(2 ln n) times the root mean square.
    """
    rms = math.sqrt(2 / 12) * math.sqrt(_SUMS_PER_LAYER * num_layers * steps)
    bound = rms * math.sqrt(2 * math.log(elements))
    return Distance(*[bound] * len(NUMBERS))


def _in_any_layer(key: str) -> str:
    # a hybrid model saves each layer's tensors apart, others all layers' in one
    return _LAYER.sub("layers.", key)


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b) / EPS


def _largest(values: Iterable[float]) -> float:
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)
