"""Which trials `mebm figures` shows the models of, and what it reads of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from analysis.results.load import Results
from analysis.results.parquet import records
from study.config.errors import UserError, nearest, one_line
from trainables.data.datasets import ImageData
from trainables.models import views as exhibits
from trainables.models.model_file import SavedModel, load_model
from trainables.models.views import LogP, Scores
from trainables.results.files import UnsafePathError, within
from trainables.results.schema import METRIC_BY_NAME, METRICS, RANKING, Outcome
from trainables.sampling.initial import Initial

T = TypeVar("T")


@dataclass(frozen=True)
class Chosen:
    """A trial whose model is shown: as `key` in files, as `label` in figures."""

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
    """The trials whose models are shown; see `make_figures`. UserError: an unknown trial or metric, no model."""
    if trials and best:
        raise UserError("--trials and --best: give one of them")
    rows = records(results.trials)
    rescued = records(results.rescues)  # shown where they are named, and never the best of a study's
    for row in (*rows, *rescued):
        row["path"] = _model_file(results.folders[row["study"]], row["trial_id"])
    picked = _named([*rows, *rescued], trials) if trials else _best(rows, best)
    labels = [row["method"] for row in picked]
    for longer in ("{method} {trial_id}", "{method} {study}/{trial_id}"):
        rows_of = zip(labels, picked, strict=True)
        labels = [longer.format_map(row) if labels.count(name) > 1 else name for name, row in rows_of]
    found: list[Chosen] = []
    for row, label in zip(picked, labels, strict=True):
        name = row["trial_id"] if len(results.studies) == 1 else f"{row['study']}_{row['trial_id']}"
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


def _named(rows: list[dict[str, Any]], wanted: Sequence[str]) -> list[dict[str, Any]]:
    picked: list[dict[str, Any]] = []
    for name in wanted:
        found = [r for r in rows if name in (r["trial_id"], f"{r['study']}/{r['trial_id']}")]
        if not found:
            ids = [str(r["trial_id"]) for r in rows]
            there = f"; there are {len(ids)}, {ids[0]} to {ids[-1]}" if ids else ""
            raise UserError(f"--trials {name}: no such trial{nearest(name, ids) or there}")
        having = [r for r in found if _has_model(r)]
        if not having:
            where = f"({found[0]['path']})" if found[0]["path"] is not None else "(its id is not a name of a file)"
            left = f"it {found[0]['outcome']} and left no model {where}"
            raise UserError(f"--trials {name}: {left}; a trial leaves one when it completes")
        picked += [r for r in having if r not in picked]
    return picked


def _has_model(row: dict[str, Any]) -> bool:
    return row["path"] is not None and row["path"].is_file()


def _best(rows: list[dict[str, Any]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    for name in metrics:
        if name not in METRIC_BY_NAME:
            known = [m.name for m in METRICS]
            raise UserError(f"--best {name}: unknown metric{nearest(name, known)} (metrics: {', '.join(known)})")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["outcome"] == Outcome.COMPLETED and _has_model(row):
            groups.setdefault((row["study"], row["method"]), []).append(row)
    picked: list[dict[str, Any]] = []
    for group in groups.values():
        # The model is that of the last epoch, so its last value ranks it and not the best one of its course.
        having = [name for name in RANKING if any(r[f"{name}_last"] is not None for r in group)]
        for name in metrics or having[:1]:
            sign = METRIC_BY_NAME[name].sign
            scored = [r for r in group if r[f"{name}_last"] is not None]
            first = min(scored, key=lambda r: sign * r[f"{name}_last"], default=None)
            picked += [first] if first is not None and first not in picked else []
        if not metrics and not having:
            picked.append(group[0])
    return picked


@dataclass
class Work:
    """One run of the command: what it reads, every model once, and a note for everything that is left out."""

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
        """The model of a trial. UserError: its file cannot be used."""
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

    def _noted(self, kind: str, one: Chosen, get: Callable[[], T]) -> T | None:
        """What is got; None, and a note, where it is not to be had."""
        try:
            return get()
        except ValueError as error:
            self.note(kind, one, error)
            return None

    def data(self, kind: str, one: Chosen) -> ImageData | None:
        """The images of a model."""
        saved = self.model(one)
        return self._noted(kind, one, lambda: exhibits.load_data(saved))

    def score(self, kind: str, one: Chosen) -> tuple[Scores, LogP] | None:
        """Scores of the samples; None where the model has not what was asked for."""
        saved = self.model(one)
        log_p = self._noted(kind, one, lambda: exhibits.choose_log_p(saved.config, self.log_p))
        if log_p is None:
            return None
        if one.key not in self.scores:
            self.scores[one.key] = exhibits.score_images(saved, saved.samples, log_p)
        return self.scores[one.key], log_p

    def initial(self, kind: str, one: Chosen, data: ImageData) -> Initial | None:
        """p0 of a model."""

        def get() -> Initial:
            saved = self.model(one)
            if (initial := exhibits.load_initial(saved, data)) is None:
                raise ValueError(f"{saved.config.method} has no p0")
            return initial

        return self._noted(kind, one, get)
