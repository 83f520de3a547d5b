"""Quality numbers (notes/small_study.md section c, algorithms.md section 2.9)."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor, nn

from trainables.config.protocols import PROTOCOLS
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData, load_dataset, to_float
from trainables.evaluation import inception
from trainables.evaluation import scores as evaluation
from trainables.evaluation import small_features as features
from trainables.evaluation.frechet import frechet_distance, sampling_error, statistics
from trainables.evaluation.inception import INCEPTION_VARIABLE
from trainables.evaluation.scores import (
    Samples,
    Scores,
    accuracy,
    choose,
    confidences,
    eval_mode,
    frozen_statistics,
    most_confident,
    protocols_for,
    to_uint8,
)
from trainables.evaluation.scores import (
    scores as scores_of,
)
from trainables.evaluation.small_features import SmallExtractor, small_extractor
from trainables.networks.energy_model import EnergyModel, build_network
from trainables.results.metric import of_samples
from trainables.sampling.initial import build_initial

CIFAR_JPEG = Path(__file__).resolve().parents[4] / "shared/data/cifar10-jpeg"
Quick = Callable[..., TrialConfig]


@pytest.fixture(scope="module")
def p0(digits: ImageData) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {kind: build_initial(kind, digits, 1e-4).sample(1000, g) for kind in ("gaussian", "uniform")}


def _fd(extractor: SmallExtractor, images: Tensor) -> float:
    return frechet_distance(*statistics(extractor.features(images)), extractor.mean, extractor.covariance)


def _accuracy(extractor: SmallExtractor, data: ImageData) -> float:
    with torch.no_grad():
        guessed = extractor.network(to_float(data.test_images)).argmax(1)
    return float((guessed == data.test_labels).double().mean())


def test_fd_orders_data_p0_and_uniform(digits: ImageData, p0: dict[str, Tensor]) -> None:
    extractor = small_extractor(digits)
    x = to_float(digits.images)
    assert _accuracy(extractor, digits) > 0.95
    whole = _fd(extractor, x)
    assert whole == pytest.approx(0, abs=1e-3)
    half = _fd(extractor, x[::2])
    held_out = _fd(extractor, to_float(digits.test_images))
    gaussian, uniform = (_fd(extractor, p0[k]) for k in ("gaussian", "uniform"))
    assert whole < half < held_out < gaussian < uniform
    assert half < 0.4 and 2.5 < gaussian < 5 and 7 < uniform < 15
    noisy = (x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    assert half < _fd(extractor, noisy) < gaussian
    seven = _fd(extractor, x[digits.labels == 7])
    assert seven > gaussian, "one class only is a bad model"


def test_fd_is_the_formula(digits: ImageData, p0: dict[str, Tensor]) -> None:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the root by eigenvalues."""
    extractor = small_extractor(digits)
    a, b = extractor.features(p0["gaussian"]), extractor.features(to_float(digits.images))
    assert a.dtype == np.float64
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.clip(np.linalg.eigvals(ca @ cb).real, 0, None)).sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * root
    assert _fd(extractor, p0["gaussian"]) == pytest.approx(wanted, rel=1e-3)
    assert np.trace(cb) == pytest.approx(20, rel=1e-5)


