"""Text to token files, and the statistics of what went in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_xielu.data.manifest import SPLITS, Split, sha256_of
from megatron_xielu.data.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 21


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The token files of a data folder; see `DatasetInfo` for the last two."""

    train: Split
    valid: Split
    unigram_entropy_nats: float
    bytes_per_token: float


def encode(parts: Iterable[tuple[str, str]], folder: Path, tokenizer: Tokenizer) -> Encoded:
    """Write (split, text) pairs to `folder`, each as one document that ends with `eod_id`.

    Raises:
        OSError: a file cannot be written.
    """
    # here, because Megatron takes seconds to import and no other step needs it
    from megatron_xielu.mcore.indexed_dataset import DatasetWriter, bin_path

    counts = {split: np.zeros(tokenizer.vocab_size, dtype=np.int64) for split in SPLITS}
    num_bytes = dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(DatasetWriter(folder / split, tokenizer.vocab_size))
            for split in SPLITS
        }
        for batch in _batches(parts):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (split, text), ids in zip(batch, encoded, strict=True):
                tokens = np.array([*ids, tokenizer.eod_id])
                writers[split].add(tokens)
                np.add.at(counts[split], tokens, 1)
                num_bytes[split] += len(text.encode())
    train, valid = (
        Split(
            documents=writers[split].documents,
            tokens=writers[split].tokens,
            sha256=sha256_of(bin_path(folder / split)),
        )
        for split in SPLITS
    )
    return Encoded(
        train=train,
        valid=valid,
        unigram_entropy_nats=_cross_entropy(counts["train"], counts["valid"]),
        bytes_per_token=num_bytes["valid"] / valid.tokens,
    )


def _batches(parts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Enough text at a time to keep all cores busy, little enough to keep memory low."""
    batch: list[tuple[str, str]] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part[1])
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _cross_entropy(train: npt.NDArray[np.int64], valid: npt.NDArray[np.int64]) -> float:
    """Nats per valid token under the train frequencies; counts of shape (vocab_size,).

    One is added to each train count, so that an id that occurs in valid alone costs a finite sum.
    """
    log_probability = np.log(train + 1) - np.log(train.sum() + train.size)
    return float(-(valid * log_probability).sum() / valid.sum())
