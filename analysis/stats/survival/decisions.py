"""Divergence rates of settings, whether they are decided about a limit, and how many more seeds would decide.

Verdicts and bounds hold however often one looks: they are those of a confidence sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from analysis.results.parquet import records
from analysis.stats.survival.rates import Interval, Rate, rate_of
from analysis.stats.trials.grouping import group_by, sort_key
from analysis.stats.trials.trial import Trial, distinct_rows
from trainables.results.schema import Outcome

LOOKS_ERROR = 0.025
"""Chance of a wrong verdict on either side of a limit, however often the seeds are looked at."""
_MAX_SEEDS = 100_000
_EACH = 200
"""More seeds up to which every number of them is tried."""
_RATE_FROM = ("study", "setting_id", "seed", "outcome", "iteration", "iterations_done", "iterations_planned")


def _rates_by(trials: pd.DataFrame, fields: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Trial], Rate]]:
    """Per combination of values of `fields`, ascending: the values, the trials without repeats, their divergence."""
    rows = records(distinct_rows(trials)[[*dict.fromkeys((*fields, *_RATE_FROM))]])
    groups = sorted(group_by(rows, fields).items(), key=lambda g: tuple(map(sort_key, g[0])))
    return [(values, group, rate_of(group)) for values, group in groups]


def divergence_by(trials: pd.DataFrame, fields: Sequence[str]) -> pd.DataFrame:
    """Divergence rate per combination of values of `fields`, ascending (`analysis.rates.rate`).

    Returns:
        The fields, then `trials` (distinct seeds that trained), `diverged`, `collapsed`, `rate`, `low`, `high` (95%,
        fractions, by iteration `at`), `at`, `at_risk` (still training just before it), `censored` (cut off before it).
    """
    names = [*fields, "trials", "diverged", "collapsed", "rate", "low", "high", "at", "at_risk", "censored"]
    rows = []
    for values, group, r in _rates_by(trials, fields):
        collapsed, at = sum(t["outcome"] == Outcome.COLLAPSED for t in group), r.at if r.trials else None
        rows.append((*values, r.trials, r.events, collapsed, r.rate, r.low, r.high, at, r.at_risk, r.censored))
    frame = pd.DataFrame(rows, columns=names).convert_dtypes()
    return frame.astype(dict.fromkeys(("rate", "low", "high"), "Float64"))


def evidence(k: int, n: int, limit: float) -> tuple[float, float]:
    """Evidence that a rate is below a limit, and that it is above, from k of n, valid however often it is looked at.

    Each is a mixture of likelihood ratios of the rates on its side, weighted by Jeffreys' Beta(1/2, 1/2), to the limit
    (Robbins 1970). Were the rate on the other side, it would ever reach 1 / a with a probability of at most a (Ville
    1939), whether one looks once, after every seed, or stops when it suits.
    """
    below, above = _log_evidence(np.array([k]), np.array([n]), limit)
    return math.exp(min(below[0], 700.0)), math.exp(min(above[0], 700.0))


def _log_evidence(
    k: NDArray[np.int64], n: NDArray[np.int64], limit: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logarithms of `evidence`, arrays in and out."""
    at_limit = special.xlogy(k, limit) + special.xlog1py(n - k, -limit)
    whole = special.betaln(k + 0.5, n - k + 0.5) - special.betaln(0.5, 0.5) - at_limit
    with np.errstate(divide="ignore"):
        below = np.log(special.betainc(k + 0.5, n - k + 0.5, limit)) - np.log(special.betainc(0.5, 0.5, limit))
        above = np.log(special.betaincc(k + 0.5, n - k + 0.5, limit)) - np.log(special.betaincc(0.5, 0.5, limit))
    return whole + below, whole + above


@lru_cache(maxsize=4096)  # seeds are few, so thousands of settings have the same few counts
def verdict(k: int, n: int, limit: float, censored: int = 0) -> str:
    """Whether the divergence rate of k of n seeds is below a limit, above it, or undecided.

    Wrong with a chance of at most 5% in all, also for looking again after every seed (`evidence`). The `censored` of
    the n seeds, cut off before they had diverged, are taken for diverged where "below" is asked, and for stable where
    "above" is: so nothing is assumed of why they were cut off.
    """
    if evidence(min(k + censored, n), n, limit)[0] >= 1 / LOOKS_ERROR:
        return "below"
    return "above" if evidence(k, n, limit)[1] >= 1 / LOOKS_ERROR else "undecided"


