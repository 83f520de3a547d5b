"""Tables as people read them: one display frame of text per table, then Markdown, LaTeX (booktabs) or HTML of it."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pandas.api.types import is_numeric_dtype

from analysis.aggregate import configuration, differing
from analysis.load import records
from analysis.words import brief, cell, printable, symbol, text
from trainables.schema import METRICS, SETTING_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

CAPTIONS: dict[str, str] = {
    "table_1": "Table 1: inception score and FID of unconditional models on CIFAR-10",
    "table_2": "Table 2: FID of unconditional models on CIFAR-100, CelebA-HQ 128 and ImageNet 32x32",
    "table_3": "Table 3: accuracy, inception score and FID of hybrid models on CIFAR-10",
    "table_4": "Table 4: accuracy, inception score and FID of hybrid models on CIFAR-100",
    "table_5": "Table 5: hyperparameters of the paper beside those of the measured trials",
    "table_6": "Table 6: minutes per epoch (390 iterations), run time and speed-up",
    "settings": "Measured settings",
}
NOTHING = "—"
_STAR = "*"
_FEW = 5
"""Most values of a hyperparameter that are written out."""
_NUMBERS = {
    "accuracy_percent": ("Acc. %", 1, 1),
    "inception_score": ("IS", 2, 2),
    "fid": ("FID", 2, 1),
    "minutes_per_epoch": ("min/epoch", 2, 1),
    "runtime_hours": ("hours", 1, 1),
    "speedup": ("speed-up", 2, 2),
}
"""Label of a number, decimals of a measured and fewest decimals of a published one."""


@dataclass(frozen=True)
class Display:
    """A table as text: header, rows in groups, footnotes."""

    caption: str
    header: list[str]
    groups: list[tuple[str, list[list[str]]]]
    """Heading ("" for none) and rows; a cell is text."""
    notes: list[str]
    trials: list[str] = field(default_factory=list)
    """Which trials are behind a row's numbers, a line for each row that has any; not in LaTeX."""

    @property
    def rows(self) -> list[list[str]]:
        """All rows, without the headings."""
        return [row for _, rows in self.groups for row in rows]


def display(name: str, frame: pd.DataFrame) -> Display:
    """The display form of a table of `build_tables`.

    Args:
        name: `table_1` ... `table_6`, `settings` or `study_NAME`.
        frame: That table.
    """
    rows = records(frame)
    if name == "table_5":
        return _hyperparameters(rows)
    if name == "settings" or name.startswith("study_"):
        return _settings(rows, CAPTIONS.get(name, f"Settings of the study {rows[0]['study'] if rows else ''}".rstrip()))
    return _paper_table(name, rows)


def spread_text(mean: float | None, sd: float | None, n: int, digits: int) -> str:
    """A measured number as "mean ± sd (n)", without "± sd" for one value."""
    if mean is None:
        return NOTHING
    middle = "" if sd is None else f" ± {sd:.{digits}f}"
    return f"{mean:.{digits}f}{middle} ({n})"


def _paper_table(name: str, rows: list[dict[str, Any]]) -> Display:
    numbers = [n for n in _NUMBERS if any(f"{n}_published" in row for row in rows)]
    # A number that neither the paper nor a trial has (IS of Table 2) would be an empty pair of columns.
    numbers = [n for n in numbers if any(row[f"{n}_published"] is not None or row[f"{n}_n"] for row in rows)]
    runtime = name == "table_6"
    header = ["Model"]
    for number in numbers:
        header += [f"{_NUMBERS[number][0]} published", f"{_NUMBERS[number][0]} measured"]
    # Only a measured number has a difference: without any, the column would be empty.
    different = [n for n in numbers if any(row.get(f"{n}_difference") is not None for row in rows)]
    header += [f"{_NUMBERS[n][0]} difference" for n in different]
    header += ["Hardware" if runtime else "Diverged", "Comparable"]
    groups: list[tuple[str, list[list[str]]]] = []
    notes: list[str] = []
    reasons: dict[str, int] = {}
    for row in rows:
        if not groups or groups[-1][0] != row["group"]:
            groups.append((row["group"], []))
        published_star = _STAR if "diverges; best" in (row["published_note"] or "") else ""
        measured_star = _STAR if row.get("best_before_divergence") else ""
        cells = [row["model"].replace("alpha=", "α=")]
        for number in numbers:
            _, digits, fewest = _NUMBERS[number]
            published = row[f"{number}_published"]
            cells.append(NOTHING if published is None else _published(published, fewest) + published_star)
            value = spread_text(row[f"{number}_mean"], row[f"{number}_sd"], row[f"{number}_n"], digits)
            cells.append(value + (measured_star if value != NOTHING else ""))
        cells += [_difference(row, number) for number in different]
        cells.append((row["hardware"] or NOTHING) if runtime else _diverged(row))
        cells.append(_comparable(row, reasons))
        groups[-1][1].append(cells)
    if any(_STAR in cell for _, body in groups for cells in body for cell in cells):
        notes.append(f"{_STAR} diverged; best value before it diverged.")
    if any(row.get("trials") for row in rows):
        notes.append("Measured: mean ± standard deviation (trials)" + ("." if runtime else f"; diverged {_RATE_NOTE}"))
    if different:
        notes.append(
            "Difference: measured less published [95% t interval over the trials]; the published number counts as "
            "exact, its own spread over seeds is not known."
        )
    protocols = sorted({p for row in rows for p in (row.get("protocol") or "").split(", ") if p})
    if protocols:
        notes.append(f"Protocols of the measured numbers: {', '.join(protocols)}.")
    noted: dict[str, list[str]] = {}
    for row in rows:
        if _plain_note(row):
            noted.setdefault(row["published_note"], []).append(row["model"].replace("alpha=", "α="))
    notes += [f"{', '.join(models)}: {note}." for note, models in noted.items()]
    notes += [f"[{number}] {reason}." for reason, number in reasons.items()]
    models = [(row["model"].replace("alpha=", "α="), row) for row in rows]
    return Display(CAPTIONS[name], header, groups, notes, [f"{m}: {t}" for m, row in models if (t := _trials(row))])


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


