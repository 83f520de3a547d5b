"""Which trials `mebm figures` shows the models of, and what it reads of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from analysis.load import Results, records
from study.errors import UserError, nearest, one_line
from trainables import exhibits
from trainables.datasets import ImageData
from trainables.exhibits import LogP, Scores
from trainables.files import UnsafePathError, within
from trainables.initial import Initial
from trainables.saved import SavedModel, load_model
from trainables.schema import METRIC_BY_NAME, METRICS, Outcome

_RANKING = ("fid_buffer", "fd_buffer", "fid_fresh", "fd_fresh", "accuracy")
"""Metrics by which the best model of a method is chosen: the first it has."""


@dataclass(frozen=True)
class Chosen:
    """A trial whose model is shown.

    Attributes:
        key: its name in files.
        label: its name in figures.
    """

    study: str
    trial_id: str
    path: Path
    setting_id: str
    key: str
    label: str

    @property
    def columns(self) -> dict[str, str]:
        """Its columns in every table of a figure."""
        return {"study": self.study, "trial_id": self.trial_id, "model": self.label}


def choose(results: Results, trials: Sequence[str] = (), best: Sequence[str] = ()) -> list[Chosen]:
    """The trials whose models are shown; see `study.exhibits.make_figures`.

    Raises:
        UserError: an unknown trial or metric, or a trial without a model.
    """
    if trials and best:
        raise UserError("--trials and --best: give one of them")
    rows = records(results.trials)
    for row in rows:
        row["path"] = _model_file(results.folders[row["study"]], row["trial_id"])
    picked = _named(rows, trials) if trials else _best(rows, best)
    labels = [row["method"] for row in picked]
    labels = _told_apart(labels, [f"{r['method']} {r['trial_id']}" for r in picked])
    labels = _told_apart(labels, [f"{r['method']} {r['study']}/{r['trial_id']}" for r in picked])
    alone = len(results.studies) == 1
    found: list[Chosen] = []
    for row, label in zip(picked, labels, strict=True):
        name = row["trial_id"] if alone else f"{row['study']}_{row['trial_id']}"
        key = re.sub(r"[^\w.-]", "_", name).lstrip(".")  # it becomes a folder: never "..", nor a hidden one
        while not key or key in {one.key for one in found}:
            key += "_"
        found.append(Chosen(row["study"], row["trial_id"], row["path"], row["setting_id"], key, label))
    return found


def _model_file(folder: Path, trial_id: str) -> Path | None:
    """Where a trial's model is; None where its id, text that somebody wrote, names a file elsewhere."""
    with suppress(UnsafePathError):
        return None if "/" in trial_id else within(folder, f"models/{trial_id}.pt")
    return None


def _told_apart(names: list[str], longer: list[str]) -> list[str]:
    return [more if names.count(name) > 1 else name for name, more in zip(names, longer, strict=True)]


def _named(rows: list[dict[str, Any]], wanted: Sequence[str]) -> list[dict[str, Any]]:
    picked: list[dict[str, Any]] = []
    for name in wanted:
        found = [r for r in rows if name in (r["trial_id"], f"{r['study']}/{r['trial_id']}")]
        if not found:
            raise UserError(f"--trials {name}: no such trial{nearest(name, [r['trial_id'] for r in rows])}")
        having = [r for r in found if _has_model(r)]
        if not having:
            where = f"({found[0]['path']})" if found[0]["path"] is not None else "(its id is no name of a file)"
            raise UserError(
                f"--trials {name}: it {found[0]['outcome']} and left no model {where}; a trial leaves one "
                "when it completes"
            )
        picked += [r for r in having if r not in picked]
    return picked


def _has_model(row: dict[str, Any]) -> bool:
    return row["path"] is not None and row["path"].is_file()


def _best(rows: list[dict[str, Any]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    for name in metrics:
        if name not in METRIC_BY_NAME:
            known = [m.name for m in METRICS]
            raise UserError(f"--best {name}: unknown metric{nearest(name, known)}; metrics: {', '.join(known)}")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["outcome"] == Outcome.COMPLETED and _has_model(row):
            groups.setdefault((row["study"], row["method"]), []).append(row)
    picked: list[dict[str, Any]] = []
    for group in groups.values():
        # The model is that of the last epoch, so its last value ranks it and not the best one of its course.
        having = [name for name in _RANKING if any(r[f"{name}_last"] is not None for r in group)]
        for name in metrics or having[:1]:
            sign = 1 if METRIC_BY_NAME[name].direction == "minimize" else -1
            scored = [r for r in group if r[f"{name}_last"] is not None]
            first = min(scored, key=lambda r: sign * r[f"{name}_last"], default=None)
            picked += [first] if first is not None and first not in picked else []
        if not metrics and not having:
            picked.append(group[0])
    return picked


@dataclass
class Work:
    """One run of the command: what it reads, every model once, and why something could not be made.

    Attributes:
        by_hand: the trials were named, or chosen by a metric that was named.
        notes: one line for everything that is left out.
    """

    results: Results
    chosen: list[Chosen]
    out: Path
    log_p: LogP | None
    points: int
    device: torch.device
    by_hand: bool
    notes: list[str] = field(default_factory=list)
    models: dict[str, SavedModel] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)

    def model(self, one: Chosen) -> SavedModel:
        """The model of a trial.

        Raises:
            UserError: its file cannot be used.
        """
        if one.key not in self.models:
            try:
                self.models[one.key] = load_model(one.path, self.device)
            except ValueError as error:
                raise UserError(one_line(error)) from error
        return self.models[one.key]

    def note(self, kind: str, one: Chosen, why: object) -> None:
        """Say that something of a model is left out, and why."""
        self.notes.append(one_line(f"{kind} of {one.label}: {why}"))

    def with_samples(self, kind: str) -> Iterable[tuple[Chosen, SavedModel]]:
        """The models that have samples; the others are noted."""
        for one in self.chosen:
            saved = self.model(one)
            if len(saved.samples):
                yield one, saved
            else:
                self.note(kind, one, f"{saved.config.method} makes no samples")

    def data(self, kind: str, one: Chosen) -> ImageData | None:
        """The images of a model; None, and a note, where they are not to be had."""
        try:
            return exhibits.load_data(self.model(one))
        except ValueError as error:
            self.note(kind, one, error)
            return None

    def score(self, kind: str, one: Chosen) -> tuple[Scores, LogP] | None:
        """Scores of the samples; None, and a note, where the model has not what was asked for."""
        saved = self.model(one)
        try:
            log_p = exhibits.choose_log_p(saved.config, self.log_p)
        except ValueError as error:
            self.note(kind, one, error)
            return None
        if one.key not in self.scores:
            self.scores[one.key] = exhibits.score_images(saved, saved.samples, log_p)
        return self.scores[one.key], log_p

    def initial(self, kind: str, one: Chosen, data: ImageData) -> Initial | None:
        """p0 of a model; None, and a note, where it has none."""
        saved = self.model(one)
        try:
            initial = exhibits.load_initial(saved, data)
        except ValueError as error:
            self.note(kind, one, error)
            return None
        if initial is None:
            self.note(kind, one, f"{saved.config.method} has no p0")
        return initial
