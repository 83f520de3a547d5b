"""Bookkeeping of a replay, on the study that is published with the package: 57 trials, 31 of which ended badly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.detector.replay import recorded as read_recordings
from analysis.detector.replay import recordings
from analysis.results.load import load
from analysis.stats.tradeoff.policies import REPLAY_COLUMNS, summarise
from study.config.errors import UserError
from study.replay.detection import latched
from study.replay.policy import make_policy
from study.replay.replay import replay
from study.replay.trajectory import read_recorded, signals_of
from trainables.config.parts import DivergenceConfig
from trainables.training.detector import DivergenceLatch

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = ROOT / "results/published/digits_stability"
SHARED = ROOT.parent / "shared/data"
needs_recordings = pytest.mark.skipif(not SHARED.is_dir(), reason="recorded runs are not here")


@pytest.fixture(scope="module")
def recorded():
    return read_recorded(load(PUBLISHED))


def played(recorded, values, **options):
    return replay(recorded, [make_policy(values, recorded, "p.yaml")], **({"orders": 0} | options))


def numbers(found, place=0):
    return {name: number.value for name, number in found.summaries[place].numbers.items()}


# ------------------------------------------------------------------------------------------------------ as recorded


def test_the_recorded_policy_gives_the_recorded_ends(recorded):
    found = played(recorded, {})
    trials = pd.read_parquet(PUBLISHED / "trials.parquet").set_index("trial_id")
    assert len(found.rows) == len(trials) == 57
    for row in found.rows:
        trial = trials.loc[row["trial_id"]]
        spent = trial["setup_seconds"] + trial["train_seconds"] + trial["evaluation_seconds"]
        assert (row["outcome"], row["iterations"]) == (trial["outcome"], trial["iterations_done"])
        assert row["seconds"] == pytest.approx(spent) and not row["censored"]
        assert (row["iteration"] is None) == np.isnan(trial["iteration"])
    assert numbers(found)["best"] == trials["fd_buffer_best"].min() and numbers(found)["best_rank"] == 1


def test_the_latch_over_the_signals_gives_the_recorded_ends(recorded):
    """A rule that differs in nothing that judges is replayed in earnest."""
    found = played(recorded, {"trial": {"divergence": {"read_every": 49}}})
    bad = [r for r in found.rows if r["recorded_outcome"] != "completed"]
    trials = pd.read_parquet(PUBLISHED / "trials.parquet").set_index("trial_id")
    assert len(bad) == 31
    for row in found.rows:
        trial = trials.loc[row["trial_id"]]
        told = None if np.isnan(trial["iteration"]) else (trial["cause"], trial["iteration"])
        assert (None if row["iteration"] is None else (row["cause"], row["iteration"])) == told
        assert row["outcome"] == trial["outcome"] and row["reproduced"]


def test_the_records_that_are_left_out_would_change_nothing(recorded):
    """The latch fed with every record, and with those alone that it has to see."""
    signals = signals_of(read_recordings(recorded.results)[0], recorded.study)
    import torch

    rules = [DivergenceConfig(), DivergenceConfig(gap_limit=0.3, gap_patience=1), DivergenceConfig(action="record"),
             DivergenceConfig(energy_limit=1.5), DivergenceConfig(gradient_norm_limit=1.0)]  # fmt: skip
    for trial_id in ("t0001", "t0013", "t0025", "t0040", "t0049", "t0055"):
        run = signals[trial_id]
        for rule in rules:
            latch = DivergenceLatch(rule, run.l2_weight, torch.device("cpu"))
            columns = {"loss": "loss", "total": "loss", "gap": "energy_gap", "energy_max": "energy_abs_max",
                       "grad": "grad_param_norm"}  # fmt: skip
            values = {k: torch.as_tensor(run.signals[name], dtype=torch.float32) for k, name in columns.items()}
            for i, iteration in enumerate(run.signals["iteration"]):
                latch.update(int(iteration), **{k: v[i] for k, v in values.items()})
            assert latched(rule, run) == latch.read().verdict, (trial_id, rule)


# --------------------------------------------------------------------------------------------------- another detector


def test_a_tighter_detector_is_earlier_and_costs_less(recorded):
    before, after = (
        numbers(played(recorded, {})),
        numbers(played(recorded, {"trial": {"divergence": {"gap_limit": 1.0}}})),
    )
    assert after["caught_earlier"] > 10 and after["caught_later"] == after["false_alarms"] == 0
    assert after["hours"] < before["hours"] and after["iterations"] < before["iterations"]
    assert after["lead"] > 0 and after["completed"] == before["completed"]


def test_a_detector_too_tight_has_false_alarms(recorded):
    found = numbers(played(recorded, {"trial": {"divergence": {"gap_limit": 0.05, "gap_patience": 1}}}))
    assert found["false_alarms"] > 0 and found["false_alarms"] + found["completed"] == 26


def test_what_a_looser_detector_lets_go_on_is_not_known(recorded):
    """The recordings end at the alarm: how the trials went on was never recorded."""
    found = played(recorded, {"trial": {"divergence": {"gap_limit": 50.0, "hard_gap_limit": 100.0}}})
    told, censored = numbers(found), [r for r in found.rows if r["censored"]]
    assert told["censored"] == len(censored) > 10
    assert all(r["outcome"] is None and r["iteration"] is None for r in censored)
    assert all(r["recorded_outcome"] == "diverged" for r in censored), "a collapse does not depend on these limits"
    more = sum(r["seconds_left"] for r in censored) / 3600
    assert more > 0 and told["hours_most"] == pytest.approx(told["hours"] + more)
    assert any("end before the policy would have ended them" in note for note in found.notes)


def test_without_signals_every_end_stands(recorded, tmp_path):
    import shutil

    shutil.copytree(PUBLISHED, tmp_path / "study", ignore=shutil.ignore_patterns("signals", "samples"))
    without = read_recorded(load(tmp_path / "study"))
    found = played(without, {"trial": {"divergence": {"gap_limit": 1.0}}})
    assert numbers(found)["ended_badly"] == 31 and sum(not r["reproduced"] for r in found.rows) == 57
    assert "recorded ends that stand" in found.notes[0] and found.notes[0].endswith(": 57")


# ------------------------------------------------------------------------------------------------------ budget, order


def test_a_budget_of_all_is_all(recorded):
    assert played(recorded, {"budget": {"trials": 57}}).rows == played(recorded, {}).rows
    assert played(recorded, {"budget": {"hours": 1000, "gpu_hours": 1000}}).rows == played(recorded, {}).rows


def test_a_budget_of_trials_is_the_first_ones(recorded):
    found = played(recorded, {"budget": {"trials": 10}})
    started = [r["trial_id"] for r in found.rows if r["outcome"] != "pending"]
    assert started == [t.trial_id for t in recorded.trajectories[:10]]
    left = [r for r in found.rows if r["outcome"] == "pending"]
    assert len(left) == 47 and all(r["seconds"] is None and r["iterations"] == 0 and r["best"] is None for r in left)


def test_a_budget_of_hours_is_kept(recorded):
    whole = max(r["ended"] for r in played(recorded, {}).rows)
    for share in (0.1, 0.5, 0.9):
        found = played(recorded, {"budget": {"hours": share * whole / 3600}})
        started = [r for r in found.rows if r["outcome"] != "pending"]
        assert max(r["ended"] for r in started) <= share * whole + 1e-6
        assert any(r["outcome"] == "stopped" for r in started) and len(started) < 57
        assert all(r["iterations"] % 100 == 0 for r in started if r["outcome"] == "stopped"), "at an epoch's end"


def test_one_at_a_time_takes_the_sum(recorded):
    assert recorded.at_once == 2
    found = played(recorded, {"run": {"max_concurrent": 1}})
    assert max(r["ended"] for r in found.rows) == pytest.approx(sum(r["seconds"] for r in found.rows))
    assert numbers(found)["hours"] == pytest.approx(numbers(played(recorded, {}))["hours"])


def test_orders_are_drawn_from_the_seed_and_keep_the_pattern_of_seeds(recorded):
    def orders(seed):
        rows = played(recorded, {}, orders=3, seed=seed).rows
        return [[r["trial_id"] for r in rows if r["order"] == n] for n in range(4)]

    first, again, other = orders(0), orders(0), orders(1)
    assert first == again and first[0] == other[0] == [t.trial_id for t in recorded.trajectories]
    assert first[1] != first[0] and first[1] != first[2] and first[1:] != other[1:]
    seeds = {t.trial_id: t.seed for t in recorded.trajectories}
    settings = {t.trial_id: t.setting for t in recorded.trajectories}
    for order in first:
        assert sorted(order) == sorted(seeds)
        assert len({settings[t] for t in order[:18]}) == 18, "the first seed of every setting comes first"
        assert [seeds[t] for t in order[:18]] == [0] * 18


def test_settings_that_are_to_run_first_do_so(recorded):
    found = played(recorded, {"search": {"start": [{"K": 10, "norm": "batch"}]}, "budget": {"trials": 6}}, orders=2)
    started = {r["trial_id"] for r in found.rows if r["outcome"] != "pending"}
    assert started == {"t0034", "t0035", "t0036", "t0046", "t0047", "t0048"}


def test_seeds_are_those_that_take_part(recorded):
    found = played(recorded, {"seeds": [1]})
    assert len(found.rows) == 19 and {r["seed"] for r in found.rows} == {1}


def test_one_score_per_trial_prunes_nothing_and_says_so(recorded):
    found = played(recorded, {"pruning": "asha"})
    assert numbers(found)["pruned"] == 0
    assert any("at the last epoch alone" in note for note in found.notes)


# -------------------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"prunning": "asha"}, "prunning: unknown key; did you mean pruning?"),
        ({"pruning": {"rule": "ahsa"}}, "pruning.rule"),
        ({"pruning": {"rull": "asha"}}, "pruning.rull: unknown key"),
        ({"pruning": {"metric": "fid"}, "name": "x"}, "pruning.metric"),
        ({"pruning": {"rule": "asha", "metric": "fid_buffer"}}, "pruning.metric"),
        ({"budget": {"trials": 0}}, "budget.trials"),
        ({"budget": 3}, "budget"),
        ({"budget": {"deadline": "2030-01-01"}}, "budget.deadline: is a date"),
        ({"rescue": {"most": 3}}, "rescue: none was recorded"),
        ({"trial": {"divergence": {"gap_limt": 1}}}, "trial.divergence.gap_limt: unknown key; did you mean gap_limit?"),
        ({"trial": {"divergence": {"gap_limit": -1}}}, "trial.divergence.gap_limit"),
        ({"trial": {"divergence": [1]}}, "trial.divergence"),
        ({"trial": {"divergence": {"collapse_ratio": 2}}}, "trial.divergence.collapse_ratio: judges"),
        ({"trial": {"epochs": 3}}, "trial.epochs: is 6 in what was recorded"),
        ({"trial": {"epchs": 3}}, "trial.epchs: unknown key; did you mean epochs?"),
        ({"trial": 3}, "trial: must be a mapping"),
        ({"search": {"sampler": "tpe"}}, "search.sampler: is grid in what was recorded"),
        ({"search": {"start": [{"K": 3}]}}, "search.start: no recorded trial has"),
        ({"seeds": [7]}, "seeds: 7 was not recorded; recorded: 0, 1, 2"),
        ({"pruning": {"seeds": "wilcoxon"}}, "pruning.seeds: cannot be replayed"),
        ({"seeds": "all"}, "seeds"),
        ({"seeds": []}, "seeds"),
        ({"trial": {"network": "evil.py:Net"}}, "trial.network: is conv-16 in what was recorded"),
        ({"trial": {"divergence": {"gap_limit": float("nan")}}}, "trial.divergence.gap_limit"),
        ({"objectives": ["fid_buffer"]}, "objectives: no trial has a value"),
        ({"resources": {"gpus": 1}}, "resources: is"),
        ({"run": {"max_concurrent": 0}}, "run.max_concurrent"),
        ({"run": {"max_failures": 9}}, "run.max_failures: is 2"),
        ({3: 4}, "3: unknown key"),
    ],
)  # fmt: skip
def test_what_is_no_policy_is_refused_in_one_line(recorded, values, wrong):
    with pytest.raises(UserError) as raised:
        make_policy(values, recorded, "p.yaml")
    assert str(raised.value).startswith("p.yaml: ") and wrong in str(raised.value) and "\n" not in str(raised.value)


def test_the_studys_own_yaml_is_a_policy(recorded):
    import yaml

    values = yaml.safe_load((PUBLISHED / "study.yaml").read_text(encoding="utf-8"))
    assert played(recorded, {**values, "name": "recorded"}).rows == played(recorded, {"name": "recorded"}).rows


def test_the_command(run_mebm, tmp_path):
    (tmp_path / "tight.yaml").write_text("trial: {divergence: {gap_limit: 1}}\n", encoding="utf-8")
    (tmp_path / "few.yaml").write_text("budget: {trials: 20}\n", encoding="utf-8")
    files = ("--policy", tmp_path / "tight.yaml", "--policy", tmp_path / "few.yaml")
    code, out, err = run_mebm("replay", PUBLISHED, *files, "--orders", "5", "--out", tmp_path / "rows.parquet")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["recorded", "tight", "few"] and "over 5 orders" in out
    rows = pd.read_parquet(tmp_path / "rows.parquet")
    assert list(rows) == [c.name for c in REPLAY_COLUMNS] and len(rows) == 3 * 6 * 57
    code, out, _ = run_mebm("replay", PUBLISHED, *files, "--orders", "5", "--json")
    told = json.loads(out)
    assert code == 0 and [p["policy"] for p in told["policies"]] == ["recorded", "tight", "few"]
    few = told["policies"][2]["numbers"]
    assert few["never_started"] == {"value": 37.0, "low": 37.0, "high": 37.0}
    assert few["hours"]["low"] < few["hours"]["high"], "which trials are the first twenty is the order's luck"
    _, said, _ = run_mebm("replay", PUBLISHED, *files, "--orders", "5", "--json")
    assert json.loads(said) == told
    code, _, err = run_mebm("replay", PUBLISHED, *files, "--policy", tmp_path / "few.yaml")
    assert code == 2 and "'few' is the name of two policies" in err
    code, _, err = run_mebm("replay", PUBLISHED, "--policy", tmp_path / "none.yaml")
    assert code == 2 and "no such file" in err


# ------------------------------------------------------------------------------------------------------------ imports


@needs_recordings
def test_the_small_study_by_its_own_rule(run_mebm, tmp_path):
    """All 71 bad ends by limits, and no other; an import has the learnt rule by default, which is another one."""
    source = SHARED / "small_study"
    signals, runs = pd.read_parquet(source / "signals.parquet"), pd.read_parquet(source / "runs.parquet")
    rule = DivergenceConfig()
    found = [latched(rule, run) for run in recordings(signals, runs)]
    outcomes = dict.fromkeys(runs["outcome"].unique(), 0)
    for outcome, verdict in zip(runs["outcome"], found, strict=True):
        outcomes[outcome] += verdict is not None
    # The one cut off jumped and went on, useless: FD 13 (notes of that study).
    assert outcomes == {"completed": 0, "diverged": 60, "collapsed": 11, "censored": 1}
    out = tmp_path / "study"
    code, _, _ = run_mebm("import", source / "signals.parquet", "--runs", source / "runs.parquet", "--out", out)
    assert code == 0
    recorded = read_recorded(load(out))
    policy = {"trial": {"divergence": {"rule": "limits"}}}
    told = numbers(played(recorded, policy))
    assert not recorded.timed and told["hours"] is None
    assert (told["ended_badly"], told["alarms_unknown"], told["false_alarms"], told["missed"]) == (72, 1, 0, 0)
    assert told["caught_earlier"] > told["caught_later"] > 0
    with pytest.raises(UserError, match="no times were recorded"):
        make_policy({"budget": {"hours": 1}}, recorded, "p.yaml")


@needs_recordings
def test_eight_public_runs_under_asha(run_mebm, tmp_path):
    source, out = SHARED / "external_cfebm", tmp_path / "study"
    code, _, _ = run_mebm(
        "import", source / "signals.parquet", source / "fid.parquet", "--runs", source / "runs.parquet",
        "--metric", "fid:minimize", "--out", out,
    )  # fmt: skip
    assert code == 0
    recorded = read_recorded(load(out))
    found = played(recorded, {"pruning": {"rule": "asha", "metric": "fid"}}, orders=20)
    told = numbers(found)
    assert found.metric == "own.fid" and told["pruned"] > 0
    assert told["iterations"] < numbers(played(recorded, {}))["iterations"]
    rows = [r for r in found.rows if r["outcome"] == "pruned"]
    assert rows and all(r["iterations"] % 2000 == 0 for r in rows), "at a score's iteration"


# ------------------------------------------------------------------------------------------- what cannot be known


def changed(folder, changes=None, without=("samples",)):
    """A copy of the published study, with the columns of some trials changed; the trajectories of it."""
    import shutil

    shutil.copytree(PUBLISHED, folder, ignore=shutil.ignore_patterns(*without))
    results = load(folder)
    for trial_id, columns in (changes or {}).items():
        for name, value in columns.items():
            results.trials.loc[results.trials["trial_id"] == trial_id, name] = value
    return read_recorded(results)


TIGHT = {"trial": {"divergence": {"gap_limit": 0.02, "hard_gap_limit": 0.05}}}


def test_a_completed_trial_without_signals_is_no_evidence_against_false_alarms(recorded, tmp_path):
    found = played(recorded, TIGHT)
    assert numbers(found)["false_alarms"] == 26 and found.summaries[0].completed_recorded == 26
    found = replay(*(lambda r: (r, [make_policy(v, r, "p.yaml") for v in ({}, TIGHT)]))(
        changed(tmp_path / "study", without=("signals", "samples"))), orders=2)  # fmt: skip
    assert numbers(found, 0)["false_alarms"] == 0, "of the rule that was recorded nothing has to be replayed"
    assert numbers(found, 1)["false_alarms"] is None and found.summaries[1].completed_recorded == 0
    assert found.summaries[1].to_dict()["false_alarms_high"] is None
    said = [line for line in found.lines() if line.startswith("p: false alarms")]
    assert said == ["p: false alarms: -, as the detector saw no completed trial to its end"]


def test_false_alarms_are_a_share_of_the_trials_that_the_detector_saw(recorded):
    """Those that never start or are stopped before their end are no evidence either."""
    found = played(recorded, {"trial": {"divergence": {"gap_limit": 1.0}}, "budget": {"trials": 20}})
    began = [r for r in found.rows if r["recorded_outcome"] == "completed" and r["outcome"] != "pending"]
    assert 0 < len(began) < 26 and found.summaries[0].completed_recorded == len(began)


@pytest.mark.parametrize(
    "more",
    [{"budget": {"hours": 1000}}, {"budget": {"gpu_hours": 1000}}, {"pruning": "asha"}, {"pruning": "median"}],
)
def test_bounds_are_claimed_only_where_no_trial_depends_on_another(recorded, more):
    loose = {"trial": {"divergence": {"gap_limit": 50.0, "hard_gap_limit": 100.0}}}
    free, bound = played(recorded, loose), played(recorded, loose | more)
    note = next(n for n in free.notes if "end before the policy" in n)
    assert "at most" in note and "at least as good" in note
    note = next(n for n in bound.notes if "end before the policy" in n)
    assert "neither time nor the best is bounded" in note and "at least" not in note and "at most" not in note
    assert numbers(bound)["hours_most"] is None and numbers(free)["hours_most"] is not None
    kept = numbers(played(recorded, more))
    assert kept["censored"] == 0 and kept["hours_most"] == kept["hours"], "nothing is unknown"


def test_a_pruning_rule_that_was_recorded_counts_too(recorded):
    from dataclasses import replace

    manifest = dict(recorded.manifest)
    manifest["config"] = {**manifest["config"], "pruning": {"rule": "asha"}}
    inherited = replace(recorded, manifest=manifest)
    found = played(inherited, {"trial": {"divergence": {"gap_limit": 50.0, "hard_gap_limit": 100.0}}})
    assert any("neither time nor the best is bounded" in note for note in found.notes)


def test_the_time_of_the_rest_has_its_evaluation(recorded):
    found = played(recorded, {"trial": {"divergence": {"gap_limit": 50.0, "hard_gap_limit": 100.0}}})
    trials = pd.read_parquet(PUBLISHED / "trials.parquet").set_index("trial_id")
    censored = [r for r in found.rows if r["censored"]]
    for row in censored:
        t = trials.loc[row["trial_id"]]
        each = (t["train_seconds"] + t["evaluation_seconds"]) / t["iterations_done"]
        left = t["iterations_planned"] - t["iterations_done"]
        assert row["seconds_left"] == pytest.approx(left * each)


def test_scores_of_another_protocol_have_no_place(recorded, tmp_path):
    best = next(r["trial_id"] for r in played(recorded, {}).rows if r["recorded_rank"] == 1)
    other = changed(tmp_path / "study", {best: {"fd_buffer_protocol": "another"}})
    found = played(other, {})
    row = next(r for r in found.rows if r["trial_id"] == best)
    assert row["recorded_rank"] is None and row["best"] is None and not row["among_best"]
    assert numbers(found)["best"] > numbers(played(recorded, {}))["best"] and numbers(found)["best_rank"] == 1
    assert any("fd_buffer: 1 trial was scored under another protocol" in note for note in other.results.notes)


def test_a_trial_without_times_adds_no_iterations_to_the_hours(recorded, tmp_path):
    whole = {r["trial_id"]: r["seconds"] for r in played(recorded, {}).rows}
    first = recorded.trajectories[0].trial_id
    other = changed(tmp_path / "study", {first: {"train_seconds": None}})
    found = played(other, {})
    assert other.timed and numbers(found)["hours"] == pytest.approx((sum(whole.values()) - whole[first]) / 3600)
    assert any("1 trial trained, but nobody recorded for how long; left out" in note for note in other.results.notes)


def test_of_an_order_only_its_numbers_are_kept(recorded):
    import weakref

    class Order(list):
        """Rows that can be watched."""

    rows = played(recorded, {}).rows
    seen = []

    def orders():
        for _ in range(6):
            order = Order(rows)
            seen.append(weakref.ref(order))
            yield order
            del order
            assert sum(ref() is not None for ref in seen) <= 1

    found = summarise("p", orders(), 1)
    assert found.orders == 5 and len(seen) == 6
    kept, left = (played(recorded, TIGHT, orders=3, keep_rows=keep) for keep in (True, False))
    assert len(kept.rows) == 4 * 57 and left.rows == []
    assert kept.to_dict() == left.to_dict() and kept.lines() == left.lines()