def ranges(ids: str) -> str:
    """Comma-separated ids with runs of three or more consecutive numbers as first–last: "s/t0001–t0005, s/t0007"."""
    groups: list[list[tuple[str, str]]] = []
    for name in ids.split(", "):
        stem, digits = _NUMBERED.fullmatch(name).groups()  # type: ignore[union-attr]  # it fits any text
        last = groups[-1][-1] if groups else None
        follows = last is not None and last[0] == stem and last[1] and digits and int(digits) == int(last[1]) + 1
        if follows and last is not None and len(last[1]) == len(digits):
            groups[-1].append((stem, digits))
        else:
            groups.append([(stem, digits)])
    shown = []
    for group in groups:
        if len(group) > 2:
            first, last = group[0], group[-1]
            shown.append(f"{first[0]}{first[1]}–{last[0].rpartition('/')[2]}{last[1]}")
        else:
            shown += [stem + digits for stem, digits in group]
    return ", ".join(shown)


_NUMBERED = re.compile(r"(.*?)(\d*)", re.DOTALL)


def _difference(row: dict[str, Any], number: str) -> str:
    value, low, high = (row[f"{number}_difference{end}"] for end in ("", "_low", "_high"))
    digits = _NUMBERS[number][1]
    if value is None:
        return NOTHING
    return f"{value:+.{digits}f}" + ("" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]")


def _published(value: float, fewest: int) -> str:
    """A published number as the paper prints it: all its decimals, and no fewer than its column has."""
    decimals = len(f"{value:g}".partition(".")[2])
    return f"{value:.{max(decimals, fewest)}f}"


def _plain_note(row: dict[str, Any]) -> bool:
    return row["published_note"] is not None and "diverges; best" not in row["published_note"]


def _diverged(row: dict[str, Any]) -> str:
    if not row["trials"]:
        return NOTHING
    collapsed = f", {row['collapsed']} collapsed" if row["collapsed"] else ""
    return f"{_rate(row)}{collapsed}"


_RATE_NOTE = (
    "k/n of distinct seeds [95% Wilson interval]; where some were cut off, 1 - Kaplan-Meier [95% log-log interval]."
)


def _rate(row: dict[str, Any]) -> str:
    """A divergence rate as k/n, or as a number where trials were cut off; with its interval."""
    rate, n = row["divergence_rate"], row["divergence_n"]
    if rate is None:
        return NOTHING
    interval = f"[{row['divergence_low']:.2f}, {row['divergence_high']:.2f}]"
    if not row["divergence_censored"]:
        return f"{round(rate * n)}/{n} {interval}"
    return f"{rate:.2f} {interval} of {n}, {row['divergence_censored']} cut off"


def _comparable(row: dict[str, Any], reasons: dict[str, int]) -> str:
    if row["comparable"] is None and row["comparable_reason"] is None:
        return NOTHING
    word = {True: "yes", False: "no", None: NOTHING}[row["comparable"]]
    said = [_ALIKE] if row["comparable"] else []
    said += [row["comparable_reason"]] if row["comparable_reason"] is not None else []
    if not said:
        return word
    number = reasons.setdefault("; ".join(said), len(reasons) + 1)
    return f"{word} [{number}]"


