"""A data folder end to end: what is in it, and what happens when something is wrong with it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_xielu.data.manifest import SPLITS, save_info
from megatron_xielu.data.prepare import DatasetInfo, check_dataset, load_info, prepare
from megatron_xielu.data.split import CHUNK_CHARACTERS
from megatron_xielu.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_xielu.errors import UserError
from megatron_xielu.mcore.indexed_dataset import DatasetWriter, open_dataset, token_id_range
from tests.limits import file_limit


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def documents(info: DatasetInfo, split: str) -> list[list[int]]:
    """As Megatron reads them."""
    dataset = open_dataset(info.prefix(split))
    return [dataset[i].tolist() for i in range(len(dataset))]


def decoded(info: DatasetInfo, split: str) -> list[str]:
    tokenizer = load_tokenizer(info.tokenizer)
    return [tokenizer.decode(ids[:-1]) for ids in documents(info, split)]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def silent(_: str) -> None:
    """No progress lines."""


@pytest.fixture
def copy(dataset: DatasetInfo, tmp_path: Path) -> DatasetInfo:
    """A data folder to damage."""
    shutil.copytree(dataset.path, tmp_path / "copy")
    return load_info(tmp_path / "copy")


def test_every_text_comes_back_once(dataset: DatasetInfo, texts: list[str]) -> None:
    found = Counter(text for split in SPLITS for text in decoded(dataset, split))
    # some topics share a text
    whole = Counter(text for text in texts if len(text) <= CHUNK_CHARACTERS)
    assert any("<|endoftext|>" in text for text in whole)
    assert {text: found[text] for text in whole} == whole
    parts = found - whole
    cut = [text for text in texts if len(text) > CHUNK_CHARACTERS]
    assert all(any(part in text for text in cut) for part in parts)
    assert sum(map(len, parts.elements())) == sum(map(len, cut))


def test_megatron_reads_the_ids_that_transformers_gives(dataset: DatasetInfo) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(dataset.tokenizer), local_files_only=True)
    for split in SPLITS:
        texts, ids = decoded(dataset, split), documents(dataset, split)
        theirs = loaded(texts, split_special_tokens=True)["input_ids"]
        assert ids == [[*tokens, loaded.eos_token_id] for tokens in theirs]
        assert all(document.count(dataset.eod_id) == 1 for document in ids)
        stored = open_dataset(dataset.prefix(split))
        assert stored.index.dtype is np.uint16
        assert stored.document_indices.tolist() == list(range(len(ids) + 1))


def test_manifest_agrees_with_the_files(dataset: DatasetInfo, texts: list[str]) -> None:
    for split in SPLITS:
        part, ids = getattr(dataset, split), documents(dataset, split)
        assert (part.documents, part.tokens) == (len(ids), sum(map(len, ids)))
        assert part.sha256 == digests(dataset.path)[f"{split}.bin"]
    assert dataset.tokenizer_sha256 == digests(dataset.path)["tokenizer/tokenizer.json"]
    assert (dataset.vocab_size, dataset.eod_id) == (1024, 0)
    (source,) = dataset.sources
    assert (source.name, source.licence) == ("reference.jsonl", "not stated")
    assert source.characters == sum(map(len, texts))
    text = (dataset.path / "dataset.json").read_text()
    assert str(dataset.path.parent) not in text
    valid = "".join(decoded(dataset, "valid"))
    assert dataset.bytes_per_token == len(valid.encode()) / dataset.valid.tokens
    assert check_dataset(dataset.path, vocab_size=1024) == dataset


def test_unigram_entropy(dataset: DatasetInfo) -> None:
    train = Counter(i for ids in documents(dataset, "train") for i in ids)
    valid = [i for ids in documents(dataset, "valid") for i in ids]
    total = train.total() + dataset.vocab_size
    expected = math.fsum(-math.log((train[i] + 1) / total) for i in valid) / len(valid)
    print(f"{dataset.unigram_entropy_nats:.4f} nats, {dataset.bytes_per_token:.3f} bytes per token")
    # sums of about 1e5 float64 terms in another order
    assert dataset.unigram_entropy_nats == pytest.approx(expected, rel=1e-11)
    assert 0 < expected < math.log(dataset.vocab_size)


def test_two_runs_write_equal_bytes(dataset: DatasetInfo, text_file: Path, tmp_path: Path) -> None:
    again = prepare(
        tmp_path / "again", inputs=[text_file], vocab_size=1024, valid_fraction=0.2, progress=silent
    )
    assert digests(again.path) == digests(dataset.path)


def test_split_follows_the_text_alone(texts: list[str], tmp_path: Path) -> None:
    """Texts in another order, each twice: the same are held out. Another seed: others are."""

    def split(content: list[str], seed: int) -> dict[str, set[str]]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_jsonl(path := tmp_path / "texts.jsonl", content)
        info = prepare(folder, inputs=[path], vocab_size=300, seed=seed, progress=silent)
        return {split: set(decoded(info, split)) for split in SPLITS}

    once = split(texts, seed=1)
    assert split(texts[::-1] * 2, seed=1) == once
    assert not once["train"] & once["valid"]
    assert split(texts, seed=2)["valid"] != once["valid"]


def test_share_of_held_out_text(dataset: DatasetInfo, texts: list[str]) -> None:
    held_out = sum(map(len, decoded(dataset, "valid")))
    total = sum(map(len, texts))
    print(f"held out {held_out / total:.4f} of the characters, 0.2 asked")
    assert 0.2 * total <= held_out < 0.2 * total + CHUNK_CHARACTERS


def test_one_long_document_is_split(tmp_path: Path) -> None:
    text = "".join(f"Sentence number {i}.\n" for i in range(5000))
    (tmp_path / "book.txt").write_text(text)
    info = prepare(tmp_path / "data", inputs=[tmp_path / "book.txt"], vocab_size=300)
    pieces = [piece for split in SPLITS for piece in decoded(info, split)]
    assert sorted("".join(pieces).splitlines()) == sorted(text.splitlines())
    assert all(piece in text and piece.endswith(".\n") for piece in pieces)


def test_tokenizer_is_trained_on_the_train_text(dataset: DatasetInfo, tmp_path: Path) -> None:
    train_tokenizer(decoded(dataset, "train"), 1024, tmp_path / "bpe")
    assert digests(tmp_path / "bpe") == digests(dataset.tokenizer)


def test_existing_tokenizer(dataset: DatasetInfo, text_file: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    info = prepare(
        tmp_path / "data", inputs=[text_file], tokenizer=dataset.tokenizer, progress=lines.append
    )
    assert digests(info.tokenizer) == digests(dataset.tokenizer)
    assert info.request["tokenizer"] == dataset.tokenizer_sha256
    assert info.request["vocab_size"] is None
    print("\n".join(lines))
    assert [line.split()[0] for line in lines] == [
        *("text", "tokenizer", "train", "valid", "valid", "saved")
    ]


def test_long_work_tells_how_far_it_is(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_xielu.data.prepare._SECONDS_BETWEEN_LINES", 0)
    lines: list[str] = []
    prepare(tmp_path / "data", inputs=[text_file], vocab_size=300, progress=lines.append)
    for purpose in ("learning", "encoding"):
        shares = [line.split()[1] for line in lines if line.startswith(purpose)]
        assert shares[-1] == "100%"
        assert shares == sorted(shares, key=lambda share: int(share[:-1]))


def test_large_ids_take_four_bytes(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "wide", vocab_size=131_072) as writer:
        writer.add(np.array([131_071, 65_536, 0]))
    dataset = open_dataset(tmp_path / "wide")
    assert dataset[0].tolist() == [131_071, 65_536, 0]
    assert (tmp_path / "wide.bin").stat().st_size == 12


def test_range_of_a_sample(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "ids", vocab_size=60_000) as writer:
        writer.add(np.arange(50_000))
    full = token_id_range(tmp_path / "ids")
    assert (full.lowest, full.highest, full.scanned) == (0, 49_999, 50_000)
    # ten blocks of 100, the first and the last tokens among them
    sample = token_id_range(tmp_path / "ids", max_tokens=1000, blocks=10)
    assert (sample.lowest, sample.highest, sample.scanned) == (0, 49_999, 1000)


def test_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "x", vocab_size=300)
    writer.add(np.array([1, 2]))
    assert len(list(tmp_path.iterdir())) == 1
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert not list(tmp_path.iterdir())


def test_old_index_never_describes_new_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(ids: list[int]) -> None:
        with DatasetWriter(tmp_path / "x", vocab_size=300) as writer:
            writer.add(np.array(ids))

    def fail_for_idx(self: Path, target: Path) -> Path:
        if target.suffix == ".idx":
            raise OSError("interrupted")
        return self.rename(target)

    write([1, 2])
    monkeypatch.setattr(Path, "replace", fail_for_idx)
    with pytest.raises(OSError, match="interrupted"):
        write([3, 4])
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def truncate(name: str, size: int) -> Callable[[DatasetInfo], None]:
    return lambda info: os.truncate(info.path / name, size)


def remove(name: str) -> Callable[[DatasetInfo], None]:
    return lambda info: (info.path / name).unlink()


def overwrite(name: str, offset: int, content: bytes) -> Callable[[DatasetInfo], None]:
    def damage(info: DatasetInfo) -> None:
        with (info.path / name).open("r+b") as file:
            file.seek(offset)
            file.write(content)

    return damage


def swap_tokenizer(info: DatasetInfo) -> None:
    path = info.tokenizer / "tokenizer.json"
    path.write_text(path.read_text().replace('"Ġthe"', '"Ġeht"', 1))


def swap_split(info: DatasetInfo) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copyfile(info.path / f"valid{suffix}", info.path / f"train{suffix}")


def no_document(info: DatasetInfo) -> None:
    with DatasetWriter(info.prefix("valid"), vocab_size=1024):
        pass


def negative_id(info: DatasetInfo) -> None:
    ids = documents(info, "train")
    ids[0][0] = -1
    with DatasetWriter(info.prefix("train"), vocab_size=2**17) as writer:
        for document in ids:
            writer.add(np.array(document))


def edit_manifest(**changes: object) -> Callable[[DatasetInfo], None]:
    def damage(info: DatasetInfo) -> None:
        path = info.path / "dataset.json"
        content = json.loads(path.read_text())
        content.update(changes)
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return damage


DAMAGE = {
    "short bin": (
        truncate("train.bin", 1000),
        r"train\.bin is truncated: \d+ bytes .*, 1000 found",
    ),
    "empty bin": (
        truncate("valid.bin", 0),
        r"valid\.bin is truncated: \d+ bytes expected, 0 found",
    ),
    "long bin": (overwrite("valid.bin", 10**6, b"x"), r"valid\.bin is longer than its index says"),
    "no bin": (remove("train.bin"), r"train\.bin is missing"),
    "no idx": (remove("valid.idx"), r"valid\.idx is missing"),
    "header only": (truncate("train.idx", 20), r"train\.idx is truncated: 20 bytes"),
    "short idx": (truncate("train.idx", 100), r"train\.idx is truncated: \d+ bytes .*, 100 found"),
    "foreign idx": (overwrite("train.idx", 0, b"GGUF"), r"train\.idx is not an index of token ids"),
    "float ids": (overwrite("train.idx", 17, b"\x07"), r"train\.idx is not an index of token ids"),
    "large id": (overwrite("train.bin", 8, b"\xff\xff"), r"holds id 65535 but .* are 0 to 1023"),
    "negative id": (negative_id, r"holds id -1 but the tokenizer's are 0 to 1023"),
    "no document": (no_document, r"valid\.idx lists no document"),
    "other split": (swap_split, r"train\.bin holds .* the files are from different runs"),
    "other tokenizer": (swap_tokenizer, r"tokenizer\.json is not the tokenizer that made this"),
    "no tokenizer": (remove("tokenizer/tokenizer.json"), r"tokenizer\.json is missing"),
    "no manifest": (remove("dataset.json"), r"is not a data folder: it has no dataset\.json"),
    "cut manifest": (truncate("dataset.json", 50), r"dataset\.json is broken \(.*--force"),
    "missing key": (edit_manifest(eod_id=None), r"dataset\.json is broken \(.*eod_id"),
    "unknown key": (edit_manifest(colour="red"), r"dataset\.json is broken \(.*colour"),
    "wrong type": (edit_manifest(train=[1]), r"dataset\.json is broken"),
    "other format": (edit_manifest(format=2), r"has format 2; this version reads format 1"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(copy: DatasetInfo, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        check_dataset(copy.path, vocab_size=None)
    print(caught.value)


def test_vocabulary_of_the_model(dataset: DatasetInfo) -> None:
    check_dataset(dataset.path, vocab_size=1152)
    with pytest.raises(UserError, match=r"has 1024 ids but model\.vocab_size is 512.*1024 or more"):
        check_dataset(dataset.path, vocab_size=512)


def test_no_data_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data folder at .*nowhere.*prepare-data"):
        load_info(tmp_path / "nowhere")


def test_sampling_is_told(copy: DatasetInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_xielu.mcore import indexed_dataset

    monkeypatch.setitem(token_id_range.__kwdefaults__, "max_tokens", 2000)
    lines: list[str] = []
    check_dataset(copy.path, vocab_size=None, progress=lines.append)
    assert indexed_dataset.token_id_range is token_id_range
    assert lines[0] == f"train: ids checked in 2,000 of {copy.train.tokens:,} tokens"


def test_checking_does_not_import_megatron(dataset: DatasetInfo) -> None:
    script = (
        "import sys; from pathlib import Path; from megatron_xielu.data.prepare import *;"
        "check_dataset(Path(sys.argv[1]), vocab_size=None);"
        "print([m for m in sys.modules if m.split('.')[0] in ('megatron', 'transformers')])"
    )
    command = [sys.executable, "-c", script, str(dataset.path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_reuse_refuse_replace(text_file: Path, copy: DatasetInfo) -> None:
    before, lines = digests(copy.path), list[str]()
    same = {"inputs": [text_file], "vocab_size": 1024, "valid_fraction": 0.2}
    assert prepare(copy.path, **same, progress=lines.append) == copy
    assert lines == [f"{copy.path} already holds this dataset; nothing to do"]
    with pytest.raises(UserError, match=r"made with other vocab_size, seed\. .*--force"):
        prepare(copy.path, **{**same, "vocab_size": 512, "seed": 1})
    truncate("train.bin", 10)(copy)
    with pytest.raises(UserError, match=r"train\.bin is truncated.* --force replaces"):
        prepare(copy.path, **same)
    assert digests(copy.path).keys() == before.keys()
    prepare(copy.path, **same, force=True, progress=silent)
    assert digests(copy.path) == before
    assert [path.name for path in copy.path.parent.iterdir()] == ["copy"]


def test_a_folder_of_something_else_is_never_replaced(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    for force in (False, True):
        with pytest.raises(UserError, match=r"exists and is not a data folder"):
            prepare(tmp_path, inputs=[text_file], force=force)
    assert (tmp_path / "thesis.tex").read_text() == "irreplaceable"


def test_empty_folder_and_missing_parents_are_fine(text_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "a" / "b [1]"
    target.mkdir(parents=True)
    info = prepare(target, inputs=[text_file], vocab_size=300, progress=silent)
    assert info.path == target
    assert info.train.tokens > 0
    prepare(tmp_path / "c" / "d", inputs=[text_file], vocab_size=300, progress=silent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"valid_fraction": 0.0}, r"valid_fraction 0\.0 is not between 0 and 1"),
        ({"valid_fraction": 1.5}, r"valid_fraction 1\.5 is not between 0 and 1"),
        ({"vocab_size": 100}, r"vocab_size 100 is too small"),
        ({"tokenizer": Path("nowhere")}, r"no tokenizer folder at nowhere"),
        ({"text_key": "body"}, r"no key 'body' \(keys: 'text'\)"),
    ],
)
def test_wrong_settings(
    text_file: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "data", inputs=[text_file], progress=silent, **settings)
    assert not list(tmp_path.iterdir())


def test_two_short_documents_are_enough(tmp_path: Path) -> None:
    write_jsonl(path := tmp_path / "two.jsonl", ["the first text", "another text"])
    for fraction in (0.001, 0.999):
        folder = tmp_path / str(fraction)
        info = prepare(
            folder, inputs=[path], vocab_size=300, valid_fraction=fraction, progress=silent
        )
        assert (info.train.documents, info.valid.documents) == (1, 1)


def test_too_little_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "one.jsonl", ["the same text"] * 3)
    with pytest.raises(UserError, match=r"one short document, or copies of one"):
        prepare(tmp_path / "data", inputs=[tmp_path / "one.jsonl"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one data folder and no second one."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_full_disk_leaves_the_old_folder(
    dataset: DatasetInfo, text_file: Path, small_disk: Path
) -> None:
    folder = small_disk / "data"
    shutil.copytree(dataset.path, folder)
    before = digests(folder)
    with pytest.raises(UserError, match=r"cannot write .*data: No space left on device\. Nothing"):
        prepare(folder, inputs=[text_file], vocab_size=512, force=True, progress=silent)
    assert digests(folder) == before
    assert [path.name for path in small_disk.iterdir()] == ["data"]


def test_file_size_limit_leaves_the_old_folder(copy: DatasetInfo, text_file: Path) -> None:
    """The same where nobody may mount: the system refuses files above 100 kB."""
    before = digests(copy.path)
    message = r"cannot write .*: File too large\. Nothing was changed"
    with file_limit(100_000), pytest.raises(UserError, match=message):
        prepare(copy.path, inputs=[text_file], vocab_size=512, force=True, progress=silent)
    assert digests(copy.path) == before
    assert [path.name for path in copy.path.parent.iterdir()] == ["copy"]


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_xielu.data.prepare import prepare

def progress(line):
    if line.startswith("tokenizer"):
        os.kill(os.getpid(), signal.SIGKILL)

prepare(Path(sys.argv[2]), inputs=[Path(sys.argv[1])], vocab_size=512, progress=progress)
"""


