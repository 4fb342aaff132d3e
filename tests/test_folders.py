"""A folder or a file appears complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_xielu.folders import leftovers, new_file, new_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").touch()
    return folder


def test_replaces_as_a_whole(target: Path) -> None:
    with new_folder(target) as folder:
        (folder / "new").touch()
        assert leftovers(target) == [folder]
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert leftovers(target) == []


def test_failed_block_changes_nothing(target: Path) -> None:
    def write() -> None:
        with new_folder(target) as folder:
            (folder / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert (names(target), names(target.parent)) == (["old"], ["out"])


def test_a_file_replaces_or_leaves_nothing(target: Path) -> None:
    def write(text: str, fail: bool) -> None:
        with new_file(target / "old") as partial:
            partial.write_text(text)
            if fail:
                raise KeyboardInterrupt

    write("new", fail=False)
    with pytest.raises(KeyboardInterrupt):
        write("newer", fail=True)
    assert (names(target), (target / "old").read_text()) == (["old"], "new")


def test_failed_replacement_changes_nothing(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail_for_the_new_one(self: Path, to: Path) -> Path:
        if ".new-" in self.name:
            raise PermissionError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(PermissionError), new_folder(target):
        pass
    assert (names(target), names(target.parent)) == (["old"], ["out"])


def test_link_keeps_pointing(target: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(target)
    with new_folder(link) as folder:
        (folder / "new").touch()
    assert link.is_symlink()
    assert names(target) == ["new"]


def test_others_can_read(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out"):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
