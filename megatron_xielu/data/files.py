"""The user's own text files."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_xielu.data.corpus import Document
from megatron_xielu.errors import UserError

TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")


def check_inputs(paths: Sequence[Path]) -> None:
    """Raises UserError unless all are readable files of a known kind."""
    for path in paths:
        if not path.name.endswith(TEXT_SUFFIXES):
            hint = "pass the files in it" if path.is_dir() else f"known: {', '.join(TEXT_SUFFIXES)}"
            raise UserError(f"input {path} is not a text file by its name ({hint}).")
        try:
            path.open("rb").close()
        except OSError as error:
            raise UserError(f"input {path} cannot be read: {error.strerror}.") from error


def read_texts(paths: Sequence[Path], *, text_key: str = "text") -> Iterator[Document]:
    """Documents of the user's files, in the order given; those without any text are left out.

    A .txt file is one document, its Windows line ends turned into "\\n"; a .jsonl or .jsonl.gz file
    holds one JSON object per line with the text under `text_key`.

    Raises:
        UserError: a file is missing, of another kind, not UTF-8 or damaged; a line is not a JSON
            object with `text_key`; or no file holds any text.
    """
    # a wrong last name must not show after hours of reading
    check_inputs(paths)
    empty = True
    for path in paths:
        for text in _read_file(path, text_key):
            if text and not text.isspace():
                empty = False
                yield Document(text, source=path.name, licence="not stated")
    if empty:
        raise UserError(f"no text found in {', '.join(map(str, paths))}.")


def _read_file(path: Path, text_key: str) -> Iterator[str]:
    try:
        if path.suffix == ".txt":
            yield _decode(path.read_bytes(), str(path)).replace("\r\n", "\n")
        else:
            yield from _read_jsonl(path, text_key)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"input {path} is not a complete gzip file ({error}).") from error
    except OSError as error:
        raise UserError(f"input {path} cannot be read: {error.strerror}.") from error


def _read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_line(line, f"{path}, line {number}", text_key)


def _parse_line(line: bytes, where: str, text_key: str) -> str:
    try:
        record = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply.") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found a {type(record).__name__}.")
    if text_key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{where}: no key {text_key!r} (keys: {keys}); choose one with --text-key.")
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(f"{where}: {text_key!r} is a {type(text).__name__}, expected a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of {text_key!r} is half of a surrogate pair, "
            "which UTF-8 cannot hold."
        ) from error
    return text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}). "
            "Convert the file first, for example with iconv."
        ) from error
