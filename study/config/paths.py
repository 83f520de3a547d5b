"""Dotted names of a study's fields, as `--set` takes them: which there are, and the one that was meant."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from study.config.fields import is_script, known_fields
from study.config.search import Range
from study.config.study import StudyConfig
from trainables.config.script import ScriptConfig
from trainables.results.own import SYMBOLS
from trainables.results.spelling import likeliest

_SPACE = "search.space"


def nested(annotation: Any) -> type[BaseModel] | None:
    """The model that a field's type is or holds (of a list, a mapping, or null); None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for part in typing.get_args(annotation) if (m := nested(part)) is not None), None)


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        below = field.annotation
        if isinstance(below, type) and issubclass(below, BaseModel):
            yield from _paths(below, f"{prefix}{name}.")


@cache
def study_paths() -> tuple[str, ...]:
    """Dotted names of all that stands in a study beside its trial, parts of it before their fields."""
    return tuple(_paths(StudyConfig))


def meant(key: str, trial: Mapping[str, Any]) -> str | None:
    """The whole dotted name of a study's field that was most likely meant; None where none is likely.

    Args:
        trial: the study's fixed fields, which say whether it is a script's.
    """
    head, *rest = key.split(".")
    script = is_script(trial)
    fields = list(ScriptConfig.model_fields) if script else known_fields()
    aliases = {} if script else SYMBOLS
    known = [*study_paths(), *(f for f in fields if f not in StudyConfig.model_fields)]
    if not rest:
        return likeliest(head, known, aliases)
    if rest[0] in Range.model_fields and (likely := likeliest(head, fields, aliases)) is not None:
        return ".".join([_SPACE, head if head in aliases else likely, *rest])
    if (whole := likeliest(key, known)) is not None and len(whole.split(".")) >= len(key.split(".")):
        return whole
    first = head if head in StudyConfig.model_fields else likeliest(head, known)
    if first is None:
        return None
    if first == "trial":
        found = likeliest(".".join(rest), fields, aliases)
        return None if found is None else f"trial.{found}"
    return _below(first.split("."), rest, [] if script else [*fields, *aliases])


def _below(path: list[str], rest: list[str], fields: list[str]) -> str | None:
    """A known path with what follows corrected part by part."""
    model: type[BaseModel] | None = StudyConfig
    for part in path:
        field = model.model_fields.get(part) if model is not None else None
        if field is None:
            return None
        model = nested(field.annotation)
    while rest:
        if ".".join(path) == _SPACE:
            known = fields
        elif model is not None:
            known = list(model.model_fields)
        else:
            return None
        name = rest[0] if rest[0] in known else likeliest(rest[0], known)
        if name is None:
            return None
        if ".".join(path) != _SPACE and model is not None:
            model = nested(model.model_fields[name].annotation)
        path, rest = [*path, name], rest[1:]
    return ".".join(path)
