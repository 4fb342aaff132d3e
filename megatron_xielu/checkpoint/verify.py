"""Prove that two models are one: checkpoints and Hugging Face folders, in any pair.

Each check sees faults that the others do not. A Hugging Face folder must hold exactly the tensors
that transformers needs for its config.json, which must not contradict itself; the two must describe
one architecture; every tensor must equal the other model's bit for bit;
and fp32 logits must agree, those of a folder computed by stock transformers, those of a checkpoint
by a model written from Megatron's conventions (`megatron_model`), or by Megatron itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_xielu.checkpoint.hf_model import HfFolder
from megatron_xielu.checkpoint.mapping import EMBEDDING, LM_HEAD
from megatron_xielu.checkpoint.megatron_model import MegatronCheckpoint
from megatron_xielu.errors import UserError

LOGIT_TOLERANCE = 1e-4
"""Largest difference of fp32 logits; alphas rounded to bf16, the least fault known, exceed it."""
TIE = 1e-5
"""Two logits of the reference this close may change places: fp32 sums in another order do that."""
_LONGEST = 128
"""Tokens of the longest prompt: enough for a wrong RoPE to show, and logits that fit any memory."""

Prompts = Sequence[Sequence[int]]
ReferenceLogits = Callable[[list[list[int]]], list[Tensor]]
Model = HfFolder | MegatronCheckpoint


class VerifyError(Exception):
    """The two are not one model; the message says where they differ."""


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
    num_rounded: int
    """Tensors that one of the two holds in a shorter type, compared in that."""
    logits: LogitDifference
    """Of the two models, with the values that both hold."""
    stock: LogitDifference | None
    """Of the first model and of transformers as it loads a folder whose alphas it rounds."""

    def __str__(self) -> str:
        rounded = f" ({self.num_rounded} rounded to the shorter type)" if self.num_rounded else ""
        text = (
            f"{self.num_tensors} tensors are equal bit for bit{rounded}\n"
            f"fp32 logits at {self.logits.positions} positions: max difference "
            f"{self.logits.max_abs:.2e}, same token {self.logits.agreement:.2%}"
        )
        if self.stock is not None:
            text += (
                f"\nas transformers loads it by itself, alphas rounded to bf16: max difference "
                f"{self.stock.max_abs:.2e}, same token {self.stock.agreement:.2%}"
            )
        return text


def verify(
    a: Path,
    b: Path,
    *,
    prompts: list[list[int]] | None = None,
    reference_logits: ReferenceLogits | None = None,
    given: Mapping[str, Any] | None = None,
) -> VerifyReport:
    """Compares two models, each a run, checkpoints or iter_ folder or a Hugging Face folder.

    Where one holds a tensor in a shorter type, both are rounded to it before they are compared and
    before logits are computed.

    Args:
        prompts: token ids; None means `default_prompts`.
        reference_logits: logits (tokens, at least the vocabulary) for each prompt that take the
            place of those computed from the checkpoint among the two.
        given: Megatron's arguments that a checkpoint lacks, by their names in it.

    Raises:
        VerifyError: a key, shape, tensor or logit differs.
        UserError: a folder or a prompt cannot be used.
    """
    one, other = open_models(a, b, given)
    for model in (one, other):
        if isinstance(model, HfFolder):
            check_keys(model)
    check_architectures(one, other)
    shorter = compare_tensors(one, other)
    vocab_size = one.specs[EMBEDDING].shape[0]
    if prompts is None:
        prompts = default_prompts(vocab_size, min(_context(one), _context(other)))
    _check_prompts(prompts, vocab_size, min(_context(one), _context(other)))
    logits = [_logits(model, shorter, prompts, reference_logits) for model in (one, other)]
    difference = _compare(*logits)
    if difference.first is not None:
        raise VerifyError(_describe(difference, prompts))
    stock = None
    for model, expected in ((one, logits[1]), (other, logits[0])):
        if isinstance(model, HfFolder) and model.rounds_when_loaded():
            stock = _compare(expected, model.logits(prompts, as_loaded=True))
    return VerifyReport(len(other.specs), len(shorter), difference, stock)


def open_models(a: Path, b: Path, given: Mapping[str, Any] | None = None) -> tuple[Model, Model]:
    """Both models; a checkpoint beside a folder gets the folder's names.

    One that does not say its vocabulary's size gets the folder's too.
    """
    folders = {path: HfFolder(path) for path in (a, b) if (Path(path) / "config.json").is_file()}
    target = next((folder.target for folder in folders.values()), None)
    size = next((folder.arch.vocab_size for folder in folders.values()), None)
    one, other = (
        folders[path]
        if path in folders
        else MegatronCheckpoint(path, target=target, vocab_size=size, given=given)
        for path in (a, b)
    )
    return one, other


def default_prompts(vocab_size: int, seq_length: int) -> list[list[int]]:
    """Random ids, the same every time, of several lengths from 1 to the context, at most 128."""
    generator = torch.Generator().manual_seed(0)
    lengths = sorted({min(length, seq_length) for length in (1, 2, 7, 32, _LONGEST)})
    return [
        torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths
    ]


def check_keys(folder: HfFolder) -> None:
    """Raises VerifyError unless a folder holds the tensors that its config.json means."""
    expected = folder.expected_shapes()
    if missing := sorted(expected.keys() - folder.specs.keys()):
        raise VerifyError(f"{folder.path} lacks {len(missing)} tensor(s), the first {missing[0]}.")
    # an output layer beside tied embeddings is passed over by transformers
    if extra := sorted(folder.specs.keys() - expected.keys() - {LM_HEAD}):
        raise VerifyError(
            f"{folder.path} holds {len(extra)} unknown tensor(s), the first {extra[0]}."
        )
    for name, shape in expected.items():
        if folder.specs[name].shape != shape:
            raise VerifyError(
                f"{folder.path}: {name} has shape {folder.specs[name].shape}, config.json means "
                f"{shape}."
            )


def check_architectures(one: Model, other: Model) -> None:
    """Raises VerifyError where what describes two models means different functions.

    Their tensors and logits do not show all of it: what transformers passes over in a config.json
    other programs compute with. What does not decide a logit may differ: the context, the initial
    deviation, and whether equal embeddings are stored as one.
    """
    free = {"seq_length", "init_std", "tie_embeddings"}
    first, second = (asdict(model.arch) for model in (one, other))
    if wrong := [name for name in first if name not in free and first[name] != second[name]]:
        raise VerifyError(
            f"{one.path} and {other.path} describe two models: "
            + ", ".join(f"{name} is {first[name]} and {second[name]}" for name in wrong)
            + "."
        )


def compare_tensors(one: Model, other: Model) -> dict[str, torch.dtype]:
    """Compares every tensor of two models bit for bit.

    Returns:
        The names of those that one holds in a shorter type, and that type.

    Raises:
        VerifyError: names, shapes or values differ; the tensor that differs most is named.
    """
    names = _names(one, other), _names(other, one)
    for model, own, wanted in ((one, names[0], names[1]), (other, names[1], names[0])):
        if missing := sorted(wanted - own):
            raise VerifyError(
                f"{model.path} lacks {len(missing)} tensor(s) that the other holds, the first "
                f"{missing[0]}."
            )
    shorter: dict[str, torch.dtype] = {}
    worst: tuple[float, str] | None = None
    count = 0
    # a checkpoint stores some together, which are then asked for one after the other
    for name in one.specs if isinstance(one, MegatronCheckpoint) else other.specs:
        specs = [model.specs[_alias(name, model)] for model in (one, other)]
        if specs[0].shape != specs[1].shape:
            raise VerifyError(
                f"{name} has shape {specs[0].shape} in {one.path} and {specs[1].shape} in "
                f"{other.path}."
            )
        dtype = min((spec.dtype for spec in specs), key=lambda dtype: dtype.itemsize)
        if specs[0].dtype.itemsize != specs[1].dtype.itemsize:
            shorter[name] = dtype
        if name.endswith(".act_fn.eps"):
            # transformers builds it in bf16 and may save that number as fp32
            dtype = torch.bfloat16
        blocks = [model.blocks(_alias(name, model)) for model in (one, other)]
        found = _difference(blocks[0], blocks[1], dtype)
        if found is not None:
            count += 1
            differing, difference = found
            size = prod(specs[0].shape)
            text = (
                f"{name}, {differing / size:.1%} of whose {size} values differ, by at most "
                f"{difference:.3g}"
            )
            if worst is None or difference > worst[0]:
                worst = difference, text
    if worst is not None:
        raise VerifyError(f"{count} tensor(s) differ; the one that differs most is {worst[1]}.")
    return shorter


def _difference(
    one: Iterable[Tensor], other: Iterable[Tensor], dtype: torch.dtype
) -> tuple[int, float] | None:
    """How many numbers of two tensors in blocks differ, and by how much; None if no bit does."""
    equal, differing, largest = True, 0, 0.0
    for rows in zip(one, other, strict=True):
        x, y = (part.to(dtype) for part in rows)
        # as bytes, so that NaN equals itself and -0 differs from 0
        if x.reshape(-1).view(torch.uint8).equal(y.reshape(-1).view(torch.uint8)):
            continue
        equal = False
        differing += int((x != y).sum())
        most = (x.float() - y.float()).abs().nan_to_num(nan=torch.inf).max()
        largest = max(largest, float(most))
    return None if equal else (differing, largest)


def _names(model: Model, beside: Model) -> set[str]:
    """What a model holds, its tied embeddings twice where the other holds an output layer."""
    names = set(model.specs)
    return names | {LM_HEAD} if model.tied and LM_HEAD in beside.specs else names


def _alias(name: str, model: Model) -> str:
    return EMBEDDING if name == LM_HEAD and LM_HEAD not in model.specs else name


def _context(model: Model) -> int:
    return model.arch.seq_length


def _logits(
    model: Model,
    shorter: Mapping[str, torch.dtype],
    prompts: list[list[int]],
    reference_logits: ReferenceLogits | None,
) -> list[Tensor]:
    def rounded(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(shorter.get(name, tensor.dtype))

    if isinstance(model, HfFolder) or reference_logits is None:
        return model.logits(prompts, rounded)
    return [logits[:, : model.arch.vocab_size] for logits in reference_logits(prompts)]


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
        f"The two compute something else: max logit difference {difference.max_abs:.3g} (at most "
        f"{LOGIT_TOLERANCE:g} allowed), same most likely token at {difference.agreement:.2%} of "
        f"{difference.positions} positions. First at prompt "
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
