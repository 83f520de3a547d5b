"""How the boundary of stability moves with size: one boundary per study, a power law over them, and a prediction.

After small-scale proxies for large-scale instabilities (Wortsman et al. 2023). The law is log10 boundary = a + b log10
size, by least squares with the inverse variances of the boundaries as weights. Its errors are those of the boundaries,
enlarged where the boundaries scatter about it by more (Birge 1932), so its intervals suppose that there is such a law;
how far the sizes allow to doubt that is said beside it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from analysis.results.labels import symbol
from analysis.results.load import Results
from analysis.results.messages import ResultsError, plural, printable
from analysis.results.parquet import records, typed_frame
from analysis.stats.space.boundary import Boundary, Side, fit_boundary, side_of
from analysis.stats.space.growth import Growth, growth
from analysis.stats.survival.rates import Z
from analysis.stats.trials.trial import ENDED_BADLY, JUDGED, Trial, distinct_rows
from trainables.results.schema import Column, Outcome

BOUNDARY_COLUMNS: tuple[Column, ...] = (
    Column("study", "string", "name of the study"),
    Column("axis", "string", "what grows: N of conv-N, or a field"),
    Column("size", "float64", "of the study"),
    Column("held_out", "bool", "the law is not fitted to it"),
    Column("field", "string", "the field whose boundary it is"),
    Column("trials", "int64", "trials that trained, an equal setting and seed once"),
    Column("bad", "int64", "of which diverged or collapsed"),
    Column("cut_off", "int64", "of which were cut off before their last iteration; stable as far as they went"),
    Column("left_out", "int64", "trials that failed or did not train: not counted"),
    Column("seeds", "int64", "distinct seeds"),
    Column("iterations", "int64", "iterations of a whole trial: stable means stable for so many", "iteration"),
    Column("tried_low", "float64", "smallest value of the field that was tried"),
    Column("tried_high", "float64", "largest value"),
    Column("bad_side", "string", "above or below: on which side of the boundary trials end badly; null: not known"),
    Column("boundary", "float64", "value at which half of the trials end badly; null where the data do not bound it"),
    Column("low", "float64", "lower end of its 95% interval; null where the data do not bound it there"),
    Column("high", "float64", "upper end of it"),
    Column("log10_error", "float64", "standard error of log10 of the boundary"),
    Column("slope", "float64", "log-odds of a bad end per factor of 10, as fitted"),
    Column("correlation", "float64", "factor by which trials of one seed enlarge the variance; 1: not at all"),
)
"""One row per study, by size."""
LAW_COLUMNS: tuple[Column, ...] = (
    Column("axis", "string", "what grows"),
    Column("field", "string", "the field whose boundary it is"),
    Column("sizes", "int64", "boundaries that the law is fitted to"),
    Column("smallest", "float64", "smallest size among them"),
    Column("largest", "float64", "largest"),
    Column("factor", "float64", "boundary = factor x size^exponent"),
    Column("exponent", "float64", "see factor"),
    Column("exponent_low", "float64", "lower end of its 95% interval"),
    Column("exponent_high", "float64", "upper end of it"),
    Column("misfit_p", "float64", "p value that the boundaries lie on the law (chi-squared); null: two sizes"),
    Column("enlarged", "float64", "factor by which scatter about the law enlarges its errors; 1: not at all"),
    Column("size", "float64", "a size that the law was not fitted to; null: none was asked for"),
    Column("predicted", "float64", "boundary by the law there; null: too far from the sizes fitted for a number"),
    Column("predicted_low", "float64", "lower end of its 95% interval"),
    Column("predicted_high", "float64", "upper end of it"),
    Column("constant", "float64", "boundary of the largest size fitted: the prediction without a law"),
    Column("measured", "float64", "boundary as measured there; null: not run, or not bounded"),
    Column("measured_low", "float64", "lower end of its 95% interval"),
    Column("measured_high", "float64", "upper end of it"),
    Column("ratio", "float64", "measured / predicted"),
    Column("constant_ratio", "float64", "measured / constant"),
    Column("agrees", "bool", "prediction and measurement differ by no more than their errors at 95%; null: not known"),
)
"""One row per predicted size; one alone, without a prediction, where none was asked for."""


@dataclass(frozen=True)
class Law:
    """log10 boundary = a + b (log10 size - centre), with the covariance of a and b."""

    sizes: int
    smallest: float
    largest: float
    centre: float
    weights: NDArray[np.float64]
    covariance: NDArray[np.float64]
    misfit_p: float | None
    enlarged: float

    @classmethod
    def fit(cls, sizes: Sequence[float], boundaries: Sequence[float], errors: Sequence[float]) -> Law:
        """Fit to two or more sizes, log10 of their boundaries, and the errors of those."""
        x = np.log10(np.array(sizes, dtype=np.float64))
        y, weight = np.array(boundaries, dtype=np.float64), 1 / np.square(np.array(errors, dtype=np.float64))
        centre = float(np.average(x, weights=weight))
        design = np.column_stack([np.ones(len(x)), x - centre])
        covariance = np.asarray(np.linalg.inv(design.T @ (design * weight[:, None])), dtype=np.float64)
        weights = covariance @ design.T @ (weight * y)
        misfit, freedom = float((weight * (y - design @ weights) ** 2).sum()), len(x) - 2
        enlarged = math.sqrt(max(1.0, misfit / freedom)) if freedom else 1.0
        p = float(stats.chi2.sf(misfit, freedom)) if freedom else None
        return cls(len(x), float(min(sizes)), float(max(sizes)), centre, weights, covariance * enlarged**2, p, enlarged)

    def __call__(self, size: float) -> tuple[float, float]:
        """log10 of the boundary at a size, and its standard error."""
        at = np.array([1.0, math.log10(size) - self.centre])
        return float(at @ self.weights), math.sqrt(float(at @ self.covariance @ at))

    @property
    def exponent(self) -> tuple[float, float]:
        """The exponent and its standard error."""
        return float(self.weights[1]), math.sqrt(float(self.covariance[1, 1]))

    @property
    def tested(self) -> bool:
        """Whether more sizes than the law has parameters could contradict it."""
        return self.misfit_p is not None


@dataclass(frozen=True)
class Scaling:
    """Boundaries over size, the law through them, and what it predicts."""

    growth: Growth
    boundaries: pd.DataFrame
    """`BOUNDARY_COLUMNS`."""
    law: Law | None
    """None where fewer than two sizes have a boundary."""
    predictions: pd.DataFrame
    """`LAW_COLUMNS`; no row without a law."""

    def lines(self) -> list[str]:
        """What was found, for people."""
        name, rows = symbol(self.growth.field), records(self.boundaries)
        found = [f"boundary of stability in {name}, by {self.growth.axis}: half of the trials end badly there"]
        found += [f"  {r['size']:g}: {boundary_text(r)}" for r in rows]
        if self.law is None:
            return [*found, "no law: fewer than two sizes that are not held out have a boundary on both sides"]
        return [*found, self.law_text(), *(self.prediction_text(p) for p in records(self.predictions) if p["size"])]

    def law_text(self) -> str:
        """The law in words."""
        law, name = self.law, symbol(self.growth.field)
        if law is None:
            return ""
        b, error = law.exponent
        low, high = b - Z * error, b + Z * error
        if law.misfit_p is None:
            tested = "two sizes cannot contradict a power law"
        else:
            fits = "the sizes do not lie on a power law" if law.misfit_p < 0.05 else "no misfit shown"
            tested = f"{fits} (p = {law.misfit_p:.2g})"
        scale = law(1.0)[0]
        factor = f"10^{scale:.0f}" if _power(scale) is None else f"{10**scale:.3g}"
        moves = "" if low > 0 or high < 0 else ", so none that differs from 0 is shown"
        return (
            f"law over {law.sizes} sizes: boundary in {name} = {factor} x size^{b:.2f}, exponent "
            f"{low:.2f} to {high:.2f} at 95%{moves}; {tested}"
        )

    def prediction_text(self, p: dict[str, Any]) -> str:
        """A prediction in words, with what was measured there."""
        interval = "no number, as it is too far from the sizes that the law is fitted to"
        if p["predicted"] is not None:
            interval = f"{p['predicted']:.3g}, {p['predicted_low']:.3g} to {p['predicted_high']:.3g} at 95%"
        text = f"predicted at {p['size']:g}: {interval}"
        row = next((r for r in records(self.boundaries) if r["size"] == p["size"]), None)
        if row is None:
            return text
        verdict = {None: "cannot be compared", True: "agrees within the errors", False: "does not agree"}[p["agrees"]]
        text += f"; measured {boundary_text(row, brief=True)}: {verdict}"
        if p["ratio"] is None:
            return text
        return (
            f"{text}; measured / predicted {p['ratio']:.2f}, measured / boundary at {p['largest']:g} (no law) "
            f"{p['constant_ratio']:.2f}"
        )


def boundary_text(r: dict[str, Any], *, brief: bool = False) -> str:
    """A boundary in words: a number with its interval, or what is known of where it lies."""
    counts = (
        "" if brief else f" ({r['bad']} of {plural(r['trials'], 'trial')} ended badly, {plural(r['seeds'], 'seed')})"
    )
    if not brief and r["cut_off"]:
        counts = f"{counts[:-1]}, {r['cut_off']} cut off: mebm resume)"
    if r["boundary"] is not None:
        side = "" if brief else f", bad {r['bad_side']} it"
        return f"{r['boundary']:.3g}, {r['low']:.3g} to {r['high']:.3g} at 95%{side}{counts}"
    tried = f"{r['tried_low']:.3g} to {r['tried_high']:.3g}"
    kind = "no trial ended badly" if not r["bad"] else "every trial ended badly" if r["bad"] == r["trials"] else ""
    where = f"{kind} at {tried}" if kind else f"the trials at {tried} do not bound it"
    if (r["low"] is None) != (r["high"] is None):
        end = f"above {r['low']:.3g}" if r["low"] is not None else f"below {r['high']:.3g}"
        return f"{end} at 95%; {where}{counts}"
    if r["low"] is not None:
        return f"outside of what was tried, {r['low']:.3g} to {r['high']:.3g} at 95%; {where}{counts}"
    return f"not known; {where}{counts}"


def scaling(
    results: Results, field: str | None = None, hold_out: Collection[float] = (), predict: Collection[float] = ()
) -> Scaling:
    """The boundary of every study, the law over those that are not held out, and its predictions.

    Args:
        results: studies that differ in one size, and searched one field.
        field: that field; may be left out.
        hold_out: sizes that the law is not fitted to, and predicts.
        predict: further sizes to predict.

    Raises:
        ResultsError: the studies do not make a law over one size (see `growth`), a value of the field is not above 0, a
            size is not one, or is held out and there is no study of it.
    """
    found = growth(results, field)
    for size in (*hold_out, *predict):
        if not (math.isfinite(size) and size > 0):
            raise ResultsError(f"{size:g} is not a size; expected a number above 0")
    if absent := [s for s in hold_out if s not in found.sizes.values()]:
        there = ", ".join(f"{s:g}" for s in found.sizes.values())
        raise ResultsError(f"--hold-out {absent[0]:g}: there is no study of this size; there are {there}")
    rows = _boundaries(results, found, frozenset(hold_out))
    fitted = [r for r in rows if not r["held_out"] and r["boundary"] is not None]
    law = None
    if len(fitted) > 1:
        logs = [math.log10(r["boundary"]) for r in fitted]
        law = Law.fit([r["size"] for r in fitted], logs, [r["log10_error"] for r in fitted])
    if twice := sorted({r["size"] for r in fitted} & set(predict)):
        raise ResultsError(f"--predict {twice[0]:g}: the law is fitted to this size; --hold-out predicts it")
    sizes: list[float | None] = [*sorted({float(s) for s in (*hold_out, *predict)})]
    predictions = [] if law is None else [_prediction(found, law, rows, size) for size in (sizes or [None])]
    return Scaling(found, typed_frame(rows, BOUNDARY_COLUMNS), law, typed_frame(predictions, LAW_COLUMNS))


@dataclass(frozen=True)
class _Counted:
    """The trials of one size."""

    x: NDArray[np.float64]
    bad: NDArray[np.bool_]
    cut: NDArray[np.bool_]
    seeds: NDArray[np.int64]
    left_out: int
    iterations: int | None


def _boundaries(results: Results, found: Growth, held: frozenset[float]) -> list[dict[str, Any]]:
    counted = {study: _counted(results, study, found.field) for study in found.sizes}
    # Where one size has no bad end, or none but bad ones, the others say on which side those are.
    side = side_of([(c.x, c.bad) for c in counted.values()])
    rows = []
    for study, size in found.sizes.items():
        row = {"study": study, "axis": found.axis, "size": size, "held_out": size in held, "field": found.field}
        rows.append(row | _row(counted[study], side))
    return rows


def _counted(results: Results, study: str, field: str) -> _Counted:
    trials = records(distinct_rows(results.trials[results.trials["study"] == study]))
    ran = [t for t in trials if _trained(t)]
    values = [t[field] for t in ran]
    wrong = next((v for v in values if not _is_positive(v)), None)
    if wrong is not None or any(v is None for v in values):
        shown = printable("null" if wrong is None else wrong)
        raise ResultsError(f"{printable(study)}: {symbol(field)} is {shown}; a boundary is that of numbers above 0")
    planned = [t["iterations_planned"] for t in ran if t["iterations_planned"] is not None]
    return _Counted(
        np.log10(np.array(values, dtype=np.float64)),
        np.array([t["outcome"] in ENDED_BADLY for t in ran], dtype=bool),
        np.array([t["outcome"] not in JUDGED for t in ran], dtype=bool),
        np.array([-1 if t["seed"] is None else t["seed"] for t in ran], dtype=np.int64),
        len(trials) - len(ran),
        max(planned, default=None),
    )


def _trained(trial: Trial) -> bool:
    return trial["outcome"] in JUDGED or (
        trial["outcome"] not in (Outcome.FAILED, Outcome.PENDING) and bool(trial["iterations_done"])
    )


def _is_positive(value: Any) -> bool:
    return value is None or (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )


def _row(c: _Counted, side: Side | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "trials": len(c.x),
        "bad": int(c.bad.sum()),
        "cut_off": int(c.cut.sum()),
        "left_out": c.left_out,
    }
    row |= {"seeds": len(np.unique(c.seeds)), "iterations": c.iterations}
    if not len(c.x):
        return row
    fit = fit_boundary(c.x, c.bad, c.seeds, side)
    low, high = fit.low, fit.high
    if c.cut.any():  # whatever had become of them
        other = fit_boundary(c.x, c.bad | c.cut, c.seeds, side)
        low = None if low is None or other.low is None else min(low, other.low)
        high = None if high is None or other.high is None else max(high, other.high)
    both = low is not None and high is not None
    whole = Boundary(fit.trials, fit.bad, fit.seeds, fit.tried, fit.side, fit.estimate if both else None, low, high)
    return row | {
        "tried_low": 10 ** fit.tried[0],
        "tried_high": 10 ** fit.tried[1],
        "bad_side": fit.side,
        "boundary": _power(whole.estimate),
        "low": _power(low),
        "high": _power(high),
        "log10_error": whole.error,
        "slope": fit.slope,
        "correlation": fit.correlation,
    }


def _power(log: float | None) -> float | None:
    """A number from its logarithm; None where there is none, or no float holds it."""
    return None if log is None or abs(log) > _MOST else 10**log


_MOST = 300.0
"""Floats go to 10^308."""


def _prediction(found: Growth, law: Law, rows: Sequence[dict[str, Any]], size: float | None) -> dict[str, Any]:
    b, error = law.exponent
    largest = next(r for r in rows if r["size"] == law.largest)
    row: dict[str, Any] = {"axis": found.axis, "field": found.field, "sizes": law.sizes, "smallest": law.smallest}
    row |= {"largest": law.largest, "factor": _power(law(1.0)[0]), "exponent": b, "exponent_low": b - Z * error}
    row |= {"exponent_high": b + Z * error, "misfit_p": law.misfit_p, "enlarged": law.enlarged}
    if size is None:
        return row
    at, spread = law(size)
    ends = at - Z * spread, at + Z * spread
    row |= {"size": size}
    if max(map(abs, ends)) <= _MOST:
        row |= {"predicted": 10**at, "predicted_low": 10 ** ends[0], "predicted_high": 10 ** ends[1]}
    row |= {"constant": largest["boundary"]}
    there = next((r for r in rows if r["size"] == size), None)
    if there is None:
        return row
    low, high, measured = there["low"], there["high"], there["boundary"]
    row |= {"measured": measured, "measured_low": low, "measured_high": high}
    if measured is not None:
        difference = math.log10(measured) - at
        row |= {"ratio": _power(difference), "constant_ratio": measured / largest["boundary"]}
        row["agrees"] = abs(difference) <= Z * math.hypot(spread, there["log10_error"])
    elif low is not None or high is not None:  # one end alone is known: it contradicts what lies wholly beyond it
        row["agrees"] = (low is None or ends[1] >= math.log10(low)) and (high is None or ends[0] <= math.log10(high))
    return row
