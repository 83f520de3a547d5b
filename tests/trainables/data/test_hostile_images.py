"""Images from a stranger: no code is run, nothing is read for ever, and what a file claims is not believed."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from trainables.data.datasets import load_dataset
from trainables.data.readers.batches import read_batch
from trainables.data.readers.items import DataError

SIDE = 32
PIXELS = 3 * SIDE * SIDE


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def _png(width: int = 8, height: int = 8, mode: str = "RGB", kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, kind, **options)
    return file.getvalue()


def _claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is of any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


def _refused(data: Path, name: str = "mine", **options: Any) -> str:
    load_dataset.cache_clear()
    with pytest.raises(DataError) as found:
        load_dataset(name, str(data), **options)
    text = str(found.value)
    assert text.startswith(str(data)) and "\n" not in text and len(text) < len(str(data)) * 4 + 500
    return text


# -------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(_claims(60_000, 60_000)), "cannot be decoded"),
        (lambda p: p.write_bytes(_claims(8000, 8000)), "image is 8000x8000, more than 50,000,000 pixels"),
        (lambda p: p.write_bytes(_png(1, 5000)), "image is 5000x1; above 2048 image_size must scale it"),
        (lambda p: p.write_bytes(_png(64, 64)[:60]), "cannot be decoded"),
        (lambda p: p.write_bytes(_png(mode="I;16")), "mode I;16"),
        (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n"), "cannot be decoded"),
        (os.mkfifo, "not a regular file"),
        (lambda p: p.symlink_to("/dev/zero"), "not a regular file"),
        (lambda p: p.symlink_to("/etc/passwd"), "cannot be decoded"),
        (lambda p: p.symlink_to(p), "cannot be decoded"),
    ],
)
def test_an_image_that_is_none_is_named(make: Callable[[Path], Any], message: str, data: Path) -> None:
    for number in range(4):
        (data / f"{number}.png").write_bytes(_png())
    make(data / "x.png")
    text = _refused(data)
    assert f"{data / 'x.png'}: " in text and message in text and "(1 bad in all" in text
    assert load_dataset("mine", str(data), "skip").skipped_count == 1


def test_a_photograph_stands_as_it_is_shown(data: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    picture = Image.fromarray(pixels)
    for number, turned in enumerate((1, 6)):
        exif = picture.getexif()
        exif[0x112] = turned
        picture.save(data / f"{number}.png", exif=exif)
    picture.save(data / "2.png", exif=b"Exif\0\0MM\0*" + b"\xff" * 30)
    found = load_dataset("mine", str(data))
    upright = np.asarray(pixels).transpose(2, 0, 1)
    images = dict(zip("012", [*found.test_images, *found.images], strict=True))
    assert (images["0"].numpy() == upright).all() and (images["2"].numpy() == upright).all()
    assert images["1"][:, :, 4:].eq(255).all() and images["1"][:, :, :4].eq(0).all()


# -------------------------------------------------------------------------------------------------------- Parquet


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (float("nan"), "label is nan"),
        (float("inf"), "label is inf"),
        (-1.5, "label is -1.5"),
        (1e300, "label is 1e+300"),
    ],
)
def test_a_float_that_is_no_label_names_its_row(label: float, said: str, data: Path) -> None:
    labels = pa.array([0.0, 1.0, 0.0, label, 1.0], from_pandas=False)
    pq.write_table(pa.table({"image": [_png()] * 5, "label": labels}), data / "train.parquet")
    assert f"train.parquet: row 3: {said}" in _refused(data)
    found = load_dataset("mine", str(data), "skip")
    assert (found.skipped_count, found.classes) == (1, 2)


@pytest.mark.parametrize(
    ("labels", "said"),
    [([1, 2_700_000_000], "label is 2700000000, expected one below 100000"), ([1, 2**62], "expected one below 100000"),
     (["a" * 10**6] * 2, "label is aaa"), ([[1, 2]] * 2, "label is [1, 2]"), ([b"\x1b[31m"] * 2, "label is b'"),
     ([True] * 2, "label is True")],
)  # fmt: skip
def test_what_is_no_label_is_cut(labels: list[Any], said: str, data: Path) -> None:
    pq.write_table(pa.table({"image": [_png()] * 2, "label": labels}), data / "train.parquet")
    assert said in _refused(data)


def test_a_parquet_file_is_not_believed(data: Path) -> None:
    path = data / "train.parquet"
    with pq.ParquetWriter(path, pa.schema({"image": pa.binary()})) as writer:
        for _ in range(6):
            writer.write_table(pa.table({"image": pa.nulls(10_000_000, pa.binary())}))
    assert "has 60,000,000 rows" in _refused(data)
    long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100, np.int32)), pa.array([b"x" * 11_000_000]))
    pq.write_table(pa.table({"image": long}), path, store_schema=False, compression="zstd")
    assert "image has 11,000,000 encoded bytes" in _refused(data)
    for make in (os.mkfifo, Path.mkdir):
        path.unlink()
        make(path)
        assert "not a regular file" in _refused(data)
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
        path.touch()
    path.unlink()
    path.write_bytes(b"PAR1" + bytes(range(256)) + b"PAR1")
    assert "not a readable Parquet file" in _refused(data)
    pq.write_table(pa.table({"c" * 100_000: [1]}), path)
    assert "needs a column img or image" in _refused(data)


# ------------------------------------------------------------------------------------------- ImageNet-32's batches

WHOLE = {
    "data": np.arange(10 * PIXELS, dtype=np.uint64).astype(np.uint8).reshape(10, PIXELS),
    "labels": np.arange(1, 11),
}


@pytest.mark.parametrize(
    "change",
    [{"data": np.array([{}] * 10)}, {"data": WHOLE["data"].astype(float)}, {"data": np.zeros((10, 7), np.uint8)},
     {"data": np.uint8(1)}, {"data": np.zeros((9, PIXELS), np.uint8)}, {"labels": np.array([1.5] * 10)},
     {"labels": np.array(["a" * 1000] * 10)}, {"labels": np.array([2**62] * 10)}, {"labels": np.array([0] * 10)},
     {"labels": np.array([{}] * 10)}],
)  # fmt: skip
def test_an_npz_batch_of_something_else_is_refused(change: dict[str, Any], data: Path) -> None:
    np.savez_compressed(data / "train_data_batch_1.npz", **WHOLE)
    assert load_dataset("imagenet32", str(data)).images.shape[1:] == (3, SIDE, SIDE)
    np.savez_compressed(data / "train_data_batch_1.npz", **(WHOLE | change))
    _refused(data, "imagenet32")


@pytest.mark.parametrize("shape", [(10**12, PIXELS), (10**30,), (-1, PIXELS), (11, PIXELS)])
def test_an_npz_header_is_compared_with_what_is_behind_it(shape: tuple[int, ...], data: Path) -> None:
    labels, content = io.BytesIO(), io.BytesIO()
    np.save(labels, WHOLE["labels"])
    np.lib.format.write_array_header_1_0(content, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(data / "train_data_batch_1.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data.npy", content.getvalue() + b"\0" * 10 * PIXELS)
        file.writestr("labels.npy", labels.getvalue())
    assert "data.npy claims" in _refused(data, "imagenet32")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("labels", [WHOLE["labels"], list(range(1, 11)), [np.int64(n) for n in range(1, 11)]])
def test_a_pickled_batch_is_read(protocol: int, labels: Any, data: Path) -> None:
    path = data / "train_data_batch_1"
    path.write_bytes(pickle.dumps(WHOLE | {"labels": labels, "mean": np.zeros(PIXELS)}, protocol))
    found = read_batch(path)
    assert np.array_equal(found["data"], WHOLE["data"])
    assert [int(n) for n in found["labels"]] == list(range(1, 11))


class _Call:
    """Asks its reader to call something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _pickled(value: Any) -> bytes:
    return pickle.dumps({"data": value, "labels": [1]}, 2)


