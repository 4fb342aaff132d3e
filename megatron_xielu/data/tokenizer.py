"""Byte-level BPE: train one, or use any Hugging Face tokenizer folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xielu.errors import UserError
from megatron_xielu.folders import new_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_NUM_BYTES = 256


class Tokenizer:
    """Text to ids and back; ids are below `vocab_size` and `eod_id` ends a document."""

    def __init__(self, backend: Backend, eod_id: int) -> None:
        # a tokenizer may come with the truncation and padding of the model it was made for
        backend.no_truncation()
        backend.no_padding()
        # "<|endoftext|>" inside a document is text, not the end of that document
        backend.encode_special_tokens = True
        self._backend = backend
        self.eod_id = eod_id
        # ids may have holes, so the size is what holds the largest one
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with no special token added; uses all cores."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""
        return self._backend.decode(ids, skip_special_tokens=False)


def check_vocab_size(vocab_size: int) -> None:
    """Raises UserError if a byte-level tokenizer cannot be so small."""
    if vocab_size <= _NUM_BYTES:
        raise UserError(
            f"vocab_size {vocab_size} is too small: byte-level BPE needs {_NUM_BYTES} ids for the "
            f"bytes and one for {END_OF_TEXT}. Use {_NUM_BYTES + 1} or more, such as 4096."
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_dir: Path) -> Tokenizer:
    """Train byte-level BPE and write it as a Hugging Face tokenizer folder.

    Every text can be encoded and decoded without loss. `<|endoftext|>` has id 0 and is both
    beginning and end of text; there is no padding token. The same texts in the same order give the
    same bytes. Fewer than `vocab_size` ids come out where the texts have no more pairs to merge.

    Raises:
        UserError: `vocab_size` cannot hold the 256 bytes and the special token.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    check_vocab_size(vocab_size)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    config = {
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        # the name that transformers 4 and 5 both know
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    with new_folder(out_dir) as folder:
        # the library's own save turns a full disk into an anonymous exception
        (folder / TOKENIZER_FILE).write_text(backend.to_str(pretty=True) + "\n", encoding="utf-8")
        (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return load_tokenizer(out_dir)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a Hugging Face tokenizer folder; its `eos_token` ends documents.

    Raises:
        UserError: the folder or a file is missing or broken, or names no known `eos_token`.
    """
    from tokenizers import Tokenizer as Backend

    if not folder.is_dir():
        raise UserError(f"no tokenizer folder at {folder}.")
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} has no {TOKENIZER_FILE}. Make one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(new_folder)."
        )
    try:
        backend = Backend.from_file(str(path))
    # the library raises plain Exception
    except Exception as error:
        raise UserError(f"{path} is not a tokenizer: {error}.") from error
    eos_token = _eos_token(folder / _CONFIG_FILE)
    eod_id = backend.token_to_id(eos_token)
    if eod_id is None:
        raise UserError(f"{path} has no token {eos_token!r}, which {_CONFIG_FILE} calls eos_token.")
    return Tokenizer(backend, eod_id)


def _eos_token(path: Path) -> str:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        token = config["eos_token"]
        # older folders hold the token's properties beside its text
        text = token["content"] if isinstance(token, dict) else token
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; it names the token that ends a document.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not JSON with an eos_token ({error!r}).") from error
    if not isinstance(text, str):
        raise UserError(f"{path}: eos_token is {text!r}; a token that ends a document is needed.")
    return text
