"""llama.cpp makes the same ids of a text as transformers, for every kind of tokenizer we write."""

from __future__ import annotations

import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from megatron_xielu.checkpoint.to_gguf import convert_to_gguf
from tests.clients.conftest import APERTUS, Export
from tests.clients.environments import answer

pytestmark = pytest.mark.clients

TEXTS = [
    "",
    "Hello world",
    " two  spaces,\n\n\ttabs and a trailing one ",
    "don't I'LL we've 12345 3.14 x=[1,2]; // a/b\r\n",
    "naïve föx, Straße, 日本語, привет, 🙂🙂, e\u0301",
    "CamelCase HTTPServer snake_case __init__",
    "       if x:\n           return\n",
]
SPECIAL = ["one<eos>two", "<eos>", " <eos>\n<eos> x"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A byte-level BPE of 384 ids for each pre-tokenizer, by llama.cpp's name of it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from megatron_xielu.checkpoint.gguf_tokenizer import PRE_TOKENIZERS

    folders = {}
    for pattern, (name, ignore_merges) in PRE_TOKENIZERS.items():
        backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
        if pattern is not None:
            split = pre_tokenizers.Split(Regex(pattern), "isolated")
            splitter = pre_tokenizers.Sequence([split, splitter])
        backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=["<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator([*topics.values()][:30] + TEXTS, trainer)
        folders[name] = tmp_path_factory.mktemp(name)
        PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<eos>", bos_token="<eos>"
        ).save_pretrained(folders[name])
    return folders


def ids_of(
    exports: dict[str, Export], tokenizer: Path, texts: list[str], tmp_path: Path
) -> tuple[str | None, list[list[int]], list[list[int]]]:
    """What the file says the tokenizer is, llama.cpp's ids of the texts and transformers'."""
    from transformers import AutoTokenizer

    folder = tmp_path / "hf"
    shutil.copytree(exports[APERTUS].folder, folder, ignore=shutil.ignore_patterns("token*"))
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    done = convert_to_gguf(folder, tmp_path / "model.gguf", progress=lambda line: None)
    found = answer("llama-cpp", {"file": str(done.path), "texts": texts}, tmp_path)["ids"]
    loaded = AutoTokenizer.from_pretrained(folder)
    return done.tokenizer, found, [loaded(text).input_ids for text in texts]


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "tekken"])
def test_byte_level_bpe(
    exports: dict[str, Export], byte_level: dict[str, Path], name: str, tmp_path: Path
) -> None:
    kind, found, theirs = ids_of(exports, byte_level[name], TEXTS + SPECIAL, tmp_path)
    assert kind == f"gpt2/{name}"
    assert found == theirs


def test_the_three_byte_level_pre_tokenizers_differ(byte_level: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    loaded = [AutoTokenizer.from_pretrained(folder) for folder in byte_level.values()]
    pieces = [
        [str(each.backend_tokenizer.pre_tokenizer.pre_tokenize_str(t)) for t in TEXTS]
        for each in loaded
    ]
    assert len({str(each) for each in pieces}) == 3


def test_sentencepiece_bpe(exports: dict[str, Export], tokenizer: Path, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    kind, found, theirs = ids_of(exports, tokenizer, TEXTS, tmp_path)
    assert kind == "llama/default"
    model = SentencePieceProcessor(str(tokenizer / "tokenizer.model"))
    assert found == [[model.bos_id(), *model.encode(text)] for text in TEXTS]
    # transformers 5 leaves out the space that SentencePiece puts before a text, if it has one
    spaced = [text.startswith(" ") for text in TEXTS]
    assert [one != other for one, other in zip(found, theirs, strict=True)] == spaced
