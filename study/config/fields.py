"""A trial's fields by their dotted names: which there are, setting them, and the id of a setting."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import typing
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, ValidationError

from study.config.errors import UserError, nearest, one_line, shown, validation_error
from study.config.own_names import own_names
from study.config.yaml_input import parse_yaml
from trainables.config.arguments import is_own, met_arguments, own_arguments, part_of
from trainables.config.method import all_methods
from trainables.config.script import ScriptConfig
from trainables.config.trial import ARGUMENTS, OLD_PARTS, TrialConfig
from trainables.methods.presets import build_trial, merge
from trainables.plugins.reference import on_change
from trainables.results.bounded import parse_json
from trainables.results.own import SYMBOLS, field_of

ID_DIGITS = 16
"""Hex digits of a setting's id. Of a million settings two have the same one once in 37 million studies."""
OLD_ID_DIGITS = 8
"""As earlier versions made them; a study that began with those goes on with them."""


_OF_STUDIES = ("search", "seeds", "objectives", "resources", "budget", "pruning", "rescue", "run")
"""Parts of a study, for whoever sets one for a trial."""
AnyTrial = TrialConfig | ScriptConfig
"""What a study's trial is: a run of a built-in method, or of a script."""


def is_script(trial: Mapping[str, Any]) -> bool:
    """Whether a trial's raw fields are those of a script."""
    return trial.get("kind") == "script" or not trial.keys().isdisjoint(("script", "command"))


def trial_model(trial: Mapping[str, Any]) -> type[AnyTrial]:
    """What a trial's raw fields are validated as."""
    return ScriptConfig if is_script(trial) else TrialConfig


def make_trial(values: dict[str, Any], source: str, prefix: str = "trial") -> AnyTrial:
    """A trial of raw fields; its findings are a `UserError`."""
    try:
        return ScriptConfig.model_validate(values) if is_script(values) else build_trial(values)
    except ValidationError as error:
        raise validation_error(source, error, trial_model(values), prefix) from error
    except ValueError as error:
        raise UserError(f"{source}: {prefix}: {one_line(error)}") from error


def make_built_in(values: dict[str, Any], source: str, prefix: str = "trial") -> TrialConfig:
    """As `make_trial`, of a built-in method. UserError: it is a script's."""
    trial = make_trial(values, source, prefix)
    if isinstance(trial, ScriptConfig):
        raise UserError(f"{source}: is a script's ({trial.method}); this command trains built-in methods")
    return trial


@functools.lru_cache(maxsize=4096)
def read_trial(text: str) -> AnyTrial:
    """The trial of a line of JSON; each is read once per process, and a trial's configuration never changes."""
    with suppress(ValueError):  # what is not JSON is a built-in trial's mistake
        if isinstance(values := parse_json(text), dict) and values.get("kind") == "script":
            return ScriptConfig.model_validate(values)
    return TrialConfig.model_validate_json(text)


on_change(read_trial.cache_clear)


def setting_id(config: AnyTrial, digits: int = ID_DIGITS) -> str:
    """So many hex digits, equal for trials that differ in their seed alone."""
    return text_id(config.identity(), digits)


def text_id(text: str, digits: int = ID_DIGITS) -> str:
    """The id of a setting that is written as this text."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def meet_parts(values: Mapping[str, Any]) -> None:
    """Learn the arguments of a user's own parts that are named among searched values, so that they can be searched.

    `values` are lists of them by field. What is wrong with a part is said when a trial of it is made.
    """
    for name in ARGUMENTS:
        for value in values.get(part_of(name)) or ():
            if is_own(part_of(name), value):
                with contextlib.suppress(ValueError):
                    own_arguments(part_of(name), value)


def known_fields() -> list[str]:
    """Dotted names of every trial field."""
    names = []
    for name, field in TrialConfig.model_fields.items():
        nested: Any = field.annotation
        if name == "method_args":
            own = dict.fromkeys(n for method in all_methods().values() for n in method.model_fields)
            names += [f"{name}.{inner}" for inner in own]
        elif name in ARGUMENTS:
            own = dict.fromkeys(n for kind in met_arguments(part_of(name)) for n in kind.model_fields)
            names += [f"{name}.{inner}" for inner in own]
        elif isinstance(nested, type) and issubclass(nested, BaseModel):
            names += [f"{name}.{inner}" for inner in nested.model_fields]
        else:
            names.append(name)
    return names


def _own_field(key: str) -> str | None:
    """The part of a dotted name that is a field of the method's own; None for another field."""
    head, _, own = key.partition(".")
    return own if own and (head == "method_args" or head in OLD_PARTS) else None


