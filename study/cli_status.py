"""The command `mebm status`: how a study stands, from the files of its folder alone, once or again and again."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from study import console
from study.places import PLACE, local_copy
from study.progress import BAD
from trainables.hours import Hours

if TYPE_CHECKING:
    from study.journal_reader import JournalReader

EVERY_SECONDS = 5.0
_LIFE_SECONDS = 180.0
"""A driver writes to its journal at least once a minute; after three without a word nobody can say that it runs."""
_QUIET_SECONDS = 60.0
"""Where there is no screen, reports of epochs alone are worth a line no more often than this."""


class _Optional(click.Command):
    """Lets the value of --watch be left out before DIR too: click would take DIR for it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for i, argument in enumerate(args[:-1]):
            if argument == "--watch" and not _is_number(args[i + 1]):
                args = [*args[:i], f"--watch={EVERY_SECONDS:g}", *args[i + 1 :]]
        return super().parse_args(ctx, args)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@click.command(cls=_Optional)
@click.argument("folder", type=PLACE, metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text; with --watch one per change.")
@click.option(
    "--watch",
    type=click.FloatRange(min=0.1),
    is_flag=False,
    flag_value=EVERY_SECONDS,
    default=None,
    metavar="[SECONDS]",
    help="Look again every so many seconds, 5 unless given, until the study is over or Ctrl-C.",
)
def status(folder: Path | str, as_json: bool, watch: float | None) -> None:
    """How the study in DIR stands, from its files alone: whether it runs, and every trial.

    \b
    Examples:
      mebm status results/NAME
      mebm status results/NAME --watch
      mebm status results/NAME --json
    It writes nothing and works on any machine that sees DIR. Ctrl-C ends the watching, not the study.
    """
    if watch is not None and not math.isfinite(watch):
        raise click.BadParameter("must be a number of seconds", param_hint="--watch")
    view = View(local_copy(folder), url=folder if isinstance(folder, str) else None)
    if watch is not None:
        _watch(view, watch, as_json)
    elif as_json:
        click.echo(json.dumps(view.to_dict(), indent=2))
    else:
        out = console.StudyConsole()
        out.trials(view.progress)
        out.line(view.line())
        if hours := Hours.of(view.progress.trials.values()).text():
            out.line(hours)


def _watch(view: View, seconds: float, as_json: bool) -> None:
    out = console.StudyConsole()
    if out.rich.is_terminal and not as_json:
        _watch_screen(view, seconds, out)
    else:
        _watch_lines(view, seconds, as_json, out)


def _watch_screen(view: View, seconds: float, out: console.StudyConsole) -> None:
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


def _watch_lines(view: View, seconds: float, as_json: bool, out: console.StudyConsole) -> None:
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


class View:
    """A study as its files show it.

    Args:
        folder: the study's folder, or a copy of it.
        url: where it is a copy of, in object storage; None for the folder itself.

    Attributes:
        progress: its trials.
        reader: its journal.
        running: whether a driver is at work on it; None where that cannot be seen from here.

    Raises:
        UserError: not a study folder, or its journal is damaged.
    """

    def __init__(self, folder: Path, url: str | None = None) -> None:
        from study.agreement import doubts
        from study.folder import load_folder
        from study.journal_reader import JournalReader

        self.folder, self.url = folder, url
        self._signature: tuple[int, int] | None = None
        self._settle()
        self.reader: JournalReader = JournalReader(folder, self.progress.name)
        self.running: bool | None = None
        self._doubts = doubts(folder, load_folder(folder), self.reader)
        if self._doubts:  # a study at work may have written both meanwhile
            self.reader.read_on()
            self._doubts = doubts(folder, load_folder(folder), self.reader)
        self._trouble = ""
        self._grown_at: float | None = None
        self._update()

    @property
    def place(self) -> str:
        """Where the study is, as a user names it."""
        if self.url is None:
            return str(self.folder)
        from trainables.credentials import shown

        return shown(self.url)

    def refresh(self) -> list[Mapping[str, Any]]:
        """Read what is new; returns the trials that ended meanwhile.

        A file that is out of reach for a moment (a network file system, a study that is being moved) is no end: what
        was known stays on the screen.

        Raises:
            UserError: the journal is damaged, and not only half-written.
        """
        from study.errors import UserError

        self._trouble = ""
        if self.url is not None:
            from study.mirror import refresh_copy

            with contextlib.suppress(OSError, UserError):  # the store is away; what is known stays on the screen
                refresh_copy(self.url, self.folder)
        with contextlib.suppress(OSError, UserError):  # half-written or gone for now; what it said before holds
            self._settle()
        before = self.reader.events
        try:
            ended = self.reader.read_on()
        except OSError as error:
            self._trouble, ended = f"the journal cannot be read now: {error.strerror}", []
        if self.reader.events != before:
            self._grown_at = time.monotonic()
        self._update()
        return [self.progress.trials[t] for t in ended if t in self.progress.trials]

    def _settle(self) -> None:
        """What the study is to be; read again where its file was changed."""
        from study.folder import STUDY_FILE, load_folder
        from study.space import build_space

        path = self.folder / STUDY_FILE
        found = path.stat() if path.is_file() else None
        signature = (found.st_mtime_ns, found.st_size) if found else None
        if self._signature is not None and signature in (self._signature, None):
            return  # as it was, or away for a moment
        study = load_folder(self.folder)
        objective = study.objectives[0]
        progress = console.Progress(
            study.name,
            build_space(study).settings * len(study.seeds),
            study.varied,
            objective.metric,
            len(study.seeds),
            direction=objective.resolved_direction,
        )
        if self._signature is None:
            self.progress = progress
        else:
            self.progress.planned, self.progress.seeds = progress.planned, progress.seeds
        self._signature = signature

    def _update(self) -> None:
        from trainables.schema import Outcome

        self.running = self._is_running()
        trials = {t: dict(v) for t, v in self.reader.trials.items()}
        if self.running is False:
            for trial in trials.values():
                if trial["outcome"] == Outcome.RUNNING:
                    trial["outcome"] = Outcome.INTERRUPTED.value  # its driver is gone
        p, now = self.progress, time.monotonic()
        p.trials, p.gaps = trials, self.reader.gaps
        p.done_before, p.at_once = self.reader.done_before, self.reader.at_once
        lived = max(0.0, self.reader.newest - self.reader.began) + (self.age or 0.0)
        p.started = now - lived if self.reader.began else now
        p.going = bool(self.running)
        p.ended = None if p.going else p.started + max(0.0, self.reader.newest - self.reader.began)

    # -------------------------------------------------------------------------------------------- does it run?

    @property
    def age(self) -> float | None:
        """Seconds since the last sign of life; None before the first.

        By the clocks of two machines at first; an event that came while we looked is at most as old as our look.
        """
        if not self.reader.newest:
            return None
        by_clocks = max(0.0, time.time() - self.reader.newest)
        return by_clocks if self._grown_at is None else min(by_clocks, time.monotonic() - self._grown_at)

    def _is_running(self) -> bool | None:
        if self.url is not None:
            from study.errors import UserError
            from study.mirror import at_work

            with contextlib.suppress(OSError, UserError):
                return at_work(self.url)
            return None
        age = self.age
        if self._grown_at is not None and age is not None and age < EVERY_SECONDS:
            return True  # it has just written; leave its lock alone
        from study.folder import lock_held

        held = lock_held(self.folder)
        if held:
            return True
        if held is False and self.reader.host in (None, socket.gethostname()):
            return False
        # On another machine: locks of files need not reach from there to here.
        return True if age is not None and age < _LIFE_SECONDS else None

    @property
    def over(self) -> bool:
        """Whether there is nothing left to wait for, as far as the files tell."""
        if self.progress.done >= self.progress.planned:
            return True
        if self.running is None:  # a driver elsewhere that spent its budget leaves no trial open, and is gone
            from trainables.schema import Outcome

            return self.progress.counts()[Outcome.STOPPED] > 0 and not self.reader.unfinished()
        return not self.running

    def state(self) -> str:
        """Whether it runs, in words, honest about what cannot be known."""
        age = self.age
        if self.progress.done >= self.progress.planned:
            text = "complete"
        elif self.running:
            text = f"running (last event {console.duration(age)} ago)" if age is not None else "running (no event yet)"
        elif self.running is False:
            text = f"not running; mebm resume {self.place}"
        elif age is None:
            text = "no sign of life yet"
        else:
            from study.ledger import utc_text

            last = f"last event {utc_text(self.reader.newest)} on {self.reader.host}"
            text = f"no sign of life for {console.duration(age)} ({last}; whether it runs cannot be seen from here)"
        return "; ".join([text, *self.doubts()])

    def doubts(self) -> list[str]:
        """What does not fit together in the folder, or cannot be read now."""
        torn = self.reader.torn if not self.running else 0  # while it runs the last line may be being written
        rest = [f"the last {torn} bytes of its journal are no whole line and are left out"] if torn else []
        return [*self._doubts, *rest, *([self._trouble] if self._trouble else [])]

    # ------------------------------------------------------------------------------------------------- answers

    def standing(self) -> tuple[Any, ...]:
        """What a line is worth for: trials by outcome, whether it runs, and what is wrong."""
        return (*self.progress.counts().values(), self.progress.planned, self.running, self._trouble)

    def line(self) -> str:
        """The closing line."""
        counts = self.progress.counts().items()
        found = ", ".join(f"{n} {outcome.value}" for outcome, n in counts if n)
        left = self.progress.left()
        p, tail = self.progress, f", {left}" if left is not None else ""
        return f"{p.name}: {p.done}/{p.planned} trials over ({found}); {self.state()}{tail}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        from study.ledger import utc_text

        trials, left = self.progress.trials.values(), self.progress.left()
        return {
            "study": self.progress.name,
            "folder": self.place,
            "running": self.running,
            "last_event_at": utc_text(self.reader.newest) if self.reader.newest else None,
            "planned": self.progress.planned,
            "finished": self.progress.done,
            "outcomes": {outcome.value: n for outcome, n in self.progress.counts().items()},
            "hours": Hours.of(trials).to_dict(),
            "seconds_left": None if left is None else left.seconds,
            "doubts": self.doubts(),
            "trials": [{k: v for k, v in trial.items() if v is not None and k != "config"} for trial in trials],
        }
