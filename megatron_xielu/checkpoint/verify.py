"""Prove that an export is the model of its checkpoint.

Three checks, each of which sees faults that the others do not: every exported tensor is turned back
into Megatron's form and compared with the checkpoint bit for bit; stock transformers loads the
folder with no key missing, left over or of another shape; and its fp32 logits equal those of a
reference, the Megatron model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_xielu.checkpoint.hf_model import (
    hf_logits,
    load_config,
    load_stock,
    logits_of,
    read_tensors,
    restore_alphas,
    tensor_files,
)
from megatron_xielu.checkpoint.mapping import (
    XIELU_CONSTANTS,
    Dims,
    Placement,
    hf_shapes,
    locate,
    read_weight,
)
from megatron_xielu.checkpoint.run import check_arguments, open_run
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.errors import UserError

__all__ = ["VerifyError", "VerifyReport", "default_prompts", "hf_logits", "verify_export"]

LOGIT_TOLERANCE = 1e-4
"""Largest difference of fp32 logits; alphas rounded to bf16, the least fault known, exceed it."""
TIE = 1e-5
"""Two logits of the reference this close may change places: fp32 sums in another order do that."""

Prompts = Sequence[Sequence[int]]
ReferenceLogits = Callable[[list[list[int]]], list[Tensor]]


class VerifyError(Exception):
    """The export is not the checkpoint's model; the message says where they differ."""


@dataclass(frozen=True)
class LogitDifference:
    """Two models on the same prompts."""

    positions: int
    max_abs: float
    agreement: float
    """Share of positions with the same most likely token, ties aside."""
    first: tuple[int, int] | None
    """(prompt, position) where the tolerance is first exceeded or the token first differs."""


@dataclass(frozen=True)
class VerifyReport:
    """What was compared and how close it was."""

    num_tensors: int
    rounded: bool
    """The export holds shorter numbers than the checkpoint."""
    logits: LogitDifference
    """Reference against transformers with the exported values, or, for a rounded export, with the
    checkpoint's: rounding aside, the two must be one function."""
    stock: LogitDifference
    """Reference against transformers as it loads the folder: alphas and weights rounded."""

    def __str__(self) -> str:
        values = "the checkpoint's unrounded values" if self.rounded else "the exported values"
        return (
            f"{self.num_tensors} tensors equal the checkpoint bit for bit"
            f"{' (rounded to the export type)' if self.rounded else ''}; transformers loads all\n"
            f"fp32 logits at {self.logits.positions} positions, {values}: "
            f"max difference {self.logits.max_abs:.2e}, same token {self.logits.agreement:.2%}\n"
            f"as transformers loads it by itself: "
            f"max difference {self.stock.max_abs:.2e}, same token {self.stock.agreement:.2%}"
        )


def verify_export(
    hf_dir: Path,
    source: Path,
    *,
    prompts: list[list[int]] | None = None,
    reference_logits: ReferenceLogits,
) -> VerifyReport:
    """Compares the export `hf_dir` with the checkpoint `source` it was made from.

    Args:
        hf_dir: a folder written by `convert_to_hf`.
        source: a run, checkpoints or iter_ folder; see `open_run`.
        prompts: token ids; None means `default_prompts`.
        reference_logits: the reference's logits (tokens, at least the vocabulary) for each prompt,
            from the checkpoint's weights in fp32 arithmetic.

    Raises:
        VerifyError: a tensor, key or logit differs.
        UserError: a folder or a prompt cannot be used.
    """
    run = open_run(source)
    reader = TorchDistReader(run.path)
    check_arguments(reader, run.recipe)
    dims = Dims.of(run.recipe, int(load_config(hf_dir)["vocab_size"]))
    placements = locate(reader, dims)
    if prompts is None:
        prompts = default_prompts(dims.vocab_size, run.recipe.model.seq_length)
    _check_prompts(prompts, dims.vocab_size, run.recipe.model.seq_length)
    num_tensors, rounded = compare_tensors(hf_dir, reader, placements, dims)
    model, info = load_stock(hf_dir)
    _check_loading(info)
    expected = [logits[:, : dims.vocab_size] for logits in reference_logits(prompts)]
    stock = _compare(expected, logits_of(model, prompts))
    restore_alphas(model, hf_dir)
    if rounded:
        _load_unrounded(model, reader, placements, dims)
    exact = _compare(expected, logits_of(model, prompts))
    if exact.first is not None:
        raise VerifyError(_describe(exact, prompts))
    return VerifyReport(num_tensors, rounded, exact, stock)


def default_prompts(vocab_size: int, seq_length: int) -> list[list[int]]:
    """Random ids, the same every time, of several lengths from 1 to the whole context."""
    generator = torch.Generator().manual_seed(0)
    lengths = sorted({min(length, seq_length) for length in (1, 2, 7, 32, seq_length)})
    return [
        torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths
    ]


