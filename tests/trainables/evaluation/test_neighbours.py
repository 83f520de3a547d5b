"""Metrics of nearest neighbours: against plain loops, and where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainables.evaluation import neighbours
from trainables.evaluation.neighbours import density_and_coverage, memorisation


def _loops(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    """Naeem et al. 2020, written out."""
    radii = [sorted(np.linalg.norm(x - other) for other in real)[k] for x in real]
    inside = [[np.linalg.norm(x - y) < r for x, r in zip(real, radii, strict=True)] for y in fake]
    return float(np.sum(inside) / (k * len(fake))), float(np.mean(np.any(inside, axis=0)))


@pytest.mark.parametrize("shift", [0.0, 1.0, 50.0])
def test_density_and_coverage_are_those_of_loops(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_ROWS", 7)
    random = np.random.default_rng(0)
    real, fake = random.normal(size=(40, 3)), random.normal(size=(25, 3)) + shift
    found = density_and_coverage(torch.from_numpy(real), torch.from_numpy(fake), k=5)
    assert found == pytest.approx(_loops(real, fake, 5), abs=1e-12)
    if shift == 50:
        assert found == (0, 0)


def test_density_and_coverage_are_those_of_prdc() -> None:
    """Frozen: `compute_prdc(real, fake, nearest_k=5)` of prdc, the metrics' authors' package."""
    random = np.random.default_rng(7)
    real, fake = random.normal(size=(200, 16)), random.normal(size=(150, 16)) * 0.9 + 0.2
    found = density_and_coverage(torch.from_numpy(real), torch.from_numpy(fake))
    assert found == pytest.approx((1.3866666666666667, 0.92), abs=1e-12)


def test_equal_distributions_have_density_one_and_known_coverage() -> None:
    random = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(2000, 8, generator=random) for _ in range(2))
    density, coverage = density_and_coverage(real, fake)
    assert density == pytest.approx(1, abs=0.05)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.02)  # as many samples as images: 1 - 1/2^k
    with pytest.raises(ValueError, match="more than 5 real images, but there are 5"):
        density_and_coverage(real[:5], fake)


def test_memorisation_is_a_half_without_copies_and_one_of_copies() -> None:
    random = torch.Generator().manual_seed(1)
    train, held_out = torch.randn(3000, 16, generator=random), torch.randn(700, 16, generator=random)
    fresh = torch.randn(1500, 16, generator=random)
    share, error = memorisation(train, held_out, fresh)
    assert abs(share - 0.5) < 3 * error and 0.01 < error < 0.02
    some = memorisation(train[:700], held_out, torch.cat([train[:300] + 1e-6, fresh[:300]]))[0]
    assert some == pytest.approx(0.75, abs=0.05)
    assert memorisation(train[:700], held_out, train[:100]) == (1, 0)
    assert memorisation(held_out, held_out, fresh[:50], seed=3)[0] == pytest.approx(0.5, abs=1e-9)  # ties
