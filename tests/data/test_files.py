"""The user's files: what is read, and what every wrong file says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_xielu.data.files import read_texts
from megatron_xielu.errors import UserError


def test_kinds_of_files(tmp_path: Path) -> None:
    txt, jsonl, packed = (tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl.gz"))
    txt.write_bytes("\ufeffone\r\n\r\nzwei ß".encode())
    jsonl.write_text('{"body": "drei\\r\\n"}\n\n{"body": ""}\n{"body": " \\n"}\n{"body": "四"}')
    packed.write_bytes(gzip.compress(json.dumps({"body": "fünf\n"}).encode()))
    documents = list(read_texts([packed, txt, jsonl], text_key="body"))
    assert [d.text for d in documents] == ["fünf\n", "one\n\nzwei ß", "drei\r\n", "四"]
    assert [d.source for d in documents] == ["c.jsonl.gz", "a.txt", "b.jsonl", "b.jsonl"]
    assert {d.licence for d in documents} == {"not stated"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl, line 2: not JSON \(.* column"),
        ("x.jsonl", b"\n[1, 2]\n", r"line 2: expected a JSON object, found a list"),
        (
            "x.jsonl",
            b'{"url": "a", "body": "b"}',
            r"no key 'text' \(keys: 'url', 'body'\); .*--text-",
        ),
        ("x.jsonl", b'{"text": ["a"]}', r"line 1: 'text' is a list, expected a string"),
        (
            "x.jsonl",
            b'{"text": "ab\\ud83d"}',
            r"line 1: character 2 of 'text' is half of a surrogate",
        ),
        (
            "x.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}',
            r"line 2: not UTF-8 \(byte 0xe9 at offset 10",
        ),
        ("x.jsonl", b"[" * 100_000, r"line 1: JSON nested too deeply"),
        (
            "x.txt",
            "caf\xe9".encode("latin-1"),
            r"x\.txt: not UTF-8 \(byte 0xe9 at offset 3\).*iconv",
        ),
        ("x.txt", b" \n", r"no text found in .*x\.txt"),
        ("x.jsonl", b"", r"no text found in .*x\.jsonl"),
        ("x.jsonl.gz", b'{"text": "a"}', r"not a complete gzip file"),
        (
            "x.jsonl.gz",
            gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-9],
            r"not a complete gzip file",
        ),
        ("x.parquet", b"PAR1", r"x\.parquet is not a text file by its name \(known: \.txt, "),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_texts([path]))
    print(caught.value)


def test_all_names_are_checked_before_reading(tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_text("text")
    for bad, message in (
        (tmp_path / "missing.txt", "missing.txt cannot be read: No such file"),
        (tmp_path, "pass the files in it"),
    ):
        with pytest.raises(UserError, match=message):
            next(read_texts([good, bad]))
