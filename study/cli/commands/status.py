"""`mebm status`: how a study stands, once or again and again."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from study.cli.options import PLACE, argument, json_option, option, trust_option
from study.display import console
from study.display.activity import held
from study.display.status import BAD

if TYPE_CHECKING:
    from study.cli.study_view import StudyView

EVERY_SECONDS = 5.0
_QUIET_SECONDS = 60.0
"""Where there is no screen, reports of epochs alone are worth a line no more often than this."""


class _Optional(click.Command):
    """Lets the value of --watch be left out before DIR too: click would take DIR for it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for i, word in enumerate(args[:-1]):
            if word == "--watch":
                try:
                    float(args[i + 1])
                except ValueError:
                    args = [*args[:i], f"--watch={EVERY_SECONDS:g}", *args[i + 1 :]]
        return super().parse_args(ctx, args)


@dataclass(frozen=True)
class Status:
    """How the study in DIR stands, from its files alone: whether it runs, and every trial.

    \b
    Examples:
      mebm status results/NAME
      mebm status results/NAME --watch
      mebm status results/NAME --json

    It writes nothing and works on any machine that sees DIR. Ctrl-C ends the watching, not the study.
    """

    click_class: ClassVar[type[click.Command]] = _Optional
    folder: Path | str = argument(type=PLACE, metavar="DIR")
    trust_code: bool = trust_option()
    as_json: bool = json_option("One JSON object instead of text; with --watch one per change.")
    watch: float | None = option(
        "Look again every so many seconds, 5 unless given, until the study is over or Ctrl-C.",
        type=click.FloatRange(min=0.1),
        is_flag=False,
        flag_value=EVERY_SECONDS,
        default=None,
        metavar="[SECONDS]",
    )

    def __call__(self) -> None:
        from study.cli.study_view import StudyView
        from study.remote.copies import local_copy

        if self.watch is not None and not math.isfinite(self.watch):
            raise click.BadParameter("must be a number of seconds", param_hint="--watch")
        view = StudyView(local_copy(self.folder), url=self.folder if isinstance(self.folder, str) else None)
        out = console.StudyConsole()
        if self.watch is not None and out.rich.is_terminal and not self.as_json:
            _watch_screen(view, self.watch, out)
        elif self.watch is not None:
            with held():
                _watch_lines(view, self.watch, self.as_json, out)
        elif self.as_json:
            click.echo(json.dumps(view.to_dict(), indent=2))
        else:
            out.trials(view.progress)
            out.line(view.line())
            if hours := view.progress.hours().text():
                out.line(hours)


def _watch_screen(view: StudyView, seconds: float, out: console.StudyConsole) -> None:
    out.note = view.state()
    out.start(view.progress)
    try:
        while not view.over:
            time.sleep(seconds)
            out.rich.file.flush()  # ends the watching where nobody is there any more
            for trial in view.refresh():
                if trial["outcome"] in BAD:
                    out.ended(trial)
            out.note = view.state()
    finally:
        out.stop(goes_on=True)
        out.line(f"{view.progress.name}: {view.state()}")


def _watch_lines(view: StudyView, seconds: float, as_json: bool, out: console.StudyConsole) -> None:
    shown: tuple[Any, ...] = ()
    shown_at, events = 0.0, -1
    while True:
        now = time.monotonic()
        fresh = view.reader.events != events and now - shown_at >= _QUIET_SECONDS
        if fresh or view.standing() != shown:
            shown, shown_at, events = view.standing(), now, view.reader.events
            if as_json:
                click.echo(json.dumps(view.to_dict()))
            else:
                out.line(f"{view.progress.name}: {view.progress.overview()}; {view.state()}")
        if view.over:
            return
        time.sleep(seconds)
        out.rich.file.flush()  # as above
        view.refresh()
