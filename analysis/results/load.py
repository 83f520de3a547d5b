"""Study folders in, tidy data frames out."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from analysis.results.folders import about_others, children, confine, find_files, find_studies, holds_rows
from analysis.results.integrity import check_signals, read_study, shared_trials
from analysis.results.labels import free_name
from analysis.results.messages import ResultsError, counted, plural, printable
from analysis.results.own import ATTRIBUTE, added_columns, complete, kind_of, measured_metrics, merged
from analysis.results.parquet import empty_frame, read_parquet
from analysis.results.remote import Remote
from trainables.results import schema
from trainables.results.credentials import is_url
from trainables.results.files import UnsafePathError, within
from trainables.results.layout import (
    BENCH_FILE,
    DIAGNOSIS_FILE,
    EPOCHS,
    EVALUATIONS_FILE,
    MANIFEST,
    SAMPLES,
    SCORES_FILE,
    SIGNALS,
    TRIALS,
)
from trainables.results.progress import note

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

log = logging.getLogger("mebm")

_SMALL = (MANIFEST, TRIALS, EPOCHS, BENCH_FILE, SCORES_FILE, DIAGNOSIS_FILE, EVALUATIONS_FILE)
"""What of a study in a store is always read; the rest is brought when it is asked for."""


@dataclass(frozen=True)
class Results:
    """Everything measured in one or many studies.

    Attributes:
        trials: One row per trial of the search, `TRIAL_COLUMNS`. One that was rescued stands here as it first ended.
        epochs: One row per trial, epoch and attempt, `EPOCH_COLUMNS`.
        manifests: A study's name to the content of its `manifest.json`.
        folders: A study's name to its folder; of one in a store, to a temporary copy that lives as long as this object.
        bench: One row per timed implementation of `mebm bench`, `BENCH_COLUMNS`.
        scores: One row per image set, protocol and metric of `mebm score`, `SCORE_COLUMNS`.
        rescues: One row per rescue, `TRIAL_COLUMNS`: what a study's `rescue` made of trials that had ended badly.
        rescue_epochs: Their epochs, `EPOCH_COLUMNS`.
        notes: What was left out or cannot be relied on, a line each, also a warning of the logger `mebm`; more come
            when signals or samples are read that are damaged.
    """

    trials: pd.DataFrame
    epochs: pd.DataFrame
    manifests: dict[str, dict[str, Any]]
    folders: dict[str, Path]
    bench: pd.DataFrame = dataclasses.field(default_factory=lambda: empty_frame(schema.BENCH_COLUMNS))
    scores: pd.DataFrame = dataclasses.field(default_factory=lambda: empty_frame(schema.SCORE_COLUMNS))
    rescues: pd.DataFrame = dataclasses.field(default_factory=lambda: empty_frame(schema.TRIAL_COLUMNS))
    rescue_epochs: pd.DataFrame = dataclasses.field(default_factory=lambda: empty_frame(schema.EPOCH_COLUMNS))
    notes: list[str] = dataclasses.field(default_factory=list)
    _remotes: dict[str, Remote] = dataclasses.field(default_factory=dict, repr=False)

    def origin(self, study: str) -> str:
        """Where a study was read from, the same however it was named: its folder, or its place in a store."""
        remote = self._remotes.get(study)
        return str(remote.key) if remote else str(self.folders[study].resolve())

    @property
    def studies(self) -> list[str]:
        """Names of the studies, in the order they were given."""
        return list(self.folders)

    def of(self, study: str) -> Results:
        """The results of one study."""
        return Results(
            self.trials[self.trials["study"] == study].reset_index(drop=True),
            self.epochs[self.epochs["study"] == study].reset_index(drop=True),
            {study: self.manifests[study]},
            {study: self.folders[study]},
            rescues=self.rescues[self.rescues["study"] == study].reset_index(drop=True),
            rescue_epochs=self.rescue_epochs[self.rescue_epochs["study"] == study].reset_index(drop=True),
            notes=self.notes,
            _remotes={study: self._remotes[study]} if study in self._remotes else {},
        )

    def metrics(self, study: str | None = None, *, directed: bool = False) -> list[schema.Metric]:
        """The metrics that trials have a value of, the schema's and own ones; of one study or of all.

        Args:
            directed: Those alone that can be an objective.
        """
        return measured_metrics(self._trials(study), directed=directed)

    def columns(self, study: str | None = None) -> list[schema.Column]:
        """What scripts, imports and methods of somebody's own added: `own.NAME` and `set.NAME` that have a value."""
        return added_columns(self._trials(study))

    def kinds(self, study: str | None = None) -> set[str]:
        """What its trials are: built-in, script, imported."""
        return {kind_of(config) for config in self._trials(study)["config"]}

    def _trials(self, study: str | None) -> pd.DataFrame:
        return self.trials if study is None else self.trials[self.trials["study"] == study]

    def _file(self, study: str, name: str) -> Path | None:
        """A file of a study, brought from its store if need be; None where there is none, or it is outside of it."""
        try:
            path = within(self.folders[study], name)  # a trial's id is text that somebody wrote
        except UnsafePathError as error:
            self.note(f"{printable(error.filename, 300)}: {error.strerror}; left out")
            return None
        if not path.is_file() and study in self._remotes:
            self._remotes[study].bring(name)
        if path.is_file():
            return path
        if os.path.lexists(path):
            self.note(f"{path}: is not a file; left out")
        return None

    def note(self, text: str) -> None:
        """Say once what is left out."""
        text = _shown(text, self._remotes.values())
        if text not in self.notes:
            self.notes.append(text)
            log.warning("%s", text)

    def signals(self, study: str, trial_id: str) -> pd.DataFrame | None:
        """Recorded signals of a trial (`SIGNAL_COLUMNS`, by iteration); None where none were kept, or damaged ones."""
        path = self._file(study, f"{SIGNALS}/{trial_id}.parquet")
        if path is None:
            return None
        try:
            signals = read_parquet(path, schema.SIGNAL_COLUMNS)
            check_signals(signals, trial_id, path)
        except ResultsError as error:
            self.note(f"{error}; left out")
            return None
        if signals["iteration"].is_monotonic_increasing:
            return signals
        return signals.sort_values("iteration", kind="stable", ignore_index=True)

    def sample_grid(self, study: str, trial_id: str, kind: str) -> Path | None:
        """PNG with a grid of a trial's samples, `kind` being buffer, fresh or end; None for none or a damaged one."""
        path = self._file(study, f"{SAMPLES}/{trial_id}_{kind}.png")
        if path is not None and not _is_whole_png(path):
            self.note(f"{path}: not a whole PNG image; left out")
            return None
        return path


