"""p0 against numpy (algorithms.md, section 2.2)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainables.data.datasets import ImageData
from trainables.sampling import gaussians
from trainables.sampling.gaussians import (
    ClassGaussian,
    Gaussian,
    LowRankGaussian,
    grain_of,
    moments,
    principal_directions,
)
from trainables.sampling.initial import Uniform, build_initial


@pytest.fixture(autouse=True)
def nothing_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process keeps between trials would hide what the files do."""
    monkeypatch.setattr(gaussians, "_STATES", {})


def fit_gaussian(data: ImageData, jitter: float) -> Gaussian:
    gaussians._STATES.clear()
    p0 = build_initial("gaussian", data, jitter)
    assert isinstance(p0, Gaussian)
    return p0


def _scaled(images: torch.Tensor) -> np.ndarray:
    return images.flatten(1).numpy().astype(np.float64) / 255 * 2 - 1


@pytest.mark.parametrize("chunk", [7, 64, 5000])
def test_moments_are_numpys(make_data: Callable[..., ImageData], chunk: int) -> None:
    data = make_data(150, (3, 6, 6))
    mean, covariance = moments(data.images, chunk)
    flat = _scaled(data.images)
    np.testing.assert_allclose(mean.numpy(), flat.mean(0), atol=1e-6)
    np.testing.assert_allclose(covariance.numpy(), np.cov(flat, rowvar=False, bias=True), atol=1e-6)
    biased, unbiased = np.cov(flat, rowvar=False, bias=True), np.cov(flat, rowvar=False)
    got = covariance.numpy()
    assert abs(got - biased).max() < abs(got - unbiased).max() / 100


def test_moments_of_large_images(make_data: Callable[..., ImageData]) -> None:
    """More than 1024 dimensions take the float32 products; CIFAR has 3072."""
    data = make_data(80, (3, 20, 20))
    mean, covariance = moments(data.images, 33)
    flat = _scaled(data.images)
    np.testing.assert_allclose(mean.numpy(), flat.mean(0), atol=1e-6)
    np.testing.assert_allclose(covariance.numpy(), np.cov(flat, rowvar=False, bias=True), atol=1e-6)


@pytest.mark.parametrize("jitter", [1e-4, 0.02])
def test_factor_is_the_root_of_sigma_plus_jitter(make_data: Callable[..., ImageData], jitter: float) -> None:
    data = make_data(150, seed=11)
    p0 = fit_gaussian(data, jitter)
    flat = _scaled(data.images)
    wanted = np.cov(flat, rowvar=False, bias=True) + jitter * np.eye(64)
    factor = p0.factor.double().numpy()
    np.testing.assert_allclose(factor @ factor.T, wanted, atol=2e-6)
    np.testing.assert_allclose(p0.mean.numpy(), flat.mean(0), atol=1e-6)
    assert np.allclose(np.triu(factor, 1), 0)


