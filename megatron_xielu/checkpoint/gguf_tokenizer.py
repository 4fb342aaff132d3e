"""A Hugging Face folder's tokenizer as llama.cpp keeps it: SentencePiece BPE or byte-level BPE.

llama.cpp knows pre-tokenizers by name and has its own code for each, so a tokenizer that it would
run otherwise than it was trained is refused here, where it would only give other ids there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from megatron_xielu.errors import UserError

SENTENCEPIECE_FILE = "tokenizer.model"
BPE_FILE = "tokenizer.json"

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    None: ("gpt-2", False),
    _LLAMA_3: ("llama-bpe", True),
    _TEKKEN: ("tekken", True),
}
"""llama.cpp's name of a pre-tokenizer by its regular expression, None being GPT-2's, which the
tokenizers library has built in; and whether it takes a whole word that is a token as that token
without merging (ignore_merges), which llama.cpp decides by the name too."""

_Rows = dict[int, tuple[str, TokenType]]


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """The values of a GGUF file's tokenizer keys; the lists have one element per id."""

    model: str
    """llama.cpp's kind of tokenizer: "llama" (SentencePiece BPE) or "gpt2" (byte-level BPE)."""
    pre: str
    tokens: list[bytes]
    types: list[int]
    scores: list[float] | None = None
    """Which pair a SentencePiece model merges first."""
    merges: list[str] | None = None
    """The pairs of byte-level BPE, the first merged first."""
    special: dict[str, int]
    """Ids by role: bos, eos, pad, unk."""
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None = None
    chat_template: str | None = None


