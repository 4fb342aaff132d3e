"""A built-in corpus of real English text that needs no download."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_xielu.errors import UserError

# torch requires networkx and sympy, megatron-core requires numpy: every environment that can train
# has all four. Optional packages would make the corpus depend on the extras that were installed.
_PACKAGES = ("numpy", "networkx", "sympy", "torch")

# tests hold little prose; the other folders carry foreign licences or are packaged separately by
# Linux distributions, so that the same Python version would give different text
# fmt: off
_SKIPPED_FOLDERS = frozenset((
    "test", "tests", "testing", "_testing", "_internal", "_vendor", "vendor", "third_party",
    "site-packages", "dist-packages", "__pycache__", "pydoc_data",
    "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "distutils",
))
_STOP_WORDS = frozenset((
    "a", "an", "and", "are", "as", "be", "by", "for", "from", "if", "in", "is", "it", "not",
    "of", "on", "or", "that", "the", "this", "to", "with",
))
# fmt: on
_MIN_WORDS = 8
_MIN_LETTER_WORDS = 0.8
_MIN_CHARACTERS = 200
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it comes from."""

    text: str
    source: str
    licence: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where part of a dataset comes from, as its manifest records it."""

    name: str
    licence: str
    characters: int


def builtin_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that `builtin_corpus` reads.

    Equal versions give an equal corpus.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        if _package_root(package) is not None:
            versions[package] = importlib.metadata.version(package)
    return versions


def builtin_corpus() -> list[Document]:
    """English prose of about 6 MB that every environment able to train already holds.

    The language reference inside CPython (`pydoc_data.topics`) and the docstrings of the standard
    library, NumPy, NetworkX, SymPy and PyTorch: one document per topic or module, in a fixed order.
    Sources are parsed, never imported. Only paragraphs of English prose are kept, each once.

    Raises:
        UserError: this Python comes without its sources.
    """
    versions = builtin_versions()
    python, stdlib = f"python {versions.pop('python')}", Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    documents = [
        *_documents(_topics(stdlib), seen, f"{python} language reference", "PSF-2.0"),
        *_documents(_modules(stdlib), seen, f"{python} docstrings", "PSF-2.0"),
    ]
    for package, version in versions.items():
        root = _package_root(package)
        assert root is not None
        name = f"{package} {version} docstrings"
        documents += _documents(_modules(root), seen, name, "BSD-3-Clause")
    if not documents:
        raise UserError(
            f"no text found: the standard library in {stdlib} has no .py files, so there is no "
            "built-in corpus. Pass files of your own."
        )
    return documents


def _package_root(package: str) -> Path | None:
    """Folder of an installed top-level package; finding it does not import it."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) if folders else None


def _documents(
    texts: Iterable[Iterable[str]], seen: set[str], source: str, licence: str
) -> Iterator[Document]:
    """One document per group of texts: its prose paragraphs that are not in `seen`, which grows."""
    for group in texts:
        kept = []
        for paragraph in (p for text in group for p in _paragraphs(text) if is_prose(p)):
            key = paragraph.casefold()
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        document = "\n\n".join(kept)
        if len(document) >= _MIN_CHARACTERS:
            yield Document(document, source, licence)


def _topics(stdlib: Path) -> Iterator[list[str]]:
    """Topics of the language reference that CPython ships for `help()`."""
    path = stdlib / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Dict):
            yield from ([text] for _, text in sorted(ast.literal_eval(node).items()))


def _modules(root: Path) -> Iterator[Iterator[str]]:
    """Docstrings of each module below `root`, modules sorted by path."""
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    for path in paths:
        if _SKIPPED_FOLDERS.isdisjoint(path.parts[:-1]):
            tree = _parse(root / path)
            if tree is not None:
                yield _docstrings(tree)


def _parse(path: Path) -> ast.Module | None:
    source = path.read_bytes()
    # parsing takes nearly all the time, and a file without triple quotes has no prose
    if b'"""' not in source and b"'''" not in source:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except SyntaxError:
            # written for another Python version; template files exist as well
            return None


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings in and below `node` in source order."""
    if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
        yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from _docstrings(child)


def _paragraphs(text: str) -> Iterator[str]:
    """Runs of lines with the same indentation, each joined into one line.

    A change of indentation ends a paragraph too: it separates the sentences that describe a
    parameter from the line that names it.
    """
    lines: list[str] = []
    indent = 0
    for line in [*text.splitlines(), ""]:
        stripped = line.strip()
        if lines and (not stripped or len(line) - len(line.lstrip()) != indent):
            yield " ".join(" ".join(lines).split())
            lines = []
        if stripped:
            lines.append(stripped)
            indent = len(line) - len(line.lstrip())


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is English sentences rather than code, tables or lists of names.

    Rules of thumb from the filters of C4 (arXiv 1910.10683, section 2.2: sentences end in
    punctuation) and Gopher (arXiv 2112.11446, appendix A1.1: most words are made of letters, at
    least two common English words occur), set tighter because docstrings hold much code.
    """
    if not paragraph[0].isupper() or paragraph[-1] not in ".!?:":
        return False
    if any(mark in paragraph for mark in (">>>", "---", "===")):
        return False
    words = paragraph.split()
    letter_words = sum(
        word.strip("\"'`*(),.;:!?[]").replace("-", "").replace("'", "").isalpha() for word in words
    )
    return (
        len(words) >= _MIN_WORDS
        and letter_words >= _MIN_LETTER_WORDS * len(words)
        and sum(word.lower() in _STOP_WORDS for word in words) >= 2
    )
