"""Reading and writing small files: nothing that lies there may hang, harm or mislead."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from llm_allreduce_plugin.base.files import read_json, read_text, replace_text
from llm_allreduce_plugin.errors import UnreadableFileError


def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffgr\u00fcn\n".encode())
    assert read_text(path) == "gr\u00fcn\n"


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_of_text_is_an_error_that_names_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "utf16.json").write_text("{}", encoding="utf-16")
    (tmp_path / "large.json").write_text("1" * ((1 << 20) + 1))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = {
        tmp_path / "pipe": "not a regular file",
        Path("/dev/zero"): "not a regular file",
        tmp_path: "not a regular file",
        tmp_path / "utf16.json": "not UTF-8",
        tmp_path / "large.json": "larger than 1048576",
        tmp_path / "loop": "cannot be read",
        tmp_path / "missing": "cannot be read: No such file",
        Path("a\0b"): "cannot be read",
    }
    for path, reason in cases.items():
        with pytest.raises(UnreadableFileError, match=reason) as raised:
            read_text(path)
        assert str(path) in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "1" * 5000, '{"a": 1'])
def test_json_that_is_none_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UnreadableFileError, match=r"a\.json is (not valid JSON|nested too deeply)"):
        read_json(path)


def test_a_file_is_replaced_whole_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    texts = [str(number) * 10_000 for number in range(10)]
    writers = [threading.Thread(target=replace_text, args=(path, text)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_text() in texts
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_a_link_in_the_place_of_the_file_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "report.json"
    path.symlink_to(victim)
    replace_text(path, "new")
    assert (victim.read_text(), path.read_text(), path.is_symlink()) == ("precious", "new", False)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()  # which no file can replace
    with pytest.raises(IsADirectoryError):
        replace_text(tmp_path / "a.json", "x")
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_the_same_failure_has_the_same_text(tmp_path: Path) -> None:
    """Whatever the new file would have been called."""
    path = tmp_path / "missing" / "report.json"
    told = set()
    for _ in range(3):
        with pytest.raises(FileNotFoundError) as caught:
            replace_text(path, "text")
        told.add(str(caught.value))
    assert told == {f"[Errno 2] No such file or directory: '{path}'"}
