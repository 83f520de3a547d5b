"""The table of measured settings, of all studies or of one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from analysis.results.labels import brief, symbol, text
from analysis.results.own import setting_names
from analysis.stats.comparison.settings import SETTINGS_COLUMNS, settings_table
from analysis.stats.trials.trial import configuration, differing
from analysis.tables.registry import NOTHING, RATE_NOTE, Display, Table, or_dash, rate_text, spread_text, without
from trainables.results.own import OWN, SET, own_metric
from trainables.results.schema import METRICS, Metric


def show_settings(caption: str, rows: list[dict[str, Any]]) -> Display:
    """Settings for people: what all share is said once below the table, the columns show where they differ."""
    names = setting_names(rows[0]) if rows else []
    configs = [configuration(row["config"]) for row in rows]
    foreign = any(isinstance(c.get("kind"), str) for c in configs)
    # What a script or an import does not say is not known, which is not a value.
    values = {f: {row[f] for row in rows} - ({None} if foreign else set()) for f in names}
    varied = [f for f in names if len(values[f]) > 1]
    common = [f"{symbol(f)} {text(*values[f])}" for f in names if len(values[f]) == 1]
    others = _others(configs, {*names, *(f.removeprefix(SET) for f in names)})
    studies = len({row["study"] for row in rows}) > 1
    metrics = _metrics(rows)
    header = ["Study"] if studies else []
    header += ["Setting", *(symbol(f) for f in (*varied, *others))]
    naming = header.index("Setting"), len(header)
    header += ["Trials", "Diverged", "Median it.", "Collapsed"]
    header += [f"{m.label} {kind}" for m, kind in metrics] + ["Time/it. [ms]", "Saved [s]"]
    body = []
    for row, config in zip(rows, configs, strict=True):
        cells = [row["study"]] if studies else []
        cells += [row["setting_id"], *(or_dash(row[f], brief) for f in varied)]
        # Null is off where a configuration says it; a dash stands for a field that it has not.
        cells += [*(brief(config[f]) if f in config else NOTHING for f in others), str(row["trials"])]
        cells += [rate_text(row), or_dash(row["divergence_iteration_median"], "{:.0f}".format), str(row["collapsed"])]
        for m, kind in metrics:
            mean, sd, n = (row[f"{m.name}_{kind}_{k}"] for k in ("mean", "sd", "n"))
            cells.append(spread_text(mean, sd, n, _digits(m, rows, kind)))
        cells.append(or_dash(row["seconds_per_iteration_mean"], lambda pace: f"{1000 * pace:.1f}"))
        cells.append(or_dash(row["saved_seconds_sum"], "{:.1f}".format))
        body.append(cells)
    notes = [f"All settings{', where known' if foreign else ''}: {', '.join(common)}."] if common else []
    for m, _ in metrics:
        protocols = sorted({row[m.protocol_column] for row in rows if row[m.protocol_column]})
        notes.append(f"{m.label}: {m.meaning}; protocol {', '.join(protocols) or 'not recorded'}.")
    if rows:
        notes.append(f"Diverged: {RATE_NOTE}")
    shown = Display(caption, header, [("", body)], notes, naming=naming)
    return without(shown, {"Collapsed": "0", "Saved [s]": "0.0"})


def _others(configs: Sequence[Mapping[str, Any]], known: Collection[str]) -> list[str]:
    """Fields beside the settings' in which configurations of one kind differ."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for config in configs:
        kinds.setdefault(str(config.get("kind")), []).append(config)
    found = dict.fromkeys(f for same in kinds.values() for f in differing(same))
    return [f for f in found if f not in known]


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Metric, str]]:
    """The metrics that have a value, each with what is shown of it: its best, or without a direction its last."""
    own = [n.removesuffix("_best_n") for n in rows[0] if n.startswith(OWN) and n.endswith("_best_n")] if rows else []
    every = [*METRICS, *(own_metric(name.removeprefix(OWN)) for name in own)]
    found = []
    for m in every:
        kind = next((k for k in ("best", "last") if any(row[f"{m.name}_{k}_n"] for row in rows)), None)
        if kind == "best" or (kind and m.own):
            found.append((m, kind))
    return found


def _digits(metric: Metric, rows: Sequence[Mapping[str, Any]], kind: str) -> int:
    """Digits after the point: the metric's, of an own one as many as show three of its largest value."""
    if not metric.own:
        return metric.digits
    largest = max((abs(v) for row in rows if (v := row[f"{metric.name}_{kind}_mean"])), default=1.0)
    return min(9, max(0, 2 - math.floor(math.log10(largest))))


TABLES = (
    Table("settings", "Measured settings", SETTINGS_COLUMNS, lambda m: settings_table(m.frame), show_settings, 7),
)
