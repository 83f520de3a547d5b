"""How a study stands, as data: counts, hours by kind, time left, and what a table of its trials shows at a width."""

from __future__ import annotations

import json
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from analysis.results.labels import bare, symbol
from trainables.results.hours import Hours
from trainables.results.own import OWN
from trainables.results.schema import CAUSE_TEXT, METRIC_BY_NAME, Cause, Outcome, with_unwritten

if TYPE_CHECKING:
    from study.config.study import Objective, StudyConfig

ALWAYS = ("sampling_steps", "step_size", "reinit_probability", "buffer_size")
SYMBOLS = {f: symbol(f) for f in (*ALWAYS, "noise_std", "l2_weight", "initial")} | {"learning_rate": "lr"}
"""Column headers in the paper's symbols."""
BAD = (Outcome.DIVERGED, Outcome.COLLAPSED, Outcome.FAILED)
"""Ends that are shown as they happen."""
_ORDER = (
    *(Outcome.RUNNING, Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED, Outcome.PRUNED),
    *(Outcome.STOPPED, Outcome.INTERRUPTED, Outcome.FAILED, Outcome.PENDING),
)
_CAUSE_SHORT = {
    Cause.ENERGY_GAP_HARD: "hard gap limit",
    Cause.TRIVIAL_OPTIMUM: "trivial optimum",
    Cause.WORSE_THAN_P0: "worse than p0",
}
_GAP = 2
"""Blanks between two columns."""
_STATE, _STATE_SHORT = 45, 22
"""Width the state should have in a table with all columns, and the least it keeps."""
_CELL = 12
"""Longest value or header of a table that is short of room."""


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
    value: Any = with_unwritten(json.loads(trial["config"]))
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return "none" if value is None else value  # off, which is a value: the field is there


_COSTS = {"seconds_per_iteration": "s/it", "train_seconds": "train s"}
"""Headers, with their units, of costs that a study improves."""


def metric_label(name: str) -> str:
    """The header of a metric, or of a cost."""
    return METRIC_BY_NAME[name].label if name in METRIC_BY_NAME else _COSTS.get(name, name.removeprefix(OWN))


def last_score(trial: Mapping[str, Any], name: str) -> Any:
    """A trial's last score of a metric, or its cost; None where only the untrained model was scored: that is p0's."""
    last = trial.get(f"{name}_last", trial.get(name))
    directed = name in METRIC_BY_NAME or bool(trial.get(f"{name}_direction"))
    untrained = directed and trial.get(f"{name}_best") is None and last == trial.get(f"{name}_initial")
    return None if untrained and f"{name}_initial" in trial else last


def state_text(trial: Mapping[str, Any], *, short: bool = False) -> str:
    """How a trial stands, in words: `diverged at iteration 17: energy gap ran away`, or as short as it can be."""
    outcome = Outcome(trial["outcome"])
    if trial.get("cause"):
        cause = Cause(trial["cause"])
        if short:
            words = _CAUSE_SHORT.get(cause, CAUSE_TEXT[cause].removeprefix("energy "))
            return f"{outcome.value} at {trial['iteration']}: {words}"
        return f"{outcome.value} at iteration {trial['iteration']}: {CAUSE_TEXT[cause]}"
    if outcome in (Outcome.FAILED, Outcome.STOPPED, Outcome.PRUNED) and trial.get("message"):
        return f"{outcome.value}: {trial['message']}"
    return f"{outcome.value}, undertrained" if trial.get("undertrained") is True else outcome.value


