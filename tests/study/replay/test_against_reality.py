"""What a replay predicts, and what a study that really runs so does: the same trials end at the same rungs."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from analysis.results.load import load
from study.replay.policy import make_policy
from study.replay.replay import replay
from study.replay.trajectory import read_recorded

POLICIES = {
    "asha": {"pruning": {"rule": "asha", "reduction": 2}},
    "median": {"pruning": {"rule": "median", "min_trials": 2}},
    "few": {"pruning": {"rule": "asha", "reduction": 2}, "budget": {"trials": 9}},
}


@pytest.fixture(scope="module")
def swept(ray_cluster, run_mebm, tiny_study, tmp_path_factory):
    """Sixteen trials of four epochs, one at a time: all of them in full, and once under each policy."""
    base = tmp_path_factory.mktemp("swept")
    study = tiny_study | {
        "name": "full",
        "search": {
            "sampler": "grid",
            "grid": [{"learning_rate": [1e-3, 1e-2, 1e-4, 1e-1], "initial": ["gaussian", "uniform"]}],
        },
        "run": {"max_concurrent": 1},
    }
    study["trial"] = study["trial"] | {"epochs": 4, "evaluation": {"fresh_steps": 2, "every": 1}}
    for name, policy in ({"full": {}} | POLICIES).items():
        (base / f"{name}.yaml").write_text(json.dumps(study | {"name": name} | policy), encoding="utf-8")
        code, _, err = run_mebm("sweep", base / f"{name}.yaml", "--results", base)
        assert (code, err) == (0, "")
    return base


def ends(frame):
    return {r["trial_id"]: (r["outcome"], r["iterations"]) for r in frame}


def really(folder):
    trials = pd.read_parquet(folder / "trials.parquet")
    return dict(zip(trials["trial_id"], zip(trials["outcome"], trials["iterations_done"], strict=True), strict=True))


@pytest.mark.ray
@pytest.mark.parametrize("name", POLICIES)
def test_the_prediction_of_a_full_study_is_what_a_real_run_does(swept, name):
    recorded = read_recorded(load(swept / "full"))
    policy = make_policy(POLICIES[name], recorded, f"{name}.yaml")
    found = replay(recorded, [policy], orders=0)
    predicted = {k: v for k, v in ends(found.rows).items() if v[0] != "pending"}
    real = really(swept / name)
    assert predicted == real
    kinds = {outcome for outcome, _ in real.values()}
    assert kinds >= ({"pruned", "completed"} if name == "few" else {"pruned", "diverged"}), "of something"
    if name == "few":
        assert len(real) == 9 and found.summaries[0].numbers["never_started"].value == 7


@pytest.mark.ray
def test_a_study_that_pruned_under_its_own_policy_ends_as_recorded(swept):
    recorded = read_recorded(load(swept / "asha"))
    found = replay(recorded, [make_policy({}, recorded, "recorded")], orders=0)
    assert ends(found.rows) == really(swept / "asha")
    assert found.summaries[0].numbers["censored"].value == 0
    # Without pruning the trials that it cut would have gone on, and nobody knows where to.
    without = replay(recorded, [make_policy({"pruning": "none"}, recorded, "none")], orders=0)
    cut = [r for r in without.rows if r["recorded_outcome"] == "pruned"]
    assert cut and all(r["outcome"] is None and r["censored"] for r in cut)
    numbers = without.summaries[0].numbers
    assert numbers["censored"].value == len(cut) and numbers["pruned"].value == 0
    assert numbers["hours_most"].value > numbers["hours"].value


@pytest.mark.ray
def test_the_order_is_that_of_the_journal(swept):
    """Its trials take less than a second: by their times alone the order would be another."""
    recorded = read_recorded(load(swept / "full"))
    assert [t.seed for t in recorded.trajectories] == [0] * 8 + [1] * 8 and recorded.at_once == 1
