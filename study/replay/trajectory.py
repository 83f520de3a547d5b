"""What a study recorded of each trial, as a replay reads it: reports with their times and scores, and how it ended."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from analysis.detector.replay import Recording
from analysis.results.load import Results, current_epochs
from analysis.results.messages import plural, printable
from analysis.results.own import BUILT_IN, kind_of
from analysis.results.parquet import records
from analysis.stats.comparison.candidates import one_protocol
from analysis.stats.trials.trial import ENDED_BADLY, Trial, configuration
from study.config.errors import UserError
from study.record.journal_reader import JournalReader
from trainables.config.parts import DivergenceConfig
from trainables.results.bounded import parse_json
from trainables.results.layout import JOURNAL
from trainables.results.schema import Cause, Metric, Outcome

IMPORTED = "imported"


@dataclass(frozen=True)
class Report:
    """An epoch that a trial finished: its number, iterations done, seconds since the trial's start, and its scores.

    `next_seconds` is the length of this epoch, by which a budget judges whether another fits.
    """

    epoch: int
    iteration: int
    seconds: float
    next_seconds: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Trajectory:
    """A recorded trial.

    Attributes:
        reports: in order, epoch 0 (the untrained model) included.
        iteration: of its verdict; None where it did not end badly.
        iterations: recorded, and `planned` for its whole budget; None where that was not recorded.
        epochs: in its whole budget, which pruning needs to know.
        seconds: from its start to its end, set-up included, work that was lost not. Of recordings without times, its
            iterations: they order events and are no time.
        pace: seconds per iteration, evaluation included.
        divergence: the rule that judged it; None: of a script, which judges itself.
        config: its settings by dotted names.
        row: its columns of `trials.parquet`.
        begun: iteration that it went on from: of a rescue that of its healthy state, else 0.
        rescues: what was recorded of its rescues, in their order, each a trajectory.
        rescue_failed: its rescue failed with an error: no other follows, and what it took is left out.
    """

    trial_id: str
    setting: str
    seed: int | None
    outcome: Outcome
    cause: str | None
    iteration: int | None
    reports: tuple[Report, ...]
    iterations: int
    planned: int | None
    epochs: int
    seconds: float
    pace: float | None
    gpus: float
    divergence: DivergenceConfig | None
    config: Mapping[str, Any]
    row: Trial
    begun: int = 0
    rescues: tuple[Trajectory, ...] = ()
    rescue_failed: bool = False

    @property
    def ended_badly(self) -> bool:
        """Whether it diverged or collapsed."""
        return self.outcome in ENDED_BADLY

    @property
    def judged_by_signals(self) -> bool:
        """Whether its bad end is the detector's verdict on its signals, and not the quality of its last samples."""
        return self.ended_badly and self.cause != Cause.WORSE_THAN_P0

    @property
    def left(self) -> int | None:
        """Iterations of its plan that were never recorded; None where the plan is not known."""
        return None if self.planned is None else max(0, self.planned - self.iterations)

    def seconds_at(self, iteration: int) -> float:
        """When it had done so many iterations; between two reports time is shared out evenly."""
        before = max((r for r in self.reports if r.iteration <= iteration), key=lambda r: r.iteration, default=None)
        at, seconds = (before.iteration, before.seconds) if before else (self.begun, 0.0)
        after = next((r for r in self.reports if r.iteration > iteration), None)
        end, until = (after.iteration, after.seconds) if after else (self.iterations, self.seconds)
        return seconds + (until - seconds) * (iteration - at) / (end - at) if end > at else seconds


@dataclass(frozen=True)
class Recorded:
    """The trials of a study in the order in which they started.

    Attributes:
        trajectories: of the trials of the search; those of rescues are in theirs.
        timed: whether times were recorded; an import has none.
        at_once: most trials that ran at the same time.
        recordings: signals by trial id, read when they are asked for; none of trials whose signals were not kept.
    """

    study: str
    trajectories: tuple[Trajectory, ...]
    timed: bool
    at_once: int
    kind: str
    manifest: Mapping[str, Any]
    results: Results


