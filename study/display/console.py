"""The only module that prints: a live table on a terminal, one plain line per event anywhere else."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from study.config.errors import one_line, printable
from study.display.activity import held, work_text
from study.display.output import Output, harmless
from study.display.status import BAD, Shown, StudyStatus, number
from trainables.results.progress import listening
from trainables.results.schema import Outcome

_STYLE = {
    Outcome.RUNNING: "cyan",
    Outcome.COMPLETED: "green",
    Outcome.DIVERGED: "red",
    Outcome.COLLAPSED: "magenta",
    Outcome.FAILED: "bold red",
    Outcome.INTERRUPTED: "yellow",
    Outcome.STOPPED: "yellow",
    Outcome.PRUNED: "blue",
    Outcome.PENDING: "dim",
}
_BENCH_CELLS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "method": lambda r: r["method"] + (f"(K={r['sampling_steps']})" if r["sampling_steps"] is not None else ""),
    "network": lambda r: r["network"],
    "how": lambda r: (
        (f"{r['precision']} {r['execution']}" if r["implementation"] == "package" else "released loop")
        + (f" {r['options']}" if r["options"] else "")
    ),
    "ms/iteration": lambda r: (
        f"{1e3 * r['seconds_per_iteration']:.4g} [{1e3 * r['seconds_low']:.4g}-{1e3 * r['seconds_high']:.4g}]"
    ),
    "min/epoch": lambda r: f"{r['seconds_per_iteration'] * 6.5:.3g}",
    "h/200 epochs": lambda r: f"{r['seconds_per_iteration'] * 390 * 200 / 3600:.3g}",
    "x JEM(20)": lambda r: number(r["speedup_over_jem"]),
    "x baseline": lambda r: number(r["speedup_over_baseline"]),
    "TFLOP/s": lambda r: f"{r['flops_per_second'] / 1e12:.3g}",
    "MFU": lambda r: f"{r['mfu']:.1%}" if r["mfu"] else "-",
    "GiB": lambda r: f"{r['peak_memory_bytes'] / 2**30:.2f}",
}
_ROWS, _MIN_ROWS = 18, 3
_BESIDE = 3
"""Lines of the live picture beside trials and overview: name, header, and one for the cursor."""
_WHOLE = 60
"""Trials up to which the last picture of a study shows them all."""
_OVERVIEW_SECONDS = 600.0
"""Time after which a log gets an overview again."""


def _table(columns: Iterable[tuple[str, bool]]) -> Table:
    """An empty table of headers, and whether a column stands to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header, right in columns:
        table.add_column(header, justify="right" if right else "left", no_wrap=True)
    return table


def table_of(shown: Shown) -> Table:
    """The table of trials, for the screen."""
    table = _table((column.header, column.right) for column in shown.columns)
    for i, outcome in enumerate(shown.outcomes):
        cells = _texts(column.cells[i] for column in shown.columns)
        cells[-1].stylize(_STYLE[outcome])
        table.add_row(*cells)
    for drawn, column in zip(table.columns, shown.columns, strict=True):
        drawn.min_width = column.width
    return table


def _texts(cells: Iterable[str]) -> list[Text]:
    """Cells as they are: Rich would take what stands in brackets for its markup."""
    return [Text(printable(cell)) for cell in cells]


class _Screen(RichConsole):
    """Rich, which alone may steer a terminal: what it is given to show may not."""

    def __init__(self, stream: IO[str], **options: Any) -> None:
        file: Any = stream.for_terminal() if isinstance(stream, Output) else stream
        super().__init__(file=file, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)


class TrainingBar:
    """What `StudyConsole.training` shows; also a listener of `trainables.results.progress`."""

    def __init__(self, console: StudyConsole, display: Progress, task: TaskID, *, quiet: bool) -> None:
        self._console, self._display, self._task, self._quiet = console, display, task, quiet
        self._began: tuple[str, float] = "", 0.0
        self._note = ""

    def take(self, what: str, done: int = 0, total: int | None = None) -> None:
        """What is done between two epochs takes the place of the last scores for as long."""
        if what != self._began[0] or not done:
            self._began = what, time.monotonic()
        self._display.update(self._task, note=work_text(what, done, total, time.monotonic() - self._began[1]))

    def iteration(self, done: int) -> None:
        """So many iterations are done."""
        self._display.update(self._task, completed=done, note=self._note)

    def epoch(self, done: int, name: str, note: str) -> None:
        """An epoch is over, and scored as the note says."""
        self._note = note
        self.iteration(done)
        if self._quiet:
            self._console.line(f"{name}  {note}")