HEX = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R."
PICKLES = {
    "code": _pickled(_Call(os.mkdir, "executed")),
    "code in a label": pickle.dumps(WHOLE | {"labels": [_Call(os.mkdir, "executed")]}),
    "an array without content": _pickled(_Call(np.ndarray, (10**12,), "u1")),
    "another array without content": _pickled(_Call(np._core.multiarray._reconstruct, np.ndarray, (10**12,), b"b")),
    "objects": _pickled(np.array([{}, None])),
    "codecs": HEX,
    "a place in a table": b"\x80\x02}r\xff\xff\xff\xff.",
    "10^12 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b"x.",
    "nested": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "ragged": pickle.dumps({"data": [[1], [1, 2]], "labels": [1]}),
    "numbers": pickle.dumps(WHOLE | {"labels": [10**5000] * 10}),
    "list": pickle.dumps([1]),
    "cut": pickle.dumps(WHOLE)[:1000],
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_asks_for_nothing_else(case: str, data: Path, tmp_path: Path) -> None:
    (data / "train_data_batch_1").write_bytes(PICKLES[case])
    _refused(data, "imagenet32")
    assert not (tmp_path / "executed").exists()


def test_a_pipe_is_no_batch(data: Path) -> None:
    os.mkfifo(data / "train_data_batch_1")
    assert "not a regular file" in _refused(data, "imagenet32")


# -------------------------------------------------------------------------------------------- torchvision's files


def test_cifar_of_another_checksum_is_never_unpickled(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import utils

    def no_network(*_arguments: Any, **_options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(utils, "_urlretrieve", no_network)
    batches = data / "cifar-10-batches-py"
    batches.mkdir()
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"):
        (batches / name).write_bytes(pickle.dumps(_Call(os.mkdir, "executed")))
    assert "cifar10 is not there and could not be downloaded" in _refused(data, "cifar10")
    assert not (tmp_path / "executed").exists()
    os.truncate(batches / "data_batch_1", 10**11)
    assert "has more than 500,000,000 bytes" in _refused(data, "cifar10")
