"""What Optuna is told of a trial, and how its storage is brought to what the journal says."""

from __future__ import annotations

import math
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from study.config.errors import UserError, one_line, shown
from study.config.fields import lookup, read_trial
from study.config.space import Space
from study.config.study import COST_METRICS, Objective, StudyConfig
from study.record.folder import free_name
from study.record.ledger import Ledger
from study.search.earlier_trials import EARLIER, STABLE, constraint_of, earlier_trials
from study.search.optuna_private import check_trial, fixed_parameters, live_trial
from study.search.storage import open_both, open_storage
from trainables.results.layout import STORAGE, WARM_START
from trainables.results.schema import Outcome

TOLD = (Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED, Outcome.PRUNED)
"""Ends with a result, which Optuna learns from."""
WORST = 1e6
"""Told where a trial ended without any value and no other trial has one."""
_STALE = 600.0
"""Seconds after which a trial of a shared storage that no driver has put its name to is given up."""


def add_running(
    opened: optuna.Study, space: Space, parameters: Mapping[str, Any], attributes: Mapping[str, Any], token: str = ""
) -> optuna.Trial:
    """Add a running trial with given parameters to a storage; one of the same `token` is not added again."""
    token = token or uuid.uuid4().hex

    def added() -> optuna.Trial | None:
        running = opened.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return next((live_trial(opened, t) for t in reversed(running) if t.user_attrs.get("token") == token), None)

    if (trial := added()) is None:
        new = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(parameters),
            distributions={name: space.distributions[name] for name in parameters},
            user_attrs={**attributes, "token": token},
        )
        opened.add_trial(new)
        trial = added()
    assert trial is not None
    return trial


def objective_values(study: StudyConfig, optuna_study: optuna.Study, values: Mapping[str, Any]) -> list[float]:
    """A finite value for every objective of a trial that is over; of a divergence Optuna learns by the constraint.

    One that diverged counts with its best before that, one never scored as its untrained p0, or as the worst value so
    far.
    """
    told = []
    for number, objective in enumerate(study.objectives):
        value = told_value(study, objective, values)
        if value is None:
            complete = optuna_study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            sign = 1 if objective.resolved_direction == "minimize" else -1
            value = sign * max((sign * t.values[number] for t in complete), default=WORST)
        told.append(float(value))
    return told


def told_value(study: StudyConfig, objective: Objective, values: Mapping[str, Any]) -> float | None:
    """What a trial that is over has of an objective; None where it was never scored.

    CMA-ES knows no constraints: for it a trial that ended badly has no value, and so stands in with the worst.
    """
    if study.search.sampler == "cmaes" and values["outcome"] in (Outcome.DIVERGED, Outcome.COLLAPSED):
        return None
    found = objective.resolved(values)
    if found is None:  # a script without a directed metric: what counts is whether it is stable
        return 0.0 if values["outcome"] == Outcome.COMPLETED else None
    value = values.get(found.column)
    if value is None:
        value = values.get(f"{found.metric}_initial")
    if value is None or not math.isfinite(value):
        return None
    # Optuna was told of a direction before a script said its own.
    return float(value) if found.resolved_direction == objective.resolved_direction else -float(value)


