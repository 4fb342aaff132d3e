"""Prepare data: real text in, a data folder for training out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_xielu.data.corpus import (
    Document,
    Source,
    builtin_corpus,
    builtin_versions,
)
from megatron_xielu.data.encode import encode
from megatron_xielu.data.files import check_inputs, read_texts
from megatron_xielu.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER_FOLDER,
    DatasetInfo,
    check_dataset,
    load_info,
    save_info,
    sha256_of,
)
from megatron_xielu.data.split import survey
from megatron_xielu.data.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    check_vocab_size,
    load_tokenizer,
    train_tokenizer,
)
from megatron_xielu.errors import UserError
from megatron_xielu.folders import leftovers, new_folder

__all__ = ["DatasetInfo", "check_dataset", "load_info", "prepare"]

_MAX_SOURCES_SHOWN = 10
_SECONDS_BETWEEN_LINES = 10
_TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)

Progress = Callable[[str], None]
Parts = Callable[[str], Iterator[tuple[str, str]]]
"""(split, text) pairs from the beginning; the argument says in a progress line what for."""


def prepare(
    out_dir: Path,
    *,
    inputs: Sequence[Path] = (),
    vocab_size: int = 4096,
    tokenizer: Path | None = None,
    valid_fraction: float = 0.05,
    seed: int = 42,
    text_key: str = "text",
    force: bool = False,
    progress: Progress = print,
) -> DatasetInfo:
    """Write a data folder: train and valid tokens, tokenizer and manifest.

    Which text is held out depends on the texts and the seed, not on their order, so copies of a
    document are never on both sides. Every document ends with the tokenizer's end of text.

    Args:
        out_dir: the data folder. It appears complete or not at all. A complete one made from the
            same text with the same settings is left as it is and returned.
        inputs: .txt, .jsonl or .jsonl.gz files; none means the built-in English corpus.
        vocab_size: ids of the byte-level BPE tokenizer that is trained on the train text.
        tokenizer: a Hugging Face tokenizer folder to use instead.
        valid_fraction: share of the characters to hold out.
        seed: chooses which text is held out.
        text_key: where the text is in a line of .jsonl.
        force: replace a data folder that was made otherwise or is damaged.
        progress: gets short lines for people.

    Raises:
        UserError: an input or a setting is wrong, `out_dir` holds something else, or it cannot be
            written.
    """
    begin = time.monotonic()
    request = _request(inputs, vocab_size, tokenizer, valid_fraction, seed, text_key)
    existing = _existing(out_dir, request, force)
    if existing:
        progress(f"{out_dir} already holds this dataset; nothing to do")
        return existing
    for path in leftovers(out_dir):
        progress(f"note: {path} is from an interrupted run; delete it unless one is still at work")
    documents = _documents(inputs, text_key, progress)
    held_out, sources = survey(documents(), valid_fraction, seed)
    _report_sources(sources, progress)

    def parts(purpose: str) -> Iterator[tuple[str, str]]:
        characters = sum(source.characters for source in sources)
        for document in _told(documents(), characters, purpose, progress):
            yield from held_out.parts(document.text)

    try:
        with new_folder(out_dir) as folder:
            encoder = _tokenizer(folder / TOKENIZER_FOLDER, parts, vocab_size, tokenizer)
            progress(f"tokenizer  {encoder.vocab_size:,} ids")
            encoded = encode(parts("encoding"), folder, encoder)
            info = DatasetInfo(
                path=folder,
                vocab_size=encoder.vocab_size,
                eod_id=encoder.eod_id,
                tokenizer_sha256=sha256_of(folder / TOKENIZER_FOLDER / TOKENIZER_FILE),
                sources=sources,
                request=request,
                **vars(encoded),
            )
            save_info(info, folder)
    except OSError as error:
        raise UserError(
            f"cannot write {out_dir}: {error.strerror or error}. Nothing was changed there."
        ) from error
    _report_tokens(info, progress)
    progress(f"saved      {out_dir} in {time.monotonic() - begin:.0f} s")
    return load_info(out_dir)


def _request(
    inputs: Sequence[Path],
    vocab_size: int,
    tokenizer: Path | None,
    valid_fraction: float,
    seed: int,
    text_key: str,
) -> dict[str, Any]:
    """All that decides the bytes of a data folder, checked; no paths, so that inputs can move."""
    if not 0 < valid_fraction < 1:
        raise UserError(f"valid_fraction {valid_fraction} is not between 0 and 1; 0.05 is usual.")
    if tokenizer is None:
        check_vocab_size(vocab_size)
    else:
        load_tokenizer(tokenizer)
    check_inputs(inputs)
    return {
        "inputs": [sha256_of(path) for path in inputs] or builtin_versions(),
        "text_key": text_key if inputs else None,
        "vocab_size": vocab_size if tokenizer is None else None,
        "tokenizer": None if tokenizer is None else sha256_of(tokenizer / TOKENIZER_FILE),
        "valid_fraction": valid_fraction,
        "seed": seed,
    }


def _existing(out_dir: Path, request: dict[str, Any], force: bool) -> DatasetInfo | None:
    """The dataset that `out_dir` already holds, or None if it is to be written."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    if not (out_dir / MANIFEST).is_file():
        raise UserError(
            f"{out_dir} exists and is not a data folder (no {MANIFEST}). Choose another name."
        )
    if force:
        return None
    made = load_info(out_dir).request
    different = [key for key in request if made.get(key) != request[key]]
    if different:
        raise UserError(
            f"{out_dir} holds a dataset made with other {', '.join(different)}. "
            "Choose another folder, or replace it with --force."
        )
    try:
        return check_dataset(out_dir, vocab_size=None)
    except UserError as error:
        raise UserError(f"{error} --force replaces {out_dir}.") from error


