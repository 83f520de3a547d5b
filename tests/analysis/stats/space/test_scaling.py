"""Boundaries over size: which studies make a law, the law against a known one, predictions and their scores."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy.optimize import curve_fit
from scipy.special import expit
from scipy.stats import binom

import analysis
from analysis.figures.export import export_figures
from analysis.figures.registry import joint_drawings
from analysis.results.load import Results
from analysis.results.messages import ResultsError
from analysis.results.parquet import read_parquet, records, write_parquet
from analysis.stats.space.growth import growth
from analysis.stats.space.scaling import BOUNDARY_COLUMNS, LAW_COLUMNS, Law, scaling

Z = 1.959964


def truth(width):
    return 0.8 * width**-0.5


@pytest.fixture
def grown(make_results, row):
    """Results of a study per width, whose boundary in the learning rate is `truth` unless `boundary` says another."""
    number = itertools.count()

    def make(widths=(8, 16, 32, 64), *, boundary=truth, seeds=6, values=12, ends=None, of=lambda w: {}, **more):
        rng = np.random.default_rng(11)
        parts = []
        for width in widths:
            trials = []
            for rate, seed in itertools.product(np.geomspace(0.02, 2, values), range(seeds)):
                bad = rng.random() < expit(30 * (math.log10(rate) - math.log10(boundary(width))))
                outcome = ends(width, rate, bad) if ends else "diverged" if bad else "completed"
                setting = {"network": f"conv-{width}", "learning_rate": rate, "seed": seed} | of(width)
                trials.append(row(f"t{next(number)}", outcome, setting_id=f"{rate:.4f}", **setting))
            varied = more.get("varied", ("learning_rate",))
            parts.append(make_results(trials, name=f"w{width}", varied=varied))
        return analysis.load(*(folder for part in parts for folder in part.folders.values()))

    return make


def test_a_law_is_found_and_predicts_a_width_that_was_held_out(grown):
    found = scaling(grown(), hold_out=(64,), predict=(256,))
    assert found.growth.axis == "N of conv-N" and found.growth.field == "learning_rate"
    rows = records(found.boundaries)
    assert [r["size"] for r in rows] == [8, 16, 32, 64] and [r["held_out"] for r in rows] == [False] * 3 + [True]
    for r in rows:
        assert r["low"] < truth(r["size"]) < r["high"] and r["bad_side"] == "above"
        assert (r["trials"], r["seeds"], r["cut_off"], r["left_out"], r["iterations"]) == (72, 6, 0, 0, 600)
        assert (r["tried_low"], r["tried_high"]) == pytest.approx((0.02, 2.0))
    first, second = records(found.predictions)
    assert (first["size"], second["size"]) == (64, 256)
    assert first["exponent_low"] < -0.5 < first["exponent_high"] < 0
    for p in (first, second):
        assert p["predicted_low"] < truth(p["size"]) < p["predicted_high"]
        assert p["predicted"] == pytest.approx(p["factor"] * p["size"] ** p["exponent"])
    assert first["agrees"] is True and first["measured"] == rows[3]["boundary"]
    assert first["ratio"] == pytest.approx(first["measured"] / first["predicted"])
    assert first["constant"] == rows[2]["boundary"] and first["constant_ratio"] < 0.9, "no law would be too high"
    assert (second["measured"], second["ratio"], second["agrees"]) == (None, None, None)
    text = "\n".join(found.lines())
    assert "held out" not in text and "predicted at 64: " in text and "agrees within the errors" in text
    assert "law over 3 sizes: boundary in learning rate = " in text and "no misfit shown" in text


def test_a_prediction_that_fails_is_said_to(grown):
    found = scaling(grown(boundary=lambda w: 0.7 if w == 64 else truth(w)), hold_out=(64,))
    (p,) = records(found.predictions)
    assert p["agrees"] is False and p["ratio"] > 3
    assert "does not agree; measured / predicted" in found.lines()[-1]


def test_widths_that_lie_on_no_power_law_are_said_to_and_their_interval_grows(grown):
    bent = scaling(grown(boundary=lambda w: {8: 0.5, 16: 0.06, 32: 0.5, 64: 0.06}[w]), predict=(128,))
    straight = scaling(grown(), predict=(128,))
    assert bent.law.misfit_p < 0.05 and bent.law.enlarged > 2 and straight.law.misfit_p > 0.05
    assert "the sizes do not lie on a power law" in bent.law_text()
    wide, narrow = (
        math.log10(p["predicted_high"] / p["predicted_low"]) for s in (bent, straight) for p in records(s.predictions)
    )
    assert wide > 2 * narrow


def test_the_law_is_weighted_least_squares():
    sizes, errors = np.array([8.0, 16, 32, 64]), np.array([0.02, 0.1, 0.05, 0.2])
    y = np.array([-0.31, -0.52, -0.71, -0.62])
    law = Law.fit(sizes, y, errors)
    (a, b), covariance = curve_fit(lambda x, a, b: a + b * x, np.log10(sizes), y, sigma=errors, absolute_sigma=True)
    assert law.exponent[0] == pytest.approx(b) and law(1.0)[0] == pytest.approx(a)
    at = np.array([1.0, math.log10(128)])
    assert law.enlarged == 1.0, "they scatter by less than their errors"
    assert law(128)[1] == pytest.approx(math.sqrt(at @ covariance @ at), rel=1e-4)
    assert law.exponent[1] == pytest.approx(math.sqrt(covariance[1, 1]), rel=1e-4)
    assert Law.fit(sizes[:2], y[:2], errors[:2]).misfit_p is None


@pytest.mark.parametrize("number", [2, 3, 5])
def test_the_interval_of_a_prediction_covers_a_known_law_within_binomial_error(number):
    rng, repeats, covered, agrees = np.random.default_rng(2), 2000, 0, 0
    sizes = 8.0 * 2 ** np.arange(number)
    for _ in range(repeats):
        errors = rng.uniform(0.03, 0.2, number)
        y = -0.1 - 0.5 * np.log10(sizes) + rng.normal(0, errors)
        at, spread = Law.fit(sizes, y, errors)(256)
        known = -0.1 - 0.5 * math.log10(256)
        covered += abs(at - known) <= Z * spread
        agrees += abs(at - known - rng.normal(0, 0.1)) <= Z * math.hypot(spread, 0.1)
    least = binom(repeats, 0.95).ppf(0.001)
    assert covered >= least and agrees >= least
    assert covered <= binom(repeats, 0.985).ppf(0.999), "scatter enlarges it, and not by much"


def test_a_width_that_is_not_bounded_has_no_number_and_is_no_part_of_the_law(grown):
    found = scaling(grown(boundary=lambda w: 100.0 if w == 8 else truth(w)), predict=(128,))
    first = records(found.boundaries)[0]
    assert (first["bad"], first["boundary"], first["high"], first["bad_side"]) == (0, None, None, "above")
    assert 0.5 < first["low"] <= 2.5
    assert found.law.sizes == 3 and found.law.smallest == 16
    assert "  8: above " in found.lines()[1] and "no trial ended badly at 0.02 to 2" in found.lines()[1]
    worse = scaling(grown(boundary=lambda w: 1e-4 if w == 8 else truth(w)))
    first = records(worse.boundaries)[0]
    assert (
        first["bad"] == first["trials"] and first["boundary"] is None and first["low"] is None and first["high"] < 0.03
    )
    none = scaling(grown((8, 16), boundary=lambda w: 100.0))
    assert none.law is None and not len(none.predictions) and "no law" in none.lines()[-1]
    assert all(r["low"] is None and r["high"] is None for r in records(none.boundaries)), "nobody knows the side"


@pytest.mark.parametrize(("beyond", "agrees"), [(False, True), (True, False)])
def test_a_held_out_width_that_is_bounded_on_one_side_can_contradict(grown, beyond, agrees):
    stable = (lambda w: 100.0 if w == 64 else truth(w)) if beyond else (lambda w: 100.0 if w == 64 else 0.1 * w**0.75)
    found = scaling(grown(boundary=stable), hold_out=(64,))
    (p,) = records(found.predictions)
    assert p["measured"] is None and p["measured_low"] is not None and p["measured_high"] is None
    assert p["agrees"] is agrees
    assert ("does not agree" in found.lines()[-1]) is not agrees


def test_trials_that_were_cut_off_widen_the_interval_and_are_counted(grown):
    whole = scaling(grown())
    cut = scaling(
        grown(
            ends=lambda w, rate, bad: "stopped" if w == 8 and 0.1 < rate < 0.6 else "diverged" if bad else "completed"
        )
    )
    a, b = records(whole.boundaries)[0], records(cut.boundaries)[0]
    assert b["cut_off"] > 20 and b["trials"] == a["trials"] and a["cut_off"] == 0
    assert b["low"] < 0.15 and b["high"] > 0.5 and b["high"] / b["low"] > a["high"] / a["low"]
    assert "cut off: mebm resume" in cut.lines()[1]
    failed = scaling(grown(ends=lambda w, rate, bad: "failed" if rate > 1.9 else "diverged" if bad else "completed"))
    r = records(failed.boundaries)[0]
    assert (r["trials"], r["left_out"]) == (66, 6) and r["tried_high"] < 1.9


def test_collapse_is_a_bad_end(grown):
    found = scaling(grown(ends=lambda w, rate, bad: "collapsed" if bad else "completed"))
    assert [r["boundary"] for r in records(found.boundaries)] == [
        r["boundary"] for r in records(scaling(grown()).boundaries)
    ]


def test_what_grows_is_one_size(grown):
    batch = growth(grown((1, 2), of=lambda w: {"network": "conv-16", "batch_size": 32 * w}))
    assert (batch.axis, list(batch.sizes.values())) == ("batch size", [32, 64])
    wide = growth(grown((1, 2), of=lambda w: {"network": f"wrn-10-{w}"}))
    assert (wide.axis, wide.sizes) == ("N of wrn-10-N", {"w1": 1, "w2": 2})
    deep = growth(grown((1, 2), of=lambda w: {"network": f"wrn-{4 + 6 * w}-1"}))
    assert (deep.axis, list(deep.sizes.values())) == ("N of wrn-N-1", [10, 16])
    assert list(growth(grown((32, 8))).sizes.values()) == [8, 32], "ascending"


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"widths": (8,)}, "needs two studies or more"),
        (
            {"of": lambda w: {"batch_size": 64 + w}},
            "the studies differ in network, batch size; one field that is a size",
        ),
        ({"of": lambda w: {"network": "conv-8"}}, "the studies differ in nothing"),
        ({"of": lambda w: {"network": f"wrn-{w}-{w}"}}, "differ in more than one number of their names"),
        ({"of": lambda w: {"network": "my.py:Net" if w == 8 else "conv-8"}}, "differ in more than one number"),
        ({"of": lambda w: {"network": "conv-8", "norm": "batch" if w == 8 else "none"}}, "norm"),
        ({"varied": ("initial",)}, "searched no field"),
        ({"of": lambda w: {"network": "conv-8", "l2_weight": -w / 100}}, "is not a size; expected numbers above 0"),
    ],
)
def test_studies_that_make_no_law_are_refused_in_a_line(grown, made, words):
    with pytest.raises(ResultsError, match=words) as error:
        scaling(grown(**{"widths": (8, 16), "values": 3, "seeds": 1} | made))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_sizes_that_are_none_are_refused(grown):
    results = grown((8, 16), values=4, seeds=3)
    for wrong in (math.nan, math.inf, 0.0, -8.0):
        with pytest.raises(ResultsError, match="is not a size"):
            scaling(results, predict=(wrong,))
    with pytest.raises(ResultsError, match="--hold-out 7: there is no study of this size; there are 8, 16"):
        scaling(results, hold_out=(7,))
    with pytest.raises(ResultsError, match="did not search K"):
        scaling(results, "K")
    with pytest.raises(ResultsError, match="--predict 16: the law is fitted to this size"):
        scaling(grown(), predict=(16,))


def test_a_value_that_is_not_above_0_is_refused(grown):
    results = grown((8, 16), values=3, seeds=2)
    results.trials.loc[0, "learning_rate"] = 0.0
    with pytest.raises(ResultsError, match=r"learning rate is 0\.0; a boundary is that of numbers above 0"):
        scaling(results)


def test_names_that_a_stranger_wrote_stay_one_line(grown):
    results = grown((8, 16), values=3, seeds=2)
    hostile = "\x1b[2J<script>\n" * 40
    for name in ("w8", "w16"):
        config = [json.loads(c) | {"network": f"{hostile}{name}"} for c in results.trials["config"]]
        part = results.trials["study"] == name
        results.trials.loc[part, "config"] = [json.dumps(c) for c, own in zip(config, part, strict=True) if own]
    axis = growth(results).axis
    assert axis.isprintable() and len(axis) < 100


def test_the_figure_has_every_boundary_and_its_data(grown, tmp_path):
    results = grown(boundary=lambda w: 100.0 if w == 8 else truth(w), widths=(8, 16, 32, 64, 128))
    (drawing,) = [d for d in joint_drawings(results) if d.name == "scaling"]
    assert drawing.caption.endswith("; held out: 128 agrees.") and "power law over 3 sizes" in drawing.caption
    assert [c.name for c in BOUNDARY_COLUMNS] == drawing.data.columns.tolist()
    named = {trace.name: trace for trace in drawing.figure.data}
    rows = {r["size"]: r for r in records(drawing.data)}
    assert list(named["measured"].x) == [16, 32, 64]
    assert list(named["measured"].y) == [rows[s]["boundary"] for s in (16, 32, 64)]
    assert list(named["measured, held out"].x) == [128] and list(named["predicted"].x) == [128]
    arrow = named["measured: bounded from below"]
    assert list(arrow.x) == [8] and list(arrow.y) == [rows[8]["low"]] and arrow.marker.symbol == "arrow-up"
    assert len(analysis.scaling_figure(results).data) == len(drawing.figure.data)
    (made,) = export_figures(results, tmp_path / "f", ("json",), only=["scaling"])
    assert made.files == ("scaling.json", "scaling.parquet")


def test_studies_that_are_not_one_at_growing_size_have_no_such_figure(synthetic):
    results = analysis.load(synthetic(6, "a"), synthetic(9, "b"))
    assert "scaling" not in [d.name for d in joint_drawings(results)]
    alone: Results = analysis.load(synthetic(6, "c"))
    assert "scaling" not in [d.name for d in joint_drawings(alone)]


def test_the_tables_go_through_parquet(grown, tmp_path):
    found = scaling(grown(boundary=lambda w: 100.0 if w == 8 else truth(w)), hold_out=(64,))
    for frame, columns in ((found.boundaries, BOUNDARY_COLUMNS), (found.predictions, LAW_COLUMNS)):
        write_parquet(frame, columns, tmp_path / "x.parquet")
        assert records(read_parquet(tmp_path / "x.parquet", columns, measured=True)) == records(frame)


def test_a_prediction_that_no_float_holds_has_no_number_and_says_so(grown, tmp_path):
    """Widths that are close and boundaries that are not make a law that goes beyond every number."""
    found = scaling(grown((10000, 10100), boundary=lambda w: 0.1 if w == 10000 else 0.4), predict=(1e9, 10200))
    near, far = records(found.predictions)
    assert near["predicted"] > 0.4 and near["predicted_low"] < near["predicted"] < near["predicted_high"]
    assert far["size"] == 1e9 and far["predicted"] is far["predicted_low"] is far["predicted_high"] is None
    assert found.lines()[-1] == (
        "predicted at 1e+09: no number, as it is too far from the sizes that the law is fitted to"
    )
    write_parquet(records(found.predictions), LAW_COLUMNS, tmp_path / "law.parquet")
    from analysis.figures.scaling import draw_scaling

    drawn = draw_scaling(found)
    assert next(t for t in drawn.data if t.name == "predicted").x == (10200.0,)


def test_a_law_whose_factor_no_float_holds_is_written_by_its_power(grown):
    found = scaling(grown((10000, 10020), boundary=lambda w: 0.4 if w == 10000 else 0.1), predict=(10030,))
    assert found.law is not None and found.law(1.0)[0] > 308
    row = records(found.predictions)[0]
    assert row["factor"] is None and row["predicted"] > 0 and " = 10^" in found.law_text()
