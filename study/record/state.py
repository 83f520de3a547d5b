"""What the events of a journal say of a study: its trials, their attempts and epochs, and the tables made from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from analysis.results.parquet import to_table
from study.record import events
from study.record.journal import HoleError, Mark, decode, missing_lines, utc_text
from study.record.row_store import RowStore
from trainables.config.method import with_own_fields
from trainables.results.own import with_added
from trainables.results.schema import ATTEMPT_COLUMNS, EPOCH_COLUMNS, TRIAL_COLUMNS, Outcome


class StudyState:
    """What is known of every trial of a study, in memory, by trial id."""

    def __init__(self, study: str) -> None:
        self.study = study
        self.trials: dict[str, dict[str, Any]] = {}  # columns of `trials.parquet`, in the order of their first start
        self.attempts: dict[tuple[str, int], dict[str, Any]] = {}  # columns of `attempts.parquet`
        # Folders of the newest checkpoints, at most two, the newest last; relative to the study's where they are in it.
        self.checkpoints: dict[str, list[str]] = {}
        self.settings: dict[str, int] = {}  # number of the setting
        self.runs: list[dict[str, Any]] = []  # what every start of a driver noted: configuration, code, host
        self.newest = 0.0  # time of the newest event, seconds since the epoch; 0 before the first
        self.mark = Mark()  # the place of the journal's end; events that wait to be written are before it
        self.numbered = False  # whether its newest line has a number, by which a missing one is seen
        self._rows: dict[str, dict[int, dict[str, Any]]] = {}
        self._done = RowStore()  # rows of trials that are over
        self._open: set[tuple[str, int]] = set()  # attempts that run
        self._gpu_seconds = 0.0  # of attempts that ended
        self._spans: list[list[float]] = []  # first and last event of every run

    def read_line(self, line: bytes) -> None:
        """Apply a line of the journal; raises one of `DAMAGE` where it is damaged, there twice, or follows a gap."""
        event = decode(line)
        self._check(event)
        self._check_place(event)
        self._apply(event)
        self.mark = self.mark.after(event, event["crc"])
        self.numbered = "n" in event

    def _check_place(self, event: Mapping[str, Any]) -> None:
        """Whether a line follows the one before it; lines of earlier versions do not tell."""
        if "n" not in event:
            if self.numbered:
                raise ValueError("it has no number, and the lines before it have")
            return
        number, there = event["n"], self.mark.after(event, "")
        if type(number) is not int or not 0 < number < events.LARGEST:
            raise TypeError(f"n is {number!r}, but expected the number of a line")
        if number < there.lines:
            raise ValueError(f"it is line {number}, there twice or moved")
        if number > there.lines:
            raise HoleError(missing_lines(there.lines, number - 1))
        if (event.get("prev"), event.get("run")) != (self.mark.crc, there.runs):
            raise ValueError("it does not follow the line before it")

    def take(self, event: Mapping[str, Any]) -> None:
        """Apply an event; raises one of `DAMAGE` where no driver can have written it after those before it."""
        self._check(event)
        self._apply(event)

    def _check(self, event: Mapping[str, Any]) -> None:
        events.check_time("t", event["t"])
        kind = event["event"]
        if kind in ("run", "alive"):
            if kind == "run":
                events.check_run(event)
            return
        trial_id = event["trial_id"]
        if kind in ("start", "restored"):
            events.check_id(trial_id)
            events.check_number("setting", event["setting"], 0)
        before = (self.trials.get(trial_id) or {}).get("attempts") or 0
        match kind:
            case "start":
                events.check_number("attempt", event["attempt"], 1)
                if event["attempt"] != before + 1:
                    raise ValueError(f"attempt {event['attempt']} of {trial_id} after {before}")
                events.check_row(event["columns"], events.TRIAL_KINDS, trial_id)
            case "report":
                Outcome(event["trial"]["outcome"])
                events.check_row(event["trial"], events.TRIAL_KINDS, trial_id)
                events.check_texts(node=event.get("node"))
                if (row := event["row"]) is not None:
                    events.check_row(row, events.EPOCH_KINDS, trial_id)
                    events.check_number("epoch", row["epoch"], 0)
                    last = self.attempts[trial_id, before]["last_epoch"]
                    if last is not None and row["epoch"] <= last:
                        raise ValueError(f"epoch {row['epoch']} of {trial_id} after {last} in one attempt")
            case "checkpoint":
                events.check_texts(path=event["path"])
            case "lost":
                events.check_texts(reason=event["reason"])
            case "end":
                Outcome(event["outcome"])
                events.check_texts(message=event["message"])
            case "restored":
                events.check_restored(trial_id, event)
            case _:
                raise ValueError(f"unknown event {str(kind)[:40]!r}")

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind, at = event["event"], float(event["t"])
        self.newest = max(self.newest, at)
        if kind == "run":
            self.runs.append({k: v for k, v in event.items() if k != "event"})
            self._spans.append([at, at])
            for trial_id in self.unfinished():
                self._close_attempt(trial_id, "killed", None, None)
            return
        if self._spans:
            self._spans[-1][1] = max(self._spans[-1][1], at)
        if kind == "alive":
            return
        trial_id = event["trial_id"]
        match kind:
            case "start":
                self._apply_start(trial_id, event, at)
            case "restored":
                self._apply_restored(trial_id, event)
            case "report":
                self._apply_report(trial_id, event, at)
            case "checkpoint":
                self.checkpoints[trial_id] = [*self.checkpoints.get(trial_id, [])[-1:], event["path"]]
                self._sign_of_life(trial_id, at)
            case "lost":
                self._close_attempt(trial_id, "failed", event["reason"], at)
            case "end":
                outcome, message = event["outcome"], event["message"]
                self.trials[trial_id] |= {"outcome": outcome, "message": message, "ended_at": utc_text(at)}
                self.trials[trial_id] |= {"cause": None, "iteration": None}
                ended = outcome if outcome in ("failed", "interrupted", "stopped") else "finished"
                self._close_attempt(trial_id, ended, message, at)
                self._pack(trial_id)

    def _apply_start(self, trial_id: str, event: Mapping[str, Any], at: float) -> None:
        trial = self.trials.setdefault(trial_id, dict.fromkeys(events.TRIAL_KINDS))
        if (table := self._done.pop(trial_id)) is not None:
            self._rows[trial_id] = {int(row["epoch"]): row for row in table.to_pylist()}
        self._close_attempt(trial_id, "killed", None, None)
        trial |= event["columns"]
        trial |= {
            "outcome": Outcome.RUNNING.value,
            "attempts": event["attempt"],
            "started_at": trial["started_at"] or utc_text(at),
            "replayed_seconds": trial["replayed_seconds"] or 0.0,
            "lost_seconds": trial["lost_seconds"] or 0.0,
            "ended_at": None,
        }
        self.settings[trial_id] = int(event["setting"])
        self._open.add((trial_id, event["attempt"]))
        attempt = dict.fromkeys(events.ATTEMPT_KINDS) | {"study": self.study, "trial_id": trial_id}
        attempt |= {"attempt": event["attempt"], "gpus": trial["gpus"], "ended": "running"}
        attempt |= {"started_at": utc_text(at), "_started": at}
        attempt |= dict.fromkeys(("seconds", "replayed_seconds", "lost_seconds", "_rows"), 0.0)
        self.attempts[trial_id, event["attempt"]] = attempt

    def forget_attempts(self, trial_id: str) -> None:
        """Drop a trial's attempts and epochs."""
        self._rows.pop(trial_id, None)
        self._done.pop(trial_id)
        for key in [key for key in self.attempts if key[0] == trial_id]:
            del self.attempts[key]
            self._open.discard(key)

    def _apply_restored(self, trial_id: str, event: Mapping[str, Any]) -> None:
        """What the tables said of a trial whose lines were lost, in place of all that was known of it."""
        trial = dict.fromkeys(events.TRIAL_KINDS) | event["trial"]
        self.trials[trial_id], self.settings[trial_id] = trial, event["setting"]
        self.checkpoints[trial_id] = list(event["checkpoints"])
        self.forget_attempts(trial_id)
        rows = self._rows[trial_id] = {r["epoch"]: dict.fromkeys(events.EPOCH_KINDS) | r for r in event["epochs"]}
        for values in event["attempts"]:
            number = values["attempt"]
            attempt = self.attempts[trial_id, number] = dict.fromkeys(events.ATTEMPT_KINDS) | values
            attempt["_started"] = event["started"]  # of the last one, which alone may go on
            own = [_row_seconds(row) for row in rows.values() if row["attempt"] == number]
            attempt["_rows"] = math.fsum(own) + attempt["replayed_seconds"]
            if attempt["ended"] == "running":
                self._open.add((trial_id, number))
            else:
                self._gpu_seconds += attempt["seconds"] * (attempt["gpus"] or 0.0)
        if Outcome(trial["outcome"]).finished:
            self._pack(trial_id)

    def _apply_report(self, trial_id: str, event: Mapping[str, Any], at: float) -> None:
        trial, rows = self.trials[trial_id], self._rows.setdefault(trial_id, {})
        attempt = self.attempts[trial_id, trial["attempts"]]
        trial.update(event["trial"])
        attempt["node"] = event.get("node") or attempt["node"]
        self._sign_of_life(trial_id, at)
        if (row := event["row"]) is not None:
            epoch = int(row["epoch"])
            if attempt["first_epoch"] is None:
                attempt["first_epoch"] = max(0, epoch - 1)
            attempt["last_epoch"] = epoch
            attempt["_rows"] += _row_seconds(row)
            if (earlier := rows.get(epoch)) is not None:
                self._count_replay(trial, earlier)
            rows[epoch] = dict.fromkeys(events.EPOCH_KINDS) | row
        over = Outcome(trial["outcome"]).finished
        if over and trial["epochs_done"] is not None:
            # Epochs that an earlier attempt reached and the one that counts did not.
            for epoch in [e for e in rows if e > trial["epochs_done"]]:
                self._count_replay(trial, rows.pop(epoch))
        trial["seconds"] = _row_seconds(trial) + trial["replayed_seconds"]
        if over:
            trial["ended_at"] = utc_text(at)
            ended = "failed" if trial["outcome"] == Outcome.FAILED else "finished"
            self._close_attempt(trial_id, ended, trial["message"] if ended == "failed" else None, at)
            self._pack(trial_id)

    def _count_replay(self, trial: dict[str, Any], row: Mapping[str, Any]) -> None:
        for counted in (trial, self.attempts.get((row["trial_id"], row["attempt"]))):
            if counted is not None:
                counted["replayed_seconds"] += _row_seconds(row)

    def _sign_of_life(self, trial_id: str, at: float) -> None:
        attempt = self.attempts[trial_id, self.trials[trial_id]["attempts"]]
        if attempt["ended"] == "running":
            attempt["seconds"] = max(attempt["seconds"], at - attempt["_started"])
            attempt["ended_at"] = utc_text(at)

    def _close_attempt(self, trial_id: str, ended: str, reason: str | None, at: float | None) -> None:
        """An attempt is over; `at` is None where nobody saw its end, and its last sign of life counts."""
        trial = self.trials[trial_id]
        attempt = self.attempts.get((trial_id, trial["attempts"] or 0))
        if attempt is None or attempt["ended"] != "running":
            return
        if at is not None:
            self._sign_of_life(trial_id, at)
        attempt["ended"], attempt["reason"] = ended, reason
        self._open.discard((trial_id, attempt["attempt"]))
        self._gpu_seconds += attempt["seconds"] * (attempt["gpus"] or 0.0)
        attempt["ended_at"] = attempt["ended_at"] or attempt["started_at"]
        if ended in ("failed", "killed", "interrupted"):
            # What a later attempt does again, or nobody does, and no row holds.
            attempt["lost_seconds"] = max(0.0, attempt["seconds"] - attempt["_rows"])
            trial["lost_seconds"] += attempt["lost_seconds"]

    def _pack(self, trial_id: str) -> None:
        if rows := self._rows.pop(trial_id, None):
            self._done.put(trial_id, _epochs([rows[e] for e in sorted(rows)]))

    def rows(self, trial_id: str) -> list[dict[str, Any]]:
        """A trial's epochs, columns of `epochs.parquet`, in order."""
        if (table := self._done.get(trial_id)) is not None:
            found: list[dict[str, Any]] = table.to_pylist()
            return found
        rows = self._rows.get(trial_id, {})
        return [rows[e] for e in sorted(rows)]

    def tables(self) -> dict[str, pa.Table]:
        """`trials`, `epochs` and `attempts` as Arrow tables, sorted by trial."""
        ids = sorted(self.trials)
        parts = [
            done if (done := self._done.get(t)) is not None else _epochs(self.rows(t))
            for t in ids
            if t in self._done or t in self._rows
        ]
        attempts = [{name: self.attempts[key][name] for name in events.ATTEMPT_KINDS} for key in sorted(self.attempts)]
        return {
            "trials": to_table(*with_added(*with_own_fields(self._marked(), TRIAL_COLUMNS))),
            "epochs": pa.concat_tables(parts, promote_options="permissive") if parts else _epochs([]),
            "attempts": to_table(attempts, ATTEMPT_COLUMNS),
        }

    def outcome(self, trial_id: str) -> Outcome | None:
        """How a trial stands; None for one that never started."""
        trial = self.trials.get(trial_id)
        return Outcome(trial["outcome"]) if trial else None

    @property
    def searched(self) -> list[str]:
        """The trials of the search: all but rescues."""
        return [t for t, row in self.trials.items() if row["rescue"] is None]

    def _marked(self) -> list[dict[str, Any]]:
        """Rows of `trials.parquet` by trial; those that were rescued say how often, how it ended, and what it took."""
        rescues: dict[str, list[dict[str, Any]]] = {}
        for row in self.trials.values():
            if row["rescue"] is not None:
                rescues.setdefault(row["rescue_of"], []).append(row)
        marked = []
        for trial_id in sorted(self.trials):
            own, row = rescues.get(trial_id, []), self.trials[trial_id]
            last = max(own, key=lambda r: r["rescue"], default=None)
            spent = math.fsum((r["seconds"] or 0.0) + (r["lost_seconds"] or 0.0) for r in own)
            marks = {"rescues": len(own), "rescued": last and last["outcome"], "rescue_seconds": spent}
            marked.append(row | (marks if own else dict.fromkeys(marks)))
        return marked

    def unfinished(self) -> list[str]:
        """Trials that a resumed study takes up again."""
        return [t for t in self.trials if not Outcome(self.trials[t]["outcome"]).finished]

    @property
    def running(self) -> int:
        """Trials at work."""
        return len(self._open)


def _epochs(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return to_table(*with_added(rows, EPOCH_COLUMNS))


def _row_seconds(row: Mapping[str, Any]) -> float:
    return float((row["train_seconds"] or 0.0) + (row["evaluation_seconds"] or 0.0))
