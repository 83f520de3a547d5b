# %% [markdown]
# # Studies in a notebook
#
# `docs/tutorial.py` and `docs/examples/tutorial.ipynb` are the same notebook. The first is in the percent format, which VS
# Code opens as cells, and runs as a script too: `python docs/tutorial.py [STUDY]`. The study here is `digits_stability`, as
# committed in `results/published`: M-EBM on small digits, with and without batch norm, at four K, two p₀ and three seeds.
#
# Nothing here needs PyTorch or Ray: results copied to a laptop are enough.

# %%
import sys
import tempfile
from pathlib import Path

import analysis

published = Path(analysis.__file__).parents[1] / "results" / "published" / "digits_stability"
study = Path(sys.argv[1]) if len(sys.argv) > 1 and Path(sys.argv[1]).is_dir() else published
results = analysis.load(study)

# %% [markdown]
# ## Data frames
#
# One row per trial, one per trial and epoch, and one per trial and iteration of the recorded signals. Columns have
# pandas' nullable types; null means "not measured", never 0 and never NaN.

# %%
trials, epochs = results.trials, results.epochs
signals = analysis.signals(results)
trials[["trial_id", "setting_id", "seed", "outcome", "sampling_steps", "initial", "fd_buffer_best"]].head()

# %% [markdown]
# What a column means and its unit; `analysis.notebook.documented()` names all frames that are documented.

# %%
columns = analysis.describe("trials")
columns[columns["column"].isin(["outcome", "iteration", "fd_buffer_best", "seconds_per_iteration"])]

# %% [markdown]
# Everything is ordinary pandas. A trial that diverged is a row like any other: an average over `completed` alone would
# be one over survivors, so counts come first.

# %%
outcomes = trials.groupby(["initial", "sampling_steps"])["outcome"].value_counts().unstack(fill_value=0)
outcomes

# %% [markdown]
# A divergence rate from few seeds is an interval, and `note` says what more seeds would decide.

# %%
rates = analysis.decisions.decisions(trials, ["initial", "sampling_steps"], limit=0.1)
rates[["initial", "sampling_steps", "diverged", "trials", "low", "high", "verdict", "note"]]

# %% [markdown]
# ## Figures
#
# Every figure of the report is a function of data frames that returns a plotly figure.

# %%
figures = {
    "phase": analysis.phase_figure(trials),
    "survival": analysis.survival_figure(trials, by="initial"),
    "training": analysis.training_figure(trials, epochs, signals),
    "tradeoff": analysis.tradeoff_figure(trials, "fd_buffer"),
    "front": analysis.front_figure(trials, "fd_buffer"),
    "anytime": analysis.anytime_figure(trials, epochs, "fd_buffer"),
}
figures["phase"]

# %% [markdown]
# A figure of some of the trials is one of a smaller frame.

# %%
figures["few steps"] = analysis.outcome_figure(trials[trials["sampling_steps"] < 5], ("sampling_steps", "initial"))
figures["few steps"]

# %% [markdown]
# ## Which field matters, and which act together
#
# Both are judged on settings the models have not seen; where they are no better than chance they say so. P values are
# corrected for all that is asked, so pairs of fields are asked about for quality alone.

# %%
fields = [f for f in ("sampling_steps", "initial", "step_size", "norm") if trials[f].nunique() > 1]
importances = analysis.importance.importances(trials, fields, "fd_buffer")
interactions = [analysis.interactions.interactions(trials, fields, "quality", "fd_buffer")]
found = [line for i in importances for line in i.lines()] + [line for i in interactions for line in i.lines()]
found

# %%
figures["importance"] = analysis.importance_figure(trials, fields, "fd_buffer")
figures["interactions"] = analysis.interaction_figure(trials, fields, "fd_buffer")
figures["interactions"]

# %% [markdown]
# ## Tables and files
#
# The paper's Tables 1-6 with your trials beside the published numbers, the report, and figures as files: all of them
# without `only`; `png`, `svg` and `pdf` too where the extra `figures` and a Chrome or Chromium are installed.

# %%
tables = analysis.build_tables(results)
tables["settings"][["setting_id", "setting", "trials", "diverged", "fd_buffer_best_mean", "trial_ids"]].head()

# %%
out = Path(tempfile.mkdtemp())
written = [
    *analysis.write_tables(results, out / "tables"),
    analysis.write_report(results, out / "report.html"),
    *(out / file for e in analysis.export_figures(results, out, only=["phase", "front"]) for file in e.files),
]
sorted(path.name for path in written)
