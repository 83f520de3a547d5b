"""The search space of a study: Optuna distributions, starting points, and the points of a grid."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from study.config.errors import UserError, nearest, shown
from study.config.fields import (
    AnyTrial,
    as_field,
    field_type,
    is_script,
    known_fields,
    lookup,
    make_built_in,
    make_trial,
    meet_parts,
    setting_id,
    with_values,
)
from study.config.search import Range, Scalar, SearchConfig
from trainables.config.trial import OLD_PARTS, TrialConfig

MAX_SETTINGS = 10_000
"""Of a grid: its queue in Optuna's storage takes some 5 ms for each before the first trial starts."""
MAX_VALUES = 1000
"""Of one field's list: Optuna's storage holds the list once per trial."""
_COUNTED = 1000
"""Settings of a space that are counted one by one (some 0.3 ms for each): two choices can make an equal trial."""


@dataclass(frozen=True)
class Space:
    """What a study can propose.

    Attributes:
        distributions: Optuna distribution per searched field.
        start: settings to try first; of a grid, all of them.
        settings: how many settings the study proposes in all, at most as many as differ.
        different: how many settings differ, in words.
        notes: what was taken once though it is there more often, and whether more settings are asked for than differ.
    """

    base: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    start: tuple[dict[str, Scalar], ...]
    settings: int
    different: str = ""
    notes: tuple[str, ...] = ()

    def trial(self, values: dict[str, Any], seed: int, source: str = "study") -> AnyTrial:
        """The trial of a setting and a seed."""
        return make_trial({**with_values(self.base, values), "seed": seed}, source)

    def built_in(self, values: dict[str, Any], seed: int) -> TrialConfig:
        """The same, of a built-in method. UserError: it is a script's."""
        return make_built_in({**with_values(self.base, values), "seed": seed}, "study")


def any_value(distribution: Any) -> Any:
    """A value of a distribution: its first choice or its lower end."""
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low


def _refuse_many(number: int, place: str, source: str) -> None:
    if number > MAX_VALUES:
        raise UserError(f"{source}: {place}: has {number:,} values, but expected at most {MAX_VALUES:,}; thin it out")


def _check_field(key: str, base: dict[str, Any], source: str, place: str) -> None:
    if is_script(base):
        _check_argument(key, base, source, place)
        return
    if key not in known_fields() and key.partition(".")[0] not in OLD_PARTS:
        raise UserError(f"{source}: {place}.{key}: unknown trial field{nearest(key, known_fields())}")
    if key == "seed":
        raise UserError(f"{source}: {place}.seed: seeds are not searched; list them under seeds")
    below: Any = base
    for part in key.split("."):
        if not isinstance(below, dict) or part not in below:
            return
        below = below[part]
    raise UserError(f"{source}: {place}.{key}: is searched here and fixed under trial; remove one")


def _check_argument(key: str, base: dict[str, Any], source: str, place: str) -> None:
    if key == "seed":
        raise UserError(f"{source}: {place}.seed: seeds are not searched; list them under seeds")
    if key in (base.get("args") or {}):
        raise UserError(f"{source}: {place}.{key}: is searched here and fixed under trial.args; remove one")


def _kind_of(key: str, spec: Range, base: dict[str, Any]) -> type | None:
    """`int` or `float` of a range; of a script's argument its ends decide, which are of its default's type."""
    if not is_script(base):
        return field_type(key)
    return int if all(isinstance(n, int) for n in (spec.low, spec.high, spec.step or 1)) else float


def snapped(distribution: BaseDistribution, value: Any) -> Any:
    """A value of a range with a step as a decimal number has it: samplers say 0.3 and 0.30000000000000004."""
    if not isinstance(distribution, FloatDistribution) or distribution.step is None:
        return value
    low, step = Decimal(str(distribution.low)), Decimal(str(distribution.step))
    return float(low + round((value - distribution.low) / distribution.step) * step)


def size_of(distribution: BaseDistribution) -> int | None:
    """How many values a distribution has; None where they are continuous."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if distribution.single():
        return 1
    if isinstance(distribution, IntDistribution):
        return (distribution.high - distribution.low) // distribution.step + 1
    assert isinstance(distribution, FloatDistribution)
    return None if distribution.step is None else round((distribution.high - distribution.low) / distribution.step) + 1


def points_of(distributions: Mapping[str, BaseDistribution], numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Settings of a space without a continuous field by their numbers, from 0 to the product of its sizes."""
    sizes = {key: size_of(d) or 1 for key, d in distributions.items()}
    for number in numbers:
        point, left = {}, number
        d: Any
        for key, d in distributions.items():
            left, place = divmod(left, sizes[key])
            one_of = isinstance(d, CategoricalDistribution)
            point[key] = d.choices[place] if one_of else snapped(d, d.low + place * (d.step or 0))
        yield point