class StudyConsole:
    """Shows a running study on a stream, standard output by default, asked for a terminal, and a note below it."""

    progress: StudyStatus  # from `start` on

    def __init__(self, stream: IO[str] | None = None, *, force_terminal: bool | None = None) -> None:
        stream = stream or sys.stdout
        # Not Rich's own guess: FORCE_COLOR, which CI systems set, would fill a log with cursor movements.
        term = os.environ.get("TERM", "")
        live = stream.isatty() and bool(term) if force_terminal is None else force_terminal
        live = live and term.lower() not in ("dumb", "unknown")
        self.rich = _Screen(stream, force_terminal=live, highlight=False, soft_wrap=True)
        if not self.rich.is_terminal:
            self.rich.width = 200  # a file has no width; what is cut off there is lost
        self.note = ""
        self._live: Live | None = None
        self._shown = ExitStack()
        self._overview_at = time.monotonic()

    @contextmanager
    def bar(self, total: int) -> Iterator[Callable[..., None]]:
        """A progress bar over `total` steps, on standard error and only on a terminal.

        Call what it gives with a text after a step, or with a text and how many.
        """
        columns = (
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        screen, quiet = _Screen(sys.stderr), not sys.stderr.isatty()
        shown_on = Progress(*columns, console=screen, transient=True, disable=quiet)
        with ExitStack() as stack, held(), shown_on as display:
            task = display.add_task("warming up", total=total)

            def say(what: str, done: int = 0, total: int | None = None) -> None:
                display.update(task, description=work_text(what, done, total, 0.0) if total else what)

            stack.enter_context(listening(say))
            yield lambda what, by=1: display.update(task, advance=by, description=what)

    @contextmanager
    def training(self, planned: int, done: int) -> Iterator[TrainingBar]:
        """A progress bar over the iterations of one trial, on a terminal; elsewhere a line per epoch."""
        columns = (
            SpinnerColumn(), TextColumn("iteration"), MofNCompleteColumn(), BarColumn(20), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )  # fmt: skip
        quiet = not self.rich.is_terminal
        with held(), Progress(*columns, console=self.rich, disable=quiet) as display:
            bar = TrainingBar(self, display, display.add_task("", total=planned, completed=done, note=""), quiet=quiet)
            with listening(bar.take):
                yield bar

    def evaluations(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """What `mebm evaluate` measured (`schema.EVALUATION_COLUMNS`)."""
        headers = ("trial", "model", "epoch", "protocol", "n", "metric", "value", "95%", "remark")
        table = _table((header, header in ("epoch", "n", "value")) for header in headers)
        for row in rows:
            bounds = "-" if row.get("low") is None else f"{row['low']:.4g} to {row['high']:.4g}"
            value = "-" if row.get("value") is None else f"{row['value']:.4g}"
            cells = [row["trial_id"], row["model"], number(row["epoch"]), row["protocol"], number(row.get("samples"))]
            table.add_row(*_texts([*cells, row["metric"], value, bounds, row.get("remark") or ""]))
        self.rich.print(table)

    def diagnosis(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """What `mebm diagnose` measured (`schema.DIAGNOSIS_COLUMNS`)."""
        headers = ("trial", "from", "step", "energy", "of the data", "FD", "± se", "clamped", "moved")
        table = _table((header, header not in ("trial", "from")) for header in headers)
        for row in rows:
            energies = (f"{row[f'energy_{name}']:.3g}" for name in ("mean", "data_mean"))
            fd = ("-" if row[name] is None else f"{row[name]:.3g}" for name in ("fd", "fd_se"))
            ends = f"{row['clamped_pixel_share']:.0%}", f"{row['moved']:.2f}"
            table.add_row(*_texts([row["trial_id"], row["start"], f"{row['step']:,}", *energies, *fd, *ends]))
        self.rich.print(table)

    def scores(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """What `mebm score` measured (`schema.SCORE_COLUMNS`)."""
        headers = ("images", "protocol", "n", "metric", "value", "± se", "not as the protocol asks")
        table = _table((header, header in ("n", "value", "± se")) for header in headers)
        for row in rows:
            value, error = ("-" if row[name] is None else f"{row[name]:.4g}" for name in ("value", "se"))
            said = "; ".join(text for text in (row["departures"], row["remark"]) if text)
            table.add_row(
                *_texts([row["source"], row["protocol"], number(row["samples"]), row["metric"], value, error, said])
            )
        self.rich.print(table)

    def bench(
        self,
        rows: Sequence[Mapping[str, Any]],
        profiles: Mapping[str, Mapping[str, float]],
        notes: Sequence[str],
        over_baseline: float | None,
    ) -> None:
        """What `mebm bench` measured (`schema.BENCH_COLUMNS`)."""
        if rows:
            self._bench_table(rows)
            if over_baseline is not None:
                mean = "geometric mean of the rows that have one"
                self.line(f"{over_baseline:.2f} times the speed of the released loop ({mean})")
            for name, shares in profiles.items():
                total = sum(shares.values())
                parts = [f"{kind} {part / total:.0%}" for kind, part in shares.items() if part > 0.005 * total]
                self.line(f"{name}: {1e3 * total:.4g} ms: {', '.join(parts)}")
        for note in notes:
            self.line(note)

    def _bench_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        first, windows = rows[0], sorted({row["windows"] for row in rows})
        threads = f", {first['threads']} thread(s)" if first["device"] == "cpu" else ""
        counts = f"{windows[0]} to {windows[-1]}" if len(windows) > 1 else str(windows[0])
        self.line(f"{first['hardware']}{threads}; medians of {counts} windows, [quartiles]")
        columns = [name for name in _BENCH_CELLS if name != "GiB" or first["device"] == "cuda"]
        table = _table((name, name not in ("method", "network", "how")) for name in columns)
        for row in rows:
            style = None if row["implementation"] == "package" else "dim"
            table.add_row(*_texts(_BENCH_CELLS[name](row) for name in columns), style=style)
        self.rich.print(table)

    def line(self, text: str = "") -> None:
        """One line, above the live table where there is one."""
        shown = printable(text)
        for part in fitted(shown, self.rich.width) if self.rich.is_terminal else [shown]:
            self.rich.print(part, markup=False)

    def trials(self, progress: StudyStatus) -> None:
        """Every trial of a study, in the order they started."""
        if self.rich.is_terminal:
            self.rich.print(table_of(progress.shown(self.rich.width)), soft_wrap=False)
            return
        shown = progress.shown()
        for i in range(-1, len(shown.outcomes)):
            texts = [c.header if i < 0 else c.cells[i] for c in shown.columns]
            cells = zip(shown.columns, texts, strict=True)
            padded = [text.rjust(c.width) if c.right else text.ljust(c.width) for c, text in cells]
            self.line("  ".join(padded).rstrip())

    def start(self, progress: StudyStatus) -> None:
        """Begin to show a study."""
        self.progress = progress
        if self.rich.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.rich, refresh_per_second=2, transient=True)
            self._shown.enter_context(held())
            self._live.start()

    def _render(self) -> RenderableType:
        p, width, overview = self.progress, self.rich.width, self._overview()
        taken = _BESIDE + sum(len(text.wrap(self.rich, width)) for text in overview)
        rows = max(_MIN_ROWS, min(_ROWS, self.rich.height - taken))
        head = Table.grid(padding=(0, 1))
        head.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(max(1, p.planned), p.done, width=min(40, width // 2))
        head.add_row(Text(printable(p.name), style="bold"), bar)
        return Group(head, table_of(p.shown(width, rows)), *overview)

    def _overview(self) -> list[Text]:
        """The overview, one line where there is room; and the note."""
        segments = self.progress.segments()
        whole = "; ".join(segments)
        lines = [whole] if len(whole) <= self.rich.width else segments
        return [Text(printable(line), style="dim") for line in [*lines, self.note] if line]

    def trial(self, trial: Mapping[str, Any], gap: float | None, event: str) -> None:
        """A trial (its columns of `trials.parquet`, its last energy gap) `started`, sent a `report`, or `ended`."""
        self.progress.put(trial, gap)
        if event == "ended":
            self.ended(trial)

    def ended(self, trial: Mapping[str, Any]) -> None:
        """A trial ended: a line above the live table where it ended badly; without a table a line for every trial."""
        if self._live is not None:
            if trial["outcome"] in BAD:
                text = printable(self.progress.brief(trial, self.rich.width))
                self.rich.print(Text(text, style=_STYLE[Outcome(trial["outcome"])]))
            return
        self.line(self.progress.plain(trial))
        if time.monotonic() - self._overview_at >= _OVERVIEW_SECONDS:
            self._overview_at = time.monotonic()
            self.line(self.progress.overview())

    def stop(self, *, goes_on: bool = False) -> None:
        """End the live table and leave the last state; `goes_on`: only the watching ends, not the study."""
        self.progress.going = self.progress.going and goes_on
        if self._live is None:
            self.line(self.progress.overview())
            return
        self._live.stop()
        self._live = None
        self._shown.close()
        self.note = ""
        if len(self.progress.trials) <= _WHOLE:
            self.trials(self.progress)
        else:
            self.rich.print(table_of(self.progress.shown(self.rich.width, _ROWS)), soft_wrap=False)
            self.line(f"and {len(self.progress.trials) - _ROWS} more: mebm status shows them all")
        for text in self._overview():
            self.rich.print(text, soft_wrap=False)


def say(line: object) -> None:
    """A line of a command's answer, on standard output; on a terminal of several lines of whole words, if need be."""
    text = printable(str(line))
    for part in fitted(text, width() + 2) if sys.stdout.isatty() else [text]:
        print(part)


def width() -> int:
    """Characters of a line of text: those of the terminal but for a margin, at most 108."""
    return min(108, shutil.get_terminal_size().columns - 2) if sys.stdout.isatty() else 108


def fitted(text: str, columns: int) -> list[str]:
    """A line as lines that fit, of whole words; further ones begin where the text behind a label does."""
    if len(text) <= columns:
        return [text]
    label = re.match(r"\s*(\S+( \S+)?\s{2,})?", text)
    indent = min(label.end() if label is not None else 0, columns // 3)
    options = {"break_long_words": False, "break_on_hyphens": False, "drop_whitespace": True}
    parts = textwrap.wrap(text[indent:], max(20, columns - indent), **options)  # type: ignore[arg-type]
    return [text[:indent] + parts[0], *(" " * indent + part for part in parts[1:])] if parts else [text]


def error(text: str) -> None:
    """A user's mistake, on standard error."""
    print(f"mebm: {printable(one_line(text))}", file=sys.stderr)
