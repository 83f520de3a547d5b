"""Figures and tables inside the report's page: JSON that plotly draws, data as links, what scripts may hold."""

from __future__ import annotations

import base64
import gzip
import json
import re
from typing import TYPE_CHECKING, Any

from plotly.io import to_json

from analysis.figures.registry import SECTIONS, study_drawings
from analysis.figures.style import drawn_points
from analysis.results.labels import markup
from analysis.tables.render import csv_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from analysis.results.load import Results

_PLAIN_BYTES = 60_000
"""Most bytes of a figure's data that go into the page as they are; more are compressed."""
_HOVER_LINES = 3
"""Lines of `analysis.figures.hover.Hovers` that say which trial a point is: the page has them once for all figures."""


def study_figures(part: Results, study: str, missing: list[str]) -> dict[str, list[list[dict[str, Any]]]]:
    """Every figure of a study as `page_figure` gives it, by section; drawings to choose among are together.

    `missing` takes why others show nothing.
    """
    shown: dict[str, dict[str, list[dict[str, Any]]]] = {section: {} for section in SECTIONS}
    for d in study_drawings(part, study, missing):
        drawn = page_figure(d.figure, d.caption, f"{study}_{d.name}", d.data, d.code, d.label, d.how)
        # Without a label readers see all.
        shown[d.section].setdefault(d.record if d.label else d.name, []).append(drawn)
    return {section: list(groups.values()) for section, groups in shown.items()}


def page_figure(
    figure: go.Figure,
    caption: str,
    name: str,
    data: pd.DataFrame | None = None,
    made_by: str = "",
    label: str = "",
    how: str = "",
) -> dict[str, Any]:
    """A figure for the page, whose template and texts replace its, and its data (`Part`) to download as `name`."""
    link = download(drawn_points(figure.data) if data is None else data, name)
    # The page brings the template for its colour scheme; plotly's own default would be embedded once per figure.
    figure.layout.template = None
    with_trials = _without_what_the_page_knows(figure)
    return {
        "caption": caption,
        "height": figure.layout.height or 450,
        "json": escape_script(to_json(markup(figure.to_plotly_json()), validate=False)),
        "made_by": made_by,
        "label": label,
        "how": how,
        "trials": with_trials,
        **link,
    }


def _without_what_the_page_knows(figure: go.Figure) -> bool:
    """Take from the points and lines of trials the texts that the page writes itself; whether there are any."""
    found = False
    for trace in figure.data:
        if trace.ids is not None:
            found = True
        elif trace.meta is not None and "trial" in trace.meta:
            found = True
            trace.update(text=None, hovertemplate=None)
        else:
            continue
        if trace.hovertext is not None:
            own = ["<br>".join(str(text).split("<br>")[_HOVER_LINES:]) for text in trace.hovertext]
            trace.hovertext = own if any(own) else None
    return found


def download(data: pd.DataFrame, name: str) -> dict[str, str]:
    """A table as a link that needs no server: CSV in the page itself, compressed where it is long."""
    content = csv_text(data, float_format="%.7g").encode()
    kind, suffix = "text/csv", ".csv"
    if len(content) > _PLAIN_BYTES:
        # Without a time in it, so that the same results give the same page.
        content, kind, suffix = gzip.compress(content, mtime=0), "application/gzip", ".csv.gz"
    file = re.sub(r"[^A-Za-z0-9_.-]+", "_", name) + suffix
    return {"href": f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}", "file": file}


def script_json(value: Any) -> str:
    """A value as JSON for a script element of the page."""
    return escape_script(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def escape_script(text_json: str) -> str:
    """JSON that cannot end the script element it stands in, nor turn round how the page's source is shown."""
    # Inside a script element only "<" can end it early; in JSON it occurs in strings alone.
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text_json.replace("<", "\\u003c"))


_UNSEEN = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
