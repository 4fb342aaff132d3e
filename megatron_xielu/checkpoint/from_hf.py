"""A Hugging Face folder to a run folder whose training begins from those weights.

Weights stream from the safetensors files into a torch_dist checkpoint, which every tensor- and
pipeline-parallel layout reads; no GPU, Megatron or transformers model is needed. The checkpoint is
what Megatron calls a release: weights alone, from which training begins at step 0 with a fresh
optimizer and the data's first token.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.hf_config import read_architecture
from megatron_xielu.checkpoint.hf_model import HfFolder
from megatron_xielu.checkpoint.mapping import (
    LM_HEAD,
    TABLE,
    XIELU_CONSTANTS,
    Placement,
    hf_shapes,
    table,
)
from megatron_xielu.checkpoint.store import Store
from megatron_xielu.checkpoint.torch_dist_writer import Part, write_checkpoint
from megatron_xielu.errors import UserError
from megatron_xielu.folders import leftovers, new_folder
from megatron_xielu.recipes import Recipe, padded_vocab_size, to_yaml
from megatron_xielu.recipes import check as check_recipe
from megatron_xielu.recipes.schema import Model, Optimizer, Schedule, Training

_RECIPE = "recipe.yaml"
_CHECKPOINTS = "checkpoints"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SPARE_BYTES = 10**8


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
    if out_dir.exists():
        raise UserError(f"{out_dir} exists. Choose a new folder, or move that one away.")
    folder = HfFolder(hf_dir)
    arch = read_architecture(folder.config, folder.target, hf_dir / "config.json")
    placements = list(weights_of(arch))
    _check_tensors(folder, placements, arch)
    _check_tokenizer(hf_dir, arch)
    recipe = _recipe(arch, out_dir.name)
    check_recipe(recipe, 1)
    dtypes = _stored_dtypes(folder, placements)
    parts = [_part(folder, placement, arch, dtypes[placement.key]) for placement in placements]
    num_bytes = sum(part.num_bytes for part in parts)
    _check_room(out_dir, num_bytes)
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
                _common_state(arch),
                _extra_states(arch),
                progress=bar.update,
            )
        files |= store.describe(0, [_RECIPE])
        store.publish(0, files, _about(hf_dir))
        (run_dir / _RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
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


def _check_tensors(folder: HfFolder, placements: list[Placement], arch: Architecture) -> None:
    """Raises UserError unless the folder holds exactly the tensors of its config.json."""
    needed: dict[str, tuple[int, ...]] = dict.fromkeys(_constants(arch), ())
    for placement in placements:
        needed |= hf_shapes(placement, arch, folder.target)
    if missing := sorted(needed.keys() - folder.specs.keys()):
        raise UserError(
            f"{folder.path} lacks {len(missing)} of the {len(needed)} tensors that its config.json "
            f"means, the first is {missing[0]}. Get the folder again, or the config.json of these "
            f"tensors."
        )
    for name, shape in needed.items():
        if folder.specs[name].shape != shape:
            raise UserError(
                f"{folder.path}: {name} has shape {folder.specs[name].shape}, its config.json "
                f"means {shape}. Get the config.json of these tensors."
            )
    for name, value in _constants(arch).items():
        found = float(folder.read(name))
        # transformers builds them in bf16 and may save that number as fp32
        if found not in {float(torch.tensor(value, dtype=dtype)) for dtype in _DTYPES}:
            raise UserError(
                f"{folder.path}: {name} is {found}, only {value} is trained on and computed alike "
                f"by all programs."
            )
    unknown = folder.specs.keys() - needed.keys()
    if arch.tie_embeddings and LM_HEAD in unknown:
        unknown -= {LM_HEAD}
        _check_tied(folder)
    # buffers that transformers before 4.32 saved and none reads
    if unknown := {name for name in unknown if not name.endswith(".rotary_emb.inv_freq")}:
        raise UserError(
            f"{folder.path} holds {len(unknown)} tensors that {folder.target.class_name} by its "
            f"config.json has no place for, the first is {min(unknown)}. Biases, adapters and "
            f"heads other than the language model's cannot be trained on."
        )


def _constants(arch: Architecture) -> dict[str, float]:
    """What transformers keeps in every layer of xIELU, and leaves uninitialized where it lacks."""
    if arch.activation != "xielu":
        return {}
    return {
        pattern.format(i=layer): value
        for layer in range(arch.num_layers)
        for pattern, value in XIELU_CONSTANTS.items()
    }


def _check_tied(folder: HfFolder) -> None:
    (embedding,) = TABLE[0].hf
    if not torch.equal(folder.read(LM_HEAD), folder.read(embedding)):
        raise UserError(
            f"{folder.path}: config.json says tie_word_embeddings, but {LM_HEAD} is another tensor "
            f"than {embedding}. Set tie_word_embeddings to false if the model was trained so."
        )


def _check_tokenizer(hf_dir: Path, arch: Architecture) -> None:
    """Raises UserError if a tokenizer beside the model has ids without a row."""
    path = hf_dir / "tokenizer.json"
    if not path.is_file():
        return
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values()
    # the library raises plain Exception
    except Exception as error:
        raise UserError(f"{path} is not a tokenizer: {error}.") from error
    if max(ids) >= arch.vocab_size:
        raise UserError(
            f"{path} has ids up to {max(ids)}, the model's vocab_size is {arch.vocab_size}: it is "
            f"the tokenizer of another model. Put this model's beside it, or remove it."
        )


def _recipe(arch: Architecture, name: str) -> Recipe:
    """The model of the folder; a short, careful training whose values are to be replaced."""
    grouped = arch.num_query_groups != arch.num_attention_heads
    derived_dim = arch.head_dim * arch.num_attention_heads == arch.hidden_size
    model = Model(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups if grouped else None,
        head_dim=None if derived_dim else arch.head_dim,
        ffn_hidden_size=arch.ffn_hidden_size,
        activation=arch.activation,
        seq_length=arch.seq_length,
        vocab_size=padded_vocab_size(arch.vocab_size),
        tie_embeddings=arch.tie_embeddings,
        rope_theta=arch.rope_theta,
        rope_scaling_factor=arch.rope_scaling_factor,
        norm_epsilon=arch.norm_epsilon,
        init_std=arch.init_std,
        qk_layernorm=arch.qk_layernorm,
    )
    return Recipe(
        name=name,
        model=model,
        training=Training(train_iters=1000, global_batch_size=32, micro_batch_size=1),
        optimizer=Optimizer(lr=1e-5),
        schedule=Schedule(lr_warmup_iters=100, lr_wsd_decay_iters=200),
    )


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
    missing = padded_vocab_size(len(weight)) - len(weight) if entry.padded else 0
    if not missing:
        return weight
    # with their mean, padding adds no more to the softmax's sum than rows/vocabulary of it (by
    # Jensen's inequality); rows of zeros have no such bound
    mean = weight.mean(dim=0, keepdim=True, dtype=torch.float32)
    return torch.cat([weight, mean.to(dtype).expand(missing, -1)])


def _common_state(arch: Architecture) -> dict[str, Any]:
    return {
        "args": argparse.Namespace(**megatron_arguments(arch)),
        "checkpoint_version": 3.0,
        "iteration": 0,
        # how a model of the same kind names and cuts what it loads
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def _extra_states(arch: Architecture) -> dict[str, Any]:
    """What Megatron's own linear layers save beside their weights, and stock Megatron demands."""
    linears = [f"self_attention.linear_{name}" for name in ("qkv", "proj")]
    linears += [f"mlp.linear_{name}" for name in ("fc1", "fc2")]
    return {
        f"decoder.layers.{linear}._extra_state/shard_{layer}_{arch.num_layers}": None
        for linear in linears
        for layer in range(arch.num_layers)
    }