def read_tokenizer(hf_dir: Path, vocab_size: int) -> GgufTokenizer:
    """The tokenizer of a folder, filled up with unused tokens to the model's `vocab_size`.

    tokenizer.model is preferred to tokenizer.json, as by llama.cpp's own converter.

    Raises:
        UserError: there is none, it has more ids than the model, or llama.cpp would run it
            otherwise than it was trained.
    """
    from transformers import AutoTokenizer

    if not any((hf_dir / name).is_file() for name in (SENTENCEPIECE_FILE, BPE_FILE)):
        raise UserError(
            f"{hf_dir} holds neither {SENTENCEPIECE_FILE} nor {BPE_FILE}. Put the tokenizer's "
            f"files there, or write none: --no-tokenizer."
        )
    try:
        loaded = AutoTokenizer.from_pretrained(str(hf_dir), local_files_only=True)
    # the tokenizers library raises plain Exception
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the tokenizer of {hf_dir} cannot be loaded: {reason}") from error
    roles = {role: getattr(loaded, f"{role}_token_id") for role in ("bos", "eos", "pad", "unk")}
    ids = loaded("a").input_ids
    common: dict[str, Any] = {
        "special": {role: id_ for role, id_ in roles.items() if id_ is not None},
        "add_bos": ids[:1] == [roles["bos"]],
        "add_eos": ids[-1:] == [roles["eos"]],
        "chat_template": loaded.chat_template,
    }
    added = {
        id_: (token.content, TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
        for id_, token in loaded.added_tokens_decoder.items()
    }
    if (hf_dir / SENTENCEPIECE_FILE).is_file():
        return _sentencepiece(hf_dir / SENTENCEPIECE_FILE, vocab_size, added, common)
    return _byte_level(hf_dir / BPE_FILE, vocab_size, added, common)


def _sentencepiece(
    path: Path, vocab_size: int, added: _Rows, common: dict[str, Any]
) -> GgufTokenizer:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    # generated classes, which type checkers cannot see
    generated: Any = sentencepiece_model_pb2
    proto = generated.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise UserError(f"{path} is no SentencePiece model: {error}.") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    wrong = []
    if trainer.model_type != trainer.BPE:
        kind = trainer.ModelType.Name(trainer.model_type)
        wrong.append(f"model_type is {kind}, and llama.cpp merges as BPE does")
    if not trainer.byte_fallback:
        wrong.append("it has no bytes, without which llama.cpp fails on an unknown character")
    if normalizer.precompiled_charsmap:
        wrong.append(f"the text is normalized ({normalizer.name}), which llama.cpp does not do")
    if normalizer.remove_extra_whitespaces:
        wrong.append("extra spaces are removed, which llama.cpp does not do")
    if wrong:
        raise UserError(
            f"llama.cpp would not do as {path}: {'; '.join(wrong)}. Train with --model_type=bpe "
            f"--byte_fallback=true --normalization_rule_name=identity "
            f"--remove_extra_whitespaces=false, or use --no-tokenizer."
        )
    tokens, types = _rows(
        path,
        vocab_size,
        # the numbers that SentencePiece gives its types are llama.cpp's
        {i: (piece.piece, TokenType(piece.type)) for i, piece in enumerate(proto.pieces)},
        # an id that the model has itself keeps the model's own type
        {id_: row for id_, row in added.items() if id_ >= len(proto.pieces)},
    )
    scores = [piece.score for piece in proto.pieces]
    return GgufTokenizer(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        # below that of any piece
        scores=scores + [-1e6] * (vocab_size - len(scores)),
        add_space_prefix=normalizer.add_dummy_prefix,
        **common,
    )


def _byte_level(path: Path, vocab_size: int, added: _Rows, common: dict[str, Any]) -> GgufTokenizer:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        model = content["model"]
        kind, vocab = model["type"], model["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a tokenizer ({error!r}).") from error
    if kind != "BPE" or model.get("byte_fallback"):
        raise UserError(
            f"{path} is a {kind} model{' with byte_fallback' * bool(model.get('byte_fallback'))}; "
            f"byte-level BPE can be written, or SentencePiece from a {SENTENCEPIECE_FILE}. Or use "
            f"--no-tokenizer."
        )
    pre = _pre_tokenizer(path, content)
    tokens, types = _rows(
        path, vocab_size, {i: (text, TokenType.NORMAL) for text, i in vocab.items()}, added
    )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return GgufTokenizer(model="gpt2", pre=pre, tokens=tokens, types=types, merges=merges, **common)


def _pre_tokenizer(path: Path, content: dict[str, Any]) -> str:
    """llama.cpp's name; raises UserError for a pipeline that it has no name for."""
    advice = "Use --no-tokenizer and give llama.cpp token ids."
    if content.get("normalizer"):
        kind = content["normalizer"]["type"]
        raise UserError(
            f"{path} normalizes text ({kind}), which llama.cpp does not do for byte-level BPE, so "
            f"it would give other ids. {advice}"
        )
    pre = content.get("pre_tokenizer") or {}
    match pre.get("pretokenizers", [pre]):
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            pattern = None
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ] if pattern in PRE_TOKENIZERS:
            pass
        case _:
            names = ", ".join(name for name, _ in PRE_TOKENIZERS.values())
            raise UserError(
                f"{path}: the pre-tokenizer {json.dumps(pre)[:300]} is none that llama.cpp has a "
                f"name for (written are {names}), so it would split text elsewhere and give other "
                f"ids. {advice}"
            )
    name, ignores = PRE_TOKENIZERS[pattern]
    if bool(content["model"].get("ignore_merges")) != ignores:
        raise UserError(
            f"{path}: ignore_merges must be {str(ignores).lower()}, as llama.cpp merges with the "
            f"pre-tokenizer {name}, or it would give other ids. {advice}"
        )
    return name


def _rows(path: Path, vocab_size: int, own: _Rows, added: _Rows) -> tuple[list[bytes], list[int]]:
    """Text and type of every id of the model; what the tokenizer lacks is marked as unused."""
    known = own | added
    if max(known) >= vocab_size:
        raise UserError(
            f"{path} has ids up to {max(known)}, the model's vocab_size is {vocab_size}: this is "
            f"not the model's tokenizer."
        )
    rows = [known.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(vocab_size)]
    return [text.encode() for text, _ in rows], [int(kind) for _, kind in rows]