_ALIKE = "settings as published, images of the data set's own files, the paper's protocol where a number has one"


def _hyperparameters(rows: list[dict[str, Any]]) -> Display:
    header = ["Hyperparameter", "Symbol", "Published", "Measured", "Trials", "with the paper's value"]
    symbols = {"rho": "ρ", "alpha": "α", "sigma": "σ"}
    body = [
        [
            row["variable"],
            symbols.get(row["symbol"], row["symbol"]),
            text(row["published"]),
            _values(row),
            str(row["trials"]),
            f"{row['trials_matching']}/{row['trials']}" if row["trials"] else NOTHING,
        ]
        for row in rows
    ]
    notes, trials = [], []
    if any(row["trials"] for row in rows):
        notes.append(
            "Measured: distinct values over trials of the paper's own methods (epochs: also of the classifier); null "
            "values, such as K of a method without chains, are not counted."
        )
        trials = [f"{row['symbol']}: {ranges(row['trial_ids'])}" for row in rows if row["trial_ids"]]
    return Display(CAPTIONS["table_5"], header, [("", body)], notes, trials)


def _values(row: dict[str, Any]) -> str:
    """The measured values of a hyperparameter: all of a few, the range of many."""
    values = row["measured_values"]
    if values is None:
        return NOTHING
    n = values.count(",") + 1
    return values if n <= _FEW else f"{brief(row['measured_min'])} to {brief(row['measured_max'])} ({n} values)"


def _settings(rows: list[dict[str, Any]], caption: str) -> Display:
    # What all settings share is said once below the table; the columns show where they differ.
    varied = [f for f in SETTING_NAMES if len({row[f] for row in rows}) > 1]
    common = [f"{symbol(f)} {text(rows[0][f])}" for f in SETTING_NAMES if rows and f not in varied]
    configs = [configuration(row["config"]) for row in rows]
    others = [f for f in differing(configs) if f not in SETTING_NAMES]
    studies = len({row["study"] for row in rows}) > 1
    metrics = [m for m in METRICS if any(row[f"{m.name}_best_n"] for row in rows)]
    header = ["Study"] if studies else []
    header += ["Setting", *(symbol(f) for f in (*varied, *others)), "Trials", "Diverged", "Median it.", "Collapsed"]
    header += [f"{m.label} best" for m in metrics] + ["Time/it. [ms]", "Saved [s]"]
    body = []
    for row, config in zip(rows, configs, strict=True):
        cells = [row["study"]] if studies else []
        cells += [
            row["setting_id"],
            *(NOTHING if row[f] is None else brief(row[f]) for f in varied),
            *(NOTHING if config.get(f) is None else brief(config[f]) for f in others),
            str(row["trials"]),
        ]
        cells += [_rate(row), _number(row["divergence_iteration_median"], 0), str(row["collapsed"])]
        for m in metrics:
            mean, sd, n = (row[f"{m.name}_best_{k}"] for k in ("mean", "sd", "n"))
            cells.append(spread_text(mean, sd, n, 3 if m.name == "accuracy" else 2))
        pace = row["seconds_per_iteration_mean"]
        cells += [NOTHING if pace is None else f"{1000 * pace:.1f}", _number(row["saved_seconds_sum"], 1)]
        body.append(cells)
    notes = [f"All settings: {', '.join(common)}."] if common else []
    for m in metrics:
        protocols = sorted({row[m.protocol_column] for row in rows if row[m.protocol_column]})
        notes.append(f"{m.label}: {m.meaning}; protocol {', '.join(protocols) or 'not recorded'}.")
    if rows:
        notes.append(f"Diverged: {_RATE_NOTE}")
    return Display(caption, header, [("", body)], notes)


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def markdown(name: str, frame: pd.DataFrame) -> str:
    """A table as GitHub Markdown with caption and footnotes."""
    table = display(name, frame)
    lines = [f"**{_md(table.caption)}**", "", _md_row(table.header), _md_row(["---"] * len(table.header))]
    for heading, rows in table.groups:
        if heading:
            lines.append(_md_row([f"*{_md(heading)}*"] + [""] * (len(table.header) - 1), escape=False))
        lines += [_md_row(row) for row in rows]
    if table.notes:
        lines += ["", *(f"- {_md(note)}" for note in table.notes)]
    if table.trials:
        lines += ["", "Trials:", "", *(f"- {_md(line)}" for line in table.trials)]
    return "\n".join(lines) + "\n"


