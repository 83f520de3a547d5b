"""What the analysis of a large study takes, beside reading the same study with Ray Tune's own classes.

A generated study (`benchmarks.synthetic_study`) is written twice: as this package leaves a study, and as Ray Tune
leaves one, with a folder per trial and a line of JSON per report in it. Then, each time in its own process:

- package: the study is loaded, Tables 1-6 and the table of settings are built, and every figure of the report with its
  data;
- ray: `ray.tune.ExperimentAnalysis` reads it (what `ResultGrid` reads through) and gives the frame of last reports.
  Nothing is computed. Its reports hold the numbers of the epochs alone;
- ray-whole: the same where every report also holds the trial's own columns (outcome, cause, best values, times and so
  on), as trials of this package report them: without them the tables could not be made;
- report: this package's report as a file, of a study with signals.

Imports are not counted, and none is made that a side does not need. Memory is the most that the process ever held,
imports included.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIDES = ("package", "ray", "ray-whole", "report")
READERS = ("ray", "ray-whole")
BASELINE = "ray"
EPOCHS = 200
RAY_TRIALS = (100, 1000)
"""Trials that Ray Tune's classes read; the package reads as many beside them, in turn."""
REPORT_TRIALS = 1000
SIGNALS_EVERY = 10
"""Iterations from one kept signal to the next, in the study of the report."""
ROUNDS = 3


class _Clock:
    """Notes wall and CPU time of parts, one after another."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def part(self, name: str) -> None:
        """What was done since the last part."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.parts[name] = {"seconds": wall - self._wall, "cpu_seconds": cpu - self._cpu}
        self._wall, self._cpu = wall, cpu


def _run_package(folder: Path) -> _Clock:
    import analysis
    from analysis.figures.export import figure_drawings
    from analysis.tables.paper import build_tables

    clock = _Clock()
    results = analysis.load(folder)
    clock.part("load")
    build_tables(results)
    clock.part("tables")
    rows = sum(len(drawing.table) for drawing in figure_drawings(results))
    if not rows:
        raise RuntimeError(f"{folder}: no figure has any data")
    clock.part("figures")
    return clock


def _run_ray(folder: Path) -> _Clock:
    from ray.tune import ExperimentAnalysis

    clock = _Clock()
    analysis = ExperimentAnalysis(str(folder))
    rows = sum(len(frame) for frame in analysis.trial_dataframes.values())
    if not rows or len(analysis.dataframe()) != len(analysis.trials):
        raise RuntimeError(f"{folder}: Ray read {rows} reports of {len(analysis.trials)} trials")
    clock.part("load")
    return clock


def _run_report(folder: Path) -> _Clock:
    import analysis
    from analysis.report.page import write_report

    clock = _Clock()
    with tempfile.TemporaryDirectory() as scratch:
        write_report(analysis.load(folder), Path(scratch) / "report.html")
    clock.part("report")
    return clock


_RUN = {"package": _run_package, "ray": _run_ray, "ray-whole": _run_ray, "report": _run_report}


def run_side(side: str, folder: Path) -> dict[str, Any]:
    """Run one side once, in this process.

    Args:
        side: one of `SIDES`.
        folder: of the study, as this side reads it.

    Returns:
        `parts`: by name their `seconds` and `cpu_seconds`; the sums `seconds` and `cpu_seconds`; `peak_bytes`.
    """
    parts = _RUN[side](folder).parts
    sums = {name: sum(p[name] for p in parts.values()) for name in ("seconds", "cpu_seconds")}
    return {"parts": parts, **sums, "peak_bytes": _peak()}


