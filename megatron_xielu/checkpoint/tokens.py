"""A model's tokenizer and the ids where its texts begin and end, from folder to folder.

Megatron has no place for either, so a run that began from a Hugging Face folder keeps them in
`tokenizer`, beside its recipe: the tokenizer's files, config.json's ids and generation_config.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xielu.checkpoint.hf_config import check_types, special_tokens
from megatron_xielu.checkpoint.hf_model import HfFolder, read_json
from megatron_xielu.checkpoint.run import RunCheckpoint
from megatron_xielu.checkpoint.targets import SpecialTokens, generation_config
from megatron_xielu.errors import UserError

GENERATION_CONFIG = "generation_config.json"
_KEPT = "tokenizer"
_IDS = "token_ids.json"
_FAST = "tokenizer.json"
_FILES = (
    _FAST,
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Data that transformers' own tokenizers read, and no code."""


@dataclass(frozen=True)
class Tokens:
    """What an export gets beside its weights."""

    folder: Path | None
    """Where the tokenizer's files are."""
    num_ids: int | None
    """One more than the tokenizer's largest id; None where it was not read."""
    special: SpecialTokens
    generation: Mapping[str, Any]
    """generation_config.json."""


def keep_tokens(folder: HfFolder, run_dir: Path) -> None:
    """Puts what `find_tokens` looks for into a run folder.

    Raises:
        UserError: generation_config.json is damaged.
    """
    kept = run_dir / _KEPT
    kept.mkdir()
    copy_tokenizer(folder.path, kept)
    write_json(kept / _IDS, special_tokens(folder.config, folder.target).as_config())
    if (path := folder.path / GENERATION_CONFIG).is_file():
        content = read_json(path)
        check_types(content, path)
        write_json(kept / GENERATION_CONFIG, content)


def find_tokens(run: RunCheckpoint, tokenizer: Path | None) -> Tokens:
    """The tokenizer and ids of an export.

    Args:
        tokenizer: a folder that takes the place of all others. None means that of the run's data,
            else the one that came with the weights; where the two are one, the ids and
            generation_config.json are those that came with the weights.

    Raises:
        UserError: `tokenizer` is no tokenizer folder.
    """
    kept = run.run_dir / _KEPT
    if tokenizer is None and (kept / _IDS).is_file() and _are_one(run.tokenizer, kept):
        ids = read_json(kept / _IDS)
        check_types(ids, kept / _IDS)
        special = SpecialTokens.of_config(ids)
        own = kept / GENERATION_CONFIG
        generation = read_json(own) if own.is_file() else generation_config(special)
        return Tokens(kept, None, special, generation)
    folder = tokenizer or run.tokenizer
    if folder is None:
        return Tokens(None, None, SpecialTokens(), generation_config(SpecialTokens()))
    num_ids, special = _read_tokenizer(folder)
    return Tokens(folder, num_ids, special, generation_config(special))


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copies the files of a tokenizer and nothing else; returns whether there were any."""
    found = [source / name for name in _FILES if (source / name).is_file()]
    for file in found:
        shutil.copyfile(file, target / file.name)
    return bool(found)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object of JSON to be read by people too."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _are_one(of_data: Path | None, kept: Path) -> bool:
    if of_data is None:
        return True
    files = [folder / _FAST for folder in (of_data, kept)]
    if not all(file.is_file() for file in files):
        return False
    # prepare-data copies it as it is
    return files[0].read_bytes() == files[1].read_bytes()


def _read_tokenizer(folder: Path) -> tuple[int, SpecialTokens]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. Give the folder that holds {_FAST}.")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    # the library raises plain Exception
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{folder} is not a Hugging Face tokenizer folder: {reason}") from error
    # ids may have holes, so the size is what holds the largest one
    size = max(loaded.get_vocab().values()) + 1
    return size, SpecialTokens(loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
