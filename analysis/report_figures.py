"""The figures of a study in the report's page: each with its caption, its data to download, and the call behind it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plotly.io import to_json
from threadpoolctl import threadpool_limits

from analysis.anytime import anytime, course_points
from analysis.claims import claims
from analysis.figure_data import drawn_points, outcome_fields, survival_fields, training_curves, training_points
from analysis.figures import (
    anytime_figure,
    cost_figure,
    front_figure,
    outcome_figure,
    steps_figure,
    survival_figure,
    tradeoff_figure,
    training_figure,
)
from analysis.lines import drawn_part
from analysis.load import Results
from analysis.objective import varied_or_all
from analysis.render import csv_text
from analysis.stability_report import other_phases, stability_drawings, survival_lines
from analysis.tradeoff import cost_points, measured_metrics, settings_front, tradeoff
from analysis.words import markup, symbol

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from trainables.schema import Metric

_PLAIN_BYTES = 60_000
"""Most bytes of a figure's data that go into the page as they are; more are compressed."""
_HOVER_LINES = 3
"""Lines of `analysis.figure_data.hover` that say which trial a point is: the page knows them once for all figures."""


@dataclass(frozen=True)
class Drawing:
    """A figure with what belongs to it; the fields are the arguments of `page_figure`."""

    figure: go.Figure
    caption: str
    name: str
    """The study's name, an underscore, and what it is."""
    data: pd.DataFrame | None = None
    """Its data; None where they are what is drawn."""
    made_by: str = ""
    label: str = ""

    @property
    def table(self) -> pd.DataFrame:
        """Its data, or what is drawn where there is no table behind it."""
        return drawn_points(_traces(self.figure)) if self.data is None else self.data


def study_figures(part: Results, study: str, metric: Metric | None) -> dict[str, list[dict[str, Any]]]:
    """Every figure of a study as `page_figure` gives it, by section; arguments of `study_drawings`."""
    return {
        section: [page_figure(d.figure, d.caption, d.name, d.data, d.made_by, d.label) for d in drawings]
        for section, drawings in study_drawings(part, study, metric).items()
    }


def study_drawings(part: Results, study: str, metric: Metric | None) -> dict[str, list[Drawing]]:
    """Every figure of a study, by section of the report: outcomes, phase, survival and so on.

    Args:
        part: The study alone.
        study: Its name.
        metric: Its objective, if it has one.
    """
    # Models of a few fields take many small products: threads would spend more time waiting for each other.
    with threadpool_limits(limits=1, user_api="blas"):
        return _drawings(part, study, metric)


def _drawings(part: Results, study: str, metric: Metric | None) -> dict[str, list[Drawing]]:
    figures: dict[str, list[Drawing]] = {
        n: [] for n in ("outcomes", "phase", "survival", "stability", "tradeoff", "settings", "anytime", "training")
    }
    place = f'results = load("{study}"); trials = results.trials'
    if len(part.trials):
        x, y = outcome_fields(part, study)
        figures["outcomes"] = [
            Drawing(
                outcome_figure(part, study),
                f"Outcome of every trial over {symbol(x)} and {symbol(y)}",
                f"{study}_outcomes",
                part.trials[[*_TRIAL, x, y]],
                f"{place}\nanalysis.figure_data.outcome_points(trials, {x!r}, {y!r})",
            )
        ]
        said = claims(part.trials, varied_or_all(part, study))
        named = [c.field for c in said.named]
        figures["survival"] = [
            Drawing(
                survival_figure(part.trials, field, tested=field in named),
                "; ".join(
                    [f"Share of trials not diverged, by {symbol(field)}", *survival_lines(part.trials, field, said)]
                ),
                f"{study}_survival_{field}",
                made_by=f"{place}\nanalysis.stability.survival_by(trials, {field!r})",
            )
            for field in survival_fields(part, study)
        ]
        drawn = stability_drawings(part, study)
        phases = [d for d in drawn if d.name == "phase"]
        for name, some in (
            ("phase", [*phases, *other_phases(part, study)]),
            ("stability", [d for d in drawn if d.name != "phase"]),
        ):
            figures[name] = [
                Drawing(d.figure, d.caption, f"{study}_{d.name}", d.data, f"{place}\n{d.code}", d.label) for d in some
            ]
        figures["tradeoff"] = [
            Drawing(
                tradeoff_figure(part, study, m.name),
                f"{m.label} of every trial against time per iteration and K{_front_text(frame)}",
                f"{study}_tradeoff_{m.name}",
                frame,
                f"{place}\nanalysis.tradeoff.tradeoff(trials, {m.name!r})",
            )
            for m in measured_metrics(part.trials)
            for frame in [tradeoff(part.trials, m.name)]
        ]
        if curves := training_curves(part, study, metric):
            which = f"METRIC_BY_NAME[{metric.name!r}]" if metric is not None else "None"
            figures["training"] = [
                Drawing(
                    training_figure(part, study, metric, curves),
                    f"Course of every trial{drawn_part(len(curves), metric)}",
                    f"{study}_training",
                    training_points(curves, metric),
                    f"{place}\ncurves = analysis.figure_data.training_curves(results, {study!r}, {which})\n"
                    f"analysis.figure_data.training_points(curves, {which})",
                )
            ]
    if len(part.trials) and metric is not None:
        figures |= _settings_figures(part, study, metric, place)
    return figures


