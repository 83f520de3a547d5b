"""`mebm fields`: what can be set in a study, what each field means, and its defaults."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from study.cli.options import FIELD, argument, json_option, show
from study.config.errors import UserError, nearest, shown
from study.display import console

if TYPE_CHECKING:
    from study.config.describe import FieldText


@dataclass(frozen=True)
class Fields:
    """Every field of a study and its trials with its default, or all about the field NAME.

    \b
    Examples:
      mebm fields                  a line each
      mebm fields K                meaning, range, defaults by method and data set
      mebm fields divergence       the fields below divergence
      mebm fields langevin         the fields whose meaning speaks of it
    """

    name: str | None = argument(required=False, type=FIELD)
    as_json: bool = json_option()

    def __call__(self) -> None:
        from study.config.describe import study_fields, trial_fields

        found = trial_fields() + study_fields()
        if self.name is not None:
            found = _named(self.name, found)
        one = found[0] if len(found) == 1 and self.name is not None else None
        show(self.as_json, lambda: _values(found, one), lambda: _all_about(one) if one else _list(found))


def _named(name: str, fields: list[FieldText]) -> list[FieldText]:
    """The fields that a name means: a dotted name, its last part, or what is before a dot; else what speaks of it."""
    from trainables.results.own import SYMBOLS

    wanted = name
    found = (
        [f for f in fields if f.name == wanted]
        or [f for f in fields if f.name.startswith(f"{wanted}.")]
        or [f for f in fields if f.name.rpartition(".")[2] == wanted]
    )
    if not found:
        near = nearest(wanted, [f.name for f in fields], SYMBOLS)
        spoken = re.compile(rf"\b{re.escape(wanted)}", re.IGNORECASE)
        if not near and (found := [f for f in fields if spoken.search(f.meaning)]):
            return found
        raise UserError(f"no field {shown(name)}; mebm fields lists them{near}")
    return found


def _differing(field: FieldText) -> dict[str, dict[str, Any]]:
    from study.config.describe import by_method
    from trainables.config.dataset import datasets
    from trainables.config.method import METHODS

    return by_method(field.name, field.methods or tuple(METHODS), tuple(datasets())) if field.trial else {}


def _values(fields: list[FieldText], one: FieldText | None) -> list[dict[str, Any]]:
    return [
        {
            "name": f.name,
            "symbol": f.symbol or None,
            "meaning": f.meaning,
            "values": f.values,
            "default": f.default_text,
            "methods": list(f.methods) or None,
            **({"defaults": _differing(f)} if f is one else {}),
        }
        for f in fields
    ]


def _list(fields: list[FieldText]) -> Iterator[str]:
    from trainables.results.own import field_of

    wide, middle = max(len(f.name) for f in fields), max(len(f.default_text) for f in fields)
    for f in fields:
        named = field_of(f.meaning.split(" ")[0].rstrip(":")) == f.name
        sign = f"{f.symbol}: " if f.symbol and not named else ""
        brief = re.split(r"[.;] ", re.sub(r" \([^()]*\)", "", f.meaning))[0].rstrip(".")
        meaning = textwrap.shorten(sign + brief, max(30, console.width() - 2 - wide - middle), placeholder=" ...")
        yield f"{f.name:<{wide}}  {f.default_text:<{middle}}  {meaning}"


def _all_about(field: FieldText) -> Iterator[str]:
    from study.config.describe import as_yaml

    yield f"{field.name}{f'  ({field.symbol})' if field.symbol else ''}"
    where = "a trial: --set, under trial, or searched under search.space" if field.trial else "the study: --set"
    if field.methods:
        where = f"{where}; of {', '.join(field.methods)} alone"
    parts = [("is", field.meaning), ("takes", field.values), ("default", field.default_text), ("of", where)]
    for label, text in parts:
        yield from textwrap.wrap(text, console.width(), initial_indent=f"  {label:<9}", subsequent_indent=" " * 11)
    groups: dict[str, list[str]] = {}
    for method, by_data in _differing(field).items():
        groups.setdefault(_in_words({d: as_yaml(v) for d, v in by_data.items()}), []).append(method)
    if len(groups) > 1 or (groups and next(iter(groups)) != field.default_text):
        for text, methods in groups.items():
            whole = f"{', '.join(methods)}: {text}"
            yield from textwrap.wrap(whole, console.width(), initial_indent="  for      ", subsequent_indent=" " * 11)


def _in_words(by_data: Mapping[str, str]) -> str:
    """`5 (digits), else 2`: the commonest value last."""
    kinds = list(dict.fromkeys(by_data.values()))
    usual = max(kinds, key=list(by_data.values()).count)
    others = [f"{v} ({', '.join(d for d, w in by_data.items() if w == v)})" for v in kinds if v != usual]
    return f"{', '.join(others)}, else {usual}" if others else usual
