"""A policy: the part of a study's configuration that a replay can change, in the same YAML with the same keys."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from analysis.results.own import BUILT_IN
from study.config.errors import UserError, nearest, shown, validation_error
from study.config.fields import assign, parse_assignments
from study.config.load import read_config
from study.config.rescue import RescueConfig
from study.config.script import AUTO
from study.config.search import Count, Part, Scalar, SearchConfig
from study.config.study import COST_METRICS, BudgetConfig, Objective, PruningConfig, RunConfig, StudyConfig
from study.replay.simulate import Rules
from study.replay.trajectory import Recorded, Trajectory
from trainables.config.parts import DivergenceConfig
from trainables.config.trial import TrialConfig
from trainables.results.own import OWN, field_of
from trainables.results.schema import METRIC_BY_NAME

RECORDED = "recorded"
"""Name of the policy that changes nothing."""
_CHANGED = (
    "trial.divergence", "search.start", "seeds", "objectives", "budget", "pruning", "rescue", "run.max_concurrent",
)  # fmt: skip
_NO_REPLAY = {
    "budget.deadline": "is a date, and a replay has none; give hours",
    "pruning.seeds": "cannot be replayed: which seeds run is the search's decision, not a trial's course",
    "trial.divergence.collapse_ratio": "judges a trial's last samples; a replay keeps that verdict",
}
_PARTS: dict[str, type[BaseModel]] = {"trial": TrialConfig, "search": SearchConfig, "run": RunConfig}


class _Start(Part):
    start: tuple[dict[str, Scalar], ...] = ()
    """Settings that run first, of those recorded."""


class _Run(Part):
    max_concurrent: Count | None = None
    """Trials at once; null: as many as were recorded at the same time."""


class PolicyConfig(Part):
    """What a policy may say; whatever it leaves out is as recorded."""

    name: str | None = None
    """Name in the table; null: the file's."""
    description: str = ""
    """What the policy is."""
    trial: dict[str, Any] = Field(default_factory=dict)
    """divergence alone."""
    search: _Start = Field(default_factory=_Start)
    seeds: tuple[int, ...] | None = Field(None, min_length=1, max_length=100_000)
    """Seeds of those recorded; null: all."""
    objectives: tuple[Objective, ...] | None = Field(None, min_length=1, max_length=20)
    """The first one is what the best is the best of; null: the study's."""
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    pruning: PruningConfig = Field(default_factory=PruningConfig)
    rescue: RescueConfig | None = None
    """Which of the recorded rescues take place: on, most; null: none."""
    run: _Run = Field(default_factory=_Run)


@dataclass(frozen=True)
class Policy:
    """A policy, checked against the study it is for.

    Attributes:
        divergence: fields of the detector that it changes.
        metric: what the best is the best of, and the column of its values; `sign` times a value is to be small.
        first: trials that run first, by the order of `search.start`.
        seeds: of the trials that take part; None: all.
        rescue: which of the recorded rescues take place.
    """

    name: str
    rules: Rules
    divergence: Mapping[str, Any]
    metric: str
    sign: int
    first: tuple[str, ...] = ()
    seeds: frozenset[int] | None = None
    rescue: RescueConfig | None = None

    def rule(self, trajectory: Trajectory) -> DivergenceConfig | None:
        """The detector of a trial; None where the recorded end stands."""
        if trajectory.divergence is None or not self.divergence:
            return None
        return DivergenceConfig.model_validate(trajectory.divergence.model_dump() | dict(self.divergence))


def read_policy(config: str, recorded: Recorded, assignments: tuple[str, ...] = ()) -> Policy:
    """A policy from a YAML file, with `--set` on top. UserError: it is no policy, or not for this study."""
    source, values = read_config(config)
    return make_policy(values, recorded, source, assignments)


def make_policy(
    values: Mapping[str, Any], recorded: Recorded, source: str, assignments: tuple[str, ...] = ()
) -> Policy:
    """A policy from a raw mapping, with `--set` on top; see `read_policy`."""
    given = dict(values)
    for key, value in parse_assignments(assignments):
        given = assign(given, {f"trial.{key}" if key.partition(".")[0] == "divergence" else key: value})
    study = recorded.manifest.get("config")
    study = study if isinstance(study, Mapping) else {}
    given = _short(given, recorded.kind)
    _refuse_others(given, study, source)
    told: dict[str, Any] = {key: given[key] for key in ("name", "description", "seeds", "objectives") if key in given}
    for key in ("pruning", "budget"):  # what a policy leaves out is as recorded; a date that has passed limits nothing
        changed = given.get(key, {})
        merged = {**_part(study, key), **changed} if isinstance(changed, Mapping) else changed
        told[key] = {k: v for k, v in merged.items() if k != "deadline"} if isinstance(merged, Mapping) else merged
    for key, name in (("search", "start"), ("trial", "divergence")):
        told[key] = {name: _part(given, key)[name]} if name in _part(given, key) else {}
    told["rescue"] = _rescue(given, study, source)
    told["run"] = {
        "max_concurrent": _part(given, "run").get("max_concurrent", _part(study, "run").get("max_concurrent"))
    }
    try:
        policy = PolicyConfig.model_validate(told)
    except ValidationError as error:
        raise validation_error(source, error, PolicyConfig) from error
    return _checked(policy, recorded, source)


