"""Tables as files for people: Markdown, LaTeX (booktabs), HTML and CSV."""

from __future__ import annotations

import html
import re
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from pandas.api.types import is_numeric_dtype

from analysis.results.labels import cell, printable
from analysis.results.parquet import records
from analysis.tables.registry import Display, tables
from analysis.tables.settings import show_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd


def display(name: str, frame: pd.DataFrame) -> Display:
    """The display form of a table of `build_tables` or `study_tables`, by its name there."""
    rows = records(frame)
    for table in tables():
        if table.name == name:
            return table.show(table.caption, rows)
    return show_settings(f"Settings of the study {rows[0]['study'] if rows else ''}".rstrip(), rows)


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
    """A table as an HTML page of its own, light and dark, with caption and footnotes."""
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