def test_fd_does_not_depend_on_the_batches(digits: ImageData, p0: dict[str, Tensor]) -> None:
    extractor = small_extractor(digits)
    whole = extractor.features(p0["gaussian"], 1000)
    for size in (1, 64, 333):
        np.testing.assert_allclose(extractor.features(p0["gaussian"], size), whole, rtol=1e-4, atol=1e-5)
    shuffled = p0["gaussian"][torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    assert _fd(extractor, shuffled) == pytest.approx(_fd(extractor, p0["gaussian"]), rel=1e-4)


def test_extractor_is_cached_and_a_damaged_file_rebuilt(
    make_data: Callable[..., ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path))
    data = make_data(200, seed=77)
    torch.manual_seed(4)
    first = small_extractor(data)
    (file,) = [p for p in tmp_path.rglob("*.pt") if data.fingerprint in p.name]
    again = []
    for damage in (None, b"", file.read_bytes()[:1000]):
        if damage is not None:
            file.write_bytes(damage)
        monkeypatch.setattr(features, "_LOADED", {})
        torch.manual_seed(5)
        again.append(small_extractor(data))
    assert {e.id for e in again} == {first.id}
    assert all(np.array_equal(e.mean, first.mean) and e.scale == first.scale for e in again)
    assert first.id.startswith("small-") and data.name in first.id


def test_a_process_that_comes_second_waits_and_reads(
    make_data: Callable[..., ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process holds the lock, and leaves the extractor before it lets go."""
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path))
    data = make_data(200, seed=79)
    path = tmp_path / "features" / f"{features.VERSION}-{data.name}-{data.fingerprint}.pt"
    path.parent.mkdir()
    other = features._train(data, seed=3)
    trained: list[int] = []
    monkeypatch.setattr(features, "_train", lambda *a: trained.append(1) or other)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(f"{path}.lock"):
            found = pool.submit(features._load, data)
            with pytest.raises(TimeoutError):
                found.result(0.3)
            torch.save(other.state_dict(), path)
        weights = found.result(60).network.state_dict()
    assert not trained and all(torch.equal(weights[name], value) for name, value in other.state_dict().items())


def test_making_the_extractor_leaves_the_global_random_state_alone(
    make_data: Callable[..., ImageData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_LOADED", {})
    before = torch.get_rng_state()
    small_extractor(make_data(200, seed=78))
    assert torch.equal(torch.get_rng_state(), before)


def _chosen(probabilities: np.ndarray, share: float) -> list[int]:
    """Within each predicted class the top floor(n_c * share) by max softmax, literally."""
    best = probabilities.max(1)
    label = probabilities.argmax(1)
    kept = []
    for c in range(probabilities.shape[1]):
        members = sorted((i for i in range(len(best)) if label[i] == c), key=lambda i: -best[i])
        kept += members[: math.floor(len(members) * share)]
    return kept


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("batch_size", [7, 100])
def test_most_confident(digits: ImageData, share: float, batch_size: int) -> None:
    model = build_network("conv-8", digits.shape, 10, seed=2)
    with torch.no_grad():
        model.class_head.weight.mul_(20)
    x = to_float(digits.images[:233])
    model.train()
    confidence, predicted = confidences(model, x, batch_size)
    assert model.training
    got = x[most_confident(confidence, predicted, share)]
    model.eval()
    with torch.no_grad():
        probabilities = model.logits(x).double().softmax(1).numpy()
    kept = _chosen(probabilities, share)
    assert len(set(probabilities.argmax(1))) > 3
    assert len(got) == len(kept)
    assert sorted(image.numpy().tobytes() for image in got) == sorted(x[i].numpy().tobytes() for i in kept)


def test_most_confident_of_next_to_nothing(digits: ImageData) -> None:
    model = build_network("conv-8", digits.shape, 10)
    x = to_float(digits.images[:3])
    assert x[most_confident(*confidences(model, x, 100), 0.1)].shape == (0, 1, 8, 8)
    assert len(most_confident(torch.empty(0), torch.empty(0, dtype=torch.int64), 0.5)) == 0


def test_rounding() -> None:
    levels = torch.tensor([-1.0, 1.0, -2.0, 3.0, 0.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1, 254.9 / 127.5 - 1])
    x = levels.view(-1, 1, 1, 1)
    assert to_uint8(x, "truncate").flatten().tolist() == [0, 255, 0, 255, 127, 100, 100, 254]
    assert to_uint8(x, "round").flatten().tolist() == [0, 255, 0, 255, 128, 100, 101, 255]
    back = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    assert torch.equal(to_uint8(to_float(back), "round"), back)


def _model() -> EnergyModel:
    model = build_network("wrn-10-1", (1, 8, 8), 10)
    with torch.no_grad():
        model.train().energy(torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_frozen_statistics(training: bool, fails: bool) -> None:
    model = _model().train(training)
    before = {k: v.clone() for k, v in model.named_buffers()}
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    try:
        with frozen_statistics(model):
            inside = model.energy(x).detach()
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert all(torch.equal(before[k], v) for k, v in model.named_buffers()), "all buffers bit for bit"
    assert model.training is training
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.track_running_stats and m.training is training and m.momentum == 0.9 for m in layers)
    assert torch.equal(inside, model.train().energy(x)), "it is the batch's statistics that were used"
    assert not all(torch.equal(before[k], v) for k, v in model.named_buffers()), "and now they move again"


def test_eval_mode() -> None:
    model = _model()
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with eval_mode(model):
        whole = model.energy(x)
        assert not model.training and not whole.requires_grad
        torch.testing.assert_close(torch.cat([model.energy(one) for one in x.split(1)]), whole)
    assert model.training


def test_accuracy_is_a_count(digits: ImageData) -> None:
    model = build_network("conv-8", digits.shape, 10, seed=1)
    model.eval()
    with torch.no_grad():
        right = sum(
            int(model.logits(to_float(image[None])).argmax()) == int(label)
            for image, label in zip(digits.test_images, digits.test_labels, strict=True)
        )
    model.train()
    for size in (7, 100, 1000):
        assert accuracy(model, digits.test_images, digits.test_labels, size) == right / 360
    assert model.training


def test_protocols(quick: Quick, digits: ImageData, make_data: Callable[..., ImageData]) -> None:
    colour = make_data(20, (3, 32, 32))

    def names(data: ImageData, method: str, protocols: object = "auto") -> tuple[str, ...]:
        config = quick(method=method, evaluation={"protocols": protocols})
        return tuple(p.name for p in protocols_for(config, data.shape))

    assert names(digits, "m-ebm") == ("small-buffer", "small-fresh")
    assert names(make_data(20, (3, 16, 16)), "m-jem") == ("small-buffer", "small-fresh")
    assert names(colour, "m-ebm") == ("paper-mebm", "fresh-10k")
    assert names(colour, "m-jem") == ("paper-mjem", "fresh-10k")
    assert names(colour, "softmax") == () == names(digits, "m-ebm", "none")
    assert (PROTOCOLS["paper-mebm"].top_share, PROTOCOLS["paper-mjem"].top_share) == (0.9, 0.1)
    assert PROTOCOLS["paper-mebm"].rounding == PROTOCOLS["paper-mjem"].rounding == "truncate"
    with pytest.raises(ValueError, match="small-bufer"):
        names(digits, "m-ebm", ("small-bufer",))


def _score(name: str, samples: Tensor, data: ImageData, made_by: str = "20steps") -> Scores:
    images = choose(PROTOCOLS[name], samples, build_network("conv-8", data.shape, 10), 100)
    assert images is not None
    (found,) = scores_of(Samples(PROTOCOLS[name], images, data, torch.device("cpu"), made_by))
    return found


def test_scores_carry_their_protocol(digits: ImageData, p0: dict[str, Tensor]) -> None:
    buffer = _score("small-buffer", p0["gaussian"], digits)
    fresh = _score("small-fresh", p0["gaussian"], digits)
    longer = _score("small-fresh", p0["gaussian"], digits, "50steps")
    fewer = _score("small-buffer", p0["gaussian"][:300], digits)
    assert set(buffer.values) == {"fd_buffer"} and set(fresh.values) == {"fd_fresh"}
    assert len({s.protocol_id for s in (buffer, fresh, longer, fewer)}) == 4
    assert "fid" not in buffer.protocol_id.lower()
    eight_bits = to_float(to_uint8(p0["gaussian"], "round"))
    same_extractor = _fd(small_extractor(digits), eight_bits)
    assert buffer.values["fd_buffer"] == fresh.values["fd_fresh"] == same_extractor
    assert same_extractor == pytest.approx(_fd(small_extractor(digits), p0["gaussian"]), rel=2e-3)
    assert set(buffer.errors) == {"fd_buffer"} and set(fresh.errors) == {"fd_fresh"}
    assert fewer.errors["fd_buffer"] > 1.3 * buffer.errors["fd_buffer"]


@pytest.mark.parametrize(
    ("value", "values", "remark"),
    [(2.5, {"own_buffer": 2.5}, None), (math.inf, {}, "no own (buffer): it is not finite"), (None, None, None)],
)
def test_a_metric_may_be_a_number(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch, value: float | None, values: Any, remark: str | None
) -> None:
    seen = []
    own = of_samples("own", "own", "minimize", "{}", lambda samples: seen.append(samples) or value)
    monkeypatch.setattr(evaluation, "METRICS", own)
    samples = Samples(PROTOCOLS["small-buffer"], digits.images[:5], digits, torch.device("cpu"), "20steps")
    expected = [] if values is None else [Scores(values, "small-buffer", remark)]
    assert list(scores_of(samples)) == expected and seen == [samples]


def test_too_few_samples_have_no_error(digits: ImageData, p0: dict[str, Tensor]) -> None:
    few = _score("small-buffer", p0["gaussian"][:39], digits)
    assert few.values and not few.errors
    assert _score("small-buffer", p0["gaussian"][:40], digits).errors
    one = _score("small-buffer", p0["gaussian"][:1], digits)
    assert one.values == {} and one.remark == "no FD: 1 image(s) to score"


# -------------------------------------------------------------------------------------------------- sampling errors


def test_the_error_is_the_jackknife_literally() -> None:
    rng = np.random.default_rng(0)
    x, reference = rng.normal(size=(107, 6)) + 0.3, rng.normal(size=(500, 6))
    mean, covariance = statistics(reference)
    left = []
    for group in np.array_split(np.arange(107), 20):
        kept = np.delete(x, group, axis=0)
        left.append(frechet_distance(*statistics(kept), mean, covariance))
    wanted = math.sqrt(19 / 20 * sum((d - np.mean(left)) ** 2 for d in left))
    assert sampling_error(x, mean, covariance) == pytest.approx(wanted, rel=1e-9)
    assert sampling_error(np.full((60, 6), np.nan), mean, covariance) is None


def _coverage(freedom: float | None, draws: int, seed: int) -> float:
    """How often the distance -+ 1.96 errors holds the mean of such distances, of 400 samples in 8 dimensions.

    Args:
        freedom: of Student's t in every direction at once; None: Gaussian.
    """
    rng = np.random.default_rng(seed)
    mix, size, count = rng.normal(size=(8, 8)) / 8**0.5, 8, 400
    mean, covariance = np.full(size, 0.2), mix.T @ mix * 1.3
    found = []
    for _ in range(draws):
        z = rng.normal(size=(count, size))
        if freedom is not None:
            z /= np.sqrt(rng.chisquare(freedom, size=(count, 1)) / freedom)
        x = z @ mix
        error = sampling_error(x, mean, covariance)
        assert error is not None
        found.append((frechet_distance(*statistics(x), mean, covariance), error))
    values, errors = np.array(found).T
    return float((np.abs(values - values.mean()) < 1.96 * errors).mean())


def test_coverage_of_the_error() -> None:
    assert 0.91 < _coverage(None, draws=400, seed=1) < 0.985


@pytest.mark.long
def test_coverage_of_the_error_in_many_draws() -> None:
    """95% nominal: that for Gaussian features; with heavy tails 94% (t with 8 degrees of freedom) and 85% (with 5)."""
    assert 0.935 < _coverage(None, draws=6000, seed=2) < 0.975
    assert 0.92 < _coverage(8, draws=6000, seed=3) < 0.96
    assert 0.82 < _coverage(5, draws=6000, seed=3) < 0.89


def test_the_error_is_as_large_as_subsets_differ(digits: ImageData) -> None:
    """Twelve sets of 1,000 draws of p0, as in review.md B10."""
    g, initial = torch.Generator().manual_seed(4), build_initial("gaussian", digits, 1e-4)
    scores = [small_extractor(digits).score(to_uint8(initial.sample(1000, g), "round")) for _ in range(12)]
    spread = float(np.std([value for value, _ in scores], ddof=1))
    errors = [error for _, error in scores if error is not None]
    assert len(errors) == 12 and 0.5 * spread < np.mean(errors) < 2 * spread


def test_samples_that_are_not_finite_get_no_score(digits: ImageData, p0: dict[str, Tensor]) -> None:
    x = p0["gaussian"].clone()
    x[5, 0, 0, 0] = math.nan
    assert choose(PROTOCOLS["small-buffer"], x, build_network("conv-8", digits.shape, 10), 100) is None


@pytest.mark.parametrize(
    "size",
    [
        1e6,
        1e20,
        1e38,
    ],
)
def test_huge_samples_get_a_finite_score_or_none(digits: ImageData, p0: dict[str, Tensor], size: float) -> None:
    """Without the sample clamp chains may be anywhere; a score that is not a number would break the report."""
    scores = _score("small-buffer", p0["gaussian"] * size, digits)
    assert all(math.isfinite(v) for v in scores.values.values())
    assert scores.values or scores.remark


# ------------------------------------------------------------------------------------------------------------ Inception


@pytest.fixture
def cifar(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    if not (CIFAR_JPEG / "test.parquet").is_file():
        pytest.skip("the CIFAR-10 JPEGs are not here")
    folder = tmp_path_factory.mktemp("cifar")
    table = pq.read_table(CIFAR_JPEG / "test.parquet").slice(0, 260)
    pq.write_table(table.slice(0, 200), folder / "train.parquet")
    pq.write_table(table.slice(200), folder / "test.parquet")
    return load_dataset("cifar10", str(folder))


def _inception_scores(data: ImageData) -> tuple[dict[str, float], str | None]:
    (scores,) = scores_of(Samples(PROTOCOLS["buffer-all"], data.images, data, torch.device("cpu"), "20steps"))
    return scores.values, scores.remark


def test_missing_weights_file(
    make_data: Callable[..., ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(20, (3, 32, 32))
    missing = tmp_path / "nowhere.pth"
    monkeypatch.setenv(INCEPTION_VARIABLE, str(missing))
    values, remark = _inception_scores(data)
    assert values == {} and remark is not None and "\n" not in remark
    assert INCEPTION_VARIABLE in remark and str(missing) in remark


def test_weights_file_that_is_none(
    make_data: Callable[..., ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(20, (3, 32, 32))
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not weights")
    monkeypatch.setenv(INCEPTION_VARIABLE, str(broken))
    values, remark = _inception_scores(data)
    assert values == {} and remark is not None and "\n" not in remark
    assert str(broken) in remark or INCEPTION_VARIABLE in remark


def test_offline_without_weights(
    make_data: Callable[..., ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every proxy leads nowhere and the download cache is empty: one line that names the file and the variable."""
    data = make_data(20, (3, 32, 32))
    monkeypatch.delenv(INCEPTION_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(inception, "_MISSING", {})
    monkeypatch.setattr(inception, "_LOADED", {})
    for _ in range(2):
        values, remark = _inception_scores(data)
        assert values == {} and remark is not None and "\n" not in remark
        assert INCEPTION_VARIABLE in remark and "pt_inception-2015-12-05-6726825d.pth" in remark


@pytest.mark.slow
def test_fid_is_torch_fidelitys(cifar: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On real CIFAR images with real Inception weights: the same number as the library called directly."""
    weights = os.environ.get(INCEPTION_VARIABLE)
    if not weights or not Path(weights).is_file():
        pytest.skip(f"{INCEPTION_VARIABLE} is not set to a file")
    from torch_fidelity import calculate_metrics

    monkeypatch.setenv("MEBM_CACHE", str(tmp_path / "cache"))
    x = to_float(cifar.test_images)
    scores = _score("buffer-all", x, cifar)
    assert scores.errors["fid_buffer"] > 0
    truncated = ((x + 1) * 127.5).to(torch.uint8)
    for name, images in (("a", truncated), ("b", cifar.images)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:04}.png")
    direct = calculate_metrics(
        input1=str(tmp_path / "a"),
        input2=str(tmp_path / "b"),
        cuda=False,
        fid=True,
        isc=False,
        feature_extractor_weights_path=weights,
        cache=False,
        verbose=False,
    )["frechet_inception_distance"]
    assert scores.values["fid_buffer"] == pytest.approx(direct, abs=1e-3)
    assert scores.protocol_id == "buffer-all"
    assert "isc_buffer" in scores.values or (scores.remark is not None and "IS" in scores.remark)
    assert all(math.isfinite(v) for v in scores.values.values())


def test_decoded_jpegs_are_what_the_reader_gives(cifar: ImageData) -> None:
    cell = pq.read_table(CIFAR_JPEG / "test.parquet", columns=["img"]).slice(3, 1)["img"][0].as_py()["bytes"]
    pixels = np.asarray(Image.open(io.BytesIO(cell)).convert("RGB"))
    np.testing.assert_array_equal(cifar.images[3].permute(1, 2, 0).numpy(), pixels)


def test_the_extractor_of_digits_ships_with_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its numbers mean the same on every machine; what is shipped is what the code trains, up to rounding."""
    digits = load_dataset("digits")
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path))
    monkeypatch.setattr(features, "_LOADED", {})
    shipped = small_extractor(digits)
    assert shipped.id == "small-v1-digits-e04c266c"
    assert not (tmp_path / "features").exists()
    assert _accuracy(shipped, digits) > 0.95
    assert _accuracy(features._describe(digits, features._train(digits)), digits) > 0.95


def test_fd_hangs_on_the_extractor_less_than_on_the_samples(digits: ImageData, p0: dict[str, Tensor]) -> None:
    """Extractors trained from other seeds order the same samples alike; the value moves by some ten percent."""
    others = [features._describe(digits, features._train(digits, seed)) for seed in (1, 2, 3)]
    assert len({e.id for e in others} | {small_extractor(digits).id}) == 4
    half = to_float(digits.images[::2])
    for extractor in others:
        values = [_fd(extractor, x) for x in (half, p0["gaussian"], p0["uniform"])]
        assert values[0] < 0.4 < 2 < values[1] < values[2]
    gaussian = np.array([_fd(e, p0["gaussian"]) for e in others])
    assert gaussian.std() / gaussian.mean() < 0.25
