"""`mebm score`: the same images in any form score the same, stand in their row, and what is wrong is one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from analysis.results.load import load, read_scores
from analysis.tables.paper import build_tables, write_tables
from study.models.sample import _png
from trainables.config.protocols import PROTOCOLS
from trainables.data.datasets import load_dataset
from trainables.evaluation.small_features import small_extractor
from trainables.models.sample_sets import read_samples


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Held-out digits, uint8 (120, 8, 8, 1)."""
    return load_dataset("digits").test_images[:120].permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture(scope="module")
def forms(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images in every form that is read."""
    place = tmp_path_factory.mktemp("forms")
    first = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    found = {name: place / name for name in ("a.npz", "b.npz", "c.npy", "d.parquet", "e.pt", "f.pt", "g.pt", "h.npy")}
    np.savez(found["a.npz"], arr_0=images, labels=np.zeros(120))
    np.savez(found["b.npz"], whatever=first.numpy())
    np.save(found["c.npy"], images[..., 0])
    pq.write_table(pa.table({"image": [_png(i.transpose(2, 0, 1)) for i in images]}), found["d.parquet"])
    torch.save(first, found["e.pt"])
    torch.save({"samples": first.float() / 127.5 - 1}, found["f.pt"])
    torch.save(first.float() / 255, found["g.pt"])
    np.save(found["h.npy"], images.astype(np.float64) / 255)
    found["folder"] = place / "folder"
    for number, image in enumerate(images):  # natural order: img2 before img10
        path = found["folder"] / "sub" / f"img{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    return found


def test_every_form_has_the_same_pixels_and_hash(forms: dict[str, Path], images: np.ndarray) -> None:
    read = {name: read_samples(path, (1, 8, 8)) for name, path in forms.items()}
    for name, found in read.items():
        assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), images), name
        assert (found.remark is not None) == (name in ("f.pt", "g.pt", "h.npy")), name
    assert len({found.digest for found in read.values()}) == 1
    assert read_samples(forms["a.npz"], (3, 8, 8)).images.shape == (120, 3, 8, 8)


def test_a_score_is_the_extractors_and_is_not_taken_twice(forms: dict[str, Path], images: np.ndarray, tmp_path: Path, run_mebm) -> None:  # fmt: skip
    out = tmp_path / "scores" / "scores.parquet"
    told = ("score", forms["a.npz"], "-p", "small-fresh", "--as", "toy", "--reference", "digits", "--out", out)
    code, text, err = run_mebm(*told, "--json")
    assert code == 0, err
    (row,) = json.loads(text)["rows"]
    value, se = small_extractor(load_dataset("digits")).score(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
    assert (row["value"], row["se"], row["samples"], row["metric"]) == (value, se, 120, "fd")
    assert row["departures"] == "120 images in place of 1,000"
    before = out.read_bytes()
    code, text, err = run_mebm(*told)
    assert code == 0 and out.read_bytes() == before
    assert ("toy on digits is in no row of Tables 1-4" in text and "0.1" in text) or "in place of" in text
    assert len(read_scores(out)) == 1 and str(tmp_path) not in str(read_scores(out).to_dict())
    code, _, err = run_mebm(*told[:1], forms["a.npz"], forms["e.pt"], *told[2:])
    assert code == 2 and "the same images as" in err


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: np.save(p / "x.npy", np.zeros((50, 9, 9), np.uint8)), "expected images of 8x8x1"),
        (lambda p: np.save(p / "x.npy", np.zeros((50, 8, 8), np.int64)), "int64, expected uint8 or floats"),
        (lambda p: np.save(p / "x.npy", np.full((50, 8, 8), 3.0)), "floats from 3 to 3, expected [0, 1]"),
        (lambda p: np.save(p / "x.npy", np.full((50, 8, 8), np.nan)), "not finite"),
        (lambda p: np.save(p / "x.npy", np.zeros((0, 8, 8), np.uint8)), "no images"),
        (lambda p: np.save(p / "x.npy", np.zeros((9, 8, 8), np.uint8)), "9 images; a score needs at least"),
        (lambda p: np.save(p / "x.npy", np.array([{}]), allow_pickle=True), "cannot be read"),
        (lambda p: np.savez(p / "x.npz", a=np.zeros(3), b=np.zeros(3)), "expected one array, or one named images"),
        (lambda p: (p / "x.npz").write_bytes(b"nothing"), "cannot be read"),
        (lambda p: (p / "x.pt").write_bytes(b"nothing"), "cannot be read"),
        (lambda p: (p / "x.tar").write_bytes(b"nothing"), "expected a folder of images or a file of"),
        (lambda p: (p / "x").mkdir(), "no image files in it"),
        (lambda p: None, "no such file or folder"),
    ],
)
def test_what_is_wrong_is_one_line(make, said: str, tmp_path: Path, run_mebm) -> None:
    make(tmp_path)
    path = next(tmp_path.iterdir(), tmp_path / "x")
    out = tmp_path / "out" / "scores.parquet"
    code, _, err = run_mebm("score", path, "-p", "small-fresh", "--as", "x", "--reference", "digits", "--out", out)
    assert code == 2 and said in err and err.count("\n") == 1 and not out.exists(), err


def test_an_extractor_that_fails_is_one_line(forms: dict[str, Path], tmp_path: Path, monkeypatch, run_mebm) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path / "cache"))
    Path("nets.py").write_text(
        "def fails():\n    return lambda images: images.no_such()\n"
        "def flat():\n    return lambda images: images.float()\n"
        "def late():\n"  # the 120 samples come first, 50 at a time, and then the reference
        "    seen = []\n"
        "    def features(images):\n"
        "        seen.append(len(images))\n"
        "        return images.float().mean(2)[:, 0] * (1 if sum(seen) <= 120 else float('nan'))\n"
        "    return features\n"
    )
    for name, said in (("fails", "no_such"), ("flat", "gives (50, 3, 8, 8) of 50 images, expected")):
        told = ("-p", f"fresh-10k@nets.py:{name}", "--as", "toy", "--reference", "digits", "--out", tmp_path / "o")
        code, _, err = run_mebm("score", forms["a.npz"], *told)
        assert code == 2 and said in err and err.count("\n") == 1, err
    told = ("-p", "fresh-10k@nets.py:late", "--as", "toy", "--reference", "digits", "--out", tmp_path / "o")
    code, out, err = run_mebm("score", forms["a.npz"], *told, "--json")
    assert code == 0, err
    said = "the extractor's features of the reference images (train) are not finite"
    assert {r["remark"] for r in json.loads(out)["rows"]} == {"no fd: " + said, "no mmd: " + said}


def test_options_are_checked(forms: dict[str, Path], run_mebm) -> None:
    base = ("score", forms["a.npz"], "--reference", "digits")
    for more, said in (
        (("-p", "fresh-10", "--as", "x"), "did you mean fresh-10k"),
        (("--as", "x"), "name at least one"),
        (("-p", "fresh-10k", "--as", "x", "--metrics", "fit"), "did you mean fid"),
        (("-p", "fresh-10k", "--as", " "), "--as: name the model"),
    ):
        code, _, err = run_mebm(*base, *more)
        assert code == 2 and said in err, err
    code, _, err = run_mebm("score", forms["a.npz"], "-p", "fresh-10k", "--as", "x", "--reference", "cifar-10")
    assert code == 2 and "did you mean cifar10" in err


def _rows(model: str, digest: str, value: float, **fields) -> dict:
    base = {
        "model": model, "source": f"{digest}.npz", "digest": digest * 16, "dataset": "cifar10",
        "data_source": "torchvision:cifar10#0", "protocol": "fresh-50k",
        "protocol_digest": PROTOCOLS["fresh-50k"].digest, "samples": 50_000, "metric": "fid", "value": value,
        "se": 0.1, "reference": "r", "departures": None, "remark": None, "seconds": 1.0, "device": "cpu",
        "created_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    return base | fields


def test_image_sets_fill_their_row_and_no_other(tmp_path: Path) -> None:
    from analysis.results.parquet import typed_frame, write_parquet
    from trainables.results.schema import SCORE_COLUMNS

    rows = [
        _rows("DDPM", "aaaa", 3.0), _rows("DDPM", "bbbb", 4.0), _rows("DDPM", "aaaa", 9.5, metric="isc"),
        _rows("DDPM", "cccc", 50.0, protocol="fresh-10k", protocol_digest="x"),
        _rows("SNGAN", "dddd", 20.0, dataset="cifar100", departures="900 images in place of 50,000", data_source="folder:x#1"),
        _rows("nobody's", "eeee", 1.0),
        # Features of somebody's own give many numbers, none of them this table's.
        *(_rows("DDPM", "aaaa", 1.0, protocol="fresh-50k@n.py:f-0", protocol_digest="y", metric=m)
          for m in ("fd", "mmd", "kid", "kid_sd", "precision", "recall")),
    ]  # fmt: skip
    (tmp_path / "scores").mkdir()
    write_parquet(typed_frame(rows, SCORE_COLUMNS), SCORE_COLUMNS, tmp_path / "scores" / "scores.parquet")
    results = load(tmp_path)
    tables = build_tables(results)
    filled = {
        (n, r["model"], r["dataset"]): r
        for n in (1, 2, 3, 4)
        for r in tables[f"table_{n}"].to_dict("records")
        if r["fid_n"]
    }
    ddpm = filled.pop((1, "DDPM", "cifar10"))
    assert (ddpm["fid_mean"], ddpm["fid_n"], ddpm["inception_score_n"]) == (3.5, 2, 1)
    assert ddpm["fid_trial_ids"] == "aaaa.npz#aaaaaaaaaaaa, bbbb.npz#bbbbbbbbbbbb" and not ddpm["comparable"]
    assert "fresh-10k are left out" in ddpm["comparable_reason"] and ddpm["fid_published"] is not None
    assert all(row["model"] == "SNGAN" and row["dataset"] == "cifar100" for row in filled.values())
    for row in filled.values():
        assert "900 images in place of 50,000" in row["comparable_reason"] and "folder:x#1" in row["comparable_reason"]
    written = write_tables(results, tmp_path / "tables")
    text = next(p for p in written if p.name == "table_1.md").read_text()
    assert "3.50 ± 0.71 (2)" in text and "nobody" not in text
    assert pd.read_parquet(tmp_path / "tables" / "table_1.parquet")["fid_n"].sum() == 2
