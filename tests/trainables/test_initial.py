"""p0 against numpy (algorithms.md, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainables.datasets import ImageData
from trainables.initial import Gaussian, Uniform, build_initial, fit_gaussian, moments


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
    return [p for p in cache.rglob("*") if p.is_file() and data.fingerprint in p.name]


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
        file.write_bytes(damage)
        rebuilt = fit_gaussian(data, 1e-4)
        assert torch.equal(first.mean, rebuilt.mean) and torch.equal(first.factor, rebuilt.factor)
        assert torch.load(file, weights_only=True).keys() == {"mean", "factor"}
    assert not list(tmp_path.rglob("*.part"))


def test_a_cache_file_of_another_shape_is_rebuilt(
    make_data: Callable[..., ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path))
    data = make_data(150, seed=22)
    first = fit_gaussian(data, 1e-4)
    (file,) = _files(tmp_path, data)
    torch.save({"mean": torch.zeros(3)}, file)
    assert torch.equal(fit_gaussian(data, 1e-4).factor, first.factor)


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
    assert isinstance(build_initial("gaussian", digits, 1e-4), Gaussian)
    assert isinstance(build_initial("uniform", digits, 1e-4), Uniform)