def field_type(key: str) -> type | None:
    """`int`, `float`, `bool` or `str` of a trial field; None where it is none of these. KeyError: no such field."""
    annotation: Any = TrialConfig
    head, _, argument = key.partition(".")
    own: str | None = None
    if argument and head in ARGUMENTS:
        annotation = next((m for m in met_arguments(part_of(head)) if argument in m.model_fields), None)
        own = argument
    elif own := _own_field(key):
        annotation = next((m for m in all_methods().values() if own in m.model_fields), None)
    for part in (own or key).split("."):
        if part not in (inner := getattr(annotation, "model_fields", {})):
            raise KeyError(key)
        annotation = inner[part].annotation
    options = [annotation, *typing.get_args(annotation)]
    for kind in (bool, int, float, str):
        if any(o is kind for o in options):
            return kind
    return str if any(isinstance(o, str) for o in options) else None


def lookup(trial: AnyTrial, key: str) -> Any:
    """Value of a trial field, of a script's argument; None of a field of another method's."""
    if isinstance(trial, ScriptConfig):
        return trial.args.get(key)
    if own := _own_field(key):
        return getattr(trial.method_args, own, None)
    head, _, argument = key.partition(".")
    if argument and head in ARGUMENTS:
        return getattr(getattr(trial, head), argument, None)
    return functools.reduce(getattr, key.split("."), trial)


def as_field(key: str, value: Any) -> Any:
    """A value as its field holds it: 1e-5 for the text "1e-5", 2 for 2.0; what is not a number is refused later."""
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


def parse_assignments(assignments: tuple[str, ...], option: str = "--set") -> list[tuple[str, Any]]:
    """`KEY=VALUE` texts of an option to pairs; the value is read as YAML. UserError: no `=`, or not YAML."""
    pairs = []
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            example = "trial.epochs=5" if option == "--set" else "fused_norm=true"
            raise UserError(f"{option} {shown(text, quoted=False)}: must be KEY=VALUE, for example {option} {example}")
        pairs.append((key.strip(), parse_yaml(value, f"{option} {shown(text, quoted=False)}")))
    return pairs


def assign(values: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with fields set by their dotted names."""
    for key, value in fields.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def with_values(trial: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's raw fields with searched ones set: a script's are its arguments."""
    if is_script(trial):
        return {**trial, "args": {**(trial.get("args") or {}), **found}}
    return assign(dict(trial), found)


def set_fields(values: dict[str, Any], assignments: tuple[str, ...], option: str = "--set") -> dict[str, Any]:
    """A trial's `values` with `KEY=VALUE` texts set; `trial.` may stand before KEY. UserError: no such field."""
    for name, value in parse_assignments(assignments, option):
        key = field_of(name.removeprefix("trial."))
        if key in own_names(str(values.get("method", "m-ebm"))):
            key = f"method_args.{key}"
        own = key.partition(".")[0] in ARGUMENTS  # whose names the part knows, once it is met
        if not own and key not in known_fields() and key not in TrialConfig.model_fields:
            what = f"{option} {shown(key, quoted=False)}"
            if key.partition(".")[0] in _OF_STUDIES:
                raise UserError(f"{what}: is of a study, and this is one trial; mebm sweep runs studies")
            raise UserError(f"{what}: unknown trial field{nearest(key, known_fields(), SYMBOLS)}")
        values = assign(values, {key: value})
    return values
