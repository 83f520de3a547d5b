"""Importances: against functions whose answer is known, refusals in words, no skill claimed on noise."""

import numpy as np
import pytest

import analysis.stats.sensitivity.held_out
from analysis.figures.importance import draw_importance
from analysis.results.load import load
from analysis.results.parquet import records
from analysis.stats.sensitivity.held_out import Effort
from analysis.stats.sensitivity.importance import importances
from analysis.stats.survival.rates import expected_ends, rate
from analysis.stats.trials.trial import ENDED_BADLY

FIELDS = ("sampling_steps", "step_size", "reinit_probability", "initial")


@pytest.fixture
def drawn(make_results, row):
    """Builder of n settings over four fields whose results are a function of them, two seeds each."""

    def make(n, quality=None, bad=None, **values):
        rng = np.random.default_rng(5)
        trials = []
        for i in range(n):
            setting = {
                "sampling_steps": int(rng.integers(3, 21)),
                "step_size": float(10 ** rng.uniform(-1, 1)),
                "reinit_probability": float(rng.uniform(0.05, 0.3)),
                "initial": str(rng.choice(["gaussian", "uniform"])),
            }
            for seed in range(2):
                result = {} if quality is None else {"fd_buffer_best": float(quality(setting, rng))}
                pace = 0.002 * setting["sampling_steps"] * (1 + 0.01 * rng.normal())
                outcome = "diverged" if bad is not None and bad(setting, rng) else "completed"
                common = {"setting_id": f"s{i}", "seed": seed, "seconds_per_iteration": pace, "fd_buffer_protocol": "p"}
                trials.append(row(f"t{i}-{seed}", outcome, **setting, **common, **result, **values))
        return make_results(trials).trials

    return make


def importance(trials, fields, kind, metric=None):
    return importances(trials, fields, metric, kinds=[kind])[0]


def by_model(found, model):
    return {r["field"]: r["importance"] for r in records(found.fields) if r["model"] == model}


def test_an_additive_function_is_recovered_as_shares_of_its_variance(drawn):
    trials = drawn(80, lambda s, _: 100 + 0.35 * s["sampling_steps"] + 12 * s["reinit_probability"])
    found = importance(trials, FIELDS, "quality", "fd_buffer")
    assert (found.trials, found.settings, found.refusal) == (160, 80, "")
    linear = by_model(found, "linear")
    parts = {"sampling_steps": 0.35, "reinit_probability": 12}
    whole = trials["fd_buffer_best"].to_numpy(dtype=float).var()
    for field, slope in parts.items():
        assert linear[field] == pytest.approx((slope * trials[field].to_numpy(dtype=float)).var() / whole, abs=0.05)
    assert linear["initial"] == pytest.approx(0, abs=0.01)
    forest = by_model(found, "forest")
    assert forest["sampling_steps"] > forest["reinit_probability"] > 0.1 > forest["step_size"]
    assert {s.model: s.share > 0.9 for s in found.skills} == {"forest": True, "linear": True}
    assert found.skills[1].share == pytest.approx(1, abs=1e-3)
    assert records(found.fields)[0]["field"] == "sampling_steps"
    slopes = {r["field"]: r["direction"] for r in records(found.fields) if r["model"] == "linear"}
    spread = trials["sampling_steps"].to_numpy(dtype=float).std()
    assert slopes["sampling_steps"] == pytest.approx(0.35 * spread, rel=0.02) and slopes["initial"] is None


def test_the_linear_model_admits_that_it_sees_no_interaction(drawn):
    def crossed(s, rng):
        return 50 + (1 if s["initial"] == "uniform" else -1) * (1 if s["reinit_probability"] > 0.15 else -1) * 5

    found = importance(drawn(80, crossed), FIELDS, "quality", "fd_buffer")
    forest, linear = found.skills
    assert forest.better_than_chance and not linear.better_than_chance
    assert set(by_model(found, "linear").values()) == {None}
    assert "linear explains" in found.lines()[1] and "no better than chance" in found.lines()[1]


def test_divergence(drawn):
    trials = drawn(60, bad=lambda s, rng: rng.random() < (0.95 if s["step_size"] > 1 else 0.05))
    found = importance(trials, FIELDS, "divergence")
    forest = by_model(found, "forest")
    assert max(forest, key=forest.get) == "step_size"
    assert forest["step_size"] > 0.4
    slope = next(r for r in records(found.fields) if (r["field"], r["model"]) == ("step_size", "linear"))
    assert slope["direction"] > 1


