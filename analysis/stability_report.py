"""What the report shows of stability beyond survival curves: figures with their captions and data, tables, words."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from analysis.claims import Claims, claims
from analysis.detector import Replay, recorded, replay_recordings
from analysis.figure_data import Hovers, survival_fields
from analysis.importance import IMPORTANCE_COLUMNS, OPTUNA_COLUMNS, OPTUNA_FILE, Importance, importances
from analysis.interactions import (
    Interactions,
    all_interactions,
    interaction_caption,
    interaction_figure,
    interaction_rows,
)
from analysis.load import Results, ResultsError, empty_frame, read_parquet, records, typed_frame
from analysis.objective import objective, setting_text, varied_or_all
from analysis.phase import phase, phase_caption, phase_fields
from analysis.stability import compute_by, decisions, hazard, logrank_lines, logrank_pairs, survival_by
from analysis.stability_figures import draw_phase, hazard_figure, importance_figure
from analysis.words import duration, symbol, text
from trainables.schema import CAUSE_TEXT, Cause, Column

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    import plotly.graph_objects as go

NOTHING = "–"
_FEWEST_EVENTS = 3
"""Divergences below which a hazard over training is only its upper bound."""
_PHASE_FIELDS = 5
"""Most fields any two of which have a phase diagram in the report."""
_PARTS = ("useful", "diverged", "collapsed", "failed", "open", "evaluation", "replayed", "lost", "other")


@dataclass(frozen=True)
class Drawn:
    """A figure with what belongs to it."""

    name: str
    """phase, hazard, importance, interactions, or phase_ with the two fields of another phase diagram."""
    figure: go.Figure
    caption: str
    data: pd.DataFrame
    code: str
    """The call that gives the data, over `trials` of the study."""
    label: str = ""
    """What a phase diagram is over, to choose it by."""


@dataclass(frozen=True)
class Table:
    """A table for people."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def stability_drawings(results: Results, study: str) -> list[Drawn]:
    """Phase diagram, hazard over training, and importances of a study; those that its trials allow."""
    trials = results.trials[results.trials["study"] == study]
    if not len(trials):
        return []
    drawn = [_phase("phase", trials, *phase_fields(results, study), Hovers(trials))]
    said = claims(trials, varied_or_all(results, study))
    by = said.first if said.first in survival_fields(results, study) else None
    rates = hazard(trials, by)
    if len(rates) and int(rates["events"].sum()) >= _FEWEST_EVENTS:
        caption = (
            "Hazard over training" + (f", by {symbol(by)}" if by else "") + ": divergences per iteration at risk, with "
            "exact 95% Poisson intervals. A triangle is the upper bound where none diverged; dotted lines part the "
            "bins, which follow the divergences."
        )
        drawn.append(
            Drawn("hazard", hazard_figure(trials, by), caption, rates, f"analysis.stability.hazard(trials, {by!r})")
        )
    found = study_importances(results, study)
    optuna = optuna_rows(results, study)
    figure = importance_figure(found, optuna)
    if figure is not None:
        caption = (
            "How much of the spread between held-out settings a model traces to each field, its interactions included, "
            f"with two standard errors. Of divergence or collapse: {claims_text(said)}. "
            + " ".join(f"{line[:1].upper()}{line[1:]}." for line in importance_lines(found))
        )
        if len(optuna):
            caption += (
                " Optuna: PED-ANOVA, how differently each field is distributed among the best tenth of the trials "
                "(divergence: among those that completed), on its own scale and without a test against chance."
            )
        code = "analysis.stability_report.importance_rows(analysis.stability_report.study_importances(results, study))"
        drawn.append(Drawn("importance", figure, caption, importance_rows(found, optuna), code))
    pairs = study_interactions(results, study)
    figure = interaction_figure(pairs)
    if figure is not None:
        code = "analysis.interactions.interaction_rows(analysis.stability_report.study_interactions(results, study))"
        drawn.append(Drawn("interactions", figure, interaction_caption(pairs), interaction_rows(pairs), code))
    return drawn


