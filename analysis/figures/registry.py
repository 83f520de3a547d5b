"""Every figure as a record: a file of this room has data, drawing, a function for notebooks, and its `FIGURES`.

Report, export, `mebm figures --list` and `analysis.describe` go over them; a file that is added is found by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from threadpoolctl import threadpool_limits

import analysis.figures as room
from analysis.figures.hover import Hovers
from analysis.figures.style import drawn_points
from analysis.results.load import Results
from analysis.results.own import metric_named
from analysis.results.parquet import empty_frame
from analysis.stats.comparison.objectives import Objective, objectives
from analysis.stats.sensitivity.claims import Claims, claims
from analysis.stats.sensitivity.importance import Importance, study_importances
from analysis.stats.space.axes import telling_fields
from analysis.stats.tradeoff.front import settings_front
from analysis.stats.trials.objective import objective, varied_or_all
from analysis.tables.registry import modules
from trainables.plugins.installed import registered
from trainables.plugins.loaded import loaded, say_broken
from trainables.results.own import OWN
from trainables.results.schema import EPOCH_COLUMNS, SETTING_NAMES, TRIAL_COLUMNS, Column, Metric

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SECTIONS = ("answer", "phase", "survival", "quality", "curves", "fields", "pruning")
"""Sections of the report that have figures, in its order; the first is what it opens with, the others are folded."""
TOGETHER = "together"
"""Section of figures over all studies at once."""


@dataclass(frozen=True)
class _Frames(Results):
    """Data frames in the place of a study's folder; there are no samples, and signals are those of a frame."""

    recorded: dict[str, pd.DataFrame] = field(default_factory=dict)

    def signals(self, study: str, trial_id: str) -> pd.DataFrame | None:  # noqa: ARG002
        return self.recorded.get(trial_id)

    def sample_grid(self, study: str, trial_id: str, kind: str) -> Path | None:  # noqa: ARG002
        return None


@dataclass(frozen=True)
class Study:
    """One study to draw, and what its figures share; for `TOGETHER` all studies, without a name."""

    results: Results
    name: str
    metric: Metric | None
    """Its quality; None where none was measured."""
    _fronts: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_frames(
        cls,
        trials: pd.DataFrame,
        epochs: pd.DataFrame | None = None,
        signals: pd.DataFrame | None = None,
        metric: str | None = None,
    ) -> Study:
        """Data frames as a study: what the figures of notebooks are drawn from.

        Args:
            trials: `TRIAL_COLUMNS`, all or some of a study's; settings of two or more values are those it varied.
            epochs: `EPOCH_COLUMNS`.
            signals: `SIGNAL_COLUMNS`.
            metric: Name of the quality; the first that was measured where it is left out.

        Raises:
            ValueError: The trials are of several studies: ids are unique in one only.
            KeyError: There is no such metric, or a frame lacks a column.
        """
        known = [c.name for c in TRIAL_COLUMNS]
        if lacking := [name for name in known if name not in trials.columns]:
            raise KeyError(f"trials lack the columns {', '.join(lacking[:5])}; see analysis.describe('trials')")
        names = list(dict.fromkeys(trials["study"].tolist()))
        if len(names) > 1:
            raise ValueError(f"trials of {len(names)} studies ({', '.join(names)}): take those of one")
        quality = None if metric is None else metric_named(metric, trials)
        study = str(names[0]) if names else "study"
        # A searched field that is not a column itself is one that `load` added from the configurations.
        fields = [*SETTING_NAMES, *(str(c) for c in trials.columns if c not in known and not str(c).startswith(OWN))]
        varied = [f for f in fields if len(trials[f].unique()) > 1]
        manifest = {"study": study, "varied": varied, "objectives": [{"metric": metric}] if metric else []}
        epochs = empty_frame(EPOCH_COLUMNS) if epochs is None else epochs[epochs["trial_id"].isin(trials["trial_id"])]
        by_trial = {} if signals is None else {str(k): v for k, v in signals.groupby("trial_id")}
        found = _Frames(trials, epochs, {study: manifest}, {study: Path()}, recorded=by_trial)
        return cls(found, study, quality or objective(found, study))

    @property
    def trials(self) -> pd.DataFrame:
        """Its trials, `TRIAL_COLUMNS`."""
        return self.results.trials

    @property
    def quality(self) -> Metric:
        """Its metric, or a `ValueError` where no trial has a value of any."""
        if self.metric is None:
            raise ValueError("no trial has a quality; see analysis.describe('trials')")
        return self.metric

    @cached_property
    def varied(self) -> list[str]:
        """The fields it varied."""
        return varied_or_all(self.results, self.name)

    @cached_property
    def said(self) -> Claims:
        """What may be said of these fields."""
        return claims(self.trials, self.varied)

    @cached_property
    def telling(self) -> tuple[str, ...]:
        """The one or two fields that its first figures show (`stats.space.axes.telling_fields`)."""
        return telling_fields(self.trials, self.varied, [c.field for c in self.said.named])

    @cached_property
    def objectives(self) -> list[Objective]:
        """What it improves, as far as it was measured."""
        return objectives(self.results, self.name)

    @cached_property
    def hovers(self) -> Hovers:
        """What a pointer over a trial shows."""
        return Hovers(self.trials)

    @cached_property
    def importances(self) -> list[Importance]:
        """What its fields tell of quality, time and divergence."""
        return study_importances(self.results, self.name)

    @property
    def front(self) -> pd.DataFrame:
        """Its settings with their places on the Pareto front, `FRONT_COLUMNS`."""
        return self.front_of(self.quality.name)

    def front_of(self, metric: str) -> pd.DataFrame:
        """The same by another quality."""
        if metric not in self._fronts:
            self._fronts[metric] = settings_front(self.trials, metric)
        return self._fronts[metric]


