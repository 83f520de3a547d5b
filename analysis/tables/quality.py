"""Tables 1-4: accuracy, inception score and FID, published beside measured.

Every table is there whatever was measured: all published rows in the paper's order, null where nothing was measured.
Diverged and collapsed trials are in every mean with their best value, as the paper's starred rows are; their rate, in
which trials that were cut off are censored, stands beside it. An equal setting and seed counts once, whatever studies
ran it. Distances on small classifiers' features (`fd_*`) never fill a FID column.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from analysis.results.parquet import records, typed_frame
from analysis.results.published import ROW_COLUMNS, published_results
from analysis.stats.survival.rates import Rate, rate_of
from analysis.stats.trials.grouping import group_by
from analysis.stats.trials.objective import sign
from analysis.stats.trials.spread import spread
from analysis.stats.trials.trial import ENDED_BADLY, JUDGED, Trial, count, distinct, identifier, joined
from analysis.tables import comparability as compare
from analysis.tables.published_rows import show_rows
from analysis.tables.registry import Measured, Merge, Table
from trainables.results.schema import METRIC_BY_NAME, SETTING_NAMES, Column, Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

_CAPTIONS = (
    "Table 1: inception score and FID of unconditional models on CIFAR-10",
    "Table 2: FID of unconditional models on CIFAR-100, CelebA-HQ 128 and ImageNet 32x32",
    "Table 3: accuracy, inception score and FID of hybrid models on CIFAR-10",
    "Table 4: accuracy, inception score and FID of hybrid models on CIFAR-100",
)
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
        *ROW_COLUMNS,
        *(c for name in numbers_of(table) for c in compare.number_columns(name, _NUMBERS[name][1])),
        *(c for name in numbers_of(table) for c in compare.difference_columns(name, _NUMBERS[name][1])),
        Column("published_note", "string", "the paper's remark on the row"),
        Column("seeds", "int64", "distinct seeds of the trials that count"),
        Column("diverged", "int64", "of these trials diverged"),
        Column("trials", "int64", "trials that count: completed, diverged and collapsed"),
        Column("collapsed", "int64", "of these trials collapsed"),
        Column("divergence_rate", "float64", "1 - Kaplan-Meier at divergence_at, of divergence_n trials", "fraction"),
        Column("divergence_low", "float64", "lower bound of its 95% interval (analysis.rates)", "fraction"),
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


def quality_table(
    table: int, trials: Sequence[Trial], merge: Merge = "all", scores: Sequence[Mapping[str, Any]] = ()
) -> pd.DataFrame:
    """Table 1, 2, 3 or 4 (`quality_columns`); see `build_tables`. `scores` fill rows without trials."""
    columns = quality_columns(table)
    of_method = group_by(trials, ("dataset", "method"))
    rows = []
    for published in records(published_results(table)):
        candidates = compare.matching(of_method.get((published["dataset"], published["method"]), ()), published)
        group, settings = compare.nearest_setting([t for t in candidates if t["outcome"] in JUDGED])
        group, merged = _merged(group, merge, numbers_of(table))
        alike = ("setting_id", *SETTING_NAMES)
        studies = {t["study"] for t in group}
        begun = distinct(t for t in candidates if t["study"] in studies and all(t[f] == group[0][f] for f in alike))
        group = distinct(group)
        row = compare.published_row(published, numbers_of(table))
        images = [s for s in scores if (s["model"], s["dataset"]) == (published["model"], published["dataset"])]
        known = compare.row_differences(table, published["method"])
        row |= (
            _measured(group, rate_of(begun), settings, numbers_of(table), known, published)
            if group
            else _of_images(images, numbers_of(table), published)
            if images
            else _nothing(candidates, numbers_of(table))
        )
        if group and images:
            row["comparable_reason"] = "; ".join(r for r in (row["comparable_reason"], _BESIDE) if r)
        if merged is not None:
            row["comparable_reason"] = "; ".join(r for r in (row["comparable_reason"], merged) if r)
        rows.append(row)
    return typed_frame(rows, columns)


_BESIDE = "images of other programs were scored too (scores.parquet); the trials stand here"
_METRICS = {"inception_score": "isc", "fid": "fid"}


def _of_images(
    scores: Sequence[Mapping[str, Any]], names: Sequence[str], published: Mapping[str, Any]
) -> dict[str, Any]:
    """A row of image sets that another program made: mean and spread over sets, under the protocol with the most sets.

    Numbers that the table does not have, such as distances on features of somebody's own, do not count.
    """
    shown = {_METRICS[name] for name in names if name in _METRICS}
    scores = [s for s in scores if s["metric"] in shown]
    sets = {(s["protocol"], s["protocol_digest"], s["digest"]) for s in scores if s["value"] is not None}
    protocols = Counter((protocol, digest) for protocol, digest, _ in sorted(sets))
    if not protocols:
        return _nothing((), names) | {"comparable_reason": "images were scored, but no number of this table was had"}
    (protocol, digest), _ = protocols.most_common(1)[0]
    kept = [s for s in scores if (s["protocol"], s["protocol_digest"]) == (protocol, digest)]
    row = _nothing((), names)
    for name in names:
        # A set that was scored again, on another device or reference, counts once: the newest.
        newest = {s["digest"]: s for s in kept if s["metric"] == _METRICS.get(name) and s["value"] is not None}
        values = [s["value"] for s in newest.values()]
        row |= compare.number(name, values, ()) | compare.difference(name, values, published[name])
        row[f"{name}_trial_ids"] = joined(f"{s['source']}#{s['digest'][:12]}" for s in newest.values())
    reasons = [f"protocol {protocol}, that of the published value is not known"]
    reasons += dict.fromkeys(text for s in kept for text in (s["departures"] or "").split("; ") if text)
    odd = {s["data_source"] for s in kept if not (s["data_source"] or "").startswith("torchvision:")}
    reasons += [f"reference from {text}, not the data set's own files" for text in sorted(odd)]
    others = sorted({p for p, d in protocols if (p, d) != (protocol, digest)})
    reasons += [f"scores under {', '.join(others)} are left out"] if others else []
    return row | {
        "protocol": protocol,
        "comparable": False,
        "comparable_reason": "; ".join(["images of another program, scored here", *reasons]),
        "hardware": joined(s["device"] for s in kept),
        "studies": "scores",
        "trial_ids": joined(dict.fromkeys(f"{s['source']}#{s['digest'][:12]}" for s in kept)),
    }


def _merged(trials: list[Trial], merge: Merge, names: Sequence[str]) -> tuple[list[Trial], str | None]:
    """Trials of a row as `merge` has them, and a remark where that left studies out."""
    studies = group_by(trials, ("study",))
    if merge == "all" or len(studies) < 2:
        return trials, None
    if merge == "newest":
        # A study that does not say when it ended is older than any that does.
        chosen = max(studies.values(), key=lambda group: max(t["ended_at"] or "" for t in group))
    else:
        chosen = min(studies.values(), key=lambda group: _ranks(group, names))
    left = ", ".join(key[0] for key, group in studies.items() if group is not chosen)
    return chosen, f"the {merge} of {len(studies)} studies; not {left}"


def _ranks(trials: Sequence[Trial], names: Sequence[str]) -> tuple[float, ...]:
    """What to minimise for the best study: FID, then minus the inception score, then minus the accuracy."""
    ranks = []
    for metric in (_NUMBERS[name][0] for name in reversed(names)):
        mean = spread(t[f"{metric}_best"] for t in trials).mean
        ranks.append(math.inf if mean is None else sign(METRIC_BY_NAME[metric]) * mean)
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
    reasons = [*known, *dict.fromkeys(reason for t in trials for reason in compare.differences(t))]
    notes = list(dict.fromkeys(note for t in trials for note in compare.remarks(t)))
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
        values = [factor * t[f"{metric}_best"] for t in scored]
        row |= compare.number(name, values, scored) | compare.difference(name, values, published[name])
        starred = starred or any(t["outcome"] == Outcome.DIVERGED for t in scored)
        used += [t[f"{metric}_protocol"] for t in scored]
        notes += note
        if metric != "accuracy" and scored:
            reasons += [r for r in compare.protocol_differences(scored, metric) if r not in reasons]
        missing = [t for t in trials if t[f"{metric}_best"] is None]
        if missing and scored:
            bad = sum(t["outcome"] in ENDED_BADLY for t in missing)
            without = f"{len(missing)} of {len(trials)} trials have no value"
            notes.append(f"{words}: {without} ({bad} ended before one was taken)")
    if not any(row[f"{name}_n"] for name in names):
        reasons.append("no number of this table was measured")
    return row | {
        "seeds": len(seeds),
        "diverged": counts[Outcome.DIVERGED],
        "trials": counts.judged,
        "collapsed": counts[Outcome.COLLAPSED],
        **{f"divergence_{k}": getattr(divergence, k) for k in ("rate", "low", "high", "at", "censored")},
        "divergence_n": divergence.trials,
        "best_before_divergence": starred,
        "protocol": joined(used),
        "comparable": not reasons,
        "comparable_reason": "; ".join(reasons + notes) or None,
        "hardware": joined(t["hardware"] for t in trials),
        "studies": joined(t["study"] for t in trials),
        "trial_ids": joined(identifier(t) for t in trials),
    }


def _one_protocol(scored: list[Trial], metric: str) -> tuple[list[Trial], list[str]]:
    """Of trials with a value those under one protocol: numbers of two protocols have no mean."""
    counted = Counter(t[f"{metric}_protocol"] for t in scored)
    if len(counted) < 2:
        return scored, []
    expected = compare.PROTOCOLS.get(scored[0]["method"])
    chosen = expected if expected in counted else counted.most_common(1)[0][0]
    others = joined(p for p in counted if p != chosen) or "none recorded"
    kept = [t for t in scored if t[f"{metric}_protocol"] == chosen]
    return kept, [f"{metric}: {len(scored) - len(kept)} trials scored under another protocol ({others}) are left out"]


def _table(number: int, caption: str) -> Table:
    def build(measured: Measured) -> pd.DataFrame:
        return quality_table(number, measured.trials, measured.merge, measured.scores)

    return Table(f"table_{number}", caption, quality_columns(number), build, show_rows, number)


TABLES = tuple(_table(i, caption) for i, caption in enumerate(_CAPTIONS, start=1))
