"""Phase diagrams: the model against a direct optimisation, refusals in words, cells nobody tried kept apart."""

import numpy as np
import pytest
from scipy.special import expit

from analysis.figures.phase import phase_caption, phase_figure
from analysis.figures.survival import hazard_figure
from analysis.results.load import load
from analysis.results.parquet import records
from analysis.stats.space.censored_logistic import (
    fit_censored,
)
from analysis.stats.space.phase import phase, phase_fields, refuse


@pytest.fixture
def steep(make_results, row):
    """120 trials over K and alpha that end badly where log(alpha) > log(K) - 0.5, with some noise."""
    rng = np.random.default_rng(3)
    trials = []
    for i in range(120):
        k, alpha = int(np.exp(rng.uniform(0, np.log(30)))), float(10 ** rng.uniform(-1, 1.3))
        bad = rng.random() < expit(4 * (np.log(alpha) - np.log(k) + 0.5))
        values = {"sampling_steps": k, "step_size": alpha, "setting_id": f"s{i}"}
        trials.append(row(f"t{i}", ("collapsed" if i % 5 == 0 else "diverged") if bad else "completed", **values))
    trials.append(row("cut", "pruned", sampling_steps=30, step_size=0.1))
    return make_results(trials, varied=["sampling_steps", "step_size", "initial"])


def test_the_edge_is_found_and_its_band_holds_it(steep):
    diagram = phase(steep.trials, "sampling_steps", "step_size")
    assert (diagram.judged, diagram.left_out, diagram.refusal) == (120, 1, "")
    inside = [e for e in records(diagram.edge) if e["y"] is not None]
    assert len(inside) > 20
    for e in inside:
        assert e["y_low"] < e["y"] < e["y_high"]
        truth = np.log10(diagram_k(diagram, e["x"])) - 0.5 / np.log(10)
        assert e["y_low"] - 0.15 < truth < e["y_high"] + 0.15
    region = diagram.surface.region(0.5)
    assert {-1, 0, 1} == set(region.ravel().tolist())
    assert region[0, -1] == -1 and region[-1, 0] == 1  # small alpha at large K is stable, the reverse is not
    assert (diagram.surface.low <= diagram.surface.probability).all()
    # A stricter limit leaves less that is certainly below it.
    assert (diagram.surface.region(0.1) == -1).sum() < (region == -1).sum()
    assert "of the range tried" in phase_caption(diagram)


def diagram_k(diagram, position):
    return 10**position if diagram.x.logarithmic else position


def test_cells_account_for_every_trial_and_tell_unexplored_from_good(make_results, row):
    trials = [
        row("a", sampling_steps=1, step_size=1.0),
        row("b", "diverged", sampling_steps=1, step_size=1.0),
        row("c", "collapsed", sampling_steps=5, step_size=1.0),
        row("d", "stopped", sampling_steps=5, step_size=2.0),
        row("e", sampling_steps=10, step_size=2.0),
    ]
    diagram = phase(make_results(trials).trials, "sampling_steps", "step_size")
    cells = {(c["x"], c["y"]): c for c in records(diagram.cells)}
    assert {k: c["state"] for k, c in cells.items()} == {
        ("1", "1"): "mixed",
        ("1", "2"): "unexplored",
        ("5", "1"): "bad",
        ("5", "2"): "unjudged",
        ("10", "1"): "unexplored",
        ("10", "2"): "good",
    }
    assert sum(c["trials"] for c in cells.values()) == 5
    assert (cells["10", "2"]["low"], cells["10", "2"]["rate"]) == (0, 0) and cells["10", "2"]["high"] > 0.7
    assert cells["5", "2"]["rate"] is None
    assert diagram.refusal == "too few trials for a region: 4 judged, 10 needed"
    assert diagram.surface is None and len(diagram.edge) == 0


