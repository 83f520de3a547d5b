"""Image folders and ImageNet-32's batches as people have them, and what is done with bad images."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from trainables.data import image_cache
from trainables.data.datasets import load_dataset
from trainables.data.readers.items import DataError, Item, natural_key


def _pixels(count: int, shape: tuple[int, ...] = (6, 6, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def _save(path: Path, pixels: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def _same(images: torch.Tensor, pixels: Any) -> None:
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), np.asarray(pixels))


def _refused(folder: Path, *needles: str, name: str = "mine", **options: Any) -> None:
    with pytest.raises(DataError) as error:
        load_dataset(name, str(folder), **options)
    text = str(error.value)
    assert "\n" not in text
    for needle in needles:
        assert needle in text, (needle, text)


# ------------------------------------------------------------------------------------------------ image folders


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_class_subfolders_with_splits(tmp_path: Path, test_name: str) -> None:
    pixels = _pixels(8)
    for i, (label, file) in enumerate([("cat", "2"), ("cat", "10"), ("ant", "1"), ("dog", "1"), ("dog", "2")]):
        _save(tmp_path / "train" / label / f"img{file}.png", pixels[i])
    for i, label in enumerate(["dog", "cat"]):
        _save(tmp_path / test_name / label / "x.png", pixels[5 + i])
    data = load_dataset("mine", str(tmp_path))
    # Classes in alphabetical order; img2 before img10.
    _same(data.images, [pixels[2], pixels[0], pixels[1], pixels[3], pixels[4]])
    assert data.labels.tolist() == [0, 1, 1, 2, 2]
    # dog is class 2 in the test split too, though it has no ant.
    _same(data.test_images, [pixels[6], pixels[5]])
    assert data.test_labels.tolist() == [1, 2]
    assert data.classes == 3 and data.source.startswith("folder:mine#")


def test_flat_folders(tmp_path: Path) -> None:
    pixels = _pixels(6)
    for i in range(4):
        _save(tmp_path / "train" / f"{i}.png", pixels[i])
    for i in range(2):
        _save(tmp_path / "test" / f"{i}.png", pixels[4 + i])
    data = load_dataset("mine", str(tmp_path))
    _same(data.images, pixels[:4])
    _same(data.test_images, pixels[4:])
    assert data.labels.tolist() == [0] * 4 and data.classes == 1


@pytest.mark.parametrize("classes", [False, True])
def test_a_folder_without_splits_holds_out_every_tenth(tmp_path: Path, classes: bool) -> None:
    pixels = _pixels(25)
    for i in range(25):
        folder = tmp_path / ("a" if i < 12 else "b") if classes else tmp_path
        _save(folder / f"img{i}.png", pixels[i])
    data = load_dataset("mine", str(tmp_path))
    held = [0, 10, 20]
    _same(data.test_images, pixels[held])
    _same(data.images, np.delete(pixels, held, axis=0))
    if classes:
        assert data.test_labels.tolist() == [0, 0, 1]


def test_names_are_sorted_by_their_numbers() -> None:
    names = ["b1", "a10", "a2", "a02x", "a"]
    assert sorted(map(Path, names), key=natural_key) == [Path(n) for n in ("a", "a2", "a02x", "a10", "b1")]
    assert natural_key(Path("²"))[0] == [(0, 0, "²")]  # a digit to str.isdigit, and no number to int


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    """What macOS puts into archives, and folders of thumbnails."""
    pixels = _pixels(4)
    for i in range(3):
        _save(tmp_path / "train" / "cat" / f"{i}.PNG", pixels[i])
        (tmp_path / "train" / "cat" / f"._{i}.PNG").write_bytes(b"x")
    _save(tmp_path / "train" / "cat" / ".thumbs" / "0.png", _pixels(1, (2, 2, 3))[0])
    _save(tmp_path / "train" / ".cache" / "0.png", _pixels(1, (2, 2, 3))[0])
    (tmp_path / "test" / "cat").mkdir(parents=True)
    _save(tmp_path / "test" / "cat" / "0.png", pixels[3])
    data = load_dataset("mine", str(tmp_path))
    _same(data.images, pixels[:3])
    assert data.classes == 1


def test_labels_in_one_split_alone_are_refused(tmp_path: Path) -> None:
    for i in range(4):
        _save(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", _pixels(1)[0])
    _save(tmp_path / "test" / "7.png", _pixels(1)[0])
    _refused(tmp_path, "test/7.png: has no label", "train/a/0.png has one")


def test_odd_folders(tmp_path: Path) -> None:
    _refused(tmp_path / "none", str(tmp_path / "none"), "not a folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    _refused(tmp_path / "empty", str(tmp_path / "empty"), "notes.txt", "train*.parquet")
    both = tmp_path / "both"
    _save(both / "x.png", _pixels(1)[0])
    _save(both / "cat" / "x.png", _pixels(1)[0])
    _refused(both, str(both), "cat", "one or the other")
    other = tmp_path / "other"
    _save(other / "train" / "cat" / "x.png", _pixels(1)[0])
    _save(other / "test" / "eel" / "x.png", _pixels(1)[0])
    _refused(other, "eel")
    _save(tmp_path / "half" / "val" / "x.png", _pixels(1)[0])
    _refused(tmp_path / "half", "half: has val, but no train")


# ------------------------------------------------------------------------------------------------------ kinds of image


def test_images_of_every_mode_come_out_alike(tmp_path: Path) -> None:
    colour = _pixels(1, (8, 8, 3))[0]
    picture = Image.fromarray(colour)
    (tmp_path / "train").mkdir()
    picture.save(tmp_path / "train" / "0.png")
    picture.convert("RGBA").save(tmp_path / "train" / "1.png")
    picture.convert("L").save(tmp_path / "train" / "2.png")
    picture.convert("CMYK").save(tmp_path / "train" / "3.tif")
    picture.save(tmp_path / "train" / "4.bmp")
    picture.save(tmp_path / "train" / "5.png")
    _save(tmp_path / "test" / "0.png", colour)
    data = load_dataset("mine", str(tmp_path))
    grey = np.asarray(picture.convert("L"))
    _same(data.images[[0, 1, 4, 5]], [colour] * 4)
    _same(data.images[2:3], [np.repeat(grey[..., None], 3, axis=2)])
    assert data.images.shape == (6, 3, 8, 8)


@pytest.mark.parametrize("size", [(20, 12), (12, 20), (40, 40)])
def test_celeba_hq_is_cropped_to_its_centre_and_scaled(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = _pixels(3, (*size, 3))
    native = _pixels(1, (128, 128, 3))[0]
    for i in range(3):
        _save(tmp_path / f"{i}.png", pixels[i])
    _save(tmp_path / "3.png", native)
    data = load_dataset("celeba_hq_128", str(tmp_path))
    assert data.shape == (3, 128, 128) and data.classes == 1
    edge = min(size)
    top, left = (size[0] - edge) // 2, (size[1] - edge) // 2
    crop = pixels[1][top : top + edge, left : left + edge]
    wanted = np.asarray(Image.fromarray(crop).resize((128, 128), Image.Resampling.BICUBIC))
    _same(data.images[:1], [wanted])
    _same(data.images[2:], [native])  # already of the size: untouched


def test_image_size_scales_any_images(tmp_path: Path) -> None:
    for i in range(3):
        _save(tmp_path / "train" / f"{i}.png", _pixels(1, (9 + i, 14, 3))[0])
    _save(tmp_path / "test" / "0.png", _pixels(1, (30, 30, 3))[0])
    assert load_dataset("mine", str(tmp_path), side=8).shape == (3, 8, 8)


# ------------------------------------------------------------------------------------------------------- bad images


def _with_bad_ones(folder: Path) -> np.ndarray:
    """Ten good images and five bad ones among them."""
    good = _pixels(10)
    for i in range(10):
        _save(folder / "train" / f"{i:02}.png", good[i])
    _save(folder / "test" / "0.png", good[0])
    whole = io.BytesIO()
    Image.fromarray(_pixels(1, (32, 32, 3))[0]).save(whole, "PNG")
    (folder / "train" / "03a.png").write_bytes(b"this is not an image")
    (folder / "train" / "03b.png").write_bytes(whole.getvalue()[:60])
    (folder / "train" / "03c.png").write_bytes(b"")
    _save(folder / "train" / "03d.png", _pixels(1, (6, 7, 3))[0])
    Image.fromarray(np.arange(36, dtype=np.uint16).reshape(6, 6) * 1000).save(folder / "train" / "03e.png")
    return good


def test_bad_images_are_refused_by_name_and_number(tmp_path: Path) -> None:
    _with_bad_ones(tmp_path)
    _refused(tmp_path, "03a.png", "03b.png", "03c.png", "and 2 more", "5 bad in all", "skip")


def test_bad_images_are_skipped_and_counted(tmp_path: Path) -> None:
    good = _with_bad_ones(tmp_path)
    data = load_dataset("mine", str(tmp_path), "skip")
    _same(data.images, good)
    assert data.skipped_count == 5
    assert len(data.skipped) == 3 and "03a.png" in data.skipped[0] and "cannot be decoded" in data.skipped[0]
    # The second start says the same, from the cache.
    load_dataset.cache_clear()
    assert load_dataset("mine", str(tmp_path), "skip").skipped == data.skipped


def test_the_first_image_may_be_the_odd_one(tmp_path: Path) -> None:
    good = _with_bad_ones(tmp_path)
    _save(tmp_path / "train" / "00.png", _pixels(1, (5, 5, 3))[0])
    data = load_dataset("mine", str(tmp_path), "skip")
    _same(data.images, good[1:])
    assert "5x5x3, expected 6x6x3" in data.skipped[0]


@pytest.mark.parametrize("number", [1, 8])
def test_colour_among_grey_is_odd_wherever_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """In the images that settle what the set is, and after them."""
    monkeypatch.setattr(image_cache, "CHUNK", 4)
    for i in range(10):
        _save(tmp_path / "train" / f"{i}.png", _pixels(1, (6, 6, 3) if i == number else (6, 6))[0])
    _save(tmp_path / "test" / "0.png", _pixels(1, (6, 6))[0])
    _refused(tmp_path, f"{number}.png: image is 6x6x3, expected 6x6x1", "1 bad in all")


def test_a_broken_link_is_a_bad_image(tmp_path: Path) -> None:
    for i in range(3):
        _save(tmp_path / "train" / f"{i}.png", _pixels(1)[0])
    _save(tmp_path / "test" / "0.png", _pixels(1)[0])
    (tmp_path / "train" / "8.png").symlink_to(tmp_path / "gone.png")
    _refused(tmp_path, "train/8.png: image cannot be decoded", "1 bad in all")


def test_a_label_beyond_a_known_sets_classes(tmp_path: Path) -> None:
    for i in range(11):
        _save(tmp_path / "train" / f"c{i}" / "0.png", _pixels(1, (32, 32, 3))[0])
    _save(tmp_path / "test" / "c0" / "0.png", _pixels(1, (32, 32, 3))[0])
    _refused(tmp_path, "train/c10/0.png: label is 10, expected one below 10", "1 bad in all", name="cifar10")
    assert load_dataset("mine", str(tmp_path)).classes == 11


def test_images_are_not_read_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in memory at a time is one chunk, however many images there are."""
    monkeypatch.setattr(image_cache, "CHUNK", 5)
    asked: list[int] = []

    def items() -> Any:
        for i in range(1000):
            asked.append(i)
            yield Item(str(i), 0, lambda: _pixels(1)[0])

    usable = image_cache.Reading(None, None, None, None).usable(items())
    for _ in range(7):
        next(usable)
    assert len(asked) == 10


