"""The chaos engine: what it decides and what it notices; then a study under kills, which must end as if undisturbed."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from optuna.trial import TrialState

from analysis.results.parquet import read_parquet, records
from benchmarks.chaos.__main__ import chaos
from benchmarks.chaos.cluster import choose, descendants, trains
from benchmarks.chaos.compare import compare_folders, compare_rows, compare_states, same
from benchmarks.chaos.driver import Journal
from benchmarks.chaos.plan import KINDS, SIGNALS, judge_exit, plan_kills
from benchmarks.chaos.result import CHAOS_COLUMNS, ChaosOptions, ChaosResult
from benchmarks.chaos.run import run_chaos
from study.config.errors import UserError

# ---------------------------------------------------------------------------------------------------- decisions


def test_the_plan_follows_from_its_seed_and_has_every_kind():
    for seed in range(20):
        plan = plan_kills(seed, len(KINDS))
        assert Counter(kill.kind for kill in plan) == dict.fromkeys(KINDS, 1)
        assert plan == plan_kills(seed, len(KINDS))
    assert plan_kills(0, 40) != plan_kills(1, 40)


def test_a_long_plan_mixes_kinds_and_moments():
    plan = plan_kills(3, 400)
    counts = Counter(kill.kind for kill in plan)
    assert set(counts) == set(KINDS)
    assert counts["worker"] == max(counts.values())
    assert all(0 <= kill.pick < 1 and kill.delay >= 0 for kill in plan)
    early = [kill for kill in plan if kill.lines == 0]
    assert {kill.kind for kill in early} == {"worker", "node", "driver"}, "a signal waits until trials run"
    assert 10 < sum(kill.lines for kill in plan) / (len(plan) - len(early)) < 30


def test_a_plan_of_some_kinds_has_no_others():
    assert {kill.kind for kill in plan_kills(0, 30, ("node", "driver"))} == {"node", "driver"}


@pytest.mark.parametrize(
    ("count", "kinds", "message"),
    [(5, KINDS, "--kills 5: must be at least 12"), (9, ("worker", "rack"), "'rack' is none of worker, node, driver")],
)
def test_a_plan_that_cannot_be_is_refused(count, kinds, message):
    with pytest.raises(UserError, match=message):
        plan_kills(0, count, kinds)


def test_a_target_is_chosen_by_share_whatever_the_order():
    assert [choose([30, 10, 20], pick) for pick in (0.0, 0.4, 0.99)] == [10, 20, 30]
    assert choose([20, 30, 10], 0.4) == 20
    assert choose([], 0.5) is None


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("ray::MebmTrainable", True),
        ("ray::MebmTrainable.train", True),
        ("ray::ResourceTrainable.save()", True),
        ("ray::IDLE", False),
        ("ray::RuntimeEnvAgent", False),
        ("python -m pytest ray::MebmTrainable", False),
    ],
)
def test_only_a_worker_with_a_trial_is_a_target(title, expected):
    assert trains(title) is expected


def test_descendants_are_all_below_and_nothing_beside():
    assert descendants({2: 1, 3: 2, 4: 3, 5: 1, 6: 6, 9: 8}, 2) == {3, 4}


@pytest.mark.parametrize(
    ("kind", "code", "complete", "wrong"),
    [
        (None, 0, False, False),
        (None, 1, False, True),
        (None, -11, True, True),
        ("driver", -9, False, False),
        ("sigterm", 130, False, False),
        ("sigterm", 1, False, True),
        ("sigusr1", -10, False, True),
        ("sigusr1", -10, True, False),
        ("sigint", 0, False, False),
        ("gcs", 1, False, False),
        ("gcs", 130, False, True),
        ("gcs", -9, False, True),
        ("stop", 0, False, False),
    ],
)
def test_a_driver_must_end_as_promised(kind, code, complete, wrong):
    assert (judge_exit(kind, code, complete) is not None) is wrong


def test_the_journal_counts_whole_lines_of_progress_and_survives_a_cut(tmp_path):
    def lines(*events, rest=""):
        text = "".join(f'{{"event": "{event}"}}\n' for event in events)
        (tmp_path / "ledger.jsonl").write_text(text + rest, encoding="utf-8")

    journal = Journal(tmp_path)
    assert journal.lines() == 0
    lines("run", "start", "report", "alive", rest='{"event": "rep')
    assert journal.lines() == 2
    lines("run", "start", "report", "alive", "report", "checkpoint", "end")
    assert journal.lines() == 4
    lines("run", "start")
    assert journal.lines() == 1


# --------------------------------------------------------------------------------------------------- comparison


def test_equal_is_exact():
    assert same(math.nan, math.nan)
    assert same(None, None)
    assert not same(math.nan, None)
    assert not same(math.nan, 0.0)
    assert not same(0.1 + 0.2, 0.3)


def test_rows_doubled_lost_new_and_changed_are_found():
    calm = [{"id": "a", "x": 1.0, "y": 1, "clock": 1}, {"id": "b", "x": 2.0, "y": 2, "clock": 1}]
    assert compare_rows("row", calm, [{**row, "clock": 7} for row in calm], ["id"], ignored=["clock"]) == []
    wild = [{"id": "a", "x": 1.5, "y": 3, "clock": 1}, {"id": "c"}, {"id": "c"}]
    assert compare_rows("row", calm, wild, ["id"], ignored=["clock"]) == [
        "row a: x 1.0 calmly, 1.5 here (and 1 more columns)",
        "row b: lost",
        "row c: 2 times",
        "row c: not in the calm run",
    ]


def test_states_of_optuna_are_judged():
    assert compare_states({"COMPLETE": 16, "FAIL": 9}, 16) == []
    assert compare_states({"COMPLETE": 15, "RUNNING": 1}, 16) == [
        "Optuna: 1 trials left RUNNING",
        "Optuna: 15 trials COMPLETE, but 16 trials were run",
    ]
    assert compare_states({"COMPLETE": 16, "WAITING": 2}, 16) == ["Optuna: 2 trials left WAITING"]


TRIALS = [
    {"trial_id": "t0001", "setting_id": "k1", "seed": 0, "outcome": "completed", "cause": None, "iteration": None},
    {"trial_id": "t0002", "setting_id": "k2", "seed": 0, "outcome": "diverged", "cause": "loss_limit", "iteration": 7},
]
QUALITY = {"fd_buffer_last": 1.25, "attempts": 1, "seconds": 3.0}
EPOCHS = [
    {"trial_id": t, "epoch": e, "loss": 0.5 * e, "seconds": 1.0, "attempt": 1}
    for t, e in (("t0001", 0), ("t0001", 1), ("t0002", 0))
]


def write_study(folder: Path, *, trials=None, epochs=EPOCHS, rename=None, signal=0.5, running=False):
    """A folder with the files that are compared."""
    rename = rename or {}
    ids = {t["trial_id"]: rename.get(t["trial_id"], t["trial_id"]) for t in TRIALS}
    for name in ("signals", "models"):
        (folder / name).mkdir(parents=True)
    rows = [{**QUALITY, **t, "trial_id": ids[t["trial_id"]]} for t in (TRIALS if trials is None else trials)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "trials.parquet")
    rows = [{**e, "trial_id": ids[e["trial_id"]]} for e in epochs]
    pq.write_table(pa.Table.from_pylist(rows), folder / "epochs.parquet")
    for trial in ids.values():
        values = [{"trial_id": trial, "iteration": i, "energy_gap": v} for i, v in enumerate((signal, math.nan))]
        pq.write_table(pa.Table.from_pylist(values), folder / "signals" / f"{trial}.parquet")
    (folder / "models" / f"{ids['t0001']}_best.pt").touch()
    study = optuna.create_study(study_name=folder.name, storage=f"sqlite:///{folder / 'optuna.db'}")
    for _ in TRIALS:
        study.add_trial(optuna.trial.create_trial(value=1.0, state=TrialState.COMPLETE))
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
    if running:
        study.ask()
    return folder


@pytest.fixture(scope="module")
def calm_files(tmp_path_factory):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return write_study(tmp_path_factory.mktemp("calm") / "chaos")


def wild(tmp_path, **changes):
    return write_study(tmp_path / "chaos", **changes)


def test_equal_folders_are_equal_whatever_their_clocks(calm_files, tmp_path):
    trials = [{**t, "attempts": 9, "seconds": 99.0} for t in TRIALS]
    epochs = [{**e, "attempt": 9, "seconds": 99.0} for e in EPOCHS]
    assert compare_folders(calm_files, wild(tmp_path, trials=trials, epochs=epochs)) == []


def test_a_trial_is_known_by_its_setting_and_seed(calm_files, tmp_path):
    assert compare_folders(calm_files, wild(tmp_path, rename={"t0001": "t0002", "t0002": "t0001"})) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epochs": EPOCHS[:1] + EPOCHS[2:]}, ["epoch t0001/1: lost"]),
        ({"epochs": [*EPOCHS, EPOCHS[1]]}, ["epoch t0001/1: 2 times"]),
        ({"epochs": [*EPOCHS, {**EPOCHS[2], "epoch": 1}]}, ["epoch t0002/1: not in the calm run"]),
        (
            {"epochs": [EPOCHS[0], {**EPOCHS[1], "loss": 0.5 + 1e-12}, EPOCHS[2]]},
            ["epoch t0001/1: loss 0.5 calmly, 0.500000000001 here"],
        ),
        ({"trials": TRIALS[:1]}, ["trial k2/0: lost"]),
        ({"trials": [*TRIALS, TRIALS[0]]}, ["trial k1/0: 2 times"]),
        (
            {"trials": [TRIALS[0], {**TRIALS[1], "iteration": 8}]},
            ["trial k2/0: iteration 7 calmly, 8 here"],
        ),
        (
            {"trials": [{**TRIALS[0], "outcome": "failed"}, TRIALS[1]]},
            ["trial k1/0: outcome 'completed' calmly, 'failed' here"],
        ),
        (
            {"trials": [{**TRIALS[0], "fd_buffer_last": 1.5}, TRIALS[1]]},
            ["trial k1/0: fd_buffer_last 1.25 calmly, 1.5 here"],
        ),
        (
            {"signal": 0.25},
            ["signal t0001/0: energy_gap 0.5 calmly, 0.25 here", "signal t0002/0: energy_gap 0.5 calmly, 0.25 here"],
        ),
        ({"running": True}, ["Optuna: 1 trials left RUNNING"]),
    ],
)  # fmt: skip
def test_every_difference_of_two_folders_is_found(calm_files, tmp_path, changes, expected):
    assert compare_folders(calm_files, wild(tmp_path, **changes)) == expected


def test_files_that_are_missing_are_found(calm_files, tmp_path):
    folder = wild(tmp_path)
    (folder / "signals" / "t0002.parquet").unlink()
    (folder / "models" / "t0001_best.pt").rename(folder / "models" / "t0001.pt")
    (folder / "optuna.db").unlink()
    assert compare_folders(calm_files, folder) == [
        "signals: t0002 is missing",
        "models: t0001_best is missing",
        "models: t0001 is not in the calm run",
        "Optuna: 0 trials COMPLETE, but 2 trials were run",
    ]
    shutil.rmtree(folder)
    assert "trial k1/0: lost" in compare_folders(calm_files, folder)


def test_the_report_gives_shares_and_a_row_per_kind():
    result = ChaosResult(seed=4, trials=16, nodes=3, rounds=2, attempts=40, resumes=5)
    result.kills = [{"kind": k, "recovery_seconds": s} for k, s in (("node", 9.0), ("worker", 2.0), ("worker", 4.0))]
    result.counted_seconds, result.replayed_seconds, result.lost_seconds = 60.0, 30.0, 10.0
    result.calm_wall_seconds, result.chaos_wall_seconds = 20.0, 100.0
    shown = json.loads(json.dumps(result.to_dict()))
    assert (shown["replayed_share"], shown["lost_share"], shown["wall_ratio"]) == (0.3, 0.1, 2.5)
    assert shown["by_kind"] == {"worker": 2, "node": 1}
    assert [(r["kind"], r["kills"], r["recovery_seconds"]) for r in result.rows()] == [
        ("worker", 2, 3.0),
        ("node", 1, 9.0),
    ]
    assert result.lines()[-1] == "every round ended equal to the calm run"
    result.differences = [f"round-1: epoch t0001/{n}: lost" for n in range(25)]
    assert not result.equal
    assert result.lines()[-1] == "  and 5 more"


def test_a_url_is_no_folder_on_this_machine(tmp_path, run_mebm, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_mebm("--out", "s3://bucket/there", command=chaos)
    assert (code, error.count("\n")) == (2, 1)
    assert "'--out': a path on this machine is needed" in error
    assert not list(tmp_path.iterdir())


def test_fewer_kills_than_kinds_are_of_the_first_kinds(tmp_path, run_mebm, monkeypatch):
    asked = []

    def run(options, out, say):
        asked.append(options)
        return ChaosResult(0, 4, 3)

    monkeypatch.setattr("benchmarks.chaos.__main__.run_chaos", run)
    for kills in ("10", "100"):
        assert run_mebm("--kills", kills, "--out", tmp_path / "new", command=chaos)[0] == 0
    assert [options.kinds for options in asked] == [KINDS[:10], KINDS]


def test_a_folder_in_use_is_refused(tmp_path, run_mebm):
    (tmp_path / "something").touch()
    code, _, error = run_mebm("--kills", 20, "--out", tmp_path, command=chaos)
    assert code == 2
    assert f"{tmp_path}: holds something already" in error
    code, _, error = run_mebm("--kills", 2, "--kinds", ",".join(KINDS), "--out", tmp_path / "new", command=chaos)
    assert code == 2
    assert "--kills 2: must be at least 12" in error
    assert not (tmp_path / "new").exists()


# -------------------------------------------------------------------------------------------------- the real run


def left_over(marker: str) -> list[str]:
    """Command lines of processes that were started by the run, which all inherit the marker, and still live."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if marker.encode() in (entry / "environ").read_bytes() and b"Z" not in state(entry):
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue
    return found


