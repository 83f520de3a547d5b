"""Studies with `rescue`: first ends as without, every run counted, nothing lost by a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from analysis.results.load import load
from analysis.stats.survival.rates import rate
from analysis.stats.survival.rescues import rescue_curves, rescues, trained
from analysis.stats.tradeoff.compute import compute_ledger
from study.record.ledger import Ledger
from study.search.storage import storage_url
from trainables.results.hours import Hours

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PLAIN = {
    "name": "plain",
    "trial": {
        "method": "m-ebm",
        "dataset": "digits",
        "network": "conv-8",
        "norm": "batch",
        "initial": "uniform",
        "l2_weight": 0.0,
        "epochs": 12,
        "iterations_per_epoch": 10,
        "evaluation": {"every": 4, "fresh_steps": 2},
        "batch_size": 16,
        "label_batch_size": 16,
        "buffer_size": 500,
        "warmup_iterations": 10,
    },
    "search": {"sampler": "grid", "grid": [{"sampling_steps": [1, 2]}]},
    "seeds": [0, 1],
    "run": {"checkpoint_seconds": 0},
}
RESCUE = {"rewind": 1, "change": {"learning_rate": "x0.5", "seed": "new"}, "most": 2}
CLOCKS = ["seconds", "train_seconds", "evaluation_seconds", "reported_at", "attempt"]
COUNTED = ["outcome", "cause", "iteration", "alarm_iteration", "epochs_done", "fd_buffer_best", "seed", "config"]
COUNTED += ["rescue", "rescue_of", "rescue_from", "rescues", "rescued"]
WAIT = 240


def _start(*arguments):
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ),
    )


def _finish(process):
    output, _ = process.communicate(timeout=WAIT)
    return process.returncode, output


def _table(folder, name):
    return pd.read_parquet(folder / f"{name}.parquet").sort_values("trial_id", kind="stable", ignore_index=True)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The study without and with rescue, undisturbed."""
    base, found = tmp_path_factory.mktemp("rescue"), {}
    for name, rescue in (("plain", None), ("rescued", RESCUE)):
        config = base / f"{name}.yaml"
        config.write_text(json.dumps(PLAIN | {"name": name} | ({"rescue": rescue} if rescue else {})))
        code, output = _finish(_start("sweep", config, "--results", base))
        assert code == 0, output
        found[name] = base / name, output
    return found


def test_first_ends_are_those_of_a_study_without(swept):
    """Like with like: rows, epochs, signals, rates and what Optuna was told."""
    plain, rescued = (load(swept[name][0]) for name in ("plain", "rescued"))
    own = ["rescues", "rescued", "rescue_seconds"]
    numbers = [c for c in COUNTED if c not in own]
    pd.testing.assert_frame_equal(plain.trials[numbers], rescued.trials[numbers], check_exact=True)
    drop = ["study", *CLOCKS]
    ordered = [
        r.epochs.sort_values(["trial_id", "epoch"], ignore_index=True).drop(columns=drop) for r in (plain, rescued)
    ]
    pd.testing.assert_frame_equal(*ordered, check_exact=True)
    for trial_id in plain.trials["trial_id"]:
        pd.testing.assert_frame_equal(plain.signals("plain", trial_id), rescued.signals("rescued", trial_id))
    assert (plain.trials["outcome"] == "diverged").sum() >= 3
    first, second = (rate(r.trials.to_dict("records")) for r in (plain, rescued))
    assert (first.rate, first.low, first.high) == (second.rate, second.low, second.high)
    told = []
    for name in ("plain", "rescued"):
        folder = swept[name][0]
        trials = optuna.load_study(study_name=name, storage=storage_url(folder)).get_trials()
        told.append(sorted((t.user_attrs["trial_id"], t.state, t.value, t.params, t.constraints) for t in trials))
    assert told[0] == told[1]
    assert plain.trials["rescues"].isna().all()


def test_every_bad_end_is_kept_and_most_is_kept_to(swept):
    """A run for every bad end until the last rescue; each begins where the one before was healthy."""
    trials = _table(swept["rescued"][0], "trials").set_index("trial_id", drop=False)
    for trial_id, row in trials[trials["rescue"].isna()].iterrows():
        runs = trials[trials["rescue_of"] == trial_id].sort_values("rescue")
        assert list(runs["rescue"]) == list(range(1, len(runs) + 1))
        assert len(runs) <= RESCUE["most"]
        chain = [row, *(runs.loc[name] for name in runs.index)]
        for before, after in pairwise(chain):
            assert before["outcome"] in ("diverged", "collapsed")
            assert after["learning_rate"] == pytest.approx(before["learning_rate"] / 2)
            assert after["seed"] != before["seed"]
            assert after["rescue_from"] <= max(0, before["alarm_iteration"] - 10)
            assert after["sampling_steps"] == before["sampling_steps"]
        last = chain[-1]
        assert last["outcome"] == "completed" or len(runs) == RESCUE["most"]
        assert (row["rescues"] or 0) == len(runs) if len(runs) else pd.isna(row["rescues"])
        assert row["rescued"] == last["outcome"] if len(runs) else row["rescued"] is None
    assert trials["rescue"].notna().sum() >= 3