def _is_whole_png(path: Path) -> bool:
    """Whether a file is a PNG image to its last chunk, by their checksums."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow raises SyntaxError for bad chunks
        return False
    return True


def current_epochs(epochs: pd.DataFrame) -> pd.DataFrame:
    """Epochs of the work that counts: where a resumed trial did an epoch again, the row of its last attempt."""
    ordered = epochs.sort_values(["study", "trial_id", "epoch", "attempt"], kind="stable")
    return ordered.drop_duplicates(["study", "trial_id", "epoch"], keep="last").reset_index(drop=True)


def varied_fields(results: Results, study: str) -> list[str]:
    """Settings that a study searched over and that really took two or more values, as its manifest lists them."""
    trials = results.trials[results.trials["study"] == study]
    listed = [f for f in results.manifests[study].get("varied") or [] if isinstance(f, str) and f in trials.columns]
    return [f for f in listed if len(trials[f].unique()) > 1]


def read_bench(path: Path | str) -> pd.DataFrame:
    """A `bench.parquet` (`BENCH_COLUMNS`); errors as of `read_parquet`."""
    return read_parquet(path, schema.BENCH_COLUMNS)


def read_scores(path: Path | str) -> pd.DataFrame:
    """A `scores.parquet` (`SCORE_COLUMNS`); errors as of `read_parquet`."""
    return read_parquet(path, schema.SCORE_COLUMNS)


def read_diagnosis(path: Path | str) -> pd.DataFrame:
    """A `diagnosis.parquet` (`DIAGNOSIS_COLUMNS`); errors as of `read_parquet`."""
    return read_parquet(path, schema.DIAGNOSIS_COLUMNS)


def read_evaluations(path: Path | str) -> pd.DataFrame:
    """An `evaluations.parquet` (`EVALUATION_COLUMNS`); errors as of `read_parquet`."""
    return read_parquet(path, schema.EVALUATION_COLUMNS)


def load(*paths: Path | str) -> Results:
    """Read studies, finished or still running.

    Args:
        paths: Study folders or folders of them, also of `mebm bench` and `mebm score`, or URLs of such in a store. A
            study given twice is read once; two studies of one name in different folders are both kept, the later one
            as "NAME (2)".

    Raises:
        ResultsError: A folder holds no study, or a link that leads out of it; a file of a study is missing, broken, or
            of another schema; a store cannot be read.
    """
    note(f"reading {printable(paths[0]) if len(paths) == 1 else f'{len(paths)} folders'}")
    copies = {
        str(path): Remote.open(str(path), _SMALL, (MANIFEST, TRIALS, BENCH_FILE, SCORES_FILE))
        for path in paths
        if is_url(path)
    }
    try:
        return _load([copies[str(path)].folder if is_url(path) else Path(path) for path in paths], copies)
    except ResultsError as error:
        raise ResultsError(_shown(str(error), copies.values())) from None


def _shown(text: str, copies: Iterable[Remote]) -> str:
    """A text that names files of temporary copies: the user knows the store's name."""
    for copy in copies:
        text = text.replace(str(copy.folder), copy.shown)
    return text


