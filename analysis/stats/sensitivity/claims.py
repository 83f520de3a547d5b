"""Which field the outcome of a study may be said to depend on: a permutation test corrected for all fields tried.

A field's score is the squared correlation of the martingale residuals of ending badly (Therneau, Grambsch and Fleming
1990, Biometrika 77; trials cut off are censored) with the ranks of its values, or with its values as groups where they
are text (Kruskal and Wallis 1952). Permuted studies say how large the largest score of all fields gets by chance
(Westfall and Young 1993); no field is cut into groups before it is tested.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.util import hash_pandas_object
from scipy import optimize, stats

from analysis.results.epoch_rows import floats
from analysis.results.labels import symbol
from analysis.results.parquet import plain
from analysis.stats.survival.survival import holm
from analysis.stats.trials.grouping import alike, coded
from analysis.stats.trials.trial import ENDED_BADLY, distinct_rows

LEVEL = 0.05
"""Chance that anything is named where no field matters, at most."""
PERMUTATIONS = 1999
POWER = 0.8
"""Chance to name an effect that a number of further trials is stated for."""
MAX_MORE = 10_000
"""Further trials beyond which no number is stated."""
ADAPTIVE = 2
"""What p values of drawn settings are multiplied by. A sampler that avoids what ended badly leaves bad luck where it
was, so that a permuted study looks less uneven than it should: at a nominal 5% some field was named in 7% of simulated
studies in which none matters (`benchmarks/claims.py`), and in 4% to 5% with this factor."""
MAX_LEVELS = 12
"""Numbers of a field up to which a study can be a grid of it."""
MAX_TEXTS = 30
"""Values of a field of text beyond which it is not tested: it names the trials rather than groups them."""
_KNOWN: dict[tuple[Any, ...], Claims] = {}
_MAX_KNOWN = 16
_CELLS = 4_000_000
"""Numbers of permuted studies that are there together."""


@dataclass(frozen=True)
class Claim:
    """A field the outcome depends on, as far as the trials tell."""

    field: str
    p: float
    """Corrected for all `fields` that were tried with it."""
    fields: int
    beside: str | None = None
    """The field named before it, whose part of the outcome was taken out first; None where its test needs none."""

    def __str__(self) -> str:
        """The test in words, such as "p = 0.002, corrected for 5 fields"."""
        corrected = f", corrected for {self.fields} fields" if self.fields > 1 else ""
        within = f", at equal {symbol(self.beside)}" if self.beside is not None else ""
        return f"p = {self.p:.2g}{corrected}{within}"


@dataclass(frozen=True)
class Claims:
    """What may be said of the fields of a study."""

    named: tuple[Claim, ...]
    """At most two, the strongest first."""
    trials: int
    events: int
    """Of these diverged or collapsed."""
    fields: int
    more: int | None
    """Further trials that would probably (`POWER`) show an effect of the largest size seen; None where one is named, or
    no effect larger than chance was seen, or it would take more than `MAX_MORE`."""

    @property
    def first(self) -> str | None:
        """The field named first, if any is."""
        return self.named[0].field if self.named else None

    def line(self) -> str:
        """That no field stands out, and what would decide; empty where one does or there is nothing to explain."""
        if self.named or not self.fields or not self.events > 0:
            return ""
        text = f"no field stands out in {self.trials} trials"
        if self.more is None:
            return f"{text}: the largest effect seen is not larger than chance makes one"
        return f"{text}, and some {self.more:,} more trials would be needed to confirm the largest effect seen"


def claims(trials: pd.DataFrame, fields: Sequence[str], *, permutations: int = PERMUTATIONS, seed: int = 0) -> Claims:
    """The fields that ending badly depends on in one study, named only at a corrected p below `LEVEL`.

    Seeds of one setting are not independent, so settings are permuted, each with all its trials, and p values are
    doubled for the sampler's choices (`ADAPTIVE`). In a grid, where most trials have partners that differ in one field
    alone, trials are permuted among those partners instead, field by field, and the p values corrected by Holm's
    method: the test of a field then holds at equal values of the others. In other studies a second field is tested
    within halves of the first (its values where it is text), on what a line in the first leaves unexplained.
    """
    trials = distinct_rows(trials.drop(columns="config", errors="ignore"))
    used = trials[[*dict.fromkeys(("outcome", "iteration", "iterations_done", "setting_id", *fields))]]
    # A report asks many times about the same trials.
    key = (tuple(fields), permutations, seed, hash_pandas_object(used, index=False).to_numpy().tobytes())
    if key not in _KNOWN:
        if len(_KNOWN) >= _MAX_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = _claims(used, fields, permutations, seed)
    return _KNOWN[key]


def _claims(trials: pd.DataFrame, fields: Sequence[str], permutations: int, seed: int) -> Claims:
    when, event = _observed(trials)
    rows = np.flatnonzero(when > 0)
    table, when, event = trials.iloc[rows], when[rows], event[rows]
    values = {f: plain(table[f]) for f in fields}
    tried = {f: v for f, v in values.items() if len(set(v)) > 1 and (_numeric(v) or len(set(v)) <= MAX_TEXTS)}
    counts = len(rows), int(event.sum()), len(tried)
    residual = martingale_residuals(when, event)
    if not tried or np.ptp(residual) == 0:
        return Claims((), *counts, None)
    rng = np.random.default_rng(seed)
    partners = {f: alike(table, [g for g in tried if g != f]) for f in tried}
    if all(_matched(partners[f], v) for f, v in tried.items()):
        named, more = _grid(tried, partners, residual, permutations, rng)
    else:
        setting = alike(table, ("setting_id", *tried))
        one = np.unique(setting, return_index=True)[1]
        summed = np.bincount(setting, weights=residual).astype(np.float64)
        named, more = _search({f: [v[i] for i in one] for f, v in tried.items()}, summed, permutations, rng)
        more = None if more is None else more * len(rows) / len(one)
    return Claims(named, *counts, None if named else _rounded(more))


def martingale_residuals(when: NDArray[np.int64], event: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Events less those expected by the Nelson-Aalen estimate over all trials; they add up to 0.

    `when` are the iterations in which each trial was at risk: t + 1 for one that ended badly in iteration t (from 0).
    """
    times, place = np.unique(when, return_inverse=True)
    at_risk = len(when) - np.searchsorted(np.sort(when), times, side="left")
    hazard = np.cumsum(np.bincount(place, weights=event) / at_risk)
    return np.asarray(event - hazard[place], dtype=np.float64)


