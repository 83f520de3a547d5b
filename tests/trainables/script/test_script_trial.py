"""A script as a trial: its reports, its ends, its checkpoints; every script is its own process."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from trainables.config.script import ScriptConfig
from trainables.results.schema import Outcome
from trainables.script.trial import ScriptError, ScriptTrial
from trainables.trial.checkpoint import CheckpointError
from trainables.trial.recorder import Recorder
from trainables.trial.report import Report

HEAD = "import sys, os, time\nfrom mebm import Monitor\nwith Monitor(n=30, k=1.0, seed=0) as run:\n"
LOOP = (
    HEAD
    + """
    total = run.restore(total=[0.0])['total']
    for i in range(run.iteration, run.args.n):
        total[0] += i * run.args.k
        {inside}
        if run.step(i, 0.5 + 0.001 * (i % 5), 0.1, 0.2): break
        if i % 10 == 9: run.epoch(total=total[0])
"""
)
Make = Callable[..., ScriptTrial]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[ScriptTrial] = []

    def trial(text: str = "", /, inside: str = "pass", **fields: Any) -> ScriptTrial:
        number = len(made)
        (tmp_path / "train.py").write_text(text or LOOP.format(inside=inside))
        config = ScriptConfig(**{"script": str(tmp_path / "train.py"), "seed": 3} | fields)
        recorder = Recorder(tmp_path, "t0001")
        made.append(
            ScriptTrial(
                config,
                recorder,
                output=tmp_path / "output" / "t0001.log",
                folder=tmp_path / f"own-{number}",
                cpus=1,
                checkpoint_seconds=0,
                stop_seconds=0.5 if "nan" in text else 30,
            )
        )
        return made[-1]

    yield trial
    for each in made:
        each.close()


def to_end(trial: ScriptTrial) -> list[Report]:
    reports = [trial.step()]
    while not reports[-1].done:
        reports.append(trial.step())
    return reports


def test_its_epochs_are_reports(make: Make, tmp_path: Path) -> None:
    trial = make(args={"k": 2})
    reports = to_end(trial)
    rows = [r.row for r in reports if r.row]
    assert [(r["epoch"], r["iteration"], r["own.total"]) for r in rows] == [
        (1, 10, 90.0),
        (2, 20, 380.0),
        (3, 30, 870.0),
    ]
    last = reports[-1].trial
    assert last["outcome"] == "completed" and last["iterations_done"] == 30 and last["message"] is None
    signals = pq.read_table(tmp_path / "signals" / "t0001.parquet").to_pydict()
    assert signals["iteration"] == list(range(30)) and signals["clamped_pixel_share"] == [None] * 30
    assert trial.run.parameters == [["n", "int", 30], ["k", "float", 1.0], ["seed", "int", 0]]


def test_its_verdict_ends_it(make: Make) -> None:
    trial = make(LOOP.format(inside="x = 1e4 if i == 25 else 0.0").replace("0.5 +", "x + 0.5 +"),
                 divergence={"rule": "m-ebm"})  # fmt: skip
    last = to_end(trial)[-1]
    assert (last.outcome, last.trial["cause"], last.trial["iteration"]) == (Outcome.DIVERGED, "energy_gap_hard", 25)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_there", "train.py ended (code 1) and reported nothing"),
        ("pass", "train.py ended (code 0) and reported nothing"),
        (HEAD + "    run.step(0, 0.1, 0.2)\n    raise ValueError('shapes differ')", "train.py:5: ValueError: shapes differ"),
        (HEAD + "    run.step(0, 0.1, 0.2)\n    sys.exit(3)", "SystemExit: 3"),
        (HEAD + "    run.step(0, 0.1, 0.2)\n    os.abort()", "train.py ended (signal 6) in the middle of its run, after iteration 0"),
        (HEAD + "    run.step(0, 0.1, 0.2)\n    os._exit(4)", "train.py ended (code 4) in the middle of its run"),
        (HEAD + "    run.step(5, 0.1, 0.2)\n    run.step(4, 0.1, 0.2)", "MonitorError: step(4) after step(5)"),
        (HEAD + "    run.step(0, [1, 2], 0.2)", "MonitorError: energy_data: list"),
        ("from mebm import Monitor\nMonitor(m=1)\nwith Monitor(k=1.0, n=1) as run: run.step(0, 0.0, 0.0)", "reported nothing"),
    ],
)  # fmt: skip
def test_how_it_fails_is_said(text: str, said: str, make: Make) -> None:
    last = to_end(make(text, args={"k": 1.0, "n": 5}))[-1]
    assert last.outcome is Outcome.FAILED
    assert said in str(last.trial["message"]) and "(output/t0001.log)" in str(last.trial["message"])


def test_memory_is_worth_another_start(make: Make) -> None:
    with pytest.raises(ScriptError, match=r"train.py: MemoryError: full; its peak was .* GB"):
        to_end(make(inside="if i == 5: raise MemoryError('full')"))


def test_what_it_prints_is_kept(make: Make, tmp_path: Path) -> None:
    to_end(make(inside="print('iteration', i)"))
    assert (tmp_path / "output" / "t0001.log").read_text().splitlines() == [f"iteration {i}" for i in range(30)]


def test_one_that_goes_on_is_ended(make: Make) -> None:
    trial = make(
        HEAD + "    for i in range(10**9):\n        run.step(i, float('nan'), 0.0)\n        time.sleep(0.01)\n"
    )
    last = to_end(trial)[-1]
    assert "did not stop when told, ended after 0.5 s" in str(last.trial["message"])
    assert last.outcome is Outcome.DIVERGED and trial._guard is not None and trial._guard.poll() is not None


def test_it_goes_on_from_its_checkpoint_as_if_nothing_had_happened(make: Make, tmp_path: Path) -> None:
    whole = [r.row for r in to_end(make()) if r.row]
    first = make()
    rows = [first.step().row, first.step().row]
    assert first.has_news
    (tmp_path / "checkpoint").mkdir()
    first.save(tmp_path / "checkpoint")
    assert not first.has_news
    os.kill(first.run.pid, signal.SIGKILL)
    second = make()
    second.load(tmp_path / "checkpoint")
    rows += [r.row for r in to_end(second) if r.row]
    assert [r["own.total"] for r in rows if r] == [r["own.total"] for r in whole if r]
    assert second.run.values()["own.total_last"] == whole[-1]["own.total"]  # type: ignore[index]


def test_a_study_that_ends_gets_a_last_checkpoint(make: Make, tmp_path: Path) -> None:
    trial = make(inside="time.sleep(0.01)")
    trial.step()
    (tmp_path / "checkpoint").mkdir()
    trial.wind_up("budget")
    trial.save(tmp_path / "checkpoint")
    assert trial.run.ended and trial.run.stopping == "budget"
    state = json.loads((tmp_path / "checkpoint" / "run.json").read_text())
    assert state["iteration"] >= 10 and (tmp_path / "checkpoint" / "files" / "seal.json").exists()


def test_a_damaged_checkpoint_is_refused(make: Make, tmp_path: Path) -> None:
    trial = make()
    trial.step()
    (tmp_path / "checkpoint").mkdir()
    trial.save(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "files" / "objects.json"
    damaged = file.read_text().replace("o", "0", 1)
    file.unlink()  # it may be a link to the script's own
    file.write_text(damaged)
    with pytest.raises(CheckpointError, match=r"objects.json: its checksum is not that of what was written"):
        make().load(tmp_path / "checkpoint")


def test_nothing_is_left_of_it(make: Make) -> None:
    trial = make(inside="time.sleep(0.02); import subprocess; subprocess.Popen(['sleep', '600']) if i == 0 else 0")
    trial.step()
    pid, scratch = trial.run.pid, trial._scratch
    trial.close()
    until = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < until
    assert not scratch.exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"command": "python train.py --k {k} {args}"}, ["python", "train.py", "--k", "1; rm -rf /", "--k=1; rm -rf /", "--s=a b'\"\n"]),
        ({"command": "run {seed} x{k}y {folder}"}, ["run", "3", "x1; rm -rf /y", "/f"]),
        ({"command": "h {args:hydra}"}, ["h", "k=1; rm -rf /", "s=a b'\"\n"]),
        ({"command": "echo {k}", "shell": True}, ["/bin/sh", "-c", "echo '1; rm -rf /'"]),
        ({"script": "pkg.train:main"}, ["PY", "-c", "import sys; from mebm import Monitor; Monitor.call(sys.argv[1])", "pkg.train:main"]),
    ],
)  # fmt: skip
def test_a_value_is_one_argument_and_no_shell_sees_it(fields: dict[str, Any], words: list[str]) -> None:
    config = ScriptConfig(args={"k": "1; rm -rf /", "s": "a b'\"\n"}, seed=3, **fields)
    assert config.argv("PY", Path("/f")) == words


def test_a_placeholder_without_argument_is_refused() -> None:
    with pytest.raises(ValueError, match=r"{j} is not an argument; there are k, seed, folder, args"):
        ScriptConfig(command="run {j}", args={"k": 1}).argv("PY", Path("/f"))


@pytest.mark.parametrize(
    "fields",
    [{}, {"script": "a.py", "command": "b"}, {"script": "a.sh"}, {"script": "a folder"}, {"script": "a.py", "shell": True}, {"command": ""}, {"command": "a 'b"},
     {"script": "a.py", "args": {"a b": 1}}, {"script": "a.py", "symbols": {"a": "nothing"}}],
)  # fmt: skip
def test_a_script_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"script|command|shell|name of an argument|setting"):
        ScriptConfig(**fields)


def test_arguments_fill_the_papers_columns() -> None:
    args = {"n_steps": 5, "alpha": 0.5, "lr": 0.1, "width": 64, "mine": 2.0, "B": 0.5, "dataset": "mnist"}
    config = ScriptConfig(script="/x/train.py", args=args, symbols={"mine": "noise_std", "alpha": None})
    setting = {k: v for k, v in config.setting().items() if v is not None}
    assert setting == {
        "method": "train.py", "dataset": "mnist", "sampling_steps": 5, "learning_rate": 0.1, "noise_std": 2.0,
        "set.alpha": 0.5, "set.width": 64, "set.B": 0.5,
    }  # fmt: skip
