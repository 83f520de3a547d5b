"""Rescues in a replay: fewer of them than were recorded are known to the bit, others are not made up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis.detector.replay import recorded as read_recordings
from analysis.results.load import load
from analysis.stats.survival.rescues import rescues
from study.config.errors import UserError
from study.replay.detection import latched
from study.replay.policy import make_policy
from study.replay.replay import replay
from study.replay.trajectory import read_recorded, signals_of, with_rescues
from trainables.config.parts import DivergenceConfig

PUBLISHED = Path(__file__).resolve().parents[3] / "results/published/digits_rescue"
TRIAL = {
    "method": "m-ebm", "dataset": "digits", "network": "conv-8", "norm": "batch", "initial": "uniform", "l2_weight": 0.0,
    "epochs": 12, "iterations_per_epoch": 10, "evaluation": {"every": 4, "fresh_steps": 2}, "batch_size": 16,
    "buffer_size": 500, "warmup_iterations": 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded():
    return read_recorded(load(PUBLISHED / "digits_rescue"))


def played(recorded, values, orders=0):
    return replay(recorded, [make_policy(values, recorded, "p.yaml")], orders=orders)


def numbers(found):
    return {name: number.value for name, number in found.summaries[0].numbers.items()}


def ends(found):
    return {r["trial_id"]: (r["outcome"], r["iterations"], r["begun"]) for r in found.rows if r["outcome"] != "pending"}


def really(folder):
    trials = pd.read_parquet(folder / "trials.parquet").fillna({"rescue_from": 0})
    names = ["outcome", "iterations_done", "rescue_from"]
    return {t: tuple(row) for t, *row in trials[["trial_id", *names]].itertuples(index=False)}


def test_as_recorded_every_run_and_its_time_is_there(recorded):
    found = played(recorded, {}, orders=3)
    trials = pd.read_parquet(PUBLISHED / "digits_rescue/trials.parquet")
    once = [r for r in found.rows if r["order"] == 0]
    assert {r["trial_id"]: r["outcome"] for r in once} == dict(zip(trials["trial_id"], trials["outcome"], strict=True))
    spent = (trials["setup_seconds"] + trials["train_seconds"] + trials["evaluation_seconds"]).sum() / 3600
    after = trials[trials["rescue"].notna()]
    assert numbers(found)["hours"] == pytest.approx(spent)
    assert numbers(found)["rescues"] == len(after)
    assert numbers(found)["rescued"] == (trials["rescued"] == "completed").sum() > 0
    assert numbers(found)["iterations"] == trials["iterations_done"].sum() - after["rescue_from"].sum()
    # Where nothing cuts it off, a study does all that it has to in any order.
    assert all(n.low == n.high == n.value for n in found.summaries[0].numbers.values() if n.value is not None)


def test_without_rescue_it_is_the_study_that_had_none(recorded):
    found = played(recorded, {"rescue": None})
    assert ends(found) == really(PUBLISHED / "digits_no_rescue")
    assert numbers(found)["rescues"] == numbers(found)["rescue_hours"] == 0


def test_fewer_rescues_are_those_of_the_table(recorded):
    """`reached` of the table of rescues: trials that reach the end with at most so many."""
    table = rescues(load(PUBLISHED / "digits_rescue"), "digits_rescue").set_index("rescue")
    completed = (pd.read_parquet(PUBLISHED / "digits_no_rescue/trials.parquet")["outcome"] == "completed").sum()
    for most in (1, 2, 3):
        found = numbers(played(recorded, {"rescue": {"most": most}}))
        assert found["rescued"] + completed == table["reached"][most], most
        assert found["rescues"] == table["runs"].loc[1:most].sum()


def test_ends_that_are_not_rescued_have_none(recorded):
    found = played(recorded, {"rescue": {"on": ["collapsed"]}})
    assert numbers(found)["rescues"] == 0, "every first end is a divergence"


def test_a_number_of_trials_does_not_limit_rescues_and_hours_do(recorded):
    few = played(recorded, {"budget": {"trials": 3}})
    begun = {r["trial_id"] for r in few.rows if r["outcome"] != "pending"}
    first = tuple(t.trial_id for t in recorded.trajectories[:3])
    assert begun == {t for t in really(PUBLISHED / "digits_rescue") if t.startswith(first)} and len(begun) > 3
    whole = numbers(played(recorded, {}))["hours"]
    half = played(recorded, {"budget": {"hours": whole / 2}})
    assert numbers(half)["hours"] == pytest.approx(whole / 2)
    assert numbers(half)["never_started"] > 0 and numbers(half)["rescues"] < 67
    assert numbers(half)["stopped"] + numbers(half)["rescues_stopped"] >= 1
    assert all(r["iterations"] >= r["begun"] for r in half.rows if r["began"] is not None)
    # A rescue runs before the next trial of the search.
    began = {r["trial_id"]: r["began"] for r in half.rows if r["began"] is not None}
    assert began["t0001"] < began["t0001r1"] < began["t0001r2"] < began[first[1]]


@pytest.mark.parametrize(
    ("rescue", "wrong"),
    [
        ({"most": 4}, "rescue.most: must be at most 3, as recorded, but is 4"),
        ({"change": {"step_size": "x0.5"}}, "rescue.change: must be "),
        ({"change": {"seed": "new"}}, "rescue.change: must be "),
        ({"rewind": 3}, "rescue.rewind: must be last-healthy, as recorded, but is 3"),
        ({"mots": 1}, "rescue.mots: unknown key; did you mean most?"),
        ({"most": 0}, "rescue.most"),
        ({"on": []}, "rescue.on"),
        (3, "rescue"),
    ],
)
def test_what_was_not_recorded_is_refused(recorded, rescue, wrong):
    with pytest.raises(UserError) as raised:
        make_policy({"rescue": rescue}, recorded, "p.yaml")
    assert str(raised.value).startswith("p.yaml: ") and wrong in str(raised.value) and "\n" not in str(raised.value)


def test_what_a_budget_left_undone_is_counted(recorded):
    """At some of these ends a rescue is cut off; no run is lost, and none is counted twice."""
    seen = set()
    for hours in [0.01 * i for i in range(1, 27)]:
        for at_once in (1, 3):
            found = played(recorded, {"budget": {"hours": hours}, "run": {"max_concurrent": at_once}})
            told = numbers(found)
            outcomes = [(r["rescue"] is not None, r["outcome"]) for r in found.rows]
            assert len({r["trial_id"] for r in found.rows}) == len(found.rows)
            assert outcomes.count((True, "stopped")) == told["rescues_stopped"]
            assert outcomes.count((True, "pending")) == 0
            assert told["rescues_unknown"] == 0 and told["hours_most"] == told["hours"]
            bad = {r["trial_id"] for r in found.rows if r["outcome"] in ("diverged", "collapsed")}
            rescued = {r["rescue_of"] for r in found.rows if r["rescue"] == 1}
            assert rescued == {t for t in bad if "r" not in t}, "a rescue takes the place of its trial at once"
            seen |= {k for k in ("rescues_stopped", "stopped") if told[k]}
    assert seen == {"rescues_stopped", "stopped"}


def test_the_place_of_the_best_is_among_all(recorded):
    found = played(recorded, {"seeds": [3]})
    best, rank = numbers(found)["best"], numbers(found)["best_rank"]
    runs = [r for t in recorded.trajectories for r in (t, *t.rescues)]
    seen = [[e.values["fd_buffer"] for e in r.reports if e.epoch and e.values] for r in runs]  # noqa: PD011
    scores = [min(values) for values in seen if values]
    assert rank == 1 + sum(s < best for s in scores) > 1


def test_a_study_without_rescue_has_no_line_of_it():
    published = read_recorded(load(PUBLISHED.parent / "digits_stability"))
    assert "rescue" not in "\n".join(played(published, {}).lines())


def test_the_table_of_the_manual(recorded):
    page = (Path(__file__).resolve().parents[3] / "docs/replay.md").read_text(encoding="utf-8")
    found = [numbers(played(recorded, {"rescue": r})) for r in (None, {"most": 1}, {"most": 2}, {"most": 3})]
    rows = {
        "iterations": [f"{n['iterations']:,.0f}" for n in found],
        "time, of the recorded": [f"{n['hours'] / found[-1]['hours']:.0%}" for n in found],
        "rescues": [f"{n['rescues']:.0f}" for n in found],
        "reached the end, with these": [f"{n['completed'] + n['rescued']:.0f}" for n in found],
        "best FD": [f"{n['best']:.3f}" for n in found],
    }
    for name, values in rows.items():
        assert f"| {name} | {' | '.join(values)} |" in page


@pytest.fixture(scope="module")
def swept(ray_cluster, run_mebm, tmp_path_factory):
    """The same study with two rescues at most, and with one."""
    base = tmp_path_factory.mktemp("swept")
    for most in (2, 1):
        study = {
            "name": f"most{most}",
            "trial": TRIAL,
            "search": {"sampler": "grid", "grid": [{"sampling_steps": [1, 2]}]},
            "seeds": [0, 1],
            "rescue": {"rewind": 1, "change": {"learning_rate": "x0.5", "seed": "new"}, "most": most},
            "run": {"max_concurrent": 1},
        }
        (base / f"{most}.yaml").write_text(json.dumps(study), encoding="utf-8")
        code, _, err = run_mebm("sweep", base / f"{most}.yaml", "--results", base)
        assert code == 0, err
    return base


@pytest.mark.ray
@pytest.mark.slow
def test_fewer_rescues_are_what_a_real_study_with_fewer_does(swept):
    recorded = read_recorded(load(swept / "most2"))
    predicted = ends(played(recorded, {"rescue": {"most": 1}}))
    assert predicted == really(swept / "most1")
    assert sum(begun.endswith("r1") for begun in predicted) >= 3, "of something"
    assert ends(played(recorded, {})) == really(swept / "most2") != predicted


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_that_ends_elsewhere_has_a_rescue_that_nobody_knows(swept):
    recorded = read_recorded(load(swept / "most2"))
    found = played(recorded, {"trial": {"divergence": {"gap_limit": 0.5}}})
    told = numbers(found)
    trials = [r for r in found.rows if r["rescue"] is None]
    earlier = [r for r in trials if r["iteration"] is not None and r["iteration"] != r["recorded_iteration"]]
    assert len(earlier) >= 3 and all(r["rescue_unknown"] for r in earlier)
    assert not [r for r in found.rows if r["rescue_of"] in {e["trial_id"] for e in earlier}]
    assert told["rescues_unknown"] >= len(earlier) and told["hours_most"] is None
    assert any("rescues that were not recorded" in n and "the course of others" not in n for n in found.notes)
    hours = played(recorded, {"trial": {"divergence": {"gap_limit": 0.5}}, "budget": {"hours": 1}})
    assert any("rescues that were not recorded" in n and "the course of others" in n for n in hours.notes)
    # A trial whose recording ends first may end badly after it, and would be rescued: that has no upper bound either.
    looser = played(recorded, {"trial": {"divergence": {"gap_limit": 50, "hard_gap_limit": 100}}})
    assert numbers(looser)["censored"] >= 3 and numbers(looser)["hours_most"] is None
    without = played(recorded, {"trial": {"divergence": {"gap_limit": 50, "hard_gap_limit": 100}}, "rescue": None})
    assert numbers(without)["censored"] >= 3 and numbers(without)["hours_most"] > numbers(without)["hours"]
    # Rescues are judged by their own signals: under the recorded rule, over these, they end as recorded.
    same = played(recorded, {"trial": {"divergence": {"read_every": 7}}})
    assert ends(same) == really(swept / "most2") and numbers(same)["rescues_unknown"] == 0
    assert all(r["reproduced"] for r in same.rows)


@pytest.mark.ray
@pytest.mark.slow
def test_the_detector_goes_on_with_what_it_saw_before_the_healthy_state(swept, tmp_path):
    """The learnt rule has a scale by then: a rescue whose gap is many times that is stopped in its first iterations."""
    folder = tmp_path / "edited"
    shutil.copytree(swept / "most2", folder)
    recorded = read_recorded(load(folder))
    after = next(t.rescues[0] for t in recorded.trajectories if t.rescues and t.rescues[0].begun >= 10)
    file = folder / "signals" / f"{after.trial_id}.parquet"
    signals = pd.read_parquet(file)
    signals.loc[signals["iteration"] >= after.begun + 2, ["energy_gap", "loss"]] = 30.0
    signals.to_parquet(file)
    read = read_recordings(with_rescues(load(folder)))[0]
    rule = DivergenceConfig(rule="learnt", learn_from=5)
    alone = latched(rule, signals_of(read, recorded.study)[after.trial_id])
    found = latched(rule, signals_of(read, recorded.study, recorded.trajectories)[after.trial_id])
    assert found is not None and after.begun < found.iteration < after.begun + 20
    assert alone is None, "too short to learn a scale"
