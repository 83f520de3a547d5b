"""What a user sees while a study runs."""

from __future__ import annotations

import io
import json
import re

import pytest

from study.display.console import StudyConsole, fitted
from study.display.status import StudyStatus, duration, number, state_text
from trainables.results.hours import Hours
from trainables.results.schema import Outcome


def trial(trial_id="t0001", outcome="running", **values):
    columns = {
        "trial_id": trial_id, "outcome": outcome, "cause": None, "iteration": None, "message": None, "seed": 0,
        "sampling_steps": 5, "step_size": 1.0, "reinit_probability": 0.05, "buffer_size": 10000, "initial": "uniform",
        "epochs": 6, "epochs_done": 2, "iterations_done": 20, "iterations_planned": 60, "fd_buffer_last": 0.4321,
    }  # fmt: skip
    return {**columns, **values}


DIVERGED = trial("t0002", "diverged", cause="energy_gap", iteration=17)
SEARCHED = ["sampling_steps", "step_size", "reinit_probability", "buffer_size", "initial"]


def ended(trial_id, outcome, minute, **values):
    return trial(trial_id, outcome, ended_at=f"2026-01-01T00:{minute:02d}:00Z", **values)


def busy(fields=SEARCHED, seeds=1, name="demo"):
    """A study with trials of every kind, in the order they started."""
    progress = StudyStatus(name, 60, fields, "fd_buffer", seeds)
    progress.put(ended("t0001", "diverged", 1, cause="energy_gap_hard", iteration=1234, step_size=0.12345), 20.5)
    progress.put(ended("t0002", "completed", 2, fd_buffer_last=0.5, fd_buffer_best=0.25, initial="gaussian"), -0.5)
    progress.put(ended("t0003", "completed", 3, fd_buffer_last=0.3, fd_buffer_best=0.3), -0.123)
    progress.put(ended("t0004", "failed", 4, message="torch.OutOfMemoryError: CUDA out of memory " * 5), None)
    progress.put(ended("t0005", "pruned", 5, message="rung 3: 5 of 9 trials did better, 3 go on"), 0.1)
    progress.put(ended("t0006", "collapsed", 6, cause="trivial_optimum", iteration=80, epochs=200), -2.0)
    progress.put(trial("t0007", epochs=200, epochs_done=120, reinit_probability=0.012345), 0.25)
    return progress


def picture(progress, width, height=24):
    """What the live display of a terminal of this size shows, as lines."""
    stream = io.StringIO()
    console = StudyConsole(stream, force_terminal=True)
    console.rich.size = (width, height)
    console.progress = progress
    console.rich.print(console._render(), soft_wrap=False)
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()


def test_states_in_words():
    assert state_text(trial()) == "running"
    assert state_text(DIVERGED) == "diverged at iteration 17: energy gap ran away"
    assert state_text(DIVERGED, short=True) == "diverged at 17: gap ran away"
    assert state_text(trial(outcome="failed", message="CUDA out of memory")) == "failed: CUDA out of memory"
    assert state_text(trial(outcome="pruned", message="rung 3")) == "pruned: rung 3"
    assert [number(v) for v in (None, 5, 0.05, "batch", 1.23456)] == ["-", "5", "0.05", "batch", "1.23"]
    assert [duration(s) for s in (4, 64, 3720, 100 * 3600)] == ["4s", "1m 04s", "1h 02m", "4d 4h"]