def megatron_arguments(arch: Architecture) -> dict[str, Any]:
    """What decides the model among Megatron's arguments; `Architecture.of_arguments` reads it."""
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "group_query_attention": arch.num_query_groups != arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "seq_length": arch.seq_length,
        "max_position_embeddings": arch.seq_length,
        "vocab_size": arch.vocab_size,
        "padded_vocab_size": padded_vocab_size(arch.vocab_size),
        "untie_embeddings_and_output_weights": not arch.tie_embeddings,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_epsilon,
        "qk_layernorm": arch.qk_layernorm,
        "position_embedding_type": "rope",
        "rotary_base": int(arch.rope_theta),
        "use_rope_scaling": arch.rope_scaling_factor is not None,
        "rope_scaling_factor": arch.rope_scaling_factor or 8.0,
        "swiglu": arch.activation == "swiglu",
        "squared_relu": arch.activation == "relu2",
        "add_bias_linear": False,
        "init_method_std": arch.init_std,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "world_size": 1,
        "data_parallel_size": 1,
    }


def _about(hf_dir: Path) -> Mapping[str, Any]:
    """As a run's save has it, for `checkpoint ls`."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "data_parallel_size": 1,
        "torch": torch.__version__,
        "megatron-xielu": version("megatron-xielu"),
        "converted_from": hf_dir.resolve().name,
    }


def _check_room(out_dir: Path, num_bytes: int) -> None:
    existing = next(folder for folder in out_dir.parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < num_bytes + _SPARE_BYTES:
        raise UserError(
            f"{out_dir} needs {num_bytes / 1e9:.3g} GB, the disk of {existing} has "
            f"{free / 1e9:.3g} GB left. Make room, or choose another disk."
        )


@contextmanager
def _new_run(out_dir: Path) -> Iterator[Path]:
    """A new folder that becomes `out_dir` when the block ends well, else vanishes."""
    from safetensors import SafetensorError

    try:
        with new_folder(out_dir) as folder:
            yield folder
    except SafetensorError as error:
        raise UserError(f"A tensor could not be read: {error}. Get the folder again.") from error
    except OSError as error:
        raise UserError(f"{out_dir} could not be written: {error}. Nothing is there.") from error
