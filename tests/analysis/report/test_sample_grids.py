"""Sample grids: the best and the failures, and what is said of them."""

import json

import pytest
from PIL import Image

from analysis.report.sample_grids import sample_grids
from analysis.results.load import load


@pytest.fixture
def sixty(synthetic):
    return load(synthetic(60))


def test_sample_grids_are_the_best_and_the_failures(sixty):
    grids = sample_grids(sixty, "synthetic")
    outcomes = sixty.trials.set_index("trial_id")["outcome"]
    assert [outcomes[g.trial_id] for g in grids[::2]] == ["completed", "completed", "diverged", "collapsed"]
    completed = sixty.trials[sixty.trials["outcome"] == "completed"].sort_values("fd_buffer_best")
    assert [g.trial_id for g in grids[:4:2]] == completed["trial_id"].tolist()[:2]
    assert [g.kind for g in grids[:2]] == ["buffer", "fresh"]
    assert "small-buffer-v1" in grids[0].detail and "small-buffer-v1" not in grids[0].caption


def test_grids_say_what_they_show(study, row):
    config = json.dumps({"evaluation": {"fresh_steps": 20}})
    trials = [
        row("early", "diverged", iteration=8, config=config),
        row("late", "diverged", iteration=250, config=config, seed=0),
        row("bad", "collapsed", iteration=None, iterations_done=90, config=config),
    ]
    epochs = [
        {"trial_id": trial, "epoch": epoch, "attempt": 1, "iteration": 100 * epoch, "fd_buffer": 9.0 - epoch}
        for trial, last in (("early", 0), ("late", 2))
        for epoch in range(last + 1)
    ]
    folder = study([t | {"sampling_steps": i + 1} for i, t in enumerate(trials)], epochs)
    (folder / "samples").mkdir()
    for trial in ("early", "late"):
        for kind in ("buffer", "fresh", "end"):
            Image.new("L", (9, 9)).save(folder / "samples" / f"{trial}_{kind}.png")
    Image.new("L", (9, 9)).save(folder / "samples" / "bad_end.png")
    grids = sample_grids(load(folder), "demo")
    assert [g.title for g in grids] == [
        "Replay buffer, epoch 2",
        "Fresh chains from p0, 20 steps",
        "Chains at iteration 250, when it diverged",
        "Chains at its end, when it collapsed",
    ]
    assert [g.trial_id for g in grids] == ["late", "late", "late", "bad"]
    assert grids[0].caption == "FD (buffer) 7; K 2, seed 0"
    assert grids[0].detail == "late diverged at iteration 250: energy gap ran away; protocol not recorded"
    assert grids[2].caption == "K 2, seed 0; diverged at iteration 250: energy gap ran away"
    (folder / "samples" / "late_end.png").unlink()
    (folder / "samples" / "late_buffer.png").unlink()
    (folder / "samples" / "late_fresh.png").unlink()
    left = sample_grids(load(folder), "demo")
    assert [(g.trial_id, g.kind) for g in left] == [("early", "end"), ("bad", "end")]
    assert not any("untrained" in g.title for g in left), "what an untrained model makes shows p0 alone"
