"""The answer of a study to its question in one sentence: what stability depends on, and what is best of what survives.

It says what the summary says, by the same rules: a field is named by a test alone (`analysis.claims`), a setting is the
recommended one (`analysis.recommend`).
"""

from __future__ import annotations

from analysis.results.labels import symbol
from analysis.stats.comparison.summary import Best, Contrast, StudySummary, value_text
from analysis.stats.trials.trial import ENDED_BADLY
from trainables.results.schema import Outcome

_OPEN = frozenset({Outcome.PENDING, Outcome.RUNNING})


def answer(summary: StudySummary) -> str:
    """One sentence: how often training ended badly and by what, then the best setting or why there is none."""
    counts = dict(summary.outcomes)
    total = sum(counts.values())
    ended = total - sum(counts.get(o, 0) for o in _OPEN)
    if not ended:
        return "No trial has ended yet." if total else "No trial has started yet."
    stable = _stability(summary, ended, sum(n for o, n in counts.items() if o in ENDED_BADLY), total - ended)
    best = _best(summary.best, alone=ended == 1) if summary.best is not None else ""
    if not best and summary.no_best and ended > 1:
        best = f"nothing can be recommended: {summary.no_best}"
    sentence = "; ".join(part for part in (stable, best) if part)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _stability(summary: StudySummary, ended: int, bad: int, left: int) -> str:
    if summary.contrasts and bad < ended:
        return _contrast(summary.contrasts[0])
    collapsed = dict(summary.outcomes).get(Outcome.COLLAPSED, 0)
    how = "diverged or collapsed" if 0 < collapsed < bad else "collapsed" if collapsed else "diverged"
    trials = "trials that have ended" if left else "trials"
    if ended == 1 and left:
        return f"of {1 + left} trials one has ended: it {how if bad else 'stayed stable'}"
    if ended == 1:
        return f"the one trial {how}{_by(summary)}" if bad else f"the one trial stayed stable{_for(summary)}"
    if not bad:
        most = summary.bad.high if summary.bad is not None else None
        allowed = "" if most is None else f" (a rate of up to {most:.0%} is still possible)"
        return f"none of {ended} {trials} diverged or collapsed{_by(summary)}{allowed}"
    if bad == ended:
        return f"{'both' if ended == 2 else f'all {ended}'} {trials} {how}{_by(summary)}{_how_soon(summary)}"
    fields = ", and no field stands out" if summary.claims.fields > 1 else ""
    return f"{bad} of {ended} {trials} {how}{fields}"


def _how_soon(summary: StudySummary) -> str:
    """What the time of bad ends depends on, where all trials came to one."""
    named = summary.claims.named[:1]
    return "".join(f", how soon depending on {symbol(c.field)} (p = {c.p:.2g})" for c in named)


def _by(summary: StudySummary) -> str:
    return f" by iteration {summary.bad.at:,}" if summary.bad is not None and summary.bad.trials else ""


def _for(summary: StudySummary) -> str:
    return f" for {summary.bad.at:,} iterations" if summary.bad is not None and summary.bad.trials else ""


def _contrast(contrast: Contrast) -> str:
    """What stability depends on: the worst and the best value, with their counts."""
    name = symbol(contrast.claim.field)
    rates = sorted(contrast.rates, key=lambda r: -1.0 if r[1].rate is None else r[1].rate)
    (best, low), (worst, high) = rates[0], rates[-1]
    # As counts where nobody was cut off, else as estimated shares, both alike.
    counted = not (low.censored or high.censored)
    worse, better = (f"{r.events}/{r.trials}" if counted else f"{r.rate:.0%} of {r.trials}" for r in (high, low))
    said = f"{name} {worst}: {worse} {contrast.event}, {name} {best}: {better}"
    return f"stability depends on {name} (p = {contrast.claim.p:.2g}): {said}"


def _best(best: Best, *, alone: bool) -> str:
    error = "" if best.error is None or best.sd is not None else f" ± {best.error:.2g}"
    number = value_text(best) + error + ("" if best.fresh is None else f" (fresh {best.fresh.mean:.3g})")
    if alone:
        return number
    ties = ", tied with others" if best.lead.startswith("tied") else ""
    doubt = "" if best.safe else ", its survival unproven"
    return f"the best survivor is {best.setting}: {number}{ties}{doubt}"