@dataclass(frozen=True)
class _Study:
    """What is read of a study's folder."""

    folder: Path
    manifest: dict[str, Any]
    trials: pd.DataFrame
    epochs: pd.DataFrame
    remote: Remote | None

    def named(self, frame: pd.DataFrame, study: str) -> pd.DataFrame:
        """A frame of it under the name it has among the results."""
        if (frame["study"] == study).all():
            return frame
        return frame.assign(study=pd.array([study] * len(frame), dtype="string"))


def _load(paths: Sequence[Path], copies: Mapping[str, Remote]) -> Results:
    studies: dict[str, _Study] = {}
    notes: list[str] = []
    seen: set[Path | str] = set()
    for path in paths:
        confine(path)
        found = find_studies(path)
        if found != [path]:
            idle = [child for child in children(path) if child not in found and not holds_rows(child)]
            notes += about_others(path, idle)
        for folder in found:
            remote = next((c.of(folder) for c in copies.values() if folder.is_relative_to(c.folder)), None)
            place = remote.key if remote else folder.resolve()
            if place in seen:
                continue
            seen.add(place)
            manifest, table, rows, said = read_study(folder)
            manifest["varied"] = [_column_of(f, table) for f in manifest.get("varied") or []]
            for field in manifest["varied"]:
                _add_searched_field(table, field)
            read = _Study(folder, manifest, table, rows, remote)
            if original := _original(read, studies.values()):
                notes.append(f"{folder}: the same {plural(len(read.trials), 'trial')} as {original}; read once")
                continue
            notes += said
            studies[free_name(read.manifest["study"], studies, "{} ({})")] = read
    for study in studies.values():  # what one searched over, another had at one value
        for field in dict.fromkeys(f for s in studies.values() if s is not study for f in s.manifest["varied"]):
            _add_searched_field(study.trials, field, everywhere=False)
    benches = list(dict.fromkeys(f.resolve() for path in paths for f in find_files(path, BENCH_FILE)))
    scored = list(dict.fromkeys(f.resolve() for path in paths for f in find_files(path, SCORES_FILE)))
    trials, epochs = complete(
        _together([s.named(s.trials, name) for name, s in studies.items()], schema.TRIAL_COLUMNS),
        _together([s.named(s.epochs, name) for name, s in studies.items()], schema.EPOCH_COLUMNS),
    )
    # What ended badly and went on with other settings does not replicate its setting.
    again = trials["rescue"].notna()
    of_rescues = _keys(epochs).isin(_keys(trials[again]))
    about, clashing = merged([s.trials for s in studies.values()])
    if about is not None:
        trials.attrs[ATTRIBUTE] = about
        notes += [f"{name}: its direction or unit differs between these studies; none is taken" for name in clashing]
    results = Results(
        trials[~again].reset_index(drop=True) if again.any() else trials,
        epochs[~of_rescues].reset_index(drop=True) if again.any() else epochs,
        {name: s.manifest for name, s in studies.items()},
        {name: s.folder for name, s in studies.items()},
        _together([read_bench(f) for f in benches], schema.BENCH_COLUMNS).drop_duplicates(ignore_index=True),
        _together([read_scores(f) for f in scored], schema.SCORE_COLUMNS).drop_duplicates(ignore_index=True),
        rescues=trials[again].reset_index(drop=True),
        rescue_epochs=epochs[of_rescues].reset_index(drop=True),
        _remotes={name: s.remote for name, s in studies.items() if s.remote is not None},
    )
    for text in notes:
        results.note(_shown(text, copies.values()))
    return results


