"""Trials of earlier studies as Optuna's: what a warm start tells the sampler before the study's own first trial."""

from __future__ import annotations

from pathlib import Path

from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from study.config.study import StudyConfig
from study.record.warm_start import read_warm_start
from study.search.optuna_private import generation_key
from trainables.results.schema import Outcome

STABLE = "stable"
"""Name of the constraint; a diverged or collapsed trial violates it."""
EARLIER = "from"
"""Attribute of a trial that is of an earlier study: which, and its name there."""


def constraint_of(outcome: Outcome | None) -> float:
    """What `STABLE` is told of an outcome: above 0 it is violated."""
    return -1.0 if outcome in (Outcome.COMPLETED, Outcome.PRUNED) else 1.0


def earlier_trials(study: StudyConfig, folder: Path, sampler: BaseSampler) -> list[FrozenTrial]:
    """What a study has taken of earlier ones, in the order of its storage, told as its own trials are.

    Genetic samplers breed from generations, and these trials are their first.
    """
    if not study.search.earlier:
        return []
    distributions, generation = study.space.distributions, generation_key(sampler)
    found = []
    for taken in read_warm_start(folder).trials:
        pruned = taken.outcome is Outcome.PRUNED
        trial = create_trial(
            state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
            params=dict(taken.parameters),
            distributions=distributions,
            values=None if pruned else taken.values,
            intermediate_values=dict(taken.reported),
            user_attrs={EARLIER: f"{taken.study}/{taken.trial_id}", "outcome": taken.outcome.value},
            system_attrs={generation: 0} if generation and not pruned else {},
            constraints={STABLE: constraint_of(taken.outcome)},
        )
        found.append(trial)
    return found
