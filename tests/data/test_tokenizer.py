"""Byte-level BPE: lossless, the same bytes in every process, loadable by transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_xielu.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from megatron_xielu.errors import UserError

TRAIN = """
import sys
from pathlib import Path
from megatron_xielu.data.files import read_texts
from megatron_xielu.data.tokenizer import train_tokenizer
texts = (document.text for document in read_texts([Path(sys.argv[1])]))
train_tokenizer(texts, 600, Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(texts, 600, path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_round_trip(folder: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(folder)
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(0 <= i < tokenizer.vocab_size for ids in encoded for i in ids)
    assert all(tokenizer.eod_id not in ids for ids in encoded)
    assert tokenizer.encode_batch([""]) == [[]]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (600, 0)
    assert tokenizer.decode([tokenizer.eod_id]) == END_OF_TEXT


def test_any_bytes_that_training_never_saw(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["aaaa"], 300, tmp_path / "bpe")
    texts = ["Ξι 日本語 👩🏽‍🚀", "".join(map(chr, range(1, 0x3000)))]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    # "aaaa" has no more pairs: 256 bytes, the special token, "aa" and "aaaa" at most
    assert 257 <= tokenizer.vocab_size <= 259


def test_the_same_bytes_in_another_process(folder: Path, text_file: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    again = tmp_path / "again"
    command = [sys.executable, "-c", TRAIN, str(text_file), str(again)]
    subprocess.run(command, env=environment, check=True)
    assert contents(again) == contents(folder)


def test_transformers_loads_it(folder: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert (loaded.eos_token, loaded.bos_token, loaded.pad_token) == (
        END_OF_TEXT,
        END_OF_TEXT,
        None,
    )
    assert len(loaded) == 600
    assert loaded.eos_token_id == 0
    theirs = loaded(texts, add_special_tokens=True, split_special_tokens=True)["input_ids"]
    assert theirs == load_tokenizer(folder).encode_batch(texts)
    assert loaded.decode(theirs[0]) == texts[0]


def test_a_tokenizer_of_another_model(folder: Path, tmp_path: Path) -> None:
    """Truncation, padding, added beginning of text, holes and old-style eos must do no harm."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 599)])
    backend.add_special_tokens(["</s>"])
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    text = "one two three four five six seven eight nine ten"
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_batch([text]) == load_tokenizer(folder).encode_batch([text])
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (600, 601)


def test_too_small_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_size 256 is too small.*257 or more"):
        train_tokenizer(["text"], 256, tmp_path / "bpe")
    assert not (tmp_path / "bpe").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, r"has no tokenizer\.json.*save_pretrained"),
        ("tokenizer.json", '{"version": "1.0"}', r"tokenizer\.json is not a tokenizer"),
        ("tokenizer_config.json", None, r"tokenizer_config\.json is missing"),
        ("tokenizer_config.json", "{", r"is not JSON with an eos_token"),
        ("tokenizer_config.json", "{}", r"is not JSON with an eos_token \(KeyError"),
        ("tokenizer_config.json", '{"eos_token": null}', r"eos_token is None"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', r"has no token '</s>'"),
    ],
)
def test_broken_folders(
    folder: Path, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    if content is None:
        (broken / name).unlink()
    else:
        (broken / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(broken)
    print(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer folder at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