_TRIAL = ("study", "trial_id", "setting_id", "seed", "outcome", "cause", "iteration", "iterations_done")


def _front_text(frame: pd.DataFrame) -> str:
    """What a caption says of scores that the front cannot rank."""
    tied, unknown = int(frame["tied"].fillna(False).sum()), not frame["quality_se"].notna().any()
    if unknown:
        return (
            "; sampling errors of the scores were not recorded, so close ones are not ranked by it"
            if len(frame)
            else ""
        )
    bars = "; bars are two standard errors of the score's own sampling"
    return bars + (f", by which {tied} more cannot be told from the Pareto front" if tied else "")


def _settings_figures(part: Results, study: str, metric: Metric, place: str) -> dict[str, list[Drawing]]:
    """Figures of settings and of time, by the study's objective."""
    front = settings_front(part.trials, metric.name)
    shown = [
        Drawing(
            front_figure(part, study, metric.name, front),
            f"Mean {metric.label} of every setting against time per iteration, and how surely it is on the front",
            f"{study}_front_{metric.name}",
            front,
            f"{place}\nanalysis.tradeoff.settings_front(trials, {metric.name!r})",
        )
    ]
    if front["sampling_steps"].notna().any():
        shown.append(
            Drawing(
                steps_figure(part, study, metric.name, front),
                f"Mean {metric.label} of every setting against K",
                f"{study}_steps_{metric.name}",
                front,
                f"{place}\nanalysis.tradeoff.settings_front(trials, {metric.name!r})",
            )
        )
    points = cost_points(part.trials, metric.name)
    if len(points):
        shown.append(
            Drawing(
                cost_figure(part, study, metric.name),
                f"What the best {metric.label} of every trial took: along a dotted line training time is equal",
                f"{study}_cost_{metric.name}",
                points,
                f"{place}\nanalysis.tradeoff.cost_points(trials, {metric.name!r})",
            )
        )
    courses = anytime(part, metric)
    course = anytime_figure(part, study, metric.name, courses)
    limit = drawn_part(sum(bool(c.seconds) for c in courses), metric)
    drawn = [
        Drawing(
            course,
            f"Best {metric.label} so far of every trial over time{limit and f'{limit}; every trial is marked'}",
            f"{study}_anytime_{metric.name}",
            course_points(courses),
            f"{place}\ncourses = analysis.anytime.anytime(results, METRIC_BY_NAME[{metric.name!r}])\n"
            "analysis.anytime.course_points(courses)",
        )
    ]
    return {"settings": shown, "anytime": drawn if course.data else []}


def page_figure(
    figure: go.Figure,
    caption: str,
    name: str = "figure",
    data: pd.DataFrame | None = None,
    made_by: str = "",
    label: str = "",
) -> dict[str, Any]:
    """A figure for the page, its data to download, and what made it.

    Args:
        figure: The figure; the page's own templates and texts replace its.
        caption: Its caption.
        name: Of the file to download, without its suffix.
        data: Its data; what is drawn, where there is no table behind it.
        made_by: The call that gives the data.
        label: What it is called where readers choose one figure of several.
    """
    link = download(drawn_points(_traces(figure)) if data is None else data, name)
    # The page brings the template for its colour scheme; plotly's own default would be embedded once per figure.
    figure.layout.template = None
    with_trials = _without_what_the_page_knows(figure)
    return {
        "caption": caption,
        "height": figure.layout.height or 450,
        "json": escape_script(to_json(markup(figure.to_plotly_json()), validate=False)),
        "made_by": made_by,
        "label": label,
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


def _traces(figure: go.Figure) -> list[dict[str, Any]]:
    """The traces' own arrays: a figure as a dictionary has them encoded."""
    names = ("name", "x", "y", "text", "hovertext")
    return [{name: getattr(trace, name, None) for name in names} for trace in figure.data]


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