def read_recorded(results: Results) -> Recorded:
    """The trajectories of the one study in `results`.

    Raises:
        UserError: there are several studies, or no trial that trained.
    """
    if len(results.studies) != 1:
        raise UserError(f"one study is replayed at a time, but there are {', '.join(map(repr, results.studies))}")
    study = results.studies[0]
    results = with_rescues(results)
    rows = [t for t in records(results.trials) if t["outcome"] not in (Outcome.PENDING, Outcome.FAILED)]
    if left := len(results.trials) - len(rows):
        results.note(f"{left} trials never began or failed with an error, which says nothing of them; left out")
    kinds = {kind_of(t["config"]) for t in rows}
    kind = kinds.pop() if len(kinds) == 1 else BUILT_IN
    epochs = _epochs(results, rows)
    spacing = _spacing(epochs.values()) if kind == IMPORTED else None
    found = [t for row in rows if (t := _trajectory(results, row, epochs[row["trial_id"]], spacing)) is not None]
    if not found:
        raise UserError(f"{study}: no trial has recorded an epoch or an iteration")
    timed = any(t.row["train_seconds"] for t in found)
    if timed and (without := [t for t in found if t.iterations and t.row["train_seconds"] is None]):
        results.note(f"{plural(len(without), 'trial')} trained, but nobody recorded for how long; left out")
        found = [t for t in found if not t.iterations or t.row["train_seconds"] is not None]
    if spacing is not None:
        longest = max(r.epoch for t in found for r in t.reports) if any(t.reports for t in found) else 0
        found = [replace(t, epochs=max(t.epochs, longest + (t.planned is None))) for t in found]
    started, at_once = _starts(results, study, rows)
    found.sort(key=lambda t: started[t.trial_id])
    failed = {(t["rescue_of"], t["rescue"]) for t in records(results.trials) if t["outcome"] == Outcome.FAILED}
    return Recorded(study, _rescued(found, failed), timed, at_once, kind, results.manifests[study], results)


def with_rescues(results: Results) -> Results:
    """The same results with every rescue among the trials."""
    if not len(results.rescues):
        return results
    return replace(
        results,
        trials=pd.concat([results.trials, results.rescues], ignore_index=True),
        epochs=pd.concat([results.epochs, results.rescue_epochs], ignore_index=True),
    )


def _rescued(found: Sequence[Trajectory], failed: Collection[tuple[str, int]]) -> tuple[Trajectory, ...]:
    """The trials of the search, each with its rescues up to the first that was not recorded, or `failed`."""
    rescues = {(t.row["rescue_of"], t.row["rescue"]): t for t in found if t.row["rescue"] is not None}
    trials = []
    for trial in found:
        if trial.row["rescue"] is not None:
            continue
        runs = [trial]
        while (following := rescues.get((trial.trial_id, len(runs)))) is not None:
            runs.append(following)
        if (trial.trial_id, len(runs)) in failed:
            runs[-1] = replace(runs[-1], rescue_failed=True)
        trials.append(replace(runs[0], rescues=tuple(runs[1:])))
    return tuple(trials)


def _others(results: Results, metric: Metric, trials: Sequence[Trial]) -> frozenset[str]:
    """Trials that were scored under another protocol than most: such scores have no common order."""
    kept, notes = one_protocol(trials, metric)
    for note in notes:
        results.note(f"{metric.name}: {note}")
    return frozenset(t["trial_id"] for t in trials) - {t["trial_id"] for t in kept}


