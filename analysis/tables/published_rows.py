"""Rows of the paper's tables for people: the published number, ours beside it, and how far they compare."""

from __future__ import annotations

from typing import Any

from analysis.tables.registry import NOTHING, RATE_NOTE, Display, or_dash, ranges, rate_text, spread_text

_STAR = "*"
_NUMBERS = {
    "accuracy_percent": ("Acc. %", 1, 1),
    "inception_score": ("IS", 2, 2),
    "fid": ("FID", 2, 1),
    "minutes_per_epoch": ("min/epoch", 2, 1),
    "runtime_hours": ("hours", 1, 1),
    "speedup": ("speed-up", 2, 2),
}
"""Label of a number, decimals of a measured and fewest decimals of a published one."""


def show_rows(caption: str, rows: list[dict[str, Any]]) -> Display:
    """Tables 1-4 and 6 for people."""
    numbers = [n for n in _NUMBERS if any(f"{n}_published" in row for row in rows)]
    # A number that neither the paper nor a trial has (IS of Table 2) would be an empty pair of columns.
    numbers = [n for n in numbers if any(row[f"{n}_published"] is not None or row[f"{n}_n"] for row in rows)]
    runtime = any("speedup_published" in row for row in rows)
    # Only a measured number has a difference: without any, the column would be empty.
    different = [n for n in numbers if any(row.get(f"{n}_difference") is not None for row in rows)]
    header = ["Model", *(f"{_NUMBERS[n][0]} {which}" for n in numbers for which in ("published", "measured"))]
    header += [f"{_NUMBERS[n][0]} difference" for n in different]
    header += ["Hardware" if runtime else "Diverged", "Comparable"]
    groups: list[tuple[str, list[list[str]]]] = []
    reasons: dict[str, int] = {}
    noted: dict[str, list[str]] = {}
    for row in rows:
        if not groups or groups[-1][0] != row["group"]:
            groups.append((row["group"], []))
        note = row["published_note"] or ""
        starred = "diverges; best" in note
        if note and not starred:
            noted.setdefault(note, []).append(_model(row))
        cells = [_model(row)]
        for number in numbers:
            _, digits, fewest = _NUMBERS[number]
            published = _published(row[f"{number}_published"], fewest)
            value = spread_text(row[f"{number}_mean"], row[f"{number}_sd"], row[f"{number}_n"], digits)
            before = row.get("best_before_divergence")
            cells += [_star(published, starred), _star(value, before)]
        cells += [_difference(row, number) for number in different]
        cells.append(or_dash(row["hardware"]) if runtime else _diverged(row))
        groups[-1][1].append([*cells, _comparable(row, reasons)])
    notes = []
    if any(_STAR in cell for _, body in groups for cells in body for cell in cells):
        notes.append(f"{_STAR} diverged; best value before it diverged.")
    if any(row.get("trials") for row in rows):
        notes.append("Measured: mean ± standard deviation (trials)" + ("." if runtime else f"; diverged {RATE_NOTE}"))
    if different:
        notes.append(
            "Difference: measured less published [95% t interval over the trials]; the published number counts as "
            "exact, its own spread over seeds is not known."
        )
    protocols = sorted({p for row in rows for p in (row.get("protocol") or "").split(", ") if p})
    if protocols:
        notes.append(f"Protocols of the measured numbers: {', '.join(protocols)}.")
    notes += [f"{', '.join(models)}: {note}." for note, models in noted.items()]
    notes += [f"[{number}] {reason}." for reason, number in reasons.items()]
    return Display(caption, header, groups, notes, [f"{_model(row)}: {t}" for row in rows if (t := _trials(row))])


def _model(row: dict[str, Any]) -> str:
    return str(row["model"]).replace("alpha=", "α=")


def _star(number: str, starred: object) -> str:
    return f"{number}{_STAR}" if starred and number != NOTHING else number


def _trials(row: dict[str, Any]) -> str:
    """The trials of a row, and of a number that not all of them have; empty where there are none."""
    if not row["trial_ids"]:
        return ""
    parts = [ranges(row["trial_ids"])]
    for number, (label, _, _) in _NUMBERS.items():
        own = row.get(f"{number}_trial_ids")
        if own and own != row["trial_ids"]:
            parts.append(f"{label} of {ranges(own)}")
    if row.get("speedup_reference_ids"):
        parts.append(f"speed-up over {ranges(row['speedup_reference_ids'])}")
    return "; ".join(parts)


def _difference(row: dict[str, Any], number: str) -> str:
    value, low, high = (row[f"{number}_difference{end}"] for end in ("", "_low", "_high"))
    digits = _NUMBERS[number][1]
    interval = "" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return or_dash(value, lambda value: f"{value:+.{digits}f}{interval}")


def _published(value: float | None, fewest: int) -> str:
    """A published number as the paper prints it: all its decimals, and no fewer than its column has."""
    if value is None:
        return NOTHING
    decimals = len(f"{value:g}".partition(".")[2])
    return f"{value:.{max(decimals, fewest)}f}"


def _diverged(row: dict[str, Any]) -> str:
    if not row["trials"]:
        return NOTHING
    collapsed = f", {row['collapsed']} collapsed" if row["collapsed"] else ""
    return f"{rate_text(row)}{collapsed}"


def _comparable(row: dict[str, Any], reasons: dict[str, int]) -> str:
    word = {True: "yes", False: "no", None: NOTHING}[row["comparable"]]
    said = [_ALIKE] if row["comparable"] else []
    said += [row["comparable_reason"]] if row["comparable_reason"] is not None else []
    if not said:
        return word
    number = reasons.setdefault("; ".join(said), len(reasons) + 1)
    return f"{word} [{number}]"


_ALIKE = "settings as published, images of the data set's own files, the paper's protocol where a number has one"
