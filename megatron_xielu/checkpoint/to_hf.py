"""A Megatron checkpoint to a Hugging Face folder that stock transformers loads.

The target is ArceeForCausalLM with hidden_act="xielu": Llama's layers around a non-gated MLP.
Weights stream from the checkpoint into one safetensors file after the other, so that memory is
about one file; no GPU, Megatron or transformers model is needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_xielu.checkpoint.arcee import (
    SpecialTokens,
    arcee_config,
    generation_config,
    refuse_unrepresentable,
)
from megatron_xielu.checkpoint.mapping import (
    XIELU_CONSTANTS,
    Dims,
    Placement,
    hf_shapes,
    locate,
    read_weight,
)
from megatron_xielu.checkpoint.model_card import model_card
from megatron_xielu.checkpoint.run import RunCheckpoint, check_arguments, open_run
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.errors import UserError
from megatron_xielu.folders import new_folder

DType = Literal["auto", "fp32", "bf16"]
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MANIFEST = "megatron_xielu_export.json"
"""Marks a folder as an export, which another export may replace."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


@dataclass(frozen=True)
class HfExport:
    """What was written."""

    path: Path
    iteration: int
    dtype: str
    num_parameters: int
    num_bytes: int
    """Of the safetensors files' tensors."""
    files: tuple[str, ...]


def convert_to_hf(
    source: Path,
    out_dir: Path,
    *,
    dtype: DType = "auto",
    tokenizer: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: Callable[[str], None] = print,
) -> HfExport:
    """Writes the model of a run folder, checkpoints folder or iter_ folder to `out_dir`.

    Args:
        source: see `open_run`.
        out_dir: must not exist, or be an earlier export, which is replaced once the new one is
            complete; a failure leaves it as it was.
        dtype: "auto" keeps the type of the checkpoint's matrices. xIELU's alphas are always fp32.
        tokenizer: a tokenizer folder; None means that of the run's data, if it is there.
        max_shard_bytes: larger models are split into several files with an index.

    Raises:
        UserError: the model cannot be held by Arcee, the checkpoint is unreadable or of another
            recipe, or the folder cannot be written.
    """
    run = open_run(source)
    out_dir = Path(out_dir).resolve()
    refuse_unrepresentable(run.recipe)
    _refuse_foreign(out_dir)
    reader = TorchDistReader(run.path)
    check_arguments(reader, run.recipe)
    tokenizer = tokenizer or run.tokenizer
    tokens = _special_tokens(tokenizer, run)
    dims = Dims.of(run.recipe, tokens.vocab_size)
    placements = locate(reader, dims)
    torch_dtype = _export_dtype(dtype, reader, placements)
    name = {value: key for key, value in TORCH_DTYPES.items()}[torch_dtype]
    shards = _plan_shards(placements, dims, torch_dtype, max_shard_bytes)
    num_bytes = sum(shard.num_bytes for shard in shards)
    progress(f"step {run.iteration} of {run.run_dir}: {num_bytes / 1e9:.3g} GB as {name}")
    with _new_export(out_dir) as folder:
        _write_json(folder / "config.json", arcee_config(run.recipe, tokens, torch_dtype))
        num_parameters = _write_weights(reader, shards, dims, torch_dtype, folder, progress)
        _write_json(folder / "generation_config.json", generation_config(tokens))
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, folder)
        card = model_card(run, num_parameters, name, tokenizer is not None)
        (folder / "README.md").write_text(card, encoding="utf-8")
        _write_json(
            folder / MANIFEST,
            {"format": 1, "recipe": run.recipe.name, "iteration": run.iteration, "dtype": name},
        )
        files = tuple(sorted(file.name for file in folder.iterdir()))
    progress(f"wrote {out_dir}: {num_parameters:,} parameters in {len(shards)} file(s)")
    return HfExport(out_dir, run.iteration, name, num_parameters, num_bytes, files)


@dataclass(frozen=True)
class _Shard:
    """One safetensors file to be."""

    name: str
    placements: list[Placement]
    num_bytes: int


def _plan_shards(
    placements: list[Placement], dims: Dims, dtype: torch.dtype, max_bytes: int
) -> list[_Shard]:
    groups: list[tuple[list[Placement], int]] = []
    for placement in placements:
        size = _num_bytes(placement, dims, dtype)
        if not groups or groups[-1][1] + size > max_bytes:
            groups.append(([], 0))
        members, total = groups[-1]
        groups[-1] = ([*members, placement], total + size)
    count = len(groups)
    names = [SINGLE_FILE]
    if count > 1:
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return [_Shard(name, *group) for name, group in zip(names, groups, strict=True)]