def test_a_file_gets_one_plain_line_per_trial_that_ended_and_an_overview_whatever_the_environment(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI systems set it: no reason for cursor movements in a log
    stream = io.StringIO()
    console = StudyConsole(stream)
    progress = StudyStatus("demo", 3, ["initial"], "fd_buffer", seeds=2)
    console.start(progress)
    console.trial(trial(), None, "started")
    console.trial(trial(), 0.1, "report")
    console.trial(DIVERGED, 5.0, "ended")
    console.stop()
    assert stream.getvalue().splitlines() == [
        "[1/3] t0002 K=5 α=1 ρ=0.05 |B|=10000 p0=uniform seed=0 fd_buffer=0.432 "
        "diverged at iteration 17: energy gap ran away",
        "1/3 trials: 1 running, 1 diverged, 1 pending; 0s so far",
    ]


def test_a_long_log_gets_an_overview_now_and_then():
    stream = io.StringIO()
    console = StudyConsole(stream)
    console.start(StudyStatus("demo", 3, [], "fd_buffer", seeds=1))
    console.trial(DIVERGED, None, "ended")
    assert len(stream.getvalue().splitlines()) == 1
    console._overview_at -= 601.0
    console.trial({**DIVERGED, "trial_id": "t0003"}, None, "ended")
    console.trial({**DIVERGED, "trial_id": "t0004"}, None, "ended")
    lines = stream.getvalue().splitlines()
    assert [line[:4] for line in lines] == ["[1/3", "[2/3", "2/3 ", "[3/3"]


def test_a_table_in_a_file_has_every_column_and_all_of_every_state():
    stream = io.StringIO()
    StudyConsole(stream).trials(busy(seeds=3))
    lines = stream.getvalue().splitlines()
    assert lines[0].split("  ") != lines[0]
    assert lines[0].split() == ["trial", "K", "α", "ρ", "|B|", "p0", "seed", "epoch", "FD", "(buffer)", "gap", "state"]
    assert [line.split()[0] for line in lines[1:]] == [f"t000{i}" for i in range(1, 8)]
    assert lines[4].endswith(("torch.OutOfMemoryError: CUDA out of memory " * 5).rstrip())
    assert all(line == line.rstrip() for line in lines)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", stream.getvalue())


def test_what_is_off_has_a_value_and_what_a_trial_has_not_is_a_dash():
    progress = StudyStatus("demo", 4, ["sam_rho", "clip_norm"], "fd_buffer", seeds=1)
    for number_, config in enumerate(({"clip_norm": None}, {"clip_norm": 0.5, "sam_rho": 2.0}, {"kind": "script"}), 1):
        progress.put(trial(f"t000{number_}", config=json.dumps(config)), None)
    columns = {c.header: c.cells for c in progress.shown().columns}
    assert columns["sam_rho"] == ("0", "2", "-")
    assert columns["clip_norm"] == ("none", "0.5", "-")


def test_a_wide_terminal_shows_the_papers_symbols_and_the_whole_states():
    text = "\n".join(picture(busy(), 160))
    for wanted in ("K", "α", "ρ", "|B|", "p0", "FD (buffer)", "120/200", "0.432", "0.25"):
        assert wanted in text
    assert "diverged at iteration 1234: energy gap above the hard limit" in text
    assert "7/60 trials" not in text  # one of them runs
    counts = "6/60 trials: 1 running, 2 completed, 1 diverged, 1 collapsed, 1 pruned, 1 failed, 53 pending; 0s so far"
    assert counts in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
@pytest.mark.parametrize(("fields", "seeds"), [(SEARCHED, 1), (["initial", "sampling_steps"], 3), ([], 5)])
def test_a_narrow_terminal_wraps_no_row(width, fields, seeds):
    lines = picture(busy(fields, seeds, name="a_study_with_quite_a_long_name" * 2), width)
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if re.match(r"t\d{4}", line)]
    assert len(rows) == 7
    assert [line[:5] for line in lines[1:9]] == ["trial", *(row[:5] for row in rows)]  # nothing in between
    assert all(re.search(r"running|diver|compl|fail|prun|coll", row) for row in rows)


def test_at_80_columns_the_questions_of_the_study_stay_and_the_end_of_a_state_goes():
    lines = picture(busy(), 80)
    assert lines[1].split() == ["trial", "K", "α", "ρ", "|B|", "p0", "epoch", "FD", "state"]
    row = next(line for line in lines if line.startswith("t0001"))
    assert re.search(r"diverged at 1234: \w*…$", row.rstrip())
    lines = picture(busy(["initial", "sampling_steps"], seeds=3), 80)
    # α, ρ and |B| are the same everywhere in this study, so the gap has room.
    assert lines[1].split() == ["trial", "K", "p0", "seed", "epoch", "FD", "gap", "state"]
    row = next(line for line in lines if line.startswith("t0004"))
    assert re.search(r"failed: torch\.OutOf\w*…$", row.rstrip())


