"""The paper's Tables 1-6 with the measured values beside the published ones, and the table of measured settings.

Every table is there whatever was measured: all published rows in the paper's order, null where nothing was measured.
Diverged and collapsed trials are in every mean with their best value, as the paper's starred rows are; their rate, in
which trials that were cut off are censored, stands beside it. An equal setting and seed counts once, whatever studies
ran it. Distances on small classifiers' features (`fd_*`) never fill a FID column.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from analysis.aggregate import (
    ENDED_BADLY,
    JUDGED,
    SETTINGS_COLUMNS,
    Trial,
    count,
    distinct,
    group_by,
    identifier,
    joined,
    settings_table,
    spread,
)
from analysis.compare import (
    BASELINES,
    PROTOCOLS,
    difference,
    difference_columns,
    differences,
    matching,
    nearest_setting,
    number_columns,
    protocol_differences,
    remarks,
    row_differences,
)
from analysis.load import Results, empty_frame, records, typed_frame, write_parquet
from analysis.published import published_hyperparameters, published_results
from analysis.rates import Rate, rate_of
from analysis.render import csv_text, html_page, latex, markdown
from analysis.runtime import RUNTIME_COLUMNS, runtime_table
from analysis.words import text
from trainables.files import write_text
from trainables.schema import METRIC_BY_NAME, SETTING_NAMES, TRIAL_COLUMNS, Column, Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

ROWS: dict[str, int] = {"table_1": 17, "table_2": 13, "table_3": 15, "table_4": 13, "table_5": 5, "table_6": 18}
"""Rows of the paper's tables."""

_NUMBERS: dict[str, tuple[str, str, float]] = {
    "accuracy_percent": ("accuracy", "test accuracy in percent", 100.0),
    "inception_score": ("isc_buffer", "inception score of the buffer", 1.0),
    "fid": ("fid_buffer", "FID of the buffer", 1.0),
}
"""A published number: the measured metric, what it is, and the factor from ours to theirs."""


def numbers_of(table: int) -> tuple[str, ...]:
    """Names of the numbers that a table compares."""
    if table == 6:
        return ("minutes_per_epoch", "runtime_hours", "speedup")
    return ("accuracy_percent", "inception_score", "fid") if table in (3, 4) else ("inception_score", "fid")


def quality_columns(table: int) -> tuple[Column, ...]:
    """Columns of Table 1, 2, 3 or 4."""
    return (
        Column("table", "int64", "number of the paper's table"),
        Column("row", "int64", "row in it, from 1, in the paper's order"),
        Column("dataset", "string", "name of the data set"),
        Column("group", "string", "heading of the row in the paper"),
        Column("model", "string", "the row's name in the paper"),
        Column("method", "string", "training method; null where the row is quoted only"),
        Column("sampling_steps", "int64", "K; null where the paper gives none"),
        *(c for name in numbers_of(table) for c in number_columns(name, _NUMBERS[name][1])),
        *(c for name in numbers_of(table) for c in difference_columns(name, _NUMBERS[name][1])),
        Column("published_note", "string", "the paper's remark on the row"),
        Column("seeds", "int64", "distinct seeds of the trials that count"),
        Column("diverged", "int64", "of these trials diverged"),
        Column("trials", "int64", "trials that count: completed, diverged and collapsed"),
        Column("collapsed", "int64", "of these trials collapsed"),
        Column("divergence_rate", "float64", "1 - Kaplan-Meier at divergence_at, of divergence_n trials", "fraction"),
        Column("divergence_low", "float64", "lower bound of its 95% interval (analysis.rates.rate)", "fraction"),
        Column("divergence_high", "float64", "upper bound of it", "fraction"),
        Column("divergence_at", "int64", "iteration at which the rate is stated"),
        Column("divergence_n", "int64", "trials of the setting that trained, those cut off included"),
        Column("divergence_censored", "int64", "of which were cut off before divergence_at"),
        Column("best_before_divergence", "bool", "a diverged trial's best value before it diverged is in a mean"),
        Column("protocol", "string", "protocol ids of the measured values, comma-separated"),
        Column("comparable", "bool", "same protocol and settings as the paper's; null where nothing was measured"),
        Column("comparable_reason", "string", "every reason why not, and remarks; separated by semicolons"),
        Column("hardware", "string", "devices the trials ran on"),
        Column("studies", "string", "studies the trials are from"),
        Column("trial_ids", "string", "the trials as STUDY/TRIAL, comma-separated"),
    )


