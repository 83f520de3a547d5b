"""Arguments of a user's own parts (`network_args.width`), typed by the signature of what takes them. No torch."""

from __future__ import annotations

import inspect
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin

from pydantic import ConfigDict, Field, ValidationError, create_model

from trainables.config.parts import Model
from trainables.plugins.parts import is_own as is_own
from trainables.plugins.parts import own_part as own_part
from trainables.plugins.reference import short
from trainables.results.spelling import likeliest

Part = Literal["network", "initial", "dataset", "optimiser"]
"""Parts of a trial that may be a user's own and take arguments."""
Scalar = bool | int | float | str | None


class Arguments(Model):
    """Arguments of a part; none for the parts that come with the package."""

    model_config = ConfigDict(protected_namespaces=())


@dataclass(frozen=True)
class _Call:
    """How a part is called.

    Attributes:
        given: names of what the tool gives it first, by place.
        keywords: names of what the tool gives it by keyword: those that its signature has.
        needed: those of `keywords` that it must have.
    """

    given: tuple[str, ...]
    keywords: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"({', '.join((*self.given, *(f'{name}=...' for name in self.keywords), '**arguments'))})"


CALLS: Mapping[Part, _Call] = {
    "network": _Call(("shape", "classes")),
    "initial": _Call(("images",)),
    "dataset": _Call((), ("data_dir", "image_size")),
    "optimiser": _Call(("params",), ("lr",), ("lr",)),
}


def part_of(field: str) -> Part:
    """`network` of `network_args`."""
    return typing.cast("Part", field.removesuffix("_args"))


def own_arguments(part: Part, name: str) -> type[Arguments]:
    """Names, types and defaults of what a part takes beside what the tool gives it.

    Raises:
        ValueError: it is not there, or cannot be called as the tool does; one line.
    """
    kind = _model(part, short(name), own_part(part, name))
    _MET[part, name] = kind
    return kind


_MET: dict[tuple[Part, str], type[Arguments]] = {}


def met_arguments(part: str) -> Iterator[type[Arguments]]:
    """Arguments of the parts of a kind that this process has met, the newest first."""
    return (kind for (one, _), kind in reversed(_MET.items()) if one == part)