def test_epochs_of_a_rescue_follow_its_healthy_state(swept):
    folder = swept["rescued"][0]
    trials, epochs = _table(folder, "trials"), _table(folder, "epochs")
    for row in trials[trials["rescue"].notna()].to_dict("records"):
        own = epochs[epochs["trial_id"] == row["trial_id"]]
        first = int(row["rescue_from"]) // 10 + 1
        assert list(own["epoch"]) == list(range(first, int(row["epochs_done"]) + 1))
        signals = pd.read_parquet(folder / "signals" / f"{row['trial_id']}.parquet")
        assert signals["iteration"].iloc[0] == row["rescue_from"]
        assert signals["iteration"].is_monotonic_increasing


def test_no_cost_is_left_out(swept):
    """Seconds of every attempt are in the rows of trials, and rescues in those of what they rescued."""
    folder = swept["rescued"][0]
    results, trials = load(folder), _table(folder, "trials")
    after = trials[trials["rescue"].notna()]
    spent = (after["seconds"] + after["lost_seconds"]).groupby(after["rescue_of"]).sum()
    first = trials[trials["rescues"].notna()].set_index("trial_id")["rescue_seconds"]
    pd.testing.assert_series_equal(first, spent, check_names=False)
    ledger = compute_ledger(results.trials).set_index("category")["seconds"]
    assert ledger["rescues"] == pytest.approx(spent.sum())
    whole = (trials["seconds"] + trials["lost_seconds"]).sum()
    assert ledger["spent"] == pytest.approx(whole)
    hours = Hours.of(trials.astype(object).where(trials.notna(), None).to_dict("records"))
    assert hours.rescues * 3600 == pytest.approx((after["train_seconds"] + after["evaluation_seconds"]).sum())
    # The wall time of every attempt is reserved, whatever it was for.
    attempts = _table(folder, "attempts")
    assert set(attempts["trial_id"]) == set(trials["trial_id"])
    assert (attempts.groupby("trial_id")["seconds"].sum() >= trials.set_index("trial_id")["seconds"] * 0.99).all()


def test_the_table_counts_runs_and_ends(swept):
    results = load(swept["rescued"][0])
    table = rescues(results, "rescued").set_index("rescue")
    assert list(table["runs"]) == [4, *results.rescues.groupby("rescue").size()]
    ends = results.trials["rescued"].fillna(results.trials["outcome"])
    assert table["reached"].iloc[-1] == (ends == "completed").sum()
    assert table["reached"].iloc[0] == (results.trials["outcome"] == "completed").sum()
    assert (table["trials"] == 4).all()
    done = [trained(r) for r in results.rescues.to_dict("records")]
    assert table["extra"].iloc[-1] == pytest.approx(sum(done) / table["iterations"].iloc[0])
    curves = {c.value: c for c in rescue_curves(results)}
    assert curves["0"].events == (results.trials["outcome"] == "diverged").sum()
    assert curves["1"].trials == (results.rescues["rescue"] == 1).sum()
    assert len(rescues(load(swept["plain"][0]), "plain")) == 0


def test_nothing_is_left_of_what_was_kept(swept):
    folder = swept["rescued"][0]
    left = {path.name for path in (folder / "rescue").glob("*")}
    trials = _table(folder, "trials")
    # Nothing goes back to the states of a trial whose rescues are spent: it leaves none.
    assert not left & set(trials["trial_id"])
    assert "rescue" in swept["rescued"][1]
    code, output = _finish(_start("report", folder))
    assert code == 0, output
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "↻" in page
    assert "Trials and their rescues" in page


def test_a_kill_during_a_rescue_changes_nothing(swept, tmp_path):
    """kill -9 while a rescue trains, and again while the next one does; the same rows, epochs and signals."""
    calm = swept["rescued"][0]
    folder, seen = tmp_path / "rescued", 0
    process = _start("sweep", calm.parent / "rescued.yaml", "--results", tmp_path)
    for _ in range(2):
        until = time.monotonic() + WAIT
        while time.monotonic() < until:
            journal = folder / "ledger.jsonl"
            lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
            of_rescues = sum('"report"' in line and 'r1"' in line and '"outcome": "running"' in line for line in lines)
            of_rescues = of_rescues or sum('r1"' in line and '"event":"report"' in line for line in lines)
            if of_rescues > seen:
                seen = of_rescues
                break
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        _finish(process)
        process = _start("resume", folder)
    code, output = _finish(process)
    assert code == 0, output
    mine, undisturbed = (_table(f, "trials")[COUNTED] for f in (folder, calm))
    pd.testing.assert_frame_equal(mine, undisturbed, check_exact=True)
    ordered = [
        _table(f, "epochs").sort_values(["trial_id", "epoch"], ignore_index=True).drop(columns=CLOCKS)
        for f in (folder, calm)
    ]
    pd.testing.assert_frame_equal(*ordered, check_exact=True)
    assert _table(folder, "trials")["attempts"].max() >= 2
    for path in sorted((calm / "signals").glob("*.parquet")):
        pd.testing.assert_frame_equal(pd.read_parquet(path), pd.read_parquet(folder / "signals" / path.name))
    states = [t.state for t in optuna.load_study(study_name="rescued", storage=storage_url(folder)).get_trials()]
    assert TrialState.RUNNING not in states
    assert states.count(TrialState.COMPLETE) == 4
    ledger = Ledger(folder, "rescued", writable=False)
    assert len(ledger.searched) == 4