def test_the_picture_fits_a_low_terminal():
    progress = busy()
    for i in range(20):
        progress.put(trial(f"t01{i:02d}"), None)
    for height in (16, 24, 50):
        lines = picture(progress, 80, height)
        assert len(lines) < height
        assert any("pending" in line for line in lines)
    assert sum(line.startswith("t") and "/" in line for line in lines[2:]) == 18  # not the 27 there are


def test_the_trials_to_look_at_first():
    progress = busy()
    first = [t["trial_id"] for t in progress.interesting(5)]
    # It runs; the newest that ended badly; the best; the newest of the rest.
    assert first == ["t0007", "t0006", "t0004", "t0002", "t0005"]
    assert {t["trial_id"] for t in progress.interesting(100)} == set(progress.trials)
    progress.direction = "maximize"
    assert "t0003" in [t["trial_id"] for t in progress.interesting(5)]
    for i in range(30):
        progress.put(trial(f"t1{i:03d}"), None)
    kinds = [t["outcome"] for t in progress.interesting(12)]
    assert kinds.count("running") == 6  # half of the rows, however many run
    assert {"failed", "collapsed", "completed"} <= set(kinds)


def test_divergences_and_failures_stand_above_the_live_table_as_they_happen():
    stream = io.StringIO()
    console = StudyConsole(stream, force_terminal=True)
    console.rich.size = (80, 24)
    console.start(StudyStatus("demo", 3, ["initial"], "fd_buffer", seeds=1))
    console.trial(trial("t0001", "completed"), 0.0, "ended")
    console.trial(DIVERGED, 5.0, "ended")
    console.trial(trial("t0003", "failed", message="ValueError: " + 100 * "x"), None, "ended")
    console.stop()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    lines = [line.rstrip() for line in plain.replace("\r", "\n").splitlines()]
    assert "t0002 diverged at iteration 17: energy gap ran away  p0=uniform" in lines
    (failed,) = [line for line in lines if line.startswith("t0003 failed: ValueError: xxx")]
    assert len(failed) == 80
    assert failed.endswith("…")
    assert not any(line.startswith("t0001 completed") for line in lines)
    assert stream.getvalue().endswith("\n")


def test_no_color_leaves_a_live_table_without_colours(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    found = {}
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        stream = io.StringIO()
        console = StudyConsole(stream, force_terminal=True)
        console.start(busy())
        console.trial(DIVERGED, 5.0, "ended")
        console.stop()
        found[value] = stream.getvalue()
    colour = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7])(?:;[0-9;]*)?m")
    assert colour.search(found[""])
    assert not colour.search(found["1"])
    assert "\x1b[?25l" in found["1"]  # the cursor is hidden while the table lives


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = io.StringIO()
    console = StudyConsole(stream, force_terminal=True)
    console.start(StudyStatus("demo", 3, [], "fd_buffer", seeds=1))
    console.trial(DIVERGED, 5.0, "ended")
    console.stop()
    assert stream.getvalue().startswith("[1/3] t0002 ")
    assert "\x1b" not in stream.getvalue()


def test_a_large_study_ends_with_the_trials_to_look_at():
    stream = io.StringIO()
    console = StudyConsole(stream, force_terminal=True)
    progress = busy()
    for i in range(94):
        progress.put(ended(f"t1{i:03d}", "completed", 7), None)
    console.start(progress)
    stream.truncate(0)
    console.stop()
    assert "and 83 more: mebm status shows them all" in stream.getvalue()
    assert "t0001" in stream.getvalue()


