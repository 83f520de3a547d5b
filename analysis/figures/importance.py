"""Which fields matter for quality, time and divergence, and which act together."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.figures.registry import Figure, Nothing, Part, Study
from analysis.figures.style import GREY, PALETTE, grouped, light, short
from analysis.results.labels import brief, symbol
from analysis.results.load import Results
from analysis.results.messages import ResultsError
from analysis.results.parquet import empty_frame, read_parquet, records
from analysis.stats.sensitivity import importance, interactions
from analysis.stats.sensitivity.importance import OPTUNA_COLUMNS, Importance
from analysis.stats.sensitivity.interactions import Interactions, gain_text, pair_name
from trainables.results.layout import OPTUNA_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import TypeVar

    import pandas as pd

    from analysis.stats.sensitivity.claims import Claims

    Target = TypeVar("Target", Importance, Interactions)

_FAINT = 0.3
_OPTUNA = "Optuna (adds up to 100%)"
_LINES = PALETTE[:4]
_EFFECT_HEIGHT, _GAP = 220, 90
_TITLE = {"font": {"size": 12}, "x": 0, "xanchor": "left", "align": "left"}


def importance_figure(
    trials: pd.DataFrame, fields: Sequence[str] | None = None, metric: str | None = None
) -> go.Figure:
    """Which field matters for quality, time and divergence; `analysis.importance.importances` gives the numbers.

    A `ValueError` says why there is nothing to show for any target.
    """
    return light(draw_importance(importance.importances(*_asked(trials, fields, metric))))


def interaction_figure(
    trials: pd.DataFrame, fields: Sequence[str] | None = None, metric: str | None = None
) -> go.Figure:
    """Which fields act together on quality and divergence; numbers and errors as of `importance_figure`."""
    return light(draw_interactions(interactions.all_interactions(*_asked(trials, fields, metric))))


def _asked(
    trials: pd.DataFrame, fields: Sequence[str] | None, metric: str | None
) -> tuple[pd.DataFrame, Sequence[str], str | None]:
    study = Study.of_frames(trials, metric=metric)
    return trials, fields or study.varied, study.metric.name if study.metric is not None else None


def optuna_rows(results: Results, study: str) -> pd.DataFrame:
    """Optuna's importances that a study has (`OPTUNA_COLUMNS`); none where they were not computed or are damaged."""
    path = results.folders[study] / OPTUNA_FILE
    try:
        return read_parquet(path, OPTUNA_COLUMNS) if path.is_file() else empty_frame(OPTUNA_COLUMNS)
    except ResultsError as error:
        results.notes.append(f"{error}; left out")
        return empty_frame(OPTUNA_COLUMNS)


def claims_text(said: Claims) -> str:
    """The fields that may be named with their tests, or that none stands out."""
    named = ", ".join(f"{symbol(c.field)} stands out ({c})" for c in said.named)
    return named or said.line() or "nothing to tell fields apart by"


_INTERACTION_HOW = (
    "What a pair adds to single effects on held-out settings, with two standard errors, and its second-order share of "
    "a forest's spread; below the joint effect of an interaction (dotted: what the single effects alone would give; "
    "open: no trial near). P values are corrected for all pairs and targets (Holm). "
)


def _sentences(found: Iterable[Importance | Interactions]) -> str:
    """All results in words, refusals among them."""
    return " ".join(f"{line[:1].upper()}{line[1:]}." for i in found for line in i.lines())


def _importance_data(study: Study) -> Iterator[Part | Nothing]:
    found = study.importances
    optuna = optuna_rows(study.results, study.name)
    shown = [i for i in found if not i.refusal]
    if not shown:
        yield Nothing(f"importances: {_reasons(found)}")
        return
    caption = f"{shown[0].lines()[0][:1].upper()}{shown[0].lines()[0][1:]}."
    how = (
        "How much of the spread between held-out settings a model traces to each field, its interactions included, "
        "with two standard errors; only models that are better than chance are shown. Of divergence or collapse: "
        f"{claims_text(study.said)}. {_sentences(found)}"
    )
    if len(optuna):
        how += (
            " Optuna: PED-ANOVA, how differently each field is distributed among the best tenth of the trials "
            "(divergence: among those that completed), on its own scale and without a test against chance."
        )
    code = f"analysis.importance.importance_rows(analysis.importance.study_importances(results, {study.name!r}))"
    yield Part(importance.importance_rows(found, optuna), caption, code, given=(found, optuna), how=how)