@dataclass(frozen=True)
class Part:
    """What one drawing of a figure shows; a figure of fields or metrics has one for each.

    Attributes:
        data: The figure's columns first; None where they are the points that are drawn.
        caption: What it shows of this study, in a sentence.
        code: The call that gives the data, over `results` and `trials`.
        of: Fields or metric it is of, as a part of its name; empty where the figure has one drawing.
        label: What readers choose it by among several; empty where they see all.
        given: What `Figure.draw` needs beside the study.
        how: How it was found and how to read it.
    """

    data: pd.DataFrame | None
    caption: str
    code: str
    of: str = ""
    label: str = ""
    given: Any = None
    how: str = ""


@dataclass(frozen=True)
class Nothing:
    """Why a figure of a study shows nothing, in a line of words."""

    why: str


@dataclass(frozen=True)
class Figure:
    """A figure of the report, the export and notebooks.

    Attributes:
        name: First part of the names of its drawings, such as survival.
        section: Where in the report it stands: one of `SECTIONS`, or `TOGETHER`.
        takeaway: The question it answers, in one line.
        columns: Of its data; those of settings and metrics that it adds are in `TRIAL_COLUMNS`.
        data: What to draw of a study, in order; nothing, or why, where its trials do not allow it.
        draw: Draws one of these, of the study and what `Part.given` holds.
        place: Its place in the section; equal ones stand by name.
    """

    name: str
    section: str
    takeaway: str
    columns: tuple[Column, ...]
    data: Callable[[Study], Iterable[Part | Nothing]]
    draw: Callable[[Study, Any], go.Figure]
    place: int = 9

    def __post_init__(self) -> None:
        """Refuse a section that the report does not have."""
        if self.section not in (*SECTIONS, TOGETHER):
            raise ValueError(f"figure {self.name}: no section {self.section!r}; there are {', '.join(SECTIONS)}")