def _keys(frame: pd.DataFrame) -> pd.MultiIndex:
    return pd.MultiIndex.from_frame(frame[["study", "trial_id"]])


def _together(frames: Sequence[pd.DataFrame], columns: Sequence[schema.Column]) -> pd.DataFrame:
    if len(frames) == 1:
        return frames[0]  # of millions of rows a copy is half of what loading takes
    return pd.concat(frames, ignore_index=True) if frames else empty_frame(columns)


def _original(new: _Study, others: Iterable[_Study]) -> Path | None:
    """The folder that a study's is a copy of, of those read before; refused where it shares some of its trials."""
    table = new.trials

    def state(trials: pd.DataFrame) -> pd.DataFrame:
        """At what point of their study trials are."""
        columns = ["outcome", "iterations_done", "attempts"]
        return trials.sort_values("trial_id")[columns].reset_index(drop=True)

    for other in others:
        if other.manifest["study"] != new.manifest["study"] or not len(table):
            continue
        shared = shared_trials(other.trials, table)
        if len(shared) == len(table) == len(other.trials) and state(other.trials).equals(state(table)):
            return other.folder
        if shared:
            some = f"{len(shared)} of its {plural(len(table), 'trial')} ({counted(shared)})"
            where = f"are also in {other.folder}, as in an earlier copy; give one of the two"
            raise ResultsError(f"{new.folder}: {some} {where}")
    return None


def _column_of(field: Any, trials: pd.DataFrame) -> Any:
    """The column of a searched field: a script's argument that is not a setting of the schema's has `set.` before."""
    if isinstance(field, str) and field not in trials.columns:
        bare = field.removeprefix("args.")
        return next((name for name in (f"set.{bare}", bare) if name in trials.columns), field)
    return field


def _add_searched_field(trials: pd.DataFrame, field: Any, *, everywhere: bool = True) -> None:
    """Add a column for a searched field that has none itself, read from the configurations; without a value not
    unless it is wanted `everywhere`."""
    if isinstance(field, str) and field not in trials.columns:
        values = [_lookup(config, field) for config in trials["config"]]
        if any(v is not None for v in values):
            trials[field] = pd.array(values)
        elif everywhere:
            trials[field] = pd.array(values, dtype="string")


def _lookup(config: Any, field: str) -> Any:
    value = json.loads(config) if isinstance(config, str) else None
    first, _, own = field.partition(".")
    if isinstance(value, dict) and own and first not in value:  # a method's own field under the name it had before
        field = f"method_args.{own}"
    value = schema.with_unwritten(value) if isinstance(value, dict) else None
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    # A list (epochs at which the learning rate decays) is a value to tell apart, not one to calculate with.
    return json.dumps(value, sort_keys=True) if isinstance(value, (list, dict)) else value
