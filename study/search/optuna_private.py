"""Everything of Optuna that is not public: one file to look at when Optuna changes.

Written against Optuna `VERSION`; `tests/study/search/test_optuna_private.py` names what is gone in another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, QMCSampler
from optuna.trial import FrozenTrial

VERSION = "5.0.0"


def storage_id(trial: FrozenTrial) -> int:
    """Id of a trial in its storage, where other studies' trials are numbered too."""
    return trial._trial_id


def live_trial(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial:
    """A trial of a study that can be written on."""
    return optuna.Trial(study, trial._trial_id)


def check_trial(trial: FrozenTrial) -> None:
    """Refuse with a `ValueError` or `TypeError` a trial that Optuna would not add to a study."""
    trial._validate()


def fixed_parameters(trial: FrozenTrial) -> dict[str, Any] | None:
    """Values with which a trial was put into the queue; None where it was not."""
    found: dict[str, Any] | None = trial.system_attrs.get("fixed_params")
    return found


def generation_key(sampler: BaseSampler) -> str | None:
    """Attribute under which a genetic sampler keeps the generation of a trial; None of another sampler."""
    return sampler._get_generation_key() if isinstance(sampler, optuna.samplers._ga.BaseGASampler) else None


class NumberedSobol(QMCSampler):
    """Optuna's Sobol sequence from a given point on, over all fields from the first trial on.

    Optuna counts the points in attributes of the study, which a copy in memory does not have.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution], seed: int, first: int) -> None:
        super().__init__(qmc_type="sobol", scramble=True, seed=seed)
        self._distributions, self._number = dict(distributions), first

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:  # fmt: skip
        """Every field."""
        return self._distributions

    def _find_sample_id(
        self, study: optuna.Study, search_space: dict[str, BaseDistribution]  # noqa: ARG002
    ) -> int:  # fmt: skip
        self._number += 1
        return self._number - 1