HYPERPARAMETER_TABLE_COLUMNS: tuple[Column, ...] = (
    Column("table", "int64", "number of the paper's table"),
    Column("row", "int64", "row in it, from 1"),
    Column("variable", "string", "the paper's name of the hyperparameter"),
    Column("symbol", "string", "the paper's symbol"),
    Column("field", "string", "the setting of a trial that it is"),
    Column("published", "float64", "the paper's value"),
    Column("measured_min", "float64", "smallest value of the trials"),
    Column("measured_max", "float64", "largest value of the trials"),
    Column("measured_values", "string", "distinct values of the trials, ascending, comma-separated"),
    Column("trials", "int64", "trials with a value"),
    Column("trials_matching", "int64", "of which have the paper's value"),
    Column("matches", "bool", "all of them have the paper's value; null where there is none"),
    Column("studies", "string", "studies the trials are from"),
    Column("trial_ids", "string", "the trials as STUDY/TRIAL, comma-separated"),
    Column("trial_ids_matching", "string", "of these the ones with the paper's value"),
)

TABLE_COLUMNS: dict[str, tuple[Column, ...]] = {
    **{f"table_{n}": quality_columns(n) for n in (1, 2, 3, 4)},
    "table_5": HYPERPARAMETER_TABLE_COLUMNS,
    "table_6": RUNTIME_COLUMNS,
    "settings": SETTINGS_COLUMNS,
}
"""Columns of every table that `build_tables` makes."""


Merge = Literal["all", "newest", "best"]
"""Which studies fill a row that several have trials for: all of them together, the one whose trial of the row ended
last, or the one whose mean is best in FID (else inception score, else accuracy)."""


def build_tables(results: Results | None, merge: Merge = "all") -> dict[str, pd.DataFrame]:
    """Tables 1-6 (`table_1` ... `table_6`) and `settings`, columns as in `TABLE_COLUMNS`.

    Args:
        results: What was measured; None for the published values alone.
        merge: Which studies fill a row of Tables 1-4 that several have trials for. Whatever it says, a row is of one
            setting and names its trials.
    """
    frame = results.trials if results is not None else empty_frame(TRIAL_COLUMNS)
    trials = records(frame)
    tables = {f"table_{n}": quality_table(n, trials, merge) for n in (1, 2, 3, 4)}
    tables["table_5"] = hyperparameter_table(trials)
    tables["table_6"] = runtime_table(distinct(trials), records(results.bench) if results is not None else ())
    tables["settings"] = settings_table(frame)
    return tables


def study_tables(results: Results | None) -> dict[str, pd.DataFrame]:
    """A table of settings (`SETTINGS_COLUMNS`) for every study, by the name of its file, `study_NAME`."""
    tables: dict[str, pd.DataFrame] = {}
    for study in results.studies if results is not None else []:
        assert results is not None
        name = stem = "study_" + (re.sub(r"[^A-Za-z0-9_-]+", "_", study).strip("_") or "unnamed")
        number = 1
        while name in tables:
            number += 1
            name = f"{stem}_{number}"
        tables[name] = settings_table(results.of(study).trials)
    return tables


def write_tables(results: Results | None, out_dir: Path | str, merge: Merge = "all") -> list[Path]:
    """Write every table, and one per study, as Parquet, Markdown, LaTeX, CSV and HTML.

    The same results give the same bytes.

    Args:
        results: What was measured; None for the published values alone.
        out_dir: Where to; made if it is missing.
        merge: See `build_tables`.

    Returns:
        The files, in the order of the tables.
    """
    out_dir = Path(out_dir)
    written = []
    for name, frame in (build_tables(results, merge) | study_tables(results)).items():
        path = out_dir / f"{name}.parquet"
        write_parquet(frame, TABLE_COLUMNS.get(name, SETTINGS_COLUMNS), path)
        written.append(path)
        made = {".md": markdown, ".tex": latex, ".html": html_page}
        texts = {suffix: render(name, frame) for suffix, render in made.items()} | {".csv": csv_text(frame)}
        for suffix, content in texts.items():
            path = out_dir / f"{name}{suffix}"
            write_text(path, content)
            written.append(path)
    return written