def test_time_left_counts_running_trials_by_their_iterations_and_not_those_of_an_earlier_run():
    progress = StudyStatus("demo", 10, [], "fd_buffer", seeds=1)
    progress.begin({f"t{i}": trial(f"t{i}", "completed") for i in range(4)})
    assert progress.done == 4
    assert progress.left() is None
    for i in range(4, 6):
        progress.put(trial(f"t{i}", "completed"), None)
    progress.put(trial("t6", iterations_done=30), None)
    progress.put(trial("t7", iterations_done=0), None)
    progress.started -= 25.0  # 2.5 trials of this run's 25 s; 3.5 are left
    left = progress.left()
    assert left is not None
    assert abs(left.seconds - 35.0) < 0.1
    assert str(left) == "about 35s left (from 2 trials at 2 at once)"
    assert "25s so far, about 35s left (from 2 trials at 2 at once)" in progress.overview()
    progress.going = False  # its driver is gone
    assert progress.left() is None


def test_a_study_that_was_cut_off_foretells_nothing():
    stream = io.StringIO()
    console = StudyConsole(stream)
    progress = StudyStatus("demo", 10, [], "fd_buffer", seeds=1)
    console.start(progress)
    for i in range(3):
        console.trial(trial(f"t{i}", "completed"), None, "ended")
    assert "left" in progress.overview()
    console.stop()
    assert stream.getvalue().splitlines()[-1] == "3/10 trials: 3 completed, 7 pending; 0s so far"


def test_once_all_trials_run_the_slowest_says_how_long_it_takes():
    progress = StudyStatus("demo", 4, [], "fd_buffer", seeds=1)
    for i in range(2):
        progress.put(trial(f"t{i}", "completed"), None)
    progress.put(trial("t2", iterations_done=30, train_seconds=50.0, evaluation_seconds=10.0), None)
    progress.put(trial("t3", iterations_done=45, train_seconds=40.0, evaluation_seconds=5.0), None)
    assert str(progress.left()) == "about 1m 00s left (the slowest of the last)"
    progress.put(trial("t2", "completed"), None)
    assert str(progress.left()) == "about 15s left (its last trial's pace)"
    progress.put(trial("t3", "completed"), None)
    assert progress.left() is None


SPENT = {"train_seconds": 3000.0, "evaluation_seconds": 600.0}
KINDS = [
    trial("a", "completed", **SPENT, replayed_seconds=360.0, lost_seconds=360.0),
    trial("b", "stopped", **SPENT),
    trial("c", "pruned", **SPENT, iterations_done=20, iterations_planned=60, seconds_per_iteration=9.0),
    trial("d", "running", **SPENT),
    trial("e", "interrupted", **SPENT),
    trial("f", "diverged", **SPENT, saved_seconds=1800.0),
    trial("g", "collapsed", **SPENT),
    trial("h", "failed", **SPENT, lost_seconds=1800.0),
    trial("i", "pending"),
]


def test_hours_by_kind_of_a_study_on_cpus_and_on_gpus():
    hours = Hours.of([t | {"gpus": 0.0} for t in KINDS])
    expected = {
        "unit": "trial-hours", "useful": 3.0, "open": 2.0, "diverged": 1.0, "collapsed": 1.0, "failed": 1.5,
        "replayed_and_lost": 0.2, "saved_by_early_stop": 0.6,
    }  # fmt: skip
    assert hours.to_dict() == pytest.approx(expected)
    assert hours.text() == (
        "trial-hours: 3.0 useful, 2.0 open, 1.0 diverged, 1.0 collapsed, 1.5 failed, 0.2 replayed or lost; "
        "0.6 saved by early stop"
    )
    on_gpus = Hours.of([t | {"gpus": 0.5} for t in KINDS]).to_dict()
    assert on_gpus == pytest.approx(
        {k: v if k == "unit" else v / 2 for k, v in expected.items()} | {"unit": "GPU-hours"}
    )


def test_a_short_study_counts_in_minutes_and_one_without_time_says_nothing():
    short = trial("a", "completed", train_seconds=90.0, evaluation_seconds=30.0, gpus=1.0)
    assert Hours.of([short]).text() == "GPU-minutes: 2.0 useful"
    assert Hours.of([trial()]).text() == ""
    assert Hours.of([]).text() == ""


