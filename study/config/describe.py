"""What every field of a study and of a trial means, takes and is by default, read from the models that check them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from analysis.results.labels import symbol
from study.config.study import StudyConfig
from trainables.config.arguments import Arguments
from trainables.config.method import all_methods
from trainables.config.trial import TrialConfig

ABSURD = 10**9
"""An upper end that no study comes near is not worth a word."""


@dataclass(frozen=True)
class FieldText:
    """A field for people.

    Attributes:
        name: dotted, as in YAML and `--set`.
        symbol: in the paper; empty: none.
        meaning: a sentence or more.
        values: type and range, such as `integer, 1 to 100,000`.
        default: of the model; methods and data sets have their own. Undefined where one must be given.
        trial: whether it is a trial's.
        methods: those whose own it is; empty: of all.
    """

    name: str
    symbol: str
    meaning: str
    values: str
    default: Any
    trial: bool
    methods: tuple[str, ...] = ()

    @property
    def default_text(self) -> str:
        """The default as YAML has it."""
        return "must be given" if self.default is PydanticUndefined else as_yaml(self.default)


def as_yaml(value: Any) -> str:
    """A value in YAML's words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {as_yaml(v)}' for k, v in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(as_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def trial_fields() -> list[FieldText]:
    """Every field of a trial, in the order of `TrialConfig`; then the methods' own."""
    found = list(_fields(TrialConfig, "", trial=True))
    own: dict[str, FieldText] = {}
    for name, method in all_methods().items():
        for text in _fields(method, "method_args.", trial=True):
            methods = (*(own[text.name].methods if text.name in own else ()), name)
            own[text.name] = replace(own.get(text.name, text), methods=methods)
    return found + list(own.values())


def study_fields() -> list[FieldText]:
    """Every field of a study outside of its trial."""
    return [text for text in _fields(StudyConfig, "", trial=False) if text.name != "trial"]


def _fields(model: type[BaseModel], prefix: str, *, trial: bool) -> Iterator[FieldText]:
    schema = model.model_json_schema()
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and not issubclass(inner, Arguments):
            if name != "method_args":
                yield from _fields(inner, f"{prefix}{name}.", trial=trial)
            continue
        part = next((a for a in get_args(inner) if isinstance(a, type) and issubclass(a, BaseModel)), None)
        said = schema["properties"][name]
        meaning = " ".join((info.description or "").split())
        sign = symbol(name)
        yield FieldText(
            f"{prefix}{name}",
            "" if sign == name.replace("_", " ") else sign,
            meaning,
            values_text(said, schema.get("$defs", {})),
            info.get_default(call_default_factory=True),
            trial,
        )
        if part is not None and type(None) in get_args(inner):  # one that may be left out
            yield from _fields(part, f"{prefix}{name}.", trial=trial)


def values_text(said: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words.

    Args:
        said: of the field; parts: the schema's `$defs`.
    """
    if "anyOf" in said:
        return " or ".join(values_text(option, parts) for option in said["anyOf"])
    if "enum" in said or "const" in said:
        return " or ".join(as_yaml(v) for v in said.get("enum", [said.get("const")]))
    kind = said.get("type")
    if kind == "array":
        inner = said.get("items") or (said.get("prefixItems") or [{}])[0]
        least, most = said.get("minItems"), said.get("maxItems")
        number = f" of {least}" if least is not None and least == most else ""
        return f"list{number}: {values_text(inner, parts)}"
    if kind in ("integer", "number"):
        return ", ".join(filter(None, (kind, _range(said))))
    return {"boolean": "true or false", "null": "null", "string": "text", "object": "mapping"}.get(str(kind), "mapping")


def _range(said: Mapping[str, Any]) -> str:
    low, high = said.get("minimum"), _felt(said.get("maximum"))
    above, below = said.get("exclusiveMinimum"), _felt(said.get("exclusiveMaximum"))
    if low is not None and high is not None:
        return f"{low:,} to {high:,}"
    ends = [f"at least {low:,}" if low is not None else "", f"above {above:,}" if above is not None else ""]
    ends += [f"at most {high:,}" if high is not None else "", f"below {below:,}" if below is not None else ""]
    return " and ".join(filter(None, ends))


def _felt(end: float | None) -> float | None:
    """An upper end, unless it is there against absurd numbers alone."""
    return None if end is None or end >= ABSURD else end


def by_method(name: str, methods: Sequence[str], datasets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Defaults of a trial field: by method, then by data set. A method that does not use the field is left out."""
    from study.config.fields import lookup
    from trainables.methods.presets import build_trial

    found: dict[str, dict[str, Any]] = {}
    for method in methods:
        trials = {d: build_trial({"method": method, "dataset": d}) for d in datasets}
        values = {d: lookup(trial, name) for d, trial in trials.items()}
        if any(trial.setting().get(name, 0) is not None or values[d] is None for d, trial in trials.items()):
            found[method] = values
    return found