def _observed(trials: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Iterations in which each trial was at risk (0 where it never trained), and whether it ended badly."""
    event = trials["outcome"].isin(ENDED_BADLY).to_numpy(bool, na_value=False)
    at, done = floats(trials["iteration"]), floats(trials["iterations_done"])
    when = np.where(event, np.where(np.isfinite(at), at, done) + 1, done)
    return np.nan_to_num(when).astype(np.int64), event


def _matched(partners: NDArray[np.intp], values: Sequence[Any]) -> bool:
    """Whether most trials have partners that are alike in all other fields and differ in this one."""
    pairs = np.unique(np.stack([partners, coded(values)[0]]), axis=1)
    several = np.bincount(pairs[0]) > 1
    levels = not _numeric(values) or len(set(values)) <= MAX_LEVELS
    return levels and bool(several[partners].mean() > 0.5)


def _grid(
    values: dict[str, list[Any]],
    partners: dict[str, NDArray[np.intp]],
    outcome: NDArray[np.float64],
    permutations: int,
    rng: np.random.Generator,
) -> tuple[tuple[Claim, ...], float | None]:
    """The fields named of a grid, and how many more trials would show the largest effect."""
    found = []
    for field, own in partners.items():
        design, y = _without(_design(values[field]), own), _without(outcome[:, None], own)[:, 0]
        score = _Scores([design], y)
        chance = score.permuted(own, permutations, rng)
        p = (1 + int((chance[:, 0] >= score.seen[0] - 1e-9).sum())) / (1 + permutations)
        found.append((p, -score.seen[0], field, score))
    found.sort(key=lambda f: f[:2])
    corrected = holm([f[0] for f in found])
    named = [Claim(field, p, len(found)) for (_, _, field, _), p in zip(found, corrected, strict=True) if p < LEVEL]
    top = min(found, key=lambda f: f[1])[3]
    return tuple(named[:2]), top.more(0, math.log(LEVEL / len(found)))


def _search(
    values: dict[str, list[Any]], outcome: NDArray[np.float64], permutations: int, rng: np.random.Generator
) -> tuple[tuple[Claim, ...], float | None]:
    """The fields named of settings that were drawn, and how many more settings would show the largest effect."""
    fields = [*values]
    together = np.zeros(len(outcome), dtype=np.intp)
    designs = {f: _design(v) for f, v in values.items()}
    score = _Scores([_without(d, together) for d in designs.values()], _without(outcome[:, None], together)[:, 0])
    chance = score.permuted(together, permutations, rng).max(axis=1)
    first = int(np.argmax(score.seen))
    p = _p_value(score.seen[first], chance)
    if p >= LEVEL:
        return (), score.more(first, -float(np.quantile(chance, 1 - LEVEL / ADAPTIVE)))
    named = [Claim(fields[first], p, len(fields))]
    others = [f for f in fields if f != fields[first]]
    parts = _parts(values[fields[first]])
    line = _basis(_without(designs[fields[first]], parts))

    def beside(x: NDArray[np.float64]) -> NDArray[np.float64]:
        inside = _without(x, parts)
        return np.asarray(inside - line @ (line.T @ inside), dtype=np.float64)

    y = beside(outcome[:, None])[:, 0]
    if others and np.ptp(y) > 1e-9:
        score = _Scores([beside(designs[f]) for f in others], y)
        chance = score.permuted(parts, permutations, rng).max(axis=1)
        second = int(np.argmax(score.seen))
        p = _p_value(score.seen[second], chance)
        if p < LEVEL:
            named.append(Claim(others[second], p, len(others), fields[first]))
    return tuple(named), None


def _p_value(seen: float, chance: NDArray[np.float64]) -> float:
    """Share of permuted studies, with the study itself, whose largest score reaches the one seen; see `ADAPTIVE`."""
    return min(1.0, ADAPTIVE * (1 + int((chance >= seen - 1e-9).sum())) / (1 + len(chance)))


class _Scores:
    """Scores of designs (n, d): minus the log of the chi-squared p value of how far each explains an outcome (n,).

    So fields of few and many groups compare; how large a score is by chance is found by permutation.
    """

    def __init__(self, designs: Sequence[NDArray[np.float64]], outcome: NDArray[np.float64]) -> None:
        bases = [_basis(d) for d in designs]
        self._freedom = [b.shape[1] for b in bases]
        self._basis = np.concatenate(bases, axis=1)
        self._outcome = outcome
        self.shares = self._explained(outcome[None])[0]
        """Share of the outcome's squares that each design explains."""
        self.seen = self._scores(self.shares[None])[0]
        """The score of each design."""

    def _explained(self, outcomes: NDArray[np.float64]) -> NDArray[np.float64]:
        squares = (outcomes @ self._basis) ** 2
        ends = np.cumsum([0, *self._freedom])
        summed = np.concatenate([np.zeros((len(outcomes), 1)), np.cumsum(squares, axis=1)], axis=1)[:, ends]
        return np.asarray(np.diff(summed, axis=1) / (self._outcome @ self._outcome), dtype=np.float64)

    def _scores(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        statistic = (len(self._outcome) - 1) * shares
        each = [
            -stats.chi2.logsf(s, d) if d else np.zeros(len(s)) for s, d in zip(statistic.T, self._freedom, strict=True)
        ]
        return np.stack(each, axis=1)

    def permuted(self, groups: NDArray[np.intp], times: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Scores of outcomes permuted within groups, shape (times, designs)."""
        order = np.argsort(groups, kind="stable")
        back = np.argsort(order)
        outcome, whole, found = self._outcome[order], int(groups.max()) == 0, []
        at_once = max(1, _CELLS // len(order))
        for start in range(0, times, at_once):
            size = min(times - start, at_once)
            if whole:
                drawn = rng.permuted(np.broadcast_to(outcome, (size, len(order))), axis=1)
            else:
                drawn = outcome[np.argsort(groups[order] + rng.random((size, len(order))), axis=1)]
            found.append(self._scores(self._explained(drawn[:, back])))
        return np.concatenate(found)

    def more(self, design: int, threshold: float) -> float | None:
        """How many more rows would probably (`POWER`) show a design's effect at a log p; None for no effect."""
        n, d = len(self._outcome), self._freedom[design]
        share = float(self.shares[design])
        # Adjusted for what as many columns explain by chance; the largest of several is still too large.
        adjusted = 1 - (1 - share) * (n - 1) / (n - d - 1) if n > d + 1 else share
        if not d or adjusted <= 0:
            return None
        critical = float(stats.chi2.isf(math.exp(threshold), d))
        wanted = optimize.brentq(lambda far: stats.ncx2.sf(critical, d, far) - POWER, 1e-6, 1e4)
        return max(1.0, float(wanted) / adjusted - n)


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values if v is not None)


def _design(values: Sequence[Any]) -> NDArray[np.float64]:
    """Ranks of numbers, a column for each value of text; numbers some of which are null have a column for that."""
    known = [v for v in values if v is not None]
    if _numeric(values):
        there = np.array([v is not None for v in values])
        ranks = np.zeros(len(values))
        # About their middle, so that null tells nothing but that it is null.
        ranks[there] = stats.rankdata(known) - (len(known) + 1) / 2
        return ranks[:, None] if there.all() else np.stack([ranks, ~there], axis=1).astype(np.float64)
    codes, distinct = coded(values)
    return np.eye(len(distinct))[codes]


def _parts(values: Sequence[Any]) -> NDArray[np.intp]:
    """Halves of numbers, null apart; each value of text."""
    if _numeric(values):
        middle = float(np.median([v for v in values if v is not None]))
        return coded([None if v is None else v > middle for v in values])[0]
    return coded(values)[0]


def _without(x: NDArray[np.float64], groups: NDArray[np.intp]) -> NDArray[np.float64]:
    """Columns less their means within groups."""
    sizes = np.bincount(groups)
    means = np.stack([np.bincount(groups, weights=column) for column in x.T], axis=1) / np.maximum(sizes, 1)[:, None]
    return np.asarray(x - means[groups], dtype=np.float64)


def _basis(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal columns of the same span."""
    left, singular, _ = np.linalg.svd(x, full_matrices=False)
    return np.asarray(left[:, singular > 1e-9 * max(1.0, singular.max(initial=0.0))], dtype=np.float64)


def _rounded(more: float | None) -> int | None:
    """A rough number with as many digits as it deserves; None where it is too large to be worth stating."""
    if more is None or more > MAX_MORE:
        return None
    unit = 5 * int(10 ** max(0, math.floor(math.log10(more)) - 1))
    return math.ceil(more / unit) * unit
