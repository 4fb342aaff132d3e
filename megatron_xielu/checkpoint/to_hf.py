"""A Megatron checkpoint to a Hugging Face folder that stock transformers loads.

The class is the one of `targets` that fits. Weights stream from the checkpoint into one safetensors
file after the other, one tensor at a time, so that memory is about twice the largest tensor; no
GPU, Megatron or transformers model is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_xielu.checkpoint import export_manifest
from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.hf_model import INDEX_FILE, SINGLE_FILE
from megatron_xielu.checkpoint.mapping import (
    XIELU_CONSTANTS,
    Placement,
    embedding_rows,
    hf_shapes,
    locate,
    read_weight,
    untied,
)
from megatron_xielu.checkpoint.model_card import model_card
from megatron_xielu.checkpoint.run import architecture_of, arguments_of, known_vocab_size, open_run
from megatron_xielu.checkpoint.safetensors_file import SafetensorsWriter, TensorSpec
from megatron_xielu.checkpoint.targets import (
    Arch,
    Target,
    choose_target,
    hf_config,
)
from megatron_xielu.checkpoint.tokens import (
    GENERATION_CONFIG,
    Tokens,
    copy_tokenizer,
    find_tokens,
    write_json,
)
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.errors import UserError
from megatron_xielu.folders import leftovers, new_folder

Progress = Callable[[str], None]
DType = Literal["auto", "fp32", "bf16"]
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class HfExport:
    """What was written."""

    path: Path
    iteration: int
    class_name: str
    dtype: str
    num_parameters: int
    num_bytes: int
    """Of the safetensors files' tensors."""
    files: tuple[str, ...]


def convert_to_hf(
    source: Path,
    out_dir: Path,
    *,
    arch: Arch = "auto",
    dtype: DType = "auto",
    tokenizer: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    untie: bool = False,
    drop_mtp: bool = False,
    given: Mapping[str, Any] | None = None,
    check: bool = False,
    progress: Progress = print,
) -> HfExport:
    """Writes the model of a run folder, checkpoints folder or iter_ folder to `out_dir`.

    Args:
        source: see `open_run`.
        out_dir: must not exist, or be an earlier export to which nothing was done since; it is
            replaced once the new one is complete, and a failure leaves it as it was.
        arch: the class of transformers; "auto" is the one that fits.
        dtype: "auto" keeps the type of the checkpoint's matrices. xIELU's alphas are always fp32.
        tokenizer: a tokenizer folder; see `find_tokens`.
        max_shard_bytes: larger models are split into several files with an index.
        untie: write tied embeddings twice, as an output layer of its own.
        drop_mtp: leave out layers of multi-token prediction, which no class has.
        given: Megatron's arguments that a checkpoint without recipe lacks, by their names in it.
        check: compare what was written with the checkpoint before it gets its name; needs
            transformers.

    Raises:
        UserError: no such class can hold the model, the checkpoint is unreadable or of another
            recipe, or the folder cannot be written or holds something else than an export.
        VerifyError: what was written is not the checkpoint's model; nothing is left of it.
    """
    run = open_run(source)
    out_dir = Path(out_dir).resolve()
    export_manifest.refuse_changed(out_dir)
    reader = TorchDistReader(run.path)
    tokens = find_tokens(run, tokenizer)
    size = known_vocab_size(run, reader, given)
    if size is None and tokens.num_ids is not None:
        size = _size_by_rounding(tokens.num_ids, reader, progress)
    stored = architecture_of(run, reader, vocab_size=size, given=given)
    _check_tokenizer(tokens, stored)
    target = choose_target(stored, arch)
    placements = locate(reader, stored, drop_mtp=drop_mtp)
    written = replace(stored, tie_embeddings=stored.tie_embeddings and not untie)
    if written != stored:
        placements = untied(placements)
    torch_dtype = _export_dtype(dtype, reader, placements)
    name = {value: key for key, value in TORCH_DTYPES.items()}[torch_dtype]
    export = _Export(reader, stored, target, torch_dtype)
    shards = export.plan(placements, max_shard_bytes)
    num_bytes = sum(shard.num_bytes for shard in shards)
    progress(
        f"step {run.iteration} of {run.run_dir} as {target.class_name}: "
        f"{num_bytes / 1e9:.3g} GB in {name}"
    )
    for path in leftovers(out_dir):
        progress(f"note: {path} is from an interrupted run; delete it unless one is still at work")
    with _new_export(out_dir) as folder:
        config = hf_config(target, written, tokens.special, torch_dtype)
        write_json(folder / "config.json", config)
        num_parameters = export.write(shards, folder)
        write_json(folder / GENERATION_CONFIG, tokens.generation)
        has_tokenizer = tokens.folder is not None and copy_tokenizer(tokens.folder, folder)
        card = model_card(
            run,
            arguments_of(reader),
            written,
            target,
            num_parameters=num_parameters,
            dtype=name,
            has_tokenizer=has_tokenizer,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        if check:
            from megatron_xielu.checkpoint.verify import verify

            progress(str(verify(folder, run.path, given=given)))
        recipe_name = run.recipe.name if run.recipe else None
        about = {"recipe": recipe_name, "iteration": run.iteration, "dtype": name}
        export_manifest.save(folder, about)
        files = tuple(sorted(file.name for file in folder.iterdir()))
    progress(f"wrote {out_dir}: {num_parameters:,} parameters in {len(shards)} file(s)")
    return HfExport(
        out_dir, run.iteration, target.class_name, name, num_parameters, num_bytes, files
    )


@dataclass(frozen=True)
class _Shard:
    """One safetensors file to be."""

    name: str
    specs: dict[Placement, dict[str, TensorSpec]]
    """The tensors that become of each placement, by their exported names."""

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {name: spec for specs in self.specs.values() for name, spec in specs.items()}

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.tensors.values())