def number_of_points(distributions: Mapping[str, BaseDistribution]) -> int | None:
    """Product of the sizes; None where a field is continuous."""
    sizes = [size_of(d) for d in distributions.values()]
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def _once(key: str, values: Sequence[Any], place: str, notes: list[str], base: dict[str, Any]) -> list[Any]:
    """The values of a list, each once; 1 and 1.0 are one, 1 and true are two."""
    kept: dict[tuple[bool, Any], Any] = {}
    repeated: dict[Any, None] = {}
    for value in (_as_field(key, v, base) for v in values):
        if (isinstance(value, bool), value) in kept:
            repeated[value] = None
        kept.setdefault((isinstance(value, bool), value), value)
    if repeated:
        named = ", ".join(shown(value, quoted=False) for value in repeated)
        notes.append(f"{place}: {named} is there more than once and is taken once")
    return list(kept.values())


def _as_field(key: str, value: Any, base: dict[str, Any]) -> Any:
    return value if is_script(base) else as_field(key, value)


def _distribution(key: str, spec: Range, source: str, notes: list[str], base: dict[str, Any]) -> BaseDistribution:
    if spec.choices is not None:
        _refuse_many(len(spec.choices), f"search.space.{key}.choices", source)
        return CategoricalDistribution(tuple(_once(key, spec.choices, f"search.space.{key}.choices", notes, base)))
    kind = _kind_of(key, spec, base)
    if kind not in (int, float):
        raise UserError(f"{source}: search.space.{key}: has no order, give choices instead of low and high")
    assert spec.low is not None
    assert spec.high is not None
    numbers = [n for n in (spec.low, spec.high, spec.step) if n is not None]
    if kind is int and any(n != int(n) for n in numbers):
        raise UserError(f"{source}: search.space.{key}: is an integer field, but got {numbers}")
    distribution: IntDistribution | FloatDistribution
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that Optuna lowers the upper end is said below
        if kind is int:
            distribution = IntDistribution(int(spec.low), int(spec.high), log=spec.log, step=int(spec.step or 1))
        else:
            distribution = FloatDistribution(float(spec.low), float(spec.high), log=spec.log, step=spec.step)
    if distribution.high != spec.high:
        ends = f"steps of {spec.step:g} from {spec.low:g} end at {distribution.high:g} below {spec.high:g}"
        notes.append(f"search.space.{key}: {ends}")
    return distribution


def check_names(values: Mapping[str, Any], source: str) -> None:
    """Refuse, in a raw study of a built-in method, what is searched and is not a trial field. UserError: there is one.

    What is malformed is left to be refused.
    """
    search, trial = values.get("search"), values.get("trial", {})
    space = search.get("space") if isinstance(search, Mapping) else None
    if not isinstance(space, Mapping) or not isinstance(trial, dict):
        return
    choices = {k: s.get("choices") for k, s in space.items() if isinstance(s, Mapping)}
    meet_parts({k: found for k, found in choices.items() if isinstance(found, list | tuple)})
    for key in (k for k, spec in space.items() if spec != "auto"):
        _check_field(key, trial, source, "search.space")


def build_space(trial: dict[str, Any], search: SearchConfig, seed: int, source: str = "study") -> Space:
    """What a study of these fixed fields can propose, with every end of every range tried as a trial of this seed.

    Raises:
        UserError: an unknown field, a value no trial can have, a starting point outside the ranges.
    """
    if "seed" in trial:
        raise UserError(f"{source}: trial.seed: seeds are not a trial field here; list them under seeds")
    make_trial(trial, source)
    meet_parts({key: spec.choices for key, spec in search.space.items()})
    for block in search.grid:
        meet_parts({key: value if isinstance(value, list | tuple) else [value] for key, value in block.items()})
    return (_grid_space if search.sampler == "grid" else _open_space)(dict(trial), search, seed, source)


