"""A sampler that proposes no setting twice: on a small discrete space Optuna's own do so soon."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from study.config.space import any_value, contains, number_of_points, points_of, snapped
from study.search.optuna_private import fixed_parameters

TRIES = 10
"""Proposals of the sampler itself that may be known before one is drawn at random."""
_DRAWS = 100
"""Random ones before what is left is counted out."""
_COUNTED_OUT = 100_000
"""Settings of a space that may be counted out; of a larger one 100 random ones in turn are never all known."""


class DistinctSampler(BaseSampler):
    """Another sampler, whose proposals are drawn again while they are known: an equal one would train an equal trial.

    Its first proposal is what it would be without this one. `distributions` are of every searched field; `known` tells
    whether a complete setting has been proposed before.
    """

    def __init__(
        self,
        sampler: BaseSampler,
        distributions: Mapping[str, BaseDistribution],
        known: Callable[[dict[str, Any]], bool],
        seed: int,
        tries: int = TRIES,
    ) -> None:
        self.sampler, self.distributions, self.known = sampler, dict(distributions), known
        self.tries = tries
        self.spent = False  # the last proposal is known, because none was found that is not
        self._random, self._rng = RandomSampler(seed=seed), np.random.default_rng(seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:  # fmt: skip
        """Every field: a setting can only be compared as a whole."""
        return self.distributions

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],  # noqa: ARG002
    ) -> dict[str, Any]:
        """A setting that is not known, beside what a starting point fixes; a known one where there is no other."""
        fixed = {k: v for k, v in (fixed_parameters(trial) or {}).items() if k in self.distributions}
        free = {name: d for name, d in self.distributions.items() if name not in fixed}
        self.spent = False
        drawn: dict[str, Any] = {}
        for number in range(self.tries + _DRAWS if free else 1):
            if number < self.tries:
                drawn = self._proposal(study, trial, free)
            else:
                drawn = {n: snapped(d, self._random.sample_independent(study, trial, n, d)) for n, d in free.items()}
            if not self.known({**fixed, **drawn}):
                return drawn
        most = number_of_points(free)
        if most is not None and most <= _COUNTED_OUT:
            for point in points_of(free, self._rng.permutation(most).tolist()):
                if not self.known({**fixed, **point}):
                    return point
        self.spent = True
        return drawn

    def _proposal(
        self, study: optuna.Study, trial: FrozenTrial, free: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        relative = self.sampler.sample_relative(study, trial, self.sampler.infer_relative_search_space(study, trial))
        found = {}
        for name, distribution in free.items():
            if distribution.single():
                value = any_value(distribution)
            elif name in relative and contains(distribution, relative[name]):
                value = relative[name]
            else:
                value = self.sampler.sample_independent(study, trial, name, distribution)
            found[name] = snapped(distribution, value)
        return found

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As the other sampler; only what `sample_relative` could not give comes here."""
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """As the other sampler."""
        self.sampler.before_trial(study, trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """As the other sampler."""
        self.sampler.after_trial(study, trial, state, values)
