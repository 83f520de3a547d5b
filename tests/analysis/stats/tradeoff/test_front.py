"""Settings on the Pareto front, and how sure their places are."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.results.load import load
from analysis.results.parquet import records
from analysis.stats.tradeoff.front import pareto, settings_front
from analysis.stats.trials.spread import mean_interval


def brute_force(points: np.ndarray, directions: tuple[str, ...]) -> list[bool]:
    def dominates(a, b) -> bool:
        signed = [(x - y) * (1 if d == "minimize" else -1) for x, y, d in zip(a, b, directions, strict=True)]
        return all(s <= 0 for s in signed) and any(s < 0 for s in signed)

    return [not any(dominates(other, point) for other in points) for point in points]


@pytest.mark.parametrize("directions", [("minimize", "minimize"), ("maximize", "minimize"), ("maximize",) * 3])
@pytest.mark.parametrize("seed", range(5))
def test_pareto_is_brute_force(directions, seed):
    rng = np.random.default_rng(seed)
    # Whole numbers, so that ties and equal points occur.
    points = rng.integers(0, 8, (60, len(directions))).astype(float)
    front = pareto(points, directions)
    assert front.tolist() == brute_force(points, directions)
    assert 0 < front.sum() < 60


def test_pareto_of_nothing_and_of_what_has_no_order():
    assert pareto([], ("minimize", "minimize")).tolist() == []
    with pytest.raises(ValueError, match="finite"):
        pareto([[1.0, float("nan")]], ("minimize", "minimize"))


@pytest.fixture
def seeds(row):
    """Trials of one setting: a quality and a time per seed; None stands for a trial that diverged without a value."""

    def make(setting, qualities, pace, **values):
        return [
            row(
                f"{setting}{i}",
                "diverged" if quality is None else "completed",
                setting_id=setting,
                seed=i,
                fd_buffer_best=quality,
                fd_buffer_protocol=None if quality is None else "p",
                seconds_per_iteration=pace,
                **({"step_size": float(ord(setting[0]))} | values),
            )
            for i, quality in enumerate(qualities)
        ]

    return make


def front(results, **options):
    return {r["setting_id"]: r for r in records(settings_front(results.trials, "fd_buffer", **options))}


def test_front_probability_of_clear_and_of_equal_settings(make_results, seeds):
    trials = [
        *seeds("a", [1.0, 1.1, 0.9], 2.0),  # best, slow: on every front
        *seeds("b", [5.0, 5.1, 4.9], 1.0),  # fastest: on every front
        *seeds("c", [9.0, 9.1, 8.9], 3.0),  # beaten in both whatever the seeds
        *seeds("d", [5.0, 5.1, 4.9], 1.0),  # as b: the better draw of two is on the front
    ]
    got = front(make_results(trials))
    assert got["a"]["front_probability"] == 1.0
    assert got["c"]["front_probability"] == 0.0
    assert 0.4 < got["b"]["front_probability"] < 0.7
    assert 0.4 < got["d"]["front_probability"] < 0.7
    assert [got[s]["on_front"] for s in "abcd"] == [True, True, False, True]
    assert got["a"]["trial_ids"] == "demo/a0, demo/a1, demo/a2"
    assert got["a"]["quality_high"] == pytest.approx(mean_interval([1.0, 1.1, 0.9])[2])


def test_front_probability_is_the_exact_chance_of_a_small_case(make_results, seeds):
    # Two seeds each, one setting against another of the same time: of the means 1, 3, 5 (chances 1/4, 1/2, 1/4) around
    # 3, stretched by sqrt(2), against a constant 2 that varies by nothing it wins where the mean is the smallest.
    got = front(make_results([*seeds("a", [1.0, 5.0], 1.0), *seeds("b", [2.0, 2.0], 1.0)]), draws=20_000)
    assert got["a"]["front_probability"] == pytest.approx(1 / 4, abs=4 * math.sqrt(3 / 16 / 20_000))
    assert got["b"]["front_probability"] == pytest.approx(3 / 4, abs=4 * math.sqrt(3 / 16 / 20_000))


def test_a_setting_that_often_diverges_is_seldom_on_the_front(make_results, seeds):
    got = front(make_results([*seeds("a", [1.0, None, None], 1.0), *seeds("b", [2.0, 2.1, 1.9], 2.0)]), draws=20_000)
    # A draw of three without the one that completed has the chance (2/3)^3.
    assert got["a"]["front_probability"] == pytest.approx(1 - 8 / 27, abs=0.015)
    assert got["b"]["front_probability"] == pytest.approx(8 / 27, abs=0.015)
    assert (got["a"]["completed"], got["a"]["ended_badly"]) == (1, 2)
    never = front(make_results([*seeds("a", [None, None], 1.0), *seeds("b", [2.0], 2.0)]))
    assert never["a"]["front_probability"] == 0.0
    assert never["a"]["quality"] is None
    assert never["a"]["cost"] == 1.0


def test_one_seed_borrows_the_spread_of_others_and_says_so(make_results, seeds):
    alone = front(make_results([*seeds("a", [1.0], 1.0), *seeds("b", [1.1], 1.0)]))
    assert {r["spread_from"] for r in alone.values()} == {"nothing"}
    assert (alone["a"]["front_probability"], alone["b"]["front_probability"]) == (1.0, 0.0)
    assert alone["a"]["quality_low"] is None
    got = front(make_results([*seeds("a", [1.0], 1.0), *seeds("b", [1.1], 1.0), *seeds("c", [8.0, 9.0], 4.0)]))
    assert [got[s]["spread_from"] for s in "abc"] == ["other settings", "other settings", "own seeds"]
    assert 0.2 < got["b"]["front_probability"] < 0.5 < got["a"]["front_probability"] < 0.8


def test_fronts_of_other_protocols_devices_and_larger_is_better(make_results, seeds):
    trials = [*seeds("a", [1.0], 1.0), *seeds("b", [2.0], 2.0, hardware="Other"), *seeds("c", [3.0], 3.0)]
    trials[2] |= {"fd_buffer_protocol": "q"}
    assert {r["on_front"] for r in front(make_results(trials)).values()} == {True}
    right = [t | {"accuracy_best": t["fd_buffer_best"] / 10, "seconds_per_iteration": 1.0} for t in trials]
    right = [t | {"hardware": "x"} for t in right]
    frame = settings_front(make_results(right).trials, "accuracy")
    assert {r["setting_id"]: r["front_probability"] for r in records(frame)} == {"a": 0.0, "b": 0.0, "c": 1.0}
    with pytest.raises(KeyError):
        settings_front(make_results(right).trials, "nonsense")
    assert len(settings_front(make_results([]).trials, "accuracy")) == 0


def test_the_same_trials_give_the_same_probabilities(synthetic):
    trials = load(synthetic(24)).trials
    assert settings_front(trials, "fd_buffer").equals(settings_front(trials, "fd_buffer"))


def test_settings_of_one_seed_vary_by_the_sampling_of_their_scores(make_results, scored):
    trials = [scored("a", 0.175, 1.0, 0.02), scored("b", 0.199, 1.0, 0.02)]
    front = {r["setting_id"]: r for r in records(settings_front(make_results(trials).trials, "fd_buffer"))}
    assert [front[s]["spread_from"] for s in "ab"] == ["sampling error"] * 2
    assert front["a"]["quality_se"] == 0.02
    # The difference is normal with sd 0.0283, and a is first where it is above -0.024.
    assert front["a"]["front_probability"] == pytest.approx(stats.norm.cdf(0.024 / 0.02 / 2**0.5), abs=0.04)
    bare = [scored("a", 0.175, 1.0, None), scored("b", 0.199, 1.0, None)]
    front = {r["setting_id"]: r for r in records(settings_front(make_results(bare).trials, "fd_buffer"))}
    assert (front["a"]["spread_from"], front["a"]["front_probability"], front["a"]["quality_se"]) == (
        "nothing",
        1,
        None,
    )


def test_an_equal_setting_and_seed_counts_once_on_the_front(make_results, scored):
    same = [scored(f"t{i}", 0.2, 1.0, 0.02, seed=0) | {"setting_id": "a"} for i in range(6)]
    (only,) = records(settings_front(make_results(same).trials, "fd_buffer"))
    assert (only["completed"], only["quality_low"]) == (1, None)
