"""`mebm methods`: what can be trained, and how it is scored."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from study.cli import completion
from study.cli.options import argument, json_option, show
from study.config.errors import UserError, nearest, shown
from study.display import console

if TYPE_CHECKING:
    from trainables.config.method import MethodSpec


@dataclass(frozen=True)
class Methods:
    """The training methods, what each is, where it comes from, and which rows of the paper's tables it fills.

    With a NAME that one alone.
    """

    name: str | None = argument(required=False, metavar="[NAME]", shell_complete=completion.methods)
    as_json: bool = json_option()

    def __call__(self) -> None:
        if self.name is None:
            show(self.as_json, _values, _lines)
            return
        name, methods = self.name, _methods()
        if name not in methods:
            raise UserError(f"no method {shown(name)} (there are {', '.join(methods)}){nearest(name, methods)}")
        show(
            self.as_json,
            lambda: next(m for m in _values()["methods"] if m["name"] == name),
            lambda: _of_method(name, methods[name]),
        )


def _values() -> dict[str, Any]:
    from trainables.config.protocols import PROTOCOLS
    from trainables.methods.presets import build_trial
    from trainables.methods.quoted import QUOTED
    from trainables.plugins.loaded import plugins

    return {
        "methods": [
            {
                "name": name,
                "title": m.title,
                "energy": m.formula or None,
                "sampler": m.sampling or None,
                "loss": m.objective,
                "rows": m.rows,
                "source": m.source,
                "deviations": m.deviations,
                "fields": {c.name: c.meaning for c in m.own_columns()},
                "defaults": build_trial({"method": name, "dataset": "cifar10"}).model_dump(mode="json"),
            }
            for name, m in _methods().items()
        ],
        "plugins": [dataclasses.asdict(p) for p in plugins()],
        "quoted": [{"title": q.title, "rows": q.rows, "reason": q.reason} for q in QUOTED],
        "protocols": [{**dataclasses.asdict(p), "digest": p.digest} for p in PROTOCOLS.values()],
    }


def _lines() -> Iterator[str]:
    from trainables.config.protocols import PROTOCOLS
    from trainables.methods.quoted import QUOTED
    from trainables.plugins.loaded import plugins

    for name, m in _methods().items():
        yield from _of_method(name, m)
    yield "quoted in the tables, not trained here:"
    for q in QUOTED:
        yield from _entry("", f"{q.title} ({q.rows}): {q.reason}", [])
    yield from ("", "evaluation protocols:")
    for p in PROTOCOLS.values():
        yield from _entry(p.name, "", [("is", p.text()), ("source", p.citation), ("hash", p.digest)])

    found = plugins()
    yield from ("", "plug-ins of installed packages:") if found else ()
    for plugin in found:
        package = f"{plugin.package or 'a package'} {plugin.version or ''}".rstrip()
        yield from _entry(
            f"{plugin.kind} {plugin.name}", f"{package} ({plugin.value})", [("error", plugin.error or "")]
        )


def _of_method(name: str, m: type[MethodSpec]) -> Iterator[str]:
    parts = [("energy", m.formula), ("sampler", m.sampling), ("loss", m.objective)]
    parts += [("field", f"{c.name}: {c.meaning}") for c in m.own_columns()]
    parts += [("fills", m.rows), ("source", m.source), *(("differs", text) for text in m.deviations)]
    yield from _entry(name, m.title, parts)


def _methods() -> dict[str, type[MethodSpec]]:
    """The methods that can be trained here: the package's own, and those of installed plug-ins that work."""
    from trainables.config.method import all_methods, method_class
    from trainables.plugins.loaded import loaded, say_broken

    found = all_methods()
    for name, _ in loaded("method"):
        try:
            found[name] = method_class(name)
        except ValueError as error:
            say_broken("method", name, error)
    return found


def _entry(name: str, title: str, parts: list[tuple[str, str]]) -> Iterator[str]:
    """A name and a title, then one indented, wrapped paragraph per labelled part that has a text."""
    yield f"{name:<9} {title}".rstrip()
    for label, text in parts:
        if text:
            yield from textwrap.wrap(
                text, console.width(), initial_indent=f"          {label:<8}", subsequent_indent=" " * 18
            )