@dataclass(frozen=True)
class _Export:
    """One checkpoint on its way into one class."""

    reader: TorchDistReader
    arch: Architecture
    target: Target
    dtype: torch.dtype

    def plan(self, placements: list[Placement], max_bytes: int) -> list[_Shard]:
        """The files, none larger than `max_bytes` unless one weight is."""
        groups: list[dict[Placement, dict[str, TensorSpec]]] = []
        room = 0
        for placement in placements:
            specs = self._specs(placement)
            size = sum(spec.num_bytes for spec in specs.values())
            if not groups or size > room:
                groups.append({})
                room = max_bytes
            groups[-1][placement] = specs
            room -= size
        count = len(groups)
        names = [SINGLE_FILE]
        if count > 1:
            names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        return [_Shard(name, group) for name, group in zip(names, groups, strict=True)]

    def write(self, shards: list[_Shard], folder: Path) -> int:
        """Writes every file and, for more than one, the index; returns the number of parameters."""
        from tqdm import tqdm

        total = sum(shard.num_bytes for shard in shards)
        placements = [placement for shard in shards for placement in shard.specs]
        largest = max(self.reader.num_bytes(p.key, p.index) for p in placements)
        buffer = torch.empty(largest, dtype=torch.uint8)
        # a bar on terminals only
        with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            for shard in shards:
                with SafetensorsWriter(folder / shard.name, shard.tensors) as file:
                    for placement in shard.specs:
                        for name, tensor in self._tensors(placement, buffer):
                            file.write(name, tensor)
                            bar.update(tensor.nbytes)
        if len(shards) > 1:
            weight_map = {name: shard.name for shard in shards for name in shard.tensors}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / INDEX_FILE, index)
        # beta and eps are the only 0-dim tensors, and no parameters
        shapes = [spec.shape for shard in shards for spec in shard.tensors.values() if spec.shape]
        return sum(torch.Size(shape).numel() for shape in shapes)

    def _specs(self, placement: Placement) -> dict[str, TensorSpec]:
        dtype = torch.float32 if placement.entry.keep_fp32 else self.dtype
        shapes = hf_shapes(placement, self.arch, self.target)
        constants = dict.fromkeys(_constants(placement), TensorSpec(torch.float32, ()))
        return {name: TensorSpec(dtype, shape) for name, shape in shapes.items()} | constants

    def _tensors(self, placement: Placement, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        dtype = torch.float32 if placement.entry.keep_fp32 else self.dtype
        weight = read_weight(self.reader, placement, self.arch, buffer)
        parts = placement.entry.split(weight, self.arch)
        for name, part in zip(placement.hf_names(self.target), parts, strict=True):
            yield name, part.to(dtype).contiguous()
        for name, value in _constants(placement).items():
            yield name, torch.tensor(value, dtype=torch.float32)


def _constants(placement: Placement) -> dict[str, float]:
    """beta and eps of a layer, written next to its alpha_p."""
    if not placement.entry.hf[0].endswith("act_fn.alpha_p"):
        return {}
    return {name.format(i=placement.layer): value for name, value in XIELU_CONSTANTS.items()}


def _export_dtype(
    dtype: DType, reader: TorchDistReader, placements: list[Placement]
) -> torch.dtype:
    if dtype in TORCH_DTYPES:
        return TORCH_DTYPES[dtype]
    if dtype != "auto":
        raise UserError(f"dtype {dtype!r} is none of auto, {', '.join(TORCH_DTYPES)}.")
    stored = {reader.dtype(p.key) for p in placements if not p.entry.keep_fp32}
    return torch.bfloat16 if stored == {torch.bfloat16} else torch.float32


def _size_by_rounding(num_ids: int, reader: TorchDistReader, progress: Progress) -> int:
    """The vocabulary of a model that does not say it: the tokenizer's, or every row.

    Rows count as padding only if they are as many as Megatron itself adds to such a tokenizer.
    """
    args, rows = arguments_of(reader), embedding_rows(reader)
    step = args.get("make_vocab_size_divisible_by", 128) * args.get("tensor_model_parallel_size", 1)
    padded = -(-num_ids // step) * step == rows
    size = num_ids if padded else rows
    progress(
        f"note: the checkpoint does not say its vocabulary's size. It has {rows} rows, and the "
        f"tokenizer {num_ids} ids, which Megatron rounds up to a multiple of {step}: so {size} are "
        f"exported. --arg vocab_size=NUMBER overrules that"
    )
    return size


def _check_tokenizer(tokens: Tokens, arch: Architecture) -> None:
    if tokens.num_ids is not None and tokens.num_ids > arch.vocab_size:
        raise UserError(
            f"{tokens.folder} has ids up to {tokens.num_ids - 1}, the model's vocab_size is "
            f"{arch.vocab_size}: it is not the tokenizer of this run's data."
        )


@contextmanager
def _new_export(out_dir: Path) -> Iterator[Path]:
    """A new folder that takes `out_dir`'s place when the block ends well, else vanishes."""
    try:
        with new_folder(out_dir) as folder:
            yield folder
            # what came while this one was written
            export_manifest.refuse_changed(out_dir)
    except OSError as error:
        raise UserError(f"{out_dir} could not be written: {error}. Nothing was changed.") from error
