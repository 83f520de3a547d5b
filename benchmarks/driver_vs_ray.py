"""What this package's driver costs beside Ray Tune's own: a large study whose trials train nothing.

The same study runs on one local cluster of logical GPUs through the whole driver of this package (journal, Optuna
storage, scheduler, callback, console into a file), and as the script one would write with Ray Tune alone. The numbers
of a report, their count, trials at once, sampler and order of the trials are the same; the package sends the numbers of
a report as one string (see `trainables.trial.ray_report`), a script sends them as they are. Each run has a process of
its own, because memory that a process once had it seldom gives back.

Workers import this module, so nothing here imports torch before a function asks for it.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ray import tune
from ray.tune.result import DONE

from trainables.results.schema import EPOCH_COLUMNS, METRIC_BY_NAME, SETTING_NAMES, TRIAL_COLUMNS, Column, Outcome
from trainables.trial.ray_report import pack_report

EPOCHS = 19
"""Of a trial; with the untrained epoch 0 it reports 20 times."""
NODES = (22, 21, 21)
"""Logical GPUs of the cluster's nodes."""
CPUS = 0.125
"""Logical CPUs of a trial: few, since Ray starts an idle worker for every CPU of a node."""
AT_ONCE = 16
"""Trials at once. Each has a process of some 200 MB, so a small machine cannot hold one for each of 64 GPUs."""
SIDES = ("package", "ray", "ray-loggers")
"""This package; Ray Tune with its result loggers off; Ray Tune with those that it has by default (CSV, JSON,
TensorBoard where it is installed)."""
BASELINE = "ray"
"""What the package is compared with first: the fastest script, which keeps no results but in memory."""
ROUNDS = 3
"""Rounds of the small study; all sides run in each, in turn."""
_MARKS = 20
"""Times that a run's clock and memory are noted, evenly over its trials."""
_IDLE = frozenset({"study", "trial_id", "attempt", "reported_at"})
DRIVERS = frozenset(
    {"study", "trial_id", "setting_id", "seed", "seconds", "replayed_seconds", "lost_seconds", "gpus", "attempts",
     "started_at", "ended_at", "config", "rescue", "rescue_of", "rescues", "rescued", "rescue_seconds", *SETTING_NAMES}
)  # fmt: skip
"""Columns that the driver fills in, not the trial."""
_NONE = frozenset({"cause", "iteration", "alarm_iteration", "alarm_cause", "loss_limit_iteration", "message"})
"""Columns that are null in a trial without incident."""


def _value(column: Column, epoch: int) -> Any:
    if column.name in _NONE:
        return None
    if column.name == "energy_shared":
        return False
    return {"string": f"a {column.name}", "int64": epoch, "float64": 1.0 / (1 + epoch), "bool": False}[column.type]


class NoOpTrainable(tune.Trainable):
    """Reports what a real trial reports, at once and the way a real one does, and trains nothing."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the configuration as a trial does."""
        self._epochs = int(json.loads(config["trial"])["epochs"])
        self._epoch = -1

    def step(self) -> dict[str, Any]:
        """One epoch, of no length."""
        self._epoch += 1
        epoch, last = self._epoch, self._epoch >= self._epochs
        row = {c.name: _value(c, epoch) for c in EPOCH_COLUMNS if c.name not in _IDLE}
        trial = {c.name: _value(c, epoch) for c in TRIAL_COLUMNS if c.name not in DRIVERS}
        row |= {"epoch": epoch, "iteration": epoch}
        trial |= {
            "outcome": (Outcome.COMPLETED if last else Outcome.RUNNING).value,
            "epochs_done": epoch,
            "iterations_done": epoch,
            "iterations_planned": self._epochs,
            "iterations_per_epoch": 1,
        }
        return {**self.pack(row, trial), DONE: last}

    pack = staticmethod(pack_report)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take on another trial in the same process."""
        self.setup(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""


class PlainNoOp(NoOpTrainable):
    """Reports the same numbers as plain values, as a script does."""

    @staticmethod
    def pack(row: Mapping[str, Any], trial: Mapping[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """The result as Ray Tune documents it."""
        return {"row": row, "trial": trial}


# ---------------------------------------------------------------------------------------------------- one run


class _Marks:
    """Notes clock and memory of the driver while trials end."""

    def __init__(self, trials: int) -> None:
        self.at = sorted({max(1, round(trials * n / _MARKS)) for n in range(1, _MARKS + 1)})
        self.started, self.cpu_before = time.perf_counter(), time.process_time()
        self.rows: list[dict[str, Any]] = []
        self._ended = 0

    def ended(self) -> None:
        """A trial has ended."""
        self._ended += 1
        if self._ended in self.at:
            self.rows.append({"ended": self._ended, **self.spent(), "rss_bytes": _memory()})

    def spent(self) -> dict[str, float]:
        """Wall time and this process's CPU time so far."""
        return {
            "seconds": time.perf_counter() - self.started,
            "cpu_seconds": time.process_time() - self.cpu_before,
        }


