"""Studies of training scripts through `mebm sweep`: real scripts, real processes, a real Ray."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.ray

SCRIPTS = Path(__file__).parent / "scripts"
MEBM = Path(sys.executable).with_name("mebm")
CLOCKS = {"seconds", "attempt", "reported_at", "train_seconds", "evaluation_seconds", "seconds_per_iteration", "started_at", "ended_at",
          "setup_seconds", "saved_seconds", "attempts", "replayed_seconds", "lost_seconds", "study", "message"}  # fmt: skip
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def sweep(ray_cluster: None, run_mebm: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`mebm sweep` in this process, in its own folder; the result's folder is its first answer."""

    def call(*words: object, study: str = "study") -> Any:
        base = tmp_path_factory.mktemp("swept")
        code, out, err = run_mebm("sweep", *words, "--results", base, "--name", study)
        return base / study, code, out, err

    return call


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a table, None where nothing is."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def trials(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Rows of `trials.parquet` by id, None where nothing is."""
    return {row["trial_id"]: row for row in rows_of(folder / "trials.parquet")}


def processes(words: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if words in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def gone(words: str) -> bool:
    until = time.monotonic() + 30
    while processes(words) and time.monotonic() < until:
        time.sleep(0.1)
    return not processes(words)


# ------------------------------------------------------------------------------------------------------ what it finds


@pytest.fixture(scope="module")
def jem(sweep: Any) -> Any:
    return sweep("--script", SCRIPTS / "jem_like.py", "-s", "n_steps=2,4", "-s", "alpha=1.0", "--seeds", 2, study="jem")


def test_a_torch_script_is_swept_and_its_arguments_are_the_papers(jem: Any) -> None:
    folder, code, out, err = jem
    assert (code, err) == (0, ""), out
    found = trials(folder)
    assert [
        (t["method"], t["sampling_steps"], t["step_size"], t["buffer_size"], t["seed"]) for t in found.values()
    ] == [("jem_like.py", k, 1.0, 64, seed) for k in (2, 4) for seed in (0, 1)]
    assert {t["outcome"] for t in found.values()} == {"completed"}
    assert all(t["iterations_planned"] == t["iterations_done"] == 24 for t in found.values())
    assert all(0 <= t["own.accuracy_best"] <= 1 for t in found.values())
    assert all(t["set.batch"] == 16 for t in found.values())
    epochs = pd.read_parquet(folder / "epochs.parquet")
    assert list(epochs[epochs["trial_id"] == "t0001"]["iteration"]) == [8, 16, 24]
    assert len(pd.read_parquet(folder / "signals" / "t0001.parquet")) == 24
    assert (folder / "samples" / "t0001_samples.png").exists() and (folder / "output" / "t0001.log").exists()


def test_its_metric_is_the_studys_objective(jem: Any) -> None:
    folder = jem[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["objectives"] == [{"metric": "own.accuracy", "direction": "maximize"}]
    assert manifest["varied"] == ["sampling_steps"]
    import optuna

    from study.search.storage import storage_url

    told = optuna.load_study(study_name="jem", storage=storage_url(folder)).get_trials()
    values = {t.user_attrs["trial_id"]: t.value for t in told}
    # Optuna minimises: it was asked before the script said its direction.
    assert values == {name: -t["own.accuracy_best"] for name, t in trials(folder).items()}


def test_status_and_report_read_it(jem: Any, run_mebm: Run) -> None:
    folder = jem[0]
    code, out, err = run_mebm("status", folder)
    assert (code, err) == (0, "") and "accuracy" in out and "4/4 trials over (4 completed); complete" in out
    assert "jem_like.py" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_strangers_study_runs_nothing(
    jem: Any, run_mebm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "jem"
    shutil.copytree(jem[0], folder)
    assert run_mebm("resume", folder)[0] == 0  # begun here, and moved
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path / "of-somebody-else"))
    code, out, err = run_mebm("resume", folder, "--set", "seeds=[0,1,2]")
    assert (code, out) == (2, "") and "was not begun by you on this machine, and would run" in err, err
    for words in (("status", folder), ("report", folder), ("tables", folder)):
        assert run_mebm(*words)[0] == 0
    assert run_mebm("resume", folder, "--trust-code")[0] == run_mebm("resume", folder)[0] == 0


# ----------------------------------------------------------------------------------------------------- how it goes bad

MOODS = {
    "calm": ("completed", None),
    "nan": ("diverged", None),
    "deaf": ("diverged", "did not stop when told, ended after"),
    "error": ("failed", "moods.py:18: ValueError: shapes differ"),
    "exit": ("failed", "SystemExit: 3"),
    "abort": ("failed", "moods.py ended (signal 6) in the middle of its run, after iteration 4"),
    "vanish": ("failed", "moods.py ended (code 0) in the middle of its run, after iteration 4"),
    "silent": ("failed", "moods.py ended (code 0) before its first iteration"),
    "back": ("failed", "MonitorError: step(2) after step(4) of its last, moods.py:26"),
    "shape": ("failed", "MonitorError: energy_data: shape (8, 2), expected a number or (n,)"),
    "text": ("failed", "MonitorError: energy_samples: object, expected a number or (n,) at moods.py:32"),
    "second": ("failed", "MonitorError: another Monitor is open in this process"),
    "fork": ("completed", None),
    "children": ("completed", "1 processes that moods.py left were ended"),
    "inf": ("completed", "fid is not finite at epoch 1: stored as null"),
    "chatty": ("completed", None),
    "bar": ("completed", None),
}


@pytest.fixture(scope="module")
def moods(sweep: Any) -> Any:
    return sweep(
        "--script", SCRIPTS / "moods.py", "-s", f"mood={','.join(MOODS)}", "--set", "run.stop_seconds=1", study="moods"
    )


def test_a_bad_trial_fails_alone_and_the_study_goes_on(moods: Any) -> None:
    folder, code, out, err = moods
    assert code == 1 and err == "" and "Traceback" not in out
    found = {t["set.mood"]: t for t in trials(folder).values()}
    assert {m: t["outcome"] for m, t in found.items()} == {m: outcome for m, (outcome, _) in MOODS.items()}
    for mood, (_, words) in MOODS.items():
        said = found[mood]["message"]
        assert said is None if words is None else words in str(said), (mood, said)
        assert found[mood]["attempts"] == 1, (mood, found[mood])
    assert found["nan"]["iteration"] == found["deaf"]["iteration"] == 4
    assert found["inf"]["own.fid_best"] is None and found["calm"]["own.fid_best"] == 33.0
    bad = next(t for t in found.values() if t["set.mood"] == "error")
    log = (folder / "output" / f"{bad['trial_id']}.log").read_text()
    assert "Traceback" in log and log.rstrip().endswith("ValueError: shapes differ")
    assert len(pd.read_parquet(folder / "signals" / f"{bad['trial_id']}.parquet")) == 5


def test_what_it_prints_is_bounded_and_no_process_is_left(moods: Any) -> None:
    folder = moods[0]
    found = {t["set.mood"]: t["trial_id"] for t in trials(folder).values()}
    assert 5_000_000 < (folder / "output" / f"{found['chatty']}.log").stat().st_size < 7_000_000
    assert "bytes left out" in (folder / "output" / f"{found['chatty']}.log").read_text()
    assert (folder / "output" / f"{found['bar']}.log").read_text().strip() == "7/8"
    assert gone("sleep 1234.5") and gone("moods.py")


# ------------------------------------------------------------------------------------------------------- how it is cut


def start(*words: object, where: Path) -> subprocess.Popen[str]:
    """`mebm` in its own process, as a user starts it."""
    return subprocess.Popen(
        [str(MEBM), *map(str, words)], cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def journal(folder: Path, event: str) -> int:
    """How many events of a kind there are."""
    path = folder / "ledger.jsonl"
    return len(re.findall(rf'"event": ?"{event}"', path.read_text())) if path.exists() else 0


def wait_for(found: Callable[[], object], process: subprocess.Popen[str], what: str) -> None:
    until = time.monotonic() + 200
    while not found():
        assert process.poll() is None, f"ended before {what}: {process.stdout and process.stdout.read()}"
        assert time.monotonic() < until, what
        time.sleep(0.05)


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows_of(folder / f"{name}.parquet")]


TWELVE = ("-s", "sampling_steps=1,2,5", "-s", "step_size=0.1,1.0,1.9,2.5", "-s", "pause=0.02", "--set", "run.checkpoint_seconds=0")  # fmt: skip


@pytest.mark.slow
def test_a_killed_study_of_twelve_settings_ends_as_an_undisturbed_one(
    sweep: Any, run_mebm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a trial's working directory is part of its configuration
    calm, code, out, err = sweep("--script", SCRIPTS / "numpy_ebm.py", *TWELVE, study="twelve")
    assert (code, err) == (0, ""), out
    assert {t["outcome"] for t in trials(calm).values()} == {"completed", "diverged"}
    driver = start("sweep", "--script", SCRIPTS / "numpy_ebm.py", *TWELVE, "--name", "twelve", where=tmp_path)
    folder = tmp_path / "results" / "twelve"
    wait_for(lambda: journal(folder, "checkpoint") >= 14, driver, "a checkpoint of the fifth trial")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert gone(str(folder)) and gone("numpy_ebm.py")  # workers, guards, scripts
    code, out, err = run_mebm("resume", folder)
    assert (code, err) == (0, ""), out
    assert table(folder, "trials") == table(calm, "trials")
    assert table(folder, "epochs") == table(calm, "epochs")
    for trial_id in trials(calm):
        one, other = (pd.read_parquet(f / "signals" / f"{trial_id}.parquet") for f in (calm, folder))
        pd.testing.assert_frame_equal(one, other)


def test_a_public_script_needs_five_lines(sweep: Any) -> None:
    path = SCRIPTS / "toy_rings.py"
    assert sum(line.endswith("# mebm") for line in path.read_text().splitlines()) == 5
    words = ("-s", "langevin_steps=5,10", "-s", "epsilon=0.1", "--objective", "radius_error:minimize")
    study = json.dumps({"langevin_steps": "sampling_steps", "bank": "buffer_size"})
    folder, code, out, err = sweep("--script", path, *words, "--set", f"symbols={study}", study="rings")
    assert (code, err) == (0, ""), out
    found = trials(folder)
    assert [(t["outcome"], t["sampling_steps"], t["buffer_size"]) for t in found.values()] == [
        ("completed", 5, 200), ("completed", 10, 200)]  # fmt: skip
    assert all(t["own.radius_error_last"] is not None for t in found.values())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["objectives"] == [{"metric": "own.radius_error", "direction": "minimize"}]


# ------------------------------------------------------------------------------------------- stops of the study's own

LOOP = """
import os, time
from mebm import Monitor
with Monitor(iterations=40, k=1, seed=0) as run:
    total = run.restore(total=[0.0])["total"]
    run.metric("fid", "minimize")
    for i in range(run.iteration, run.args.iterations):
        total[0] += i * run.args.k
        {inside}
        if run.step(i, 0.5 + 0.001 * (i % 5), 0.1, 0.2): break
        if i % 10 == 9: run.epoch(fid=total[0])
"""


def loop(folder: Path, inside: str = "pass", name: str = "train.py") -> Path:
    (folder / name).write_text(LOOP.format(inside=inside))
    return folder / name


def test_a_study_drains_and_goes_on_where_it_was(tmp_path: Path, run_mebm: Run) -> None:
    script = loop(tmp_path, "time.sleep(0.05)")
    words = ("--script", script, "-s", "k=1,2", "--set", "run.checkpoint_seconds=1000", "--name", "drained")
    driver = start("sweep", *words, where=tmp_path)
    folder = tmp_path / "results" / "drained"
    wait_for(lambda: journal(folder, "report") >= 1, driver, "an epoch")
    driver.send_signal(signal.SIGUSR1)
    assert driver.wait(120) == 130 or driver.returncode != 0
    cut = {t: row["iterations_done"] for t, row in trials(folder).items() if row["outcome"] == "interrupted"}
    assert cut and all(0 < n < 40 for n in cut.values())
    script.write_text(script.read_text().replace("time.sleep(0.05)", "pass"))
    code, out, err = run_mebm("resume", folder)
    assert code == 2 and "changed: train.py" in err and "--accept-changes" in err
    code, out, err = run_mebm("resume", folder, "--accept-changes")
    assert (code, err) == (0, ""), out
    found = trials(folder)
    assert [(t["outcome"], t["own.fid_last"]) for t in found.values()] == [("completed", 780.0), ("completed", 1560.0)]
    assert all(t["replayed_seconds"] == 0 for t in found.values())  # it saved where it stopped


def test_a_script_that_is_gone_is_said(tmp_path: Path, run_mebm: Run, sweep: Any) -> None:
    script = loop(tmp_path)
    folder, code, out, err = sweep("--script", script, "-s", "k=1,2", "--set", "budget.trials=1")
    assert (code, err) == (0, ""), out
    script.unlink()
    code, out, err = run_mebm("resume", folder, "--set", "budget.trials=5")
    assert code == 2 and err.count("\n") == 1 and "train.py" in err


def test_a_bad_setting_is_pruned_and_told_so(tmp_path: Path, sweep: Any) -> None:
    script = loop(tmp_path, "run.stopping == 'pruned' and print('was pruned')")
    script.write_text(script.read_text() + "    print('stopped:', run.stopping)\n")
    words = ("-s", "k=1,2,3,9", "--set", "run.max_concurrent=1", "--set", "pruning.rule=median")
    folder, code, out, err = sweep("--script", script, *words, "--set", "pruning.min_trials=3")
    assert (code, err) == (0, ""), out
    assert [t["outcome"] for t in trials(folder).values()] == ["completed"] * 3 + ["pruned"]
    assert "stopped: pruned" in (folder / "output" / "t0004.log").read_text()
    import optuna

    from study.search.storage import storage_url

    told = optuna.load_study(study_name="study", storage=storage_url(folder)).get_trials()
    assert [t.state.name for t in told] == ["COMPLETE"] * 3 + ["PRUNED"]


def test_memory_and_silence_are_worth_another_start(tmp_path: Path, sweep: Any) -> None:
    once = "k = run.args.k; first = not run.resumed and not os.path.exists(f'{run.folder}/once'); open(f'{run.folder}/once', 'w').close() if i == 12 else None"  # fmt: skip
    inside = f"""{once}
        if i == 12 and first and k == 1: raise MemoryError("full")
        if i == 12 and first and k == 2: time.sleep(1000)"""
    script = loop(tmp_path, inside)
    words = ("-s", "k=1,2", "--set", "run.hang_minutes=0.4", "--set", "run.checkpoint_seconds=0")
    folder, code, out, err = sweep("--script", script, *words)
    assert (code, err) == (0, ""), out
    found = list(trials(folder).values())
    assert [(t["outcome"], t["own.fid_last"], t["attempts"]) for t in found] == [
        ("completed", 780.0, 2), ("completed", 1560.0, 2)]  # fmt: skip
    reasons = list(pd.read_parquet(folder / "attempts.parquet").dropna(subset=["reason"])["reason"])
    assert any("MemoryError: full" in r for r in reasons) and any("no sign of life" in r for r in reasons)
    assert (folder / "output" / "t0001.1.log").exists()
    assert gone(str(script))
