"""Which settings need no further seeds: those that are worse than the best one, by a Wilcoxon test over paired seeds.

A setting is compared with the best one seed by seed. Only seeds with which both completed are pairs: one that diverged
is an outcome to be counted, and neither for nor against a setting's quality. The test is looked at again with every
seed, so its threshold is lowered until all looks together give up a setting that is no worse as rarely as was asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from scipy.stats import wilcoxon

_SIMULATED = 20_000
_LOOKED_AT = 60
"""Pairs up to which the looks are simulated; more seeds than these have the threshold of so many."""


@dataclass(frozen=True)
class SeedResults:
    """What is known of a setting: scores by seed of the trials that completed, less being better; and the bad ends."""

    scores: Mapping[int, float] = field(default_factory=dict)
    bad: int = 0

    def rank(self) -> tuple[float, float]:
        """Share of the bad ends, then mean score: the least is the best setting."""
        return self.bad / (self.bad + len(self.scores)), float(np.mean(list(self.scores.values())))


@lru_cache(maxsize=64)
def threshold(seeds: int, alpha: float) -> float | None:
    """Nominal p value of every look such that a setting no worse is given up with a probability of `alpha` at most.

    With differences that are symmetric around 0 the ranks at all looks together do not depend on their distribution, so
    that simulated ones do. None: so few seeds can never tell.
    """
    last = min(seeds - 1, _LOOKED_AT)  # after the last seed there is nothing left to save
    first = next((n for n in range(1, last + 1) if 2.0**-n <= alpha), None)
    if first is None:
        return None
    rng = np.random.default_rng(seeds)
    sizes = rng.random((_SIMULATED, last))
    worse = rng.random((_SIMULATED, last)) < 0.5
    least = np.ones(_SIMULATED)
    for n in range(first, last + 1):
        ranks = sizes[:, :n].argsort(axis=1).argsort(axis=1) + 1
        sums = np.where(worse[:, :n], ranks, 0).sum(axis=1)
        least = np.minimum(least, _upper_tail(n)[sums])
    levels = np.unique(least)
    reached = [float(p) for p in levels if (least <= p).mean() <= alpha]
    # The smallest level of all, worse with every seed, has exactly this probability: no noise must decide on it.
    return max(reached, default=2.0**-last)


def _upper_tail(n: int) -> np.ndarray:
    """P(W >= w) for w = 0, 1, ... of the signed-rank sum W of n differences that are symmetric around 0."""
    ways = np.zeros(n * (n + 1) // 2 + 1)
    ways[0] = 1.0
    for rank in range(1, n + 1):
        ways[rank:] = ways[rank:] + ways[: len(ways) - rank]
    return np.asarray(ways[::-1].cumsum()[::-1] / 2.0**n)


def given_up(settings: Mapping[int, SeedResults], seeds: int, alpha: float) -> dict[int, str]:
    """Settings that need no further seeds, by number, and why; a function of the results alone.

    The best setting is that of the fewest bad ends, then of the best mean score, among those that have as many scores
    as the test takes at least. One that beats it in either is never given up for the other.
    """
    limit = threshold(seeds, alpha)
    if limit is None:
        return {}
    fewest = next(n for n in range(1, seeds) if 2.0**-n <= limit)
    known = {number: found for number, found in settings.items() if len(found.scores) >= fewest}
    if not known:
        return {}
    best = min(known, key=lambda number: (*known[number].rank(), number))
    found = {}
    for number, results in settings.items():
        pairs = results.scores.keys() & known[best].scores.keys()
        if number == best or len(pairs) < fewest:
            continue
        worse = [results.scores[seed] - known[best].scores[seed] for seed in sorted(pairs)]
        p = float(wilcoxon(worse, alternative="greater").pvalue) if any(worse) else 1.0
        if p <= limit:
            found[number] = f"worse than setting {best} over {len(pairs)} paired seeds (p = {p:.2g}, limit {limit:.2g})"
    return found
