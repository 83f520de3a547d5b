"""Tables as files for people: Markdown, LaTeX (booktabs), HTML and CSV."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from pandas.api.types import is_numeric_dtype

from analysis.results.labels import cell, free_name, printable
from analysis.results.parquet import records
from analysis.tables.registry import NOTHING, Display, tables, without
from analysis.tables.settings import show_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd


def display(name: str, frame: pd.DataFrame) -> Display:
    """The display form of a table of `build_tables` or `study_tables`, by its name there; nothing empty is in it."""
    rows = records(frame)
    for table in tables():
        if table.name == name:
            return without(table.show(table.caption, rows))
    return without(show_settings(f"Settings of the study {rows[0]['study'] if rows else ''}".rstrip(), rows))


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


_MATHS = {"α": "alpha", "λ": "lambda", "ρ": "rho", "σ": "sigma", "±": "pm", "≤": "leq", "≥": "geq"}
_TEX: dict[str, str] = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{c: f"${c}$" for c in "|<>"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    # A bracket at a row's start would be read as the optional argument of the line break before it.
    **{c: f"{{{c}}}" for c in "[]"},
    **{c: rf"$\{name}$" for c, name in _MATHS.items()},
    "–": "--",
    "—": "---",
}


def escape_latex(value: str) -> str:
    """Text for LaTeX: special characters escaped, Greek letters in math mode, other non-ASCII as a question mark."""
    return "".join(_TEX.get(c, c if c.isascii() else "?") for c in printable(value))


_MAX_COLUMNS = 8
"""Most columns of a table that stands upright."""
_MAX_ROWS = {"table": 45, "sidewaystable": 28}
"""Most rows of a table on one page."""
_BROAD = {False: 0.38, True: 0.3}
"""Share of the line, upright and on its side, of a first column of long names."""
_LINE_POINTS = {False: 469, True: 648}
"""A line of a page with margins of an inch, in points; a `longtable` cannot be scaled down to it."""
_TYPES = {"footnotesize": 8, "scriptsize": 7, "tiny": 5}
_LONG_NAME = 60
"""Letters of a row's name from which on it has a column of a fixed width, and lines."""


def latex(name: str, frame: pd.DataFrame) -> str:
    r"""A table for LaTeX; the packages it needs stand in a comment above it.

    Settings have names in words. A table of more than 8 columns lies on its side, one of more rows than a page holds is
    a `longtable` (which needs a page of one column). One that is wider than its line is scaled down to it.
    """
    table = _named(display(name, frame))
    width, rows = len(table.header), table.rows
    broad = max((len(row[0]) for row in rows), default=0) > _LONG_NAME
    letters = [max(len(row[i]) for row in (table.header, *rows)) for i in range(broad, width)]
    sideways = width > _MAX_COLUMNS
    long = len(rows) + len(table.groups) > _MAX_ROWS["sidewaystable" if sideways else "table"]
    sideways |= long and _type_size(letters, broad, sideways=False) == "tiny"
    kind = "sidewaystable" if sideways else "table"
    first = rf">{{\raggedright\arraybackslash}}p{{{_BROAD[sideways]}\linewidth}}" if broad else "l"
    columns = f"{first}{'r' * (width - 2)}{'l' * (width > 1)}"
    caption = table.caption.partition(": ")[2] or table.caption
    caption = escape_latex(caption[:1].upper() + caption[1:])
    title = [rf"\caption{{{caption}}}", rf"\label{{tab:{name.replace('_', '-')}}}"]
    head = [r"\toprule", _tex_row(table.header), r"\midrule"]
    body = []
    for index, (heading, cells) in enumerate(table.groups):
        if heading:
            body += [r"\addlinespace"] if index else []
            body.append(rf"\multicolumn{{{width}}}{{l}}{{\emph{{{escape_latex(heading)}}}}} \\")
        body += [_tex_row(row) for row in cells]
    notes = [rf"{escape_latex(note)}\par" for note in table.notes]
    packages = ["booktabs", *(["array"] if broad else [])]
    if long:
        packages += ["longtable", *(["pdflscape"] if sideways else [])]
        lines = [
            *([r"\begin{landscape}"] if sideways else []),
            rf"\begingroup\{_type_size(letters, broad, sideways=sideways)}\setlength{{\tabcolsep}}{{3pt}}",
            rf"\begin{{longtable}}{{{columns}}}",
            *title[:1],
            title[1] + r" \\",
            *head,
            r"\endfirsthead",
            *head,
            r"\endhead",
            r"\bottomrule",
            r"\endfoot",
            *body,
            r"\end{longtable}",
            *([r"\noindent\begin{minipage}{\linewidth}", *notes, r"\end{minipage}"] if notes else []),
            r"\endgroup",
            *([r"\end{landscape}"] if sideways else []),
        ]
    else:
        packages += ["graphicx", *(["rotating"] if sideways else [])]
        lines = [
            rf"\begin{{{kind}}}",
            r"\centering",
            *title,
            rf"\resizebox{{\ifdim\width>\linewidth\linewidth\else\width\fi}}{{!}}{{\begin{{tabular}}{{{columns}}}",
            *head,
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            *([r"\par\smallskip", r"\begin{minipage}{\linewidth}\footnotesize", *notes] if notes else []),
            *([r"\end{minipage}"] if notes else []),
            rf"\end{{{kind}}}",
        ]
    return "\n".join([rf"% Needs \usepackage{{{','.join(packages)}}}", *lines]) + "\n"


