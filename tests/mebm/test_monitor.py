"""`mebm.Monitor` against a reader of its wire: what it reports, what it refuses, how it stops and goes on."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mebm import monitor
from mebm.monitor import Judge, LearntRule, Monitor, MonitorError, Options
from trainables.results.schema import SIGNAL_NAMES
from trainables.script.wire import Wire, WireError

GAP = SIGNAL_NAMES.index("energy_gap")
Begin = Callable[..., Wire]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """Makes a wire whose reader takes in everything at once."""

    def make(**values: Any) -> Wire:
        monkeypatch.setenv(monitor.WIRE, str(tmp_path))
        wire = Wire(tmp_path)
        wire.start(**{"args": {}, "seed": 0, "checkpoint_seconds": 1e9, **values})
        wire.tell(ack=10**9)
        return wire

    return make


def kinds(wire: Wire) -> list[str]:
    return [event["t"] for event in wire.events()]


def test_a_study_gives_arguments_in_their_defaults_types(begin: Begin) -> None:
    begin(args={"steps": 7.0, "alpha": 2, "name": "x"}, seed=5)
    run = Monitor(steps=5, alpha=1.0, name="y", seed=0, free=None)
    assert vars(run.args) == {"steps": 7, "alpha": 2.0, "name": "x", "seed": 5, "free": None}
    assert type(run.args.steps) is int and type(run.args["alpha"]) is float and run.seed == 5
    with pytest.raises(AttributeError, match="read-only"):
        run.args.steps = 1


@pytest.mark.parametrize(("value", "default"), [(0.5, 5), ("a", 5), (True, 5), (1, True), ([], 1.0), ("a", 0.1)])
def test_a_value_that_does_not_fit_its_default_is_refused(value: Any, default: Any, begin: Begin) -> None:
    begin(args={"steps": value})
    with pytest.raises(MonitorError, match=r"^steps: .* is not "):
        Monitor(steps=default)


def test_an_argument_the_script_has_not_is_refused(begin: Begin) -> None:
    begin(args={"sampling_step": 1})
    with pytest.raises(MonitorError, match=r"no argument 'sampling_step'; Monitor\(...\) has sampling_steps"):
        Monitor(sampling_steps=5)


def test_what_is_reported_arrives(begin: Begin) -> None:
    wire = begin()
    with Monitor(Options(samples_range=(0.0, 1.0)), iterations=40) as run:
        run.metric("fid", "minimize", protocol="mine")
        for i in range(0, 20, 2):
            assert not run.step(i, np.array([1.0, 3.0]), np.float32(0.5), 0.25, grad_norm=2)
        run.log(extra=1)
        run.note(gpu="none", n=3)
        assert not run.epoch(fid=3.5, samples=np.linspace(0, 1, 2 * 3 * 4).reshape(2, 3, 2, 2), learning_rate=0.1)
    events = {event["t"]: event for event in wire.events()}
    assert list(events) == ["hello", "metric", "note", "epoch", "end"]
    assert events["hello"]["planned"] == 40 and events["hello"]["parameters"] == [["iterations", "int", 40]]
    assert events["epoch"]["metrics"] == {"extra": 1.0, "fid": 3.5} and events["epoch"]["iteration"] == 19
    assert events["end"]["iteration"] == 19 and events["end"]["stopping"] is None
    signals = wire.signals()
    assert list(signals.iterations) == list(range(0, 20, 2)) and signals.missed == 0
    found = dict(zip(SIGNAL_NAMES, signals.values[0], strict=True))
    assert found["energy_gap"] == 1.5 and found["loss"] == 0.25 and found["grad_param_norm"] == 2
    assert math.isnan(found["cross_entropy"]) and math.isnan(found["energy_abs_max"])
    images = np.load(wire.folder / events["epoch"]["samples"])
    assert images.dtype == np.uint8 and images.shape == (2, 3, 2, 2) and (images.min(), images.max()) == (0, 255)


def test_energies_of_every_library_are_one(begin: Begin) -> None:
    torch = pytest.importorskip("torch")
    wire = begin()
    values = [1.5, np.float64(1.5), np.array([1.0, 2.0]), torch.tensor(1.5), torch.tensor([[1.0], [2.0]]),
              torch.tensor([1.0, 2.0], requires_grad=True), 1.5]  # fmt: skip
    with Monitor() as run:
        for i, value in enumerate(values):
            run.step(i, value, value)
    signals = wire.signals()
    assert (signals.values[:, SIGNAL_NAMES.index("energy_data_mean")] == 1.5).all()
    largest = signals.values[:, SIGNAL_NAMES.index("energy_abs_max")]
    assert [None if math.isnan(v) else v for v in largest] == [None, None, 2, None, 2, 2, None]


@pytest.mark.parametrize(
    ("value", "said"),
    [(np.ones((64, 10)), r"energy_data: shape \(64, 10\), expected a number or \(n,\)"), ("a", "energy_data: str"),
     (None, "energy_data: NoneType"), (np.ones(0), r"shape \(0,\)")],
)  # fmt: skip
def test_energies_of_a_wrong_shape_are_refused(value: Any, said: str, begin: Begin) -> None:
    begin()
    with Monitor() as run, pytest.raises(MonitorError, match=f"{said}.*test_monitor.py:"):
        run.step(0, value, 1.0)


def test_iterations_rise(begin: Begin) -> None:
    begin()
    with Monitor() as run:
        run.step(5, 0.0, 0.0)
        with pytest.raises(MonitorError, match=r"step\(5\) after step\(5\) .*test_monitor.py:\d+"):
            run.step(5, 0.0, 0.0)


@pytest.mark.parametrize(
    ("bad", "cause"),
    [((math.nan, 0.0, 0.1), "nonfinite_energy"), ((math.inf, math.inf, 0.1), "nonfinite_energy"),
     ((0.0, 0.0, math.nan), "nonfinite_loss"), ((0.0, 0.0, 2e5), "loss_limit"), ((1e6, 0.0, 0.1), "energy_gap_hard")],
)  # fmt: skip
def test_what_ends_a_run(bad: tuple[float, float, float], cause: str, begin: Begin) -> None:
    wire = begin()
    with Monitor() as run:
        for i in range(100):
            assert not run.step(i, 0.3 + 0.01 * (i % 3), 0.1, 0.1)
        assert run.step(100, *bad) and run.stopping == "diverged"
        assert run.step(101, 0.0, 0.0), "it stays so"
    (verdict,) = [e for e in wire.events() if e["t"] == "verdict"]
    assert (verdict["outcome"], verdict["cause"], verdict["iteration"]) == ("diverged", cause, 100)


def test_a_collapse_needs_a_weight_and_patience() -> None:
    judge, free = Judge({"rule": "none", "l2_weight": 0.5}), Judge({"rule": "none"})
    verdicts = [judge.verdict(i, -2.0, None, None) for i in range(20)]
    assert verdicts[:19] == [None] * 19 and verdicts[19] == ("collapsed", "trivial_optimum")
    assert [free.verdict(i, -2.0, None, None) for i in range(30)] == [None] * 30


def test_fixed_limits_are_those_of_a_builtin_trial() -> None:
    judge = Judge({"rule": "m-ebm", "l2_weight": 0.5})
    found = [judge.verdict(i, gap, None, None) for i, gap in enumerate([1.5, 0.5, 1.5, 1.5, 1.5])]
    assert found[:4] == [None] * 4 and found[4] == ("diverged", "energy_gap")


def test_the_learnt_rule_knows_no_units() -> None:
    rng = np.random.default_rng(0)
    gaps = [*np.abs(rng.normal(1, 0.3, 200)), *np.geomspace(10, 3000, 30)]
    alarms = []
    for unit in (1e-6, 1.0, 1e6):
        rule = LearntRule()
        alarms.append(next(i for i, g in enumerate(gaps) if rule.alarm(g * unit)))
    assert len(set(alarms)) == 1 and alarms[0] > 200


def test_the_learnt_rules_state_goes_on_where_it_was() -> None:
    gaps = list(np.random.default_rng(1).exponential(1.0, 400)) + [1e3] * 3
    whole, first = LearntRule(), LearntRule()
    for gap in gaps[:333]:
        whole.alarm(gap), first.alarm(gap)
    second = LearntRule(json.loads(json.dumps(first.state())))
    assert [whole.alarm(g) for g in gaps[333:]] == [second.alarm(g) for g in gaps[333:]]


@pytest.mark.parametrize("stop", ["budget", "pruned", "drained"])
def test_a_study_stops_a_run(stop: str, begin: Begin) -> None:
    wire = begin()
    with Monitor() as run:
        run.restore(x=1)
        assert not run.step(0, 0.0, 0.0)
        wire.tell(stop=stop)
        assert run.epoch() and run.stopping == stop and run.step(1, 0.0, 0.0)
    told = wire.events()
    assert told[-1]["stopping"] == stop
    assert any(e["t"] == "saved" for e in told) == (stop != "pruned"), "what may go on is saved"


def test_an_exception_is_told_and_goes_on_its_way(begin: Begin) -> None:
    wire = begin()
    with pytest.raises(ZeroDivisionError), Monitor() as run:
        run.step(0, 1 / 0, 0.0)
    error = next(e for e in wire.events() if e["t"] == "error")
    assert error["type"] == "ZeroDivisionError" and error["text"] == "division by zero" and not error["transient"]
    assert "test_monitor.py:" in error["where"]


def test_a_run_goes_on_from_its_checkpoint(begin: Begin, tmp_path: Path) -> None:
    """Every kind of object, and the random numbers, are what they were."""
    torch = pytest.importorskip("torch")

    def parts() -> dict[str, Any]:
        model = torch.nn.Linear(2, 1)
        optimiser = torch.optim.Adam(model.parameters())
        return {"model": model, "optimiser": optimiser, "array": np.zeros(2), "nest": {"a": [1, (2.5, "x")], 3: None}}

    wire = begin(checkpoint_seconds=0)
    with Monitor() as run:
        first = parts()
        first["nest"]["a"].append(torch.arange(3))
        run.restore(**first)
        first["array"][:] = 7
        first["model"](torch.ones(1, 2)).sum().backward()
        first["optimiser"].step()
        for i in range(60):
            run.step(i, 0.5 + i * 0.001, 0.1)
        run.epoch()
        here = (np.random.rand(), torch.rand(1).item(), __import__("random").random())  # noqa: NPY002
    saved = [e["name"] for e in wire.events() if e["t"] == "saved"]
    folder = tmp_path / saved[0]
    assert monitor.sealed(str(folder))
    for name in ("start.json", "events.jsonl", "signals.ring"):
        (tmp_path / name).unlink()
    begin(resume=str(folder))
    with Monitor() as run:
        assert run.resumed and run.iteration == 60
        second = parts()
        found = run.restore(**second)
        assert (np.random.rand(), torch.rand(1).item(), __import__("random").random()) == here  # noqa: NPY002
        assert all(
            (a == b).all() for a, b in zip(first["model"].parameters(), second["model"].parameters(), strict=True)
        )
        assert found["model"] is second["model"] and (found["array"] == 7).all()
        assert (
            found["nest"]["a"][1] == (2.5, "x")
            and 3 in found["nest"]
            and (found["nest"]["a"][2] == torch.arange(3)).all()
        )
        assert second["optimiser"].state_dict()["state"][0]["step"] == 1
        with pytest.raises(MonitorError, match="holds no 'other'; it holds model"):
            run.restore(other=1)
        with pytest.raises(MonitorError, match="goes on at 60"):
            run.step(59, 0.0, 0.0)
        assert run.step(60, 5e3, 0.0), "the learnt scale came along"


def test_a_damaged_checkpoint_is_seen(begin: Begin, tmp_path: Path) -> None:
    wire = begin()
    with Monitor() as run:
        run.epoch(save={"x": np.arange(5)})
    (name,) = [e["name"] for e in wire.events() if e["t"] == "saved"]
    file = tmp_path / name / "arrays.npz"
    file.write_bytes(file.read_bytes()[:-1])
    assert not monitor.sealed(str(tmp_path / name))


def test_a_folder_of_the_scripts_own_is_kept(begin: Begin, tmp_path: Path) -> None:
    wire = begin()
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "deep" / "x").write_text("1")
    with Monitor() as run:
        run.epoch(save=tmp_path / "mine")
    (name,) = [e["name"] for e in wire.events() if e["t"] == "saved"]
    begin(resume=str(tmp_path / name))
    for gone in ("events.jsonl", "signals.ring"):
        (tmp_path / gone).unlink()
    with Monitor() as run:
        assert run.checkpoint is not None and (Path(run.checkpoint) / "deep" / "x").read_text() == "1"


def test_what_cannot_be_saved_is_named(begin: Begin) -> None:
    begin()
    with Monitor() as run, pytest.raises(MonitorError, match=r"save\.x\[1\]: a set cannot be saved"):
        run.epoch(save={"x": [1, {2}]})


def test_one_at_a_time_and_none_in_a_fork(begin: Begin) -> None:
    begin()
    with Monitor() as run:
        with pytest.raises(MonitorError, match="another Monitor is open"), Monitor():
            pass
        if (child := os.fork()) == 0:
            try:
                run.step(0, 0.0, 0.0)
            except MonitorError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with pytest.raises(MonitorError, match="outside"):
        run.step(1, 0.0, 0.0)


def test_a_metric_that_is_not_finite_is_null_and_said(begin: Begin) -> None:
    wire = begin()
    with Monitor() as run:
        run.epoch(fid=math.nan)
        with pytest.raises(MonitorError, match="metric 'a b'"):
            run.log(**{"a b": 1})
    told = wire.events()
    assert next(e for e in told if e["t"] == "epoch")["metrics"] == {"fid": None}
    assert next(e for e in told if e["t"] == "remark")["text"] == "fid is not finite at epoch 1: stored as null"


# ------------------------------------------------------------------------------------------------------------ the wire


def test_more_iterations_than_the_ring_holds_are_counted(begin: Begin) -> None:
    wire = begin()
    with Monitor() as run:
        run._by_hand = True
        for i in range(monitor.ROWS + 1000):
            run.step(i, 0.5, 0.1)
    signals = wire.signals()
    assert signals.missed == 1000 and len(signals.iterations) == monitor.ROWS
    assert list(signals.iterations[[0, -1]]) == [1000, monitor.ROWS + 999]


@pytest.mark.parametrize("damage", ["flip", "drop", "twice", "text", "deep"])
def test_a_damaged_line_is_refused_and_a_torn_one_waits(damage: str, begin: Begin) -> None:
    wire = begin()
    with Monitor() as run:
        run.note(a=1)
        run.note(b=2)
    path = wire.folder / monitor.EVENTS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[:-5])
    assert len(wire.events()) == len(lines) - 1
    broken = {
        "flip": [lines[0].replace(b"hello", b"hallo"), *lines[1:]],
        "drop": [lines[0], *lines[2:]],
        "twice": [lines[0], lines[0]],
        "text": [b"what?\n"],
        "deep": [b"[" * 50_000 + b"\n"],
    }[damage]
    path.write_bytes(b"".join(broken))
    with pytest.raises(WireError, match=r"event [12] is damaged"):
        Wire(wire.folder).events()


# ------------------------------------------------------------------------------------------------------- the one file


def test_the_client_needs_the_standard_library_alone_and_python_3_7() -> None:
    text = Path(monitor.__file__).read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 7))
    top = {n.split(".")[0] for node in tree.body for n in _imported(node)}
    assert top <= set(sys.stdlib_module_names) | {"__future__"}
    inside = {n.split(".")[0] for node in ast.walk(tree) for n in _imported(node)} - set(sys.stdlib_module_names)
    assert inside <= {"__future__", "numpy", "torch"}, "and those where a script has brought them"


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_a_copy_of_it_works_beside_modules_of_our_names(tmp_path: Path) -> None:
    """A script whose folder has a `study.py` and an `analysis/`, in an interpreter without any package."""
    (tmp_path / "mebm.py").write_text(Path(monitor.__file__).read_text(encoding="utf-8"))
    for name in ("study.py", "analysis.py", "trainables.py"):
        (tmp_path / name).write_text("raise SystemExit('not this one')")
    (tmp_path / "train.py").write_text(
        "from mebm import Monitor\nwith Monitor(k=1) as run:\n    for i in range(5):\n        run.step(i, 0.1, 0.2)\n"
    )
    folder = tmp_path / "wire"
    folder.mkdir()
    wire = Wire(folder)
    wire.start(args={"k": 2})
    environment = {"PATH": os.environ["PATH"], monitor.WIRE: str(folder)}
    ended = subprocess.run([sys.executable, "-S", str(tmp_path / "train.py")], env=environment, capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()
    assert kinds(wire) == ["hello", "epoch", "end"] and len(wire.signals().iterations) == 5


def test_many_deaths_at_any_moment_leave_a_wire_that_can_be_read(tmp_path: Path) -> None:
    """kill -9 while lines, rows and checkpoints are written: whole lines, rows that are right, sealed checkpoints."""
    (tmp_path / "train.py").write_text(
        "import sys\nfrom mebm import Monitor\nwith Monitor(k=1) as run:\n    data = run.restore(d={'x': list(range(2000))})\n"
        "    i = 0\n    while True:\n        run.step(i, float(i), 0.0, 0.5)\n        i += 1\n"
        "        if i % 50 == 0: run.epoch(m=float(i))\n"
    )
    rng = np.random.default_rng(0)
    saved = 0
    for number in range(30):
        folder = tmp_path / f"wire-{number}"
        folder.mkdir()
        wire = Wire(folder)
        wire.start(rule={"rule": "none"}, checkpoint_seconds=0)
        wire.tell(ack=10**9)
        environment = {**os.environ, monitor.WIRE: str(folder), "PYTHONPATH": str(Path(monitor.__file__).parents[1])}
        process = subprocess.Popen([sys.executable, "-S", str(tmp_path / "train.py")], env=environment)
        until = time.monotonic() + 60
        while not list(folder.glob("checkpoint-*")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.001)
        time.sleep(0.2 * rng.random())
        process.kill()
        process.wait()
        events, signals = wire.events(), wire.signals()
        assert (signals.values[:, GAP] == signals.iterations).all()
        for name in (e["name"] for e in events if e["t"] == "saved"):
            if (folder / name).exists():
                saved += 1
                assert monitor.sealed(str(folder / name))
    assert saved > 20