def test_a_cut_off_trial_counts_by_its_chance_to_end_badly(make_results, row):
    rows = (
        [row(f"d{i}", "diverged", iteration=20) for i in range(4)]
        + [row(f"p{i}", "pruned", iterations_done=300) for i in range(20)]
        + [row(f"e{i}", "pruned", iterations_done=10) for i in range(2)]
        + [row("late", "collapsed", iteration=400)]
        + [row(f"c{i}") for i in range(3)]
    )
    trained, y = expected_ends(rows, ENDED_BADLY)
    assert len(trained) == 30 and y.mean() == pytest.approx(rate(rows, events=ENDED_BADLY).rate)
    later = 1 / 4  # of the four that went on after 300 one collapsed
    assert sorted(set(np.round(y, 9))) == [0.0, later, round(1 - (1 - 4 / 28) * (1 - later), 9), 1.0]


def test_pruning_by_a_field_makes_it_no_cause_of_divergence(make_results, row):
    """Every trial diverges early with the same chance; of small K nearly all others are pruned after that."""
    named, chances, shares = 0, [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        rows = []
        for i in range(160):
            k, alpha = int(rng.choice([1, 2, 5, 10])), float(rng.uniform(0.5, 2))
            values = {"sampling_steps": k, "step_size": alpha, "setting_id": f"s{i}"}
            if rng.random() < 0.3:
                rows.append(row(f"t{i}", "diverged", iteration=int(rng.integers(0, 100)), **values))
            elif k < 5 and rng.random() < 0.9:
                rows.append(row(f"t{i}", "pruned", iterations_done=120, **values))
            else:
                rows.append(row(f"t{i}", **values))
        found = importance(make_results(rows).trials, ("sampling_steps", "step_size"), "divergence")
        named += found.fields["stands_out"].any()
        trained, y = expected_ends(rows, ENDED_BADLY)
        small = np.array([t["sampling_steps"] < 5 for t in trained])
        judged = np.array([t["outcome"] != "pruned" for t in trained])
        chances.append(y[small].mean() - y[~small].mean())
        shares.append(y[small & judged].mean() - y[~small & judged].mean())
    assert named == 0
    assert abs(np.mean(chances)) < 0.1
    assert np.mean(shares) > 0.3, "without the pruned trials small K looks like the cause"


@pytest.mark.long
def test_no_field_stands_out_of_noise_in_more_than_a_twentieth_of_studies(make_results, row):
    named = 0
    for study in range(60):
        rng = np.random.default_rng(study)
        rows = [
            row(f"t{i}", "diverged" if rng.random() < 0.4 else "completed", setting_id=f"s{i}",
                sampling_steps=int(rng.choice([1, 2, 5, 10])), initial=str(rng.choice(["gaussian", "uniform"])),
                reinit_probability=float(rng.uniform(0, 0.3)), step_size=float(rng.choice([0.5, 1.0, 2.0])),
                seconds_per_iteration=float(rng.normal(1, 0.1)), fd_buffer_best=float(rng.normal(5, 1)))
            for i in range(20)
        ]  # fmt: skip
        found = importances(make_results(rows).trials, FIELDS, "fd_buffer")
        named += any(i.fields["stands_out"].any() for i in found if len(i.fields))
    assert named <= 5  # of 60 a twentieth is 3; at most 5 with a chance of 92% at that rate


def test_noise_has_no_importances(drawn):
    trials = drawn(40, lambda s, rng: rng.normal(10, 1), bad=lambda s, rng: rng.random() < 0.5)
    for kind in ("quality", "divergence"):
        found = importance(trials, FIELDS, kind, "fd_buffer")
        assert found.refusal.startswith("no importances: forest explains ")
        assert "no better than chance" in found.refusal
        assert len(found.fields) == 0
    with pytest.raises(ValueError, match="no importances: forest explains "):
        draw_importance([found])


def test_a_result_drawn_per_setting_is_not_learnt_through_its_seeds(drawn):
    draws = {}
    trials = drawn(40, lambda s, rng: draws.setdefault(s["step_size"], rng.normal(10, 1)))
    assert importance(trials, FIELDS, "quality", "fd_buffer").refusal.startswith("no importances")


def test_refusals_in_words(drawn, make_results, row):
    few = drawn(4, lambda s, _: 1.0 + s["sampling_steps"])
    assert importance(few, FIELDS, "time").refusal == "too few trials for importances: 8, 10 needed"
    seeds = make_results([row(f"t{i}", setting_id=f"s{i % 2}", seed=i, sampling_steps=i % 2) for i in range(12)]).trials
    assert importance(seeds, FIELDS, "time").refusal == "too few settings for importances: 2, 5 needed"
    same = make_results([row(f"t{i}", setting_id=f"s{i}") for i in range(12)]).trials
    assert importance(same, FIELDS, "time").refusal == "no field was varied"
    calm = drawn(12)
    assert importance(calm, FIELDS, "divergence").refusal == "0 of 24 diverged or collapsed: nothing to tell apart"
    assert importance(calm, FIELDS, "divergence").lines()[0].startswith("divergence or collapse: 0 of 24")


def test_what_is_left_out_is_said(drawn, make_results, row):
    trials = drawn(12, lambda s, _: s["sampling_steps"])
    other = make_results(
        [row(f"x{i}", setting_id=f"x{i}", fd_buffer_best=99.0, fd_buffer_protocol="q") for i in range(3)]
    ).trials
    pruned = make_results([row("p", "pruned", fd_buffer_best=5.0)]).trials
    import pandas as pd

    both = pd.concat([trials, other, pruned], ignore_index=True)
    found = importance(both, FIELDS, "quality", "fd_buffer")
    assert found.trials == 24
    assert "3 trials of another protocol are left out" in found.remarks
    (said,) = importance(both, FIELDS, "divergence").remarks
    assert said.startswith("1 trials that were cut off count by the chance that they would have ended badly; pruning")


def test_missing_numbers_are_a_value_of_their_own(make_results, row):
    trials = [
        row(f"t{i}", setting_id=f"s{i}", gradient_clamp=None if i % 2 else 1.0, sampling_steps=i % 5 + 1,
            seconds_per_iteration=0.03 if i % 2 else 0.01)
        for i in range(60)
    ]  # fmt: skip
    found = importance(make_results(trials).trials, ("gradient_clamp", "sampling_steps"), "time")
    assert by_model(found, "linear")["gradient_clamp"] == pytest.approx(1, abs=0.15)
    assert by_model(found, "forest")["sampling_steps"] == pytest.approx(0, abs=0.1)


def test_the_same_seed_gives_the_same_numbers_and_the_figure_shows_them(synthetic):
    results = load(synthetic(45))
    fields = ("sampling_steps", "initial", "step_size")
    first, second = (importances(results.trials, fields, "fd_buffer") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.fields.equals(b.fields)
    assert [i.target for i in first] == ["fd_buffer", "seconds_per_iteration", "divergence"]
    assert by_model(first[1], "linear")["sampling_steps"] > 0.4
    figure = draw_importance(first)
    shown = [i for i in first if not i.refusal]
    assert len(figure.layout.annotations) == len(shown)
    drawn = sum(len(t.x) for t in figure.data)
    assert drawn == sum(int(i.fields["importance"].notna().sum()) for i in shown)
    assert figure.data[0].y[0] == "K"


def test_a_large_study_is_fitted_on_less_and_says_so(drawn, monkeypatch):
    trials = drawn(80, lambda s, _: 100 + 0.35 * s["sampling_steps"] + 12 * s["reinit_probability"])
    whole = importance(trials, FIELDS, "quality", "fd_buffer")
    assert whole.remarks == () and Effort(160, 80).words() == []
    monkeypatch.setattr(analysis.stats.sensitivity.held_out, "MAX_TRIALS", 159)
    monkeypatch.setattr(analysis.stats.sensitivity.held_out, "TREE_TRIALS", 70)
    sparing = importance(trials, FIELDS, "quality", "fd_buffer")
    (said,) = sparing.remarks
    assert said.startswith("forests of 30 trees, each grown on 70 of 160 trials drawn at random; fields' values drawn")
    assert (sparing.trials, sparing.settings) == (160, 80), "every trial is scored all the same"
    for model in ("forest", "linear"):
        assert by_model(sparing, model) == pytest.approx(by_model(whole, model), abs=0.1)
    monkeypatch.setattr(analysis.stats.sensitivity.held_out, "MAX_SETTINGS", 79)
    (said,) = importance(trials, FIELDS, "quality", "fd_buffer").remarks
    assert said.endswith("; 2 folds of 80 settings")
    assert said in importance(trials, FIELDS, "quality", "fd_buffer").lines()