def at(values: Any, key: str) -> Any:
    """What a nested configuration has under a dotted key; None where there is nothing."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _rescue(given: Mapping[str, Any], study: Mapping[str, Any], source: str) -> Any:
    """A policy's rescue on top of the recorded one; only what leaves out recorded rescues has a known course."""
    told, there = given.get("rescue", study.get("rescue")), study.get("rescue")
    if told is None:
        return None
    if not isinstance(there, Mapping):
        raise UserError(
            f"{source}: rescue: none was recorded, and what a trial does after a change of its settings is known from "
            "its recording alone; a study with rescue tells what fewer rescues do"
        )
    if not isinstance(told, Mapping):
        return told
    merged = {**there, **told}
    with suppress(ValidationError):
        policy, recorded = RescueConfig.model_validate(merged), RescueConfig.model_validate(there)
        for name in ("rewind", "change"):
            if (value := getattr(policy, name)) != (known := getattr(recorded, name)):
                raise UserError(
                    f"{source}: rescue.{name}: must be {shown(known, quoted=False)}, as recorded, but is "
                    f"{shown(value, quoted=False)}"
                )
        if other := [end for end in policy.on if end not in recorded.on]:
            raise UserError(f"{source}: rescue.on: no rescue of a trial that {other[0]} was recorded")
        if policy.most > recorded.most:
            raise UserError(
                f"{source}: rescue.most: must be at most {recorded.most}, as recorded, but is {policy.most}"
            )
    return merged


