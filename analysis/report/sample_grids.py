"""Grids of sample images in the report: which of a study are shown, and what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from analysis.figures.hover import ending
from analysis.results.epoch_rows import epoch_rows
from analysis.results.load import Results
from analysis.results.parquet import each_row, records
from analysis.stats.trials.objective import objective, setting_text, sign, varied_or_all
from analysis.stats.trials.trial import Trial, configuration
from trainables.results.schema import METRICS, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_KINDS = ("buffer", "fresh", "samples", "end")
_MOST_OF_ONE = 3
"""Most grids of one trial: a script has none of the buffer."""
_EpochsOf = Callable[[str, "Sequence[str]"], "list[Trial]"]
"""Columns of the epochs of a trial, by its id."""


@dataclass(frozen=True)
class SampleGrid:
    """A grid of samples to show, with what it is."""

    trial_id: str
    kind: str
    title: str
    """The trial and what of it the grid shows."""
    caption: str
    """Its setting, how it ended, and the quality of these samples."""
    path: Path
    outcome: str = ""
    detail: str = ""
    """The trial, and the protocol of that quality."""


def sample_grids(results: Results, study: str, best: int = 2) -> list[SampleGrid]:
    """Sample grids of the best completed trials by the study's objective, then of one diverged and one collapsed.

    Of those that ended badly the first with the most grids is shown: it also has what it made before. Samples of an
    untrained model show p0 and are left out.
    """
    metric = objective(results, study)
    trials = records(results.trials[results.trials["study"] == study])
    completed = [t for t in trials if t["outcome"] == Outcome.COMPLETED]
    if metric is not None:
        scored = [t for t in completed if t[f"{metric.name}_best"] is not None]
        completed = sorted(scored, key=lambda t: sign(metric) * t[f"{metric.name}_best"])
    part = results.of(study)
    fields = varied_or_all(results, study)
    current = epoch_rows(part.trials, part.epochs)
    spans = dict(zip(part.trials["trial_id"], current.spans, strict=True))

    def epochs_of(trial_id: str, columns: Sequence[str]) -> list[Trial]:
        # Of the trials whose grids are looked at, not of all: a large study has millions of epochs.
        return [*each_row(part.epochs.iloc[current.rows[slice(*spans[trial_id])]][[*columns]])]

    def grids_of(trial: Trial) -> list[SampleGrid]:
        return _grids(results, study, trial, fields, epochs_of)

    shown = list(islice((g for t in completed if (g := grids_of(t))), best))
    for outcome in (Outcome.DIVERGED, Outcome.COLLAPSED):
        most: list[SampleGrid] = []
        for grids in (grids_of(t) for t in trials if t["outcome"] == outcome):
            most = grids if len(grids) > len(most) else most
            if len(most) >= _MOST_OF_ONE:
                break
        shown += [most]
    return [grid for group in shown for grid in group]


def _grids(results: Results, study: str, trial: Trial, fields: Sequence[str], epochs_of: _EpochsOf) -> list[SampleGrid]:
    """The grids that were kept of a trial, labelled by its values of `fields` and by its epochs."""
    setting = setting_text(trial, fields)
    grids = []
    for kind in _KINDS:
        path = results.sample_grid(study, trial["trial_id"], kind)
        if path is None:
            continue
        if kind == "end":  # no metric is taken of the samples of a trial's last iteration
            when = f"at iteration {trial['iteration']}" if trial["iteration"] is not None else "at its end"
            what, quality, protocol = f"chains {when}, when it {trial['outcome']}", "", ""
        else:
            what, quality, protocol = _evaluated(epochs_of, trial, kind)
        if not what:
            continue
        own = f"{setting}, seed {trial['seed']}" if setting else f"seed {trial['seed']}"
        caption = "; ".join(part for part in (quality, own, "" if kind != "end" else ending(trial)) if part)
        title = f"{what[:1].upper()}{what[1:]}"
        detail = f"{trial['trial_id']} {ending(trial)}{'; protocol ' if protocol else ''}{protocol}"
        grids.append(SampleGrid(trial["trial_id"], kind, title, caption, path, trial["outcome"], detail))
    return grids


def _evaluated(epochs_of: _EpochsOf, trial: Trial, kind: str) -> tuple[str, str, str]:
    """What the samples of a trial's last evaluation are, and the first metric of them with its protocol.

    Empty where the model was untrained.
    """
    what = "replay buffer"
    if kind == "fresh":
        steps = configuration(trial["config"]).get("evaluation.fresh_steps")
        what = "fresh chains from p0" + (f", {steps} steps" if steps is not None else "")
    if kind == "samples":
        return "samples that its script gave", "", ""
    metrics = [m for m in METRICS if m.name.endswith(f"_{kind}")]
    columns = ["epoch", *(name for m in metrics for name in (m.name, m.protocol_column))]
    rows = [r for r in epochs_of(trial["trial_id"], columns) if any(r[m.name] is not None for m in metrics)]
    if not rows:
        return (what if trial["epochs_done"] else ""), "", ""
    last = rows[-1]
    if last["epoch"] == 0:
        return "", "", ""
    metric = next(m for m in metrics if last[m.name] is not None)
    protocol = last[metric.protocol_column] or "not recorded"
    return f"{what}, epoch {last['epoch']}", f"{metric.label} {last[metric.name]:.3g}", protocol
