"""A file takes the place of another when it is whole."""

import os

import pytest

from ett.common_ett.files import remove_unfinished, replacing


def test_what_was_there_stays_until_all_is_written(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [found.name for found in tmp_path.iterdir()] == ["file.txt"]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as temporary:
        temporary.write_text("ne")
        raise OSError("full")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file.txt", "old")]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    kept, folder = tmp_path / "file.tmp", tmp_path / "samples"
    folder.mkdir()
    kept.touch()
    if os.fork() == 0:
        with replacing(folder / "file.txt") as temporary:
            temporary.touch()
            os._exit(0)
    os.wait()
    assert len(list(folder.iterdir())) == 1
    remove_unfinished(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


def test_two_may_write_the_same_file(tmp_path):
    with replacing(tmp_path / "file.txt") as first, replacing(tmp_path / "file.txt") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file.txt").read_text() == "first"
