"""Hold text out by the hash of the text itself: any order of the input gives the same split."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from megatron_xielu.data.corpus import Document, Source
from megatron_xielu.data.manifest import SPLITS
from megatron_xielu.errors import UserError

CHUNK_CHARACTERS = 16_384
"""Longer documents are cut, so that one book does not fall on one side as a whole."""


@dataclass(frozen=True)
class HeldOut:
    """Which chunks of text are held out: those whose keyed hash is at most `cutoff`."""

    seed: int
    cutoff: int

    def parts(self, text: str) -> Iterator[tuple[str, str]]:
        """(split, text) of the runs of neighbouring chunks that fall on the same side."""
        sides = groupby(_chunks(text), key=lambda chunk: _hash(chunk, self.seed) <= self.cutoff)
        for is_held_out, run in sides:
            yield SPLITS[is_held_out], "".join(run)


def survey(
    documents: Iterable[Document], valid_fraction: float, seed: int
) -> tuple[HeldOut, tuple[Source, ...]]:
    """Choose what to hold out, and measure the sources.

    At least one distinct chunk goes to each side. The share of characters held out is
    `valid_fraction` or the least above it that whole chunks allow.

    Raises:
        UserError: there are not two distinct chunks.
    """
    hashes, sizes = array("Q"), array("Q")
    sources: Counter[tuple[str, str]] = Counter()
    for document in documents:
        sources[document.source, document.licence] += len(document.text)
        for chunk in _chunks(document.text):
            hashes.append(_hash(chunk, seed))
            sizes.append(len(chunk))
    distinct, inverse = np.unique(np.array(hashes), return_inverse=True)
    if distinct.size < 2:
        raise UserError(
            "the input is one short document, or copies of one: some text must be held out and "
            f"some left. Add documents, or one longer than {CHUNK_CHARACTERS:,} characters."
        )
    held_out = np.cumsum(np.bincount(inverse, weights=np.array(sizes)))
    enough = int(np.searchsorted(held_out, valid_fraction * held_out[-1]))
    cutoff = distinct[min(enough, distinct.size - 2)]
    return HeldOut(seed, int(cutoff)), tuple(
        Source(name, licence, characters) for (name, licence), characters in sources.items()
    )


def _chunks(text: str) -> Iterator[str]:
    """Cut a long text after a paragraph, a line or a word; joined, the chunks are `text`."""
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        end = start + CHUNK_CHARACTERS
        for separator in ("\n\n", "\n", " "):
            cut = text.rfind(separator, start, end)
            if cut > start:
                end = cut + len(separator)
                break
        yield text[start:end]
        start = end
    yield text[start:]


def _hash(text: str, seed: int) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "little")
