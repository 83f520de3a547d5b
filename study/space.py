"""The search space of a study: Optuna distributions, starting points, and the points of a grid."""

from __future__ import annotations

import hashlib
import itertools
import math
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel

from study.config import Range, Scalar, StudyConfig, assign, make_trial
from study.errors import UserError, nearest, shown
from trainables.config import TrialConfig

ID_DIGITS = 16
"""Hex digits of a setting's id. Of a million settings two have the same one once in 37 million studies."""
OLD_ID_DIGITS = 8
"""As earlier versions made them; a study that began with those goes on with them."""
MOST_SETTINGS = 10_000
"""Of a grid: its queue in Optuna's storage takes some 5 ms for each before the first trial starts."""
MOST_VALUES = 1000
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

    def trial(self, values: dict[str, Any], seed: int, source: str = "study") -> TrialConfig:
        """The trial of a setting and a seed."""
        merged = self.base
        for key, value in values.items():
            merged = assign(merged, key, value)
        return make_trial({**merged, "seed": seed}, source)


def any_value(distribution: Any) -> Any:
    """A value of a distribution: its first choice or its lower end."""
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low


def setting_id(config: TrialConfig, digits: int = ID_DIGITS) -> str:
    """So many hex digits, equal for trials that differ in their seed alone."""
    return text_id(config.to_json(with_seed=False), digits)


def text_id(text: str, digits: int = ID_DIGITS) -> str:
    """The id of a setting that is written as this text."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _refuse_many(number: int, place: str, source: str) -> None:
    if number > MOST_VALUES:
        raise UserError(f"{source}: {place}: has {number:,} values, but expected at most {MOST_VALUES:,}; thin it out")


def field_type(key: str) -> type | None:
    """`int`, `float`, `bool` or `str` of a trial field (dotted for nested ones); None where it is none of these."""
    model: Any = TrialConfig
    annotation: Any = None
    for part in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            raise KeyError(key)
        annotation = model = model.model_fields[part].annotation
    options = [annotation, *typing.get_args(annotation)]
    for kind in (bool, int, float, str):
        if any(o is kind for o in options):
            return kind
    return str if any(isinstance(o, str) for o in options) else None


def known_fields() -> list[str]:
    """Dotted names of every trial field."""
    names = []
    for name, field in TrialConfig.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            names += [f"{name}.{inner}" for inner in nested.model_fields]
        else:
            names.append(name)
    return names


def _check_field(key: str, base: dict[str, Any], source: str, place: str) -> None:
    if key not in known_fields():
        raise UserError(f"{source}: {place}.{key}: unknown trial field{nearest(key, known_fields())}")
    if key == "seed":
        raise UserError(f"{source}: {place}.seed: seeds are not searched; list them under seeds")
    below: Any = base
    for part in key.split("."):
        if not isinstance(below, dict) or part not in below:
            return
        below = below[part]
    raise UserError(f"{source}: {place}.{key}: is searched here and fixed under trial; remove one")


def as_field(key: str, value: Any) -> Any:
    """A value as its field holds it: a number that is written as text, such as "1e-5", and a whole one as a float.

    What is no number is left for the field to refuse.
    """
    kind = field_type(key)
    if kind not in (int, float) or isinstance(value, bool) or not isinstance(value, str | float):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    if kind is float or not number.is_integer():
        return number
    return int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdecimal() else int(number)


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


def value_at(distribution: Any, number: int) -> Any:
    """The value of that number, from 0, of a distribution that is not continuous."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[number]
    return snapped(distribution, distribution.low + number * (distribution.step or 0))


