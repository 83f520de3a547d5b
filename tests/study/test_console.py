"""What a user sees while a study runs."""

from __future__ import annotations

import io

from study.console import Progress, StudyConsole, duration, number, state_text


def trial(trial_id="t0001", outcome="running", **values):
    columns = {
        "trial_id": trial_id, "outcome": outcome, "cause": None, "iteration": None, "message": None, "seed": 0,
        "sampling_steps": 5, "step_size": 1.0, "reinit_probability": 0.05, "buffer_size": 10000, "initial": "uniform",
        "epochs": 6, "epochs_done": 2, "iterations_done": 20, "iterations_planned": 60, "fd_buffer_last": 0.4321,
    }  # fmt: skip
    return {**columns, **values}


DIVERGED = trial("t0002", "diverged", cause="energy_gap", iteration=17)


def test_states_in_words():
    assert state_text(trial()) == "running"
    assert state_text(DIVERGED) == "diverged at iteration 17: energy gap ran away"
    assert state_text(trial(outcome="failed", message="CUDA out of memory")) == "failed: CUDA out of memory"
    assert [number(v) for v in (None, 5, 0.05, "batch", 1.23456)] == ["-", "5", "0.05", "batch", "1.23"]
    assert [duration(s) for s in (4, 64, 3720)] == ["4s", "1m 04s", "1h 02m"]


def test_a_file_gets_one_plain_line_per_trial_that_ended():
    stream = io.StringIO()
    console = StudyConsole(stream)
    progress = Progress("demo", 3, ["initial"], "fd_buffer", seeds=2)
    console.start(progress)
    console.trial(trial(), None, "started")
    console.trial(trial(), 0.1, "report")
    console.trial(DIVERGED, 5.0, "ended")
    console.stop()
    assert stream.getvalue().splitlines() == [
        "[1/3] t0002 K=5 α=1 ρ=0.05 |B|=10000 p0=uniform seed=0 fd_buffer=0.432 "
        "diverged at iteration 17: energy gap ran away"
    ]


def test_a_terminal_shows_every_trial_with_the_papers_symbols_and_counts():
    stream = io.StringIO()
    console = StudyConsole(stream, force_terminal=True)
    console.rich.width = 160
    progress = Progress("demo", 3, ["initial"], "fd_buffer", seeds=1)
    console.start(progress)
    console.trial(trial(), -0.5, "report")
    console.trial(DIVERGED, 5.0, "ended")
    console.rich.print(console._render())
    console.stop()
    text = stream.getvalue()
    for wanted in ("K", "α", "ρ", "|B|", "p0", "FD (buffer)", "2/6", "0.432", "-0.5", "diverged at iteration 17"):
        assert wanted in text
    assert "1/3 trials: 1 pending, 1 running, 1 diverged" in text


def test_time_left_counts_running_trials_by_their_iterations_and_not_those_of_an_earlier_run():
    progress = Progress("demo", 10, [], "fd_buffer", seeds=1)
    progress.begin({f"t{i}": trial(f"t{i}", "completed") for i in range(4)})
    assert progress.done == 4
    assert progress.seconds_left() is None
    for i in range(4, 6):
        progress.trials[f"t{i}"] = trial(f"t{i}", "completed")
    progress.trials["t6"] = trial("t6", iterations_done=30)
    progress.started -= 25.0  # 2.5 trials of this run's 25 s; 3.5 are left
    left = progress.seconds_left()
    assert left is not None
    assert abs(left - 35.0) < 0.1
