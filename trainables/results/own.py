"""Columns that a script, an import or a method of somebody's own adds to the tables: `own.NAME` and `set.NAME`.

`own.NAME` are metrics and notes, `set.NAME` arguments that are no column of the paper. Their types come from what is in
them; a number of the journal may be any of its kind.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trainables.results.schema import Column, ColumnType, Metric

OWN, SET = "own.", "set."
_ARGUMENTS = ("network", "initial", "dataset", "optimiser")
"""Parts of a trial whose arguments are columns too: `network_args.width`."""
SETTINGS = (SET, *(f"{part}_args." for part in _ARGUMENTS))
"""How the columns of settings among them begin."""
_NAME = re.compile(rf"(own|set|({'|'.join(_ARGUMENTS)})_args)\.[A-Za-z_][\w.-]{{0,99}}", re.ASCII)
_FOREIGN = re.compile(r"[^\w.-]+", re.ASCII)
_ORDER: tuple[ColumnType, ...] = ("bool", "int64", "float64", "string")
_PARTS = ("_best", "_best_epoch", "_last", "_initial", "_protocol")
_TOLD = ("_direction", "_unit")
"""What a trial says of a metric beside its values; in the tables also metadata of the metric's columns."""
DIRECTIONS = ("minimize", "maximize")
PAPER = {
    "K": "sampling_steps", "alpha": "step_size", "α": "step_size", "sigma": "noise_std", "σ": "noise_std",
    "rho": "reinit_probability", "ρ": "reinit_probability", "B": "buffer_size", "|B|": "buffer_size", "p0": "initial",
    "lambda": "l2_weight", "λ": "l2_weight", "lr": "learning_rate",
}  # fmt: skip
"""The paper's symbols, and the fields they are of."""
SYMBOLS = PAPER | {"n_steps": "sampling_steps", "reinit_freq": "reinit_probability", "l2": "l2_weight"}
"""Names that arguments have in papers and scripts, and the columns they fill."""


def field_of(name: str) -> str:
    """A dotted name with the field of each of the paper's symbols in it: `space.K` gives `space.sampling_steps`."""
    return ".".join(PAPER.get(part, part) for part in name.split("."))


def is_own(name: str) -> bool:
    """Whether a name is that of an added column."""
    return _NAME.fullmatch(name) is not None


def own_name(text: str) -> str:
    """A name from elsewhere (`eval/fid`, `FID 50k`) as that of a metric or setting here."""
    name = _FOREIGN.sub("_", text).strip("_")[:64]
    return name if name[:1].isalpha() else f"_{name}"


def own_metric_columns(name: str, told: Mapping[str, Any]) -> tuple[Column, ...]:
    """The trial's columns of a metric: best, its epoch, last, first, protocol."""
    unit, direction = str(told.get("unit") or ""), str(told.get("direction") or "")
    way = f" ({direction}d)" if direction else ""
    return (
        Column(f"{OWN}{name}_best", "float64", f"best {name}{way}", unit, direction=direction),
        Column(f"{OWN}{name}_best_epoch", "int64", f"epoch of {name}_best"),
        Column(f"{OWN}{name}_last", "float64", f"last {name}", unit, direction=direction),
        Column(f"{OWN}{name}_initial", "float64", f"first {name}", unit, direction=direction),
        Column(f"{OWN}{name}_protocol", "string", f"how {name} is measured, in its author's words"),
    )


def own_metric_values(
    name: str,
    told: Mapping[str, Any],
    best: tuple[float, int] | None,
    last: float | None,
    initial: float | None,
) -> dict[str, Any]:
    """What a trial's values say of a metric.

    Args:
        told: its direction, unit and protocol, each left out or None where nobody said it.
        best: value and epoch.
    """
    found = (best and best[0], best and best[1], last, initial, told.get("protocol"))
    values = {f"{OWN}{name}{part}": value for part, value in zip(_PARTS, found, strict=True)}
    return values | {f"{OWN}{name}{part}": told[part[1:]] for part in _TOLD if told.get(part[1:])}


