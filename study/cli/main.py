"""The command `mebm`: its commands, and what becomes of their errors. For exit codes see `study.cli.exit_codes`."""

from __future__ import annotations

import atexit
import errno
import importlib
import os
import pkgutil
import re
import signal
import sys
from itertools import pairwise
from typing import Any

import click

from study.cli import commands
from study.cli.exit_codes import FAILED, INTERRUPTED, MISTAKE
from study.cli.options import command
from study.config.errors import RunError, UserError, nearest, one_line, shown
from study.display import console, output
from study.display.activity import show_activity
from trainables.results.progress import note
from trainables.results.spelling import edits, likeliest

ORDER = (
    "sweep", "resume", "scale", "plan", "train", "methods", "configs", "show", "init", "fields", "tables", "report",
    "compare", "detector", "replay", "status", "figures", "evaluate", "score", "diagnose", "sample", "bench",
    "recommend", "import", "new", "serve",
)  # fmt: skip
"""Commands in the order of their use; those not named here come after them."""
ANSWERS = ("status", "plan", "methods", "configs", "show", "fields", "compare", "detector", "replay", "recommend")
"""Commands that do nothing but show something: without a reader they end, and where it cannot be written they fail."""
OTHER_NAMES = {
    "run": "sweep", "start": "sweep", "search": "sweep", "fit": "train", "continue": "resume", "restart": "resume",
    "list": "configs", "studies": "configs", "estimate": "plan", "cost": "plan", "best": "recommend", "plot": "figures",
    "export": "figures", "score": "evaluate", "test": "evaluate", "generate": "sample", "watch": "status",
    "html": "report", "benchmark": "bench", "create": "init", "options": "fields", "print": "show",
}  # fmt: skip
"""What other tools call commands that are here."""
_SHOW = frozenset({"-h", "--help", "-n", "--dry-run", "--list"})
"""Options that make any command one of these."""

COMPLETE = "_MEBM_COMPLETE"
"""Environment variable of a shell that completes a command line (click's own name for it)."""
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}


class _Commands(click.Group):
    """Every module of `study.cli.commands` is a command, imported when it is asked for.

    The nearest name is said for a misspelt one.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        found = [module.name for module in pkgutil.iter_modules(commands.__path__)]
        return sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{commands.__name__}.{cmd_name}")
        return command(getattr(module, cmd_name.capitalize()))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The first sentence of every command, wrapped and never cut."""
        rows = [(name, _first_sentence(self.get_command(ctx, name))) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            known = self.list_commands(ctx)
            near = nearest(args[0], known, OTHER_NAMES) or "; mebm --help lists them"
            raise click.UsageError(f"no command {args[0]!r}{near}")
        name, found, rest = super().resolve_command(ctx, args)
        if name not in ANSWERS and _SHOW.isdisjoint(rest):
            output.go_on()
        return name, found, rest


def _first_sentence(command: click.Command | None) -> str:
    text = " ".join((command.help or "" if command is not None else "").partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", text)[0]


@click.group(cls=_Commands, context_settings=SETTINGS)
@click.version_option(package_name="mebm-study", prog_name="mebm")
def cli() -> None:
    """Hyperparameter and stability studies of energy-based models.

    \b
    mebm sweep quickstart        a first study on this machine
    mebm report results/NAME     what it found, as one HTML file
    """


def main(command: click.Command = cli) -> None:
    """Run `mebm`, or another command in the same way: every mistake becomes one line and exit code 2."""
    if COMPLETE in os.environ:  # a shell asks, and is answered in bytes
        command.main(prog_name="mebm", complete_var=COMPLETE)
    output.steady_streams()
    show_activity()
    try:
        code = _exit_code(command)
    finally:
        note("ending")
        lost = output.end_streams()
    if lost is not None:
        console.error(f"standard output: {lost.strerror}; not all of it was shown")
        if "--json" in sys.argv:  # somebody waits for that
            code = code or MISTAKE
    if code:
        sys.exit(code)


def _exit_code(command: click.Command) -> int | str | None:
    """Run a command line; what to exit with."""
    try:
        command.main(standalone_mode=False)
    except SystemExit as stop:
        return stop.code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        output.go_on()
        click.echo(error.ctx.get_help() if error.ctx else "")
        return MISTAKE
    except (click.Abort, KeyboardInterrupt):
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # it ends; another one would only cut that short
        console.error("interrupted")
        return INTERRUPTED
    except Exception as error:
        text = _line(error)
        if text is None:
            raise
        console.error(one_line(text))
        return FAILED if isinstance(error, RunError) else MISTAKE
    return None


def _of_click(error: click.ClickException) -> str:
    """What click says of a command line, with what was likely meant."""
    text = error.format_message()
    parameters = error.ctx.command.params if isinstance(error, click.UsageError) and error.ctx is not None else []
    sets = any("--set" in parameter.opts for parameter in parameters)
    if isinstance(error, click.NoSuchOption):
        name = error.option_name
        options = [o for p in parameters if isinstance(p, click.Option) and not p.hidden for o in p.opts]
        near = likeliest(name, [*options, "--help"])
        slip = near is not None and edits(name, near) < 2
        if sets and not slip and (field := _field(name.lstrip("-").replace("-", "_"))) is not None:
            return f"no option {name}; it is a field: --set {field}=VALUE"
        return f"no option {name}" + (f"; did you mean {near}?" if near is not None else "")
    if isinstance(error, click.BadParameter) and error.param is not None and isinstance(error.param.type, click.Choice):
        given = text.partition(": '")[2].partition("'")[0]
        return text.rstrip(".") + nearest(given, map(str, error.param.type.choices))
    if sets and text.startswith("Got unexpected extra argument"):
        words = sys.argv[1:]
        for option, word in pairwise(words):
            if option == "--set" and "=" not in word:
                return f"--set {shown(word, quoted=False)}: must be KEY=VALUE, for example --set epochs=5"
    return text


def _field(name: str) -> str | None:
    """The field of a study or of its trial that is called so."""
    from study.config.fields import known_fields
    from study.config.paths import meant, study_paths
    from trainables.results.own import SYMBOLS

    exact = name in (*known_fields(), *SYMBOLS) or any(name == path.rpartition(".")[2] for path in study_paths())
    return meant(name, {}) if exact else None


def _line(error: Exception) -> str | None:
    """What a user is told of an error; None for one that is the program's mistake rather than the user's."""
    if isinstance(error, click.ClickException):
        return _of_click(error)
    if isinstance(error, UserError | RunError):
        return str(error)
    if isinstance(error, ValueError):
        from analysis.results.messages import ResultsError
        from trainables.data.readers.items import DataError

        return str(error) if isinstance(error, ResultsError | DataError) else None
    if not isinstance(error, OSError):
        return None
    from trainables.results.store import StoreError

    if isinstance(error, StoreError) or error.errno is None:
        return str(error) if isinstance(error, StoreError) else None
    place = "" if error.filename is None else f"{shown(str(error.filename), 200, quoted=False)}: "
    more = "; this process may open too few: ulimit -n 4096" if error.errno == errno.EMFILE else ""
    if str(error.filename).startswith(os.environ.get("MEBM_CACHE") or "\0"):
        more = "; MEBM_CACHE names another folder"
    return f"{place}{error.strerror}{more}"
