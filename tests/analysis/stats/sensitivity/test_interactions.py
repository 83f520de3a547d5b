"""Interactions: found where there are some and not where there are none; effects of a forest against enumeration."""

import itertools

import numpy as np
import pytest
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge

import analysis.stats.sensitivity.held_out
from analysis.figures.importance import _sentences, draw_interactions
from analysis.results.load import load
from analysis.results.parquet import records
from analysis.stats.sensitivity.anova import MAX_VALUES, ForestAnova
from analysis.stats.sensitivity.held_out import TREES, features_of
from analysis.stats.sensitivity.interactions import all_interactions, held_out, interaction_rows, interactions
from analysis.stats.survival.survival import holm

FIELDS = ("sampling_steps", "reinit_probability", "initial")


@pytest.fixture
def drawn(make_results, row):
    """Builder of n settings over four fields whose quality or end is a function of them, two seeds each."""

    def make(n, quality=None, bad=None):
        rng = np.random.default_rng(11)
        trials = []
        for i in range(n):
            setting = {
                "sampling_steps": int(rng.choice([1, 2, 5, 10])),
                "reinit_probability": float(rng.uniform(0.05, 0.3)),
                "initial": str(rng.choice(["gaussian", "uniform"])),
            }
            for seed in range(2):
                result = {} if quality is None else {"fd_buffer_best": float(quality(setting, rng))}
                outcome = "diverged" if bad is not None and bad(setting, rng) else "completed"
                own = {"setting_id": f"s{i}", "seed": seed, "fd_buffer_protocol": "p", "seconds_per_iteration": 0.01}
                trials.append(row(f"t{i}-{seed}", outcome, **setting, **own, **result))
        return make_results(trials).trials

    return make


def pair(found, *names):
    (found_row,) = [r for r in records(found.pairs) if {r["first"], r["second"]} == set(names)]
    return found_row


def sign(s):
    return (1 if s["initial"] == "uniform" else -1) * (1 if s["reinit_probability"] > 0.17 else -1)


def test_a_crossed_pair_is_found_though_neither_field_alone_tells_anything(drawn):
    found = interactions(
        drawn(60, lambda s, rng: 50 + 5 * sign(s) + rng.normal(0, 0.5)), FIELDS, "quality", "fd_buffer"
    )
    first = records(found.pairs)[0]
    assert {first["first"], first["second"]} == {"initial", "reinit_probability"}
    assert first["interacts"] and first["p"] < 1e-6
    assert first["gain"] > 0.5 and first["forest_share"] > 0.6
    assert not found.single.better_than_chance
    for other in records(found.pairs)[1:]:
        assert not other["interacts"] and other["forest_share"] < 0.1
    assert "ρ × p0" in found.lines()[0] or "p0 × ρ" in found.lines()[0]
    corner = {(r["first_value"] > "0.2", r["second_value"]): r for r in records(found.effect)}
    assert corner[True, "uniform"]["predicted"] > 52 > 48 > corner[True, "gaussian"]["predicted"]
    assert corner[True, "uniform"]["sum"] == pytest.approx(50, abs=2)


def test_single_effects_are_no_interaction(drawn):
    def added(s, rng):
        return 50 + s["sampling_steps"] + 20 * s["reinit_probability"] + 3 * (s["initial"] == "uniform") + rng.normal()

    found = interactions(drawn(60, added), FIELDS, "quality", "fd_buffer")
    assert found.refusal == "" and found.single.share > 0.7
    assert not any(r["interacts"] for r in records(found.pairs))
    assert max(r["forest_share"] for r in records(found.pairs)) < 0.05
    assert "no pair adds to single effects on held-out settings (best " in found.lines()[0]