def test_moments_of_the_samples() -> None:
    """Away from the box the samples have the mean and covariance asked for."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(8, 8)) * 0.03
    sigma = root @ root.T + 1e-4 * np.eye(8)
    mean = rng.uniform(-0.3, 0.3, 8)
    p0 = Gaussian((2, 2, 2), torch.tensor(mean).float(), torch.tensor(np.linalg.cholesky(sigma)).float())
    x = p0.sample(200_000, torch.Generator().manual_seed(0))
    assert x.shape == (200_000, 2, 2, 2) and x.dtype == torch.float32
    flat = x.flatten(1).double().numpy()
    assert abs(flat).max() < 1
    np.testing.assert_allclose(flat.mean(0), mean, atol=3e-3)
    np.testing.assert_allclose(np.cov(flat, rowvar=False, bias=True), sigma, atol=2e-3 * sigma.max() ** 0.5)


def test_samples_are_clamped(digits: ImageData) -> None:
    x = fit_gaussian(digits, 1e-4).sample(2000, torch.Generator().manual_seed(0))
    assert x.min() == -1 and x.max() == 1
    assert 0.1 < (x == -1).float().mean() < 0.9
    # An unclamped draw of the same numbers says where the clamp bit.
    p0 = fit_gaussian(digits, 1e-4)
    z = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)).double()
    raw = p0.mean.double() + z @ p0.factor.double().T
    torch.testing.assert_close(x.flatten(1).double(), raw.clamp(-1, 1), atol=1e-5, rtol=0)


def test_draws_come_from_the_generator_alone(digits: ImageData) -> None:
    p0 = fit_gaussian(digits, 1e-4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = p0.sample(5, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, p0.sample(5, torch.Generator().manual_seed(3)))
    assert not torch.equal(one, p0.sample(5, torch.Generator().manual_seed(4)))


def _files(cache: Path, data: ImageData) -> list[Path]:
    return [p for p in cache.rglob("*.pt") if p.is_file() and data.fingerprint in p.name]


def test_cache(make_data: Callable[..., ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path))
    data = make_data(150, seed=21)
    first = fit_gaussian(data, 1e-4)
    (file,) = _files(tmp_path, data)
    # A hit reads the file: with the images gone it still gives the same.
    hit = fit_gaussian(replace(data, images=torch.zeros_like(data.images)), 1e-4)
    assert torch.equal(first.mean, hit.mean) and torch.equal(first.factor, hit.factor)
    fit_gaussian(data, 1e-3)
    assert len(_files(tmp_path, data)) == 2, "another jitter is another file"
    for damage in (b"", b"not a checkpoint", file.read_bytes()[:200]):
        file.unlink()  # a mapped file must not change under who maps it; the package only ever replaces it
        file.write_bytes(damage)
        rebuilt = fit_gaussian(data, 1e-4)
        assert torch.equal(first.mean, rebuilt.mean) and torch.equal(first.factor, rebuilt.factor)
        assert torch.load(file, weights_only=True).keys() == {"mean", "factor"}
    assert not list(tmp_path.rglob(".*.part"))


def test_a_cache_file_of_another_shape_is_rebuilt(
    make_data: Callable[..., ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path))
    data = make_data(150, seed=22)
    first = fit_gaussian(data, 1e-4)
    (file,) = _files(tmp_path, data)
    file.unlink()
    torch.save({"mean": torch.zeros(3)}, file)
    assert torch.equal(fit_gaussian(data, 1e-4).factor, first.factor)


def test_images_of_another_shape_have_a_file_of_their_own(make_data: Callable[..., ImageData]) -> None:
    """Even under one fingerprint, as data made by hand may have."""
    one, two = make_data(150, (1, 4, 4), seed=23), make_data(150, (3, 4, 4), seed=23)
    two = replace(two, source=one.source)
    assert fit_gaussian(one, 1e-4).mean.shape == (16,)
    assert fit_gaussian(two, 1e-4).mean.shape == (48,)


def test_singular_covariance_is_refused(make_data: Callable[..., ImageData]) -> None:
    data = make_data(150, seed=31)
    flat = replace(data, images=torch.zeros_like(data.images), source="test:flat#flat31")
    with pytest.raises(ValueError, match="not positive definite"):
        fit_gaussian(flat, 0.0)
    assert fit_gaussian(flat, 1e-4).factor.diagonal().tolist() == pytest.approx([0.01] * 64)


def test_uniform() -> None:
    x = Uniform((2, 5, 5)).sample(4000, torch.Generator().manual_seed(0))
    assert x.shape == (4000, 2, 5, 5) and x.dtype == torch.float32
    assert -1 <= x.min() < -0.999 and 0.999 < x.max() <= 1
    assert x.mean().item() == pytest.approx(0, abs=5e-3)
    assert x.var().item() == pytest.approx(1 / 3, rel=1e-2)


def test_kinds(digits: ImageData) -> None:
    kinds = {"gaussian": Gaussian, "uniform": Uniform, "class-gaussian": ClassGaussian}
    for kind, wanted in (kinds | {"gaussian-low-rank": LowRankGaussian}).items():
        p0 = build_initial(kind, digits, 1e-4, rank=20)
        assert isinstance(p0, wanted)
        x = p0.sample(7, torch.Generator().manual_seed(0))
        assert x.shape == (7, 1, 8, 8) and x.dtype == torch.float32 and x.abs().max() <= 1


def test_unknown_kind(digits: ImageData) -> None:
    with pytest.raises(ValueError, match="'gausian', expected one of gaussian, class-gaussian"):
        build_initial("gausian", digits, 1e-4)


def test_statistics_do_not_depend_on_the_precision_of_the_first_trial(
    make_data: Callable[..., ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path))
    matmul, seen = torch.backends.cuda.matmul, []
    real = gaussians.moments
    monkeypatch.setattr(gaussians, "moments", lambda *a, **k: seen.append(matmul.fp32_precision) or real(*a, **k))
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        build_initial("gaussian", make_data(150, seed=62), 1e-4)
        assert seen == ["ieee"] and matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_computed_once_and_shared(make_data: Callable[..., ImageData], monkeypatch: pytest.MonkeyPatch) -> None:
    data, calls = make_data(150, seed=61), []
    real = gaussians.moments
    monkeypatch.setattr(gaussians, "moments", lambda *a, **k: calls.append(1) or real(*a, **k))
    first = build_initial("gaussian", data, 1e-4)
    again = build_initial("gaussian", data, 1e-4)
    assert len(calls) == 1 and again.factor is first.factor, "trials of a process share the tensors"
    gaussians._STATES.clear()
    build_initial("gaussian", data, 1e-4)
    assert len(calls) == 1, "a later process reads the file"


_PROCESS = """
import sys, time, torch
from trainables.sampling import gaussians, initial
from trainables.data.datasets import ImageData
g = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8, generator=g)
labels = torch.zeros(50, dtype=torch.int64)
real = gaussians.moments
def slow(*a, **k):
    print("computed", flush=True)
    time.sleep(3)
    return real(*a, **k)