def learning_curve(study: StudyConfig, trial: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """What a pruned trial is told to have had at its epochs: nothing where that is not a single quality."""
    asked = study.objectives[0]
    found = asked.resolved(trial)
    if len(study.objectives) > 1 or found is None or found.metric in COST_METRICS:
        return {}
    sign = 1 if found.resolved_direction == asked.resolved_direction else -1
    measured = [r for r in reversed(rows) if r["epoch"] > 0 and r.get(found.metric) is not None]
    return {int(r["epoch"]): sign * float(r[found.metric]) for r in measured}


def fail(optuna_study: optuna.Study, trial: optuna.Trial, reason: str) -> None:
    """Tell Optuna that a trial ended without its own result."""
    trial.set_user_attr("reason", reason)
    optuna_study.tell(trial, state=TrialState.FAIL)


def tell(
    optuna_study: optuna.Study, study: StudyConfig, trial: optuna.Trial, ledger: Ledger, reason: str = "interrupted"
) -> None:
    """Tell Optuna how a trial ended: what the ledger says, or FAIL; with the reason `error` whatever the ledger says.

    Measured trials are COMPLETE, with finite values and a constraint that says whether they were stable. A pruned one
    is PRUNED; with a single objective its learning curve goes along, which TPE learns from. Others are FAIL.
    """
    name = str(trial.user_attrs["trial_id"])
    outcome = None if reason == "error" else ledger.outcome(name)
    if outcome in (Outcome.FAILED, Outcome.STOPPED):
        reason = str(ledger.trials[name]["message"] or outcome)
    if outcome not in TOLD:
        fail(optuna_study, trial, reason)
        return
    values = ledger.trials[name]
    for key in ("outcome", "cause", "iteration"):
        if values[key] is not None:
            trial.set_user_attr(key, values[key])
    unscored = [o.metric for o in study.objectives if (f := o.resolved(values)) and values.get(f.column) is None]
    if unscored:
        trial.set_user_attr("never scored", f"{', '.join(unscored)}: the value stands in for one, for the sampler")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # told a second time, after a storage that was away
        trial.set_constraint(STABLE, constraint_of(outcome))
    if outcome is Outcome.PRUNED:
        for number, value in sorted(learning_curve(study, values, ledger.rows(name)).items()):
            trial.report(value, number)
        optuna_study.tell(trial, state=TrialState.PRUNED)
    else:
        optuna_study.tell(trial, objective_values(study, optuna_study, values), state=TrialState.COMPLETE)


def reconcile(study: StudyConfig, folder: Path, ledger: Ledger, driver: str = "") -> int:
    """Bring the storage in line with the ledger after a run, however it ended; returns how many trials were added.

    A RUNNING trial of this driver is told as it ended there, or else FAIL; one that only the ledger has is added.
    """
    opened = open_storage(study, folder, set(ledger.settings.values()))
    known: set[str] = set()
    for frozen in opened.get_trials(deepcopy=False):
        if frozen.state is TrialState.RUNNING:
            _end_orphan(study, opened, frozen, ledger, driver)
        if frozen.user_attrs.get("driver") == driver and "trial_id" in frozen.user_attrs:
            known.add(frozen.user_attrs["trial_id"])
    missing = [t for t in ledger.searched if t not in known]
    for trial_id in missing:
        config = read_trial(ledger.trials[trial_id]["config"])
        attributes = {
            "driver": driver,
            "setting": ledger.settings[trial_id],
            "seed": config.seed,
            "trial_id": trial_id,
            "setting_id": ledger.trials[trial_id]["setting_id"],
        }
        parameters = {key: _as_proposed(d, lookup(config, key)) for key, d in study.space.distributions.items()}
        tell(opened, study, add_running(opened, study.space, parameters, attributes), ledger)
    return len(missing)


def set_right(study: StudyConfig, folder: Path, ledger: Ledger, driver: str = "") -> str | None:
    """See that the storage says of the trials that are over what the ledger does; returns what was done, in words.

    One that does not is kept beside, and `reconcile` makes it anew; a shared one, which others need, is a `UserError`.
    """
    if not driver and not (folder / STORAGE).is_file():
        return None
    opened, storage = open_both(study, folder, set(ledger.settings.values()))
    if (wrong := _disagreement(study, folder, opened, ledger, driver)) is None:
        return None
    if driver:
        raise UserError(
            f"search.storage: {wrong}; put the storage back as it was, or begin the study anew under another name"
        )
    storage.engine.dispose()
    kept = free_name(folder / STORAGE, "changed")
    (folder / STORAGE).replace(kept)
    return f"{STORAGE} was changed: {wrong}; kept as {kept.name}, rebuilt from the journal"


def _disagreement(study: StudyConfig, folder: Path, opened: optuna.Study, ledger: Ledger, driver: str) -> str | None:
    """The first trial of which a storage says something else than the ledger does, and what; None without any."""
    told: set[str] = set()
    earlier = [] if driver else earlier_trials(study, folder, opened.sampler)
    stored = opened.get_trials(deepcopy=False)
    for place, expected in enumerate(earlier):
        if place >= len(stored) or not _as_taken(stored[place], expected):
            return f"trial {place} is not that of {WARM_START}"
    for frozen in stored[len(earlier) :]:
        attributes = frozen.user_attrs
        if driver and attributes.get("driver") != driver:
            continue  # another driver's, whose ledger is elsewhere
        try:
            check_trial(frozen)  # `MemoryCopy` cannot take one that is not
        except (ValueError, TypeError) as error:
            return f"trial {frozen.number} is none ({one_line(error)[:120]})"
        if frozen.state is TrialState.WAITING and not driver:
            number, point = attributes.get("setting"), fixed_parameters(frozen)
            if (
                not isinstance(number, int)
                or not 0 <= number < len(study.space.start)
                or point != dict(study.space.start[number])
            ):
                return f"trial {frozen.number} waits there and is not a starting point of the study"
        if frozen.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            continue
        name = str(attributes.get("trial_id"))
        outcome = ledger.outcome(name)
        if outcome not in TOLD or name in told:
            return f"trial {frozen.number} ({shown(name, quoted=False)}) is over there, in the journal it is not"
        told.add(name)
        for what, there, here in _compared(study, frozen, ledger, name):
            if not _same(there, here):
                return f"{name} has {what} {shown(there)}, in the journal {shown(here)}"
    known = {t.user_attrs.get("trial_id"): t.state for t in opened.get_trials(deepcopy=False)}
    for name in ledger.searched:
        if name not in told and ledger.outcome(name) in TOLD and known.get(name) is TrialState.FAIL:
            return f"{name} has no result, in the journal it is {ledger.trials[name]['outcome']}"
    return None


def _as_taken(there: FrozenTrial, here: FrozenTrial) -> bool:
    """Whether a storage says of an earlier study's trial what was taken of it."""
    said = [
        [t.state.name, t.user_attrs.get(EARLIER), *t.constraints.values(), *(t.values or ()),
         *(v for pair in sorted(t.params.items()) for v in pair),
         *(v for pair in sorted(t.intermediate_values.items()) for v in pair)]
        for t in (there, here)
    ]  # fmt: skip
    return len(said[0]) == len(said[1]) and all(map(_same, *said))


def _compared(study: StudyConfig, frozen: FrozenTrial, ledger: Ledger, name: str) -> Iterator[tuple[str, Any, Any]]:
    """What a storage says of a trial that is over, and what the ledger does: what it is, there, here."""
    row = ledger.trials[name]
    outcome, config = Outcome(row["outcome"]), read_trial(row["config"])
    yield "the setting", frozen.user_attrs.get("setting"), ledger.settings[name]
    yield "the seed", frozen.user_attrs.get("seed"), config.seed
    yield "the fields", sorted(frozen.params), sorted(study.space.distributions)
    for key, distribution in study.space.distributions.items():
        if frozen.params[key] is not None:  # else the method has filled it in
            yield key, frozen.params[key], lookup(config, key)
        yield f"another range of {key}:", frozen.distributions[key], distribution
    yield "the state", frozen.state.name, "PRUNED" if outcome is Outcome.PRUNED else "COMPLETE"
    yield f"{STABLE} =", frozen.constraints.get(STABLE), constraint_of(outcome)
    if outcome is Outcome.PRUNED:
        yield "the learning curve", frozen.intermediate_values, learning_curve(study, row, ledger.rows(name))
        return
    for objective, value in zip(study.objectives, frozen.values, strict=True):
        if (here := told_value(study, objective, row)) is not None:  # else what it was told follows from other trials
            yield objective.metric, value, here


def _as_proposed(distribution: Any, value: Any) -> Any:
    """A trial's value as the search proposed it: where that was null the method has filled it in."""
    choices = getattr(distribution, "choices", (value,))
    return value if value in choices or None not in choices else None


def _same(there: Any, here: Any) -> bool:
    numbers = all(isinstance(value, int | float) for value in (there, here))
    # One is written as a decimal, the other as it is in memory.
    return math.isclose(there, here, rel_tol=1e-12) if numbers else bool(there == here)


def _end_orphan(study: StudyConfig, opened: optuna.Study, frozen: FrozenTrial, ledger: Ledger, driver: str) -> None:
    """End a RUNNING trial that nobody runs any more."""
    attrs, live = frozen.user_attrs, live_trial(opened, frozen)
    if "seed" not in attrs:
        # Its driver was killed between the proposal and the naming of it.
        age = time.time() - frozen.datetime_start.timestamp() if frozen.datetime_start else math.inf
        if driver and age < _STALE:
            return  # another driver may be about to name it
        fail(opened, live, "interrupted")
        if (fixed := fixed_parameters(frozen)) is not None:
            opened.enqueue_trial(fixed, user_attrs={"setting": attrs["setting"]})
        return
    if attrs.get("driver") == driver:
        tell(opened, study, live, ledger)
