"""The learnt scale of gaps on the device: equal to `mebm.LearntRule` and to the replay, record by record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from analysis.detector.learnt import LAG, LEAST, ONCE, PATIENCE, RUN, WINDOW, learnt_alarm
from mebm import LearntRule
from trainables.config.parts import DivergenceConfig
from trainables.results.schema import Cause
from trainables.training import learnt
from trainables.training.detector import DivergenceLatch

CPU = torch.device("cpu")


def _gaps(kind: str, seed: int) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    gaps = random.lognormal(-2, 1, 400) * random.choice([-1, 1], 400)
    if kind == "blow-up":
        gaps[200:] *= np.exp(0.2 * np.arange(200))
    if kind == "jump":
        gaps[300] = 5000.0
    if kind == "early":
        gaps[10] = 1e6
    if kind == "zero":
        gaps[:60] = 0.0
    if kind == "nan":
        gaps[250] = np.nan
    return gaps.astype(np.float32)


def _watch(latch: DivergenceLatch, gaps: NDArray[np.float32], start: int = 0) -> None:
    zero = torch.zeros(())
    for i, gap in enumerate(torch.from_numpy(gaps), start):
        latch.update(i, loss=zero, total=zero, gap=gap, energy_max=zero, grad=zero)


@pytest.mark.parametrize("kind", ["healthy", "blow-up", "jump", "early", "zero", "nan"])
@pytest.mark.parametrize("seed", range(4))
def test_the_latch_the_client_and_the_replay_agree(kind: str, seed: int) -> None:
    gaps = _gaps(kind, seed)
    rule, expected = LearntRule(), None
    for i, gap in enumerate(gaps):
        if (cause := rule.alarm(abs(float(gap))) if np.isfinite(gap) else "nonfinite_energy") is not None:
            expected = (i, cause)
            break
    latch = DivergenceLatch(DivergenceConfig(rule="learnt"), 0.0, CPU)
    _watch(latch, gaps)
    verdict = latch.read().verdict
    assert (None if verdict is None else (verdict.iteration, verdict.cause.value)) == expected
    signals = {"iteration": np.arange(len(gaps)), "energy_gap": gaps, "loss": np.zeros(len(gaps))}
    replayed = learnt_alarm(signals).alarm
    assert (None if replayed is None else (replayed.iteration, replayed.cause.value)) == expected
    assert (expected is not None) == (kind in ("blow-up", "jump", "nan"))


def test_the_numbers_are_the_same_everywhere() -> None:
    assert (learnt.WINDOW, learnt.LAG, learnt.LEAST, learnt.PATIENCE, learnt.RUN, learnt.ONCE) == (
        WINDOW, LAG, LEAST, PATIENCE, RUN, ONCE,
    )  # fmt: skip
    assert (LearntRule.WINDOW, LearntRule.LAG, LearntRule.ONCE) == (WINDOW, LAG, ONCE)


def test_units_do_not_matter_and_learning_can_begin_later() -> None:
    gaps = _gaps("blow-up", 1)
    found = []
    for scale in (1.0, 1000.0, 2.0**-10):
        latch = DivergenceLatch(DivergenceConfig(rule="learnt"), 0.0, CPU)
        _watch(latch, (gaps * scale).astype(np.float32))
        found.append(latch.read().verdict)
    assert found[0] is not None and found[0] == found[1] == found[2]
    late = DivergenceLatch(DivergenceConfig(rule="learnt", learn_from=150), 0.0, CPU)
    _watch(late, _gaps("early", 0))
    assert late.read().verdict is None


def test_a_resumed_latch_is_the_same(copy_of: Callable[..., Any], same: Callable[..., bool]) -> None:
    gaps = _gaps("blow-up", 2)
    whole, cut, again = (DivergenceLatch(DivergenceConfig(rule="learnt"), 0.0, CPU) for _ in range(3))
    _watch(whole, gaps[:230])
    _watch(cut, gaps[:180])
    again.load_state_dict(copy_of(cut.state_dict()))
    _watch(again, gaps[180:230], 180)
    assert same(whole.state_dict(), again.state_dict())


def test_with_an_l2_term_a_collapse_is_still_one() -> None:
    latch = DivergenceLatch(DivergenceConfig(rule="learnt"), 0.5, CPU)
    _watch(latch, np.full(60, -2.0, dtype=np.float32))
    verdict = latch.read().verdict
    assert verdict is not None and verdict.cause is Cause.TRIVIAL_OPTIMUM


def test_a_setting_keeps_its_id() -> None:
    assert not {"rule", "learn_from"} & DivergenceConfig().model_dump(mode="json").keys()
    told = DivergenceConfig(rule="learnt", learn_from=3)
    assert DivergenceConfig.model_validate(told.model_dump(mode="json")) == told