def own_metric_names(columns: Collection[str]) -> list[str]:
    """The metrics among the columns of a table of trials, without `own.`."""
    stems = (c.removeprefix(OWN).removesuffix("_best_epoch") for c in columns if c.endswith("_best_epoch"))
    return [name for name in stems if all(f"{OWN}{name}{part}" in columns for part in _PARTS)]


def said_of_metrics(columns: Collection[str]) -> set[str]:
    """Of a table's columns those that say something of a metric, as the metadata of its columns does."""
    told = {f"{OWN}{name}{part}" for name in own_metric_names(columns) for part in _TOLD}
    return told.intersection(columns)


def own_metric(name: str, direction: str = "", unit: str = "") -> Metric:
    """A metric of somebody's own, as tables and figures take it.

    Args:
        name: without `own.`.
        direction: minimize or maximize; anything else: no way is better.
    """
    return Metric(
        f"{OWN}{name}",
        f"{name} (own)",
        "maximize" if direction == "maximize" else "minimize",
        f"{name} as reported{f' [{unit}]' if unit else ''}, {NOT_COMPARABLE}",
        _never,  # one function, so that equal metrics are equal
        unit,
        directed=direction in DIRECTIONS,
        own=True,
    )


def _never(_: Any) -> None:
    """Nobody but its author measures it."""


NOT_COMPARABLE = "a script's own metric: comparable to no published number"


def _type_of(value: object) -> ColumnType | None:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64"
    return "float64" if isinstance(value, float) else "string" if isinstance(value, str) else None


def with_added(
    rows: Sequence[Mapping[str, Any]], columns: tuple[Column, ...]
) -> tuple[list[Mapping[str, Any]], tuple[Column, ...]]:
    """Rows of a table with the columns they add, each of the narrowest type that holds all its values.

    Args:
        columns: the table's own.
    """
    fixed = {c.name for c in columns}
    types: dict[str, ColumnType | None] = {}
    for row in rows:
        if len(row) == len(fixed):
            continue
        for name, value in row.items():
            if name in fixed or not is_own(name):
                continue
            kind, before = _type_of(value), types.get(name)
            if kind is None or before is None or kind == before:
                types[name] = kind or before
            elif "bool" in (kind, before):
                types[name] = "string"
            else:
                types[name] = _ORDER[max(_ORDER.index(kind), _ORDER.index(before))]
    if not types:
        return list(rows), columns
    added = _columns(types, rows)
    whole: list[Mapping[str, Any]] = [{**row, **{c.name: _as(row.get(c.name), c.type) for c in added}} for row in rows]
    return whole, (*columns, *added)


def _columns(types: Mapping[str, ColumnType | None], rows: Iterable[Mapping[str, Any]]) -> tuple[Column, ...]:
    """The added columns of some types; those of a metric with what all rows that say so say of it."""
    said: dict[str, dict[str, set[str]]] = {}
    metrics = own_metric_names(types)
    for name in metrics:
        said[name] = {part: {str(r[c]) for r in rows if r.get(c)} for part in _TOLD if (c := f"{OWN}{name}{part}")}
    known: dict[str, Column] = {}
    for name in metrics:
        # Trials that contradict each other say nothing.
        told = {part[1:]: next(iter(texts)) for part, texts in said[name].items() if len(texts) == 1}
        if told.get("direction") in (*DIRECTIONS, None):
            known |= {c.name: c for c in own_metric_columns(name, told)}
    found = []
    for name, kind in sorted(types.items()):
        column = known.get(name)
        if column is None:
            column = Column(name, kind or "float64", _meaning(name))
        elif kind is not None and kind != column.type and (kind, column.type) != ("int64", "float64"):
            column = replace(column, type=kind)
        found.append(column)
    return tuple(found)


def _meaning(name: str) -> str:
    head, _, argument = name.partition("_args.")
    if head in _ARGUMENTS:
        return f"argument {argument} of the trial's own {head}"
    return f"argument {name.removeprefix(SET)}" if name.startswith(SET) else f"{name.removeprefix(OWN)}, as reported"


def _as(value: Any, kind: ColumnType) -> Any:
    if value is None or kind in ("bool", "int64"):
        return value
    return str(value) if kind == "string" else float(value)
