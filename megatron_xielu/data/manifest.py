"""A data folder as its readers see it: the manifest, and the checks before a run starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_xielu.data.corpus import Source
from megatron_xielu.data.tokenizer import TOKENIZER_FILE
from megatron_xielu.errors import UserError

FORMAT = 1
MANIFEST = "dataset.json"
SPLITS = ("train", "valid")
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class Split:
    """The training or the held-out part; `sha256` is that of its .bin file."""

    documents: int
    tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a data folder says of itself."""

    path: Path
    vocab_size: int
    """Every id is below this."""
    eod_id: int
    """The id that ends each document."""
    train: Split
    valid: Split
    unigram_entropy_nats: float
    """Nats per valid token under the train tokens' frequencies, each count plus one."""
    bytes_per_token: float
    """UTF-8 bytes of the valid text over all its tokens, those that end documents included: a loss
    in nats per token is loss / bytes_per_token / ln 2 bits per byte."""
    tokenizer_sha256: str
    sources: tuple[Source, ...]
    request: Mapping[str, Any]
    """The inputs and settings that made the folder; equal ones make equal bytes."""

    @property
    def tokenizer(self) -> Path:
        """The Hugging Face tokenizer folder."""
        return self.path / TOKENIZER_FOLDER

    def prefix(self, split: str) -> Path:
        """Where the `.bin` and `.idx` of "train" or "valid" are, without the suffix."""
        return self.path / split


def save_info(info: DatasetInfo, folder: Path) -> None:
    """Write the manifest of a data folder."""
    content = {"format": FORMAT, **asdict(info)}
    del content["path"]
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def load_info(data_dir: Path) -> DatasetInfo:
    """Read the manifest of a data folder.

    Raises:
        UserError: the folder or its manifest is missing, broken or of another format.
    """
    path = data_dir / MANIFEST
    if not data_dir.is_dir():
        raise UserError(f"no data folder at {data_dir}. Write one with `prepare-data`.")
    if not path.is_file():
        raise UserError(
            f"{data_dir} is not a data folder: it has no {MANIFEST}. "
            "Give a folder that `prepare-data` wrote."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"a {type(content).__name__} where an object belongs")
        found = content.pop("format")
        if found != FORMAT:
            raise UserError(
                f"{path} has format {found}; this version reads format {FORMAT}. "
                "Write the data folder again with `prepare-data`."
            )
        for split in SPLITS:
            content[split] = Split(**content[split])
        content["sources"] = tuple(Source(**source) for source in content["sources"])
        return DatasetInfo(path=data_dir, **content)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is broken ({error}). Write the data folder again with `prepare-data --force`."
        ) from error


def check_dataset(
    data_dir: Path,
    *,
    vocab_size: int | None,
    progress: Callable[[str], None] | None = None,
) -> DatasetInfo:
    """Everything a training run must know of its data before it starts; Megatron is not imported.

    Args:
        data_dir: a data folder.
        vocab_size: rows of the model's embedding; None means not decided yet.
        progress: is told when a large file is only sampled for ids out of range.

    Raises:
        UserError: a file is missing, truncated or not the one the manifest describes, or an id is
            too large for the tokenizer or the model.
    """
    info = load_info(data_dir)
    path = info.tokenizer / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing. Write the data folder again.")
    if sha256_of(path) != info.tokenizer_sha256:
        raise UserError(
            f"{path} is not the tokenizer that made this data: its SHA-256 differs from the one in "
            f"{MANIFEST}. Put the original back, or write the data folder again."
        )
    if vocab_size is not None and info.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer of {data_dir} has {info.vocab_size} ids but model.vocab_size is "
            f"{vocab_size}. Set model.vocab_size to {info.vocab_size} or more, or leave it out."
        )
    for split in SPLITS:
        _check_split(info, split, progress)
    return info


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_split(info: DatasetInfo, split: str, progress: Callable[[str], None] | None) -> None:
    from megatron_xielu.mcore.indexed_dataset import bin_path, read_index, token_id_range

    prefix, expected = info.prefix(split), getattr(info, split)
    index = read_index(prefix)
    if (index.documents, index.tokens) != (expected.documents, expected.tokens):
        raise UserError(
            f"{bin_path(prefix)} holds {index.documents:,} documents and {index.tokens:,} tokens, "
            f"{MANIFEST} says {expected.documents:,} and {expected.tokens:,}: the files are from "
            "different runs. Write the data folder again."
        )
    found = token_id_range(prefix)
    if progress and found.scanned < index.tokens:
        progress(f"{split}: ids checked in {found.scanned:,} of {index.tokens:,} tokens")
    if found.lowest < 0 or found.highest >= info.vocab_size:
        wrong = found.lowest if found.lowest < 0 else found.highest
        raise UserError(
            f"{bin_path(prefix)} holds id {wrong} but the tokenizer's are 0 to "
            f"{info.vocab_size - 1}: the file is damaged. Write the data folder again."
        )