def _part(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = values.get(key)
    return part if isinstance(part, Mapping) else {}


def _short(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """Short forms as in a study: pruning by its rule, objectives by their names, own metrics without `own.`."""

    def named(part: Any) -> Any:
        name = part.get("metric") if isinstance(part, dict) else None
        foreign = kind != BUILT_IN and isinstance(name, str) and name not in (*METRIC_BY_NAME, *COST_METRICS, AUTO)
        return part | {"metric": f"{OWN}{name}"} if foreign and not str(name).startswith(OWN) else part

    found = dict(values)
    if isinstance(found.get("pruning"), str):
        found["pruning"] = {"rule": found["pruning"]}
    if isinstance(found.get("objectives"), str):
        found["objectives"] = [found["objectives"]]
    if isinstance(objectives := found.get("objectives"), list | tuple):
        found["objectives"] = [named({"metric": o} if isinstance(o, str) else o) for o in objectives]
    if isinstance(pruning := found.get("pruning"), dict):
        found["pruning"] = named(pruning)
    return found


def _refuse_others(values: Mapping[str, Any], study: Mapping[str, Any], source: str) -> None:
    """Refuse what a replay cannot change; a study's own YAML may be given, where it says what was recorded."""
    for key, reason in _NO_REPLAY.items():
        given, there = at(values, key), at(study, key)
        if given not in (None, "all") and not _within(given, there):
            raise UserError(f"{source}: {key}: {reason}")
    for key, value in values.items():
        if not isinstance(key, str) or key not in (StudyConfig.model_fields | PolicyConfig.model_fields):
            raise UserError(
                f"{source}: {shown(key, quoted=False)}: unknown key{nearest(str(key), [*StudyConfig.model_fields])}"
            )
        if key in ("name", "description", "seeds", "objectives", "budget", "pruning", "rescue"):
            continue
        if key not in _PARTS:
            _refuse_other(key, value, study.get(key), source)
            continue
        if not isinstance(value, Mapping):
            raise UserError(f"{source}: {key}: must be a mapping of keys to values, but is {shown(value)}")
        free = {"trial": "divergence", "search": "start", "run": "max_concurrent"}[key]
        known = _PARTS[key].model_fields
        for name, part in value.items():
            if field_of(str(name)).partition(".")[0] not in known and name not in _part(study, key):
                raise UserError(f"{source}: {key}.{shown(name, quoted=False)}: unknown key{nearest(str(name), known)}")
            if name != free:
                _refuse_other(f"{key}.{name}", part, _part(study, key).get(name), source)


def _refuse_other(key: str, value: Any, recorded: Any, source: str) -> None:
    if _plain(value) != _plain(recorded) and not (isinstance(value, Mapping) and _within(value, recorded)):
        raise UserError(
            f"{source}: {key}: is {shown(recorded, quoted=False)} in what was recorded, which a replay cannot change; "
            f"a policy changes {', '.join(_CHANGED)}"
        )


def _within(value: Any, recorded: Any) -> bool:
    """Whether a part of a configuration says nothing else than a recorded one, which also has the defaults."""
    if not isinstance(value, Mapping) or not isinstance(recorded, Mapping):
        return bool(_plain(value) == _plain(recorded))
    return all(name in recorded and _within(part, recorded[name]) for name, part in value.items())


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _checked(policy: PolicyConfig, recorded: Recorded, source: str) -> Policy:
    trials = recorded.trajectories
    divergence = _divergence(policy.trial.get("divergence"), trials, source)
    if not recorded.timed and (policy.budget.hours or policy.budget.gpu_hours):
        raise UserError(f"{source}: budget: no times were recorded, so only budget.trials can be replayed")
    objective = _objective(policy, recorded, source)
    metric = policy.pruning.metric or objective.metric
    if policy.pruning.rule != "none" and not _scored(metric, trials):
        raise UserError(f"{source}: pruning.metric: no trial has a value of {metric}; recorded: {_measured(trials)}")
    deciding = Objective(metric=metric, direction=None).resolved(_row_with(metric, trials)) or objective
    seeds = None if policy.seeds is None else frozenset(policy.seeds)
    there = {t.seed for t in trials if t.seed is not None}
    if seeds is not None and (unknown := sorted(seeds - there)):
        raise UserError(
            f"{source}: seeds: {unknown[0]} was not recorded; recorded: {', '.join(map(str, sorted(there)))}"
        )
    at_once = policy.run.max_concurrent or recorded.at_once
    rules = Rules(policy.pruning, metric, deciding.resolved_direction, policy.budget, at_once)
    sign = 1 if objective.resolved_direction == "minimize" else -1
    first = _first(policy.search.start, trials, source)
    name = shown(policy.name or Path(source).stem, quoted=False)
    return Policy(name, rules, divergence, objective.metric, sign, first, seeds, policy.rescue)


def _divergence(given: Any, trials: tuple[Trajectory, ...], source: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UserError(f"{source}: trial.divergence: must be a mapping of keys to values, but is {shown(given)}")
    bases = [t.divergence.model_dump() for t in trials if t.divergence is not None]
    if not bases:
        raise UserError(f"{source}: trial.divergence: these trials judged themselves; their ends are not replayed")
    try:
        for base in {repr(base): base for base in bases}.values():
            DivergenceConfig.model_validate(base | dict(given))
    except ValidationError as error:
        raise validation_error(source, error, DivergenceConfig, "trial.divergence") from error
    return dict(given)


def _objective(policy: PolicyConfig, recorded: Recorded, source: str) -> Objective:
    """What the best is the best of: the policy's first quality metric, else the study's, else the first measured."""
    trials = recorded.trajectories
    wanted = list(policy.objectives or ())
    if not wanted:
        listed = recorded.manifest.get("objectives")
        for told in listed if isinstance(listed, list) else ():
            with suppress(ValidationError):
                wanted.append(Objective.model_validate(told))
    wanted = [o for o in wanted if o.metric not in COST_METRICS]
    found = [r for o in wanted if (r := o.resolved(_row_with(o.metric, trials))) is not None]
    if policy.objectives and found and not _scored(found[0].metric, trials):
        raise UserError(
            f"{source}: objectives: no trial has a value of {found[0].metric}; recorded: {_measured(trials)}"
        )
    measured = [o for o in found if _scored(o.metric, trials)]
    names = sorted({name for t in trials for r in t.reports for name in r.values})
    others = [Objective(metric=name, direction=None).resolved(_row_with(name, trials)) for name in names]
    return next(iter([*measured, *filter(None, others), *found, Objective(metric="fd_buffer", direction=None)]))


def _scored(metric: str, trials: tuple[Trajectory, ...]) -> bool:
    return any(r.epoch and metric in r.values for t in trials for r in t.reports)


def _measured(trials: tuple[Trajectory, ...]) -> str:
    return ", ".join(sorted({name for t in trials for r in t.reports for name in r.values})) or "none"


def _row_with(metric: str, trials: tuple[Trajectory, ...]) -> Mapping[str, Any]:
    """Columns of a trial that says which way of an own metric is better."""
    return next((t.row for t in trials if t.row.get(f"{metric}_direction")), trials[0].row)


def _first(starts: tuple[dict[str, Any], ...], trials: tuple[Trajectory, ...], source: str) -> tuple[str, ...]:
    found: list[str] = []
    for start in starts:
        wanted = {field_of(str(name)): value for name, value in start.items()}
        same = [t.trial_id for t in trials if all(_setting(t, n) == v for n, v in wanted.items())]
        if not same:
            raise UserError(f"{source}: search.start: no recorded trial has {shown(start, quoted=False)}")
        found += [trial_id for trial_id in same if trial_id not in found]
    return tuple(found)


def _setting(trajectory: Trajectory, name: str) -> Any:
    return trajectory.config.get(name, trajectory.row.get(name))