def _documents(
    inputs: Sequence[Path], text_key: str, progress: Progress
) -> Callable[[], Iterator[Document]]:
    """Reads the text from its beginning: once each for the split, the tokenizer and the ids."""
    if inputs:
        return lambda: read_texts(inputs, text_key=text_key)
    progress("reading    the English text inside Python and its packages (15 s or more)")
    corpus = builtin_corpus()
    return lambda: iter(corpus)


def _told(
    documents: Iterable[Document], characters: int, purpose: str, progress: Progress
) -> Iterator[Document]:
    """The documents; where they take long, with a line now and then about how far they are."""
    done, last = 0, time.monotonic()
    for document in documents:
        yield document
        done += len(document.text)
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            progress(f"{purpose:10} {done / characters:.0%} of {characters / 1e6:,.0f} MB")


def _tokenizer(target: Path, parts: Parts, vocab_size: int, existing: Path | None) -> Tokenizer:
    """Put a tokenizer into the data folder: a copy of an existing one, or a new one."""
    if existing is None:
        # train text only: a tokenizer must not have seen what is held out
        train = (text for split, text in parts("learning") if split == "train")
        return train_tokenizer(train, vocab_size, target)
    target.mkdir()
    for name in _TOKENIZER_FILES:
        if (existing / name).is_file():
            shutil.copyfile(existing / name, target / name)
    return load_tokenizer(target)


def _report_sources(sources: Sequence[Source], progress: Progress) -> None:
    for source in sources[:_MAX_SOURCES_SHOWN]:
        progress(f"text       {source.characters / 1e6:.2f} MB  {source.name} ({source.licence})")
    rest = sources[_MAX_SOURCES_SHOWN:]
    if rest:
        characters = sum(source.characters for source in rest)
        progress(f"text       {characters / 1e6:.2f} MB  in {len(rest)} more files")


def _report_tokens(info: DatasetInfo, progress: Progress) -> None:
    for split in SPLITS:
        part = getattr(info, split)
        progress(f"{split:10} {part.documents:,} documents, {part.tokens:,} tokens")
    progress(
        f"valid      {info.bytes_per_token:.2f} bytes per token; "
        f"{info.unigram_entropy_nats:.3f} nats per token from token frequencies alone"
    )
