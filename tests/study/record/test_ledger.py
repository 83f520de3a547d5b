"""The journal, and the Parquet tables made from it."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from study.config.errors import UserError
from study.record.ledger import Ledger
from trainables.methods.presets import build_trial
from trainables.results.layout import JOURNAL
from trainables.results.schema import EPOCH_COLUMNS, TRIAL_COLUMNS, Outcome

CONFIG = build_trial({"dataset": "digits", "seed": 3})


def row(epoch, train=1.0, evaluation=0.5):
    return {"epoch": epoch, "iteration": 10 * epoch, "train_seconds": train, "evaluation_seconds": evaluation}


def state(outcome="running", **values):
    return {"outcome": outcome, "train_seconds": 2.0, "evaluation_seconds": 1.0, **values}


def two_trials(folder):
    ledger = Ledger(folder, "s")
    ledger.start("t0002", CONFIG, "abcd", 0.0)
    ledger.start("t0001", CONFIG, "abcd", 0.5)
    for epoch in (0, 1, 2):
        ledger.report("t0001", row(epoch), state())
    ledger.checkpoint("t0001", "/somewhere/checkpoint_000001")
    ledger.report("t0002", None, state("diverged", cause="energy_gap", iteration=7))
    return ledger


def test_tables_have_every_column_and_one_row_per_trial_and_epoch(tmp_path):
    two_trials(tmp_path).close()
    trials, epochs = pd.read_parquet(tmp_path / "trials.parquet"), pd.read_parquet(tmp_path / "epochs.parquet")
    assert list(trials.columns) == [c.name for c in TRIAL_COLUMNS]
    assert list(epochs.columns) == [c.name for c in EPOCH_COLUMNS]
    assert list(trials["trial_id"]) == ["t0001", "t0002"]
    assert list(trials["outcome"]) == ["running", "diverged"]
    assert list(zip(epochs["trial_id"], epochs["epoch"], strict=True)) == [("t0001", e) for e in (0, 1, 2)]
    diverged = trials.set_index("trial_id").loc["t0002"]
    assert (diverged["cause"], diverged["iteration"], diverged["seed"], diverged["gpus"]) == ("energy_gap", 7, 3, 0.0)
    assert diverged["sampling_steps"] == CONFIG.sampling_steps
    assert json.loads(diverged["config"])["seed"] == 3
    assert diverged["ended_at"] is not None


def test_the_journal_alone_gives_everything_back(tmp_path):
    before = two_trials(tmp_path)
    again = Ledger(tmp_path, "s", writable=False)  # the first was never closed: a killed driver
    assert again.trials == before.trials
    assert [again.rows(t) for t in again.trials] == [before.rows(t) for t in before.trials]
    assert [row["epoch"] for row in again.rows("t0001")] == [0, 1, 2]
    assert again.attempts == before.attempts
    assert again.checkpoints == {"t0001": ["/somewhere/checkpoint_000001"]}
    assert again.unfinished() == ["t0001"]


def test_replayed_epochs_are_counted_and_never_doubled(tmp_path):
    ledger = two_trials(tmp_path)
    ledger.start("t0001", CONFIG, "abcd", 0.0)  # a second attempt, from the checkpoint after epoch 1
    for epoch in (2, 3):
        ledger.report("t0001", row(epoch, train=4.0), state("completed" if epoch == 3 else "running"))
    ledger.close()
    epochs = pd.read_parquet(tmp_path / "epochs.parquet")
    assert list(epochs["epoch"]) == [0, 1, 2, 3]
    assert list(epochs["attempt"]) == [1, 1, 2, 2]
    assert list(epochs["train_seconds"]) == [1.0, 1.0, 4.0, 4.0]
    trial = pd.read_parquet(tmp_path / "trials.parquet").set_index("trial_id").loc["t0001"]
    assert trial["attempts"] == 2
    assert trial["replayed_seconds"] == 1.5  # epoch 2 of the first attempt: 1.0 trained, 0.5 evaluated
    assert trial["seconds"] == 2.0 + 1.0 + 1.5
    assert trial["outcome"] == "completed"


def test_a_half_written_last_line_is_dropped_and_the_journal_goes_on(tmp_path):
    two_trials(tmp_path)
    path = tmp_path / JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "report", "trial_id": "t00')
    reader = Ledger(tmp_path, "s", writable=False)
    assert reader.outcome("t0001") is Outcome.RUNNING
    assert path.read_bytes() != whole  # a reader changes nothing
    writer = Ledger(tmp_path, "s")
    writer.end("t0001", Outcome.INTERRUPTED, None)
    writer.close()
    assert path.read_bytes().startswith(whole)
    assert Ledger(tmp_path, "s", writable=False).outcome("t0001") is Outcome.INTERRUPTED


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    two_trials(tmp_path)
    path = tmp_path / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"garbage\n", *lines[1:]]))
    with pytest.raises(UserError, match=rf"{JOURNAL}: line 2 is damaged"):
        Ledger(tmp_path, "s", writable=False)


def test_nan_is_refused(tmp_path):
    ledger = two_trials(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        ledger.report("t0001", {**row(3), "loss": float("nan")}, state())


def test_epochs_an_abandoned_attempt_reached_are_dropped_and_counted_as_replayed(tmp_path):
    ledger = Ledger(tmp_path, "s")
    ledger.start("t0001", CONFIG, "abcd", 0.0)
    for epoch in (0, 1, 2, 3):
        ledger.report("t0001", row(epoch), state(epochs_done=epoch))
    ledger.start("t0001", CONFIG, "abcd", 0.0)  # from the checkpoint after epoch 1; then it diverges in epoch 2
    ledger.report("t0001", None, state("diverged", cause="energy_gap", iteration=15, epochs_done=1))
    ledger.close()
    assert list(pd.read_parquet(tmp_path / "epochs.parquet")["epoch"]) == [0, 1]
    assert pd.read_parquet(tmp_path / "trials.parquet")["replayed_seconds"].item() == 2 * 1.5


def test_a_failure_after_a_verdict_shows_the_failure(tmp_path):
    ledger = two_trials(tmp_path)
    ledger.end("t0002", Outcome.FAILED, "OSError: disk full")
    assert (ledger.trials["t0002"]["cause"], ledger.trials["t0002"]["iteration"]) == (None, None)
