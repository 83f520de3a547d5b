"""Studies of energy-based models in a notebook or a script.

    import mebm

    results = mebm.run("quickstart", changes={"search.trials": 4, "trial.epochs": 2})
    results.trials[["trial_id", "outcome", "fd_buffer_best"]]
    mebm.phase_figure(results.trials)

    results = mebm.load("results/quickstart")     # of a study that was run before

| name | gives |
|---|---|
| `run(config)`, `resume(folder)` | run a study, or continue one, and load its results |
| `Monitor(**arguments)` | a training script of yours, supervised |
| `Method`, `field` | a training method of yours: its hooks, its own settings |
| `trainer(method)` | a run of a method in this process, for tests and notebooks |
| `Contrastive`, `Classifies` | methods with one loss per batch, with a cross-entropy |
| `Batch`, `Stream`, `Outputs`, `Variant`, `Progress` | what hooks take and give |
| `CHAINS`, `CONTRASTIVE`, `Sam` | groups of a trial's fields (`Method.uses`); an update rule |
| `load(*paths)` | `Results` of study folders or URLs: data frames `trials`, `epochs`, `bench` |
| `describe(name)`, `signals(results)` | what the columns mean; per-iteration signals |
| `build_tables`, `write_tables`, `write_report`, `export_figures` | tables, the report, figures as files |
| `phase_figure`, `survival_figure`, ... | every figure of `analysis`, by its name there |
| `UserError`, `RunError`, `ResultsError` | a mistake in what was given; a study that could not go on; results that cannot be read |

Nothing is imported before it is used, so that `import mebm` takes no time; only `run`, `resume` and methods need torch (and Ray).
"""  # noqa: E501

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from _mebm_study import other

if TYPE_CHECKING:
    from analysis import *  # noqa: F403
    from mebm.monitor import LearntRule, Monitor, MonitorError, Options
    from mebm.studies import resume, run
    from mebm.trying import trainer
    from study.config.errors import RunError, UserError
    from trainables.config.method import CHAINS, CONTRASTIVE, field
    from trainables.training.method import Batch, Classifies, Contrastive, Method, Outputs, Progress, Stream, Variant
    from trainables.training.network import Sam

_CLIENT = ("LearntRule", "Monitor", "MonitorError", "Options")
"""Of `mebm.monitor`, which stands alone: a script's own `study/` or `analysis/` is in nobody's way."""
_HOOKS = ("Batch", "Classifies", "Contrastive", "Method", "Outputs", "Progress", "Stream", "Variant")
_HOME = {
    **dict.fromkeys(_CLIENT, "mebm.monitor"),
    **dict.fromkeys(_HOOKS, "trainables.training.method"),
    **dict.fromkeys(("CHAINS", "CONTRASTIVE", "field"), "trainables.config.method"),
    "Sam": "trainables.training.network",
    "trainer": "mebm.trying",
    "run": "mebm.studies",
    "resume": "mebm.studies",
    "UserError": "study.config.errors",
    "RunError": "study.config.errors",
}
"""Module of every name that is not one of `analysis`."""

__all__ = [
    "CHAINS", "CONTRASTIVE", "Batch", "Classifies", "Contrastive", "LearntRule", "Method", "Monitor", "MonitorError",
    "Options", "Outputs", "Progress", "RunError", "Sam", "Stream", "UserError", "Variant", "field", "resume", "run",
    "trainer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module 'mebm' has no attribute {name!r}")
    module = _HOME.get(name, "analysis")
    for package in ("analysis", "configs", "study", "trainables") if name not in _CLIENT else ():
        if place := other(package):
            raise ImportError(f"{place}: is in the way of mebm's own package {package!r}; rename it or move it")
    try:
        value = getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise AttributeError(f"module 'mebm' has no attribute {name!r}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *importlib.import_module("analysis").__all__})