def pruned_rows(row, rng, n, chance, late=False):
    """Trials over K and alpha that end badly with a chance by K, and of whose rest half is pruned, and half again."""
    rows = []
    for i in range(n):
        k, alpha = (1, 2, 5, 10)[i % 4], (0.5, 1.0, 2.0)[i // 4 % 3]
        values = {"sampling_steps": k, "step_size": alpha, "setting_id": f"s{i}"}
        cut = next((at for at in (150, 300) if rng.random() < 0.5), 600)
        when = int(rng.integers(0, 600 if late else 120))
        if rng.random() < chance[k] and when < cut:
            rows.append(row(f"t{i}", "diverged", iteration=when, **values))
        else:
            rows.append(row(f"t{i}", "completed" if cut == 600 else "pruned", iterations_done=cut, **values))
    return rows


@pytest.mark.parametrize("late", [False, True])
def test_the_region_of_pruned_trials_is_near_the_truth(make_results, row, late):
    chance = {1: 0.6, 2: 0.4, 5: 0.2, 10: 0.1}
    truth = np.array(list(chance.values()))
    surfaces, judged = [], []
    for seed in range(12):
        rows = pruned_rows(row, np.random.default_rng(seed), 300, chance, late)
        trials = make_results(rows).trials
        diagram = phase(trials, "sampling_steps", "step_size")
        surfaces.append(diagram.surface)
        judged.append(phase(trials[trials["outcome"] != "pruned"], "sampling_steps", "step_size").surface)
        assert "pruned: censored for doing badly (informative censoring)" in " ".join(diagram.lines())
    mean = np.mean([s.probability for s in surfaces], axis=0)
    # Of trials that end badly late three in four are cut off, and twelve studies leave an error of some percent.
    assert np.abs(mean - truth).max() < (0.12 if late else 0.08)
    assert np.abs(mean - truth).mean() < 0.06
    covered = np.mean([(s.low < truth) & (truth < s.high) for s in surfaces])
    assert covered > 0.85
    # Without the pruned trials a third or more would be added to the rate.
    assert (np.mean([s.probability for s in judged], axis=0) - truth).mean() > 0.15


def test_censored_trials_are_counted_by_kaplan_meier_where_fields_say_nothing(make_results, row):
    rng = np.random.default_rng(9)
    trials = make_results(pruned_rows(row, rng, 400, dict.fromkeys((1, 2, 5, 10), 0.3), late=True)).trials
    rate = phase(trials, "sampling_steps", "step_size").rate
    bad = (trials["outcome"] == "diverged").to_numpy()
    known = (trials["outcome"] != "pruned").to_numpy()
    when = trials["iteration"].fillna(trials["iterations_done"]).to_numpy(dtype=float) + 0.5 * bad
    model, share = fit_censored(np.zeros((len(bad), 1)), bad, known, when)
    assert expit(model.odds(np.zeros((1, 1))))[0] == pytest.approx(rate.rate, abs=0.005)
    assert share[known].tolist() == [1.0] * int(known.sum()) and 0 < share[~known].min() < share[~known].max() < 1


def test_the_test_of_both_fields_holds_its_level_under_pruning(make_results, row):
    rng = np.random.default_rng(10)
    chance = dict.fromkeys((1, 2, 5, 10), 0.3)
    shown = [phase(make_results(pruned_rows(row, rng, 60, chance)).trials, "sampling_steps", "step_size").surface
             for _ in range(40)]  # fmt: skip
    assert sum(s is not None for s in shown) <= 5


def test_bins_of_many_values_hold_every_trial(steep):
    diagram = phase(steep.trials, "sampling_steps", "step_size")
    assert diagram.cells["trials"].sum() == 121
    assert len(diagram.cells) == 36
    for t in records(steep.trials):
        x, y = diagram.x.position(t["sampling_steps"]), diagram.y.position(t["step_size"])
        cells = diagram.cells
        here = cells[(cells["x_low"] <= x) & (x <= cells["x_high"]) & (cells["y_low"] <= y) & (y <= cells["y_high"])]
        assert (here["trials"] > 0).any()


def test_refusals_in_words(make_results, row):
    assert refuse(9, 4) == "too few trials for a region: 9 judged, 10 needed"
    assert refuse(30, 0) == "no edge to estimate: 0 of 30 diverged or collapsed; 0/30 bad, at most 11% at 95%"
    assert refuse(30, 29).startswith("no edge to estimate: 1 of 30 completed; 29/30 bad")
    assert refuse(30, 2) == ""
    # Every cell ends badly half of the time: nothing to see.
    noise = [
        row(f"t{i}", "diverged" if i % 2 else "completed", sampling_steps=1 + i // 2 % 3, step_size=1.0 + i // 6 % 3)
        for i in range(36)
    ]
    diagram = phase(make_results(noise).trials, "sampling_steps", "step_size")
    assert diagram.refusal.startswith(
        "no edge to estimate: more or less of K and α does not explain which trials ended badly"
    )
    assert diagram.surface is None
    assert diagram.lines()[0] == diagram.refusal


def test_a_field_of_text_has_regions_and_no_edge(make_results, row):
    trials = [
        row(
            f"t{i}",
            "diverged" if i % 2 and i % 7 else "completed",
            initial=["gaussian", "uniform"][i % 2],
            sampling_steps=i // 2 % 4,
        )
        for i in range(240)
    ]
    diagram = phase(make_results(trials).trials, "sampling_steps", "initial")
    assert diagram.surface is not None and len(diagram.edge) == 0
    assert diagram.surface.region(0.5).tolist()[0] == [-1] * len(diagram.surface.x)


def test_fields_of_the_diagram(steep, make_results, row):
    assert phase_fields(steep, "demo") == ("sampling_steps", "step_size")
    fields = ("buffer_size", "reinit_probability", "initial")
    trials = [
        row(f"t{i}", buffer_size=1000 * (1 + i % 3), reinit_probability=0.01 * i, initial="ab"[i % 2]) for i in range(8)
    ]
    assert phase_fields(make_results(trials, varied=fields), "demo") == ("reinit_probability", "buffer_size")
    one = make_results([row("t1"), row("t2", initial="uniform")], varied=["initial"])
    assert set(phase_fields(one, "demo")) == {"initial", "sampling_steps"}


def test_figure_draws_every_trial_and_hatches_what_nobody_tried(steep, synthetic):
    figure = phase_figure(steep.trials)
    named = {t.name.split(" (")[0]: t for t in figure.data if t.name}
    drawn = sum(len(named[o].x) for o in ("completed", "diverged", "collapsed", "pruned"))
    assert drawn == 121
    empty = int((phase(steep.trials, "sampling_steps", "step_size").cells["state"] == "unexplored").sum())
    assert named["no trial"].fillpattern.shape == "/"
    assert named["no trial"].name == f"no trial ({empty} of 36 cells)"
    assert len(named["no trial"].x) == 6 * empty
    assert "edge: 50% end badly" in named and "bad rate below 50% at 95%" in named
    few = phase_figure(load(synthetic(6)).trials)
    assert few.layout.annotations[0].text == "too few trials for a region: 6 judged, 10 needed"
    assert not [t for t in few.data if t.type == "heatmap"]


def test_hazard_figure_marks_bins_without_an_event(make_results, row):
    trials = [row(f"d{i}", "diverged", iteration=10 + i, initial="uniform") for i in range(6)]
    trials += [row(f"k{i}", iterations_done=100) for i in range(6)]
    figure = hazard_figure(make_results(trials).trials, "initial")
    quiet, loud = figure.data
    assert (quiet.name, loud.name) == ("p0 gaussian (0 diverged)", "p0 uniform (6 diverged)")
    assert quiet.marker.symbol == ("arrow-bar-down-open",)
    assert quiet.y[0] == pytest.approx(-np.log(0.025) / 600)
    assert loud.y[0] == pytest.approx(6 / sum(11 + i for i in range(6)))
    assert loud.y[0] - loud.error_y.arrayminus[0] > 0
