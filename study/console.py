"""The only module that prints: a live table on a terminal, one plain line per event anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressDisplay
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from study.errors import one_line, printable
from study.output import Output, harmless
from study.progress import BAD, SYMBOLS, Progress, Shown, duration, number, setting, state_text
from trainables.schema import Outcome

__all__ = ["SYMBOLS", "Progress", "StudyConsole", "duration", "error", "number", "setting", "state_text"]

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
_ROWS, _FEWEST_ROWS = 18, 3
_BESIDE = 3
"""Lines of the live picture beside trials and overview: name, header, and one for the cursor."""
_WHOLE = 60
"""Trials up to which the last picture of a study shows them all."""
_OVERVIEW_SECONDS = 600.0
"""Time after which a log gets an overview again."""


def table_of(shown: Shown) -> Table:
    """The table of trials, for the screen."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in shown.columns:
        table.add_column(
            column.header, justify="right" if column.right else "left", no_wrap=True, min_width=column.width
        )
    for i, outcome in enumerate(shown.outcomes):
        cells = _texts(column.cells[i] for column in shown.columns)
        cells[-1].stylize(_STYLE[outcome])
        table.add_row(*cells)
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
        """As Rich does, but for texts that would steer a terminal."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)


class StudyConsole:
    """Shows a running study.

    Args:
        stream: where to print; the process's standard output by default.
        force_terminal: for tests; None asks the stream.

    Attributes:
        rich: Rich's console.
        progress: what is shown.
        note: a line below the live table.
    """

    def __init__(self, stream: IO[str] | None = None, *, force_terminal: bool | None = None) -> None:
        stream = stream or sys.stdout
        # Not Rich's own guess: FORCE_COLOR, which CI systems set, would fill a log with cursor movements.
        term = os.environ.get("TERM", "")
        live = stream.isatty() and bool(term) if force_terminal is None else force_terminal
        live = live and term.lower() not in ("dumb", "unknown")
        self.rich = _Screen(stream, force_terminal=live, highlight=False, soft_wrap=True)
        if not self.rich.is_terminal:
            self.rich.width = 200  # a file has no width; what is cut off there is lost
        self.progress: Progress | None = None
        self.note = ""
        self._live: Live | None = None
        self._overview_at = time.monotonic()

    @contextmanager
    def bar(self, total: int) -> Iterator[Callable[[str], None]]:
        """A progress bar over `total` steps, on standard error and only on a terminal; call what it gives per step."""
        with ProgressDisplay(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=_Screen(sys.stderr),
            transient=True,
            disable=not sys.stderr.isatty(),
        ) as display:
            task = display.add_task("warming up", total=total)
            yield lambda what: display.update(task, advance=1, description=what)

    def evaluations(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """What `mebm evaluate` measured (`schema.EVALUATION_COLUMNS`)."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for header in ("trial", "model", "epoch", "protocol", "n", "metric", "value", "95%", "remark"):
            table.add_column(header, justify="right" if header in ("epoch", "n", "value") else "left", no_wrap=True)
        for row in rows:
            bounds = "-" if row.get("low") is None else f"{row['low']:.4g} to {row['high']:.4g}"
            value = "-" if row.get("value") is None else f"{row['value']:.4g}"
            cells = [row["trial_id"], row["model"], number(row["epoch"]), row["protocol"], number(row.get("samples"))]
            table.add_row(*_texts([*cells, row["metric"], value, bounds, row.get("remark") or ""]))
        self.rich.print(table)

    def bench(
        self,
        rows: Sequence[Mapping[str, Any]],
        profiles: Mapping[str, Mapping[str, float]],
        notes: Sequence[str],
        over_baseline: float | None,
    ) -> None:
        """What `mebm bench` measured (`schema.BENCH_COLUMNS`)."""
        if not rows:
            for note in notes:
                self.line(note)
            return
        first, windows = rows[0], sorted({row["windows"] for row in rows})
        threads = f", {first['threads']} thread(s)" if first["device"] == "cpu" else ""
        counts = f"{windows[0]} to {windows[-1]}" if len(windows) > 1 else str(windows[0])
        self.line(f"{first['hardware']}{threads}; medians of {counts} windows, [quartiles]")
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("method", no_wrap=True)
        headers: tuple[str, ...] = ("network", "how", "ms/iteration", "min/epoch", "h/200 epochs")
        headers += ("x JEM(20)", "x baseline", "TFLOP/s", "MFU")
        for header in (*headers, *(["GiB"] if first["device"] == "cuda" else [])):
            table.add_column(header, justify="left" if header in ("network", "how") else "right", no_wrap=True)
        for row in rows:
            seconds = row["seconds_per_iteration"]
            steps = f"(K={row['sampling_steps']})" if row["sampling_steps"] is not None else ""
            ours = row["implementation"] == "package"
            how = f"{row['precision']} {row['execution']}" if ours else "released loop"
            how += f" {row['options']}" if row["options"] else ""
            cells = [f"{row['method']}{steps}", row["network"], how]
            spread = f"[{1e3 * row['seconds_low']:.4g}-{1e3 * row['seconds_high']:.4g}]"
            cells += [f"{1e3 * seconds:.4g} {spread}", f"{seconds * 6.5:.3g}", f"{seconds * 390 * 200 / 3600:.3g}"]
            cells += [number(row["speedup_over_jem"]), number(row["speedup_over_baseline"])]
            cells += [f"{row['flops_per_second'] / 1e12:.3g}", f"{row['mfu']:.1%}" if row["mfu"] else "-"]
            if first["device"] == "cuda":
                cells.append(f"{row['peak_memory_bytes'] / 2**30:.2f}")
            table.add_row(*_texts(cells), style=None if ours else "dim")
        self.rich.print(table)
        if over_baseline is not None:
            self.line(
                f"{over_baseline:.2f} times the speed of the released loop (geometric mean of the rows that have one)"
            )
        for name, shares in profiles.items():
            total = sum(shares.values())
            large = {kind: seconds / total for kind, seconds in shares.items() if seconds > 0.005 * total}
            parts = ", ".join(f"{kind} {share:.0%}" for kind, share in large.items())
            self.line(f"{name}: {1e3 * total:.4g} ms: {parts}")
        for note in notes:
            self.line(note)

    def line(self, text: str = "") -> None:
        """One line, above the live table where there is one."""
        self.rich.print(printable(text), markup=False)

    def trials(self, progress: Progress) -> None:
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

    def start(self, progress: Progress) -> None:
        """Begin to show a study."""
        self.progress = progress
        if self.rich.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.rich, refresh_per_second=2, transient=True)
            self._live.start()

    def _render(self) -> RenderableType:
        assert self.progress is not None
        p, width, overview = self.progress, self.rich.width, self._overview()
        taken = _BESIDE + sum(len(text.wrap(self.rich, width)) for text in overview)
        rows = max(_FEWEST_ROWS, min(_ROWS, self.rich.height - taken))
        head = Table.grid(padding=(0, 1))
        head.add_column(no_wrap=True, overflow="ellipsis")
        head.add_row(
            Text(printable(p.name), style="bold"), ProgressBar(max(1, p.planned), p.done, width=min(40, width // 2))
        )
        return Group(head, table_of(p.shown(width, rows)), *overview)

    def _overview(self) -> list[Text]:
        """The overview, one line where there is room; and the note."""
        assert self.progress is not None
        segments = self.progress.segments()
        whole = "; ".join(segments)
        lines = [whole] if len(whole) <= self.rich.width else segments
        return [Text(printable(line), style="dim") for line in [*lines, self.note] if line]

    def trial(self, trial: Mapping[str, Any], gap: float | None, event: str) -> None:
        """A trial started, reported or ended.

        Args:
            trial: its columns of `trials.parquet`.
            gap: its last energy gap.
            event: `started`, `report` or `ended`.
        """
        assert self.progress is not None
        self.progress.put(trial, gap)
        if event == "ended":
            self.ended(trial)

    def ended(self, trial: Mapping[str, Any]) -> None:
        """A trial ended: a line above the live table where it ended badly; without a table a line for every trial."""
        assert self.progress is not None
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
        """End the live table and leave the last state: the trials on a terminal, an overview anywhere.

        Args:
            goes_on: only the watching ends, so there still is a time left.
        """
        assert self.progress is not None
        self.progress.going = self.progress.going and goes_on
        if self._live is None:
            self.line(self.progress.overview())
            return
        self._live.stop()
        self._live = None
        self.note = ""
        if len(self.progress.trials) <= _WHOLE:
            self.trials(self.progress)
        else:
            self.rich.print(table_of(self.progress.shown(self.rich.width, _ROWS)), soft_wrap=False)
            self.line(f"and {len(self.progress.trials) - _ROWS} more: mebm status shows them all")
        for text in self._overview():
            self.rich.print(text, soft_wrap=False)


def say(line: object) -> None:
    """A line of a command's answer, on standard output."""
    print(printable(str(line)))


def error(text: str) -> None:
    """A user's mistake, on standard error."""
    print(f"mebm: {printable(one_line(text))}", file=sys.stderr)
