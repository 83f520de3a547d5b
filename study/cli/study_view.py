"""A study as the files of its folder show it, also from another machine and while they are written."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from study.config.errors import UserError
from study.config.study import StudyConfig
from study.display.status import StudyStatus, duration, last_score
from study.record.consistency import doubts
from study.record.folder import load_folder, lock_held
from study.record.journal import utc_text
from study.record.journal_reader import JournalReader
from study.record.recorded import read_recorded
from study.remote.claim import at_work
from study.remote.copies import refresh_copy
from trainables.results.credentials import shown
from trainables.results.layout import JOURNAL, STUDY_FILE, TRIALS
from trainables.results.schema import METRIC_BY_NAME, RANKING, Outcome

_WAYS = ("minimize", "maximize")
_FRESH_SECONDS = 5.0
_LIFE_SECONDS = 180.0
"""A driver writes to its journal at least once a minute; after three without a word nobody can say that it runs."""


def _of_table(folder: Path) -> dict[str, dict[str, Any]]:
    """Trials by id, as their table has them. UserError: it cannot be read."""
    from analysis.results.integrity import read_study
    from analysis.results.messages import ResultsError
    from analysis.results.parquet import records

    try:
        return {str(row["trial_id"]): dict(row) for row in records(read_study(folder)[1])}
    except ResultsError as error:
        raise UserError(str(error)) from error


class StudyView:
    """A study as its files show it. UserError: not a study folder, or its journal is damaged.

    Args:
        folder: the study's folder, or a copy of it.
        url: where it is a copy of, in object storage; None for the folder itself.

    Attributes:
        progress, reader: its trials and its journal.
        running: whether a driver is at work on it; None where that cannot be seen from here.
    """

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self.folder, self.url = folder, url
        self.place = str(folder) if url is None else shown(url)
        self._signature = self._sign()
        self._recorded = read_recorded(folder)
        self._config: StudyConfig | None = None
        self.progress = self._plan()
        self.reader = JournalReader(folder, self.progress.name)
        self.running: bool | None = None
        self._trouble = ""
        self._grown_at: float | None = None
        self._counted = -1  # events when it was last looked what is left besides trials
        self._published = not (folder / JOURNAL).exists() and (folder / TRIALS).is_file()
        if self._published:
            self.reader.trials |= _of_table(folder)
            ids: dict[Any, int] = {}
            self.reader.settings |= {
                t: ids.setdefault(row.get("setting_id"), len(ids)) for t, row in self.reader.trials.items()
            }
            self._doubts = [f"there is no {JOURNAL}: shown as {TRIALS} has it, and not to be resumed"]
            self._update()
            return
        self._doubts = doubts(folder, self._study(), self.reader)
        if self._doubts:  # a study at work may have written both meanwhile
            self.reader.read_on()
            self._doubts = doubts(folder, self._study(), self.reader)
        self._update()

    def _study(self) -> StudyConfig | None:
        """The study; None of a script's own run or an import, which is none."""
        return load_folder(self.folder) if self._recorded is None else None

    def _plan(self) -> StudyStatus:
        if (found := self._recorded) is None:
            self._config = load_folder(self.folder)
            return StudyStatus.of(self._config)
        first: Mapping[str, Any] = found.objectives[0] if found.objectives else {}
        quality, direction = first.get("metric", ""), first.get("direction")
        known: Any = direction if direction in _WAYS else None
        others: Any = {o["metric"]: o.get("direction") for o in found.objectives[1:] if o.get("direction") in _WAYS}
        return StudyStatus(found.name, found.planned, (), quality, found.seeds, direction=known, others=others)

    def refresh(self) -> list[Mapping[str, Any]]:
        """Read what is new; returns the trials that ended meanwhile. UserError: the journal is damaged for good.

        A file that is out of reach for a moment (a network file system, a study that is being moved) does not end it:
        what was known stays on the screen.
        """
        self._trouble = ""
        with suppress(OSError, UserError):
            if self.url is not None:
                refresh_copy(self.url, self.folder)
        with suppress(OSError, UserError):
            signature = self._sign()
            if signature not in (self._signature, None):  # the study grew
                plan = self._plan()
                self.progress.planned, self.progress.seeds = plan.planned, plan.seeds
                self._signature, self._counted = signature, -1
        before = self.reader.events
        try:
            ended = self.reader.read_on()
        except OSError as error:
            self._trouble, ended = f"the journal cannot be read now: {error.strerror}", []
        if self.reader.events != before:
            self._grown_at = time.monotonic()
        self._update()
        return [self.progress.trials[t] for t in ended if t in self.progress.trials]

    def _sign(self) -> tuple[int, int] | None:
        """What changes with the study's file; None where it is away."""
        path = self.folder / STUDY_FILE
        return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None

    def _update(self) -> None:
        self.running = self._is_running()
        trials = {t: dict(v) for t, v in self.reader.trials.items()}
        if self.running is False:
            for trial in trials.values():
                if trial["outcome"] == Outcome.RUNNING:
                    trial["outcome"] = Outcome.INTERRUPTED.value  # its driver is gone
        p, now = self.progress, time.monotonic()
        p.hold(trials)
        self._count_rest()
        p.gaps = self.reader.gaps
        for trial in trials.values():
            p.learn(trial)
        if not p.quality and p.objective is None:  # one trial of mebm train, which asks for nothing
            scored = (n for n in RANKING if any(t.get(f"{n}_best") is not None for t in trials.values()))
            p.quality = next(scored, "")
            p.direction = METRIC_BY_NAME[p.quality].direction if p.quality else p.direction
        p.done_before, p.at_once = self.reader.done_before, self.reader.at_once
        lasted = max(0.0, self.reader.newest - self.reader.began)
        p.started = now - lasted - (self.age or 0.0) if self.reader.began else now
        p.going = bool(self.running)
        p.ended = None if p.going else p.started + lasted

    def _count_rest(self) -> None:
        """Rescues that are left, and seeds given up, of a study that has some; again when there is a new event."""
        study = self._config
        if study is None or (study.rescue is None and study.pruning.seeds == "all"):
            return
        if self._counted == self.reader.events:
            return
        from study.search.left import rest_of  # scipy, and a trial's settings

        self._counted = self.reader.events
        # Settings that cannot be read here, such as of code that nobody trusts, do not keep a study from being shown.
        with suppress(UserError, OSError, ValueError, LookupError, TypeError, AssertionError):
            rest = rest_of(study, self.reader)
            self.progress.to_rescue, self.progress.given_up = len(rest.to_rescue | rest.stopped), rest.given_up

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
            with suppress(OSError, UserError):
                return at_work(self.url)
            return None
        age = self.age
        if self._grown_at is not None and age is not None and age < _FRESH_SECONDS:
            return True  # it has just written; leave its lock alone
        held = lock_held(self.folder)
        if held or (held is False and self.reader.host in (None, socket.gethostname())):
            return held
        # On another machine: locks of files need not reach from there to here.
        return True if age is not None and age < _LIFE_SECONDS else None

    @property
    def over(self) -> bool:
        """Whether there is nothing left to wait for, as far as the files tell."""
        if self.progress.complete and not (self.progress.rescuing and self.running):
            return True  # between a trial's end and its rescue nothing is open
        if self.running is None:  # a driver elsewhere that spent its budget leaves no trial open, and is gone
            stopped = any(t["outcome"] == Outcome.STOPPED for t in self.reader.trials.values())
            return stopped and not self.reader.unfinished()
        return not self.running

    def state(self) -> str:
        """Whether it runs, in words, honest about what cannot be known."""
        age = self.age
        if self.progress.complete and not (self.progress.rescuing and self.running):
            text = "complete"
        elif self.running:
            text = f"running (last event {duration(age)} ago)" if age is not None else "running (no event yet)"
        elif self.running is False:
            found = self._recorded
            again = f"to go on, {found.again}" if found and found.again else f"mebm resume {self.place}"
            text = "not running" if self._published else f"not running; {again}"
        elif age is None:
            text = "no sign of life yet"
        else:
            last = f"last event {utc_text(self.reader.newest)} on {self.reader.host}"
            text = f"no sign of life for {duration(age)} ({last}; whether it runs cannot be seen from here)"
        return "; ".join([text, *self.doubts()])

    def doubts(self) -> list[str]:
        """What does not fit together in the folder, or cannot be read now."""
        torn = self.reader.torn if not self.running else 0  # while it runs the last line may be being written
        rest = [f"the last {torn} bytes of its journal are not a whole line and are left out"] if torn else []
        return [*self._doubts, *rest, *([self._trouble] if self._trouble else [])]

    def standing(self) -> tuple[Any, ...]:
        """What a line is worth for: trials by outcome, whether it runs, and what is wrong."""
        rescues = len(self.progress.rescues)
        return (*self.progress.counts().values(), rescues, self.progress.planned, self.running, self._trouble)

    def line(self) -> str:
        """The closing line."""
        p, left = self.progress, self.progress.left()
        tail = f", {left}" if left is not None else ""
        return f"{p.name}: {p.done}/{p.planned} trials over ({p.counted()}); {self.state()}{tail}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        p, left = self.progress, self.progress.left()
        trials = p.trials.values()
        return {
            "study": p.name,
            "folder": self.place,
            "running": self.running,
            "last_event_at": utc_text(self.reader.newest) if self.reader.newest else None,
            "planned": p.planned,
            "finished": p.done,
            "outcomes": {outcome.value: n for outcome, n in p.counts().items()},
            "hours": p.hours().to_dict(),
            "seconds_left": None if left is None else left.seconds,
            "doubts": self.doubts(),
            "objectives": [p.metric or p.quality, *p.others],
            "front": sorted(p.front()),
            "trials": [_told(trial) for trial in trials],
            **({"rescues": [_told(trial) for trial in p.rescues.values()]} if p.rescues else {}),
        }


def _told(trial: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a trial; scores of its untrained model are its initial ones, and not its last."""
    untrained = {k for k in trial if k.endswith("_last") and last_score(trial, k.removesuffix("_last")) is None}
    return {k: v for k, v in trial.items() if v is not None and k != "config" and k not in untrained}
