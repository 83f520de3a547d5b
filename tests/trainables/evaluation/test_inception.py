"""Inception's numbers are torch-fidelity's, their references are kept and checked, and their spread is what it is."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import unittest.mock
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from trainables.config.protocols import PROTOCOLS, Protocol
from trainables.config.trial import TrialConfig
from trainables.data.cache import cache_dir
from trainables.data.datasets import ImageData, load_dataset
from trainables.evaluation import frechet, inception
from trainables.evaluation import inception_scores as scoring
from trainables.evaluation import scores as evaluation
from trainables.evaluation.frechet import FrechetToReference, fid_infinity
from trainables.evaluation.inception import INCEPTION_VARIABLE, NoFeaturesError
from trainables.evaluation.inception_scores import (
    ReferenceCache,
    fid_statistics,
    inception_scores,
    reference_images,
    shared_scores,
)
from trainables.training.trainer import Trainer

CPU = torch.device("cpu")
SHARED = Path(__file__).resolve().parents[4] / "shared"
ALL = ("fid", "isc", "kid", "precision", "recall")


class _Images(TensorDataset):
    """What torch-fidelity takes as an input: items are uint8 images."""

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return self.tensors[0][index]


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random Inception weights, made from the network itself without its download."""
    import torch_fidelity.feature_extractor_inceptionv3 as theirs

    path = tmp_path_factory.mktemp("weights") / "random.pth"
    with (
        unittest.mock.patch.object(theirs, "load_state_dict_from_url", lambda *a, **k: None),
        unittest.mock.patch.object(torch.nn.Module, "load_state_dict", lambda self, state: None),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(0)
        network = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def with_random(random_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(INCEPTION_VARIABLE, str(random_weights))
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path / "cache"))
    frechet.DISTANCES.clear()
    return tmp_path / "cache" / "reference"