def _epochs(results: Results, trials: Sequence[Trial]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    frame = current_epochs(results.epochs)
    names = ["trial_id", "epoch", "iteration", "seconds", "train_seconds", "evaluation_seconds"]
    metrics = [m.name for m in results.metrics(directed=True)]
    others = {m.name: _others(results, m, trials) for m in results.metrics(directed=True)}
    for row in records(frame[[*names, *(n for n in metrics if n in frame)]]):
        row["values"] = {
            n: float(row[n]) for n in metrics if row.get(n) is not None and row["trial_id"] not in others[n]
        }
        found[row["trial_id"]].append(row)
    return found


def _spacing(epochs: Iterable[list[dict[str, Any]]]) -> int:
    """Iterations between two scores of an import, whose rows are numbered as they come and may have gaps."""
    steps = [
        b["iteration"] - a["iteration"] for rows in epochs for a, b in pairwise(rows) if b["iteration"] > a["iteration"]
    ]
    return min(steps, default=1)


def _trajectory(
    results: Results, row: dict[str, Any], epochs: list[dict[str, Any]], spacing: int | None
) -> Trajectory | None:
    iterations = row["iterations_done"] or 0
    if iterations == 0 and not epochs:
        return None
    timed = row["train_seconds"] is not None
    start = float(row["setup_seconds"] or 0.0)
    reports = []
    for e in epochs:
        at = start + (e["seconds"] or 0.0) if timed else float(e["iteration"])
        length = (e["train_seconds"] or 0.0) + (e["evaluation_seconds"] or 0.0) if e["epoch"] else 0.0
        number = e["epoch"] if spacing is None else round(e["iteration"] / spacing)
        reports.append(Report(number, e["iteration"], at, length, e["values"]))
    begun = row["rescue_from"] or 0
    spent = start + (row["train_seconds"] or 0.0) + (row["evaluation_seconds"] or 0.0)
    planned = row["iterations_planned"]
    if spacing is None and reports and planned:
        last = reports[-1]
        each = row["iterations_per_epoch"] or max(1, last.iteration / max(1, last.epoch))
        in_all = int(planned // each)
    else:
        in_all = math.ceil(planned / spacing) if planned and spacing else 0
    outcome = Outcome(row["outcome"])
    return Trajectory(
        trial_id=row["trial_id"],
        setting=row["setting_id"] or row["trial_id"],
        seed=row["seed"],
        outcome=outcome,
        cause=row["cause"],
        iteration=row["iteration"] if outcome in ENDED_BADLY else None,
        reports=tuple(reports),
        iterations=iterations,
        planned=planned,
        epochs=in_all,
        seconds=max([spent if timed else float(iterations), *(r.seconds for r in reports)]),
        pace=(spent - start) / (iterations - begun) if timed and iterations > begun else None,
        gpus=row["gpus"] or 0.0,
        divergence=_divergence(results, row),
        config=configuration(row["config"]),
        row=row,
        begun=begun,
    )


def _divergence(results: Results, row: Mapping[str, Any]) -> DivergenceConfig | None:
    """The rule that judged a trial, from its configuration; an import names its rule beside it."""
    config = parse_json(row["config"]) if row["config"] else {}
    kind = kind_of(row["config"])
    if not isinstance(config, dict) or kind not in (BUILT_IN, IMPORTED):
        return None
    told = config.get("divergence") or {}
    if kind == IMPORTED:
        told = {} if row.get("own.rule") == "m-ebm" else {"rule": "learnt", "learn_from": config.get("learn_from") or 0}
    try:
        return DivergenceConfig.model_validate(told)
    except ValidationError:
        results.note(f"{printable(row['trial_id'])}: its divergence rule cannot be read; its recorded end stands")
        return None


def _starts(results: Results, study: str, rows: list[dict[str, Any]]) -> tuple[dict[str, tuple[Any, ...]], int]:
    """What orders trials by their starts, and how many ran at once: from the journal, else from times.

    Times have whole seconds; trials that started in the same one stand by their ids.
    """
    folder = results.folders[study]
    if (folder / JOURNAL).is_file():
        journal = JournalReader(folder, study)
        place = {trial_id: (0, i) for i, trial_id in enumerate(journal.trials)}
        return {t["trial_id"]: place.get(t["trial_id"], (1, 0)) for t in rows}, max(1, journal.at_once)
    order = {t["trial_id"]: (t["started_at"] or "", t["trial_id"]) for t in rows}
    spans = [(t["started_at"], t["ended_at"]) for t in rows if t["started_at"] and t["ended_at"]]
    overlaps = [sum(a <= start < b for a, b in spans) for start, _ in spans]
    return order, max([1, *overlaps])


def signals_of(recordings: Iterable[Recording], study: str, trials: Iterable[Trajectory] = ()) -> dict[str, Recording]:
    """Recordings by the ids of their trials; of their rescues with what came before the healthy state.

    The detector goes on with what it had seen until then.
    """
    found = {r.run.removeprefix(f"{study}/"): r for r in recordings}
    for trial in trials:
        for before, after in pairwise((trial, *trial.rescues)):
            if after.begun and before.trial_id in found and after.trial_id in found:
                found[after.trial_id] = _continued(found[before.trial_id], found[after.trial_id], after.begun)
    return found


def _continued(before: Recording, after: Recording, begun: int) -> Recording:
    kept = before.signals["iteration"] < begun
    names = after.signals.keys() & before.signals.keys()
    signals = {n: np.concatenate([before.signals[n][kept], after.signals[n]]) for n in after.signals if n in names}
    return replace(after, signals=signals)