def _peak() -> int:
    """Most memory this process has held; `getrusage` would count what its parent held when it started this one."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def write_ray_study(study: Path, folder: Path, *, whole: bool = False) -> None:
    """Write a study of this package as Ray Tune leaves one: its state, and every trial's reports as lines of JSON.

    A report holds what a row of `epochs.parquet` holds (null is left out), the trial's varied fields as `config`, and
    what Ray adds to every report.

    Args:
        study: folder of the study.
        folder: where to; its last two parts are Ray's storage path and the experiment's name.
        whole: every report also holds the trial's columns, as they are in the end.
    """
    import pyarrow.parquet as pq
    from ray.train._internal.storage import StorageContext
    from ray.tune import PlacementGroupFactory
    from ray.tune.experiment import Trial
    from ray.tune.utils.serialization import TuneFunctionEncoder

    from benchmarks.driver_vs_ray import DRIVERS
    from benchmarks.synthetic_study import VARIED
    from trainables.results.schema import TRIAL_COLUMNS

    folder.mkdir(parents=True)
    own = [c.name for c in TRIAL_COLUMNS if c.name not in DRIVERS] if whole else []
    trials = pq.read_table(study / "trials.parquet", columns=["trial_id", "seed", *VARIED, *own]).to_pylist()
    epochs = pq.ParquetFile(study / "epochs.parquet")
    kept: list[dict[str, Any]] = []
    states = []
    batches = epochs.iter_batches(batch_size=20_000)
    for values in trials:
        name, columns = values.pop("trial_id"), {n: values.pop(n) for n in own}
        while not kept or kept[-1]["trial_id"] == name:  # rows lie trial by trial
            batch = next(batches, None)
            if batch is None:
                break
            kept += batch.to_pylist()
        count = next((n for n, row in enumerate(kept) if row["trial_id"] != name), len(kept))
        rows, kept = kept[:count], kept[count:]
        storage = StorageContext(str(folder.parent), experiment_dir_name=folder.name, trial_dir_name=name)
        trial: Any = Trial(
            "generated",
            config=values,
            trial_id=name,
            stub=True,
            storage=storage,
            experiment_tag=name,
        )
        trial.placement_group_factory = PlacementGroupFactory([{"CPU": 1}])
        trial.relative_logdir = name
        (folder / name).mkdir()
        (folder / name / "params.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
        reports = [_as_ray_report({**columns, **row}, values, n) for n, row in enumerate(rows, 1)]
        lines = "".join(json.dumps(report) + "\n" for report in reports)
        (folder / name / "result.json").write_text(lines, encoding="utf-8")
        trial.run_metadata.last_result = reports[-1]
        trial.set_status(Trial.TERMINATED)
        states.append(trial.get_json_state())
    state = {"trial_data": states, "runner_data": {}, "stats": {"start_time": 0.0}}
    with (folder / "experiment_state-2025-01-02_03-04-05.json").open("w", encoding="utf-8") as file:
        json.dump(state, file, cls=TuneFunctionEncoder)


def _as_ray_report(row: Mapping[str, Any], config: Mapping[str, Any], number: int) -> dict[str, Any]:
    values = {name: value for name, value in row.items() if value is not None and name not in ("study", "trial_id")}
    spent = row["train_seconds"] or 0.0
    return {
        **values,
        "timestamp": 1_735_787_045 + number,
        "checkpoint_dir_name": None,
        "done": False,
        "training_iteration": number,
        "trial_id": row["trial_id"],
        "date": "2025-01-02_03-04-05",
        "time_this_iter_s": spent,
        "time_total_s": row["seconds"],
        "pid": 12345,
        "hostname": "node",
        "node_ip": "10.0.0.1",
        "config": dict(config),
        "time_since_restore": row["seconds"],
        "iterations_since_restore": number,
        "experiment_tag": "generated",
    }


# ---------------------------------------------------------------------------------------------------- together


def _own_process(side: str, folder: Path) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.analysis_vs_ray", side, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"{side}: {result.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def time_reading(
    trials: int = 10_000,
    *,
    ray_trials: Sequence[int] = RAY_TRIALS,
    report_trials: int = REPORT_TRIALS,
    epochs: int = EPOCHS,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Generated studies through this package and through Ray Tune's own classes, in turn.

    Args:
        trials: of the study that only the package reads.
        ray_trials: of the studies that both read, the order of the sides turned round by round.
        report_trials: of the study whose report is written.
        epochs: of a trial in the mean.
        rounds: of every size.

    Returns:
        `runs`, in their order: `side`, `trials`, `round` and what `run_side` gives. And what follows from them; see
        `summary`.
    """
    from benchmarks.synthetic_study import generate_study

    runs: list[dict[str, Any]] = []

    def run(side: str, count: int, number: int, folder: Path) -> None:
        runs.append({"side": side, "trials": count, "round": number, **_own_process(side, folder)})

    for count in sorted(ray_trials):
        with tempfile.TemporaryDirectory() as text:
            folders = {"package": Path(text) / "package"} | {side: Path(text) / side / "run" for side in READERS}
            generate_study(folders["package"], count, epochs)
            for side in READERS:
                write_ray_study(folders["package"], folders[side], whole=side == "ray-whole")
            for number in range(rounds):
                for side in list(folders)[:: 1 if number % 2 else -1]:
                    run(side, count, number, folders[side])
    alone: list[tuple[str, int, int | None]] = [("report", report_trials, SIGNALS_EVERY)]
    if trials not in ray_trials:  # else it has been read, in turn with Ray
        alone.insert(0, ("package", trials, None))
    for side, count, every in alone:
        with tempfile.TemporaryDirectory() as text:
            generate_study(Path(text) / side, count, epochs, signals_every=every)
            for number in range(rounds):
                run(side, count, number, Path(text) / side)
    return {"epochs": epochs, "cores": len(os.sched_getaffinity(0)), "runs": runs, **summary(runs)}


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What runs say, as medians over rounds.

    Returns:
        Per side `sides`, and in it per number of trials `seconds`, `cpu_seconds`, `peak_gigabytes` and `parts` (their
        seconds). Per number of trials that Ray reads too `ratios`: `load_over_ray_baseline` is the package's time to
        load over Ray's to read, `all_over_ray_baseline` that of loading, all tables and all figures; and the same over
        `ray-whole`. And `growth` per side: the exponent of time over trials between the two largest sizes.
    """
    sides: dict[str, dict[str, Any]] = {}
    for side in dict.fromkeys(r["side"] for r in runs):
        sizes = sorted({r["trials"] for r in runs if r["side"] == side})
        sides[side] = {str(n): _medians([r for r in runs if r["side"] == side and r["trials"] == n]) for n in sizes}
    ratios: dict[str, dict[str, float]] = {}
    for size in dict.fromkeys(str(r["trials"]) for r in runs if r["side"] in READERS):
        rounds: dict[int, dict[str, Mapping[str, Any]]] = {}
        for r in runs:
            if str(r["trials"]) == size:
                rounds.setdefault(r["round"], {})[r["side"]] = r
        for side in READERS:
            pairs = [(found["package"], found[side]) for found in rounds.values() if {"package", side} <= found.keys()]
            if pairs:
                load = statistics.median(ours["parts"]["load"]["seconds"] / rays["seconds"] for ours, rays in pairs)
                whole = statistics.median(ours["seconds"] / rays["seconds"] for ours, rays in pairs)
                found = {f"load_over_{side}_baseline": load, f"all_over_{side}_baseline": whole}
                ratios.setdefault(size, {}).update(found)
    return {"sides": sides, "ratios": ratios, "growth": {s: _growth(found) for s, found in sides.items()}}


def _medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "seconds": statistics.median(r["seconds"] for r in runs),
        "cpu_seconds": statistics.median(r["cpu_seconds"] for r in runs),
        "peak_gigabytes": statistics.median(r["peak_bytes"] for r in runs) / 1e9,
        "parts": {name: statistics.median(r["parts"][name]["seconds"] for r in runs) for name in runs[0]["parts"]},
    }


def _growth(found: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Exponent of time over trials between the two largest sizes; None where there is one size."""
    sizes = sorted(int(n) for n in found)[-2:]
    if len(sizes) < 2:
        return None
    times = [found[str(n)]["seconds"] for n in sizes]
    return math.log(times[1] / times[0]) / math.log(sizes[1] / sizes[0])


