"""What befalls a study from outside while it runs: its folder goes, a terminal closes, Ctrl-C twice, the clock is set."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from study.config.load import validate_study
from study.record.folder import create_folder
from study.record.ledger import Ledger
from study.run.ending import ending_signals, study_signals
from trainables.methods.presets import build_trial
from trainables.results.layout import JOURNAL
from trainables.results.schema import Outcome

MEBM = str(Path(sys.executable).with_name("mebm"))
WAIT = 600
LONG = """
name: long
trial: {dataset: digits, norm: batch, epochs: 40, iterations_per_epoch: 10, evaluation: {every: 10, fresh_steps: 2},
  batch_size: 16, buffer_size: 1000}
search: {sampler: grid, grid: [{sampling_steps: [1, 2, 3]}]}
seeds: [0]
run: {checkpoint_seconds: 0}
"""
RUN = {"driver": "", "config": {"seeds": [0]}}
REPORT = {"outcome": "running", "train_seconds": 1.0, "evaluation_seconds": 0.0, "epochs_done": 0}


@pytest.fixture
def folder(tiny, tmp_path):
    return create_folder(validate_study(tiny, "tiny"), tmp_path)


# ------------------------------------------------------------------------------------------------------ the clock


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_a_clock_that_is_set_while_a_study_runs_makes_no_time(folder, monkeypatch, jump):
    ledger = Ledger(folder, "tiny")
    ledger.run(RUN)
    ledger.start("t0001", build_trial({"dataset": "digits"}), "s", 1.0)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    ledger.report("t0001", None, REPORT)
    assert 0 <= ledger.hours() < 0.1
    assert 0 <= ledger.gpu_hours() < 0.1
    ledger.end("t0001", Outcome.INTERRUPTED, None)
    ledger.close()
    again = Ledger(folder, "tiny")  # the next start has the new clock
    again.run(RUN)
    assert 0 <= again.attempts["t0001", 1]["seconds"] < 300
    assert 0 <= again.hours() < 0.1
    again.close()


def test_a_budget_in_hours_is_not_spent_by_a_clock(tiny, folder, monkeypatch):
    from study.run.stopping import StopPolicy

    study = validate_study(tiny | {"budget": {"hours": 1, "gpu_hours": 1}}, "tiny")
    ledger = Ledger(folder, "tiny")
    ledger.run(RUN)
    ledger.start("t0001", build_trial({"dataset": "digits"}), "s", 1.0)
    control = StopPolicy(study, ledger)
    assert (study.budget.hours, study.budget.gpu_hours) == (1, 1)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86400)
    assert not control.stop_all()
    ledger.close()


# ------------------------------------------------------------------------------------------------------ the folder


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_journal_that_went_is_noticed_and_nothing_is_written_in_its_place(folder, tmp_path, how):
    ledger = Ledger(folder, "tiny")
    ledger.run(RUN)
    assert ledger.in_place
    if how == "removed":
        shutil.rmtree(folder)
    else:
        folder.rename(tmp_path / "elsewhere")
    if how == "replaced":
        folder.mkdir()
        (folder / JOURNAL).write_text("of somebody else")
    assert not ledger.in_place
    ledger.alive()
    ledger.close()
    assert folder.exists() == (how == "replaced")
    if how == "replaced":
        assert [path.name for path in folder.iterdir()] == [JOURNAL]
        assert (folder / JOURNAL).read_text() == "of somebody else"
    if how != "removed":
        assert len((tmp_path / "elsewhere" / JOURNAL).read_text().splitlines()) == 2


# --------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_that_end_a_process_interrupt_and_are_what_they_were_afterwards(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), ending_signals():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert signal.getsignal(number) is before


def test_a_hang_up_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_signals(), study_signals(_Heard(), _Callback()):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGHUP, before)


class _Heard:
    def __init__(self):
        self.signals = []

    def interrupt(self, name):
        self.signals.append(name)


class _Callback:
    writing, hurried, at_first = 0, False, None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_interrupt_waits_for_what_is_being_written(number):
    control, callback = _Heard(), _Callback()
    with pytest.raises(KeyboardInterrupt), study_signals(control, callback):
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        assert control.signals == [signal.Signals(number).name]
        callback.writing = 1
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        assert callback.hurried
        os.kill(os.getpid(), signal.SIGINT)  # but not for ever
        time.sleep(5)


# ------------------------------------------------------------------------------------------------- whole studies


def begin(tmp_path, *, prefix=()):
    """Its own study, when it has come some way."""
    (tmp_path / "long.yaml").write_text(LONG)
    process = subprocess.Popen(
        [*prefix, MEBM, "sweep", str(tmp_path / "long.yaml"), "--results", str(tmp_path / "results")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    journal, until = tmp_path / "results" / "long" / JOURNAL, time.monotonic() + WAIT
    while not (journal.exists() and journal.read_text().count('"event": "report"') >= 5):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"it did not begin: {process.communicate()}")
        time.sleep(0.1)
    return process, journal.parent


def completes(folder):
    """A study that was cut off goes on to its end."""
    done = subprocess.run([MEBM, "resume", str(folder)], capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 0, done.stderr
    ledger = Ledger(folder, "long", writable=False)
    assert [trial["outcome"] for trial in ledger.trials.values()] == ["completed"] * 3
    assert [len(ledger.rows(name)) for name in ledger.trials] == [41] * 3
    return ledger


needs_ray = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(2400)]


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_ray)])
def test_a_terminal_that_closes_leaves_a_study_that_goes_on(tmp_path, mark):
    process, folder = begin(tmp_path)
    os.killpg(process.pid, signal.SIGHUP)  # to every process of the terminal, Ray's too
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 130, err
    assert f"continue with: mebm resume {folder}" in out
    assert "Traceback" not in err
    completes(folder)


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_ray)])
def test_under_nohup_a_hang_up_is_none(tmp_path, mark):
    process, folder = begin(tmp_path, prefix=("nohup",))
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert {t["outcome"] for t in Ledger(folder, "long", writable=False).trials.values()} == {"completed"}


@pytest.mark.parametrize("count", [pytest.param(2, marks=needs_ray), pytest.param(4, marks=needs_ray)])
def test_ctrl_c_again_and_again_leaves_a_study_that_goes_on(tmp_path, count):
    process, folder = begin(tmp_path)
    for _ in range(count):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.2)
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    completes(folder)


@pytest.mark.parametrize("how", [pytest.param("moved", marks=needs_ray), pytest.param("removed", marks=needs_ray)])
def test_a_folder_that_goes_ends_the_study(tmp_path, how):
    process, folder = begin(tmp_path)
    if how == "moved":
        folder.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert "was moved or removed while the study ran" in err
    assert not (folder / "study.yaml").exists()
    if how == "moved":
        completes(tmp_path / "elsewhere")