def _interaction_data(study: Study) -> Iterator[Part | Nothing]:
    """Where a pair interacts: others are no finding, and are drawn nowhere."""
    found = interactions.study_interactions(study.results, study.name)
    shown = [i for i in found if not i.refusal and i.pairs["interacts"].any()]
    if not shown:
        tested = [i for i in found if not i.refusal]
        pairs = sum(len(i.pairs) for i in tested)
        yield Nothing(
            f"interactions: none of {pairs} pairs of fields adds to single effects more than chance"
            if tested
            else f"interactions: {_reasons(found)}"
        )
        return
    code = f"analysis.interactions.interaction_rows(analysis.interactions.study_interactions(results, {study.name!r}))"
    caption = f"{shown[0].lines()[0][:1].upper()}{shown[0].lines()[0][1:]}."
    how = f"{_INTERACTION_HOW}{_sentences(found)}"
    yield Part(interactions.interaction_rows(found), caption, code, given=shown, how=how)


def _reasons(found: Iterable[Importance | Interactions]) -> str:
    """Why there is nothing to show, each reason once."""
    chance = [i.label for i in found if "no better than chance" in i.refusal]
    few = [i.refusal for i in found if i.label not in chance]
    named = [f"no model explains {' or '.join(chance)} better than chance"] if chance else []
    return "; ".join(dict.fromkeys([*named, *few]))


def _shown(found: Sequence[Target]) -> list[Target]:
    """The results that there are, of at least one target."""
    shown = [i for i in found if not i.refusal]
    if not shown:
        raise ValueError("; ".join(f"{i.label}: {i.refusal}" for i in found))
    return shown


def _panels(heights: list[int], titles: list[str], shares: list[int] | None) -> tuple[go.Figure, int]:
    """Panels below each other, which also fit a narrow window, and how high they are together."""
    # Room for the ticks below a panel and the title above the next one, whatever the number of panels.
    height = sum(heights) + _GAP * (len(heights) - 1)
    spacing = _GAP / height if len(heights) > 1 else 0.0
    figure = make_subplots(
        rows=len(heights), cols=1, row_heights=shares, vertical_spacing=spacing, subplot_titles=titles
    )
    return figure, height


def draw_importance(found: Sequence[Importance], optuna: pd.DataFrame | None = None) -> go.Figure:
    """Importances by target: one bar per field and model that is better than chance, with two standard errors.

    Optuna's own (`OPTUNA_COLUMNS`) are drawn beside them; never refused, they stand only where another model is better
    than chance. A `ValueError` says that all targets were refused.
    """
    shown = _shown(found)
    most = max(len(set(i.fields["field"])) for i in shown)
    figure, height = _panels([44 * most + 20] * len(shown), [_panel_title(i) for i in shown], None)
    named: set[str] = set()
    for line, result in enumerate(shown, start=1):
        rows = [r for r in records(result.fields) if r["importance"] is not None]
        order = list(dict.fromkeys(r["field"] for r in records(result.fields)))
        own = {} if optuna is None else {r["field"]: r for r in records(optuna) if r["target"] == result.target}
        bars: dict[str, dict[str, Any]] = {}
        for index, model in enumerate(("forest", "linear")):
            if part := {r["field"]: r for r in rows if r["model"] == model}:
                bars[model] = _bars([part[f] for f in order], PALETTE[2 * index])
        if own:
            bars[_OPTUNA] = _optuna_bars([own.get(f) for f in order])
        for name, bar in bars.items():
            group = grouped(name, shown=name not in named)
            y = [symbol(f) for f in order]
            figure.add_bar(**bar, y=y, orientation="h", hoverinfo="text", **group, row=line, col=1)
            named.add(name)
        figure.update_yaxes(autorange="reversed", row=line, col=1)
        figure.update_xaxes(tickformat=".0%", rangemode="tozero", row=line, col=1)
    figure.update_annotations(**_TITLE)
    legend = {"y": 1 + 60 / height, "yanchor": "bottom"}
    return figure.update_layout(
        barmode="group", height=height + 150, margin={"t": 110, "b": 40}, showlegend=True, legend=legend
    )


