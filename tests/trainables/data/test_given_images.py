"""Images are what the user gave: nothing twice, nothing turned, nothing passed over without a word."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from trainables.data.datasets import ImageData, load_dataset
from trainables.data.readers.items import TEST_NAMES, DataError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path_factory.mktemp("cache")))
    load_dataset.cache_clear()


def pixels(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def folder(place: Path, count: int = 2, classes: tuple[str, ...] = ("a", "b"), seed: int = 0) -> Path:
    for number, name in enumerate(classes):
        (place / name).mkdir(parents=True)
        for i, image in enumerate(pixels(count, seed + number)):
            Image.fromarray(image).save(place / name / f"{i}.png")
    return place


def table(path: Path, labels: Any, names: list[str] | None = None, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = []
    for image in pixels(len(labels), seed):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    content = pa.table({"image": pa.array(images, kind), "label": labels})
    if names is not None:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        content = content.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(content, path)


def refused(place: Path, *needles: str, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset("mine", str(place), **options)
    text = str(caught.value)
    assert "\n" not in text
    text.encode()
    for needle in needles:
        assert needle in text, text


# ------------------------------------------------------------------------------------------------- two data sets


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (("train-00000-of-00002", "train-00001-of-00002", "train-00000-of-00001"), ("of-00001", "of-00002")),
        (("train-00000-of-00001-abc", "train-00000-of-00001-def"), ("abc", "def")),
        (("train-0-of-2", "train-1-of-2", "train-0-of-1"), ("train-0-of-1", "train-0-of-2")),
        (("train", "train-00000-of-00001"), ("train.parquet", "train-00000-of-00001.parquet")),
        (("train-00000-of-00001", "Train-00000-of-00001"), ("Train-00000-of-00001", "train-00000-of-00001")),
        (("train-00000-of-00001", "train_old-00000-of-00001"), ("train-00000-of-00001", "train_old-00000-of-00001")),
        (("data/train-00000-of-00001", "train-00000-of-00001"), ("data", "the folder itself")),
        (("v1/train", "v2/train"), ("v1", "v2")),
        (("train/0000", "train-00000-of-00001"), ("train", "the folder itself")),
        (("train", "test-00000-of-00001", "test-00000-of-00002", "test-00001-of-00002"), ("test-00000-of-00001",)),
    ],
)
def test_shards_of_two_pushes_are_refused_and_both_are_named(
    tmp_path: Path, files: tuple[str, ...], named: tuple[str, ...]
) -> None:
    for name in files:
        table(tmp_path / f"{name}.parquet", [0, 1, 0, 1])
    refused(tmp_path, *named)


def test_images_and_a_table_of_images_are_two_data_sets(tmp_path: Path) -> None:
    folder(tmp_path / "train")
    table(tmp_path / "train.parquet", [0, 1])
    refused(tmp_path, "images in train and in train.parquet")


def test_a_missing_shard_is_named_in_whatever_width(tmp_path: Path) -> None:
    for number in (0, 2):
        table(tmp_path / f"train-{number:03d}-of-003.parquet", [0, 1])
    refused(tmp_path, "1 of 3 files of train are missing, first train-001-of-003.parquet")


def test_files_whose_labels_mean_other_classes_are_refused(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", [0, 1], ["cat", "dog"])
    table(tmp_path / "test.parquet", [0, 1], ["dog", "cat"])
    refused(tmp_path, "train.parquet", "test.parquet", "label 0 is cat, then dog")


# --------------------------------------------------------------------------------------------------------- links


def loaded(place: Path, **options: Any) -> ImageData:
    return load_dataset("mine", str(place), **options)


def test_links_to_folders_are_followed_at_every_depth(tmp_path: Path) -> None:
    elsewhere = folder(tmp_path / "elsewhere", 3)
    folder(tmp_path / "plain" / "train", 3)
    folder(tmp_path / "plain" / "test", 3)
    expected = loaded(tmp_path / "plain")
    for name, links in {
        "split": {"train": elsewhere, "test": elsewhere},
        "class": {f"{s}/{c}": elsewhere / c for s in ("train", "test") for c in "ab"},
        "deep": {f"{s}/{c}/more": elsewhere / c for s in ("train", "test") for c in "ab"},
    }.items():
        for place, target in links.items():
            (tmp_path / name / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / place).symlink_to(target)
        data = loaded(tmp_path / name)
        assert torch.equal(data.images, expected.images)
        assert torch.equal(data.labels, expected.labels)
    (tmp_path / "all").symlink_to(tmp_path / "plain")
    assert torch.equal(loaded(tmp_path / "all").images, expected.images)


@pytest.mark.parametrize("place", ["train/a/loop", "train/a/deep/loop", "train/loop", "loop"])
@pytest.mark.parametrize("target", ["train/a", "train", ".", "..", "itself"])
def test_links_in_a_circle_are_not(tmp_path: Path, place: str, target: str) -> None:
    root = tmp_path / "data"
    folder(root / "train", 3)
    folder(root / "test", 1)
    (root / place).parent.mkdir(exist_ok=True)
    inside = place.rpartition("/")[0] or "."
    goal = root / place if target == "itself" else root / target
    (root / place).symlink_to(goal)
    circular = target == "itself" or f"{(root / inside).resolve()}/".startswith(f"{goal.resolve()}/")
    data = loaded(root)
    if circular:
        assert len(data.images) == 6
        assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    elif place == "loop":
        assert len(data.images) == 6
        assert data.passed_over == ("loop",)
    else:  # another name of a class beside it: what the user gave
        assert len(data.images) == 9


@pytest.mark.parametrize("place", ["train/c", "train/a/more", "train/a/x.png"])
def test_a_link_to_nothing_is_named(tmp_path: Path, place: str) -> None:
    folder(tmp_path / "train")
    (tmp_path / place).symlink_to(tmp_path / "gone")
    refused(tmp_path, place)


# --------------------------------------------------------------------------------------------------- orientation


TURNED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}
"""How the pixels of an image are shown, by EXIF's Orientation (CIPA DC-008, 4.6.4 A)."""
FORMS = {
    "png": {},
    "jpg": {"quality": 100, "subsampling": 0},
    "webp": {"lossless": True},
    "tif": {},
    "jfif": {"format": "JPEG", "quality": 100, "subsampling": 0},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", TURNED)
def test_photographs_are_upright_before_they_are_cropped(tmp_path: Path, form: str, orientation: int) -> None:
    wide = np.zeros((16, 48, 3), np.uint8)  # cropped to its middle third
    wide[:8, 16:24], wide[8:, 16:24], wide[:8, 24:32] = 255, 160, 80
    for split in ("train", "test"):
        for i in range(2):
            place = tmp_path / split / "a"
            place.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(wide)
            exif = picture.getexif()
            exif[0x112] = orientation
            picture.save(place / f"{i}.{form}", exif=exif, **FORMS[form])
    images = loaded(tmp_path, side=16).images
    expected = TURNED[orientation](wide[:, 16:32])
    assert abs(images[0].permute(1, 2, 0).numpy().astype(int) - expected.astype(int)).max() <= 6  # JPEG's


# -------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (pa.array([0.0, 1.0, float("nan"), 1.0]), "nan"),
        (pa.array([0.0, 1.0, float("inf"), 1.0]), "inf"),
        (pa.array([0.0, 1.0, -float("inf"), 1.0]), "-inf"),
        (pa.array([0.0, 1.0, 0.5, 1.0]), "0.5"),
        (pa.array([0, 1, 2**64 - 1, 1], pa.uint64()), str(2**64 - 1)),
        (pa.array([0, 1, 2**63 - 1, 1]), str(2**63 - 1)),
        (pa.array([0, 1, -(2**63), 1]), str(-(2**63))),
        (pa.array([0, 1, -1, 1]), "-1"),
        (pa.array([0, 1, 2_700_000_000, 1]), "2700000000"),
        (pa.array([0.0, 1.0, 1e300, 1.0]), "1e+300"),
        (pa.array([0, 1, None, 1]), "'null'"),
    ],
)
def test_a_label_that_is_none_is_named_by_file_and_row_and_counted(tmp_path: Path, labels: Any, said: str) -> None:
    table(tmp_path / "train.parquet", labels)
    table(tmp_path / "test.parquet", [0, 1])
    refused(tmp_path, f"train.parquet: row 2: label is {said}", "1 bad in all")
    data = loaded(tmp_path, bad_images="skip")
    assert (data.skipped_count, data.labels.tolist()) == (1, [0, 1, 1])
    assert f"row 2: label is {said}" in data.skipped[0]


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(["0", "1", "1", "0"]),
        pa.array([True, False, True, True]),
        pa.array(["cat", "dog", "cat", "dog"]).dictionary_encode(),
        pa.array([[0], [1], [0], [1]]),
        pa.array([b"0", b"1", b"0", b"1"]),
        pa.array([0, 1, 0, 1], pa.timestamp("s")),
    ],
)
def test_labels_that_are_no_numbers_are_all_named(tmp_path: Path, labels: Any) -> None:
    table(tmp_path / "train.parquet", labels)
    table(tmp_path / "test.parquet", [0, 1])
    refused(tmp_path, "train.parquet: row 0: label is", "4 bad in all")
    refused(tmp_path, "train.parquet", "no usable image", bad_images="skip")


