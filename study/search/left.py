"""What a study whose trials are over has left to do, by its journal: rescues; and seeds that it gave up."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from study.config.study import Objective, StudyConfig
from study.record.state import StudyState
from study.search.rescue import open_rescues
from study.search.seeds import SeedResults, given_up
from trainables.results.schema import Outcome


class Rest(NamedTuple):
    """What else counts, besides the trials that are over.

    Attributes:
        to_rescue: trials with a rescue that is to follow, or was cut off.
        stopped: trials with a rescue that was stopped by a budget.
        given_up: planned seeds that are not to be started: their setting is worse than the best.
    """

    to_rescue: frozenset[str]
    stopped: frozenset[str]
    given_up: int


def rest_of(study: StudyConfig, state: StudyState) -> Rest:
    """What is left of a study besides its trials, and what is not to be run of them."""
    to_rescue = frozenset(rescue.first for rescue in open_rescues(study, state))
    rescues = [row for row in state.trials.values() if row["rescue"] and study.rescue is not None]
    stopped = frozenset(str(row["rescue_of"]) for row in rescues if row["outcome"] == Outcome.STOPPED)
    return Rest(to_rescue, stopped, _seeds_given_up(study, state))


def _seeds_given_up(study: StudyConfig, state: StudyState) -> int:
    if study.pruning.seeds == "all":
        return 0
    begun = Counter(state.settings[name] for name in state.searched)
    found = given_up(seed_results(study, state), len(study.seeds), study.pruning.seeds_alpha)
    return sum(max(0, len(study.seeds) - begun[number]) for number in found)


def seed_results(study: StudyConfig, state: StudyState) -> dict[int, SeedResults]:
    """Scores of the metric that pruning looks at, and bad ends, by setting."""
    scores: dict[int, dict[int, float]] = {}
    bad: Counter[int] = Counter()
    for name in state.searched:
        row = state.trials[name]
        number, outcome = state.settings[name], state.outcome(name)
        scores.setdefault(number, {})
        if outcome in (Outcome.DIVERGED, Outcome.COLLAPSED):
            bad[number] += 1
        elif outcome is Outcome.COMPLETED and study.pruning_metric is not None:
            objective = Objective(metric=study.pruning_metric, direction=None).resolved(row)
            if objective is not None and (value := row.get(objective.column)) is not None:
                sign = 1 if objective.resolved_direction == "minimize" else -1
                scores[number][row["seed"]] = sign * float(value)
    return {number: SeedResults(found, bad[number]) for number, found in scores.items()}