def _num_bytes(placement: Placement, dims: Dims, dtype: torch.dtype) -> int:
    width = _target_dtype(placement, dtype).itemsize
    elements = sum(prod(shape) for shape in hf_shapes(placement, dims).values())
    return elements * width + sum(t.nbytes for t in _constants(placement).values())


def _target_dtype(placement: Placement, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if placement.entry.keep_fp32 else dtype


def _constants(placement: Placement) -> dict[str, Tensor]:
    """beta and eps of a layer, written next to its alpha_p."""
    if not placement.hf_names[0].endswith("act_fn.alpha_p"):
        return {}
    return {
        name.format(i=placement.layer): torch.tensor(value, dtype=torch.float32)
        for name, value in XIELU_CONSTANTS.items()
    }


def _exported_tensors(
    reader: TorchDistReader, placement: Placement, dims: Dims, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors one placement becomes, under their exported names and in their exported type."""
    parts = placement.entry.split(read_weight(reader, placement, dims), dims)
    target = _target_dtype(placement, dtype)
    tensors = {
        name: part.to(target).contiguous()
        for name, part in zip(placement.hf_names, parts, strict=True)
    }
    return tensors | _constants(placement)


def _write_weights(
    reader: TorchDistReader,
    shards: list[_Shard],
    dims: Dims,
    dtype: torch.dtype,
    folder: Path,
    progress: Callable[[str], None],
) -> int:
    """Writes every file and, for more than one, the index; returns the number of parameters."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    num_parameters = 0
    for shard in shards:
        tensors: dict[str, Tensor] = {}
        for placement in shard.placements:
            tensors |= _exported_tensors(reader, placement, dims, dtype)
        save_file(tensors, folder / shard.name, metadata={"format": "pt"})
        # safetensors lets nobody but the owner read its files
        shutil.copymode(folder / "config.json", folder / shard.name)
        weight_map |= dict.fromkeys(tensors, shard.name)
        # beta and eps are the only 0-dim tensors, and no parameters
        num_parameters += sum(tensor.numel() for tensor in tensors.values() if tensor.dim())
        progress(f"{shard.name}: {len(tensors)} tensors, {shard.num_bytes / 1e9:.3g} GB")
    if len(shards) > 1:
        total = sum(shard.num_bytes for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX_FILE, index)
    return num_parameters


def _export_dtype(
    dtype: DType, reader: TorchDistReader, placements: list[Placement]
) -> torch.dtype:
    if dtype in TORCH_DTYPES:
        return TORCH_DTYPES[dtype]
    if dtype != "auto":
        raise UserError(f"dtype {dtype!r} is none of auto, {', '.join(TORCH_DTYPES)}.")
    stored = {reader.dtype(p.key) for p in placements if not p.entry.keep_fp32}
    return torch.bfloat16 if stored == {torch.bfloat16} else torch.float32


def _special_tokens(tokenizer: Path | None, run: RunCheckpoint) -> SpecialTokens:
    if tokenizer is None:
        if run.recipe.model.vocab_size is None:
            raise UserError(
                f"The vocabulary's size is unknown: {run.run_dir / 'recipe.yaml'} leaves "
                f"model.vocab_size open and the run's tokenizer is not here. Give the tokenizer's "
                f"folder."
            )
        return SpecialTokens(run.recipe.model.vocab_size)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{tokenizer} is not a Hugging Face tokenizer folder: {reason}") from error
    # ids may have holes, so the size is what holds the largest one
    size = max(loaded.get_vocab().values()) + 1
    return SpecialTokens(size, loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    for pattern in _TOKENIZER_FILES:
        for file in tokenizer.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _refuse_foreign(out_dir: Path) -> None:
    if out_dir.exists() and not (out_dir / MANIFEST).is_file():
        raise UserError(
            f"{out_dir} exists and is not an export of this program (it has no {MANIFEST}). Choose "
            f"a new folder, or move that one away."
        )


@contextmanager
def _new_export(out_dir: Path) -> Iterator[Path]:
    """A new folder that takes `out_dir`'s place when the block ends well, else vanishes."""
    from safetensors import SafetensorError

    try:
        with new_folder(out_dir) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out_dir} could not be written: {error}. Nothing was changed.") from error
