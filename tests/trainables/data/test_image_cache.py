"""The memory-mapped cache of decoded images."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainables.data import image_cache
from trainables.data.datasets import ImageData, load_dataset
from trainables.data.readers.items import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve training images of two classes and two test images; its own cache."""
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(14):
        place = tmp_path / "images" / ("train" if i < 12 else "test") / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return tmp_path / "images"


def _load(folder: Path) -> ImageData:
    load_dataset.cache_clear()
    return load_dataset("mine", str(folder))


def _file(folder: Path) -> Path:
    (file,) = (folder.parent / "cache" / "images").glob("*.images")
    return file


def _same(one: ImageData, two: ImageData) -> None:
    for name in ("images", "labels", "test_images", "test_labels"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert (one.source, one.classes) == (two.source, two.classes)


def test_a_second_start_decodes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _load(folder)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded again"))
    monkeypatch.setattr(image_cache, "fingerprint", lambda *_: pytest.fail("hashed again"))
    _same(_load(folder), first)
    assert not list(folder.parent.rglob(".*.part"))


def test_it_is_mapped_and_cannot_be_changed_through_the_tensors(folder: Path) -> None:
    data = _load(folder)
    before = _file(folder).read_bytes()
    maps = Path("/proc/self/maps")
    if maps.is_file():
        assert str(_file(folder)) in maps.read_text()
    data.images.zero_()
    assert _file(folder).read_bytes() == before
    assert _load(folder).images.any()


@pytest.mark.parametrize("change", ["content", "new", "gone"])
def test_changed_files_are_read_again(folder: Path, change: str) -> None:
    first = _load(folder)
    file = folder / "train" / "a" / "0.png"
    if change == "content":
        Image.fromarray(np.full((6, 6, 3), 9, np.uint8)).save(file)
    elif change == "new":
        Image.fromarray(np.full((6, 6, 3), 9, np.uint8)).save(file.with_name("100.png"))
    else:
        file.unlink()
    again = _load(folder)
    assert again.fingerprint != first.fingerprint
    assert len(again.images) == {"content": 12, "new": 13, "gone": 11}[change]


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "footer"])
def test_a_damaged_file_is_made_again(folder: Path, damage: str) -> None:
    first = _load(folder)
    file = _file(folder)
    content = file.read_bytes()
    file.unlink()
    broken = {
        "empty": b"",
        "cut": content[:-5],
        "other": b"x" * 4000,
        "footer": content[:-40] + b"}" * 24 + content[-16:],
    }
    file.write_bytes(broken[damage])
    _same(_load(folder), first)
    assert file.read_bytes() == content


def test_the_fingerprint_is_a_hash_of_shapes_and_bytes(folder: Path) -> None:
    """Results are filed under it: it must stay what it was."""
    data = _load(folder)
    images, labels = data.images.numpy(), data.labels.numpy()
    digest = hashlib.sha256(b"(12, 3, 6, 6)" + images.tobytes() + b"(12,)" + labels.astype("<i8").tobytes())
    assert data.fingerprint == digest.hexdigest()[:16]


@pytest.mark.parametrize("plant", ["pipe", "link", "huge", "shape"])
def test_a_planted_file_is_made_again_or_refused(folder: Path, tmp_path: Path, plant: str) -> None:
    """In a cache that others can write to: nothing waits, and nothing is written through a link."""
    first = _load(folder)
    file, victim = _file(folder), tmp_path / "victim"
    content = file.read_bytes()
    victim.write_bytes(b"precious")
    file.unlink()
    if plant == "pipe":
        os.mkfifo(file)
    elif plant == "link":
        file.symlink_to(victim)
    else:
        footer = b'{"shape": 3}' if plant == "shape" else b"{}"
        length = 2**64 - 1 if plant == "huge" else len(footer)
        file.write_bytes(footer + length.to_bytes(8, "little") + content[-8:])
    _same(_load(folder), first)
    assert victim.read_bytes() == b"precious" and not file.is_symlink() and file.read_bytes() == content


def test_what_a_killed_process_left_is_removed(folder: Path) -> None:
    _load(folder)
    file = _file(folder)
    left, another = file.with_name(f".{file.name}.0a1b.part"), file.with_name(".another.images.0a1b.part")
    for part in (left, another):
        part.write_bytes(b"half")
    file.unlink()
    _load(folder)
    assert file.is_file() and not left.exists()
    assert another.exists(), "of another set, which may be being written"


def test_a_cache_that_cannot_be_written_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder.parent / "no_folder"
    place.write_text("x")
    monkeypatch.setenv("MEBM_CACHE", str(place))
    with pytest.raises(DataError, match=r"no_folder.*cannot be cached.*MEBM_CACHE") as error:
        _load(folder)
    assert "\n" not in str(error.value)


def test_settings_have_files_of_their_own(folder: Path) -> None:
    _load(folder)
    small = load_dataset("mine", str(folder), "refuse", 4)
    assert small.shape == (3, 4, 4)
    assert len(list((folder.parent / "cache" / "images").glob("*.images"))) == 2


def test_what_was_refused_leaves_nothing(folder: Path) -> None:
    (folder / "train" / "a" / "0.png").write_bytes(b"x")
    with pytest.raises(DataError, match="1 bad in all"):
        _load(folder)
    assert not list(folder.parent.rglob("*.images")) and not list(folder.parent.rglob(".*.part"))


_PROCESS = """
import sys, time
from trainables.data import image_cache
real = image_cache._write
def slow(*a):
    print("read", flush=True)
    time.sleep(3)
    real(*a)
image_cache._write = slow
from trainables.data.datasets import load_dataset
print(load_dataset("mine", sys.argv[1]).fingerprint)
"""


def test_processes_that_start_together_read_once(folder: Path) -> None:
    command = [sys.executable, "-c", _PROCESS, str(folder)]
    started = [subprocess.Popen(command, env=os.environ.copy(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sum(line.count("read") for line in said) == 1
    assert said[0][-1] == said[1][-1]