def _open_space(base: dict[str, Any], search: SearchConfig, seed: int, source: str) -> Space:
    distributions: dict[str, BaseDistribution] = {}
    notes: list[str] = []
    for key in search.space:
        _check_field(key, base, source, "search.space")
    # Fields can depend on each other, so none is tried without a value of every other.
    some = {
        key: _as_field(key, spec.choices[0] if spec.choices else spec.high, base) for key, spec in search.space.items()
    }
    for key, spec in search.space.items():
        distributions[key] = distribution = _distribution(key, spec, source, notes, base)
        for value in getattr(distribution, "choices", None) or (spec.low, spec.high):
            make_trial(with_values(base, some | {key: value}), source, f"search.space.{key} ->")
    asked = search.trials or 0
    bare = Space(base, distributions, (), asked)
    start: list[dict[str, Scalar]] = []
    seen: dict[str, int] = {}
    for number, given in enumerate(search.start):
        point = {}
        for key, value in given.items():
            place = f"search.start[{number}].{key}"
            if key not in distributions:
                raise UserError(f"{source}: {place}: is not in search.space{nearest(key, distributions)}")
            point[key] = _as_field(key, value, base)
            if not contains(distributions[key], point[key]):
                raise UserError(f"{source}: {place} = {value!r}: is outside of search.space.{key}")
            point[key] = snapped(distributions[key], point[key])
        tried = bare.trial(some | point, seed, source)
        # What a point leaves out is sampled, and differs.
        if len(point) == len(distributions) and (first := seen.setdefault(setting_id(tried), number)) != number:
            notes.append(f"search.start[{number}]: is the setting of search.start[{first}] and is taken once")
            continue
        start.append(point)
    different, most = _different(bare, seed, source)
    if most is not None and asked > most:
        differ = f"but {most} differ: the study ends early, when those are done"
        notes.append(f"search.trials asks for {asked} settings, {differ}")
    settings = asked if most is None else min(asked, most)
    return Space(base, distributions, tuple(start), settings, different, tuple(notes))


def _settings(number: int) -> str:
    return f"{number} setting{'s' if number != 1 else ''}"


def _different(space: Space, seed: int, source: str) -> tuple[str, int | None]:
    """How many settings of a space differ, in words, and as a number they do not exceed (None without one)."""
    most = number_of_points(space.distributions)
    if most is None:
        continuous = [key for key, d in space.distributions.items() if size_of(d) is None]
        return f"unbounded: {', '.join(continuous)} {'is' if len(continuous) == 1 else 'are'} continuous", None
    if most > _COUNTED:
        return f"at most {most:,} settings", most
    ids = {setting_id(space.trial(p, seed, source)) for p in points_of(space.distributions, range(most))}
    return _settings(len(ids)), len(ids)


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a value is one of a distribution's."""
    if isinstance(distribution, CategoricalDistribution):
        return any(value == c and isinstance(value, bool) == isinstance(c, bool) for c in distribution.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    steps = (value - distribution.low) / distribution.step if distribution.step else 0
    return distribution.low <= value <= distribution.high and abs(steps - round(steps)) < 1e-8


def _grid_space(base: dict[str, Any], search: SearchConfig, seed: int, source: str) -> Space:
    points: list[dict[str, Any]] = []
    notes: list[str] = []
    count = 0
    for number, block in enumerate(search.grid):
        place = f"search.grid[{number}]"
        for key in block:
            _check_field(key, base, source, place)
        lists = [value if isinstance(value, list | tuple) else [value] for value in block.values()]
        for key, options in zip(block, lists, strict=True):
            _refuse_many(len(options), f"{place}.{key}", source)
            if not options or not all(isinstance(v, Scalar) for v in options):
                raise UserError(f"{source}: {place}.{key}: must be a value or a list of values, but got {options!r}")
        lists = [_once(key, options, f"{place}.{key}", notes, base) for key, options in zip(block, lists, strict=True)]
        count += math.prod(map(len, lists))
        if count > MAX_SETTINGS:
            raise UserError(
                f"{source}: search.grid: has {count:,} settings or more, but expected at most {MAX_SETTINGS:,}; "
                "shorten its lists, make several studies of it, or draw from it (search.space, sampler random, trials)"
            )
        points += [dict(zip(block, combination, strict=True)) for combination in itertools.product(*lists)]
    bare = Space(base, {}, (), 0)
    complete = []
    seen: set[str] = set()
    for point in points:
        trial = bare.trial(point, seed, source)
        identity = setting_id(trial)
        if identity in seen:
            continue
        seen.add(identity)
        # Blocks may leave fields out; Optuna wants every field of every trial.
        complete.append({key: point.get(key, lookup(trial, key)) for key in search.varied})
    choices = {key: tuple(dict.fromkeys(point[key] for point in complete)) for key in search.varied}
    distributions: dict[str, BaseDistribution] = {key: CategoricalDistribution(c) for key, c in choices.items()}
    if repeated := len(points) - len(complete):
        notes.append(f"search.grid: {repeated} of {len(points)} settings are there more than once and are taken once")
    return Space(base, distributions, tuple(complete), len(complete), _settings(len(complete)), tuple(notes))
