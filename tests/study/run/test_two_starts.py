"""Several starts of one study at the same instant: one of them has it, the others say so and leave everything alone."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from analysis.results.load import read_evaluations
from analysis.results.parquet import records
from study.config.errors import UserError
from study.config.load import validate_study
from study.models import evaluate as rescoring
from study.record import folder as folders
from study.record.folder import create_folder, driver_lock, lock_held, new_study
from study.record.ledger import Ledger
from study.remote.claim import process_namespace
from study.remote.mirror import Mirror
from trainables.results.files import UnsafePathError
from trainables.results.layout import JOURNAL, LOCK_FILE, STUDY_FILE
from trainables.results.schema import EVALUATION_COLUMNS
from trainables.results.store import Store

FORK = multiprocessing.get_context("fork")
RUN = {"driver": "", "config": {"seeds": [0]}}


@pytest.fixture
def study(tiny):
    return validate_study(tiny, "tiny")


def at_once(count, action, *arguments):
    """`action(number, barrier, *arguments)` in processes that begin at the same instant; what each one said."""
    barrier, said = FORK.Barrier(count), FORK.Queue()

    def one(number):
        try:
            barrier.wait(60)
            said.put((number, action(number, *arguments)))
        except UserError as error:
            said.put((number, str(error)))

    processes = [FORK.Process(target=one, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    found = dict(said.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    return [found[number] for number in range(count)]


def begin(number, study, results, *, seconds):
    """Start a study that runs for a moment."""
    with new_study(study, results) as folder:
        ledger = Ledger(folder, study.name)
        time.sleep(seconds)
        ledger.run(RUN)
        (folder / "mine").write_text(str(number))
        ledger.close()
    return "won"


def fail(number, study, results, alone):
    """Start a study that has a mistake in it; nobody else may be in the folder meanwhile."""
    with new_study(study, results) as folder:
        os.close(os.open(alone, os.O_CREAT | os.O_EXCL))
        (folder / "study.log").write_text(str(number))
        (folder / "tune" / "run-001").mkdir(parents=True)
        time.sleep(0.002 * number)
        assert (folder / "study.log").read_text() == str(number)
        assert (folder / STUDY_FILE).is_file()
        Path(alone).unlink()
        raise UserError("a mistake")


@pytest.mark.parametrize("seconds", [0, 0.2, 1])
def test_one_start_wins_and_its_folder_is_whole(study, tmp_path, seconds):
    for number in range(6):
        results = tmp_path / f"round{number}" / "deep"
        said = at_once(4, lambda n, r=results: begin(n, study, r, seconds=seconds))
        assert said.count("won") == 1, said
        folder = results / "tiny"
        for text in said:
            assert text == "won" or "another process is running this study" in text or "mebm resume" in text
        assert (folder / "mine").read_text() == str(said.index("won"))
        assert (folder / STUDY_FILE).is_file()
        assert len(Ledger(folder, "tiny", writable=False).runs) == 1


def test_starts_with_a_mistake_leave_nothing_and_are_never_together(study, tmp_path):
    for number in range(15):
        base = tmp_path / f"round{number}"
        said = at_once(4, fail, study, base / "deep", str(tmp_path / "alone"))
        assert "a mistake" in said
        assert all(text == "a mistake" or text.endswith("another process is running this study") for text in said), said
        # One whose folder another one used may leave it, empty; the corrected command takes it.
        assert not any(path.is_file() for path in base.rglob("*"))
    at_once(1, lambda n: begin(n, study, base / "deep", seconds=0))
    assert (base / "deep" / "tiny" / JOURNAL).is_file()


def test_who_comes_second_removes_nothing(study, tmp_path):
    with new_study(study, tmp_path / "results") as folder:
        (folder / "study.log").write_text("winner")
        for _ in range(3):
            with pytest.raises(UserError, match=r"tiny: another process is running this study$"):
                create_folder(study, tmp_path / "results")
        assert (folder / "study.log").read_text() == "winner"
        Ledger(folder, study.name).run(RUN)
    with pytest.raises(UserError, match="holds this study already; continue with: mebm resume"):
        create_folder(study, tmp_path / "results")
    assert (folder / "study.log").read_text() == "winner"


@pytest.mark.parametrize("left", [[], [LOCK_FILE], [LOCK_FILE, ".study.yaml.0123456789ab.part"]])
def test_a_start_that_was_killed_before_its_first_file_leaves_a_folder_to_be_taken(study, tmp_path, left):
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in left:
        (folder / name).touch()
    assert create_folder(study, tmp_path) == folder
    assert {path.name for path in folder.iterdir()} == {LOCK_FILE, STUDY_FILE}


def test_a_folder_that_was_there_stays_after_a_mistake(study, tmp_path):
    (tmp_path / "tiny").mkdir()
    with pytest.raises(ZeroDivisionError), new_study(study, tmp_path):
        raise ZeroDivisionError
    assert list((tmp_path / "tiny").iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", "data.part", ".hidden"])
def test_what_somebody_else_has_in_a_folder_stays(study, tmp_path, name):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / name).write_text("mine")
    with pytest.raises(UserError, match="exists and is not a study folder"):
        create_folder(study, tmp_path)
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == [name]


def test_a_folder_that_took_the_place_of_a_start_is_not_removed(study, tmp_path):
    with pytest.raises(UserError, match="too late"), new_study(study, tmp_path) as folder:
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        (folder / STUDY_FILE).write_text("of somebody else")
        raise UserError("too late")
    assert (folder / STUDY_FILE).read_text() == "of somebody else"
    assert (tmp_path / "moved" / STUDY_FILE).is_file()


# ------------------------------------------------------------------------------------------------------- the lock


def test_a_lock_is_not_taken_behind_a_link(study, tmp_path):
    folder, victim = create_folder(study, tmp_path / "results"), tmp_path / "victim"
    (folder / LOCK_FILE).unlink()
    for content in (None, "precious"):
        if content is not None:
            victim.write_text(content)
        (folder / LOCK_FILE).unlink(missing_ok=True)
        (folder / LOCK_FILE).symlink_to(victim)
        with pytest.raises(UnsafePathError, match="is a link"), driver_lock(folder):
            pass
        assert not lock_held(folder)
        assert victim.exists() == (content is not None)
    assert victim.read_text() == "precious"


def test_a_lock_that_is_a_pipe_keeps_nobody_waiting(study, tmp_path):
    folder = create_folder(study, tmp_path)
    (folder / LOCK_FILE).unlink()
    os.mkfifo(folder / LOCK_FILE)
    with pytest.raises(UnsafePathError, match="is not a regular file"), driver_lock(folder):
        pass
    assert not lock_held(folder)


def test_a_file_system_without_locks_is_refused_and_left_empty(study, tmp_path, monkeypatch):
    def without(_file, _how):
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.raises(UserError, match=r"cannot be locked \(Function not implemented\).*another file system"):
        create_folder(study, tmp_path / "results")
    assert not any(path.is_file() and path.name != LOCK_FILE for path in tmp_path.rglob("*"))
    assert lock_held(tmp_path / "results" / "tiny") in (None, False)


HOLD = """
import sys, time
from pathlib import Path
from study.record.folder import driver_lock
with driver_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free_and_that_of_a_removed_folder_says_so(study, tmp_path):
    folder = create_folder(study, tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process"), driver_lock(folder):
            pass
        process.kill()
        process.wait()
    with driver_lock(folder) as lock:
        assert folders._holds(lock, folder)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        assert not folders._holds(lock, folder)
        assert create_folder(study, tmp_path) == folder
        assert not folders._holds(lock, folder)


def test_looking_takes_the_lock_from_nobody_who_starts(study, tmp_path):
    folder = create_folder(study, tmp_path)
    stop = FORK.Event()

    def look():
        while not stop.is_set():
            folders.lock_held(folder)

    watcher = FORK.Process(target=look)
    watcher.start()
    try:
        for _ in range(200):
            with driver_lock(folder):
                pass
    finally:
        stop.set()
        watcher.join(60)


# --------------------------------------------------------------------------------- one store, several machines


def claim(number, url, base):
    """A driver with its own live folder, as on another machine."""
    folder = base / str(number)
    folder.mkdir(parents=True)
    (folder / STUDY_FILE).write_text(str(number))
    mirror = Mirror(folder, url)
    mirror.start()
    mirror.push(full=True)
    time.sleep(1)
    found = Store(url).read_bytes(STUDY_FILE)
    mirror.close()
    return found.decode()


def test_of_drivers_on_several_machines_one_has_the_study(tmp_path):
    for number in range(8):
        url = f"file://{tmp_path}/store{number}/tiny"
        said = at_once(4, claim, url, tmp_path / f"live{number}")
        (winner,) = [n for n, text in enumerate(said) if text == str(n)]
        others = [text for n, text in enumerate(said) if n != winner]
        assert all("another process is starting this study" in t or "runs this study" in t for t in others), said
        assert list(Store(url).list()) == [STUDY_FILE]


def test_a_bid_of_a_dead_driver_is_in_nobodys_way(tmp_path):
    url = f"file://{tmp_path}/store/tiny"
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    dead = {"host": "here", "pid": process.pid, "t": time.time(), "token": "0", "place": process_namespace()}
    Store(url).put_bytes(json.dumps(dead).encode(), ".starting-0")
    assert claim(7, url, tmp_path / "live") == "7"
    assert list(Store(url).list()) == [STUDY_FILE]


def test_what_another_driver_has_in_the_store_is_not_taken_back(tmp_path):
    url, mirrors = f"file://{tmp_path}/store/tiny", []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STUDY_FILE).write_text(name)
        mirrors.append(Mirror(tmp_path / name, url))
    first, second = mirrors
    first.start()
    first.push()
    first._release()  # as if it had been silent for too long
    second.start()
    second.push()
    first.discard()
    assert Store(url).read_bytes(STUDY_FILE) == b"second"
    second.close()