def _memory() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _study(trials: int, at_once: int) -> Any:
    from study.config.load import validate_study

    return validate_study(
        {
            "name": "scale",
            "trial": {"dataset": "digits", "epochs": EPOCHS, "iterations_per_epoch": 1},
            "search": {
                "sampler": "random",
                "trials": trials,
                "space": {
                    "sampling_steps": {"low": 1, "high": 10},
                    "step_size": {"low": 0.1, "high": 10.0, "log": True},
                    "reinit_probability": {"low": 0.01, "high": 0.2},
                },
            },
            "objectives": [{"metric": "fd_buffer"}],
            "resources": {"cpus": CPUS, "gpus": 1},
            "run": {"max_concurrent": at_once},
        },
        "scale",
    )


def _run_package(trials: int, at_once: int, address: str, scratch: Path) -> _Marks:
    from study.display.console import StudyConsole
    from study.record.folder import create_folder
    from study.record.ledger import Ledger
    from study.run.ray_session import quiet_ray
    from study.search.tell import reconcile
    from trainables.results.layout import LOG_FILE

    quiet_ray()
    from study.run.driver import run_trials  # imports Ray, which must be quiet by then

    study = _study(trials, at_once)
    folder = create_folder(study, scratch)
    handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
    logging.getLogger("mebm").setLevel(logging.INFO)

    class Marking(StudyConsole):
        def __init__(self, stream: IO[str]) -> None:
            super().__init__(stream)
            self.marks = _Marks(trials)

        def ended(self, trial: Mapping[str, Any]) -> None:
            super().ended(trial)
            self.marks.ended()

    with (scratch / "console").open("w", encoding="utf-8") as stream:
        ledger = Ledger(folder, study.name)
        reconcile(study, folder, ledger)
        console = Marking(stream)
        ending = run_trials(study, folder, console, ledger, address, handler, "", trainable=NoOpTrainable)
        ledger.close()
    if ending.failed or ending.interrupted or len(ledger.trials) != trials:
        raise RuntimeError(f"{len(ledger.trials)} of {trials} trials ended, {ending.failed} of them failed")
    return console.marks


def _run_ray(trials: int, at_once: int, address: str, scratch: Path, *, loggers: bool) -> _Marks:
    if not loggers:
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    import optuna
    import ray
    from ray.tune.search.optuna import OptunaSearch

    from study.run.ray_private import forward_no_keys

    forward_no_keys()

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = _study(trials, at_once)
    space = study.space
    point = {"sampling_steps": 5, "step_size": 1.0, "reinit_probability": 0.05}
    marks = _Marks(trials)

    class Marking(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
            marks.ended()

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    results = tune.Tuner(
        tune.with_resources(PlainNoOp, tune.PlacementGroupFactory([{"CPU": CPUS, "GPU": 1}])),
        param_space={
            "trial": space.trial(point, 0).to_json(),
            "sampling_steps": tune.randint(1, 11),
            "step_size": tune.loguniform(0.1, 10),
            "reinit_probability": tune.uniform(0.01, 0.2),
        },
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(
                metric="row/fd_buffer",
                mode=METRIC_BY_NAME["fd_buffer"].direction[:3],
                sampler=optuna.samplers.RandomSampler(seed=0),
            ),
            num_samples=trials,
            max_concurrent_trials=at_once,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="run", storage_path=str(scratch), callbacks=[Marking()], verbose=0),
    ).fit()
    if results.errors or len(results) != trials:
        raise RuntimeError(f"{len(results)} of {trials} trials ended, {len(results.errors)} of them failed")
    ray.shutdown()
    return marks