def compare_tensors(
    hf_dir: Path, reader: TorchDistReader, placements: Sequence[Placement], dims: Dims
) -> tuple[int, bool]:
    """Turns every exported tensor back into Megatron's form and compares bit for bit.

    Returns:
        (number of exported tensors, whether any is stored shorter than in the checkpoint).

    Raises:
        VerifyError: a name, shape, type or bit differs.
    """
    files = tensor_files(hf_dir)
    expected = _expected_shapes(placements, dims)
    if missing := sorted(expected.keys() - files.keys()):
        raise VerifyError(f"{hf_dir} lacks {len(missing)} tensor(s), the first {missing[0]}.")
    if extra := sorted(files.keys() - expected.keys()):
        raise VerifyError(f"{hf_dir} holds {len(extra)} unknown tensor(s), the first {extra[0]}.")
    rounded = False
    for placement in placements:
        names = placement.hf_names
        exported = read_tensors(files, names)
        for name, tensor in zip(names, exported, strict=True):
            if tuple(tensor.shape) != expected[name]:
                raise VerifyError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {expected[name]}."
                )
        weight = read_weight(reader, placement, dims)
        _compare_bits(names, placement.entry.merge(exported, dims), weight)
        rounded |= exported[0].dtype.itemsize < weight.dtype.itemsize
    _check_constants(files, dims)
    return len(files), rounded


def _expected_shapes(placements: Sequence[Placement], dims: Dims) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for placement in placements:
        shapes |= hf_shapes(placement, dims)
    for name in XIELU_CONSTANTS:
        shapes |= {name.format(i=layer): () for layer in range(dims.num_layers)}
    return shapes


def _compare_bits(names: Sequence[str], merged: Tensor, weight: Tensor) -> None:
    weight = weight.to(merged.dtype)
    # as bytes, so that NaN equals itself and -0 differs from 0
    same = merged.reshape(-1).view(torch.uint8).equal(weight.reshape(-1).view(torch.uint8))
    if not same:
        count = int((merged != weight).sum())
        raise VerifyError(
            f"{', '.join(names)} differs from the checkpoint in {count} of {weight.numel()} values."
        )


def _check_constants(files: dict[str, Path], dims: Dims) -> None:
    for pattern, value in XIELU_CONSTANTS.items():
        names = [pattern.format(i=layer) for layer in range(dims.num_layers)]
        for name, tensor in zip(names, read_tensors(files, names), strict=True):
            if not torch.equal(tensor, torch.tensor(value, dtype=torch.float32)):
                raise VerifyError(f"{name} is {tensor.tolist()}, expected {value} in float32.")


def _check_loading(info: dict[str, object]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := info.get(kind):
            names = ", ".join(sorted(map(str, found))[:3])  # type: ignore[call-overload]
            raise VerifyError(f"transformers reports {kind.replace('_', ' ')}: {names}.")


def _load_unrounded(
    model: torch.nn.Module, reader: TorchDistReader, placements: Sequence[Placement], dims: Dims
) -> None:
    for placement in placements:
        parts = placement.entry.split(read_weight(reader, placement, dims), dims)
        state = dict(zip(placement.hf_names, parts, strict=True))
        unexpected = model.load_state_dict(state, strict=False).unexpected_keys
        assert not unexpected, unexpected


def _compare(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> LogitDifference:
    largest, same, positions, first = 0.0, 0, 0, None
    for prompt, (want, got) in enumerate(zip(expected, actual, strict=True)):
        difference = (want - got).abs().amax(dim=-1)
        # what the reference thinks of the token that transformers prefers
        gap = want.amax(dim=-1) - want.gather(-1, got.argmax(dim=-1, keepdim=True)).squeeze(-1)
        agrees = gap <= TIE
        # written so that NaN counts as a failure
        bad = ~((difference <= LOGIT_TOLERANCE) & agrees)
        if first is None and bad.any():
            first = (prompt, int(bad.nonzero()[0]))
        largest = max(largest, float(difference.nan_to_num(nan=torch.inf).max()))
        same, positions = same + int(agrees.sum()), positions + len(want)
    return LogitDifference(positions, largest, same / positions, first)


def _describe(difference: LogitDifference, prompts: Prompts) -> str:
    assert difference.first is not None
    prompt, position = difference.first
    return (
        f"The exported model computes something else than the checkpoint: max logit difference "
        f"{difference.max_abs:.3g} (at most {LOGIT_TOLERANCE:g} allowed), same most likely token "
        f"at {difference.agreement:.2%} of {difference.positions} positions. First at prompt "
        f"{prompt} (length {len(prompts[prompt])}, ids {list(prompts[prompt][:8])}...), position "
        f"{position}."
    )


def _check_prompts(prompts: Prompts, vocab_size: int, seq_length: int) -> None:
    for number, prompt in enumerate(prompts):
        if not prompt or not all(0 <= token < vocab_size for token in prompt):
            raise UserError(
                f"prompt {number} must hold token ids from 0 to {vocab_size - 1}, got {prompt[:8]}."
            )
        if len(prompt) > seq_length:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, the model's context is {seq_length}."
            )