def test_a_cost_can_be_what_the_study_improves():
    progress = StudyStatus("demo", 2, [], "seconds_per_iteration", seeds=1)
    progress.put(trial("t1", "completed", seconds_per_iteration=0.25), None)
    progress.put(trial("t2", "completed", seconds_per_iteration=0.125), None)
    assert [t["trial_id"] for t in progress.interesting(1)] == ["t2"]
    assert progress.shown().columns[-3].cells == ("0.25", "0.125")
    assert progress.counts()[Outcome.COMPLETED] == 2


def test_a_trial_that_was_never_scored_shows_no_score():
    progress = StudyStatus("demo", 3, SEARCHED, "fd_buffer", 1)
    unscored = {"fd_buffer_last": 9.04, "fd_buffer_initial": 9.04, "fd_buffer_best": None}
    progress.put(ended("t0001", "diverged", 1, cause="energy_gap", iteration=17, **unscored), 20.5)
    progress.put(trial("t0002", **unscored), 0.1)
    scored = {"fd_buffer_last": 9.04, "fd_buffer_initial": 9.04, "fd_buffer_best": 9.04}
    progress.put(ended("t0003", "completed", 3, **scored), 0.1)
    quality = next(c for c in progress.shown().columns if c.header == "FD (buffer)")
    assert quality.cells == ("-", "-", "9.04")
    assert "fd_buffer" not in progress.plain(progress.trials["t0001"])
    assert "fd_buffer=9.04" in progress.plain(progress.trials["t0003"])


def two_objectives():
    others = {"accuracy": "maximize", "seconds_per_iteration": "minimize"}
    progress = StudyStatus("demo", 9, ["sampling_steps"], "fd_buffer", 1, others=others)
    for i, (fd, accuracy, seconds) in enumerate(
        [(0.1, 0.8, 0.02), (0.2, 0.9, 0.01), (0.3, 0.7, 0.03), (0.4, 0.8, 1.5)]
    ):
        values = {"fd_buffer_last": fd, "fd_buffer_best": fd, "fd_buffer_initial": 9.0}
        values |= {"accuracy_last": accuracy, "accuracy_best": accuracy, "accuracy_initial": None}
        progress.put(ended(f"t000{i}", "completed", i, seconds_per_iteration=seconds, **values), 0.0)
    values = {"fd_buffer_last": 0.01, "fd_buffer_best": 0.01, "accuracy_last": 0.99, "accuracy_best": 0.99}
    progress.put(ended("t0009", "diverged", 9, cause="energy_gap", iteration=7, **values), 0.0)
    return progress


def test_every_objective_and_the_front_are_shown():
    progress = two_objectives()
    table = progress.shown()
    headers = [c.header for c in table.columns]
    assert headers[-5:] == ["FD (buffer)", "accuracy", "s/it", "gap", "state"]
    cells = {c.header: c.cells for c in table.columns}
    assert cells["accuracy"] == ("0.8", "0.9", "0.7", "0.8", "0.99")
    assert cells["s/it"][:4] == ("0.02", "0.01", "0.03", "1.5")
    assert progress.front() == {"t0000", "t0001"}, "what diverged is on no front"
    assert [s.endswith("on the front") for s in cells["state"]] == [True, True, False, False, False]
    assert "fd_buffer=0.2 accuracy=0.9 seconds_per_iteration=0.01" in progress.plain(progress.trials["t0001"])
    assert "completed, on the front" in "\n".join(picture(progress, 100))


@pytest.mark.parametrize("width", [60, 80, 100])
def test_whole_words_are_shown(width):
    for line in picture(busy(), width):
        words = line.replace("…", "").split()
        assert not words or words[-1] not in ("±", "ran a", ":"), line
        assert len(line) <= width


def test_a_long_line_goes_on_below_the_text_behind_its_label():
    text = "quality     " + "FD (buffer) 0.168 [0.13, 0.21] (1 trial), lower is better, " * 3
    parts = fitted(text, 60)
    assert parts[0].startswith("quality     FD") and all(p.startswith(" " * 12 + "") for p in parts[1:])
    assert all(len(p) <= 60 for p in parts) and " ".join(" ".join(parts).split()) == " ".join(text.split())
    assert fitted("short", 60) == ["short"]
    assert fitted("/a/path/" + "x" * 100, 60) == ["/a/path/" + "x" * 100]