def lines(found: Mapping[str, Any]) -> list[str]:
    """The figures of `time_reading` for people."""
    said = []
    for size, ratio in found["ratios"].items():
        for side, what in zip(READERS, ("the epochs' numbers", "them with the trials' own columns"), strict=True):
            if f"load_over_{side}_baseline" in ratio:
                load, whole = (1 / ratio[f"{part}_over_{side}_baseline"] for part in ("load", "all"))
                said.append(
                    f"{size} trials of {found['epochs']} epochs: to read {what} Ray Tune's ExperimentAnalysis takes "
                    f"{load:.3g} times what loading takes here, {whole:.3g} times loading, all tables and all figures"
                )
    for side, sizes in found["sides"].items():
        for size, numbers in sizes.items():
            parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in numbers["parts"].items())
            said.append(
                f"{side}, {size} trials: {numbers['seconds']:.2f} s ({parts}), {numbers['cpu_seconds']:.2f} s of CPU, "
                f"{numbers['peak_gigabytes']:.2f} GB at most"
            )
        if found["growth"][side] is not None:
            said.append(f"{side}: time grows with trials to the power {found['growth'][side]:.2f}")
    return said


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in SIDES:
        sys.stdout.write(json.dumps(run_side(sys.argv[1], Path(sys.argv[2]))) + "\n")
    else:  # imported here: a side's process holds nothing that the side does not need
        from benchmarks.commands import run_comparison

        run_comparison("analysis", __doc__, time_reading, lines)
