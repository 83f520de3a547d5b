"""Results to tables, figures and a report; needs neither torch nor Ray.

In a notebook (`analysis/tutorial.py` is one) or a script:

    import analysis

    results = analysis.load("results/quickstart")     # results.trials, .epochs, .bench: data frames, null: not measured
    analysis.describe("trials")                       # their columns with type, unit and meaning
    tables = analysis.build_tables(results)           # "table_1" ... "table_6", "settings"
    analysis.phase_figure(results.trials)             # a plotly figure of data frames

What there is:

| name | gives |
|---|---|
| `load(*paths)` | `Results` of study folders or URLs |
| `describe(name)` | columns, types, units and meanings of a frame |
| `signals(results)` | per-iteration signals of all trials as one frame |
| `build_tables(results)`, `write_tables(results, folder)` | the paper's Tables 1-6, published beside measured; `tables` is their module |
| `write_report(results, file)` | the report as one HTML file |
| `export_figures(results, folder)` | every figure as files |
| `outcome_figure(trials)`, `phase_figure(trials)` | outcomes over two fields; with the estimated stable region |
| `survival_figure(trials, by)`, `hazard_figure(trials, by)` | divergence over training |
| `importance_figure(trials)`, `interaction_figure(trials)` | which fields matter; which act together |
| `tradeoff_figure(trials)`, `front_figure(trials)`, `steps_figure(trials)`, `cost_figure(trials)` | quality against time and K |
| `anytime_figure(trials, epochs)`, `training_figure(trials, epochs, signals)`, `courses_figure(trials, epochs)` | over time, iterations and epochs |
| `histogram_figure(histograms)`, `tsne_figure(points)`, `energies_figure(points)` | of trained models, from the files of `mebm figures` |

All but `load` are imported when they are first used; so are the modules (`analysis.tradeoff`, `analysis.stability` ...).
"""  # noqa: E501

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from analysis.load import load as load

if TYPE_CHECKING:
    from analysis.exhibits import energies_figure, histogram_figure, tsne_figure
    from analysis.export import export_figures
    from analysis.frames import describe, signals
    from analysis.load import Results, ResultsError
    from analysis.plots import (
        anytime_figure,
        cost_figure,
        courses_figure,
        front_figure,
        hazard_figure,
        importance_figure,
        interaction_figure,
        outcome_figure,
        phase_figure,
        steps_figure,
        survival_figure,
        tradeoff_figure,
        training_figure,
    )
    from analysis.report import write_report
    from analysis.tables import build_tables, write_tables

_HOME = {
    "Results": "load",
    "ResultsError": "load",
    "describe": "frames",
    "signals": "frames",
    "build_tables": "tables",
    "write_tables": "tables",
    "write_report": "report",
    "export_figures": "export",
    "outcome_figure": "plots",
    "phase_figure": "plots",
    "survival_figure": "plots",
    "hazard_figure": "plots",
    "importance_figure": "plots",
    "interaction_figure": "plots",
    "tradeoff_figure": "plots",
    "front_figure": "plots",
    "steps_figure": "plots",
    "cost_figure": "plots",
    "anytime_figure": "plots",
    "training_figure": "plots",
    "courses_figure": "plots",
    "histogram_figure": "exhibits",
    "tsne_figure": "exhibits",
    "energies_figure": "exhibits",
}
"""Module of every public name."""

__all__ = [
    "Results",
    "ResultsError",
    "anytime_figure",
    "build_tables",
    "cost_figure",
    "courses_figure",
    "describe",
    "energies_figure",
    "export_figures",
    "front_figure",
    "hazard_figure",
    "histogram_figure",
    "importance_figure",
    "interaction_figure",
    "load",
    "outcome_figure",
    "phase_figure",
    "signals",
    "steps_figure",
    "survival_figure",
    "tradeoff_figure",
    "training_figure",
    "tsne_figure",
    "write_report",
    "write_tables",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"analysis.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"analysis.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"analysis.{name}":
                raise
    raise AttributeError(f"module 'analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
