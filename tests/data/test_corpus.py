"""The built-in corpus: English prose, each paragraph once, the same text in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_xielu.data import corpus
from megatron_xielu.errors import UserError

READ = """
import json, sys
from megatron_xielu.data import corpus
corpus._PACKAGES = ("networkx",)
before = set(sys.modules)
texts = [document.text for document in corpus.builtin_corpus()]
json.dump({"texts": texts, "imported": sorted(set(sys.modules) - before)}, sys.stdout)
"""


@pytest.fixture(scope="module")
def documents() -> list[corpus.Document]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_PACKAGES", ("networkx",))
        return corpus.builtin_corpus()


def test_paragraphs_are_english_prose(documents: list[corpus.Document]) -> None:
    for document in documents:
        assert len(document.text) >= 200
        assert all(map(corpus.is_prose, document.text.split("\n\n"))), document.text
    words = Counter(word.lower() for d in documents for word in d.text.split())
    common = [word for word, _ in words.most_common(8)]
    print("most common words:", common)
    assert {"the", "a", "of", "is", "to"} <= set(common)


def test_no_paragraph_comes_twice(documents: list[corpus.Document]) -> None:
    paragraphs = Counter(p.casefold() for d in documents for p in d.text.split("\n\n"))
    assert max(paragraphs.values()) == 1


def test_known_sentences_and_sources(documents: list[corpus.Document]) -> None:
    everything = "\n\n".join(document.text for document in documents)
    # the topic "assert", a docstring of the standard library and one of a package
    assert "Assert statements are a convenient way to insert debugging assertions" in everything
    assert "Turtle graphics is a popular way for introducing programming to kids." in everything
    assert "Returns the number of nodes in the graph" in everything
    licences = {d.source.split()[0]: d.licence for d in documents}
    assert licences == {"python": "PSF-2.0", "networkx": "BSD-3-Clause"}


def test_the_same_in_another_process_and_nothing_is_imported(
    documents: list[corpus.Document],
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", READ],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        check=True,
    )
    other = json.loads(run.stdout)
    assert other["texts"] == [document.text for document in documents]
    packages = {name.split(".")[0] for name in other["imported"]}
    assert packages.isdisjoint({"networkx", "turtle", "antigravity", "this"})


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("Return the number of items that are stored in the queue.", True),
        ("The options are as follows, and each of them is optional:", True),
        ("return the number of items that are stored in the queue.", False),
        ("Return the number of items.", False),
        ("Renvoie le nombre de tous les objets rangés dans cette file.", False),
        (">>> The answer to it is printed by this interpreter session.", False),
        ("X_1 = f(a_1, b_2) + the of g(x_3) - 0.5 * h(x_4, y_4) / 2.", False),
        ("The name of the thing is x_1 and it has no full stop at the end", False),
    ],
)
def test_is_prose(paragraph: str, expected: bool) -> None:
    assert corpus.is_prose(paragraph) is expected


def test_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_PACKAGES", ())
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match=r"no \.py files.*Pass files of your own"):
        corpus.builtin_corpus()


@pytest.mark.slow
def test_whole_corpus_is_large_enough() -> None:
    documents = corpus.builtin_corpus()
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.source] += len(document.text)
    for source, size in sizes.items():
        print(f"{size / 1e6:6.2f} MB  {source}")
    assert [name.split()[0] for name in sizes] == ["python", "python", *corpus._PACKAGES]
    assert 4e6 < sum(sizes.values()) < 10e6
    paragraphs = Counter(p.casefold() for d in documents for p in d.text.split("\n\n"))
    assert max(paragraphs.values()) == 1
