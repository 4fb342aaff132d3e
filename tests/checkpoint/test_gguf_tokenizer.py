"""A tokenizer that llama.cpp would run otherwise is refused, with what is wrong about it.

That it gives the same ids to those that are written is tested in tests/clients.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_xielu.errors import UserError

pytest.importorskip("gguf")
from megatron_xielu.checkpoint.gguf_tokenizer import read_tokenizer


@pytest.fixture
def folder(tokenizer: Path, tmp_path: Path) -> Path:
    """A copy of a byte-level BPE of 320 ids with GPT-2's pre-tokenizer, to be changed."""
    return Path(shutil.copytree(tokenizer, tmp_path / "tokenizer"))


def edit(folder: Path, part: str, **changes: Any) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    if part == "model":
        content["model"] |= changes
    else:
        content[part] = changes or None
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_byte_level_bpe(folder: Path) -> None:
    found = read_tokenizer(folder, 322)
    assert (found.model, found.pre, found.add_bos, found.add_eos) == ("gpt2", "gpt-2", False, False)
    assert found.tokens[0] == b"<eos>"
    assert found.types == [3] + [1] * 319 + [5] * 2
    assert found.tokens[320:] == [b"[PAD320]", b"[PAD321]"]
    assert found.special == {"eos": 0}
    assert found.merges
    assert len(found.merges) == 320 - 256 - 1


def test_too_many_ids(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has ids up to 319, the model's vocab_size is 319: this"):
        read_tokenizer(folder, 319)


@pytest.mark.parametrize(
    ("part", "changes", "match"),
    [
        ("normalizer", {"type": "NFC"}, r"normalizes text \(NFC\)"),
        ("pre_tokenizer", {"type": "Whitespace"}, r'\{"type": "Whitespace"\} is none that llama'),
        ("pre_tokenizer", {}, r"the pre-tokenizer \{\} is none that"),
        (
            "pre_tokenizer",
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
            r"written are gpt-2, llama-bpe, tekken",
        ),
        ("model", {"ignore_merges": True}, r"ignore_merges must be false, as llama.cpp merges"),
        ("model", {"byte_fallback": True}, r"is a BPE model with byte_fallback; byte-level BPE"),
        ("model", {"type": "BPE", "vocab": None}, r"the tokenizer of .* cannot be loaded"),
    ],
)
def test_other_pipelines(folder: Path, part: str, changes: dict[str, Any], match: str) -> None:
    edit(folder, part, **changes)
    with pytest.raises(UserError, match=match):
        read_tokenizer(folder, 320)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither tokenizer.model nor tokenizer.json"):
        read_tokenizer(tmp_path, 320)


def sentencepiece_model(**options: Any) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    # few letters, so that a small vocabulary has room for pairs
    lines = ["the cat sat on the mat", "a nest in the test", "tea at ten", "meet the host"]
    settings = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **settings | options
    )
    return model.getvalue()


def test_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    found = read_tokenizer(folder, 330)
    assert (found.model, found.pre, found.add_space_prefix) == ("llama", "default", True)
    # unknown, begin, end, 256 bytes, then pieces
    assert found.types[:4] == [2, 3, 3, 6]
    assert found.types[259:] == [1] * (300 - 259) + [5] * 30
    assert found.tokens[3] == b"<0x00>"
    assert found.scores
    assert found.scores[259:300] == [-float(i) for i in range(41)]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"model_type": "unigram", "vocab_size": 275},
            r"model_type is UNIGRAM, and llama.cpp merges as BPE does",
        ),
        ({"normalization_rule_name": "nmt_nfkc"}, r"normalized \(nmt_nfkc\)"),
        ({"remove_extra_whitespaces": True}, r"extra spaces are removed"),
        ({"byte_fallback": False, "vocab_size": 40}, r"it has no bytes, without which llama.cpp"),
    ],
)
def test_other_sentencepiece_models(folder: Path, options: dict[str, Any], match: str) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    with pytest.raises(UserError, match=match):
        read_tokenizer(folder, 320)


def test_a_broken_sentencepiece_model(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"tokenizer.model is no SentencePiece model"):
        read_tokenizer(folder, 320)
