"""`trainables.results.files`: names confined, links not followed, writes whole."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from trainables.results.files import (
    UnsafePathError,
    check_name,
    open_append,
    part_of,
    read_limited,
    refuse_links_out,
    remove_parts,
    replacing,
    within,
    write_bytes,
    write_text,
)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside" / "victim"
    path.parent.mkdir()
    path.write_text("untouched")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "study"
    path.mkdir()
    return path


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "", ".", "..", "a//b", "a/", "a\0b", "a\nb", "a\\b", "\ud800", None, 3, ["a"], "a/./b", "é" * 128, "a/" * 500 + "a"],
)  # fmt: skip
def test_a_name_that_is_none_is_refused_by_a_short_line(name: object, folder: Path) -> None:
    with pytest.raises(UnsafePathError) as caught:
        within(folder, name)
    assert caught.value.filename == str(folder) and "\n" not in str(caught.value)
    with pytest.raises(UnsafePathError) as caught:
        check_name("../" + "x" * 10_000, folder)
    assert len(caught.value.strerror) < 200


@pytest.mark.parametrize("name", ["a", "a/b.parquet", ".hidden", "..a", "a..", "t 1", "é/ü"])
def test_a_name_in_the_folder_passes(name: str, folder: Path) -> None:
    assert within(folder, name) == folder / name


def test_links_are_judged_by_where_they_lead(folder: Path, outside: Path) -> None:
    (folder / "file").write_text("here")
    (folder / "inner").symlink_to("file")
    (folder / "out").symlink_to(outside)
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    assert within(folder, "inner").read_text() == "here"
    for name in ("out", "up/outside/victim", "loop", "up"):
        with pytest.raises(UnsafePathError):
            within(folder, name)


def test_a_folder_that_is_itself_behind_a_link_is_taken(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    (folder / "a").write_text("here")
    (folder / "b").symlink_to(folder / "a")
    refuse_links_out(tmp_path / "link")
    assert within(tmp_path / "link", "b").read_text() == "here"
    refuse_links_out(tmp_path / "nothing")


@pytest.mark.parametrize("depth", ["", "signals/", "tune/run-001/x/"])
def test_every_way_out_of_a_folder_is_found(depth: str, folder: Path, outside: Path) -> None:
    place = folder / depth
    place.mkdir(parents=True, exist_ok=True)
    refuse_links_out(folder)
    link = place / "innocent"
    for target in (outside, outside.parent, Path("/nowhere/at/all"), Path("/dev/zero")):
        link.symlink_to(target)
        with pytest.raises(UnsafePathError, match="leads out"):
            refuse_links_out(folder)
        link.unlink()
    os.mkfifo(link)
    with pytest.raises(UnsafePathError, match="is a pipe"):
        refuse_links_out(folder)
    link.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(place)  # the path of a socket is short
        try:
            server.bind("innocent")
        finally:
            os.chdir(here)
        with pytest.raises(UnsafePathError, match="is a socket"):
            refuse_links_out(folder)


def test_a_write_replaces_a_link_and_leaves_its_target(folder: Path, outside: Path) -> None:
    (folder / "report.html").symlink_to(outside)
    write_text(folder / "report.html", "new ü\n")
    assert outside.read_text() == "untouched"
    assert not (folder / "report.html").is_symlink() and (folder / "report.html").read_bytes() == "new ü\n".encode()


def test_a_write_is_whole_or_not_at_all(folder: Path) -> None:
    path = folder / ("n" * 200)
    write_bytes(path, b"before")

    class Stop(BaseException):
        pass

    with pytest.raises(Stop), replacing(path) as file:
        file.write(b"half")
        assert path.read_bytes() == b"before"
        raise Stop
    assert path.read_bytes() == b"before" and list(folder.iterdir()) == [path]
    with replacing(path, "w", sync=True) as file:
        file.write("a\n")
    assert path.read_text() == "a\n"


def test_permissions_follow_the_umask(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(folder / "a", b"")
    finally:
        os.umask(before)
    assert (folder / "a").stat().st_mode & 0o777 == 0o640


def test_a_write_that_fails_names_its_file(folder: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_bytes(folder / "no" / "table.md", b"")
    assert caught.value.filename == str(folder / "no" / "table.md")


def test_folders_of_other_programs_and_of_others_are_passed_over(folder: Path, outside: Path) -> None:
    """Runs of Weights & Biases, which link to a log outside; not a link in its folder itself, nor a study's own name."""
    for place in ("wandb/run-1/logs", "own/deep"):
        (folder / place).mkdir(parents=True)
    (folder / "wandb/run-1/logs/core.log").symlink_to(outside)
    refuse_links_out(folder)
    (folder / "own/deep/x").symlink_to(outside)
    refuse_links_out(folder, deep=False)
    with pytest.raises(UnsafePathError, match="leads out of"):
        refuse_links_out(folder)
    (folder / "own/deep/x").rename(folder / "wandb/latest")
    for deep in (folder, folder / "wandb"):
        with pytest.raises(UnsafePathError, match="leads out of") as caught:
            refuse_links_out(deep)
        assert str(caught.value.filename).endswith("latest")
    (folder / "wandb/latest").unlink()
    with pytest.raises(UnsafePathError, match="leads out of"):
        refuse_links_out(folder / "wandb")  # a study of that name is looked through


def test_an_error_of_the_last_step_names_the_file_that_was_meant(folder: Path) -> None:
    (folder / "a" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError) as caught:
        write_bytes(folder / "a", b"x")
    assert caught.value.filename == str(folder / "a") and ".part" not in str(caught.value)
    assert [p.name for p in folder.iterdir()] == ["a"]
    assert part_of(folder / "b") != part_of(folder / "b")
    for name in ("é" * 127, "€" * 85, "😀" * 63, "b" * 255):  # as long as a name may be
        write_bytes(folder / name, b"x")


def test_a_log_is_never_written_through_a_link(folder: Path, outside: Path) -> None:
    (folder / "log").symlink_to(outside)
    with pytest.raises(UnsafePathError, match="is a link") as caught:
        open_append(folder / "log")
    assert caught.value.errno == errno.ELOOP and outside.read_text() == "untouched"
    (folder / "log").unlink()
    for text in (b"one\n", b"two\n"):
        with open_append(folder / "log") as file:
            file.write(text)
    assert (folder / "log").read_bytes() == b"one\ntwo\n"
    os.mkfifo(folder / "pipe")
    with pytest.raises(UnsafePathError, match="not a regular file"):
        open_append(folder / "pipe")


def test_a_file_without_an_end_is_refused(folder: Path) -> None:
    (folder / "a").write_bytes(b"12345")
    assert read_limited(folder / "a", 5) == b"12345"
    for path, most in ((folder / "a", 4), (Path("/dev/zero"), 1000)):
        with pytest.raises(UnsafePathError, match="larger than"):
            read_limited(path, most)


def test_parts_that_killed_writers_left_are_removed(folder: Path, outside: Path) -> None:
    (folder / "tables").mkdir()
    for name in (".a.12.part", "tables/.b.34.part", "kept.part", ".kept"):
        (folder / name).write_text("")
    (folder / ".c.part").symlink_to(outside)
    assert remove_parts(folder) == 2
    assert outside.is_file() and {p.name for p in folder.iterdir()} == {".c.part", ".kept", "kept.part", "tables"}