@pytest.fixture(scope="session")
def real_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The canonical weights, from the environment or made by the shared tool."""
    given = os.environ.get(INCEPTION_VARIABLE)
    if given and Path(given).is_file():
        return Path(given)
    tool, path = SHARED / "tools/inception_weights.py", tmp_path_factory.mktemp("inception") / "weights.pth"
    if not tool.is_file():
        pytest.skip("no Inception weights and no tool to make them")
    made = subprocess.run([sys.executable, str(tool), str(path)], capture_output=True, text=True, timeout=400)
    if made.returncode or not path.is_file():
        pytest.skip("the Inception weights could not be made here")
    return path


def direct(images: Tensor, reference: Tensor, weights: Path, **options: Any) -> dict[str, float]:
    """torch-fidelity called as its documentation says."""
    from torch_fidelity import calculate_metrics

    wanted = {"fid": True, "isc": True, "kid": True, "prc": True} | options
    return calculate_metrics(
        input1=_Images(images), input2=_Images(reference), cuda=False, cache=False, verbose=False,
        feature_extractor_weights_path=str(weights), save_cpu_ram=True, **wanted,
    )  # fmt: skip


@pytest.mark.slow
def test_neighbours_are_those_of_the_features(make_data: Callable[..., ImageData], with_random: Path) -> None:
    from trainables.evaluation.inception import inception
    from trainables.evaluation.neighbours import density_and_coverage, memorisation

    data = make_data(30, (3, 32, 32))
    protocol = replace(PROTOCOLS["buffer-all"], name="t")
    wanted = ("density", "coverage", "memorisation")
    found = inception_scores(data.test_images[:20], data, CPU, protocol, wanted)
    real, held_out, samples = (
        inception().features(x, CPU).pool for x in (data.images, data.test_images, data.test_images[:20])
    )
    share, error = memorisation(real, held_out, samples, protocol.seed)
    assert found.values == pytest.approx(dict(zip(wanted, (*density_and_coverage(real, samples), share), strict=True)))
    assert share < 0.5 and found.errors["memorisation"] == pytest.approx(error)  # they are held-out images themselves


@pytest.mark.slow
def test_every_number_is_torch_fidelitys(
    make_data: Callable[..., ImageData], random_weights: Path, with_random: Path
) -> None:
    data = make_data(30, (3, 32, 32))
    protocol = replace(PROTOCOLS["buffer-all"], name="t", isc_splits=3)
    ours = inception_scores(data.test_images[:24], data, CPU, protocol, ALL[1:])
    theirs = direct(
        data.test_images[:24], data.images, random_weights, fid=False, isc_splits=3, kid_subset_size=24,
        feature_extractor="inception-v3-compat", feature_layer_prc="2048",
    )  # fmt: skip
    names = {
        "isc": "inception_score_mean",
        "isc_sd": "inception_score_std",
        "kid": "kernel_inception_distance_mean",
        "kid_sd": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
    }
    assert set(ours.values) == set(names) and ours.remark is None and ours.samples == 24
    for name, long in names.items():
        assert ours.values[name] == pytest.approx(theirs[long], abs=1e-3), name


@pytest.mark.slow
def test_fid_of_real_images_is_torch_fidelitys(
    real_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (SHARED / "data/cifar10-jpeg/test.parquet").is_file():
        pytest.skip("the CIFAR-10 JPEGs are not here")
    monkeypatch.setenv(INCEPTION_VARIABLE, str(real_weights))
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path / "cache"))
    table = pq.read_table(SHARED / "data/cifar10-jpeg/test.parquet").slice(0, 120)
    (tmp_path / "c").mkdir()
    pq.write_table(table.slice(0, 60), tmp_path / "c" / "train.parquet")
    pq.write_table(table.slice(60), tmp_path / "c" / "test.parquet")
    data = load_dataset("cifar10", str(tmp_path / "c"))
    ours = inception_scores(data.test_images, data, CPU, PROTOCOLS["buffer-all"], ("fid",))
    theirs = direct(data.test_images, data.images, real_weights, isc=False, kid=False, prc=False)
    assert ours.values["fid"] == pytest.approx(theirs["frechet_inception_distance"], abs=1e-3)


def test_features_do_not_depend_on_batches(make_data: Callable[..., ImageData], with_random: Path) -> None:
    images = make_data(7, (3, 32, 32)).images
    network = inception.inception()
    whole, parts = network.features(images, CPU, 7), network.features(images, CPU, 3)
    torch.testing.assert_close(parts.pool, whole.pool, rtol=1e-4, atol=1e-5)
    assert whole.pool.shape == (7, 2048) and whole.logits.shape == (7, 1008) and len(whole) == 7
    grey = network.features(images[:, :1], CPU)
    same = network.features(images[:, :1].repeat(1, 3, 1, 1), CPU)
    assert torch.equal(grey.pool, same.pool)
    assert inception.inception() is network, "built once per process"
    assert network.id.startswith("inception-v3-compat-") and len(network.id) == 20 + 8


CLEAN: dict[int, tuple[list[float], float]] = {
    8: ([255.0, 76.538, 132.8984, 20.3516, 26.3563], 120.99626),
    32: ([255.0, 153.6286, 89.5273, 238.8501, 25.7516], 127.42073),
    512: ([84.1438, 135.3102, 119.0914, 150.2977, 184.2877], 127.40965),
}
"""Of clean-fid 0.1.35, `make_resizer("PIL", False, "bicubic", (299, 299))`: five pixels, and the mean of all."""
PIXELS = ((0, 0, 0), (7, 150, 1), (149, 149, 2), (298, 3, 0), (200, 298, 1))
"""Row, column and channel."""


@pytest.mark.parametrize("side", CLEAN)
def test_images_are_resized_as_by_clean_fid(side: int) -> None:
    shape = (2, 3, side, side)
    images = torch.from_numpy(np.random.default_rng(side).integers(0, 256, shape, dtype=np.uint8))
    found = inception.clean_resize(images)
    pixels, mean = CLEAN[side]
    assert [float(found[0, c, i, j]) for i, j, c in PIXELS] == pytest.approx(pixels, abs=0.005)
    assert float(found.double().mean()) == pytest.approx(mean, abs=1e-4)
    channel = Image.fromarray(images[1, 2].numpy().astype(np.float32), mode="F").resize((299, 299), Image.BICUBIC)
    np.testing.assert_allclose(found[1, 2].numpy(), np.asarray(channel).clip(0, 255), atol=0.005)


def test_clean_resizing_is_another_input_of_the_same_network(
    make_data: Callable[..., ImageData], with_random: Path
) -> None:
    own, clean = inception.inception(), inception.inception("clean-fid")
    assert clean is inception.inception("clean-fid") and clean.id == f"{own.id}-clean-fid"
    images = make_data(3, (3, 299, 299)).images
    first, second = own.features(images, CPU), clean.features(images, CPU)  # resizing to their own size changes nothing
    torch.testing.assert_close(second.pool, first.pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.logits, first.logits, rtol=1e-4, atol=1e-4)
    small = make_data(3, (3, 32, 32))
    assert not torch.allclose(own.features(small.images, CPU).pool, clean.features(small.images, CPU).pool, rtol=1e-3)
    protocols = (PROTOCOLS["fresh-10k"], PROTOCOLS["fresh-10k-clean"])
    ids = {inception_scores(small.images[:2], small, CPU, p, ("isc",)).reference for p in protocols}
    assert len(ids) == 2 and any(name.endswith("-clean-fid") for name in ids), "references are kept apart"


class _Greedy(torch.nn.Module):
    """Takes so many images at a time and no more, as a device with little memory left. Features: the mean pixel."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.sizes = most, []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x.float().mean((2, 3)), x.float().amax((2, 3))


