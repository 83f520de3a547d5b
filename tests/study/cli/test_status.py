"""`mebm status`: what the files of a study's folder tell, also to another machine and while they are written."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from analysis.results.parquet import write_parquet
from study.cli import scaling, study_view
from study.cli.study_view import StudyView
from study.config.errors import UserError
from study.config.load import validate_study
from study.record import state as state_module
from study.record.folder import create_folder, driver_lock, load_folder, lock_held
from study.record.journal import encode
from study.record.journal_reader import JournalReader
from study.record.ledger import Ledger
from study.record.manifest import write_manifest
from trainables.methods.presets import build_trial
from trainables.results.layout import JOURNAL
from trainables.results.schema import TRIAL_COLUMNS, Outcome

CONFIG = build_trial({"dataset": "digits", "epochs": 2})
HERE, ELSEWHERE = socket.gethostname(), "another-machine.example"


def row(epoch, gap=0.5):
    return {
        "epoch": epoch,
        "iteration": 10 * epoch,
        "train_seconds": 1.0,
        "evaluation_seconds": 0.5,
        "energy_gap": gap,
    }


def state(outcome="running", **values):
    return {
        "outcome": outcome, "cause": None, "iteration": None, "message": None, "epochs_done": 1, "iterations_done": 12,
        "iterations_planned": 24, "train_seconds": 1800.0, "evaluation_seconds": 0.0, **values,
    }  # fmt: skip


DIVERGED = state("diverged", cause="energy_gap", iteration=7, saved_seconds=900.0)


@pytest.fixture
def folder(tiny, tmp_path):
    """The folder of a study of eight trials that has not begun."""
    return create_folder(validate_study(tiny, "tiny"), tmp_path)


@pytest.fixture
def ledger(folder):
    """What a driver on this machine writes with."""
    writer = Ledger(folder, "tiny")
    writer.run({"host": HERE, "config": load_folder(folder).model_dump(mode="json")})
    yield writer
    writer.close()


def two_trials(ledger, gpus=0.0):
    """One runs, one has diverged."""
    for trial_id in ("t0001", "t0002"):
        ledger.start(trial_id, CONFIG, "abcd", gpus)
    ledger.report("t0001", row(1, gap=-0.75), state())
    ledger.report("t0002", None, DIVERGED)


def written_before(folder, seconds, host):
    """The journal of a driver whose last event is so many seconds old."""
    now, at = time.time(), "2026-01-01T00:00:00Z"
    columns = {"study": "tiny", "trial_id": "t0001", "setting_id": "a", "seed": 0, **CONFIG.setting(), "gpus": 0.0}
    events = [
        {"event": "run", "at": at, "host": host, "t": now - seconds - 100},
        {"event": "start", "trial_id": "t0001", "attempt": 1, "at": at, "setting": 0, "columns": columns,
         "t": now - seconds},
    ]  # fmt: skip
    (folder / JOURNAL).write_bytes(b"".join(encode(e) for e in events))


def inventory(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_ctime_ns, p.stat().st_size) for p in folder.rglob("*")}


def turns(monkeypatch, *steps):
    """What happens while the watching sleeps; after the last step it is woken no more."""
    left = list(steps)

    def sleep(_seconds):
        assert left, "it should have ended by now"
        left.pop(0)()

    monkeypatch.setattr(time, "sleep", sleep)
    return left


# ------------------------------------------------------------------------------------------------------- once


def test_a_study_at_work_is_running_and_its_hours_are_told_by_kind(folder, ledger, mebm):
    with driver_lock(folder):
        two_trials(ledger)
        before = inventory(folder)
        code, out, err = mebm("status", folder)
        shown = json.loads(mebm("status", folder, "--json")[1])
        assert inventory(folder) == before
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["trial", "t0001", "t0002"]
    assert "-0.75" in lines[1]
    assert "diverged at iteration 7: energy gap ran away" in lines[2]
    assert re.match(
        r"tiny: 1/8 trials over \(1 running, 1 diverged, 6 pending\); running \(last event \d+s ago\)", lines[3]
    )
    assert lines[4:] == ["trial-hours: 0.5 open, 0.5 diverged; 0.2 saved by early stop"]
    assert (shown["running"], shown["finished"], shown["planned"]) == (True, 1, 8)
    assert shown["hours"]["unit"] == "trial-hours"
    assert (shown["hours"]["diverged"], shown["hours"]["open"]) == (0.5, 0.5)
    assert shown["hours"]["saved_by_early_stop"] == 0.25
    assert shown["last_event_at"].startswith("20")


def test_a_killed_driver_of_this_machine_is_known_to_be_gone(folder, ledger, mebm):
    two_trials(ledger, gpus=0.5)
    code, out, _ = mebm("status", folder)
    assert code == 0
    assert f"(1 diverged, 1 interrupted, 6 pending); not running; mebm resume {folder}" in out
    assert "left" not in out
    shown = json.loads(mebm("status", folder, "--json")[1])
    assert shown["running"] is False
    assert shown["seconds_left"] is None
    assert shown["hours"]["unit"] == "GPU-hours"
    assert (shown["hours"]["diverged"], shown["hours"]["open"]) == (0.25, 0.25)


def test_a_driver_elsewhere_runs_while_it_gives_signs_of_life_and_then_nobody_knows(folder, mebm):
    written_before(folder, 30, ELSEWHERE)
    assert re.search(r"1 running, 7 pending\); running \(last event 3\ds ago\)", mebm("status", folder)[1])
    written_before(folder, 3 * 3600, ELSEWHERE)
    out = mebm("status", folder)[1]
    assert "1 running, 7 pending); no sign of life for 3h 00m (last event 20" in out
    assert f"on {ELSEWHERE}; whether it runs cannot be seen from here)" in out
    shown = json.loads(mebm("status", folder, "--json")[1])
    assert shown["running"] is None
    assert shown["outcomes"]["running"] == 1  # not called interrupted: nobody saw that
    written_before(folder, 3 * 3600, HERE)
    assert "1 interrupted, 7 pending); not running; mebm resume" in mebm("status", folder)[1]


def test_a_quiet_driver_of_this_machine_runs_as_long_as_it_holds_its_lock(folder, mebm):
    written_before(folder, 3 * 3600, HERE)
    with driver_lock(folder):
        assert "running (last event 3h 00m ago)" in mebm("status", folder)[1]


def test_a_study_that_has_not_begun(folder, mebm):
    code, out, _ = mebm("status", folder)
    assert code == 0
    assert out.splitlines()[-1] == f"tiny: 0/8 trials over (8 pending); not running; mebm resume {folder}"
    assert json.loads(mebm("status", folder, "--json")[1])["last_event_at"] is None


def test_looking_at_a_lock_takes_it_from_nobody(folder):
    (folder / ".driver.lock").unlink()
    assert lock_held(folder) is False
    assert not (folder / ".driver.lock").exists()
    with driver_lock(folder):
        assert lock_held(folder) is True
        assert lock_held(folder) is True
    assert not lock_held(folder)
    with driver_lock(folder):
        pass


# ---------------------------------------------------------------------------------------------- reading on


def test_a_growing_journal_is_read_once_and_half_a_line_is_left_for_later(folder, ledger, monkeypatch):
    decoded = []
    decode = state_module.decode
    monkeypatch.setattr(state_module, "decode", lambda line, *old: (decoded.append(line), decode(line, *old))[1])
    ledger.start("t0001", CONFIG, "abcd", 0.0)
    reader = JournalReader(folder, "tiny")
    assert len(decoded) == reader.events == 2
    assert reader.read_on() == []
    ledger.report("t0001", row(1, gap=0.25), state())
    assert reader.read_on() == []
    assert reader.gaps == {"t0001": 0.25}
    event = {"event": "report", "trial_id": "t0001", "row": None, "trial": DIVERGED, "node": None, "t": 2e9}
    line = encode(event, ledger.mark)
    with (folder / JOURNAL).open("ab") as file:
        file.write(line[:40])
        file.flush()
        assert reader.read_on() == []
        assert reader.trials["t0001"]["outcome"] == "running"
        file.write(line[40:])
    assert reader.read_on() == ["t0001"]
    assert reader.read_on() == []
    assert len(decoded) == reader.events == 4  # every line once
    whole = Ledger(folder, "tiny", writable=False)
    assert (reader.trials, reader.attempts) == (whole.trials, whole.attempts)
    assert reader.rows("t0001") == whole.rows("t0001")


def test_a_journal_that_comes_late_or_is_put_back_from_a_copy(folder):
    reader = JournalReader(folder, "tiny")
    assert reader.read_on() == []
    writer = Ledger(folder, "tiny")
    writer.run({"host": HERE})
    two_trials(writer)
    writer.close()
    assert reader.read_on() == ["t0002"]
    assert (reader.host, reader.at_once, reader.done_before) == (HERE, 2, 0)
    short = b"".join((folder / JOURNAL).read_bytes().splitlines(keepends=True)[:2])
    (folder / "copy").write_bytes(short)
    (folder / "copy").replace(folder / JOURNAL)
    assert reader.read_on() == []
    assert list(reader.trials) == ["t0001"]
    assert reader.events == 2


def test_a_line_that_stays_unreadable_is_damage_and_one_that_comes_late_is_not(folder, ledger):
    reader = JournalReader(folder, "tiny")
    two_trials(ledger)
    raw = (folder / JOURNAL).read_bytes()
    last = raw.rindex(b"\n", 0, -1) + 1
    with (folder / JOURNAL).open("r+b") as file:  # a page whose content has not come yet, as network file systems show
        file.seek(last)
        file.write(b"\0" * (len(raw) - last - 1))
    assert reader.read_on() == []
    with (folder / JOURNAL).open("r+b") as file:
        file.seek(last)
        file.write(raw[last:])
    assert reader.read_on() == ["t0002"]
    assert reader.trials == Ledger(folder, "tiny", writable=False).trials
    with (folder / JOURNAL).open("ab") as file:
        file.write(b"not an event\n")
    for _ in range(2):
        assert reader.read_on() == []
    with pytest.raises(UserError, match=r"ledger\.jsonl: line 6 is damaged"):
        reader.read_on()


def test_files_that_are_gone_for_a_moment_change_nothing_that_was_known(folder, ledger):
    two_trials(ledger)
    view = StudyView(folder)
    away = {name: folder.with_name(f"{name}.away") for name in (JOURNAL, "study.yaml")}
    for name, path in away.items():
        (folder / name).rename(path)
    assert view.refresh() == []
    assert "the journal cannot be read now: No such file or directory" in view.state()
    assert view.progress.counts()[Outcome.DIVERGED] == 1
    assert view.progress.planned == 8
    for name, path in away.items():
        path.rename(folder / name)
    ledger.report("t0001", None, state("completed"))
    assert [t["trial_id"] for t in view.refresh()] == ["t0001"]
    assert "cannot be read" not in view.state()


def test_a_study_that_grows_is_planned_anew(folder, ledger, tiny):
    view = StudyView(folder)
    assert view.progress.planned == 8
    (folder / "study.yaml").write_text("half of", encoding="utf-8")
    view.refresh()
    assert view.progress.planned == 8
    tiny["seeds"] = [0, 1, 2]
    (folder / "study.yaml").write_text(validate_study(tiny, "tiny").to_yaml(), encoding="utf-8")
    view.refresh()
    assert (view.progress.planned, view.progress.seeds) == (12, 3)


def test_the_pace_is_that_of_this_run(folder):
    now = time.time()
    ledger = Ledger(folder, "tiny")
    ledger.run({"host": ELSEWHERE})
    two_trials(ledger)
    ledger.run({"host": ELSEWHERE})
    for trial_id in ("t0003", "t0004"):
        ledger.start(trial_id, CONFIG, "abcd", 0.0)
    finish(ledger, "t0003", "t0004")
    ledger.close()
    view = StudyView(folder)
    assert (view.progress.done, view.progress.done_before) == (3, 1)
    assert view.reader.began >= now
    view.progress.started -= 100.0
    assert re.fullmatch(r"about \d+m \d\ds left \(from 2 trials at 2 at once\)", str(view.progress.left()))


# ------------------------------------------------------------------------------------------------------- watching


def finish(ledger, *trials):
    for trial_id in trials:
        if ledger.outcome(trial_id) is None:
            ledger.start(trial_id, CONFIG, "abcd", 0.0)
        ledger.report(trial_id, None, state("completed"))


def test_without_a_terminal_a_line_says_what_changed_and_nothing_where_nothing_did(folder, ledger, mebm, monkeypatch):
    left = turns(
        monkeypatch,
        lambda: None,
        lambda: two_trials(ledger),
        lambda: ledger.report("t0001", row(2), state()),
        lambda: ledger.alive(),
        lambda: finish(ledger, "t0001", *(f"t{i:04d}" for i in range(3, 9))),
    )
    with driver_lock(folder):
        code, out, err = mebm("status", folder, "--watch", "7")
    assert (code, err, left) == (0, "", [])
    lines = out.splitlines()
    assert [line.partition(":")[2].partition(";")[0].strip() for line in lines] == [
        "0/8 trials: 8 pending",
        "1/8 trials: 1 running, 1 diverged, 6 pending",
        "8/8 trials: 7 completed, 1 diverged",
    ]
    assert "trial-hours: 0.5 open, 0.5 diverged; 0.2 saved by early stop; running (last event" in lines[1]
    assert lines[2].endswith("; complete")
    assert "\x1b" not in out


def test_watching_ends_when_the_driver_of_this_machine_is_gone(folder, ledger, mebm, monkeypatch):
    two_trials(ledger)
    turns(monkeypatch)
    code, out, _ = mebm("status", "--watch", folder)  # the value of --watch may be left out here too
    assert code == 0
    assert out.endswith(f"not running; mebm resume {folder}\n")


def test_watching_a_study_elsewhere_ends_when_its_budget_was_spent_and_not_when_it_is_quiet(folder, mebm, monkeypatch):
    written_before(folder, 3600, ELSEWHERE)

    def end():
        with (folder / JOURNAL).open("ab") as file:
            event = {"event": "end", "trial_id": "t0001", "outcome": "stopped", "message": "spent", "at": "-"}
            file.write(encode(event | {"t": time.time()}))

    monkeypatch.setattr(study_view, "_LIFE_SECONDS", 0.0)
    left = turns(monkeypatch, lambda: None, lambda: None, end)
    monkeypatch.setattr(study_view, "_FRESH_SECONDS", 0.0)
    code, out, _ = mebm("status", folder, "--watch")
    assert (code, left) == (0, [])
    assert [line.partition(";")[0] for line in out.splitlines()] == [
        "tiny: 0/8 trials: 1 running, 7 pending",
        "tiny: 1/8 trials: 1 stopped, 7 pending",
    ]


def test_an_event_seen_coming_is_a_sign_of_life_whatever_the_clocks_say(folder):
    written_before(folder, 3 * 3600, ELSEWHERE)
    view = StudyView(folder)
    assert view.running is None
    with (folder / JOURNAL).open("ab") as file:  # of a machine whose clock is three hours late
        file.write(encode({"event": "alive", "at": "-", "t": time.time() - 3 * 3600}))
    view.refresh()
    assert view.running is True
    assert re.match(r"running \(last event \ds ago\)", view.state())


def test_watching_as_json_is_an_object_per_change(folder, ledger, mebm, monkeypatch):
    turns(
        monkeypatch, lambda: two_trials(ledger), lambda: finish(ledger, *(f"t{i:04d}" for i in range(1, 9) if i != 2))
    )
    with driver_lock(folder):
        code, out, _ = mebm("status", folder, "--json", "--watch")
    assert code == 0
    assert [json.loads(line)["finished"] for line in out.splitlines()] == [0, 1, 8]


@pytest.mark.parametrize("value", ["0", "nan", "inf"])
def test_a_time_that_is_none_is_a_mistake(folder, mebm, value):
    code, out, err = mebm("status", folder, f"--watch={value}")
    assert (code, out) == (2, "")
    assert "--watch" in err
    assert err.count("\n") == 1


@contextmanager
def on_a_terminal(*arguments, **environment):
    """`mebm` on a pseudo-terminal of 80 columns; gives the process and a function that reads until a text comes."""
    master, slave = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color", **environment},
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    seen = bytearray()

    def read(wanted=None):
        until = time.monotonic() + 120
        while wanted is None or wanted.encode() not in seen:
            assert time.monotonic() < until, seen.decode(errors="replace")
            if not select.select([master], [], [], 1.0)[0]:
                continue
            try:
                part = os.read(master, 65536)
            except OSError:  # the process has closed its end
                break
            if not part:
                break
            seen.extend(part)
        return seen.decode()

    try:
        yield process, read, lambda text: os.write(master, text)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        os.close(master)


def test_on_a_terminal_the_table_lives_until_ctrl_c(folder, ledger):
    two_trials(ledger)
    before = inventory(folder)
    with (
        driver_lock(folder),
        on_a_terminal("status", folder, "--watch", "0.2", NO_COLOR="1") as (process, read, write),
    ):
        read("running (last event")
        ledger.start("t0003", CONFIG, "abcd", 0.0)
        ledger.report("t0003", None, state("failed", message="ValueError: no such thing"))
        read("t0003 failed: ValueError: no such thing  K=5 p0=gaussian seed=0")
        write(b"\x03")
        text = read()
        assert process.wait(timeout=60) == 130
    assert text.rstrip().endswith("mebm: interrupted")
    assert "Traceback" not in text
    assert not re.search(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7])(?:;[0-9;]*)?m", text)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back
    rows = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", text)]
    assert max(len(r) for r in rows if re.match(r"t000\d|trial", r)) <= 80
    assert set(folder.iterdir()) == {p for p in before if p.parent == folder} | {folder / ".driver.lock"}


BAD_END = state("diverged", cause="energy_gap", iteration=7)


def begun(values, tmp_path):
    """A study, its folder, and what a driver writes with."""
    study = validate_study(values, "s")
    folder = create_folder(study, tmp_path)
    writer = Ledger(folder, study.name)
    writer.run({"host": HERE, "config": study.model_dump(mode="json")})
    return study, folder, writer


def start(study, writer, trial_id, setting, seed, **more):
    point = dict(study.space.start[setting])
    writer.start(trial_id, study.space.built_in(point, seed), f"{setting:04d}", 0.0, setting, more)


def counted(study, folder, writer, *, again=False):
    write_manifest(folder, study, next(iter(writer.trials.values())))
    writer.snapshot(force=True)
    return scaling._finished(study, folder, again=again)


def test_a_study_is_complete_when_its_rescues_are_over(tiny, tmp_path, mebm):
    rescue = {"change": {"sampling_steps": "x2", "seed": "new"}, "most": 1}
    study, folder, writer = begun(tiny | {"rescue": rescue}, tmp_path)
    for number in range(8):
        start(study, writer, f"t{number + 1:04d}", number // 2, number % 2)
        writer.report(f"t{number + 1:04d}", None, BAD_END if number < 2 else state("completed"))
    again = f"not running; mebm resume {folder}\n"
    out = mebm("status", folder)[1]
    assert "8/8 trials over (6 completed, 2 diverged, 2 to be rescued); " in out and again in out
    assert counted(study, folder, writer) == (6, 0)
    start(study, writer, "t0001r1", 0, 0, rescue=1, rescue_of="t0001")
    writer.report("t0001r1", None, BAD_END)  # the last that is allowed
    start(study, writer, "t0002r1", 0, 1, rescue=1, rescue_of="t0002")
    writer.end("t0002r1", Outcome.STOPPED, "budget.hours")
    out = mebm("status", folder)[1]
    assert "2 rescues (0 completed), 1 to be rescued); " in out and again in out
    assert [counted(study, folder, writer, again=other) for other in (False, True)] == [(8, 0), (7, 0)]
    writer.end("t0002r1", Outcome.INTERRUPTED, None)
    assert again in mebm("status", folder)[1]
    assert counted(study, folder, writer) == (7, 0)
    start(study, writer, "t0002r1", 0, 1, rescue=1, rescue_of="t0002")
    writer.report("t0002r1", None, state("completed"))
    assert "8/8 trials over (6 completed, 2 diverged, 2 rescues (1 completed)); complete" in mebm("status", folder)[1]
    assert counted(study, folder, writer) == (8, 0)
    writer.close()


def test_seeds_that_were_given_up_are_not_waited_for(tiny, tmp_path, mebm):
    values = tiny | {
        "seeds": list(range(10)),
        "search": {"sampler": "grid", "grid": [{"sampling_steps": [1, 2]}]},
        "pruning": {"seeds": "wilcoxon"},
    }
    study, folder, writer = begun(values, tmp_path)
    metric = f"{study.pruning_metric}_best"
    for setting in range(2):
        for seed in range(10 - 2 * setting):
            trial_id = f"t{10 * setting + seed + 1:04d}"
            start(study, writer, trial_id, setting, seed)
            score = 1.0 + 0.01 * seed + setting
            writer.report(trial_id, None, state("completed", **{metric: score}))
            if setting == 1 and seed == 0:
                out = mebm("status", folder)[1]
                assert "11/20 trials over (11 completed, 9 pending); not running; mebm resume" in out
    assert "18/20 trials over (18 completed, 2 seeds given up); complete" in mebm("status", folder)[1]
    found = counted(study, folder, writer)
    step = scaling.Step(1.0, study, folder, *found)
    assert found == (18, 2) and step.over and step.state == "done"
    writer.close()


def test_published_results_have_no_journal_and_are_shown_from_their_tables(mebm, tmp_path):
    published = Path(__file__).resolve().parents[3] / "results" / "published"
    code, out, _ = mebm("status", published / "digits_stability")
    assert (
        code == 0
        and "57/57 trials over (26 completed, 22 diverged, 9 collapsed); complete; there is no ledger.jsonl" in out
    )
    code, out, _ = mebm("status", published / "cifar10_gpu")
    assert code == 0 and "24/24 trials over (12 completed, 12 collapsed); complete; there is no ledger.jsonl" in out
    cut = shutil.copytree(published / "cifar10_gpu", tmp_path / "cut")
    trials = pd.read_parquet(cut / "trials.parquet")
    trials.loc[trials["outcome"] == "completed", "outcome"] = "interrupted"
    write_parquet(trials.iloc[:20], TRIAL_COLUMNS, cut / "trials.parquet")
    code, out, _ = mebm("status", cut)
    assert code == 0 and "9/24 trials over (9 collapsed, 11 interrupted, 4 pending); not running; there is no" in out
    assert "mebm resume" not in out
