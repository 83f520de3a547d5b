"""Where a study's configuration names code: its references without folders, and what they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from study.config.errors import UserError, shown
from trainables.config.protocols import parts_of, protocol_named
from trainables.plugins.installed import fingerprint, registered
from trainables.plugins.reference import bind, check_trusted, is_reference, named_file, short
from trainables.results.files import file_hash

_PROTOCOL = "protocol"
_KINDS = {
    "method": "method",
    "network": "network",
    "dataset": "dataset",
    "initial": "initial",
    "optimiser": "optimiser",
    "metric": "metric",
    "metrics": "metric",
    "protocols": _PROTOCOL,
}
"""What a key of a trial or an objective names; its last part, where it is dotted."""
_PARTS = ("trial", "search", "objectives", "pruning")
"""Keys of a study below which code can be named."""


def short_names(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A study's raw mapping with its files found and read, and their names without folders: what is hashed and stored.

    Raises:
        UserError: there is no such file, or two have one name.
    """

    def change(value: Any, key: str, kind: str | None) -> Any:
        if isinstance(value, Mapping):
            return {k: change(v, f"{key}.{k}", _kind(k, kind)) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(change(v, key, kind) for v in value)
        if kind is None or not (is_reference(value) or (kind == _PROTOCOL and isinstance(value, str) and "@" in value)):
            return value
        try:
            if kind == _PROTOCOL:
                return bind_protocol(value)
            return bind(value)[0]
        except ValueError as error:
            raise UserError(f"{source}: {key}: {shown(value, 200, quoted=False)}: {error}") from None

    if _is_script(values):
        return dict(values)
    return {k: change(v, str(k), None) if k in _PARTS else v for k, v in values.items()}


def bind_protocol(name: str) -> str:
    """NAME@EXTRACTOR[@WEIGHTS] as it is stored: code without its folder, files with theirs.

    Raises:
        ValueError: there is no such protocol or file; one line.
    """
    protocol_named(name)
    base, extractor, weights = parts_of(name)
    if is_reference(extractor):
        extractor = bind(extractor)[0]
    elif extractor:
        file = named_file(extractor)
        check_trusted(file, file_hash(file))
        extractor = str(file)
    try:
        return "@".join((base, extractor, *([str(named_file(weights))] if weights else [])))
    except ValueError as error:
        raise ValueError(f"the weights of {short(extractor)}: {error}; put the file there, or name another") from None


def _is_script(values: Mapping[str, Any]) -> bool:
    """Whether the fields of a trial are a script's arguments, which may have any name."""
    trial = values.get("trial")
    return isinstance(trial, Mapping) and "script" in trial


def _kind(key: object, above: str | None) -> str | None:
    return _KINDS.get(str(key).rpartition(".")[2], above)


def _named(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Kind and text of all in a study's mapping that may name code."""

    def look(value: Any, kind: str | None) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping):
            for k, v in value.items():
                yield from look(v, _kind(k, kind))
        elif isinstance(value, list | tuple):
            for v in value:
                yield from look(v, kind)
        elif kind is not None and isinstance(value, str):
            yield kind, value

    for part in () if _is_script(values) else _PARTS:
        yield from look(values.get(part), None)


def code_names(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Kind and name of all that a study's mapping takes from others' code: references and plug-ins, once each."""
    seen: dict[tuple[str, str], None] = {}
    for kind, name in _named(values):
        if kind == _PROTOCOL:
            if is_reference(extractor := parts_of(name)[1]):
                seen["extractor", extractor] = None
        elif is_reference(name) or name in registered(kind):
            seen[kind, name] = None
    yield from seen


def extractor_files(values: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the TorchScript and weights files of a study's extractors, by path; one that is gone has none."""
    found: dict[str, str] = {}
    for kind, name in _named(values):
        for place in parts_of(name)[1:] if kind == _PROTOCOL else ():
            if place and not is_reference(place):
                with suppress(OSError, ValueError):
                    found[place] = file_hash(named_file(place))[:12]
    return found


def packages(values: Mapping[str, Any]) -> dict[str, str]:
    """Prints of the packages that a study's mapping takes code from, by module or `method NAME`.

    Raises:
        UserError: a module is gone.
    """
    found = {}
    for kind, name in code_names(values):
        place = name.rpartition(":")[0]
        point = None if place else registered(kind)[name]
        try:
            if point is not None:
                found[f"{kind} {name}"] = fingerprint(point.module, point.dist)
            elif not place.endswith(".py"):
                found[place] = fingerprint(place)
        except ValueError as error:
            raise UserError(f"{kind} {name}: {error}") from None
    return found