# ------------------------------------------------------------------------------------ files that several add to


def add(number, out):
    row = dict.fromkeys(column.name for column in EVALUATION_COLUMNS)
    row |= {"study": "s", "trial_id": f"t{number}", "model_digest": str(number), "protocol": "p", "metric": "fid"}
    for seed in range(5):
        rescoring._write(out, (), [row | {"seed": seed, "value": 1.0}])
    return len(rescoring._write(out, [row | {"seed": 0}], [row | {"seed": 0, "value": 2.0}]))


def test_evaluations_of_several_commands_are_all_kept(tmp_path):
    out = tmp_path / "new" / "evaluations.parquet"
    said = at_once(4, add, out)
    assert max(said) == 20
    rows = records(read_evaluations(out))
    assert {(row["trial_id"], row["seed"], row["value"]) for row in rows} == {
        (f"t{number}", seed, 2.0 if seed == 0 else 1.0) for number in range(4) for seed in range(5)
    }


# ---------------------------------------------------------------------------------------------------- the commands


def mebm_at_once(count, *arguments):
    command = [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(count)
    ]
    found = []
    for process in processes:
        out, err = process.communicate(timeout=600)
        found.append((process.returncode, out, err))
    return found


def agreed(found):
    """One of several commands did it, and the others said one line."""
    assert sorted(code for code, _, _ in found) == [0, *[2] * (len(found) - 1)], found
    for code, _, err in found:
        if code == 2:
            assert len(err.splitlines()) == 1
            assert "another process is" in err or "already" in err or "not empty" in err
    return True