@dataclass(frozen=True)
class Drawing:
    """A figure that was drawn, with what belongs to it (`Part`): of a study or of all (""), by a name such as phase."""

    study: str
    name: str
    section: str
    figure: go.Figure
    caption: str
    data: pd.DataFrame | None
    code: str
    label: str = ""
    how: str = ""
    record: str = ""
    """Name of the `Figure` it is a drawing of."""

    @property
    def table(self) -> pd.DataFrame:
        """Its data, or what is drawn where there is no table behind it."""
        return drawn_points(self.figure.data) if self.data is None else self.data


def named_code(metric: Metric) -> str:
    """A metric in the call behind a figure."""
    return (
        f"analysis.own.metric_named({metric.name!r}, results.trials)"
        if metric.own
        else f"METRIC_BY_NAME[{metric.name!r}]"
    )


def figures() -> list[Figure]:
    """Every figure of the room and of installed plug-ins, in the report's order."""
    found: list[Figure] = [f for module in modules(room) for f in getattr(module, "FIGURES", ())]
    found += [f for _, f in _installed(frozenset(f.name for f in found))]
    order = (*SECTIONS, TOGETHER)
    return sorted(found, key=lambda f: (order.index(f.section), f.place, f.name))


def _installed(taken: frozenset[str]) -> list[tuple[str, Figure]]:
    """Figures of plug-ins with the plug-ins' names: each gives a `Figure` or several."""
    found: list[tuple[str, Figure]] = []
    for plugin, given in loaded("figure"):
        several = given if isinstance(given, list | tuple) else (given,)
        for one in several:
            if not isinstance(one, Figure):
                say_broken(
                    "figure", plugin, ValueError(f"{type(one).__name__} is not an analysis.figures.registry.Figure")
                )
            elif one.name in taken or any(one.name == f.name for _, f in found):
                say_broken("figure", plugin, ValueError(f"there is a figure {one.name} already"))
            else:
                found.append((plugin, one))
    return found


def notebook_function(name: str) -> Any:
    """A public function of the room whose name ends in `_figure`; None where there is none."""
    return next((vars(module)[name] for module in modules(room) if callable(vars(module).get(name))), None)


def study_drawings(part: Results, study: str, missing: list[str] | None = None) -> list[Drawing]:
    """Every figure of a study, of results that hold it alone, in the report's order.

    `missing` takes why figures show nothing, where they say it (`Nothing`).
    """
    if not len(part.trials):
        return []
    alone = len(part.trials) == 1
    shown = [f for f in figures() if f.section != TOGETHER and (not alone or f.section == "curves")]
    one = Study(part, study, objective(part, study))
    return list(_drawings(one, shown, f'results = load("{study}"); trials = results.trials', missing))


def joint_drawings(results: Results) -> list[Drawing]:
    """The figures over all studies at once."""
    place = f"results = load({', '.join(json.dumps(s) for s in results.studies)})"
    return list(_drawings(Study(results, "", None), [f for f in figures() if f.section == TOGETHER], place))


def _drawings(study: Study, shown: Iterable[Figure], place: str, missing: list[str] | None = None) -> Iterator[Drawing]:
    # Models of a few fields take many small products: threads would spend more time waiting for each other.
    with threadpool_limits(limits=1, user_api="blas"):
        own = {f.name: plugin for plugin, f in _installed(frozenset())} if registered("figure") else {}
        for f in shown:
            try:
                yield from _drawings_of(study, f, place, missing)
            except Exception as error:
                if f.name not in own:
                    raise
                say_broken("figure", own[f.name], ValueError(f"{type(error).__name__}: {error}"))


def _drawings_of(study: Study, f: Figure, place: str, missing: list[str] | None) -> Iterator[Drawing]:
    for part in f.data(study):
        if isinstance(part, Nothing):
            if missing is not None:
                missing.append(part.why)
            continue
        name, code = f"{f.name}_{part.of}" if part.of else f.name, f"{place}\n{part.code}"
        drawn = f.draw(study, part.given)
        yield Drawing(
            study.name, name, f.section, drawn, part.caption, part.data, code, part.label, part.how, record=f.name
        )