def _bars(rows: list[dict[str, Any]], colour: str) -> dict[str, Any]:
    opacity = [1.0 if r["stands_out"] else _FAINT for r in rows]
    return {
        "x": [r["importance"] for r in rows],
        "marker": {"color": colour, "line": {"width": 0}, "opacity": opacity},
        "error_x": {"type": "data", "array": [2 * r["se"] for r in rows], "thickness": 1.2, "color": GREY},
        "hovertext": [_bar_text(r) for r in rows],
    }


def _optuna_bars(rows: list[dict[str, Any] | None]) -> dict[str, Any]:
    return {
        "x": [None if r is None else r["importance"] for r in rows],
        "marker": {"color": GREY, "line": {"width": 0}},
        "hovertext": [
            ""
            if r is None
            else f"{symbol(r['field'])}: {r['importance']:.1%} of the sum (PED-ANOVA, {r['trials']} trials)"
            for r in rows
        ],
    }


def _panel_title(result: Importance) -> str:
    skills = ", ".join(
        f"{s.model} {s.share:.0%}" + ("" if s.better_than_chance else " (chance)") for s in result.skills
    )
    faint = "" if all(r["stands_out"] for r in records(result.fields)) else "; faint: no more than chance may give"
    return f"{result.label}<br>held-out skill: {skills}{faint}"


def _bar_text(row: dict[str, Any]) -> str:
    slope = "" if row["direction"] is None else f"; {row['direction']:+.2g} per standard deviation"
    share = f"{row['importance']:.1%} ± {row['se']:.1%} of the spread"
    return f"{symbol(row['field'])}: {share}, corrected p = {row['p']:.2g} ({row['model']}{slope})"


def draw_interactions(found: Sequence[Interactions]) -> go.Figure:
    """Pairs of every target, and below them the joint effect of the first if it is an interaction."""
    shown = _shown(found)
    with_effect = [bool(records(i.pairs)[0]["interacts"]) for i in shown]
    titles: list[str] = []
    heights: list[int] = []
    for result, effect in zip(shown, with_effect, strict=True):
        titles += [result.label] + ([_effect_title(result)] if effect else [])
        heights += [24 * len(result.pairs) + 20] + ([_EFFECT_HEIGHT] if effect else [])
    figure, height = _panels(heights, titles, heights)
    row = 1
    for result, effect in zip(shown, with_effect, strict=True):
        _add_pairs(figure, result, row)
        if effect:
            _add_effect(figure, result, row + 1)
        row += 1 + effect
    figure.update_annotations(**_TITLE)
    legend = {"y": 1 + 50 / height, "yanchor": "bottom"}
    return figure.update_layout(height=height + 190, showlegend=True, barmode="overlay", legend=legend)


def _effect_title(result: Interactions) -> str:
    """The pair, and its lines in their colours: a legend of all panels would mix them."""
    first, effect = records(result.pairs)[0], records(result.effect)
    lines = ", ".join(
        f'<span style="color:{_LINES[i % len(_LINES)]}">{html.escape(short(v))}</span>'
        for i, v in enumerate(dict.fromkeys(r["second_value"] for r in effect))
    )
    return f"{pair_name(first)}, {result.label} by {symbol(effect[0]['second'])} {lines}"


