"""Readers, batches and augmentation, on real files."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from trainables.data.batches import Batches, crop_flip
from trainables.data.datasets import ImageData, load_dataset, refuse_unknown, to_float
from trainables.data.readers.items import DataError

CIFAR_JPEG = Path(__file__).resolve().parents[4] / "shared/data/cifar10-jpeg"


# --------------------------------------------------------------------------------------------------------------- digits


def test_digits(digits: ImageData) -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    assert digits.shape == (1, 8, 8) and digits.classes == 10
    assert (len(digits.images), len(digits.test_images)) == (1437, 360)
    assert digits.images.dtype == torch.uint8 and digits.labels.dtype == torch.int64
    assert digits.images.stride() == (64, 64, 8, 1), "not like channels-last"
    assert digits.images.min() == 0 and digits.images.max() == 255
    # Every image is there once, and its sixteen levels come back from the bytes.
    back = torch.cat([digits.images, digits.test_images]).squeeze(1).numpy() / 255 * 16
    labels = torch.cat([digits.labels, digits.test_labels]).numpy()
    assert abs(back - back.round()).max() < 0.04
    both = sorted((int(label), image.round().astype(int).tobytes()) for label, image in zip(labels, back, strict=True))
    wanted = sorted(
        (int(label), image.astype(int).tobytes()) for label, image in zip(raw.target, raw.images, strict=True)
    )
    assert both == wanted
    for split in (digits.labels, digits.test_labels):
        assert torch.bincount(split, minlength=10).min() > 0.07 * len(split)


def test_float_range(digits: ImageData) -> None:
    x = to_float(digits.images)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    levels = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(to_float(levels), (levels.float() / 255 - 0.5) / 0.5)  # ToTensor, Normalize(.5, .5)


def test_source_names_the_reader_and_the_content(digits: ImageData) -> None:
    assert digits.source == f"sklearn:digits#{digits.fingerprint}"
    assert len(digits.fingerprint) >= 8


@pytest.mark.parametrize("name", ["digit", "cifar-10", "imagenet"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(DataError) as error:
        load_dataset(name)
    text = _one_line(error)
    assert name in text and "digits" in text and "data_dir" in text
    if name != "imagenet":
        assert "did you mean" in text


# -------------------------------------------------------------------------------------------------------------- Parquet


def _one_line(error: pytest.ExceptionInfo[DataError], *needles: str) -> str:
    text = str(error.value)
    assert "\n" not in text and text
    for needle in needles:
        assert needle in text, (needle, text)
    return text


def _encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return out.getvalue()


def _pixels(count: int, shape: tuple[int, ...] = (6, 6, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def _write(path: Path, images: list[Any], labels: list[Any], image: str = "img", label: str = "label") -> None:
    cells = [{"bytes": b, "path": None} for b in images] if image == "img" else images
    pq.write_table(pa.table({image: cells, label: labels}), path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("image", ["img", "image"])
@pytest.mark.parametrize("shape", [(6, 6, 3), (6, 6)], ids=["colour", "grey"])
@pytest.mark.parametrize("label", ["label", "fine_label"])
def test_parquet(tmp_path: Path, kind: str, image: str, shape: tuple[int, ...], label: str) -> None:
    pixels = _pixels(9, shape)
    encoded = [_encode(p, kind) for p in pixels]
    _write(tmp_path / "train-00000-of-00002.parquet", encoded[:4], [0, 1, 2, 3], image, label)
    _write(tmp_path / "train-00001-of-00002.parquet", encoded[4:6], [4, 0], image, label)
    _write(tmp_path / "test-00000-of-00001.parquet", encoded[6:], [1, 6, 3], image, label)
    data = load_dataset("mine", str(tmp_path))
    truth = pixels if kind == "PNG" else np.stack([np.asarray(Image.open(io.BytesIO(b))) for b in encoded])
    truth = truth[:, None] if len(shape) == 2 else truth.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(data.images.numpy(), truth[:6])
    np.testing.assert_array_equal(data.test_images.numpy(), truth[6:])
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 0] and data.test_labels.tolist() == [1, 6, 3]
    assert data.classes == 7 and data.images.is_contiguous()
    assert data.source.startswith("parquet:mine#")


def test_parquet_without_a_test_split_holds_some_out(tmp_path: Path) -> None:
    pixels = _pixels(30)
    _write(tmp_path / "train.parquet", [_encode(p) for p in pixels], [i % 3 for i in range(30)])
    data = load_dataset("mine", str(tmp_path))
    assert (len(data.images), len(data.test_images)) == (27, 3)
    held = [0, 10, 20]  # every tenth: files sorted by class still hold out some of each
    np.testing.assert_array_equal(data.test_images.permute(0, 2, 3, 1).numpy(), pixels[held])
    np.testing.assert_array_equal(data.images.permute(0, 2, 3, 1).numpy(), np.delete(pixels, held, axis=0))


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    encoded = [_encode(p) for p in _pixels(6)]
    prints = []
    for i, labels in enumerate(([0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 0, 1], [1, 1, 0, 1, 0, 1])):
        folder = tmp_path / str(i)
        folder.mkdir()
        _write(folder / "train.parquet", encoded, labels)
        _write(folder / "test.parquet", encoded, [0] * 6)
        prints.append(load_dataset("mine", str(folder)).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def _broken(folder: Path, case: str) -> tuple[str, ...]:
    """Writes a broken data set, and gives what the message must name."""
    train, test = folder / "train.parquet", folder / "test.parquet"
    good = [_encode(p) for p in _pixels(4)]
    _write(test, good, [0, 1, 0, 1])
    match case:
        case "garbage":
            train.write_bytes(b"PAR1 this is not one")
        case "empty file":
            train.write_bytes(b"")
        case "cut off":
            _write(train, good, [0, 1, 0, 1])
            train.write_bytes(train.read_bytes()[:-30])
        case "no image column":
            pq.write_table(pa.table({"picture": good, "label": [0] * 4}), train)
            return str(train), "picture"
        case "no rows":
            pq.write_table(pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), train)
        case "undecodable image":
            _write(train, [*good[:2], b"not an image", good[3]], [0, 1, 0, 1])
            return str(train), "row 2"
        case "truncated image":
            _write(train, [*good[:3], good[3][:40]], [0, 1, 0, 1])
            return str(train), "row 3"
        case "null image":
            _write(train, [*good[:3], None], [0, 1, 0, 1])
            return str(train), "row 3"
        case "null cell":
            _write(train, [*good[:3], None], [0, 1, 0, 1], image="image")
            return str(train), "row 3"
        case "other size":
            _write(train, [*good[:3], _encode(_pixels(1, (5, 6, 3))[0])], [0, 1, 0, 1])
            return str(train), "row 3"
        case "colour among grey":
            _write(train, [*(_encode(p) for p in _pixels(3, (6, 6))), good[0]], [0, 1, 0, 1])
            return str(train), "row 3"
        case "null label":
            _write(train, good, [0, None, 0, 1])
            return str(train), "row 1"
        case "negative label":
            _write(train, good, [0, 1, -1, 1])
            return str(train), "row 2", "-1"
        case "text label":
            _write(train, good, ["cat", "dog", "cat", "dog"])
            return str(train), "cat"
        case "fractional label":
            _write(train, good, [0.0, 1.5, 0.0, 1.0])
            return str(train), "1.5"
        case "pixel lists":
            pq.write_table(pa.table({"image": [[1, 2], [3, 4]], "label": [0, 1]}), train)
            return str(train), "row 0"
        case "no train file":
            return str(folder), "train"
        case "splits of other sizes":
            _write(train, [_encode(p) for p in _pixels(4, (5, 5, 3))], [0, 1, 0, 1])
            return (str(folder),)
    return (str(train),)


BROKEN = [
    "garbage",
    "empty file",
    "cut off",
    "no image column",
    "no rows",
    "undecodable image",
    "truncated image",
    "null image",
    "null cell",
    "other size",
    "colour among grey",
    "null label",
    "negative label",
    "text label",
    "fractional label",
    "pixel lists",
    "no train file",
    "splits of other sizes",
]


@pytest.mark.parametrize("case", BROKEN)
def test_broken_parquet(tmp_path: Path, case: str) -> None:
    needles = _broken(tmp_path, case)
    with pytest.raises(DataError) as error:
        load_dataset("mine", str(tmp_path))
    _one_line(error, *needles)


def test_missing_folder_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        load_dataset("mine", str(tmp_path / "nowhere"))
    _one_line(error, "nowhere")
    with pytest.raises(DataError) as error:
        load_dataset("mine", str(tmp_path))
    _one_line(error, str(tmp_path), "parquet")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(DataError) as error:
        load_dataset("mine", str(file))
    _one_line(error, str(file))


def test_real_cifar_jpegs(tmp_path: Path) -> None:
    if not (CIFAR_JPEG / "test.parquet").is_file():
        pytest.skip("the CIFAR-10 JPEGs are not here")
    table = pq.read_table(CIFAR_JPEG / "test.parquet").slice(0, 600)
    pq.write_table(table.slice(0, 400), tmp_path / "train.parquet")
    pq.write_table(table.slice(400), tmp_path / "test.parquet")
    data = load_dataset("cifar10", str(tmp_path))
    assert data.shape == (3, 32, 32) and data.classes == 10
    assert (len(data.images), len(data.test_images)) == (400, 200)
    assert data.labels.tolist() == table["label"].to_pylist()[:400]
    cell = table["img"][7].as_py()["bytes"]
    np.testing.assert_array_equal(
        data.images[7].permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(cell)).convert("RGB"))
    )
    assert 0.35 < data.images.float().mean() / 255 < 0.6


# ---------------------------------------------------------------------------------------------------------- torchvision


@pytest.fixture
def fake_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., np.ndarray]:
    """A tiny archive in the layout of cifar-10-python.tar.gz; only the list of checksums is not the real one."""
    from torchvision.datasets import CIFAR10

    def make() -> np.ndarray:
        pixels = _pixels(12, (3072,), seed=5)
        base = tmp_path / CIFAR10.base_folder
        base.mkdir()
        parts = {f"data_batch_{i + 1}": slice(2 * i, 2 * i + 2) for i in range(5)} | {"test_batch": slice(10, 12)}
        sums = {}
        for name, part in parts.items():
            labels = [i % 10 for i in range(*part.indices(12))]
            (base / name).write_bytes(pickle.dumps({"data": pixels[part], "labels": labels}))
            sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
        meta = pickle.dumps({"label_names": list("abcdefghij")})
        (base / "batches.meta").write_bytes(meta)
        monkeypatch.setattr(CIFAR10, "train_list", [[n, s] for n, s in sums.items() if n != "test_batch"])
        monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
        monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": hashlib.md5(meta).hexdigest()})
        return pixels

    return make


def test_torchvision_cifar(tmp_path: Path, fake_cifar: Callable[..., np.ndarray]) -> None:
    pixels = fake_cifar()
    data = load_dataset("cifar10", str(tmp_path))
    assert (len(data.images), len(data.test_images), data.classes) == (10, 2, 10)
    np.testing.assert_array_equal(data.images.numpy(), pixels[:10].reshape(10, 3, 32, 32))
    np.testing.assert_array_equal(data.test_images.numpy(), pixels[10:].reshape(2, 3, 32, 32))
    assert data.labels.tolist() == list(range(10)) and data.images.is_contiguous()
    assert data.source.startswith("torchvision:cifar10#")


def test_a_second_start_does_not_open_torchvisions_files(
    tmp_path: Path, fake_cifar: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    fake_cifar()
    first = load_dataset("cifar10", str(tmp_path))
    # Nothing was written beside the files: they may lie in a folder that only others can write to.
    assert [p.name for p in tmp_path.iterdir()] == [CIFAR10.base_folder]
    load_dataset.cache_clear()
    monkeypatch.setattr(CIFAR10, "__init__", lambda *a, **k: pytest.fail("opened again"))
    again = load_dataset("cifar10", str(tmp_path))
    assert again.source == first.source and torch.equal(again.images, first.images)


def test_torchvision_data_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that fails (nobody listens at this address) is one line that says what to do."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    root = tmp_path / "root"
    with pytest.raises(DataError) as error:
        load_dataset("cifar10", str(_made(root)))
    _one_line(error, str(root), "cifar10", "data_dir")
    (root / "cifar-10-python.tar.gz").write_bytes(b"damaged")
    load_dataset.cache_clear()
    with pytest.raises(DataError) as error:
        load_dataset("cifar10", str(root))
    _one_line(error, str(root))


def test_torchvision_unpacks_a_local_archive(
    tmp_path: Path, fake_cifar: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive alone is enough: no download."""
    from torchvision.datasets import CIFAR10

    pixels = fake_cifar()
    root = _made(tmp_path / "root")
    with tarfile.open(root / CIFAR10.filename, "w:gz") as archive:
        archive.add(tmp_path / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((root / CIFAR10.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    data = load_dataset("cifar10", str(root))
    np.testing.assert_array_equal(data.test_images.numpy(), pixels[10:].reshape(2, 3, 32, 32))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# ------------------------------------------------------------------------------------------------ batches, augmentation


def _twin(generator: torch.Generator) -> torch.Generator:
    copy = torch.Generator()
    copy.set_state(generator.get_state())
    return copy


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (2, 5, 7)])
def test_crop_flip_is_pad_crop_flip(shape: tuple[int, int, int]) -> None:
    images = torch.from_numpy(_pixels(50, shape))
    generator = torch.Generator().manual_seed(3)
    twin = _twin(generator)
    before = images.clone()
    got = crop_flip(images, generator)
    offsets = torch.randint(0, 9, (2, 50), generator=twin).numpy()
    flips = (torch.rand(50, generator=twin) < 0.5).numpy()
    _, h, w = shape
    for i in range(50):
        padded = np.pad(images[i].numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
        top, left = offsets[0, i], offsets[1, i]
        crop = padded[:, top : top + h, left : left + w]
        np.testing.assert_array_equal(got[i].numpy(), crop[:, :, ::-1] if flips[i] else crop)
    assert 10 < flips.sum() < 40 and set(offsets.ravel()) == set(range(9))
    assert torch.equal(images, before) and got.dtype == torch.uint8 and got.shape == images.shape


@pytest.mark.parametrize("side", [1, 2, 4])
def test_crop_flip_of_images_smaller_than_its_padding(side: int) -> None:
    """Reflection is not defined there; what comes out must at least be an image made of the image's pixels."""
    images = torch.from_numpy(_pixels(60, (1, side, side)))
    try:
        got = crop_flip(images, torch.Generator().manual_seed(0))
    except ValueError:
        return
    for image, result in zip(images, got, strict=True):
        assert set(result.flatten().tolist()) <= set(image.flatten().tolist())


@pytest.mark.parametrize(("count", "size"), [(10, 3), (12, 4), (7, 7)])
def test_a_pass_is_a_permutation_without_its_rest(count: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = Batches(count, size, generator)
    passes = []
    for _ in range(20):
        drawn = torch.cat([batches.next() for _ in range(count // size)])
        assert len(set(drawn.tolist())) == len(drawn) == count // size * size
        assert drawn.min() >= 0 and drawn.max() < count
        passes.append(drawn.tolist())
    assert len({tuple(p) for p in passes}) == 20, "each pass has its own order"
    assert {i for p in passes for i in p} == set(range(count)), "what is dropped changes from pass to pass"


def test_batches_resume(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = Batches(10, 3, generator)
    for skip in range(8):
        torch.save({"b": batches.state_dict(), "g": generator.get_state()}, tmp_path / "state")
        wanted = [batches.next() for _ in range(7)]
        state = torch.load(tmp_path / "state", weights_only=True)
        other = torch.Generator().manual_seed(99)
        again = Batches(10, 3, other)
        other.set_state(state["g"])
        again.load_state_dict(state["b"])
        assert all(torch.equal(a, again.next()) for a in wanted), skip


def test_batch_larger_than_the_data() -> None:
    with pytest.raises(DataError, match="128"):
        Batches(100, 128, torch.Generator())


def test_a_folder_without_images_is_refused_before_anything_is_read(tmp_path):
    """By a look at names: torchvision's own files, an empty folder for them, and any images at all are let through."""
    refuse_unknown("cifar10", str(tmp_path))
    (tmp_path / "README.md").write_text("", encoding="utf-8")
    said = f"{tmp_path}: no cifar-10-batches-py, no train*.parquet, no train_data_batch_* and no image files in it"
    with pytest.raises(DataError, match=re.escape(said)):
        refuse_unknown("cifar10", str(tmp_path))
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}: no train*.parquet, ")):
        refuse_unknown("mine", str(tmp_path))
    refuse_unknown("cifar10", str(tmp_path), remote=True)
    for name in ("cifar-10-batches-py/data_batch_1", "train/cat/1.png", "train-0.parquet", "train_data_batch_1"):
        place = tmp_path / name.replace("/", "_")
        (place / name).parent.mkdir(parents=True)
        (place / name).write_bytes(b"not looked into")
        refuse_unknown("cifar10", str(place))
    refuse_unknown("cifar10", str(tmp_path / "cifar-10-batches-py_data_batch_1" / "cifar-10-batches-py"))