@lru_cache(maxsize=4096)
def seeds_needed(
    k: int, n: int, limit: float, most: int = _MAX_SEEDS, censored: int = 0, rate: float | None = None
) -> int | None:
    """How many more seeds would decide whether the divergence rate is below `limit` or above, if the rate holds.

    Where the rate times their number is not a whole number, both its neighbours must decide (`verdict`). None of the
    new seeds is cut off.

    Returns:
        The smallest number for which `rate` (k/n where not given) decides, beyond 200 to one in a hundred; 0 where it
        is decided already; None where even `most` seeds in all would not decide it.
    """
    if n == 0:
        return None
    if verdict(k, n, limit, censored) != "undecided":
        return 0
    # Whole numbers, as floor and ceil of a product of floats would miss them.
    part, whole = (k, n) if rate is None else (round(rate * 10**9), 10**9)

    def first(more: NDArray[np.int64]) -> int | None:
        new = (part * more // whole, -(-part * more // whole))
        below = np.minimum.reduce([_log_evidence(k + censored + e, n + more, limit)[0] for e in new])
        above = np.minimum.reduce([_log_evidence(k + e, n + more, limit)[1] for e in new])
        decided = (below >= -math.log(LOOKS_ERROR)) | (above >= -math.log(LOOKS_ERROR))
        return int(decided.argmax()) if decided.any() else None

    near = np.arange(1, min(_EACH, most - n) + 1)
    if (place := first(near)) is not None:
        return int(near[place])
    # Of many more every one in a hundred, and then those between the last that does not decide and the first that does.
    far = np.unique(np.geomspace(_EACH, max(most - n, _EACH), 1000).astype(np.int64))
    if most - n <= _EACH or (place := first(far)) is None:
        return None
    between = np.arange(far[place - 1] + 1, far[place] + 1)
    found = first(between)
    return int(between[-1 if found is None else found])


@lru_cache(maxsize=4096)
def looked_at_bounds(k: int, n: int) -> tuple[float, float]:
    """Bounds of the rate of k of n that hold with 95% for all numbers of seeds at once: those `verdict` leaves open."""

    def found(side: int) -> float:
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            decided = evidence(k, n, middle)[side] >= 1 / LOOKS_ERROR
            low, high = (low, middle) if decided != (side == 1) else (middle, high)
        return high if side == 0 else low

    return 0.0 if k == 0 else found(1), 1.0 if k == n else found(0)


def seeds_note(k: int, n: int, limit: float = 0.1) -> str:
    """What k diverged of n trials support about a divergence rate of `limit`, in words; bounds for repeated looks."""
    if n == 0:
        return "no trial has trained"
    counts = Interval(k, n, k / n, *looked_at_bounds(k, n))
    return f"{counts}: {_seeds_text(k, n, limit, 0, None)}"


def _seeds_text(k: int, n: int, limit: float, censored: int, rate: float | None) -> str:
    found = verdict(k, n, limit, censored)
    if found != "undecided":
        return f"{found} {limit:.0%}"
    more = seeds_needed(k, n, limit, censored=censored, rate=rate)
    if more is None:
        reason = "no number of seeds" if rate == limit or k / n == limit else f"not even {_MAX_SEEDS:,} seeds"
        return f"undecided about {limit:.0%}, and {reason} would decide if the rate holds"
    return f"undecided about {limit:.0%}; {more} more {'seed' if more == 1 else 'seeds'} would decide if the rate holds"


def decisions(trials: pd.DataFrame, fields: Sequence[str], limit: float = 0.1) -> pd.DataFrame:
    """Divergence rate per combination of values of `fields`, whether it is decided about `limit`, what would decide it.

    Returns:
        The columns of `divergence_by`, then `verdict` (below, above or undecided), `more_seeds` (0 where decided; null
        where no number would decide or nothing trained) and `note`.
    """
    verdicts, needed, notes = [], [], []
    for _, _, r in _rates_by(trials, fields):
        k, n, censored = r.events, r.trials, r.censored
        held = r.rate if censored else None
        verdicts.append(verdict(k, n, limit, censored) if n else "undecided")
        needed.append(seeds_needed(k, n, limit, censored=censored, rate=held))
        if censored:
            remark = f"; {r.remark}" if r.remark else ""
            notes.append(f"{r}: {_seeds_text(k, n, limit, censored, held)}, counting those cut off either way{remark}")
        else:
            notes.append(seeds_note(k, n, limit))
    return divergence_by(trials, fields).assign(
        verdict=pd.array(verdicts, dtype="string"),
        more_seeds=pd.array(needed, dtype="Int64"),
        note=pd.array(notes, dtype="string"),
    )
