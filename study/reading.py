"""What the analysis of a large study takes, beside reading the same study with Ray Tune's own classes.

A generated study (`study.generated`) is written twice: as this package leaves a study, and as Ray Tune leaves one, with
a folder per trial and a line of JSON per report in it. Then, each time in a process of its own:

- package: the study is loaded, Tables 1-6 and the table of settings are built, and every figure of the report with its
  data;
- ray: `ray.tune.ExperimentAnalysis` reads it (what `ResultGrid` reads through) and gives the frame of last reports.
  Nothing is computed;
- report: this package's report as a file, of a study with signals.

Imports are not counted. Memory is the most that the process ever held, imports included.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study.generated import VARIED, generate_study

SIDES = ("package", "ray", "report")
BASELINE = "ray"
EPOCHS = 200
RAY_TRIALS = (100, 300, 1000)
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
    from analysis.export import figure_drawings
    from analysis.tables import build_tables

    clock = _Clock()
    results = analysis.load(folder)
    clock.part("load")
    build_tables(results)
    clock.part("tables")
    rows = sum(len(drawing.table) for _, _, drawing in figure_drawings(results))
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
    from analysis.report import write_report

    clock = _Clock()
    with tempfile.TemporaryDirectory() as scratch:
        write_report(analysis.load(folder), Path(scratch) / "report.html")
    clock.part("report")
    return clock


_RUN = {"package": _run_package, "ray": _run_ray, "report": _run_report}


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
    # In kilobytes on Linux.
    return {"parts": parts, **sums, "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def write_ray_study(study: Path, folder: Path) -> None:
    """Write a study of this package as Ray Tune leaves one: its state, and every trial's reports as lines of JSON.

    A report holds what a row of `epochs.parquet` holds (null is left out), the trial's varied fields as `config`, and
    what Ray adds to every report.

    Args:
        study: folder of the study.
        folder: where to; its last two parts are Ray's storage path and the experiment's name.
    """
    import pyarrow.parquet as pq
    from ray.train._internal.storage import StorageContext
    from ray.tune import PlacementGroupFactory
    from ray.tune.experiment import Trial
    from ray.tune.utils.serialization import TuneFunctionEncoder

    folder.mkdir(parents=True)
    trials = pq.read_table(study / "trials.parquet", columns=["trial_id", "seed", *VARIED]).to_pylist()
    epochs = pq.ParquetFile(study / "epochs.parquet")
    kept: list[dict[str, Any]] = []
    states = []
    batches = epochs.iter_batches(batch_size=20_000)
    for values in trials:
        name = values.pop("trial_id")
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
        reports = [_as_ray_report(row, values, n) for n, row in enumerate(rows, 1)]
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
        [sys.executable, "-m", "study.reading", side, str(folder)], capture_output=True, text=True, check=False
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
    runs: list[dict[str, Any]] = []

    def run(side: str, count: int, number: int, folder: Path) -> None:
        runs.append({"side": side, "trials": count, "round": number, **_own_process(side, folder)})

    for count in sorted(ray_trials):
        with tempfile.TemporaryDirectory() as text:
            folders = {"package": Path(text) / "package", "ray": Path(text) / "ray" / "run"}
            generate_study(folders["package"], count, epochs)
            write_ray_study(folders["package"], folders["ray"])
            for number in range(rounds):
                for side in ("package", "ray") if number % 2 else ("ray", "package"):
                    run(side, count, number, folders[side])
    for side, count, every in (("package", trials, None), ("report", report_trials, SIGNALS_EVERY)):
        with tempfile.TemporaryDirectory() as text:
            generate_study(Path(text) / side, count, epochs, signals_every=every)
            for number in range(rounds):
                run(side, count, number, Path(text) / side)
    return {"epochs": epochs, "cores": len(os.sched_getaffinity(0)), "runs": runs, **summary(runs)}


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What runs say, as medians over rounds.

    Returns:
        Per side `sides`, and in it per number of trials `seconds`, `cpu_seconds`, `peak_gigabytes` and `parts` (their
        seconds). Per number of trials that both sides read `ratios`: `load_over_ray_baseline` is the package's time to
        load over Ray's to read, `all_over_ray_baseline` that of loading, all tables and all figures. And `growth` per
        side: the exponent of time over trials between the two largest sizes.
    """
    sides: dict[str, dict[str, Any]] = {}
    for side in dict.fromkeys(r["side"] for r in runs):
        sizes = sorted({r["trials"] for r in runs if r["side"] == side})
        sides[side] = {str(n): _medians([r for r in runs if r["side"] == side and r["trials"] == n]) for n in sizes}
    ratios = {}
    for size in sides.get("ray", {}):
        rounds: dict[int, dict[str, Mapping[str, Any]]] = {}
        for r in runs:
            if str(r["trials"]) == size and r["side"] in ("package", "ray"):
                rounds.setdefault(r["round"], {})[r["side"]] = r
        pairs = [found for found in rounds.values() if len(found) == 2]
        if pairs:
            load = [p["package"]["parts"]["load"]["seconds"] / p["ray"]["seconds"] for p in pairs]
            whole = [p["package"]["seconds"] / p["ray"]["seconds"] for p in pairs]
            ratios[size] = {
                "load_over_ray_baseline": statistics.median(load),
                "all_over_ray_baseline": statistics.median(whole),
            }
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
    said = [
        f"{size} trials of {found['epochs']} epochs: loading takes {ratio['load_over_ray_baseline']:.4f} times "
        f"(1/{1 / ratio['load_over_ray_baseline']:.3g}) what Ray Tune's ExperimentAnalysis takes to read them; "
        f"loading, all tables and all figures {ratio['all_over_ray_baseline']:.3f} times "
        f"(1/{1 / ratio['all_over_ray_baseline']:.3g})"
        for size, ratio in found["ratios"].items()
    ]
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
    sys.stdout.write(json.dumps(run_side(sys.argv[1], Path(sys.argv[2]))) + "\n")