def duration(seconds: float) -> str:
    """`4d 3h`, `1h 02m`, `3m 20s` or `12s`."""
    whole = round(seconds)
    if whole >= 72 * 3600:
        return f"{whole // 86400}d {whole % 86400 // 3600}h"
    if whole >= 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 60}m {whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def rough(seconds: float) -> str:
    """A time that is known roughly, for people: `40 seconds`, `3 minutes`, `14 hours`, `20 days`, `2 years`."""
    for unit, size in (("year", 365 * 86400), ("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * size or (unit == "minute" and seconds >= 90):
            return f"{seconds / size:,.0f} {unit}s"
    return f"{max(1, round(seconds))} second{'' if round(seconds) <= 1 else 's'}"


def cut(text: str, width: int) -> str:
    """A text of at most so many characters, with an ellipsis where something is left out: whole words, if they do."""
    if len(text) <= width:
        return text
    kept = text[: max(0, width - 1)]
    whole = text[: max(0, width - 1)].rpartition(" ")[0].rstrip(" ±")
    return f"{whole} …" if len(whole) > width // 2 else f"{kept.rstrip()}…"


@dataclass(frozen=True)
class Left:
    """Time a study will still take, and what says so."""

    seconds: float
    basis: str

    def __str__(self) -> str:
        """`about 3h 20m left (from 14 trials at 4 at once)`."""
        return f"about {duration(self.seconds)} left ({self.basis})"


@dataclass(frozen=True)
class Column:
    """A column of the table: its header, a cell per row, and whether it stands to the right."""

    header: str
    cells: tuple[str, ...]
    right: bool = True

    @property
    def width(self) -> int:
        """Of its longest cell."""
        return max(len(text) for text in (self.header, *self.cells))

    def cut(self, width: int) -> Column:
        """The column no wider than so."""
        return Column(cut(self.header, width), tuple(cut(text, width) for text in self.cells), self.right)


class Shown(NamedTuple):
    """A table that fits: columns, the last of them the state, and the outcome of every row."""

    columns: tuple[Column, ...]
    outcomes: tuple[Outcome, ...]


class StudyStatus:
    """What a running study looks like: its trials (columns of `trials.parquet` by id), how many are planned, its times.

    Args:
        fields: setting columns to show, besides the paper's four.
        quality: the metric to show (without `_last`), or a cost of `trials.parquet`.
        direction: which values of the metric are good; None: the metric's own direction.
        others: further objectives and their directions.

    Attributes:
        gaps: last energy gap by trial id.
        started, ended: when this run of the study began and ended, by `time.monotonic`.
        done_before: trials an earlier run finished; they do not count for the speed.
        at_once: most trials that ran at the same time in this run.
        going: False where the study does not run, or nobody knows; no ETA is shown then.
        given_up: planned seeds that are not run, as their setting is worse than the best.
        to_rescue: trials whose rescue is due, was cut off, or was stopped by a budget.
    """

    def __init__(
        self,
        name: str,
        planned: int,
        fields: Sequence[str],
        quality: str,
        seeds: int,
        *,
        direction: Literal["minimize", "maximize"] | None = None,
        others: Mapping[str, Literal["minimize", "maximize"]] | None = None,
    ) -> None:
        self.name, self.planned, self.quality, self.seeds = name, planned, quality, seeds
        metric = METRIC_BY_NAME.get(quality)
        self.direction = direction or (metric.direction if metric else "minimize")
        self.others = {n: d for n, d in (others or {}).items() if n != quality}
        self.varied = set(fields)
        self.fields = list(dict.fromkeys([*ALWAYS, *fields]))
        self.trials: dict[str, dict[str, Any]] = {}
        self.rescues: dict[str, dict[str, Any]] = {}
        self.rescuing = False  # whether the study rescues trials
        self.given_up = self.to_rescue = 0
        self.gaps: dict[str, float | None] = {}
        self._running: set[str] = set()
        self.started = time.monotonic()
        self.ended: float | None = None
        self.done_before = self.at_once = 0
        self.going = True
        self.objective: Objective | None = None  # whose metric and direction a script may tell later
        self.metric: str | None = None

    @classmethod
    def of(cls, study: StudyConfig) -> StudyStatus:
        """The status of a study before its first trial."""
        first, seeds = study.objectives[0], len(study.seeds)
        direction = first.resolved_direction
        others = {o.metric: o.resolved_direction for o in study.objectives[1:]}
        made = cls(
            study.name, study.planned_trials, study.varied_columns, first.metric, seeds, direction=direction,
            others=others,
        )  # fmt: skip
        made.objective = first if study.is_script else None
        made.rescuing = study.rescue is not None
        return made

    def begin(self, trials: Mapping[str, Mapping[str, Any]]) -> None:
        """Trials an earlier run finished; they do not count for the speed."""
        self.hold(trials)
        for trial in self.trials.values():
            self.learn(trial)
        self._running = {t["trial_id"] for t in self._with(Outcome.RUNNING)}
        self.done_before = self.done

    def hold(self, trials: Mapping[str, Mapping[str, Any]]) -> None:
        """These are its trials, and its rescues, which are counted apart."""
        self.trials = {t: dict(v) for t, v in trials.items() if not v.get("rescue")}
        self.rescues = {t: dict(v) for t, v in trials.items() if v.get("rescue")}

    def put(self, trial: Mapping[str, Any], gap: float | None) -> None:
        """A trial has changed."""
        (self.rescues if trial.get("rescue") else self.trials)[trial["trial_id"]] = dict(trial)
        self.learn(trial)
        if gap is not None:
            self.gaps[trial["trial_id"]] = gap
        # Counted on the way: looking at every trial at every report adds up over a large study.
        (self._running.add if trial["outcome"] == Outcome.RUNNING else self._running.discard)(trial["trial_id"])
        self.at_once = max(self.at_once, len(self._running))

    def learn(self, trial: Mapping[str, Any]) -> None:
        """What a script says of the metric to show."""
        if self.metric is None and self.objective and (found := self.objective.resolved(trial)) is not None:
            self.metric, self.direction = found.metric, found.resolved_direction

    def _all(self) -> list[dict[str, Any]]:
        return list(self.trials.values())  # a copy: the screen is drawn in its own thread

    def _with(self, *outcomes: Outcome) -> list[dict[str, Any]]:
        return [t for t in self._all() if t["outcome"] in outcomes]

    @property
    def done(self) -> int:
        """Trials that are over."""
        return sum(Outcome(t["outcome"]).finished for t in self._all())

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do: all trials that are not given up are over, and all rescues."""
        rescues = list(self.rescues.values())
        over = self.done >= self.planned - self.given_up and self.to_rescue == 0
        return over and all(Outcome(t["outcome"]).finished for t in rescues)

    def hours(self) -> Hours:
        """Where the time of its trials and their rescues went."""
        return Hours.of([*self._all(), *self.rescues.values()])

    @property
    def elapsed(self) -> float:
        """Seconds since this run of the study began."""
        return (time.monotonic() if self.ended is None else self.ended) - self.started

    def counts(self) -> dict[Outcome, int]:
        """How many trials stand how."""
        found = dict.fromkeys(_ORDER, 0)
        trials = self._all()
        for trial in trials:
            found[Outcome(trial["outcome"])] += 1
        found[Outcome.PENDING] += max(0, self.planned - self.given_up - len(trials))
        return found

    def counted(self) -> str:
        """The counts in words, without those of 0."""
        found = [f"{n} {outcome}" for outcome, n in self.counts().items() if n]
        rescues = list(self.rescues.values())
        if rescues:
            saved = sum(t["outcome"] == Outcome.COMPLETED for t in rescues)
            found.append(f"{len(rescues)} rescue{'s' if len(rescues) > 1 else ''} ({saved} completed)")
        if self.to_rescue and self.done >= self.planned - self.given_up:
            found.append(f"{self.to_rescue} to be rescued")
        if self.given_up:
            found.append(f"{self.given_up} seed{'s' if self.given_up > 1 else ''} given up")
        return ", ".join(found)

    def left(self) -> Left | None:
        """Time left: by the slowest trial once all run, else at this run's rate so far; None at first and at the end.

        At the rate, running trials count by their share of iterations, and as many diverge, early, as did so far.
        """
        done = self.done
        planned = self.planned - self.given_up
        if not self.going or done >= planned:
            return None
        running = self._with(Outcome.RUNNING)
        if running and done + len(running) >= planned:
            times = [seconds for t in running if (seconds := _seconds_left(t)) is not None]
            if len(times) == len(running):
                return Left(max(times), "the slowest of the last" if len(times) > 1 else "its last trial's pace")
        known = [t for t in running if t.get("iterations_planned")]
        part = sum((t.get("iterations_done") or 0) / t["iterations_planned"] for t in known)
        ended = done - self.done_before
        if ended + part < 2:
            return None
        at_once = "one at a time" if self.at_once < 2 else f"at {self.at_once} at once"
        counted = f"{ended} trial{'' if ended == 1 else 's'}" if ended else "running trials"
        return Left(self.elapsed / (ended + part) * (planned - done - part), f"from {counted} {at_once}")

    def segments(self) -> list[str]:
        """How many trials stand how; time spent and left; hours by kind. Empty ones are left out."""
        left = self.left()
        clock = duration(self.elapsed) + (" so far" if self.done < self.planned - self.given_up else "")
        clock += f", {left}" if left is not None else ""
        found = [
            f"{self.done}/{self.planned} trials: {self.counted()}",
            clock,
            self.hours().text(),
        ]
        return [text for text in found if text]

    def overview(self) -> str:
        """The segments as one line."""
        return "; ".join(self.segments())

    def value(self, trial: Mapping[str, Any]) -> Any:
        """A trial's last quality, or what else the study improves."""
        return last_score(trial, self.metric or self.quality)

    def _best(self, trial: Mapping[str, Any], name: str | None = None) -> float | None:
        quality = name or self.metric or self.quality
        value = trial.get(f"{quality}_best", trial.get(quality))
        return None if value is None else float(value)

    def front(self) -> set[str]:
        """Ids of completed trials that no other beats in every objective; none where there is one objective."""
        if not self.others:
            return set()
        from analysis.stats.tradeoff.front import pareto  # pandas, which takes a moment

        names = [self.metric or self.quality, *self.others]
        points = {t["trial_id"]: [self._best(t, n) for n in names] for t in self._with(Outcome.COMPLETED)}
        points = {t: values for t, values in points.items() if None not in values}
        if not points:
            return set()
        found = pareto(list(points.values()), [self.direction, *self.others.values()])  # type: ignore[arg-type]
        return {t for t, on in zip(points, found, strict=True) if on}

    def interesting(self, rows: int) -> list[dict[str, Any]]:
        """Running trials, the newest that ended badly, the best, the newest others; each leaves the next room."""
        newest = sorted(self._all(), key=lambda t: (t.get("ended_at") or "", t["trial_id"]), reverse=True)
        sign = 1 if self.direction == "minimize" else -1
        scored = [(sign * v, t) for t in self._with(Outcome.COMPLETED) if (v := self._best(t)) is not None]
        front = self.front()
        ranked = sorted(scored, key=lambda item: (item[1]["trial_id"] not in front, item[0]))
        groups = [
            self._with(Outcome.RUNNING),
            [t for t in newest if t["outcome"] in BAD],
            [t for _, t in ranked],
            [t for t in newest if t["outcome"] not in (Outcome.RUNNING, Outcome.PENDING)],
        ]
        running = min(len(groups[0]), max(1, rows // 2))
        room = rows - running
        quotas = [running, (room + 1) // 2, (room + 2) // 4, (room + 3) // 5]
        seen: dict[str, int] = {}  # the group in which a trial is shown
        for limited in (True, False):
            for i, group in enumerate(groups):
                room = min(rows - len(seen), quotas[i] if limited else rows)
                fresh = [t["trial_id"] for t in group if t["trial_id"] not in seen]
                seen |= dict.fromkeys(fresh[: max(0, room)], i)
        return [t for i, group in enumerate(groups) for t in group if seen.get(t["trial_id"]) == i]

    def shown(self, width: int | None = None, rows: int | None = None) -> Shown:
        """The table of the trials: the most interesting ones, or all in their order.

        What does not fit the width goes in this order: settings that are no question of the study, long words, the
        energy gap, the other settings from the last, the seed, the end of the state.
        """
        trials = self._all() if rows is None else self.interesting(rows)
        quality = self.metric or self.quality
        label = "metric" if self.objective is not None and self.metric is None else metric_label(quality)
        columns = {"": Column("trial", tuple(t["trial_id"] for t in trials), right=False)}
        for field in self._told(trials, self.fields):
            columns[field] = Column(SYMBOLS.get(field, bare(field)), tuple(number(setting(t, field)) for t in trials))
        if self.seeds > 1:
            columns["seed"] = Column("seed", tuple(number(t["seed"]) for t in trials))
        columns["epoch"] = Column("epoch", tuple(map(_epochs, trials)))
        if quality or self.objective is not None:
            columns["quality"] = Column(label, tuple(number(self.value(t)) for t in trials))
        for name in self.others:
            cells = tuple(number(last_score(t, name)) for t in trials)
            columns[name] = Column(metric_label(name), cells)
        front = self.front()
        columns["gap"] = Column("gap", tuple(number(self.gaps.get(t["trial_id"])) for t in trials))
        outcomes = tuple(Outcome(t["outcome"]) for t in trials)
        state = Column("state", tuple(self._state(t, front, short=False) for t in trials), right=False)
        if width is None:
            return Shown((*columns.values(), state), outcomes)
        for field in (f for f in ALWAYS if f not in self.varied):
            if not _fits(columns, state, _STATE, width):
                columns.pop(field, None)
        if not _fits(columns, state, _STATE, width):
            columns = {name: _brief(name, column) for name, column in columns.items()}
            state = Column("state", tuple(self._state(t, front, short=True) for t in trials), right=False)
            for field in ["gap", *reversed([f for f in self.fields if f in columns]), "seed", "epoch"]:
                if not _fits(columns, state, _STATE_SHORT, width):
                    columns.pop(field, None)
        taken = sum(c.width + _GAP for c in columns.values())
        return Shown((*columns.values(), state.cut(max(len(state.header), width - taken))), outcomes)

    def _state(self, trial: Mapping[str, Any], front: Container[str], *, short: bool) -> str:
        text = state_text(trial, short=short)
        if self.others:
            return f"{text}, on the front" if trial["trial_id"] in front else text
        if trial["outcome"] == Outcome.COMPLETED and (best := self._best(trial)) is not None:
            shown, error = number(best), trial.get(f"{self.quality}_best_se")
            sampled = "" if error is None or short else f" ± {error:.2g}"
            return text if shown == number(self.value(trial)) and not sampled else f"{text}, best {shown}{sampled}"
        return text

    def plain(self, trial: Mapping[str, Any]) -> str:
        """A trial that ended, as one line."""
        quality = self.metric or self.quality
        scores = {quality: self.value(trial)} | {name: last_score(trial, name) for name in self.others}
        shown = "".join(f" {n.removeprefix(OWN)}={number(v)}" for n, v in scores.items() if v is not None)
        left = self.left()
        tail = f", about {duration(left.seconds)} left" if left is not None else ""
        settings = self._settings(trial, self.fields)
        return f"[{self.done}/{self.planned}{tail}] {trial['trial_id']} {settings}{shown} {state_text(trial)}"

    def brief(self, trial: Mapping[str, Any], width: int) -> str:
        """A trial that ended, as a line of a screen: how, then its settings."""
        settings = self._settings(trial, [f for f in self.fields if f in self.varied] or self.fields)
        texts = [f"{trial['trial_id']} {state_text(trial, short=s)}  {settings}" for s in (False, True)]
        return texts[0] if len(texts[0]) <= width else cut(texts[1], width)

    def _told(self, trials: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[str]:
        """Fields that are worth a word: the study's question, and of the paper's four what one of the trials has."""
        return [f for f in fields if f in self.varied or not trials or any(setting(t, f) is not None for t in trials)]

    def _settings(self, trial: Mapping[str, Any], fields: Sequence[str]) -> str:
        fields = self._told([trial], fields)
        seed = [f"seed={trial['seed']}"] if self.seeds > 1 else []
        return " ".join([*(f"{SYMBOLS.get(f, bare(f))}={number(setting(trial, f))}" for f in fields), *seed])


def _seconds_left(trial: Mapping[str, Any]) -> float | None:
    done, planned = trial.get("iterations_done") or 0, trial.get("iterations_planned") or 0
    seconds = (trial.get("train_seconds") or 0.0) + (trial.get("evaluation_seconds") or 0.0)
    return seconds / done * (planned - done) if done and planned and seconds else None


def _epochs(trial: Mapping[str, Any]) -> str:
    """Epochs done of those planned, where that is known."""
    planned = trial.get("epochs")
    return f"{trial.get('epochs_done') or 0}{'' if planned is None else f'/{planned}'}"


def _fits(columns: Mapping[str, Column], state: Column, least: int, width: int) -> bool:
    """Whether the state gets its least width, or all it wants, beside the columns."""
    return sum(c.width + _GAP for c in columns.values()) + min(state.width, least) <= width


def _brief(name: str, column: Column) -> Column:
    if name == "":
        return column  # an id that is cut names nothing
    header = column.header.partition(" (")[0] if name == "quality" else column.header.rpartition(".")[2]
    return Column(header, column.cells, column.right).cut(_CELL)