def test_effects_that_multiply_do_not_interact_on_the_log_scale(drawn):
    def times(s, rng):
        return s["sampling_steps"] * (4 if s["initial"] == "uniform" else 1) * np.exp(rng.normal(0, 0.05))

    found = interactions(drawn(60, times), FIELDS, "quality", "fd_buffer")
    assert not pair(found, "sampling_steps", "initial")["interacts"]
    assert "log scale" in found.remarks[0]
    top = max(r["predicted"] for r in records(found.effect))
    assert 10 < top < 50, "effects are shown in the metric's own unit"


def test_divergence_of_one_corner(drawn):
    def crossed(s, rng):
        return rng.random() < (0.9 if (s["initial"] == "uniform") == (s["sampling_steps"] < 5) else 0.1)

    found = interactions(drawn(80, bad=crossed), FIELDS, "divergence")
    assert pair(found, "initial", "sampling_steps")["interacts"]
    assert all(0 <= r["predicted"] <= 1 for r in records(found.effect))
    assert sum(r["trials"] for r in records(found.effect)) == 160


def test_noise_is_refused(drawn):
    trials = drawn(40, lambda s, rng: rng.normal(10, 1), bad=lambda s, rng: rng.random() < 0.5)
    for kind in ("quality", "divergence"):
        found = interactions(trials, FIELDS, kind, "fd_buffer")
        assert found.refusal.startswith("no interactions: single effects (a model of single effects explains ")
        assert len(found.pairs) == len(found.effect) == 0
    with pytest.raises(ValueError, match="no interactions: single effects "):
        draw_interactions([found])


def test_other_refusals_in_words(drawn, make_results, row):
    assert interactions(drawn(4), FIELDS, "time").refusal == "too few trials for interactions: 8, 10 needed"
    one = make_results(
        [row(f"t{i}", setting_id=f"s{i}", sampling_steps=i + 1, fd_buffer_best=float(i)) for i in range(20)]
    )
    assert interactions(one.trials, FIELDS, "quality", "fd_buffer").refusal == "only K was varied: no pair to look at"


def test_effects_of_the_forest_are_those_of_enumerating_every_setting(drawn):
    """The decomposition leaf by leaf against predictions at every combination of the fields' values."""
    trials = drawn(30, lambda s, rng: 10 + s["sampling_steps"] * (2 + sign(s)) + rng.normal())
    fields = ("sampling_steps", "initial")
    rows = records(trials)
    y = np.array([t["fd_buffer_best"] for t in rows])
    anova = ForestAnova.of(rows, fields, y, "quality", seed=3)
    columns = features_of(rows, fields, one_hot=False)
    forest = RandomForestRegressor(n_estimators=TREES, min_samples_leaf=2, random_state=3).fit(columns.features, y)
    steps, initial = anova.levels["sampling_steps"], anova.levels["initial"]
    assert steps.ordered == [1, 2, 5, 10] and initial.ordered == ["gaussian", "uniform"]
    shares = [np.mean([t["sampling_steps"] == k for t in rows]) for k in (1, 2, 5, 10)]
    np.testing.assert_allclose(steps.weights, shares)
    places = [[*a, *b] for a, b in itertools.product(steps.features, initial.features)]
    predicted = forest.predict(np.array(places)).reshape(4, 2)
    np.testing.assert_allclose(anova.joint[fields], predicted, rtol=1e-6)
    np.testing.assert_allclose(anova.single["sampling_steps"], predicted @ initial.weights, rtol=1e-6)
    np.testing.assert_allclose(anova.single["initial"], steps.weights @ predicted, rtol=1e-6)
    weights = np.outer(steps.weights, initial.weights)
    variance = float((weights * (predicted - (weights * predicted).sum()) ** 2).sum())
    assert anova.spread == pytest.approx(variance, rel=1e-6)
    whole = anova.single_share("sampling_steps") + anova.single_share("initial") + anova.pair_share(*fields)
    assert whole == pytest.approx(1, abs=1e-6), "with two fields the orders add up to the whole spread"
    assert anova.pair_share(*fields) == pytest.approx(anova.pair_share(*reversed(fields)))