def other_phases(results: Results, study: str) -> list[Drawn]:
    """Phase diagrams over every other two of a study's varied fields, at most `_PHASE_FIELDS`, named ones first."""
    trials = results.trials[results.trials["study"] == study]
    if not len(trials):
        return []
    first = phase_fields(results, study)
    varied = [f for f in varied_or_all(results, study) if len(trials[f].unique()) > 1]
    named = [c.field for c in claims(trials, varied).named]
    ranked = dict.fromkeys((*first, *named, *varied))
    # In the order of the pair that is shown first: of any two the one named first lies along x.
    pairs = combinations([f for f in ranked if f in varied][:_PHASE_FIELDS], 2)
    hovers = Hovers(trials)
    return [_phase(f"phase_{x}_{y}", trials, x, y, hovers) for x, y in pairs if {x, y} != set(first)]


def _phase(name: str, trials: pd.DataFrame, x: str, y: str, hovers: Hovers) -> Drawn:
    diagram = phase(trials, x, y)
    code = f"analysis.phase.phase(trials, {x!r}, {y!r}).cells"
    label = f"{symbol(x)} and {symbol(y)}"
    return Drawn(name, draw_phase(diagram, trials, hovers), phase_caption(diagram), diagram.cells, code, label)


def study_importances(results: Results, study: str) -> list[Importance]:
    """Importances of a study's varied fields for its objective, time and divergence."""
    trials = results.trials[results.trials["study"] == study]
    metric = objective(results, study)
    return importances(trials, varied_or_all(results, study), metric.name if metric is not None else None)


def optuna_rows(results: Results, study: str) -> pd.DataFrame:
    """Optuna's importances that a study has (`OPTUNA_COLUMNS`); none where they were not computed or are damaged."""
    path = results.folders[study] / OPTUNA_FILE
    try:
        return read_parquet(path, OPTUNA_COLUMNS) if path.is_file() else empty_frame(OPTUNA_COLUMNS)
    except ResultsError as error:
        results.notes.append(f"{error}; left out")
        return empty_frame(OPTUNA_COLUMNS)


def study_interactions(results: Results, study: str) -> list[Interactions]:
    """Interactions of a study's varied fields for its objective and divergence."""
    trials = results.trials[results.trials["study"] == study]
    metric = objective(results, study)
    return all_interactions(trials, varied_or_all(results, study), metric.name if metric is not None else None)


def importance_rows(found: Sequence[Importance], optuna: pd.DataFrame | None = None) -> pd.DataFrame:
    """The importances of all targets as one frame: `target`, then `IMPORTANCE_COLUMNS`; of Optuna model is optuna."""
    rows = [{"target": i.target, **r} for i in found for r in records(i.fields)]
    names = ("target", "field", "importance")
    rows += [] if optuna is None else [{"model": "optuna", **{n: r[n] for n in names}} for r in records(optuna)]
    return typed_frame(rows, (Column("target", "string", "what is explained"), *IMPORTANCE_COLUMNS))


def importance_lines(found: Sequence[Importance]) -> list[str]:
    """All importances in words, refusals among them."""
    return [line for i in found for line in i.lines()]


def claims_text(said: Claims) -> str:
    """The fields that may be named with their tests, or that none stands out."""
    named = ", ".join(f"{symbol(c.field)} stands out ({c})" for c in said.named)
    return named or said.line() or "nothing to tell fields apart by"


def survival_lines(trials: pd.DataFrame, field: str, said: Claims | None = None) -> list[str]:
    """What to say under a field's survival curves: tests, and informative censoring.

    Log-rank tests between its groups stand there only where the field is named among all that were varied: of several
    fields some part the trials well by chance.

    Args:
        trials: `TRIAL_COLUMNS`.
        field: The field of the curves.
        said: What may be said of the study's fields; None where the field was chosen before the trials were seen.
    """
    if said is None or field in [c.field for c in said.named]:
        lines = logrank_lines(logrank_pairs(trials, field))
        lines += [f"{symbol(field)}: {c}" for c in said.named if c.field == field] if said is not None else []
    else:
        lines = [f"{symbol(field)} does not stand out among {said.fields} fields: differences may be chance"]
    return lines + [f"{symbol(field)} {c.value}: {c.remark}" for c in survival_by(trials, field) if c.remark]


