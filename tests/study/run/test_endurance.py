"""Long and crowded runs: many trials in one process, several studies at once, a search that is killed again and again.

Every study is its own process, as a user starts it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from benchmarks.chaos.cluster import descendants, trains
from benchmarks.chaos.compare import compare_folders, compare_states, optuna_states
from benchmarks.chaos.driver import Journal

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(3000)]

STUDY = {
    "trial": {
        "dataset": "digits",
        "norm": "none",
        "network": "conv-4",
        "epochs": 3,
        "iterations_per_epoch": 5,
        "evaluation": {"every": 3, "fresh_steps": 2},
        "batch_size": 16,
        "buffer_size": 100,
        "device": "cpu",
    },
    "run": {"checkpoint_seconds": 0},
}
GRID = {"sampler": "grid", "grid": [{"initial": "gaussian", "sampling_steps": [1, 2, 3]}]}
PATIENCE = 900
"""Seconds a study may take before it is held to be stuck."""


def config(folder: Path, name: str, **parts: object) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({**STUDY, "name": name, **parts}), encoding="utf-8")
    return path


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    with (folder / "output.log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def said(folder: Path) -> str:
    return (folder / "output.log").read_text(encoding="utf-8")[-3000:]


def below(pid: int) -> dict[int, str]:
    """Processes below one, with their titles."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    return {child: titles[child] for child in descendants(parents, pid) if child in titles}


def footprint(pid: int) -> tuple[float, int]:
    """Resident memory in MB, and open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(resident.split()[1]) / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_two_hundred_trials_keep_no_memory_and_no_files(tmp_path: Path) -> None:
    """The driver, and the worker that trains one trial after another, hold in the last quarter what they held before."""
    path = config(
        tmp_path,
        "many",
        search={"sampler": "random", "trials": 200, "space": {"step_size": {"low": 0.1, "high": 1.0}}},
    )
    process = start(tmp_path, "sweep", path, "--results", tmp_path)
    folder, seen = tmp_path / "many", []
    until = time.monotonic() + PATIENCE
    try:
        while process.poll() is None:
            assert time.monotonic() < until, said(tmp_path)
            journal = folder / "ledger.jsonl"
            started = journal.read_bytes().count(b'{"event": "start"') if journal.is_file() else 0
            workers = [pid for pid, title in below(process.pid).items() if trains(title)]
            with suppress(OSError, StopIteration):  # one of them has just ended
                largest = [max(values) for values in zip(*(footprint(pid) for pid in workers), strict=True)]
                seen.append((started, *footprint(process.pid), *largest))
            time.sleep(0.5)
    finally:
        process.kill()
    assert process.returncode == 0, said(tmp_path)
    frame = pd.DataFrame(
        [s for s in seen if len(s) == 5], columns=["trial", "driver_mb", "driver_files", "mb", "files"]
    )
    second, last = frame[frame["trial"].between(50, 100)], frame[frame["trial"] > 150]
    told = frame.iloc[:: max(1, len(frame) // 20)].to_string()
    assert len(second) > 3 and len(last) > 3
    assert last["driver_files"].max() <= second["driver_files"].max() + 5, told
    assert last["files"].max() <= second["files"].max() + 5, told
    assert last["driver_mb"].median() - second["driver_mb"].median() < 100 * 0.5  # half a MB a trial would be a leak
    assert last["mb"].median() - second["mb"].median() < 100 * 0.5
    assert len(pd.read_parquet(folder / "trials.parquet")) == 200


def test_three_studies_at_once_are_what_each_is_alone(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    names = ("one", "two", "three")
    for base in (alone, together):
        base.mkdir()
    paths = [config(tmp_path, name, search=GRID, seeds=[i, i + 10]) for i, name in enumerate(names)]
    processes = [start(together, "sweep", path, "--results", together) for path in paths]
    for process in processes:
        assert process.wait(timeout=PATIENCE) == 0, said(together)
    for path in paths:
        assert start(alone, "sweep", path, "--results", alone).wait(timeout=PATIENCE) == 0, said(alone)
    for name in names:
        assert compare_folders(alone / name, together / name) == []


def test_a_search_that_is_killed_again_and_again_asks_and_tells_every_trial_once(tmp_path: Path) -> None:
    """What TPE proposes depends on when trials end; that no trial is lost, doubled or told another value does not.

    An attempt that was cut off is FAIL in Optuna's storage, and its trial is told once, when it has ended.
    """
    rng, wanted = random.Random(5), 24
    space = {"step_size": {"low": 0.1, "high": 10.0, "log": True}, "sampling_steps": {"low": 1, "high": 3}}
    search = {"sampler": "tpe", "trials": wanted, "space": space}
    evaluation = {"every": 1, "fresh_steps": 2}
    path = config(tmp_path, "hunted", search=search, trial={**STUDY["trial"], "evaluation": evaluation})
    folder = tmp_path / "hunted"
    kills: Counter[str] = Counter()
    for _ in range(12):
        again = (folder / "study.yaml").is_file()
        process = start(tmp_path, *(("resume", folder) if again else ("sweep", path, "--results", tmp_path)))
        journal = Journal(folder)
        begun, lines = journal.lines(), rng.randint(2, 14)
        until = time.monotonic() + PATIENCE
        while process.poll() is None and journal.lines() < begun + lines:
            assert time.monotonic() < until, said(tmp_path)
            time.sleep(0.05)
        time.sleep(rng.random())
        workers = [pid for pid, title in below(process.pid).items() if trains(title)]
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        if workers and rng.random() < 0.4:
            kills["worker"] += 1
            with suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
            time.sleep(2 * rng.random())
        if process.poll() is None:
            kills[number.name] += 1
            process.send_signal(number)
        process.wait(timeout=PATIENCE)
    assert start(tmp_path, "resume", folder).wait(timeout=PATIENCE) == 0, said(tmp_path)

    assert sum(kills.values()) >= 8, kills
    trials = pd.read_parquet(folder / "trials.parquet")
    assert len(trials) == wanted and trials["trial_id"].is_unique
    assert set(trials["outcome"]) <= {"completed", "diverged", "collapsed"}
    assert compare_states(optuna_states(folder), wanted) == []
    storage = optuna.load_study(study_name="hunted", storage=f"sqlite:///{folder / 'optuna.db'}")
    told = {t.user_attrs["trial_id"]: t for t in storage.get_trials(states=(TrialState.COMPLETE,))}
    assert sorted(told) == sorted(trials["trial_id"]), "every trial is told once"
    for row in trials.to_dict("records"):
        assert told[row["trial_id"]].params == {name: row[name] for name in space}
        if row["outcome"] == "completed":
            assert told[row["trial_id"]].value == row["fd_buffer_best"]
    epochs = pd.read_parquet(folder / "epochs.parquet").groupby("trial_id")["epoch"].max()
    done = trials.set_index("trial_id")["epochs_done"]
    assert (epochs.reindex(done.index) == done).all()
