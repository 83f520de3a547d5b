"""What a pointer over a trial shows: its name, its setting, how it ended."""

from __future__ import annotations

import html
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from analysis.results.labels import brief, symbol
from analysis.results.parquet import each_row, plain
from analysis.stats.trials.grouping import coded
from analysis.stats.trials.trial import ENDED_BADLY, Trial
from trainables.results.schema import CAUSE_TEXT, Cause, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

_HOVER_FIELDS = ("sampling_steps", "step_size", "initial", "norm", "l2_weight")
_OF_TRIAL = ["trial_id", "setting_id", "seed", "outcome", "iterations_done", "iteration", "cause", "message"]


def _said(field: str, value: Any) -> str:
    return f"{symbol(field)} {brief(value)}"


def _around(trial: Trial) -> tuple[str, str]:
    """The lines above and below the setting."""
    last = f"seed {trial['seed']}, {trial['setting_id']}"
    if trial["outcome"] == Outcome.FAILED and trial["message"] is not None:
        # plotly reads hover text as markup.
        last += f"<br>{html.escape(shorten(trial['message'], 100, placeholder=' …'), quote=False)}"
    return f"<b>{trial['trial_id']}</b> {ending(trial)}", last


class Hovers:
    """What a pointer over each of these trials shows: name, setting, seed, how and when it ended and why."""

    def __init__(self, trials: pd.DataFrame) -> None:
        self._trials = trials
        self._around = [_around(t) for t in each_row(trials[_OF_TRIAL])]
        self._fields: dict[str, list[str]] = {}

    def over(self, fields: Sequence[str] = ()) -> list[str]:
        """The texts, in the order of the trials; these settings are named first."""
        named = dict.fromkeys((*fields, *_HOVER_FIELDS))
        self._fields |= {f: in_words(self._trials[f]) for f in named if f not in self._fields}
        settings = zip(*(self._fields[f] for f in named), strict=True)
        return [
            f"{first}<br>{', '.join(said)}<br>{last}"
            for (first, last), said in zip(self._around, settings, strict=True)
        ]


def in_words(column: pd.Series[Any]) -> list[str]:
    """A setting of every trial in words, such as "K 2"; each of its values is put into words once."""
    codes, distinct = coded(plain(column))
    words = [_said(str(column.name), value) for value in distinct]
    return [words[i] for i in codes.tolist()]


def ending(trial: Trial) -> str:
    """How a trial ended, in words: outcome, iteration, cause."""
    if trial["outcome"] not in ENDED_BADLY:
        done = f" ({trial['iterations_done']} iterations)" if trial["iterations_done"] is not None else ""
        return f"{trial['outcome']}{done}"
    when = f" at iteration {trial['iteration']}" if trial["iteration"] is not None else ""
    why = f": {CAUSE_TEXT[Cause(trial['cause'])]}" if trial["cause"] is not None else ""
    return f"{trial['outcome']}{when}{why}"


def hover_by_id(trials: pd.DataFrame) -> dict[str, str]:
    """The texts by trial id."""
    return dict(zip(trials["trial_id"].tolist(), Hovers(trials).over(), strict=True))