@pytest.mark.slow
def test_three_trainings_at_once(tmp_path):
    short = ["--set", "epochs=2", "--set", "iterations_per_epoch=3", "--set", "batch_size=16"]
    short += ["--set", "evaluation.fresh_steps=1"]
    assert agreed(mebm_at_once(3, "train", "m-ebm", *short, "--out", tmp_path / "deep" / "one"))
    ledger = Ledger(tmp_path / "deep" / "one", "one", writable=False)
    assert ledger.trials["t0001"]["outcome"] == "completed"
    assert len(ledger.rows("t0001")) == 3


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_sweeps_at_once_then_two_that_go_on(tmp_path, tiny, write_config):
    tiny["search"]["grid"], tiny["seeds"] = [{"sampling_steps": [1]}], [0]
    config = write_config(yaml.safe_dump(tiny))
    assert agreed(mebm_at_once(3, "sweep", config, "--results", tmp_path / "results"))
    folder = tmp_path / "results" / "tiny"
    (trial,) = Ledger(folder, "tiny", writable=False).trials.values()
    assert trial["outcome"] == "completed"
    found = mebm_at_once(2, "resume", folder, "--set", "seeds=[0,1]")
    assert 0 in [code for code, _, _ in found]
    assert all(code == 0 or "another process is running this study" in err for code, _, err in found)
    trials = Ledger(folder, "tiny", writable=False).trials
    assert [trial["outcome"] for trial in trials.values()] == ["completed", "completed"]
    assert [trial["attempts"] for trial in trials.values()] == [1, 1]