def _md(value: str) -> str:
    return re.sub(r"([\\|*_<>\[\]`~$&#])", r"\\\1", printable(value))


def _md_row(cells: Sequence[str], *, escape: bool = True) -> str:
    return "| " + " | ".join(_md(c) if escape and c != "---" else c for c in cells) + " |"


_TEX: dict[str, str] = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"$|$",
    "<": r"$<$",
    ">": r"$>$",
    # A bracket at a row's start would be read as the optional argument of the line break before it.
    "[": "{[}",
    "]": "{]}",
    "α": r"$\alpha$",
    "λ": r"$\lambda$",
    "ρ": r"$\rho$",
    "σ": r"$\sigma$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "–": "--",
    "—": "---",
}


def escape_latex(value: str) -> str:
    """Text for LaTeX: special characters escaped, Greek letters in math mode, other non-ASCII as a question mark."""
    return "".join(_TEX.get(c, c if c.isascii() else "?") for c in printable(value))


def latex(name: str, frame: pd.DataFrame) -> str:
    r"""A table as a LaTeX `table` environment; the document needs `\usepackage{booktabs,graphicx}`.

    A table wider than the line is scaled down to it; one that fits stays as it is.
    """
    table = display(name, frame)
    width = len(table.header)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(table.caption.partition(': ')[2] or table.caption)}}}",
        rf"\label{{tab:{name.replace('_', '-')}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{"
        rf"\begin{{tabular}}{{l{'r' * (width - 2)}l}}",
        r"\toprule",
        _tex_row(table.header),
        r"\midrule",
    ]
    for index, (heading, rows) in enumerate(table.groups):
        if heading:
            lines += [r"\addlinespace"] if index else []
            lines.append(rf"\multicolumn{{{width}}}{{l}}{{\emph{{{escape_latex(heading)}}}}} \\")
        lines += [_tex_row(row) for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if table.notes:
        lines += [r"\par\smallskip", r"\begin{minipage}{\linewidth}\footnotesize"]
        lines += [rf"{escape_latex(note)}\par" for note in table.notes]
        lines.append(r"\end{minipage}")
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def csv_text(frame: pd.DataFrame, float_format: str | None = None) -> str:
    """A table as CSV: the columns and numbers of its Parquet file, nothing where there is null.

    A row is a line, and no text in it a formula; see `analysis.words.cell`.
    """
    shown = frame.rename(columns=lambda name: cell(str(name)))
    for i, kind in enumerate(frame.dtypes):
        if not is_numeric_dtype(kind):
            shown.isetitem(i, [cell(v) if isinstance(v, str) else v for v in frame.iloc[:, i]])
    text_csv: str = shown.to_csv(index=False, float_format=float_format, lineterminator="\n")
    return text_csv


def escape(value: str) -> str:
    """Text for HTML."""
    return html.escape(printable(value))


def html_page(name: str, frame: pd.DataFrame) -> str:
    """A table as an HTML page of its own, light and dark, with caption and footnotes."""
    table = display(name, frame)
    width = len(table.header)
    lines = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(table.caption)}</title>",
        f"<style>{_HTML_STYLE}</style></head><body>",
        f'<div tabindex="0" role="region" aria-label="Table"><table><caption>{escape(table.caption)}</caption>',
        f"<thead>{_html_row(table.header, 'th')}</thead><tbody>",
    ]
    for heading, rows in table.groups:
        if heading:
            lines.append(f'<tr><th colspan="{width}">{escape(heading)}</th></tr>')
        lines += [_html_row(row, "td") for row in rows]
    lines.append("</tbody></table></div>")
    if table.notes:
        lines += ["<ul>", *(f"<li>{escape(note)}</li>" for note in table.notes), "</ul>"]
    if table.trials:
        items = "".join(f"<li>{escape(line)}</li>" for line in table.trials)
        lines.append(f"<details><summary>Trials behind the numbers</summary><ul>{items}</ul></details>")
    return "\n".join([*lines, "</body></html>"]) + "\n"


_HTML_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:1.5rem}div{overflow-x:auto}"
    "table{border-collapse:collapse;border-top:2px solid;border-bottom:2px solid}"
    "caption{text-align:left;font-weight:600;padding:.3rem 0}"
    "th,td{text-align:left;padding:.25rem .6rem;white-space:nowrap}"
    "thead{border-bottom:1px solid}tbody th{padding-top:.7rem;font-style:italic}ul{font-size:.87em;padding-left:1.2rem}"
)


def _html_row(cells: Sequence[str], kind: str) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(escape_latex(c) for c in cells) + r" \\"