def parse_arguments(part: Part, name: str, given: Any) -> Arguments:
    """The arguments of a part of this name, complete.

    Raises:
        ValueError: an unknown name, or a value of the wrong type; one line.
    """
    if isinstance(given, Arguments):
        given = given.model_dump()
    if not isinstance(given, Mapping):
        raise ValueError(f"must be a mapping of names to values, but is {type(given).__name__}")
    if not is_own(part, name):
        # In a grid of several networks an argument that this one has not is null.
        if named := [str(n) for n, value in given.items() if value is not None]:
            article = "an" if part[0] in "aeiou" else "a"
            raise ValueError(f"{named[0]}: only {article} {part} of your own takes arguments, but {part} is {name}")
        return Arguments()
    kind = own_arguments(part, name)
    known = kind.model_fields
    extra = kind.model_config.get("extra") == "allow"
    values = {n: v for n, v in given.items() if v is not None or n in known}
    for unknown in () if extra else [n for n in values if n not in known]:
        close = likeliest(unknown, known)
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        near = f"did you mean {close}? " if close else ""
        raise ValueError(f"{short(name)} has no argument {str(unknown)[:100]!r}; {near}({takes})")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"][:1])
        value = "" if first["type"] == "missing" else f" = {ascii(first['input'])[:60]}"
        raise ValueError(f"{place}{value} of {short(name)}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


@lru_cache(maxsize=256)
def _model(part: Part, name: str, found: Callable[..., Any]) -> type[Arguments]:
    call = CALLS[part]
    expected = f"expected {name.rpartition(':')[2]}{call}"
    try:
        parameters = list(inspect.signature(found).parameters.values())
    except (TypeError, ValueError):
        raise ValueError(f"{part} {name}: its signature cannot be read; {expected}") from None
    rest = _without_given(parameters, call.given)
    if rest is None:
        raise ValueError(f"{part} {name}: takes {inspect.signature(found)}, {expected}")
    open_ended = any(p.kind is p.VAR_KEYWORD for p in rest)
    if missing := [n for n in call.needed if not open_ended and n not in {p.name for p in rest}]:
        raise ValueError(f"{part} {name}: has no argument {missing[0]}; {expected}")
    hints = _hints(found)
    fields: dict[str, Any] = {}
    for p in rest:
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or p.name in call.keywords:
            continue
        kind = _type_of(hints.get(p.name, p.annotation), p.default)
        required = p.default is p.empty
        if kind is None or p.name.startswith("_") or p.kind is p.POSITIONAL_ONLY:
            if required:
                what = "is given by place alone" if p.kind is p.POSITIONAL_ONLY else "is not a number or text"
                raise ValueError(f"{part} {name}: needs {p.name}, which {what} and has no default; {expected}")
            continue
        fields[p.name] = (kind, ... if required else Field(p.default, description=f"{p.name} of {name}"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name that pydantic's own functions have
        return create_model("Arguments", __base__=_Open if open_ended else Arguments, **fields)


class _Open(Arguments):
    """Of a part with `**arguments`: any name."""

    model_config = ConfigDict(extra="allow")


def _without_given(parameters: list[inspect.Parameter], given: tuple[str, ...]) -> list[inspect.Parameter] | None:
    """Parameters behind those that are given by place; None where there are not so many."""
    for number in range(len(given)):
        if number >= len(parameters) or parameters[number].kind in (
            inspect.Parameter.KEYWORD_ONLY,
            inspect.Parameter.VAR_KEYWORD,
        ):
            return None
        if parameters[number].kind is inspect.Parameter.VAR_POSITIONAL:
            return parameters[number:]
    return parameters[len(given) :]


def _hints(found: Any) -> Mapping[str, Any]:
    """Annotations of a function, or of what makes a class's objects; written as texts they are looked up."""
    target: Any = getattr(found, "__init__", found) if isinstance(found, type) else found
    if not inspect.isroutine(target):
        target = getattr(target, "func", None) or type(found).__call__
    try:
        return typing.get_type_hints(target)
    except Exception:  # names that exist for a type checker alone
        return {}


def _type_of(annotation: Any, default: Any) -> Any:
    """The type of an argument as a configuration may hold it; None: it can hold none of that type."""
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return _type_of_default(default)
    kind = _plain(annotation)
    if kind is None or not (default is inspect.Parameter.empty or _is_plain(default)):
        return None
    return kind | None if default is None else kind


def _type_of_default(default: Any) -> Any:
    if default is inspect.Parameter.empty or default is None:
        return Scalar
    if isinstance(default, list | tuple) and _is_plain(default):
        return tuple[Scalar, ...]
    return type(default) if isinstance(default, bool | int | float | str) else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) and not isinstance(v, list | tuple) for v in value)
    return value is None or type(value) in (bool, int, float, str)


def _plain(annotation: Any) -> Any:
    """An annotation with only the parts that a configuration can hold; None: it has none."""
    if annotation in (bool, int, float, str, type(None), None):
        return type(None) if annotation is None else annotation
    if annotation is Any:
        return Scalar
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return annotation
    if origin in (typing.Union, types.UnionType):
        kinds = [k for k in map(_plain, inner) if k is not None]
        return typing.Union[tuple(kinds)] if set(kinds) - {type(None)} else None  # noqa: UP007
    if origin in (list, tuple, Sequence):
        kinds = [_plain(k) for k in inner if k is not ...]
        if not kinds or any(k is None for k in kinds):
            return None
        one: Any = typing.Union[tuple(kinds)]  # noqa: UP007
        whole: Any = tuple
        return whole[tuple(kinds)] if origin is tuple and ... not in inner else whole[one, ...]
    return None