def _type_size(letters: Sequence[int], broad: bool, *, sideways: bool) -> str:
    """The largest type in which columns of so many letters fit a page's line beside a broad first one."""
    line = _LINE_POINTS[sideways]
    room = line * (1 - (_BROAD[sideways] if broad else 0))
    fits = (name for name, size in _TYPES.items() if sum(0.52 * size * n + 6 for n in letters) <= room)
    return next(fits, "tiny")


def _named(table: Display) -> Display:
    """A table whose rows have names in words in the place of an identifier and the columns that make it up."""
    if table.naming is None:
        return table
    first, end = table.naming
    taken: set[str] = set()

    def named(row: list[str]) -> list[str]:
        parts = zip(table.header[first + 1 : end], row[first + 1 : end], strict=True)
        words = ", ".join(f"{field} {value}" for field, value in parts if value != NOTHING)
        taken.add(words := free_name(words or "as below", taken, "{} ({})"))
        return [*row[:first], words, *row[end:]]

    groups = [(heading, [named(row) for row in rows]) for heading, rows in table.groups]
    return replace(table, header=[*table.header[: first + 1], *table.header[end:]], groups=groups, naming=None)


def csv_text(frame: pd.DataFrame, float_format: str | None = None) -> str:
    """A table as CSV: the columns and numbers of its Parquet file, nothing where there is null.

    A row is a line, and no text in it a formula; see `analysis.results.labels.cell`.
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
    """A table as its own HTML page, light and dark, with caption and footnotes."""
    table = display(name, frame)
    lines = [f"<thead>{_html_row(table.header, 'th')}</thead><tbody>"]
    for heading, rows in table.groups:
        if heading:
            lines.append(f'<tr><th colspan="{len(table.header)}">{escape(heading)}</th></tr>')
        lines += [_html_row(row, "td") for row in rows]
    lines.append("</tbody></table></div>")
    if table.notes:
        lines += ["<ul>", *(f"<li>{escape(note)}</li>" for note in table.notes), "</ul>"]
    if table.trials:
        items = "".join(f"<li>{escape(line)}</li>" for line in table.trials)
        lines.append(f"<details><summary>Trials behind the numbers</summary><ul>{items}</ul></details>")
    page = (files("analysis.tables") / "table.html").read_text(encoding="utf-8")
    return Template(page).substitute(caption=escape(table.caption), body="\n".join(lines))


def _html_row(cells: Sequence[str], kind: str) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(escape_latex(c) for c in cells) + r" \\"