# ------------------------------------------------------------------------------------------ splits, few, no UTF-8


@pytest.mark.parametrize("name", [*TEST_NAMES, "Eval", "DEV"])
def test_a_split_by_any_usual_name_is_the_test_split(tmp_path: Path, name: str) -> None:
    folder(tmp_path / "images" / "train")
    folder(tmp_path / "images" / name, 1, seed=7)
    data = loaded(tmp_path / "images")
    assert (len(data.images), len(data.test_images), data.passed_over) == (4, 2, ())
    table(tmp_path / "table" / "train-00000-of-00001.parquet", [0, 1, 0])
    table(tmp_path / "table" / f"{name}-00000-of-00001.parquet", [0, 1])
    data = loaded(tmp_path / "table")
    assert (len(data.images), len(data.test_images), data.passed_over) == (3, 2, ())


def test_what_is_passed_over_is_named(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for name in ("train", "test", "val", "unlabelled"):
        folder(root / name)
    (root / "labels.csv").write_text("file,label\n")
    (root / "notes").mkdir()
    data = loaded(root)
    assert data.passed_over == ("unlabelled", "val", "labels.csv")
    assert data.remarks == ("beside the images of mine, not read: unlabelled, val, labels.csv",)
    for name in ("train", "dev", "test", "extra"):
        table(tmp_path / "table" / f"{name}.parquet", [0, 1])
    assert loaded(tmp_path / "table").passed_over == ("dev.parquet", "extra.parquet")
    flat = tmp_path / "flat"
    folder(flat / "x", 4, ("a",))
    (flat / "x" / "a").rename(flat / "y")
    (flat / "x").rmdir()
    (flat / "y" / "metadata.jsonl").write_text("{}")
    assert loaded(flat / "y").passed_over == ("metadata.jsonl",)


def test_a_split_without_images_is_refused(tmp_path: Path) -> None:
    folder(tmp_path / "a" / "train")
    (tmp_path / "a" / "test").mkdir()
    refused(tmp_path / "a", f"{tmp_path}/a/test: no image files in it")
    table(tmp_path / "b" / "train.parquet", [0, 1])
    table(tmp_path / "b" / "test.parquet", pa.array([], pa.int64()))
    refused(tmp_path / "b", "test.parquet: the test split is there, but has no usable image")
    table(tmp_path / "c" / "train.parquet", [0, 1])
    table(tmp_path / "c" / "test.parquet", [-5, -5])
    refused(tmp_path / "c", "test.parquet", "no usable image", bad_images="skip")
    folder(tmp_path / "d", 1, ("only",))
    refused(tmp_path / "d", "0.png: is the only usable image", "at least 2 are needed")


def test_names_that_are_not_utf8_are_read_and_named(tmp_path: Path) -> None:
    root = tmp_path / "images"
    folder(root / "train", 2, ("a", os.fsdecode(b"caf\xe9")))
    folder(root / "test", 1, ("a", os.fsdecode(b"caf\xe9")))
    assert loaded(root).labels.tolist() == [0, 0, 1, 1]
    (root / "train" / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.png")).write_bytes(b"no picture")
    (root / os.fsdecode(b"\xfe.csv")).write_text("")
    load_dataset.cache_clear()
    refused(root, r"train/caf\xe9/\xff.png: image cannot be decoded")
    data = loaded(root, bad_images="skip")
    assert (len(data.images), data.passed_over) == (4, (r"\xfe.csv",))
    "".join(data.remarks).encode()
    folder(root / "test" / "x", 1, (os.fsdecode(b"\xfd"),))
    (root / "test" / "x").rename(root / "test" / os.fsdecode(b"\xfd"))
    load_dataset.cache_clear()
    refused(root, r"class folder \xfd is not in")


def test_class_folders_have_one_order_on_every_disk(tmp_path: Path) -> None:
    for order in (("01", "1", "001"), ("1", "001", "01")):
        folder(tmp_path / order[0] / "train", 1, order)
        for name in order:
            Image.new("RGB", (8, 8), (len(name) * 50,) * 3).save(tmp_path / order[0] / "train" / name / "0.png")
        folder(tmp_path / order[0] / "test", 1, order)
        assert loaded(tmp_path / order[0]).images[:, 0, 0, 0].tolist() == [150, 100, 50]


def test_an_image_in_a_form_that_is_not_read_is_named(tmp_path: Path) -> None:
    folder(tmp_path / "train")
    (tmp_path / "train" / "a" / "9.heic").write_bytes(b"\0\0\0\x18ftypheic")
    refused(tmp_path, "9.heic: image cannot be decoded")


def test_images_that_change_places_are_read_again(tmp_path: Path) -> None:
    """Raw images of one size, with the one time that archives give every file."""
    for name, value in (("a", 0), ("b", 255)):
        for split in ("train", "test"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                path = tmp_path / split / name / f"{i}.bmp"
                Image.new("RGB", (8, 8), (value,) * 3).save(path)
                os.utime(path, (0, 0))
    assert loaded(tmp_path).images[:, 0, 0, 0].tolist() == [0, 0, 255, 255]
    one, other = tmp_path / "train" / "a" / "0.bmp", tmp_path / "train" / "b" / "0.bmp"
    one.rename(tmp_path / "x")
    other.rename(one)
    (tmp_path / "x").rename(other)
    load_dataset.cache_clear()
    assert loaded(tmp_path).images[:, 0, 0, 0].tolist() == [255, 0, 0, 255]