def points_of(distributions: Mapping[str, BaseDistribution], numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Settings of a space without a continuous field by their numbers, from 0 to the product of its sizes."""
    sizes = {key: size_of(d) or 1 for key, d in distributions.items()}
    for number in numbers:
        point, left = {}, number
        for key, distribution in distributions.items():
            left, place = divmod(left, sizes[key])
            point[key] = value_at(distribution, place)
        yield point


def number_of_points(distributions: Mapping[str, BaseDistribution]) -> int | None:
    """Product of the sizes; None where a field is continuous."""
    sizes = [size_of(d) for d in distributions.values()]
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def _once(key: str, values: Sequence[Any], place: str, notes: list[str]) -> list[Any]:
    """The values of a list, each once; 1 and 1.0 are one, 1 and true are two."""
    kept: dict[tuple[bool, Any], Any] = {}
    repeated: dict[Any, None] = {}
    for value in (as_field(key, v) for v in values):
        if (isinstance(value, bool), value) in kept:
            repeated[value] = None
        kept.setdefault((isinstance(value, bool), value), value)
    if repeated:
        named = ", ".join(shown(value, quoted=False) for value in repeated)
        notes.append(f"{place}: {named} is there more than once and is taken once")
    return list(kept.values())


def _distribution(key: str, spec: Range, source: str, notes: list[str]) -> BaseDistribution:
    if spec.choices is not None:
        _refuse_many(len(spec.choices), f"search.space.{key}.choices", source)
        return CategoricalDistribution(tuple(_once(key, spec.choices, f"search.space.{key}.choices", notes)))
    kind = field_type(key)
    if kind not in (int, float):
        raise UserError(f"{source}: search.space.{key}: has no order, give choices instead of low and high")
    assert spec.low is not None
    assert spec.high is not None
    if kind is int:
        numbers = [n for n in (spec.low, spec.high, spec.step) if n is not None]
        if any(n != int(n) for n in numbers):
            raise UserError(f"{source}: search.space.{key}: is an integer field, but got {numbers}")
    distribution: IntDistribution | FloatDistribution
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that Optuna lowers the upper end is said below
        if kind is int:
            distribution = IntDistribution(int(spec.low), int(spec.high), log=spec.log, step=int(spec.step or 1))
        else:
            distribution = FloatDistribution(float(spec.low), float(spec.high), log=spec.log, step=spec.step)
    if distribution.high != spec.high:
        notes.append(
            f"search.space.{key}: steps of {spec.step:g} from {spec.low:g} end at {distribution.high:g} "
            f"below {spec.high:g}"
        )
    return distribution


def build_space(study: StudyConfig, source: str = "study") -> Space:
    """The space of a study, with every end of every range tried as a trial.

    Raises:
        UserError: an unknown field, a value no trial can have, a starting point outside the ranges.
    """
    base = dict(study.trial)
    if "seed" in base:
        raise UserError(f"{source}: trial.seed: seeds are not a trial field here; list them under seeds")
    make_trial(base, source)
    return _grid_space(study, base, source) if study.search.sampler == "grid" else _open_space(study, base, source)


def _open_space(study: StudyConfig, base: dict[str, Any], source: str) -> Space:
    search = study.search
    distributions: dict[str, BaseDistribution] = {}
    notes: list[str] = []
    for key, spec in search.space.items():
        _check_field(key, base, source, "search.space")
        distributions[key] = distribution = _distribution(key, spec, source, notes)
        for value in getattr(distribution, "choices", None) or (spec.low, spec.high):
            make_trial(assign(_some_setting(base, search.space, but=key), key, value), source, f"search.space.{key} ->")
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
            point[key] = as_field(key, value)
            if not contains(distributions[key], point[key]):
                raise UserError(f"{source}: {place} = {value!r}: is outside of search.space.{key}")
            point[key] = snapped(distributions[key], point[key])
        trial = bare.trial({**_flat_some(search.space), **point}, study.seeds[0], source)
        # What a point leaves out is sampled, and differs.
        if len(point) == len(distributions) and (first := seen.setdefault(setting_id(trial), number)) != number:
            notes.append(f"search.start[{number}]: is the setting of search.start[{first}] and is taken once")
            continue
        start.append(point)
    different, most = _different(bare, study.seeds[0], source)
    if most is not None and asked > most:
        notes.append(
            f"search.trials asks for {asked} settings, but {most} differ: the study ends early, when those are done"
        )
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
    return distribution._contains(distribution.to_internal_repr(value))


def _flat_some(space: dict[str, Range]) -> dict[str, Scalar]:
    """One value of every searched field: fields can depend on each other, so none is checked alone."""
    return {key: as_field(key, spec.choices[0] if spec.choices else spec.high) for key, spec in space.items()}


def _some_setting(base: dict[str, Any], space: dict[str, Range], but: str) -> dict[str, Any]:
    values = base
    for key, value in _flat_some(space).items():
        if key != but:
            values = assign(values, key, value)
    return values


def _grid_space(study: StudyConfig, base: dict[str, Any], source: str) -> Space:
    points: list[dict[str, Any]] = []
    notes: list[str] = []
    count = 0
    for number, block in enumerate(study.search.grid):
        place = f"search.grid[{number}]"
        for key in block:
            _check_field(key, base, source, place)
        lists = [value if isinstance(value, list | tuple) else [value] for value in block.values()]
        for key, options in zip(block, lists, strict=True):
            _refuse_many(len(options), f"{place}.{key}", source)
            bad = next((v for v in options if not isinstance(v, Scalar)), None)
            if bad is not None or not options:
                raise UserError(f"{source}: {place}.{key}: must be a value or a list of values, but got {options!r}")
        lists = [_once(key, options, f"{place}.{key}", notes) for key, options in zip(block, lists, strict=True)]
        count += math.prod(map(len, lists))
        if count > MOST_SETTINGS:
            raise UserError(
                f"{source}: search.grid: has {count:,} settings or more, but expected at most {MOST_SETTINGS:,}; "
                "shorten its lists, make several studies of it, or draw from it (search.space, sampler random, trials)"
            )
        points += [dict(zip(block, combination, strict=True)) for combination in itertools.product(*lists)]
    keys = study.varied
    bare = Space(base, {}, (), 0)
    complete = []
    seen: set[str] = set()
    for point in points:
        trial = bare.trial(point, study.seeds[0], source)
        identity = setting_id(trial)
        if identity in seen:
            continue
        seen.add(identity)
        # Blocks may leave fields out; Optuna wants every field of every trial.
        complete.append({key: point.get(key, lookup(trial, key)) for key in keys})
    distributions: dict[str, BaseDistribution] = {
        key: CategoricalDistribution(tuple(dict.fromkeys(point[key] for point in complete))) for key in keys
    }
    if repeated := len(points) - len(complete):
        notes.append(f"search.grid: {repeated} of {len(points)} settings are there more than once and are taken once")
    return Space(base, distributions, tuple(complete), len(complete), _settings(len(complete)), tuple(notes))


def lookup(trial: TrialConfig, key: str) -> Any:
    """Value of a trial field, dotted for nested ones."""
    value: Any = trial
    for part in key.split("."):
        value = getattr(value, part)
    return value
