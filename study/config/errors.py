"""Mistakes of a user, said in one line, and how pydantic's and YAML's findings become such a line."""

from __future__ import annotations

import re
import reprlib
import typing
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from trainables.results.credentials import redacted
from trainables.results.spelling import nearest as nearest

MAX_LENGTH = 3000
"""Characters of a message: a value in it is cut before (`shown`), a list of all that is allowed is not."""


OTHER_WORDS = {"gpu": "cuda", "half": "bf16", "float32": "fp32", "float": "fp32", "bfloat16": "bf16"}
"""What users of other tools call values of fields."""


class _OneLineError(Exception):
    """An error whose message a terminal can show: printable characters, of bounded length."""

    def __init__(self, message: object) -> None:
        text = printable(redacted(str(message)))
        super().__init__(text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 3]}...")


class UserError(_OneLineError):
    """Something the user can mend. The message is one line: file, key, value, what is allowed, the nearest match."""


class RunError(_OneLineError):
    """A study that could not go on for a reason that is not the user's. One line; exit code 1."""


def printable(text: str) -> str:
    """A text with every character that steers a terminal, breaks a line or cannot be encoded as its escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: object, most: int = 60, *, quoted: bool = True) -> str:
    """A value as a message shows it: one line of at most so many characters, without a password, soon made.

    `quoted`: as Python writes it, texts in quotes; else as it reads.
    """
    try:
        text = _brief.repr(value) if quoted else str(value)[: 4 * most]
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        text = f"<{type(value).__name__}>"
    text = printable(one_line(text))
    text = re.sub(r":/{1,2}(?=.*[:@?#]).*", "://...", text)  # what was cut off may tell what of it is a password
    return text if len(text) <= most else f"{text[: most - 3]}..."


class _Brief(reprlib.Repr):
    """Python's way to write a value, with only the beginning of long ones."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = 40
        self.maxlong = self.maxother = 200

    def repr_str(self, x: str, level: int) -> str:  # noqa: ARG002
        return repr(x) if len(x) <= 200 else f"{repr(x[:200])[:-1]}..."

    def repr_dict(self, x: Mapping[Any, Any], level: int) -> str:  # in its own order
        if level <= 0:
            return "{...}"
        pairs = (f"{self.repr1(k, level - 1)}: {self.repr1(x[k], level - 1)}" for k in islice(x, 40))
        return f"{{{', '.join(pairs)}}}"


_brief = _Brief()


def one_line(text: object) -> str:
    """A text without line breaks, and without secrets."""
    return redacted(" ".join(str(text).split()))


def yaml_error(source: str, error: yaml.YAMLError) -> UserError:
    """A YAML syntax error as one line with its place."""
    mark = getattr(error, "problem_mark", None)
    place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return UserError(f"{source}:{place} not valid YAML: {one_line(getattr(error, 'problem', None) or error)}")


def validation_error(source: str, error: ValidationError, model: type[BaseModel], prefix: str = "") -> UserError:
    """The first finding of pydantic as one line, with how many more there are.

    Args:
        source: file (or option) the values came from.
        model: what was validated, at the dotted path `prefix` of the file; gives the known keys for a nearest match.
    """
    findings = error.errors()
    first = findings[0]
    path = [str(part) for part in first["loc"] if not _is_union_tag(part)]
    key = ".".join([prefix, *path] if prefix else path)
    places = {tuple(part for part in found["loc"] if not _is_union_tag(part)) for found in findings}
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = getattr(_model_at(model, path[:-1]), "model_fields", {})
        return UserError(f"{source}: {key}: unknown key{nearest(path[-1], known)}{more}")
    if first["type"] == "missing":
        return UserError(f"{source}: {key}: is missing{more}")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[:1].lower() + message[1:]
    value = first.get("input")
    if first["type"] in ("tuple_type", "list_type") and isinstance(value, str | int | float):
        example = "[0, 1, 2]" if key == "seeds" else f"[{shown(value, quoted=False)}]"
        message = f"must be a list, such as {example}"
    if first["type"] in ("model_type", "model_attributes_type") and path:
        fields = getattr(_model_at(model, path), "model_fields", {})
        message = f"must be a mapping of {', '.join(fields)}" if fields else message
    # Where a storage's address is expected stands what may be half of one, password and all.
    telling = path and path[-1] != "storage" and not isinstance(value, Mapping)
    found = f" = {shown(value)}" if telling else ""
    near = ""
    if first["type"] == "literal_error" and isinstance(value, str):
        near = nearest(value, first["msg"].split("'")[1::2], OTHER_WORDS)
    where = f"{key}{found}: " if key else ""
    return UserError(one_line(f"{source}: {where}{message}{near}{more}"))


def _model_at(model: Any, path: Sequence[str]) -> Any:
    """The model at a dotted path below another one: of a field, of a list's items or a mapping's values; or None."""
    current: Any = model
    for part in path:
        fields = getattr(current, "model_fields", {})
        if part in fields:
            current = fields[part].annotation
        if not hasattr(current, "model_fields"):
            inner = [a for a in _within(current) if hasattr(a, "model_fields")]
            current = inner[0] if inner else None
    return current


def _within(annotation: Any) -> list[Any]:
    return [annotation, *(a for part in typing.get_args(annotation) for a in _within(part))]


def _is_union_tag(part: object) -> bool:
    """Pydantic puts the name of a union's branch into the path; a user never wrote it."""
    tags = ("bool", "int", "float", "str", "none", "none_required")
    return isinstance(part, str) and ("[" in part or part.startswith("constrained-") or part in tags)


def parse_choices(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """A comma-separated list of known words. UserError: another word."""
    words = tuple(dict.fromkeys(w.strip() for w in text.split(",") if w.strip()))
    for word in words:
        if word not in known:
            what = f"{option} {shown(word, quoted=False)}"
            raise UserError(f"{what}: must be of {', '.join(known)}{nearest(word, known)}")
    if not words:
        raise UserError(f"{option} {text!r}: names nothing; known: {', '.join(known)}")
    return words