gaussians.moments = slow
initial.build_initial("gaussian", ImageData("d", images, labels, images, labels, 1, "test:d#once"), 1e-4)
"""


def test_processes_that_start_together_compute_it_once(tmp_path: Path) -> None:
    environment = os.environ | {"MEBM_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", _PROCESS]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate(timeout=120)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0]
    assert said.count("computed") == 1


# ------------------------------------------------------------------------------------------------- class Gaussians


def test_class_gaussians_are_those_of_each_class(make_data: Callable[..., ImageData]) -> None:
    data = make_data(200, classes=3, seed=41)
    p0 = build_initial("class-gaussian", data, 1e-3)
    assert isinstance(p0, ClassGaussian)
    for label in range(3):
        flat = _scaled(data.images[data.labels == label])
        factor = p0.factors[label].double().numpy()
        np.testing.assert_allclose(p0.means[label].numpy(), flat.mean(0), atol=1e-6)
        wanted = np.cov(flat, rowvar=False, bias=True) + 1e-3 * np.eye(64)  # divided by n_c
        np.testing.assert_allclose(factor @ factor.T, wanted, atol=2e-6)


def test_class_gaussians_are_drawn_in_equal_shares() -> None:
    """Three classes far apart and narrow: every draw is of one of them, and each as often."""
    means = torch.tensor([-0.8, 0.0, 0.8])[:, None].expand(3, 4).contiguous()
    factors = torch.stack([torch.eye(4) * s for s in (0.01, 0.02, 0.03)])
    x = ClassGaussian((1, 2, 2), means, factors).sample(30_000, torch.Generator().manual_seed(1)).flatten(1)
    nearest = (x.mean(1, keepdim=True) - means[:, 0]).abs().argmin(1)
    for label, std in enumerate((0.01, 0.02, 0.03)):
        own = x[nearest == label]
        assert len(own) == pytest.approx(10_000, abs=400)
        assert own.std().item() == pytest.approx(std, rel=0.05)


def test_the_way_of_a_gpu_gives_the_same_draws(digits: ImageData) -> None:
    """On a GPU each class is drawn for all images and one is kept; here both ways are written out."""
    p0 = build_initial("class-gaussian", digits, 1e-4)
    assert isinstance(p0, ClassGaussian)
    got = p0.sample(40, torch.Generator().manual_seed(5)).flatten(1)
    g = torch.Generator().manual_seed(5)
    classes = torch.randint(0, 10, (40,), generator=g)
    z = torch.randn(40, 64, generator=g)
    for i in range(40):
        wanted = (p0.means[classes[i]] + p0.factors[classes[i]] @ z[i]).clamp(-1, 1)
        torch.testing.assert_close(got[i], wanted, atol=1e-5, rtol=0)


def test_a_class_without_images_is_refused(make_data: Callable[..., ImageData]) -> None:
    data = make_data(100, classes=3, seed=42)
    with pytest.raises(ValueError, match="made-up has none of 3"):
        build_initial("class-gaussian", replace(data, classes=4), 1e-4)


# ----------------------------------------------------------------------------------------------------- large images


def test_grain_follows_the_released_table() -> None:
    sides = {32: 1, 63: 1, 64: 2, 99: 2, 100: 4, 128: 4, 224: 4, 225: 4, 256: 4, 257: 8, 512: 8, 513: 16, 1024: 16}
    assert {side: grain_of(side) for side in sides} == sides


@pytest.mark.parametrize("kind", ["gaussian", "class-gaussian"])
def test_large_images_are_fitted_small_and_repeated(make_data: Callable[..., ImageData], kind: str) -> None:
    data = make_data(90, (1, 64, 64), classes=2, seed=51)
    p0 = build_initial(kind, data, 1e-2)
    assert isinstance(p0, Gaussian | ClassGaussian)
    chosen = data.images if kind == "gaussian" else data.images[data.labels == 1]
    x = chosen.double().numpy() / 127.5 - 1
    pooled = x.reshape(len(x), 32, 2, 32, 2).mean((2, 4)).reshape(len(x), -1)
    mean = p0.mean if isinstance(p0, Gaussian) else p0.means[1]
    factor = p0.factor if isinstance(p0, Gaussian) else p0.factors[1]
    np.testing.assert_allclose(mean.numpy(), pooled.mean(0), atol=1e-6)
    wanted = np.cov(pooled, rowvar=False, bias=True) + 1e-2 * np.eye(1024)
    np.testing.assert_allclose((factor.double() @ factor.double().T).numpy(), wanted, atol=5e-6)
    sample = p0.sample(3, torch.Generator().manual_seed(0))
    assert sample.shape == (3, 1, 64, 64)
    assert torch.equal(sample, sample[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("count", "side"), [(150, 6), (20, 8)], ids=["more images", "more pixels"])
def test_full_rank_is_the_full_gaussian(
    make_data: Callable[..., ImageData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    side: int,
    exact: bool,
) -> None:
    """With as many directions as the data have, both ways of fitting, and fewer images than pixels."""
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path))
    if not exact:
        monkeypatch.setattr(gaussians, "EXACT_SIZE", 0)
    size, rank = side * side, min(count - 1, side * side)
    data = make_data(count, (1, side, side), seed=71)
    full, low = build_initial("gaussian", data, 1e-3), build_initial("gaussian-low-rank", data, 1e-3, rank=rank)
    assert isinstance(full, Gaussian) and isinstance(low, LowRankGaussian)
    assert low.basis.shape == (size, rank)
    flat = _scaled(data.images)
    np.testing.assert_allclose(low.mean.numpy(), full.mean.numpy(), atol=1e-6)
    root = low.basis.double() * low.scale.double()
    implied = root @ root.T + low.noise**2 * torch.eye(size)
    sigma = full.factor.double() @ full.factor.double().T
    torch.testing.assert_close(implied, sigma, atol=2e-6, rtol=0)
    wanted = np.cov(flat, rowvar=False, bias=True) + 1e-3 * np.eye(size)
    np.testing.assert_allclose(implied.numpy(), wanted, atol=2e-6)


def test_samples_of_both_have_the_same_moments(make_data: Callable[..., ImageData]) -> None:
    """On narrow data, whose samples the box does not touch."""
    data = make_data(150, (1, 4, 4), seed=72)
    narrow = replace(data, images=(data.images // 4 + 96), source="test:narrow#narrow72")
    drawn = [
        build_initial(kind, narrow, 1e-4, rank=16).sample(200_000, torch.Generator().manual_seed(n)).flatten(1).double()
        for n, kind in enumerate(("gaussian", "gaussian-low-rank"))
    ]
    one, two = (x.numpy() for x in drawn)
    assert max(abs(one).max(), abs(two).max()) < 1
    np.testing.assert_allclose(one.mean(0), two.mean(0), atol=3e-3)
    np.testing.assert_allclose(np.cov(one, rowvar=False), np.cov(two, rowvar=False), atol=5e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_principal_directions_are_numpys(
    make_data: Callable[..., ImageData], monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    data = make_data(300, (1, 12, 12), seed=73)
    if not exact:
        monkeypatch.setattr(gaussians, "EXACT_SIZE", 0)
    mean, basis, variances, total = principal_directions(data.images, 10, chunk=77)
    flat = _scaled(data.images)
    covariance = np.cov(flat, rowvar=False, bias=True)
    values = np.linalg.eigvalsh(covariance)[::-1]
    np.testing.assert_allclose(mean.numpy(), flat.mean(0), atol=1e-6)
    np.testing.assert_allclose(variances.numpy(), values[:10], rtol=1e-6 if exact else 2e-3)
    assert total == pytest.approx(np.trace(covariance), rel=1e-5)
    np.testing.assert_allclose((basis.T @ basis).numpy(), np.eye(10), atol=1e-5)
    # The leading directions carry the variance they say.
    b = basis.numpy()
    np.testing.assert_allclose(np.diag(b.T @ covariance @ b), variances.numpy(), rtol=2e-3)


def test_what_is_beyond_the_rank_is_spread_evenly(make_data: Callable[..., ImageData]) -> None:
    data = make_data(300, (1, 6, 6), seed=74)
    low = build_initial("gaussian-low-rank", data, 0.0, rank=5)
    assert isinstance(low, LowRankGaussian)
    values = np.linalg.eigvalsh(np.cov(_scaled(data.images), rowvar=False, bias=True))[::-1]
    assert low.noise**2 == pytest.approx(values[5:].mean(), rel=1e-5)
    root = low.basis.double() * low.scale.double()
    implied = (root @ root.T + low.noise**2 * torch.eye(36)).numpy()
    got = np.linalg.eigvalsh(implied)[::-1]
    np.testing.assert_allclose(got[:5], values[:5], rtol=1e-5)
    assert np.trace(implied) == pytest.approx(values.sum(), rel=1e-6), "no variance is lost"