def quality_table(table: int, trials: Sequence[Trial], merge: Merge = "all") -> pd.DataFrame:
    """Table 1, 2, 3 or 4 (`quality_columns`); see `build_tables`."""
    columns = quality_columns(table)
    of_method = group_by(trials, ("dataset", "method"))
    rows = []
    for published in records(published_results(table)):
        candidates = matching(of_method.get((published["dataset"], published["method"]), ()), published)
        group, settings = nearest_setting([t for t in candidates if t["outcome"] in JUDGED])
        group, merged = _merged(group, merge, numbers_of(table))
        alike = ("setting_id", *SETTING_NAMES)
        studies = {t["study"] for t in group}
        begun = distinct(t for t in candidates if t["study"] in studies and all(t[f] == group[0][f] for f in alike))
        group = distinct(group)
        row = {k: published[k] for k in ("table", "row", "dataset", "group", "model", "method", "sampling_steps")}
        row["published_note"] = published["note"]
        row |= {f"{name}_published": published[name] for name in numbers_of(table)}
        known = row_differences(table, published["method"])
        row |= (
            _measured(group, rate_of(begun), settings, numbers_of(table), known, published)
            if group
            else _nothing(candidates, numbers_of(table))
        )
        if merged is not None:
            row["comparable_reason"] = "; ".join(r for r in (row["comparable_reason"], merged) if r)
        rows.append(row)
    return typed_frame(rows, columns)


def _merged(trials: list[Trial], merge: Merge, names: Sequence[str]) -> tuple[list[Trial], str | None]:
    """Trials of a row as `merge` has them, and a remark where that left studies out."""
    studies = group_by(trials, ("study",))
    if merge == "all" or len(studies) < 2:
        return trials, None
    if merge == "newest":
        # A study that does not say when it ended is older than any that does.
        chosen = max(studies.values(), key=lambda group: max(t["ended_at"] or "" for t in group))
    else:
        ranks = [_ranks(group, names) for group in studies.values()]
        chosen = list(studies.values())[min(range(len(ranks)), key=lambda i: ranks[i])]
    left = ", ".join(key[0] for key, group in studies.items() if group is not chosen)
    return chosen, f"the {merge} of {len(studies)} studies; not {left}"


def _ranks(trials: Sequence[Trial], names: Sequence[str]) -> tuple[float, ...]:
    """What to minimise for the best study: FID, then minus the inception score, then minus the accuracy."""
    ranks = []
    for metric in (_NUMBERS[name][0] for name in reversed(names)):
        mean = spread(t[f"{metric}_best"] for t in trials).mean
        ranks.append(math.inf if mean is None else mean if METRIC_BY_NAME[metric].direction == "minimize" else -mean)
    return tuple(ranks)