def run_side(side: str, trials: int, at_once: int, address: str) -> dict[str, Any]:
    """Run the study once, in this process.

    Args:
        side: one of `SIDES`.
        trials: of the study.
        at_once: trials at the same time.
        address: of a cluster.

    Returns:
        `side`, `trials`, `reports`, `seconds` (from the connection to the cluster to the last file), `cpu_seconds` of
        the driver's process, and `marks`: per number of `ended` trials these two and the driver's `rss_bytes`.
    """
    with tempfile.TemporaryDirectory() as text:
        if side == "package":
            marks = _run_package(trials, at_once, address, Path(text))
        else:
            marks = _run_ray(trials, at_once, address, Path(text), loggers=side != BASELINE)
        spent = marks.spent()
    return {
        "side": side,
        "trials": trials,
        "reports": trials * (EPOCHS + 1),
        **spent,
        "marks": marks.rows,
    }


def _own_process(side: str, trials: int, at_once: int, address: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as text:
        result, output = Path(text) / "result.json", Path(text) / "output"
        arguments = [side, str(trials), str(at_once), address, str(result)]
        with output.open("wb") as file:
            code = subprocess.run(
                [sys.executable, "-m", "benchmarks.driver_vs_ray", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if code != 0 or not result.is_file():
            raise RuntimeError(f"{side}: {output.read_text(encoding='utf-8', errors='replace')[-2000:]}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


@contextmanager
def logical_cluster(nodes: Sequence[int] = NODES) -> Iterator[str]:
    """A Ray cluster of several nodes on this machine, whose GPUs are only numbers; gives its address."""
    from ray.cluster_utils import Cluster

    from study.run.ray_session import quiet_ray

    quiet_ray()
    with _environment("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"):
        cluster = Cluster()
        try:
            for gpus in nodes:
                cluster.add_node(num_cpus=max(1, round(gpus * CPUS + 0.5)), num_gpus=gpus, include_dashboard=False)
            cluster.wait_for_nodes()
            yield cluster.address
        finally:
            cluster.shutdown()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# ---------------------------------------------------------------------------------------------------- together


def time_scale(trials: int = 1000, *, at_once: int = AT_ONCE, rounds: int = ROUNDS) -> dict[str, Any]:
    """The study through this package and through Ray Tune alone, in turn.

    A study of a tenth of the trials runs `rounds` times on every side, in an order that is turned round by round; the
    large one runs once on each.

    Returns:
        `runs`, in their order (see `run_side`), and what follows from them; see `summary`.
    """
    small = max(1, trials // 10)
    runs = []
    with logical_cluster() as address:
        for number in range(rounds):
            for side in SIDES if number % 2 else SIDES[::-1]:
                runs.append({"round": number, **_own_process(side, small, at_once, address)})
        for side in SIDES:
            runs.append({"round": 0, **_own_process(side, trials, at_once, address)})
    return {"at_once": at_once, "gpus": sum(NODES), "nodes": len(NODES), "runs": runs, **summary(runs)}


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What runs say.

    Returns:
        Per number of trials `ratios`: time of the package over that of each other side, the median of its rounds, and
        `cpu_ratios`, the same of the driver's CPU time, which other work on the machine disturbs less. And per side of
        the largest study `reports_per_second`, `cpu_milliseconds_per_report`, `memory` (megabytes at quarters of the
        trials), `kilobytes_per_trial` (its slope over the second half; before that, pools and caches fill up) and
        `growth`: the time of a trial in the last quarter over that in the second (the first one starts the workers).
    """
    largest = max(r["trials"] for r in runs)
    sizes = sorted({r["trials"] for r in runs})
    ratios = {str(n): _ratios(runs, n, "seconds") for n in sizes}
    cpu_ratios = {str(n): _ratios(runs, n, "cpu_seconds") for n in sizes}
    sides = {}
    for run in runs:
        if run["trials"] == largest:
            marks = run["marks"]
            quarters = [marks[min(len(marks) - 1, round(len(marks) * q) - 1)] for q in (0.25, 0.5, 0.75, 1.0)]
            sides[run["side"]] = {
                "seconds": run["seconds"],
                "cpu_milliseconds_per_report": 1e3 * _slope(quarters[0], quarters[3], "cpu_seconds") / (EPOCHS + 1),
                "reports_per_second": run["reports"] / run["seconds"],
                "memory": [q["rss_bytes"] / 1e6 for q in quarters],
                "kilobytes_per_trial": _slope(quarters[1], quarters[3], "rss_bytes") / 1e3,
                "growth": _slope(quarters[2], quarters[3], "seconds") / _slope(quarters[0], quarters[1], "seconds"),
            }
    return {"ratios": ratios, "cpu_ratios": cpu_ratios, "sides": sides}


def _ratios(runs: Sequence[Mapping[str, Any]], trials: int, name: str) -> dict[str, float]:
    """The package's number over that of every other side: median over rounds."""
    by_round: dict[Any, dict[str, float]] = {}
    for run in runs:
        if run["trials"] == trials:
            by_round.setdefault(run["round"], {})[run["side"]] = run[name]
    return {
        f"over_{side}_baseline": statistics.median(found["package"] / found[side] for found in by_round.values())
        for side in SIDES
        if side != "package"
    }


def _slope(first: Mapping[str, Any], last: Mapping[str, Any], name: str) -> float:
    """Growth per trial between two marks; 0 where they are one."""
    trials = last["ended"] - first["ended"]
    return float((last[name] - first[name]) / trials) if trials else 0.0


def lines(found: Mapping[str, Any]) -> list[str]:
    """The figures of `time_scale` for people."""
    said = [
        f"{trials} trials of {EPOCHS + 1} reports, {found['at_once']} at once on {found['gpus']} logical GPUs of "
        f"{found['nodes']} nodes: {ratio['over_ray_baseline']:.2f} times Ray Tune alone, "
        f"{ratio['over_ray-loggers_baseline']:.2f} times with its loggers; CPU of the driver "
        f"{found['cpu_ratios'][trials]['over_ray_baseline']:.2f} and "
        f"{found['cpu_ratios'][trials]['over_ray-loggers_baseline']:.2f} times"
        for trials, ratio in found["ratios"].items()
    ]
    for side, numbers in found["sides"].items():
        memory = ", ".join(f"{m:.0f}" for m in numbers["memory"])
        said.append(
            f"{side}: {numbers['seconds']:.1f} s, {numbers['reports_per_second']:.0f} reports/s, "
            f"{numbers['cpu_milliseconds_per_report']:.2f} ms of CPU per report; driver {memory} MB at "
            f"quarters, {numbers['kilobytes_per_trial']:.1f} kB per trial; a trial of the last quarter took "
            f"{numbers['growth']:.2f} times one of the second"
        )
    return said


def write_side(side: str, trials: str, at_once: str, address: str, result: str) -> None:
    """One run in its own process; writes what it found as JSON to the file `result`."""
    found = run_side(side, int(trials), int(at_once), address)
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    # Through its name: classes of `__main__` would be sent to workers as code, and not be the ones imported here.
    from benchmarks import driver_vs_ray as scale

    if sys.argv[1:2] and sys.argv[1] in SIDES:
        scale.write_side(*sys.argv[1:])
    else:
        from benchmarks.commands import run_comparison

        run_comparison("scale", __doc__, scale.time_scale, scale.lines)
