"""YAML that somebody else may have written: of bounded size, depth and expansion, and wrong in one line.

The one place where this project reads and writes YAML. PyYAML's is version 1.1, to which 1e-5 and 0o17 are texts, 017
is 15 and 1:30 is 90. Here the first two are the numbers they look like, as in version 1.2, wherever they stand; the
others, which mean something else in each version, are refused. A key `on` is text, as in 1.2.
"""

from __future__ import annotations

import re
import stat
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from study.config.errors import UserError, shown, yaml_error
from trainables.results.files import read_limited

MAX_BYTES = 4_000_000
"""Of a file; the largest study that starts, with 100,000 seeds, has a quarter of it."""
MAX_NODES = 300_000
"""Keys and values, those that an alias stands for counted every time, a long text as one per 32 characters."""
MAX_DEPTH = 50
LARGEST = 2**63
"""Whole numbers are below it, as in every table."""
_NUMBERS = {"float": r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+", "int": r"[-+]?0o[0-7_]+"}
"""Numbers of YAML 1.2 that 1.1 takes for texts."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml's is ten times as fast
    """YAML's plain types."""


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what `_Loader` would take for something else."""


for _kind, _spelling in _NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_spelling})$"), list("-+.0123456789")
        )


def _whole_number(loader: Any, node: yaml.ScalarNode) -> int:
    if len(node.value) <= 100:  # Python reads no decimal number of thousands of digits, and prints none
        octal = node.value.replace("_", "").partition("0o")  # Python's own reader takes no sign before it
        number = int(octal[0] + octal[2], 8) if octal[1] else int(loader.construct_yaml_int(node))
        if abs(number) < LARGEST:
            return number
    raise yaml.constructor.ConstructorError(
        None, None, f"the number {shown(node.value, quoted=False)} is too large, expected less than 2^63",
        node.start_mark,
    )  # fmt: skip


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_yaml(path: Path, source: str | None = None) -> Any:
    """What a YAML file says; `source` is what to call it in a message.

    Raises:
        UserError: as `read_bytes`, or `parse_yaml` refuses it.
    """
    source = shown(path, 1000, quoted=False) if source is None else source
    return parse_yaml(read_bytes(path, source), source)


def read_bytes(path: Path, source: str | None = None) -> bytes:
    """What is in a YAML file. UserError: it is not there, no regular file, or too large."""
    source = shown(path, 1000, quoted=False) if source is None else source
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{source}: is not a regular file")
        return read_limited(path, MAX_BYTES)
    except (OSError, ValueError) as error:  # a NUL in the path is the latter
        raise UserError(f"{source}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def write_yaml(values: Any) -> str:
    """Values as YAML that `parse_yaml` gives back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(data: bytes | str, source: str) -> Any:
    """What a YAML text (UTF-8, with or without a byte order mark) says: mappings, lists, texts, numbers, dates.

    Raises:
        UserError: not YAML, or too large, too deep, or expanding to too much; a key that is not text, or stands
            twice in a mapping; a number of more than 63 bits; a text with half a surrogate pair.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        text.encode()
    except UnicodeError as error:
        raise UserError(f"{source}: is not UTF-8 text ({shown(error, quoted=False)})") from None
    try:
        _check_size(text, source)
        found = _load(text, source)
    except yaml.YAMLError as error:
        raise yaml_error(source, _placed(text) or error) from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # What its constructors raise at `!!float x`, `2024-99-99`, `!!timestamp x`
        raise UserError(f"{source}: not valid YAML: {shown(error, quoted=False)}") from error
    _check_types(found, source)
    return found


def _placed(text: str) -> yaml.YAMLError | None:
    """The mistake of a short text as PyYAML's own parser finds it: nearer to its cause than libyaml's."""
    try:
        for _ in yaml.parse(text[:2000], Loader=yaml.SafeLoader):
            pass
    except yaml.YAMLError as error:
        return error if len(text) <= 2000 else None
    return None


def _load(text: str, source: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, source, "", set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_nodes(node: yaml.Node, source: str, place: str, seen: set[int]) -> None:
    """Refuse a key that a mapping has twice, of which YAML would take the last without a word, and odd numbers."""
    if isinstance(node, yaml.ScalarNode):
        _refuse_ambiguous(node, source, place)
        return
    if id(node) in seen:
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for number, item in enumerate(node.value):
        if not isinstance(node, yaml.MappingNode):
            _check_nodes(item, source, f"{place}[{number}]", seen)
            continue
        key, inner = item
        name = "?"
        if isinstance(key, yaml.ScalarNode):
            name, line = key.value, key.start_mark.line + 1
            if name == "on":  # `rescue.on`; true in YAML 1.1
                key.tag = "tag:yaml.org,2002:str"
            if name in lines:
                where = f"on line {lines[name]} and on line {line}"
                raise UserError(f"{source}: the key {shown(name)} stands twice in one mapping, {where}")
            lines[name] = line
        else:
            _check_nodes(key, source, place, seen)
        _check_nodes(inner, source, f"{place}.{name}" if place else name, seen)


def _refuse_ambiguous(node: yaml.ScalarNode, source: str, place: str) -> None:
    """Refuse 1:30, which counts in sixties, and 017, which counts in eights or in tens."""
    text = node.value.replace("_", "")
    where = f"{source}: {shown(place, quoted=False)}" if place else source
    if not node.tag.endswith((":int", ":float")):
        return
    if ":" in text:
        remedy = "write the number that is meant, or quotes around a text"
        raise UserError(f"{where}: {shown(node.value, quoted=False)} is a number to the base 60 in YAML 1.1; {remedy}")
    digits = text.lstrip("+-")
    if re.fullmatch("0[0-7]+", digits) and len(digits) <= 100 and int(digits, 8) != int(digits):
        both = f"is {int(digits, 8)} in YAML 1.1 and {int(digits)} in YAML 1.2"
        raise UserError(f"{where}: {shown(node.value, quoted=False)} {both}; write the number that is meant")


def _check_size(text: str, source: str) -> None:
    """Count nodes by events, which need no recursion, and nest nothing."""
    nodes: list[int] = [0]  # of every open collection
    names: list[str | None] = []
    sizes: dict[str, int] = {}
    for event in yaml.parse(text, Loader=_Loader):
        place = f"{source}: line {event.start_mark.line + 1}"  # type: ignore[union-attr]
        if isinstance(event, yaml.events.CollectionStartEvent):
            nodes.append(1)
            names.append(event.anchor)
            if len(names) > MAX_DEPTH:
                raise UserError(f"{place}: nested deeper than {MAX_DEPTH} levels")
            continue
        if isinstance(event, yaml.events.CollectionEndEvent):
            size, name = nodes.pop(), names.pop()
        elif isinstance(event, yaml.events.ScalarEvent):
            size, name = 1 + len(event.value) // 32, event.anchor
        elif isinstance(event, yaml.events.AliasEvent):
            size, name = sizes.get(str(event.anchor), 0), None
            if event.anchor in names:
                name = shown(event.anchor, quoted=False)
                raise UserError(f"{place}: the alias *{name} is part of what it stands for")
        else:
            continue
        if name is not None:
            sizes[name] = size
        nodes[-1] += size
        if nodes[-1] > MAX_NODES:
            raise UserError(f"{place}: holds more than {MAX_NODES:,} values, those of aliases counted every time")


def _check_types(found: Any, source: str) -> None:
    """Keys are texts, texts can be written in UTF-8, and the rest is plain. What was counted is not deep."""
    if isinstance(found, str):
        try:
            found.encode()
        except UnicodeError:
            raise UserError(f"{source}: the text {shown(found)} holds half of a surrogate pair") from None
    elif isinstance(found, dict):
        for key, value in found.items():
            if not isinstance(key, str):
                raise UserError(f"{source}: the key {shown(key)} must be a text, but is {type(key).__name__}")
            _check_types(key, source)
            _check_types(value, source)
    elif isinstance(found, list):
        for value in found:
            _check_types(value, source)
    elif not isinstance(found, int | float | date | None):
        raise UserError(f"{source}: {shown(found)} is {type(found).__name__}, which no key takes")