def decision_table(results: Results, study: str, limit: float = 0.1) -> Table:
    """Every setting's divergence rate, whether it is decided about `limit`, and how many seeds would decide it."""
    trials = results.trials[results.trials["study"] == study]
    names = _setting_names(results, study)
    rows = []
    for r in records(decisions(trials, ["setting_id"], limit)):
        seeds = NOTHING if r["more_seeds"] is None else text(r["more_seeds"])
        rows.append([names[r["setting_id"]], f"{r['diverged']}/{r['trials']}", r["verdict"], seeds, r["note"]])
    header = ["Setting", "Diverged", f"About {limit:.0%}", "More seeds", "95% bounds, and what would decide"]
    note = (
        f"Decided is a setting whose bounds lie on one side of {limit:.0%}, whatever became of trials cut off. "
        "The bounds hold however often one looks. More seeds: if the rate seen so far holds; a dash where no number "
        "would decide."
    )
    return Table("Divergence rate of every setting", note, header, rows)


def warning_table(results: Results, study: str) -> Table | None:
    """When the detector warned of every trial, beside the released check; None where no signals were kept."""
    found, rules = recorded(results.of(study))
    if not found:
        return None
    replay: Replay = replay_recordings(found, None, rules)
    rows = []
    for r in records(replay.table()):
        cause = NOTHING if r["alarm_cause"] is None else CAUSE_TEXT[Cause(r["alarm_cause"])]
        saved = NOTHING if r["saved_iterations"] is None else text(r["saved_iterations"])
        time = NOTHING if r["saved_seconds"] is None else duration(r["saved_seconds"])
        ends = " (recording ends)" if r["cut_short"] and r["alarm_cause"] is not None else ""
        released = _or_dash(r["released_iteration"]) + ends
        row = [r["run"].rpartition("/")[2], r["outcome"], r["verdict"], _or_dash(r["alarm_iteration"]), cause]
        rows.append([*row, released, _or_dash(r["lead"]), saved, time])
    header = ["Trial", "Outcome", "Verdict", "Alarm", "Cause", "|loss| > 1e5", "Lead", "Saved iterations", "Saved"]
    return Table("Early warning", "; ".join(" ".join(line.split()) for line in replay.lines()) + ".", header, rows)


def compute_table(results: Results, study: str) -> Table:
    """Where the time of every setting went, most first, and of all in the last row."""
    trials = results.trials[results.trials["study"] == study]
    names = _setting_names(results, study)
    rows = records(compute_by(trials))
    with_gpu = any(r["gpu_spent"] for r in rows)
    shown = [p for p in _PARTS if any(r[p] for r in rows)]
    total = {k: sum(r[k] for r in rows) for k in rows[0] if k != "setting_id"} if rows else {}
    lines = [
        [label, text(r["trials"]), *(duration(r[p]) if r[p] else NOTHING for p in (*shown, "spent", "saved"))]
        + ([duration(r["gpu_spent"])] if with_gpu else [])
        for label, r in [*((names[r["setting_id"]], r) for r in rows), *([("all", total)] if rows else [])]
    ]
    header = [
        "Setting",
        "Trials",
        *(p.capitalize() for p in shown),
        "Spent",
        "Saved",
        *(["GPU time"] if with_gpu else []),
    ]
    return Table("Compute of every setting", "Saved was never spent; the other columns add up to spent.", header, lines)


def _setting_names(results: Results, study: str) -> dict[str, str]:
    fields = varied_or_all(results, study)
    names = [*dict.fromkeys(("setting_id", *fields))]
    trials: list[dict[str, Any]] = records(results.trials.loc[results.trials["study"] == study, names])
    return {t["setting_id"]: setting_text(t, fields) or t["setting_id"] for t in trials}


def _or_dash(value: Any) -> str:
    return NOTHING if value is None else text(value)
