"""Long chains: autocorrelation and R-hat of processes whose truth is known, and what is said of FD."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.stats.trials.chains import autocorrelation, autocorrelation_time, split_r_hat, verdict


def _ar(rho: float, chains: int = 200, times: int = 2000, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = np.empty((chains, times))
    x[:, 0] = random.normal(size=chains)
    for t in range(1, times):
        x[:, t] = rho * x[:, t - 1] + (1 - rho**2) ** 0.5 * random.normal(size=chains)
    return x


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_the_autocorrelation_of_an_autoregressive_process(rho: float) -> None:
    trace = _ar(rho)
    assert autocorrelation(trace)[:6] == pytest.approx(rho ** np.arange(6), abs=0.01)
    # 1 + 2 rho / (1 - rho), less the tail below the cut.
    assert autocorrelation_time(trace, 10) == pytest.approx(10 * (1 + rho) / (1 - rho), rel=0.12, abs=1.2)
    assert split_r_hat(trace) == pytest.approx(1, abs=0.02)


def test_chains_that_stay_where_they_began_do_not_mix() -> None:
    """Each moves little about its own mean: about that mean they would look independent."""
    trace = _ar(0.2, 50, 200) * 0.01 + np.arange(50)[:, None]
    assert autocorrelation_time(trace, 1) is None and split_r_hat(trace) > 100
    drifting = _ar(0.2, 50, 200) + np.linspace(0, 30, 200)
    assert split_r_hat(drifting) > 1.5
    assert split_r_hat(np.zeros((5, 10))) is None and split_r_hat(trace[:, :3]) is None


def _rows(start: str, *points: tuple[int, float | None, float | None]) -> list[dict]:
    return [{"start": start, "step": step, "fd": fd, "fd_se": se} for step, fd, se in points]


def test_the_verdict_compares_with_training_and_with_the_data() -> None:
    points = (0, 9.0, 0.1), (5, 1.0, 0.1), (1000, 1.2, 0.1)
    assert verdict(_rows("p0", *points), 5).kind == "stays"
    assert verdict(_rows("p0", *points[:2], (1000, 1.4, 0.1)), 5).kind == "leaves"
    data = verdict(_rows("data", (0, 0.2, 0.1), (5, 0.3, 0.1), (1000, 0.9, 0.1)), 5)
    assert data.kind == "leaves" and "FD 0.2 after 0 steps, 0.9 after 1,000" in data.text
    assert verdict(_rows("p0", (0, 9.0, None), (5, 1.0, None), (1000, 5.0, None)), 5).kind == "unknown"
    assert verdict(_rows("p0", (0, None, None), (3, None, None)), 5).kind == "unknown"