def _nothing(candidates: Sequence[Trial], names: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {f"{name}_n": 0 for name in names} | {"seeds": 0, "diverged": 0, "trials": 0, "collapsed": 0}
    if candidates:
        ways = ", ".join(f"{n} {outcome}" for outcome, n in sorted(Counter(t["outcome"] for t in candidates).items()))
        row["comparable_reason"] = f"nothing measured yet: {ways}"
    return row


def _measured(
    trials: list[Trial],
    divergence: Rate,
    settings: int,
    names: Sequence[str],
    known: Sequence[str],
    published: Mapping[str, Any],
) -> dict[str, Any]:
    counts = count(trials)
    reasons = [*known, *dict.fromkeys(reason for t in trials for reason in differences(t))]
    notes = list(dict.fromkeys(note for t in trials for note in remarks(t)))
    if settings > 1:
        notes.append(f"of {settings} settings with this method and K the one that differs least from the paper's")
    seeds = {t["seed"] for t in trials}
    if len(seeds) < len(trials):
        notes.append(f"{len(trials)} trials share {len(seeds)} seeds")
    if Outcome.PRUNED.value in dict(divergence.informative):  # collapsed trials have a count of their own
        notes.append(f"divergence rate: {divergence.remark}")
    row: dict[str, Any] = {}
    used: list[str | None] = []
    starred = False
    for name in names:
        metric, words, factor = _NUMBERS[name]
        scored, note = _one_protocol([t for t in trials if t[f"{metric}_best"] is not None], metric)
        values = spread(factor * t[f"{metric}_best"] for t in scored)
        row |= {f"{name}_mean": values.mean, f"{name}_sd": values.sd, f"{name}_n": values.n}
        row |= {f"{name}_min": values.low, f"{name}_max": values.high}
        row[f"{name}_trial_ids"] = joined(identifier(t) for t in scored)
        row |= difference(name, [factor * t[f"{metric}_best"] for t in scored], published[name])
        starred = starred or any(t["outcome"] == Outcome.DIVERGED for t in scored)
        used += [t[f"{metric}_protocol"] for t in scored]
        notes += note
        if metric != "accuracy" and scored:
            reasons += [r for r in protocol_differences(scored, metric) if r not in reasons]
        missing = [t for t in trials if t[f"{metric}_best"] is None]
        if missing and scored:
            bad = sum(t["outcome"] in ENDED_BADLY for t in missing)
            notes.append(
                f"{words}: {len(missing)} of {len(trials)} trials have no value ({bad} ended before one was taken)"
            )
    if not any(row[f"{name}_n"] for name in names):
        reasons.append("no number of this table was measured")
    row |= {
        "seeds": len(seeds),
        "diverged": counts[Outcome.DIVERGED],
        "trials": counts.judged,
        "collapsed": counts[Outcome.COLLAPSED],
        "divergence_rate": divergence.rate,
        "divergence_low": divergence.low,
        "divergence_high": divergence.high,
        "divergence_at": divergence.at,
        "divergence_n": divergence.trials,
        "divergence_censored": divergence.censored,
        "best_before_divergence": starred,
        "protocol": joined(used),
        "comparable": not reasons,
        "comparable_reason": "; ".join(reasons + notes) or None,
        "hardware": joined(t["hardware"] for t in trials),
        "studies": joined(t["study"] for t in trials),
        "trial_ids": joined(identifier(t) for t in trials),
    }
    return row


def _one_protocol(scored: list[Trial], metric: str) -> tuple[list[Trial], list[str]]:
    """Of trials with a value those under one protocol: numbers of two protocols have no mean."""
    counted = Counter(t[f"{metric}_protocol"] for t in scored)
    if len(counted) < 2:
        return scored, []
    expected = PROTOCOLS.get(scored[0]["method"])
    chosen = expected if expected in counted else counted.most_common(1)[0][0]
    others = joined(p for p in counted if p != chosen) or "none recorded"
    kept = [t for t in scored if t[f"{metric}_protocol"] == chosen]
    return kept, [f"{metric}: {len(scored) - len(kept)} trials scored under another protocol ({others}) are left out"]


def hyperparameter_table(trials: Sequence[Trial]) -> pd.DataFrame:
    """Table 5 (`HYPERPARAMETER_TABLE_COLUMNS`): trials of the paper's own methods; a classifier has no sampler."""
    own = [(t, identifier(t)) for t in trials if t["method"] not in BASELINES]
    rows = []
    for row in records(published_hyperparameters()):
        field, published = row["field"], row.pop("value")
        counted = own if field == "epochs" else [(t, name) for t, name in own if t["method"] != "softmax"]
        having = [(t, name) for t, name in counted if t[field] is not None]
        values = sorted({float(t[field]) for t, _ in having})
        same = [name for t, name in having if float(t[field]) == published]
        measured = {
            "published": published,
            "measured_min": values[0] if values else None,
            "measured_max": values[-1] if values else None,
            "measured_values": joined(text(v) for v in values),
            "trials": len(having),
            "trials_matching": len(same),
            "matches": len(same) == len(having) if having else None,
            "studies": joined(t["study"] for t, _ in having),
            "trial_ids": joined(name for _, name in having),
            "trial_ids_matching": joined(same),
        }
        rows.append(row | measured)
    return typed_frame(rows, HYPERPARAMETER_TABLE_COLUMNS)