def test_where_memory_is_short_fewer_images_are_taken_at_a_time(make_data: Callable[..., ImageData]) -> None:
    images, network = make_data(23, (3, 8, 8)).images, _Greedy(5)
    found = inception.Inception(network, "x").features(images, CPU, 20)
    assert network.sizes == [20, 10, 5, 5, 5, 5, 3]
    torch.testing.assert_close(found.pool, images.float().mean((2, 3)))
    torch.testing.assert_close(found.logits, images.float().amax((2, 3)))


def test_no_memory_at_all_is_no_fid_and_no_error(
    make_data: Callable[..., ImageData], with_random: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(12, (3, 32, 32))
    monkeypatch.setattr(inception, "_LOADED", {os.environ[INCEPTION_VARIABLE]: inception.Inception(_Greedy(0), "x")})
    (scores,) = evaluation.scores(evaluation.Samples(PROTOCOLS["buffer-all"], data.test_images, data, CPU, "20steps"))
    values, remark = scores.values, scores.remark
    assert values == {} and remark == "no FID: no memory left on cpu for Inception's features"


def test_a_distance_that_the_device_does_not_hold_is_taken_elsewhere(
    make_data: Callable[..., ImageData], with_random: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's tensors are on meta: what is computed there has no value."""

    class Short(FrechetToReference):
        def __init__(self, statistics: Any, device: torch.device | None = None) -> None:
            if device is not None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(statistics, device)

    pool = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    network = inception.Inception(_Greedy(100), "short")
    cache = ReferenceCache(make_data(12, (3, 32, 32)), PROTOCOLS["buffer-all"], network, CPU)
    wanted = cache.measure(pool)
    frechet.DISTANCES.clear()
    monkeypatch.setattr(scoring, "FrechetToReference", Short)
    assert cache.measure(pool) == wanted
    assert wanted[1] is not None


def test_references_that_alternate_are_decomposed_once(make_data: Callable[..., ImageData], with_random: Path) -> None:
    data, network = make_data(12, (3, 32, 32)), inception.Inception(_Greedy(100), "x")
    protocols = [replace(PROTOCOLS["buffer-all"], reference=which) for which in ("train", "test")]
    first, second = ([ReferenceCache(data, p, network, CPU).frechet() for p in protocols] for _ in range(2))
    assert all(a is b for a, b in zip(first, second, strict=True)) and first[0] is not first[1]
    for seed in range(frechet.MAX_DISTANCES):
        other = replace(protocols[0], reference_count=5, seed=seed)
        ReferenceCache(data, other, network, CPU).frechet()
    assert len(frechet.DISTANCES) == frechet.MAX_DISTANCES, "and no more than so many are kept"


def test_a_closed_trainer_takes_the_network_off_its_device(
    quick: Callable[..., TrialConfig], digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Network(torch.nn.Module):
        places: list[str]

        def to(self, device: str) -> Network:  # type: ignore[override]
            self.places.append(device)
            return self

    network = Network()
    network.places = []
    monkeypatch.setattr(inception, "_LOADED", {None: inception.Inception(network, "x")})
    trainer = Trainer(quick(), digits)
    assert network.places == []
    trainer.close()
    assert network.places == ["cpu"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_network_stays_on_its_device_until_it_is_released(
    make_data: Callable[..., ImageData], with_random: Path
) -> None:
    network, device = inception.inception(), torch.device("cuda")
    inception.release()
    images, before = make_data(130, (3, 32, 32)).images, torch.cuda.memory_allocated()
    first = network.features(images, device)
    held = torch.cuda.memory_allocated() - before
    again = network.features(images.to(device), device)
    torch.testing.assert_close(again.pool, first.pool, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.pool, network.features(images, CPU).pool, rtol=1e-3, atol=1e-4)
    assert 80e6 < held < 120e6, "24 million weights"
    inception.release()
    assert torch.cuda.memory_allocated() - before < 1e7


def test_references_are_taken_once_and_shared(
    make_data: Callable[..., ImageData], with_random: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, protocol = make_data(12, (3, 32, 32)), PROTOCOLS["buffer-all"]
    network = inception.inception()
    first = ReferenceCache(data, protocol, network, CPU)
    taken: list[int] = []
    monkeypatch.setattr(
        network, "features", lambda images, *a, take=network.features: taken.append(len(images)) or take(images, *a)
    )
    statistics, pool = first.statistics(), first.pool()
    assert taken == [12], "once for both"
    assert sorted(p.name.rsplit("-", 1)[1] for p in with_random.glob("*.npz")) == ["features.npz", "statistics.npz"]
    broken = inception.Inception(torch.nn.Identity(), network.id)  # would fail if it were asked for features
    again = ReferenceCache(data, protocol, broken, CPU)
    assert torch.equal(again.pool(), pool)
    np.testing.assert_array_equal(again.statistics()["sigma"], statistics["sigma"])
    np.testing.assert_allclose(statistics["mu"], pool.numpy().mean(0), rtol=1e-5, atol=1e-6)
    assert not again.poisoned


def test_what_trials_begin_with_is_scored_once(
    make_data: Callable[..., ImageData], with_random: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, network = make_data(8, (3, 32, 32)), inception.inception()
    images = data.images[:5]
    taken: list[int] = []
    monkeypatch.setattr(
        network, "features", lambda images, *a, take=network.features: taken.append(len(images)) or take(images, *a)
    )
    plain = inception_scores(images, data, CPU, PROTOCOLS["buffer-all"])
    assert taken == [5, 8]
    for expected in ([5], []):
        taken.clear()
        assert shared_scores(images, data, CPU, PROTOCOLS["buffer-all"]) == plain
        assert taken == expected
    for other, protocol in ((images.flip(3), "buffer-all"), (images, "buffer-10k")):
        taken.clear()
        shared_scores(other, data, CPU, PROTOCOLS[protocol])
        assert taken == [5], "other images, or another protocol"
    for file in (cache_dir() / "scores").glob("*.json"):
        file.write_text("{", encoding="utf-8")
    taken.clear()
    assert shared_scores(images, data, CPU, PROTOCOLS["buffer-all"]) == plain and taken == [5]


@pytest.mark.parametrize("damage", ["changed", "truncated", "nonsense"])
def test_a_poisoned_reference_is_noticed(make_data: Callable[..., ImageData], with_random: Path, damage: str) -> None:
    data, protocol = make_data(12, (3, 32, 32)), PROTOCOLS["buffer-all"]
    network = inception.inception()
    truth = ReferenceCache(data, protocol, network, CPU).statistics()
    (path,) = with_random.glob("*statistics.npz")
    if damage == "changed":  # a whole file with a number that was not computed
        with np.load(path) as file:
            content = {name: file[name] for name in file.files}
        content["mu"] = content["mu"] + 0.5
        np.savez(path, **content)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.write_text("nonsense")
    scores = inception_scores(data.test_images[:8], data, CPU, protocol, ("isc",))
    assert scores.remark is None, "not read for an inception score"
    cache = ReferenceCache(data, protocol, network, CPU)
    np.testing.assert_array_equal(cache.statistics()["mu"], truth["mu"])
    assert cache.poisoned
    assert not ReferenceCache(data, protocol, network, CPU).poisoned


def test_another_reference_has_another_file(make_data: Callable[..., ImageData], with_random: Path) -> None:
    data, network = make_data(12, (3, 32, 32)), inception.inception()
    base = PROTOCOLS["buffer-all"]
    others = [
        replace(base, reference="test"),
        replace(base, reference="train+test"),
        replace(base, reference_count=5),
        replace(base, reference_count=5, seed=1),
    ]
    ids = [ReferenceCache(data, p, network, CPU).id for p in (base, *others)]
    ids.append(ReferenceCache(replace(data, test_images=data.test_images[:-1]), others[0], network, CPU).id)
    ids.append(ReferenceCache(make_data(12, (3, 32, 32), seed=1), base, network, CPU).id)
    ids.append(ReferenceCache(data, base, inception.Inception(torch.nn.Identity(), "x"), CPU).id)
    assert len(set(ids)) == len(ids)


def test_reference_images(make_data: Callable[..., ImageData]) -> None:
    data = make_data(12, (3, 32, 32))
    assert torch.equal(reference_images(data, "train", None, 0), data.images)
    assert torch.equal(reference_images(data, "test", None, 0), data.test_images)
    both = reference_images(data, "train+test", None, 0)
    assert torch.equal(both, torch.cat([data.images, data.test_images]))
    five, again, other = (reference_images(data, "train", 5, seed) for seed in (1, 1, 2))
    assert torch.equal(five, again) and not torch.equal(five, other)
    rows = {image.numpy().tobytes() for image in data.images}
    assert len({image.numpy().tobytes() for image in five} & rows) == 5


# ------------------------------------------------------------------------------------------------------- uncertainty


@pytest.fixture(scope="module")
def gaussians() -> tuple[Tensor, dict[str, Any]]:
    """Features of 40 dimensions, correlated, and the statistics of many others that are shifted."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(40, 40, generator=g) / 40**0.5
    reference = torch.randn(60_000, 40, generator=g) @ mix
    pool = torch.randn(2000, 40, generator=g) @ mix * 1.1 + 0.1
    return pool, fid_statistics(reference)


def test_the_quick_distance_is_the_librarys(gaussians: tuple[Tensor, dict[str, Any]]) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    pool, statistics = gaussians
    theirs = fid_statistics_to_metric(fid_features_to_statistics(pool), statistics, False)
    assert FrechetToReference(statistics).distance(pool) == pytest.approx(
        theirs["frechet_inception_distance"], abs=1e-4
    )


def test_infinity_takes_the_bias_away(gaussians: tuple[Tensor, dict[str, Any]]) -> None:
    """The true distance of the two Gaussians is known; at 300 samples FID is far above it, extrapolated it is near."""
    pool, statistics = gaussians
    reference = FrechetToReference(statistics)
    true = float(((1.1 - 1) ** 2) * np.trace(statistics["sigma"]) + 40 * 0.1**2)
    biased = [reference.distance(part) for part in pool.split(300)[:6]]
    better = [fid_infinity(part, reference, seed=0) for part in pool.split(300)[:6]]
    assert min(biased) > true
    assert abs(np.mean(better) - true) < 0.3 * abs(np.mean(biased) - true)
    assert fid_infinity(pool, reference, seed=3) == fid_infinity(pool, reference, seed=3)
    with pytest.raises(ValueError, match="needs 80 samples, but there are 79"):
        fid_infinity(pool[:79], reference, seed=0)


def test_the_error_is_as_large_as_fresh_samples_differ(gaussians: tuple[Tensor, dict[str, Any]]) -> None:
    """The spread over many independent sets of samples against the standard error told from one set."""
    _, statistics = gaussians
    reference, g = FrechetToReference(statistics), torch.Generator().manual_seed(5)
    mix = torch.linalg.cholesky(torch.from_numpy(statistics["sigma"])).float().T
    sets = [torch.randn(400, 40, generator=g) @ mix * 1.1 + 0.1 for _ in range(50)]
    spread = float(np.std([reference.distance(x) for x in sets], ddof=1))
    errors = []
    for x in sets[:10]:
        distance, error = reference.measure(x)
        assert distance == pytest.approx(reference.distance(x), rel=1e-9) and error is not None
        errors.append(error)
    assert 0.7 * spread < np.mean(errors) < 1.7 * spread


@pytest.mark.parametrize(("count", "most"), [(1250, 1.35), (600, 1.7), (200, 2.0)])
def test_the_quick_error_is_the_grouped_jackknifes(count: int, most: float) -> None:
    """At n / d as for 10,000 samples, for 5,000, and below d: never under the true spread, and over it with few."""
    size, groups, rng = 256, 20, np.random.default_rng(0)
    spectrum = 1 / np.arange(1, size + 1)
    turn = np.linalg.qr(np.eye(size) + 0.15 * rng.normal(size=(size, size)) / size**0.5)[0]
    mix, shift = turn * np.sqrt(spectrum * 1.2), rng.normal(0, 0.03, size)
    reference = FrechetToReference({"mu": np.zeros(size), "sigma": np.diag(spectrum)})
    sets = [torch.from_numpy(rng.normal(size=(count, size)) @ mix.T + shift) for _ in range(40)]
    spread = float(np.std([reference.distance(x) for x in sets], ddof=1))
    errors = [error for _, error in (reference.measure(x) for x in sets[:10]) if error is not None]
    assert 0.8 * spread < np.mean(errors) < most * spread
    keep = torch.arange(count) % groups
    left = [reference.distance(sets[0][keep != group]) for group in range(groups)]
    assert errors[0] == pytest.approx(np.std(left) * (groups - 1) ** 0.5, rel=0.5)


def test_the_error_of_an_inception_score(make_data: Callable[..., ImageData], with_random: Path) -> None:
    data = make_data(20, (3, 32, 32))
    found = inception_scores(data.images, data, CPU, PROTOCOLS["buffer-all"], ("isc",))
    assert found.errors["isc"] == pytest.approx(found.values["isc_sd"] / 3)  # the standard error over ten splits
    one = inception_scores(data.images, data, CPU, PROTOCOLS["kl-ebm-10k-ref"], ("isc",))
    assert "isc" in one.values and "isc" not in one.errors


# --------------------------------------------------------------------------------------------------------- protocols


def test_any_changed_field_is_another_protocol() -> None:
    base = PROTOCOLS["paper-mebm"]
    other: dict[str, Any] = {
        "source": "fresh",
        "features": "small",
        "count": 17,
        "top_share": 0.5,
        "rounding": "round",
        "reference": "test",
        "reference_count": 9,
        "isc_splits": 2,
        "seed": 1,
        "resize": "clean-fid",
        "extractor": "dino.py:Dino",
    }
    assert set(other) == {f.name for f in fields(Protocol)} - {"name", "citation"}
    digests = {replace(base, **{name: value}).digest for name, value in other.items()}
    assert len(digests | {base.digest}) == len(other) + 1
    assert replace(base, name="x", citation="y").digest == base.digest


def test_named_protocols_never_change() -> None:
    """A number under a name must mean the same in every version: a new definition needs a new name."""
    assert {p.name: p.digest for p in PROTOCOLS.values()} == PINNED


PINNED: dict[str, str] = {
    "small-buffer": "a1238aa0",
    "small-fresh": "a12ef0f5",
    "paper-mebm": "813df870",
    "paper-mjem": "ef1bf890",
    "buffer-all": "a25ccde7",
    "buffer-10k": "ed81d70c",
    "buffer-60k-ref": "22648754",
    "fresh-10k": "5d4bc939",
    "fresh-50k": "c7e13aeb",
    "igebm-60k-ref": "a69d3669",
    "kl-ebm-10k-ref": "263b6c80",
    "buffer-test-ref": "6274f15f",
    "buffer-10k-clean": "3cc1614a",
    "fresh-10k-clean": "1494d289",
    "fresh-50k-clean": "b6068919",
}


def test_missing_weights_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INCEPTION_VARIABLE, str(tmp_path / "none.pth"))
    with pytest.raises(NoFeaturesError, match=r"none\.pth is not a file") as error:
        inception.inception()
    assert "\n" not in str(error.value)


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("place", ["named", "downloaded"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_code_in_a_file_of_weights_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, form: str
) -> None:
    """torch-fidelity's own reading would run it, also that of a file which lies where its download goes."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    marker = tmp_path / "executed"
    path = tmp_path / "hub" / "checkpoints" / Path(URL_INCEPTION_V3).name
    path.parent.mkdir(parents=True)
    if form == "pickle":
        path.write_bytes(pickle.dumps(Bomb(marker), 2))
    else:
        torch.save({"fc.weight": Bomb(marker)}, path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "_MISSING", {})
    if place == "named":
        monkeypatch.setenv(INCEPTION_VARIABLE, str(path))
    else:
        monkeypatch.delenv(INCEPTION_VARIABLE, raising=False)
    with pytest.raises(NoFeaturesError) as error:
        inception._load(str(path) if place == "named" else None)
    assert "\n" not in str(error.value)
    assert not marker.exists()
    with contextlib.suppress(Exception):  # read without the flag it runs
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_every_option_is_one_that_torch_fidelity_knows() -> None:
    """It ignores a misspelt keyword without a word, and takes its default."""
    import re

    from torch_fidelity.defaults import DEFAULTS

    source = "".join(Path(m.__file__).read_text(encoding="utf-8") for m in (inception, scoring))
    used = set(re.findall(r'"((?:kid|prc|isc|rng|save|feature|verbose)[a-z_]*)": ', source))
    used |= set(re.findall(r'"(feature_extractor_weights_path|cuda)": ', source))
    assert {"kid_subsets", "kid_subset_size", "rng_seed", "prc_neighborhood", "save_cpu_ram", "verbose"} <= used
    assert used - {"isc", "kid", "isc_sd", "kid_sd"} <= set(DEFAULTS)