def test_a_field_of_many_values_is_represented_by_quantiles(drawn):
    trials = drawn(60, lambda s, rng: 50 + 5 * sign(s))
    rows = records(trials)
    anova = ForestAnova.of(rows, FIELDS, np.array([t["fd_buffer_best"] for t in rows]), "quality", seed=0)
    own = anova.levels["reinit_probability"]
    assert len(own.ordered) <= MAX_VALUES and own.ordered == sorted(own.ordered)
    assert own.weights.sum() == pytest.approx(1)
    assert np.median([t["reinit_probability"] for t in rows]) == pytest.approx(np.median(own.ordered), abs=0.02)


def test_nothing_is_said_of_time_unless_it_is_asked_for(drawn):
    trials = drawn(40, lambda s, rng: 50 + 5 * sign(s) + rng.normal(0, 0.5))
    assert [i.target for i in all_interactions(trials, FIELDS, "fd_buffer")] == ["fd_buffer", "divergence"]
    asked = all_interactions(trials, FIELDS, "fd_buffer", time=True)
    assert [i.target for i in asked] == ["fd_buffer", "seconds_per_iteration", "divergence"]


def test_p_values_are_corrected_over_targets_too(drawn):
    trials = drawn(
        80,
        lambda s, rng: 50 + 5 * sign(s) + rng.normal(0, 4),
        bad=lambda s, rng: rng.random() < (0.9 if (s["initial"] == "uniform") == (s["sampling_steps"] < 5) else 0.1),
    )
    alone = [interactions(trials, FIELDS, kind, "fd_buffer") for kind in ("quality", "divergence")]
    both = all_interactions(trials, FIELDS, "fd_buffer")
    raw = []
    for found in alone:  # the smallest of three is three times its own
        ps = sorted(r["p"] for r in records(found.pairs))
        raw.append(ps[0] / 3)
    for one, p in zip(both, raw, strict=True):
        least = min(r["p"] for r in records(one.pairs))
        assert least >= 5 * p * 0.999, "of six tests the two smallest count at least six and five times"


