"""Commands: a frozen dataclass each. Its fields are the options, its docstring the help text, and calling it runs it.

@dataclass(frozen=True)
class Serve:
    \"""Show the report of a study while it runs.\"""

    folder: Path | str = argument(type=PLACE, metavar="DIR")
    port: int = option("Port on 127.0.0.1.", default=8642)

    def __call__(self) -> None:
        ...
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click

from study.cli import completion
from study.config.errors import UserError
from study.display import console
from trainables.plugins.reference import trust_code


def option(text: str, *names: str, **attributes: Any) -> Any:
    """An option with its help text, as a field of a command, named so unless there are names; see `click.Option`."""

    def make(field: str) -> click.Option:
        return click.Option([field, *(names or (f"--{field.replace('_', '-')}",))], help=text, **attributes)

    return dataclasses.field(metadata={"make": make})


def argument(**attributes: Any) -> Any:
    """A positional argument, as a field of a command; arguments are those of `click.Argument`."""
    return dataclasses.field(metadata={"make": lambda field: click.Argument([field], **attributes)})


def command(cls: type[Any]) -> click.Command:
    """The click command of such a dataclass, of the class `click_class` where it names one."""
    parameters = [field.metadata["make"](field.name) for field in dataclasses.fields(cls)]

    def run(**parsed: Any) -> None:
        cls(**parsed)()

    kind: type[click.Command] = getattr(cls, "click_class", click.Command)
    return kind(cls.__name__.lower(), callback=run, params=parameters, help=cls.__doc__)


def show(as_json: bool, value: Callable[[], Any], lines: Callable[[], Iterable[object]]) -> None:
    """Print an answer: one JSON object, or lines of text; only the one that is wanted is made."""
    if as_json:
        click.echo(json.dumps(value(), indent=2))
        return
    for line in lines():
        console.say(line)


class Place(click.ParamType["Path | str"]):
    """A path, or a URL as text. One with a password or a key is refused: a command line is seen by everybody."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """A `Path`, or a URL as `str`."""
        if isinstance(value, Path) or "://" not in value:
            if (scheme := re.match(r"(s3|gs|gcs|hdfs|abfss?):/*", str(value))) is not None and "://" not in str(value):
                rest = str(value)[scheme.end() :]
                self.fail(f"{value!r} is not a URL; did you mean {scheme[1]}://{rest}?", param, ctx)
            return Path(value)
        from trainables.results.store import refuse_credentials

        return refuse_credentials(value)

    shell_complete = staticmethod(completion.folders)  # type: ignore[assignment]


class Local(click.ParamType["Path"]):
    """A path on this machine, where a command writes; a URL is refused, of which a folder `s3:` would be made."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """A `Path`."""
        if "://" in str(value):
            self.fail("a path on this machine is needed, not a URL; copy the result there afterwards", param, ctx)
        return Path(value)


class Field(click.ParamType["str"]):
    """The name of a field, also as the paper's symbol for it: K gives `sampling_steps`."""

    name = "field"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The field's own name; whether there is such a field depends on the study."""
        from trainables.results.own import field_of

        return field_of(str(value).strip().removeprefix("trial."))

    shell_complete = staticmethod(completion.fields)  # type: ignore[assignment]


FIELD, PLACE, LOCAL, PATH = Field(), Place(), Local(), click.Path(path_type=Path)
COUNT, POSITIVE = click.IntRange(min=1), click.FloatRange(min=0, min_open=True)

# Options of several commands. What differs between them is given as for `option`.
studies = partial(argument, nargs=-1, required=True, type=PLACE, metavar="DIR...")
flag = partial(option, is_flag=True)
set_option = partial(
    option,
    "Change a field of the config; dotted keys, VALUE is YAML; may be given again.",
    "--set",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=completion.assignments,
)
config_argument = partial(argument, metavar="CONFIG", shell_complete=completion.configs)
address_option = partial(
    option, "Ray cluster to use ('auto': the one on this machine). Default: own.", "--address", metavar="ADDR"
)


def trust_option() -> Any:
    """The option --trust-code; it is heeded by being given."""

    def heed(_ctx: click.Context, _param: click.Parameter, value: bool) -> bool:
        trust_code(value)
        return value

    text = "Run the study's own code, which this machine has not run before. Read it first."
    return flag(text, "--trust-code", callback=heed, default=False)


def json_option(text: str = "One JSON object instead of text.") -> Any:
    """The option --json."""
    return flag(text, "--json")


def device_option(text: str) -> Any:
    """The option --device."""
    return option(text, "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")


def out_option(text: str, **attributes: Any) -> Any:
    """The option --out."""
    return option(text, "--out", type=LOCAL, **attributes)


def names(text: str | None, flag: str, what: str) -> tuple[str, ...]:
    """A comma-separated list of names; empty where the option was not given. UserError: it was, and names nothing."""
    found = tuple(word.strip() for word in (text or "").split(",") if word.strip())
    if text is not None and not found:
        raise UserError(f"{flag} {text!r}: names no {what}")
    return found


def beside(folders: tuple[Path | str, ...], name: str) -> Path:
    """Where an output goes by default: into the one folder it is of, else into the working directory."""
    return folders[0] / name if len(folders) == 1 and isinstance(folders[0], Path) else Path(name)