def state(entry: Path) -> bytes:
    return (entry / "stat").read_bytes().rpartition(b")")[2].split()[0]


def gone(marker: str) -> list[str]:
    """What is left of the run after a while; a killed process needs a moment."""
    until = time.monotonic() + 20
    while (left := left_over(marker)) and time.monotonic() < until:
        time.sleep(0.1)
    return left


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_study_under_kills_ends_equal_to_a_calm_one(tmp_path, monkeypatch):
    marker = f"MEBM_CHAOS_MARKER={tmp_path}"
    monkeypatch.setenv(*marker.split("=", 1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # must not keep the nodes from having logical GPUs
    options = ChaosOptions(kills=10, seed=3, trials=16, epochs=8, kinds=("worker", "node", "driver", "sigusr1"))
    told: list[str] = []
    try:
        result = run_chaos(options, tmp_path / "out", told.append)
    finally:
        assert gone(marker) == []
    assert result.differences == [], "\n".join(told)
    assert len(result.kills) == 10
    assert set(result.by_kind) == set(options.kinds)
    assert (
        result.resumes >= sum(n for kind, n in result.by_kind.items() if kind in ("driver", *SIGNALS)) - result.rounds
    )
    assert result.attempts > 16 * result.rounds, "no kill hit a trial"
    rows = records(read_parquet(tmp_path / "out" / "chaos.parquet", CHAOS_COLUMNS))
    assert {row["kind"]: row["kills"] for row in rows} == result.by_kind
    assert all(row["equal"] for row in rows)
    written = json.loads((tmp_path / "out" / "chaos.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result.to_dict()))
    # The comparison sees what it compares: the calm run has verdicts and finished trials, and every epoch.
    calm = tmp_path / "out" / "calm" / "chaos"
    outcomes = Counter(row["outcome"] for row in pq.read_table(calm / "trials.parquet").to_pylist())
    assert outcomes == {"completed": 12, "diverged": 4}
    assert pq.read_table(calm / "epochs.parquet").num_rows > 12 * 8


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
def test_an_aborted_run_leaves_no_process_behind(tmp_path):
    """The whole command is asked to end while its study runs."""
    marker = f"MEBM_CHAOS_MARKER={tmp_path}"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.chaos", "--kills", "20", "--out", str(tmp_path / "out")],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MEBM_CHAOS_MARKER": str(tmp_path)},
    )
    journal = Journal(tmp_path / "out" / "calm" / "chaos")
    try:
        until = time.monotonic() + 180
        while journal.lines() < 5 and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
        assert journal.lines() >= 5
        assert len(left_over(marker)) > 3
        process.terminate()
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130, error
        assert gone(marker) == []
    finally:
        process.kill()
        process.wait()