def _add_pairs(figure: go.Figure, result: Interactions, row: int) -> None:
    pairs = records(result.pairs)
    names = [pair_name(p) for p in pairs]
    place = {"y": names, "hoverinfo": "text", "showlegend": row == 1, "row": row, "col": 1}
    figure.add_bar(
        x=[p["forest_share"] for p in pairs],
        orientation="h",
        name="share of the forest's spread",
        legendgroup="forest",
        marker={"color": GREY, "opacity": 0.45, "line": {"width": 0}},
        hovertext=[
            f"{name}: {p['forest_share']:.1%} of the forest's spread; alone {symbol(p['first'])} "
            f"{p['first_share']:.1%}, {symbol(p['second'])} {p['second_share']:.1%}"
            for name, p in zip(names, pairs, strict=True)
        ],
        **place,
    )
    colours = [_LINES[1] if p["interacts"] else _LINES[0] for p in pairs]
    shapes = ["diamond" if p["interacts"] else "circle-open" for p in pairs]
    figure.add_scatter(
        x=[p["gain"] for p in pairs],
        mode="markers",
        name="gain on held-out settings",
        legendgroup="gain",
        marker={"size": 10, "color": colours, "symbol": shapes},
        error_x={"type": "data", "array": [2 * p["gain_se"] for p in pairs], "thickness": 1.4, "color": GREY},
        hovertext=[f"{name}: gain {gain_text(p)}, p = {p['p']:.2g}" for name, p in zip(names, pairs, strict=True)],
        **place,
    )
    figure.add_vline(x=0, line={"width": 1, "color": GREY}, row=row, col=1)
    figure.update_yaxes(autorange="reversed", row=row, col=1)
    figure.update_xaxes(tickformat=".2~p", nticks=6, row=row, col=1)


def _add_effect(figure: go.Figure, result: Interactions, row: int) -> None:
    effect = records(result.effect)
    first, second = effect[0]["first"], effect[0]["second"]
    for index, value in enumerate(dict.fromkeys(r["second_value"] for r in effect)):
        part = [r for r in effect if r["second_value"] == value]
        colour = _LINES[index % len(_LINES)]
        place = {"x": [short(r["first_value"]) for r in part], "showlegend": False, "row": row, "col": 1}
        figure.add_scatter(
            y=[r["sum"] for r in part],
            mode="lines",
            line={"color": colour, "width": 1.2, "dash": "dot"},
            hoverinfo="skip",
            **place,
        )
        shapes = ["circle" if r["trials"] else "circle-open" for r in part]
        figure.add_scatter(
            y=[r["predicted"] for r in part],
            mode="lines+markers",
            name=f"{symbol(second)} {short(value)}",
            line={"color": colour, "width": 2},
            marker={"size": 8, "color": colour, "symbol": shapes},
            hovertext=[_effect_text(r) for r in part],
            hoverinfo="text",
            **place,
        )
    figure.update_xaxes(type="category", title_text=symbol(first), row=row, col=1)
    units = {"divergence": "ends badly", "seconds_per_iteration": "s per iteration"}
    figure.update_yaxes(title_text=units.get(result.target, "predicted"), row=row, col=1)
    if result.target == "divergence":
        figure.update_yaxes(tickformat=".0%", row=row, col=1)


def _effect_text(row: Mapping[str, Any]) -> str:
    tried = "no trial near" if not row["trials"] else f"{row['trials']} trials near"
    first, second = symbol(row["first"]), symbol(row["second"])
    return (
        f"{first} {row['first_value']}, {second} {row['second_value']}: {brief(row['predicted'])}; "
        f"single effects alone {brief(row['sum'])} ({tried})"
    )


FIGURES = (
    Figure(
        "importance",
        "fields",
        "Which fields matter",
        importance.TARGET_COLUMNS,
        _importance_data,
        lambda _, given: draw_importance(*given),
        place=2,
    ),
    Figure(
        "interactions",
        "fields",
        "Which fields act together",
        interactions.TARGET_COLUMNS,
        _interaction_data,
        lambda _, found: draw_interactions(found),
        place=3,
    ),
)