def test_an_odd_image_of_a_known_set_is_not_scaled_away(tmp_path: Path) -> None:
    for i in range(4):
        _save(tmp_path / "train" / "c" / f"{i}.png", _pixels(1, (32, 32, 3))[0])
    _save(tmp_path / "train" / "c" / "9.png", _pixels(1, (40, 32, 3))[0])
    _save(tmp_path / "test" / "c" / "0.png", _pixels(1, (32, 32, 3))[0])
    _refused(tmp_path, "9.png", "40x32x3, expected 32x32x3", name="cifar10")


@pytest.mark.parametrize("label", [-1, 1.5, None, "cat"])
def test_bad_labels(tmp_path: Path, label: Any) -> None:
    out = io.BytesIO()
    Image.fromarray(_pixels(1)[0]).save(out, "PNG")
    cells = [{"bytes": out.getvalue(), "path": None}] * 3
    labels = ["0", str(label), "1"] if isinstance(label, str) else [0, label, 1]
    pq.write_table(pa.table({"img": cells, "label": labels}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"img": cells[:1], "label": [0]}), tmp_path / "test.parquet")
    _refused(tmp_path, "train.parquet: row ", "label is")


def test_parquet_without_labels_is_one_class(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(_pixels(1)[0]).save(out, "PNG")
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        pq.write_table(
            pa.table({"image": [{"bytes": out.getvalue(), "path": None}] * 3}), tmp_path / f"data/{name}.parquet"
        )
    data = load_dataset("mine", str(tmp_path))
    assert (len(data.images), len(data.test_images), data.classes) == (6, 3, 1)


def _parquet(path: Path, pixels: np.ndarray, labels: list[int]) -> None:
    cells = []
    for image in pixels:
        out = io.BytesIO()
        Image.fromarray(image).save(out, "PNG")
        cells.append({"bytes": out.getvalue(), "path": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": cells, "label": labels}), path)


@pytest.mark.parametrize(
    "names",
    [
        ("plain_text/train-00000-of-00001", "plain_text/test-00000-of-00001"),
        ("train/0000", "validation/0000"),
        ("data/train", "data/valid"),
    ],
)
def test_parquet_in_subfolders(tmp_path: Path, names: tuple[str, str]) -> None:
    pixels = _pixels(5)
    _parquet(tmp_path / f"{names[0]}.parquet", pixels[:3], [0, 1, 2])
    _parquet(tmp_path / f"{names[1]}.parquet", pixels[3:], [2, 0])
    data = load_dataset("mine", str(tmp_path))
    _same(data.images, pixels[:3])
    _same(data.test_images, pixels[3:])
    assert data.test_labels.tolist() == [2, 0]


def test_parquet_in_several_subfolders_is_refused(tmp_path: Path) -> None:
    for name in ("large", "small"):
        _parquet(tmp_path / name / "train.parquet", _pixels(2), [0, 1])
    _refused(tmp_path, str(tmp_path), "large, small", "set data_dir to one")


def test_a_test_split_without_its_labels_is_passed_over(tmp_path: Path) -> None:
    """ImageNet's: -1 in every row of `test`; its `validation` has labels."""
    pixels = _pixels(6)
    _parquet(tmp_path / "train.parquet", pixels[:3], [0, 1, 2])
    _parquet(tmp_path / "test.parquet", pixels[3:4], [-1])
    _parquet(tmp_path / "validation.parquet", pixels[4:], [2, 1])
    data = load_dataset("mine", str(tmp_path))
    _same(data.test_images, pixels[4:])
    assert data.test_labels.tolist() == [2, 1]


# ------------------------------------------------------------------------------------------- ImageNet-32's batches


@pytest.mark.parametrize("form", ["pickle", "npz", "protocol 2"])
def test_imagenet32(tmp_path: Path, form: str) -> None:
    pixels = _pixels(14, (32, 32, 3))
    rows = pixels.transpose(0, 3, 1, 2).reshape(14, -1)
    labels = [1, 1000, *range(3, 15)]
    parts = [(f"train_data_batch_{n}", slice(n - 1, n)) for n in range(1, 11)] + [("val_data", slice(10, 14))]
    for name, part in parts:
        content = {"data": rows[part], "labels": labels[part], "mean": rows.mean(0)}
        if form == "npz":
            np.savez(tmp_path / f"{name}.npz", **content)
        else:
            protocol = 2 if form == "protocol 2" else pickle.DEFAULT_PROTOCOL
            (tmp_path / name).write_bytes(pickle.dumps(content, protocol=protocol))
    data = load_dataset("imagenet32", str(tmp_path))
    _same(data.images, pixels[:10])  # batch 2 before batch 10
    assert data.labels.tolist() == [0, 999, *range(2, 10)] and data.test_labels.tolist() == [10, 11, 12, 13]
    assert data.classes == 1000 and data.source.startswith("batches:imagenet32#")


def test_a_missing_batch_is_not_passed_over(tmp_path: Path) -> None:
    for number in (1, 3):
        content = {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [1, 2]}
        (tmp_path / f"train_data_batch_{number}").write_bytes(pickle.dumps(content))
    _refused(tmp_path, "train_data_batch_2 is missing", name="imagenet32")


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hacked",)


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    rows = np.zeros((2, 3072), dtype=np.uint8)
    (folder / "train_data_batch_1").write_bytes(pickle.dumps({"data": rows, "labels": [1, 2], "x": _Evil()}))
    _refused(folder, "train_data_batch_1", "only NumPy arrays", name="imagenet32")
    assert not (tmp_path / "hacked").exists()
    # The file would have done it.
    pickle.loads((folder / "train_data_batch_1").read_bytes())
    assert (tmp_path / "hacked").exists()


def test_labels_of_the_batches_count_from_one(tmp_path: Path) -> None:
    rows = np.zeros((3, 3072), dtype=np.uint8)
    for name, labels in (("train_data_batch_1", [1, 0, 1001]), ("val_data", [1, 2, 3])):
        (tmp_path / name).write_bytes(pickle.dumps({"data": rows, "labels": labels}))
    _refused(tmp_path, "row 1: label is '0, counted from 1'", "row 2: label is 1000", "2 bad in all", name="imagenet32")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps({"data": np.uint8(3), "labels": [1]}),
        pickle.dumps([1, 2]),
        pickle.dumps({"data": np.zeros((2, 10), np.uint8), "labels": [1, 2]}),
    ],
)
def test_damaged_batches(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train_data_batch_1").write_bytes(content)
    _refused(tmp_path, "train_data_batch_1", name="imagenet32")


@pytest.mark.parametrize("name", ["celeba_hq_128", "imagenet32"])
def test_what_cannot_be_downloaded_says_so(name: str) -> None:
    with pytest.raises(DataError, match="set data_dir to a folder of its images"):
        load_dataset(name)
