"""Real text for the data tests: CPython's language reference, and what real text gets wrong."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from megatron_xielu.data.prepare import DatasetInfo, prepare

_AWKWARD = [
    "Ξι with a Latin word, 日本語, עברית, 👩🏽‍🚀, e\u0301 and \u200b are all text.",
    "A document may talk of <|endoftext|> without ending there.",
    "  leading, double  and trailing spaces\t\r\n\n\n ",
    "\x00 control \x1b characters \ufffd too",
]
_BLANK = ["", " \n\t "]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """79 topics, awkward ones, and one document long enough to be cut."""
    reference = [topics[name] for name in sorted(topics)]
    return [*reference, *_AWKWARD, "\n\n".join(reversed(reference))]


@pytest.fixture(scope="session")
def text_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "reference.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *_BLANK]))
    return path


@pytest.fixture(scope="session")
def dataset(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetInfo:
    """A data folder that tests must not change."""
    folder = tmp_path_factory.mktemp("data") / "reference"
    return prepare(folder, inputs=[text_file], vocab_size=1024, valid_fraction=0.2)