@pytest.mark.slow
def test_pairs_of_noise_interact_in_at_most_a_twentieth_of_studies(make_results, row):
    fields = (*FIELDS, "step_size")
    named = 0
    for study in range(60):
        rng = np.random.default_rng(study)
        trials = [
            row(f"t{i}", "diverged" if rng.random() < 0.3 else "completed", setting_id=f"s{i}",
                sampling_steps=int(rng.choice([1, 2, 5, 10])), initial=str(rng.choice(["gaussian", "uniform"])),
                reinit_probability=float(rng.uniform(0, 0.3)), step_size=float(rng.choice([0.5, 1.0, 2.0])),
                fd_buffer_best=float(rng.normal(5, 1)), fd_buffer_protocol="p")
            for i in range(24)
        ]  # fmt: skip
        found = all_interactions(make_results(trials).trials, fields, "fd_buffer")
        named += any(i.pairs["interacts"].any() for i in found if len(i.pairs))
    assert named <= 5  # of 60 a twentieth is 3; at most 5 with a chance of 92% at that rate


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_the_same_seed_gives_the_same_and_the_figure_shows_the_frames(synthetic):
    trials = load(synthetic(60)).trials
    fields = ("sampling_steps", "initial", "step_size")
    first, second = (all_interactions(trials, fields, "fd_buffer") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.pairs.equals(b.pairs) and a.effect.equals(b.effect)
    assert [i.target for i in first] == ["fd_buffer", "divergence"]
    shown = [i for i in first if not i.refusal]
    assert shown
    figure = draw_interactions(first)
    bars = [t for t in figure.data if t.type == "bar"]
    assert [list(t.x) for t in bars] == [[r["forest_share"] for r in records(i.pairs)] for i in shown]
    gains = [t for t in figure.data if t.name == "gain on held-out settings"]
    assert [list(t.x) for t in gains] == [[r["gain"] for r in records(i.pairs)] for i in shown]
    lines = [t for t in figure.data if t.type == "scatter" and t.mode == "lines+markers"]
    interacting = [i for i in shown if i.pairs["interacts"].any()]
    assert interacting and sum(len(t.y) for t in lines) == sum(len(i.effect) for i in interacting)
    assert len(interaction_rows(first)) == sum(len(i.pairs) for i in first)
    assert all(line.partition(":")[0].lower() in _sentences(first).lower() for i in first for line in i.lines())


@pytest.mark.parametrize("kind", ["quality", "divergence"])
def test_models_of_places_are_those_of_one_trial_a_row(kind):
    rng = np.random.default_rng(3)
    x, trials, fold = rng.normal(size=(90, 5)), rng.integers(1, 4, 90), np.arange(90) % 3
    rows = np.repeat(np.arange(90), trials)
    y = x[rows] @ rng.normal(size=5) + 3 + rng.normal(size=len(rows))
    y = (y > 2).astype(float) if kind == "divergence" else y
    expected = np.empty(90)
    for k in range(3):
        train = fold[rows] != k
        if kind == "divergence":
            model = LogisticRegression(C=1.0, solver="newton-cholesky").fit(x[rows[train]], y[train])
            expected[fold == k] = model.predict_proba(x[fold == k])[:, 1]
        else:
            expected[fold == k] = Ridge(alpha=1.0).fit(x[rows[train]], y[train]).predict(x[fold == k])
    total = np.bincount(rows, weights=y)
    np.testing.assert_allclose(held_out(kind, x, trials.astype(float), total, fold), expected, rtol=0, atol=1e-10)


def test_a_fold_without_a_divergence_predicts_none():
    x, trials, fold = np.arange(6.0)[:, None], np.full(6, 2.0), np.arange(6) // 3
    predicted = held_out("divergence", x, trials, np.array([0.0, 0, 0, 1, 2, 1]), fold)
    assert predicted[3:].tolist() == [0, 0, 0] and (predicted[:3] > 0.5).all()


def test_seeds_whose_fields_differ_are_places_of_their_own(drawn):
    trials = drawn(40, lambda s, rng: 50 + 5 * sign(s) + rng.normal(0, 0.5))
    same = interactions(trials, FIELDS, "quality", "fd_buffer")
    trials = trials.assign(
        reinit_probability=trials["reinit_probability"] + 1e-12 * (trials["seed"] == 1).astype(float)
    )
    apart = interactions(trials, FIELDS, "quality", "fd_buffer")
    for name in ("gain", "gain_se"):
        np.testing.assert_allclose(apart.pairs[name].to_numpy(float), same.pairs[name].to_numpy(float), atol=1e-8)


def test_a_forest_of_a_sample_of_the_trials_is_said(drawn, monkeypatch):
    trials = drawn(60, lambda s, rng: 50 + 5 * sign(s) + rng.normal(0, 0.5))
    whole = interactions(trials, FIELDS, "quality", "fd_buffer")
    monkeypatch.setattr(analysis.stats.sensitivity.held_out, "MAX_TRIALS", 100)
    monkeypatch.setattr(analysis.stats.sensitivity.held_out, "TREE_TRIALS", 80)
    found = interactions(trials, FIELDS, "quality", "fd_buffer")
    said = "forests of 30 trees, each grown on 80 of 120 trials drawn at random"
    assert whole.remarks == () and found.remarks == (said,)
    assert said[1:] in _sentences([found])
    exact = ["first", "second", "gain", "gain_se", "p"]
    assert found.pairs[exact].equals(whole.pairs[exact]), "gains are of all trials"
    (share,), (before,) = ([r["forest_share"] for r in records(f.pairs)][:1] for f in (found, whole))
    assert share == pytest.approx(before, abs=0.15)
