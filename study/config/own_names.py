"""Other names of a trial's fields: the paper's symbols, and a method's own fields without `method_args.`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from study.config.errors import UserError
from trainables.config.method import method_class
from trainables.config.trial import TrialConfig
from trainables.results.own import PAPER


def methods_of(values: Mapping[str, Any]) -> Iterator[str]:
    """Names of the methods that a study's raw mapping has, fixed or searched."""

    def given(part: Any) -> Iterator[Any]:
        if isinstance(part, Mapping) and "method" in part:
            found = part["method"]
            found = found.get("choices") if isinstance(found, Mapping) else found
            yield from found if isinstance(found, list | tuple) else [found]

    search = values.get("search")
    search = search if isinstance(search, Mapping) else {}
    blocks = search.get("grid")
    for part in (values.get("trial"), search.get("space"), *(blocks if isinstance(blocks, list | tuple) else ())):
        yield from (name for name in given(part) if isinstance(name, str))


def own_names(*methods: str) -> frozenset[str]:
    """Bare names that stand for fields of these methods'; of one that cannot be had, none: its own check says why."""
    found: set[str] = set()
    for name in methods:
        try:
            found |= method_class(name).model_fields.keys()
        except (ValueError, TypeError):
            continue
    return frozenset(found - TrialConfig.model_fields.keys())


def with_whole_names(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A study's raw mapping in which every field of a trial has its whole, dotted name.

    Raises:
        UserError: a field stands there under two names.
    """
    whole = PAPER | {name: f"method_args.{name}" for name in own_names(*methods_of(values))}
    found = dict(values)
    trial = _renamed(values.get("trial"), whole, "trial", source)
    if isinstance(trial, dict):
        own = {name: trial.pop(name) for name in list(trial) if name in whole.values() and "." in name}
        args = trial.get("method_args") or {}
        if own and not isinstance(args, dict):
            return values  # whose own check says what is wrong
        given = {name.removeprefix("method_args."): value for name, value in own.items()}
        for name in sorted(given.keys() & args.keys()):
            _refuse_twice("trial", name, f"method_args.{name}", source)
        found["trial"] = trial | ({"method_args": {**args, **given}} if given else {})
    if isinstance(search := values.get("search"), dict):
        renamed = {"space": _renamed(search.get("space"), whole, "search.space", source)}
        for name in ("start", "grid"):
            parts = search.get(name)
            if isinstance(parts, list | tuple):
                renamed[name] = [_renamed(p, whole, f"search.{name}[{i}]", source) for i, p in enumerate(parts)]
        found["search"] = {n: renamed.get(n, v) for n, v in search.items()}
    return found


def _renamed(part: Any, whole: Mapping[str, str], place: str, source: str) -> Any:
    if not isinstance(part, dict):
        return part
    renamed: dict[Any, Any] = {}
    for name, value in part.items():
        found = whole.get(name, name) if isinstance(name, str) else name
        if found in renamed or (found != name and found in part):
            _refuse_twice(place, name, found, source)
        renamed[found] = value
    return renamed


def _refuse_twice(place: str, name: str, other: str, source: str) -> None:
    raise UserError(f"{source}: {place}.{name}: stands there as {other} too; remove one")
