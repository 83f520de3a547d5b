"""A script that runs alone: the process that `mebm.Monitor` starts, which writes the run's folder.

The folder has the layout of a study with a single trial, so `mebm report`, `tables` and `status` read it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mebm import monitor
from study.config.errors import RunError, UserError, one_line, validation_error
from study.config.fields import text_id
from study.config.yaml_input import write_yaml
from study.display.status import state_text
from study.record.folder import driver_lock, new_folder, read_study_file
from study.record.ledger import Ledger
from study.record.manifest import write_recorded
from study.record.recorded import note_objectives
from trainables.config.script import ScriptConfig
from trainables.results.files import write_text
from trainables.results.layout import JOURNAL, STUDY_FILE
from trainables.results.schema import Outcome
from trainables.script.run import ScriptRun
from trainables.script.wire import Wire, WireError
from trainables.trial.recorder import Recorder

TRIAL_ID = "t0001"
CHECKPOINT, STATE = "checkpoint", "checkpoint.json"
"""What the script saved last, and the accounts up to there."""
_POLL_SECONDS = 0.02
_MAX_FOLDERS = 10_000


def main(wire: str) -> None:
    """Write the run that reports at `wire` until it has ended. The last line printed says how it went."""
    try:
        told = json.loads((Path(wire) / "alone.json").read_text(encoding="utf-8"))
        print(_Alone(Wire(Path(wire)), told).write())  # noqa: T201  # the script's `Monitor` reads it
    except (UserError, RunError, OSError) as error:
        print(one_line(error))  # noqa: T201
        sys.exit(2)


class _Alone:
    def __init__(self, wire: Wire, told: Mapping[str, Any]) -> None:
        self.wire, self.told = wire, told
        args = {n: v for n, v in told["args"].items() if isinstance(v, bool | int | float | str | None) and n != "seed"}
        script = told["script"] or "run.py"
        # An installed program is not a Python file; its name is enough.
        what = {"script": script} if script.endswith(".py") else {"command": shlex.quote(Path(script).name)}
        divergence = {"rule": told["rule"], "learn_from": told["learn_from"]}
        try:
            self.config = ScriptConfig.model_validate(
                {**what, "args": args, "symbols": told["symbols"],
                 "divergence": divergence, "signal_every": told["every"], "seed": told["seed"]}
            )  # fmt: skip
        except ValidationError as error:
            raise validation_error("Monitor", error, ScriptConfig) from error

    def write(self) -> str:
        folder, going_on = self._folder()
        if going_on:
            with driver_lock(folder):
                return self._write(folder, going_on)

        def refuse() -> None:
            raise UserError(f"{folder}: exists and is not this run's; choose another Options(out=...)")

        def begun() -> bool:
            return (folder / JOURNAL).exists() and (folder / JOURNAL).stat().st_size > 0

        with new_folder(folder, refuse, begun):
            write_text(folder / STUDY_FILE, write_yaml({"script": self.config.model_dump(mode="json")}))
            write_recorded(folder, "one run of a script, reported by mebm.Monitor", seeds=[self.config.seed])
            return self._write(folder, going_on)

    def _folder(self) -> tuple[Path, bool]:
        """Where to write, and whether an earlier run that did not end is there to go on with."""
        base = Path(self.told["out"])
        for number in range(1, _MAX_FOLDERS):
            folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
            if not folder.exists():
                return folder, False
            if self._unfinished(folder):
                return folder, True
            if self.told.get("named"):
                raise UserError(
                    f"{folder}: holds something else, or a run that has ended; choose another Options(out=...)"
                )
        raise UserError(f"{base}: {_MAX_FOLDERS:,} runs are there")

    def _unfinished(self, folder: Path) -> bool:
        try:
            there = read_study_file(folder / STUDY_FILE)
            if there.get("script") != json.loads(self.config.to_json()):
                return False
            ledger = Ledger(folder, folder.name, writable=False)
        except (UserError, OSError):
            return False
        outcome = ledger.outcome(TRIAL_ID)
        return outcome is None or not outcome.finished

    def _write(self, folder: Path, going_on: bool) -> str:
        recorder = Recorder(folder, TRIAL_ID, 1)
        run = ScriptRun(self.wire, recorder)
        resume = self._resumed(folder, run) if going_on else None
        ledger = Ledger(folder, folder.name)
        try:
            ledger.run({"config": {"seeds": [self.config.seed]}})
            ledger.start(TRIAL_ID, self.config, text_id(self.config.identity()), 0.0)
            self.wire.start(
                args=self.config.args, seed=self.config.seed, folder=str(folder), resume=resume,
                rule=self.config.divergence.model_dump(mode="json"), checkpoint_seconds=60.0,
            )  # fmt: skip
            self._follow(folder, run, recorder, ledger)
            recorder.write_signals(force=True)
            recorder.close()
            ledger.report(TRIAL_ID, None, run.values())
            note_objectives(folder, run.metrics)
            if run.outcome is Outcome.INTERRUPTED:
                ledger.end(TRIAL_ID, Outcome.INTERRUPTED, None)
        finally:
            ledger.close()
        trial = ledger.trials[TRIAL_ID]
        how = "interrupted; run it again to go on" if run.outcome is Outcome.INTERRUPTED else state_text(trial)
        return f"{_shown(folder)}: {how}; mebm report {_shown(folder)}"

    def _resumed(self, folder: Path, run: ScriptRun) -> str | None:
        files = folder / CHECKPOINT
        if not monitor.sealed(str(files)):
            run.remark("saved nothing; started over from iteration 0")
            return None
        run.load_state(json.loads((folder / STATE).read_text(encoding="utf-8")))
        return str(files)

    def _follow(self, folder: Path, run: ScriptRun, recorder: Recorder, ledger: Ledger) -> None:
        """Take in what the script reports until it has ended."""
        pid, kept = int(self.told["pid"]), None
        while True:
            gone = not _alive(pid)  # before the wire is read: what was written before the end is then there
            try:
                reports = run.take()
            except WireError as error:
                run.remark(str(error))
                run.outcome = Outcome.FAILED
                return
            for report in reports:
                if report.row is not None:
                    ledger.report(TRIAL_ID, report.row, report.trial)
            if run.saved is not None and run.saved != kept:
                kept = run.saved
                recorder.write_signals(force=True)  # what goes on from there begins with them
                self._keep(folder, kept, run)
            self.wire.tell(ack=run.events)
            if run.ended or gone:
                break
            time.sleep(_POLL_SECONDS)
        if run.ended or run.error is not None:
            run.end({"code": 0}, self.config.method)
        elif run.outcome is Outcome.RUNNING:
            run.outcome = Outcome.INTERRUPTED  # killed: it may go on

    @staticmethod
    def _keep(folder: Path, saved: Path, run: ScriptRun) -> None:
        """Take what the script saved into the folder, in the place of what it saved before."""
        part, place, old = folder / f".{CHECKPOINT}.part", folder / CHECKPOINT, folder / f".{CHECKPOINT}.old"
        with suppress(OSError):  # a full disk: the one before is still there
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(saved, part)
            shutil.rmtree(old, ignore_errors=True)
            if place.exists():
                place.rename(old)
            part.rename(place)
            write_text(folder / STATE, json.dumps(run.state(), allow_nan=False))
            shutil.rmtree(old, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def _shown(folder: Path) -> str:
    with suppress(ValueError):
        return str(folder.relative_to(Path.cwd()))
    return str(folder)
