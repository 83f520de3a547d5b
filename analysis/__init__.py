"""Results to tables, figures and a report; needs neither torch nor Ray.

In a notebook (`docs/tutorial.py` is one) or a script:

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
| `build_tables(results)`, `write_tables(results, folder)` | the paper's Tables 1-6, published beside measured; `analysis.paper` is their module |
| `write_report(results, file)` | the report as one HTML file |
| `export_figures(results, folder)` | every figure as files |
| `outcome_figure(trials)`, `phase_figure(trials)` | outcomes over two fields; with the estimated stable region |
| `survival_figure(trials, by)`, `hazard_figure(trials, by)` | divergence over training |
| `rates_figure(trials)` | how often training ends badly, by K and p0 or the fields that tell most |
| `importance_figure(trials)`, `interaction_figure(trials)` | which fields matter; which act together |
| `ablation_figure(trials)`, `parallel_figure(trials)` | which single change makes a setting stable; every trial over all fields |
| `budget_figure(trials, epochs)` | how well an early epoch ranks trials like the last: whether pruning is safe |
| `tradeoff_figure(trials)`, `front_figure(trials)`, `steps_figure(trials)`, `cost_figure(trials)` | quality against time and K |
| `scaling_figure(results)` | boundary of stability of one study at growing size, and its power law |
| `anytime_figure(trials, epochs)`, `training_figure(trials, epochs, signals)`, `courses_figure(trials, epochs)` | over time, iterations and epochs |
| `histogram_figure(histograms)`, `tsne_figure(points)`, `energies_figure(points)` | of trained models, from the files of `mebm figures` |

All are imported when they are first used; so are the modules, with or without their room
(`analysis.tradeoff` is `analysis.stats.tradeoff.tradeoff`).
"""  # noqa: E501

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.figures.anytime import anytime_figure
    from analysis.figures.budget import budget_figure
    from analysis.figures.export import export_figures
    from analysis.figures.importance import importance_figure, interaction_figure
    from analysis.figures.learning_curves import courses_figure
    from analysis.figures.models.drawings import energies_figure, histogram_figure, tsne_figure
    from analysis.figures.outcomes import outcome_figure
    from analysis.figures.phase import phase_figure
    from analysis.figures.rates import rates_figure
    from analysis.figures.scaling import scaling_figure
    from analysis.figures.settings import cost_figure, front_figure, steps_figure
    from analysis.figures.space import ablation_figure, parallel_figure
    from analysis.figures.survival import hazard_figure, survival_figure
    from analysis.figures.tradeoff import tradeoff_figure
    from analysis.figures.training import training_figure
    from analysis.notebook import describe, signals
    from analysis.report.page import write_report
    from analysis.results.load import Results
    from analysis.results.load import load as load
    from analysis.results.messages import ResultsError
    from analysis.tables.paper import build_tables, write_tables

_HOME = {
    "Results": "results.load",
    "ResultsError": "results.load",
    "load": "results.load",
    "describe": "notebook",
    "signals": "notebook",
    "build_tables": "tables.paper",
    "write_tables": "tables.paper",
    "write_report": "report.page",
    "export_figures": "figures.export",
}
"""Module of every public name but those of figures, which `analysis.figures.registry` finds."""
_STATS = tuple(f"stats.{room}" for room in ("trials", "survival", "tradeoff", "sensitivity", "space", "comparison"))
_ROOMS = ("results", *_STATS, "tables", "detector", "figures", "report")

__all__ = [
    "Results",
    "ResultsError",
    "ablation_figure",
    "anytime_figure",
    "budget_figure",
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
    "parallel_figure",
    "phase_figure",
    "rates_figure",
    "scaling_figure",
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
    if name.endswith("_figure"):
        from analysis.figures.registry import notebook_function

        if (value := notebook_function(name)) is not None:
            globals()[name] = value
            return value
    for module in () if name.startswith("_") else (name, *(f"{room}.{name}" for room in _ROOMS)):
        try:
            return importlib.import_module(f"analysis.{module}")
        except ModuleNotFoundError as error:
            if error.name != f"analysis.{module}":
                raise
    raise AttributeError(f"module 'analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
