"""The only module that prints: a live table on a terminal, one plain line per event anywhere else."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressDisplay
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainables.schema import CAUSE_TEXT, METRIC_BY_NAME, Cause, Outcome

SYMBOLS = {
    "sampling_steps": "K",
    "step_size": "α",
    "reinit_probability": "ρ",
    "buffer_size": "|B|",
    "noise_std": "σ",
    "l2_weight": "λ",
    "initial": "p0",
    "learning_rate": "lr",
}
"""Column headers in the paper's symbols."""
ALWAYS = ("sampling_steps", "step_size", "reinit_probability", "buffer_size")
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
_ROWS = 18


def number(value: Any) -> str:
    """A setting or metric in few characters."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def setting(trial: Mapping[str, Any], field: str) -> Any:
    """A setting of a trial: a column, or a field of its complete configuration (dotted for nested ones)."""
    if field in trial or not trial.get("config"):
        return trial.get(field)
    value: Any = json.loads(trial["config"])
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def state_text(trial: Mapping[str, Any]) -> str:
    """How a trial stands, in words: `diverged at iteration 17: energy gap ran away`."""
    outcome = Outcome(trial["outcome"])
    if trial.get("cause"):
        return f"{outcome.value} at iteration {trial['iteration']}: {CAUSE_TEXT[Cause(trial['cause'])]}"
    if outcome in (Outcome.FAILED, Outcome.STOPPED) and trial.get("message"):
        return f"{outcome.value}: {trial['message']}"
    return outcome.value


def duration(seconds: float) -> str:
    """`1h 02m`, `3m 20s` or `12s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 60}m {whole % 60:02d}s" if whole >= 60 else f"{whole}s"


class Progress:
    """What a running study looks like: the trials, how many are planned, and how long it has been.

    Args:
        name: the study.
        planned: trials in all.
        fields: setting columns to show, besides the paper's four.
        metric: quality column to show.
        quality: name of the metric (without `_last`).
        seeds: how many seeds each setting has.
    """

    def __init__(self, name: str, planned: int, fields: Sequence[str], quality: str, seeds: int) -> None:
        self.name, self.planned, self.quality, self.seeds = name, planned, quality, seeds
        self.fields = list(dict.fromkeys([*ALWAYS, *fields]))
        self.trials: dict[str, dict[str, Any]] = {}
        self.gaps: dict[str, float | None] = {}
        self.started = time.monotonic()
        self._done_before = 0

    def begin(self, trials: Mapping[str, Mapping[str, Any]]) -> None:
        """Trials an earlier run finished; they do not count for the speed."""
        self.trials = {t: dict(v) for t, v in trials.items()}
        self._done_before = self.done

    @property
    def done(self) -> int:
        """Trials that are over."""
        return sum(Outcome(t["outcome"]).finished for t in self.trials.values())

    def counts(self) -> dict[Outcome, int]:
        """How many trials stand how."""
        found = dict.fromkeys(Outcome, 0)
        for trial in self.trials.values():
            found[Outcome(trial["outcome"])] += 1
        found[Outcome.PENDING] += max(0, self.planned - len(self.trials))
        return found

    def seconds_left(self) -> float | None:
        """Time left at the rate so far, with running trials counted by their share of iterations; None at first."""
        part = 0.0
        for trial in self.trials.values():
            if trial["outcome"] == Outcome.RUNNING and trial.get("iterations_planned"):
                part += (trial.get("iterations_done") or 0) / trial["iterations_planned"]
        work = self.done - self._done_before + part
        left = self.planned - self.done - part
        elapsed = time.monotonic() - self.started
        return elapsed / work * left if work >= 2 else None

    def overview(self) -> str:
        """One line: how many trials stand how, time spent and left."""
        parts = [f"{n} {outcome.value}" for outcome, n in self.counts().items() if n]
        left = self.seconds_left()
        tail = f", about {duration(left)} left" if left is not None and self.done < self.planned else ""
        return (
            f"{self.done}/{self.planned} trials: {', '.join(parts)}; {duration(time.monotonic() - self.started)}{tail}"
        )

    def table(self, *, whole: bool = False) -> Table:
        """Running trials first, then the newest that ended, as many as fit; or the whole study in order."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("trial")
        for field in self.fields:
            table.add_column(SYMBOLS.get(field, field), justify="right")
        if self.seeds > 1:
            table.add_column("seed", justify="right")
        label = METRIC_BY_NAME[self.quality].label if self.quality in METRIC_BY_NAME else self.quality
        for header in ("epoch", label, "gap"):
            table.add_column(header, justify="right")
        table.add_column("state", no_wrap=True, overflow="ellipsis")
        running = [t for t in self.trials.values() if t["outcome"] == Outcome.RUNNING]
        ended = [t for t in self.trials.values() if t["outcome"] != Outcome.RUNNING]
        ended.sort(key=lambda t: (t.get("ended_at") or "", t["trial_id"]), reverse=True)
        for trial in self.trials.values() if whole else (running + ended)[:_ROWS]:
            epochs = f"{trial.get('epochs_done') or 0}/{trial['epochs']}"
            cells = [trial["trial_id"], *(number(setting(trial, f)) for f in self.fields)]
            cells += [number(trial["seed"])] if self.seeds > 1 else []
            quality = trial.get(f"{self.quality}_last", trial.get(self.quality))
            cells += [epochs, number(quality), number(self.gaps.get(trial["trial_id"]))]
            table.add_row(*cells, Text(state_text(trial), style=_STYLE[Outcome(trial["outcome"])]))
        return table


class StudyConsole:
    """Shows a running study.

    Args:
        stream: where to print; the process's standard output by default.
        force_terminal: for tests; None asks the stream.
    """

    def __init__(self, stream: IO[str] | None = None, *, force_terminal: bool | None = None) -> None:
        self.rich = RichConsole(
            file=stream or sys.stdout, force_terminal=force_terminal, highlight=False, soft_wrap=True
        )
        if not self.rich.is_terminal:
            self.rich.width = 200  # a file has no width; what is cut off there is lost
        self.progress: Progress | None = None
        self._live: Live | None = None

    @contextmanager
    def bar(self, total: int) -> Iterator[Callable[[str], None]]:
        """A progress bar over `total` steps, on standard error and only on a terminal; call what it gives per step."""
        with ProgressDisplay(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=RichConsole(stderr=True),
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
            table.add_row(*cells, row["metric"], value, bounds, row.get("remark") or "")
        self.rich.print(table)

    def bench(
        self,
        rows: Sequence[Mapping[str, Any]],
        profiles: Mapping[str, Mapping[str, float]],
        notes: Sequence[str],
        over_baseline: float | None,
    ) -> None:
        """What `mebm bench` measured (`schema.BENCH_COLUMNS`)."""
        first = rows[0]
        threads = f", {first['threads']} thread(s)" if first["device"] == "cpu" else ""
        self.line(f"{first['hardware']}{threads}; medians of {first['windows']} windows, [quartiles]")
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
            cells = [f"{row['method']}{steps}", row["network"], how]
            spread = f"[{1e3 * row['seconds_low']:.4g}-{1e3 * row['seconds_high']:.4g}]"
            cells += [f"{1e3 * seconds:.4g} {spread}", f"{seconds * 6.5:.3g}", f"{seconds * 390 * 200 / 3600:.3g}"]
            cells += [number(row["speedup_over_jem"]), number(row["speedup_over_baseline"])]
            cells += [f"{row['flops_per_second'] / 1e12:.3g}", f"{row['mfu']:.1%}" if row["mfu"] else "-"]
            if first["device"] == "cuda":
                cells.append(f"{row['peak_memory_bytes'] / 2**30:.2f}")
            table.add_row(*cells, style=None if ours else "dim")
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
            self.line(f"not timed: {note}")

    def line(self, text: str = "") -> None:
        """One line, above the live table where there is one."""
        self.rich.print(text, markup=False)

    def start(self, progress: Progress) -> None:
        """Begin to show a study."""
        self.progress = progress
        if self.rich.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.rich, refresh_per_second=4, transient=True)
            self._live.start()

    def _render(self) -> RenderableType:
        assert self.progress is not None
        p = self.progress
        bar = ProgressBar(total=max(1, p.planned), completed=p.done, width=40)
        return Group(Text(p.name, style="bold"), p.table(), bar, Text(p.overview(), style="dim"))

    def trial(self, trial: Mapping[str, Any], gap: float | None, event: str) -> None:
        """A trial started, reported or ended.

        Args:
            trial: its columns of `trials.parquet`.
            gap: its last energy gap.
            event: `started`, `report` or `ended`.
        """
        assert self.progress is not None
        self.progress.trials[trial["trial_id"]] = dict(trial)
        if gap is not None:
            self.progress.gaps[trial["trial_id"]] = gap
        if self._live is None and event == "ended":
            self.line(self.plain(trial))

    def plain(self, trial: Mapping[str, Any]) -> str:
        """A trial that ended, as one line."""
        assert self.progress is not None
        p = self.progress
        fields = " ".join(f"{SYMBOLS.get(f, f)}={number(setting(trial, f))}" for f in p.fields)
        seed = f" seed={trial['seed']}" if p.seeds > 1 else ""
        quality = trial.get(f"{p.quality}_last", trial.get(p.quality))
        shown = f" {p.quality}={number(quality)}" if quality is not None else ""
        left = p.seconds_left()
        tail = f", about {duration(left)} left" if left is not None and p.done < p.planned else ""
        return f"[{p.done}/{p.planned}{tail}] {trial['trial_id']} {fields}{seed}{shown} {state_text(trial)}"

    def stop(self) -> None:
        """End the live table and leave its last state on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            assert self.progress is not None
            self.rich.print(self.progress.table(whole=True))


def error(text: str) -> None:
    """A user's mistake, on standard error."""
    print(f"mebm: {text}", file=sys.stderr)
