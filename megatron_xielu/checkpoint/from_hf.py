"""A Hugging Face folder to a run folder whose training begins from those weights.

Weights stream from the safetensors files into a torch_dist checkpoint, which every tensor- and
pipeline-parallel layout reads; no GPU, Megatron or transformers model is needed. The checkpoint is
what Megatron calls a release, see `release`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.hf_checks import check_room, check_tensors, check_tokenizer
from megatron_xielu.checkpoint.hf_model import HfFolder
from megatron_xielu.checkpoint.mapping import Placement, table
from megatron_xielu.checkpoint.release import about, common_state, extra_states, recipe_of
from megatron_xielu.checkpoint.store import Store
from megatron_xielu.checkpoint.tokens import keep_tokens
from megatron_xielu.checkpoint.torch_dist_writer import Part, write_checkpoint
from megatron_xielu.errors import UserError
from megatron_xielu.folders import leftovers, new_folder
from megatron_xielu.recipes import Recipe, padded_vocab_size, to_yaml
from megatron_xielu.recipes import check as check_recipe

_RECIPE = "recipe.yaml"
_CHECKPOINTS = "checkpoints"
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class HfImport:
    """What was written."""

    path: Path
    """The run folder."""
    recipe: Recipe
    num_parameters: int
    """Without padding."""
    num_bytes: int


def convert_from_hf(
    hf_dir: Path,
    out_dir: Path,
    *,
    check: bool = False,
    progress: Callable[[str], None] = print,
) -> HfImport:
    """Writes the model of a Hugging Face folder as a run folder that `pretrain` begins from.

    Matrices and norms keep their type, fp32 or bf16 (fp16 becomes fp32); alphas are fp32 of the
    stored value. The recipe's model is the folder's, its training has values to be replaced.

    Args:
        hf_dir: of ArceeForCausalLM, ApertusForCausalLM, LlamaForCausalLM or Qwen3ForCausalLM, with
            safetensors files.
        out_dir: must not exist; it appears when everything is in it.
        check: compare what was written with the folder before it gets its name; needs
            transformers.

    Raises:
        UserError: the folder is damaged, contradicts itself or holds what Megatron cannot compute,
            or `out_dir` exists or cannot be written.
        VerifyError: what was written is not the folder's model; nothing is left of it.
    """
    from tqdm import tqdm

    hf_dir, out_dir = Path(hf_dir), Path(out_dir).resolve()
    _refuse_existing(out_dir)
    folder = HfFolder(hf_dir)
    arch = folder.arch
    placements = list(weights_of(arch))
    check_tensors(folder, placements, arch)
    check_tokenizer(hf_dir, arch)
    recipe = recipe_of(arch, out_dir.name)
    check_recipe(recipe, 1)
    dtypes = _stored_dtypes(folder, placements)
    parts = [_part(folder, placement, arch, dtypes[placement.key]) for placement in placements]
    num_bytes = sum(part.num_bytes for part in parts)
    check_room(out_dir, num_bytes)
    progress(f"{hf_dir}: {folder.target.class_name}, {num_bytes / 1e9:.3g} GB")
    for path in leftovers(out_dir):
        progress(f"note: {path} is from an interrupted run; delete it unless one is still at work")
    with _new_run(out_dir) as run_dir:
        store = Store(run_dir / _CHECKPOINTS, recipe=to_yaml(recipe))
        # a bar on terminals only
        with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            files = write_checkpoint(
                store.begin(0),
                parts,
                common_state(arch),
                extra_states(arch),
                progress=bar.update,
            )
        files |= store.describe(0, [_RECIPE])
        store.publish(0, files, about(hf_dir.resolve().name))
        (run_dir / _RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
        keep_tokens(folder, run_dir)
        if check:
            from megatron_xielu.checkpoint.verify import verify

            progress(str(verify(hf_dir, run_dir)))
    num_parameters = sum(prod(placement.entry.shape(arch)) for placement in placements)
    progress(
        f"wrote {out_dir}: {num_parameters:,} parameters. Its {_RECIPE} describes the model; the "
        f"training in it is a placeholder for yours"
    )
    return HfImport(out_dir, recipe, num_parameters, num_bytes)


def weights_of(arch: Architecture) -> Iterator[Placement]:
    """Every weight under the stacked key that GPTModel stores, in the order of the layers."""
    entries = sorted(table(arch), key=lambda entry: "{i}" in entry.megatron[0])
    for entry in entries:
        if "{i}" not in entry.megatron[0]:
            yield Placement(entry, entry.megatron[0], None, None)
    for layer in range(arch.num_layers):
        for entry in entries:
            if "{i}" in entry.megatron[0]:
                yield Placement(entry, entry.megatron[0].replace(".{i}", ""), layer, layer)


def _stored_dtypes(folder: HfFolder, placements: list[Placement]) -> dict[str, torch.dtype]:
    """The type of each stored tensor: bf16 if all of its layers are, else fp32, which holds all."""
    dtypes: dict[str, torch.dtype] = {}
    for placement in placements:
        found = {folder.specs[name].dtype for name in placement.hf_names(folder.target)}
        short = found == {torch.bfloat16} and not placement.entry.keep_fp32
        if not short or placement.key not in dtypes:
            dtypes[placement.key] = torch.bfloat16 if short else torch.float32
    return dtypes


def _part(folder: HfFolder, placement: Placement, arch: Architecture, dtype: torch.dtype) -> Part:
    entry = placement.entry
    shape = entry.shape(arch)
    if entry.padded:
        shape = (padded_vocab_size(shape[0]), *shape[1:])
    stored = shape if placement.index is None else (arch.num_layers, *shape)
    load = partial(_load, folder, placement, arch, dtype)
    return Part(key=placement.key, shape=stored, row=placement.index, dtype=dtype, load=load)


def _load(folder: HfFolder, placement: Placement, arch: Architecture, dtype: torch.dtype) -> Tensor:
    entry = placement.entry
    tensors = [folder.read(name).to(dtype) for name in placement.hf_names(folder.target)]
    weight = entry.merge(tensors, arch)
    return _padded(weight) if entry.padded else weight


def _padded(weight: Tensor) -> Tensor:
    """With rows up to the padded vocabulary, each the mean of the others.

    Padding then adds no more to the softmax's sum than its share of the rows (Jensen's inequality);
    rows of zeros have no such bound.
    """
    missing = padded_vocab_size(len(weight)) - len(weight)
    if not missing:
        return weight
    # torch's own mean makes an fp32 copy of all of it
    rows = weight.split(_ROWS_AT_ONCE)
    mean = torch.stack([part.float().sum(dim=0) for part in rows]).sum(dim=0) / len(weight)
    return torch.cat([weight, mean.to(weight.dtype).expand(missing, -1)])


def _refuse_existing(out_dir: Path) -> None:
    if out_dir.exists():
        raise UserError(f"{out_dir} exists. Choose a new folder, or move that one away.")


@contextmanager
def _new_run(out_dir: Path) -> Iterator[Path]:
    """A new folder that becomes `out_dir` when the block ends well, else vanishes."""
    from safetensors import SafetensorError

    try:
        with new_folder(out_dir) as folder:
            yield folder
            # what came while this one was written
            _refuse_existing(out_dir)
    except SafetensorError as error:
        raise UserError(f"A tensor could not be read: {error}. Get the folder again.") from error
    except OSError as error:
        raise UserError(f"{out_dir} could not be written: {error}. Nothing is there.") from error