def test_killed_run_leaves_no_folder_and_is_told(text_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "data"
    command = [sys.executable, "-c", KILLED, str(text_file), str(target)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert not target.exists()
    lines: list[str] = []
    prepare(target, inputs=[text_file], vocab_size=512, progress=lines.append)
    (leftover,) = (path for path in tmp_path.iterdir() if path != target)
    assert lines[0].startswith(f"note: {leftover} is from an interrupted run; delete it")


def test_manifest_round_trip(dataset: DatasetInfo, tmp_path: Path) -> None:
    save_info(dataset, tmp_path)
    assert replace(load_info(tmp_path), path=dataset.path) == dataset


@pytest.mark.slow
def test_built_in_corpus(tmp_path: Path) -> None:
    info = prepare(tmp_path / "data")
    assert info.vocab_size == 4096
    assert info.train.tokens > 1_000_000
    share = info.valid.tokens / (info.valid.tokens + info.train.tokens)
    assert 0.045 < share < 0.06
    assert 3 < info.bytes_per_token < 5
    assert 5 < info.unigram_entropy_nats < math.log(4096)
    assert {source.licence for source in info.sources} == {"PSF-2.0", "BSD-3-Clause"}
    assert prepare(tmp_path / "data") == check_dataset(tmp_path / "data", vocab_size=4096)
