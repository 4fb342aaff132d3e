"""What must hold of a Hugging Face folder before any of it is converted."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.hf_model import HfFolder
from megatron_xielu.checkpoint.mapping import (
    EMBEDDING,
    LM_HEAD,
    XIELU_CONSTANTS,
    Placement,
    hf_shapes,
)
from megatron_xielu.errors import UserError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SPARE_BYTES = 10**8


def check_tensors(folder: HfFolder, placements: Sequence[Placement], arch: Architecture) -> None:
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
    if not torch.equal(folder.read(LM_HEAD), folder.read(EMBEDDING)):
        raise UserError(
            f"{folder.path}: config.json says tie_word_embeddings, but {LM_HEAD} is another tensor "
            f"than {EMBEDDING}. Set tie_word_embeddings to false if the model was trained so."
        )


def check_tokenizer(hf_dir: Path, arch: Architecture) -> None:
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


def check_room(out_dir: Path, num_bytes: int) -> None:
    """Raises UserError if the disk has not that many bytes left."""
    existing = next(folder for folder in out_dir.parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < num_bytes + _SPARE_BYTES:
        raise UserError(
            f"{out_dir} needs {num_bytes / 1e9:.3g} GB, the disk of {existing} has "
            f"{free / 1e9:.3g} GB left. Make room, or choose another disk."
        )
