"""`ScriptTrial`: a training script as a trial; it has the functions of `trainables.trial.trial.Trial`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mebm import monitor
from trainables.config.script import ScriptConfig
from trainables.results.files import write_text
from trainables.results.schema import Outcome
from trainables.script import guard
from trainables.script.environment import script_environment
from trainables.script.run import ScriptRun
from trainables.script.wire import Wire, WireError
from trainables.trial.checkpoint import digest_of, seal_files, verify_checkpoint
from trainables.trial.recorder import Recorder
from trainables.trial.report import Report

_POLL_SECONDS = 0.02
STATE, FILES = "run.json", "files"
"""Of a checkpoint: the accounts, and what the script saved."""


class ScriptError(OSError):
    """A script that failed for want of memory or disk, which another start may help."""


class ScriptTrial:
    """One run of a training script, in its own process.

    Nothing starts before the first `step`: Ray sets up workers to spare.

    Args:
        config: what to run.
        recorder: takes signals, sample grids and what the script saved.
        output: file that takes what it prints.
        folder: of the script's own outputs.
        cpus: threads it is told to use; 0: it is not told.
        gpu_share: fraction of a GPU it may use; None or 1: all of it.
        checkpoint_seconds: least time between two of its checkpoints.
        stop_seconds: time it has to end by itself once it is told to.
    """

    def __init__(
        self,
        config: ScriptConfig,
        recorder: Recorder | None,
        *,
        output: Path,
        folder: Path,
        cpus: float = 0,
        gpu_share: float | None = None,
        checkpoint_seconds: float = 60.0,
        stop_seconds: float = monitor.STOP_SECONDS,
    ) -> None:
        self.config, self.recorder = config, recorder
        self._output, self._folder = output, folder
        self._cpus, self._gpu_share, self._checkpoint_seconds = cpus, gpu_share, checkpoint_seconds
        self._stop_seconds = stop_seconds
        self._scratch = Path(tempfile.mkdtemp(prefix="mebm-wire-"))
        self._wire = Wire(self._scratch)
        self.run = ScriptRun(self._wire, recorder)
        self._guard: subprocess.Popen[bytes] | None = None
        self._resume: Path | None = None
        self._events = 0
        self._reports: deque[Report] = deque()
        self._saved_in_checkpoint: Path | None = None

    @property
    def iteration(self) -> int:
        """Iterations finished, as far as is known."""
        return self.run.iteration

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.run.epoch

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._guard is not None and self._guard.poll() is None

    def processes(self) -> list[int]:
        """Its process and all below it."""
        return guard.descendants(self._guard.pid) if self._guard is not None and self.running else []

    @property
    def has_news(self) -> bool:
        """Whether the script has saved something that no checkpoint holds yet."""
        return self.run.saved is not None and self.run.saved != self._saved_in_checkpoint

    def remark(self, text: str) -> None:
        """Add to what the trial's `message` says."""
        self.run.remark(text)

    def _begin(self) -> None:
        """Start the script below its guard."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._output.parent.mkdir(parents=True, exist_ok=True)
        rule = self.config.divergence.model_dump(mode="json")
        weight = next((v for n, v in self.config.args.items() if self.config.column_of(n) == "l2_weight"), None)
        self._wire.start(
            args=self.config.args, seed=self.config.seed, rule=rule | {"l2_weight": weight or 0},
            folder=str(self._folder), resume=str(self._resume) if self._resume else None,
            checkpoint_seconds=self._checkpoint_seconds, every=self.config.signal_every,
            templated=self.config.command is not None,
        )  # fmt: skip
        if os.path.lexists(self._output):  # of an earlier attempt
            self._output.rename(_free_name(self._output))
        command = self.config.argv(sys.executable, self._folder)
        head = [sys.executable, "-I", "-S", guard.__file__, str(self._scratch), str(self._output), str(os.getpid())]
        environment = script_environment(self.config, self._scratch, cpus=self._cpus, gpu_share=self._gpu_share)
        environment[monitor.WIRE] = str(self._scratch)
        self._guard = subprocess.Popen(
            [*head, "--", *command], stdin=subprocess.PIPE, cwd=self.config.cwd, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def step(self, on_iteration: Callable[[int], None] | None = None) -> Report:
        """The script's next report: an epoch, a verdict or its end.

        Raises:
            ScriptError: it failed for want of memory or disk, which another start may help.
        """
        if self._guard is None:
            self._begin()
        if self._reports and not self._reports[0].done:  # it did not wait for an answer
            return self._reports.popleft()
        self._wire.tell(ack=self._events)
        pulse = (-1, -1)
        while True:
            ended = self._ended()  # before the wire is read: what was written before the end is then there
            try:
                reports = self.run.take()
            except WireError as error:
                self.run.remark(str(error))
                self.run.outcome = Outcome.FAILED
                reports = [Report(None, self.run.values(), Outcome.FAILED)]
            self._events = self.run.events
            self._reports += reports
            if self._reports:
                report = self._reports.popleft()
                if report.done:
                    self._let_go(self.run.stop_reason)
                    return Report(None, self.run.values(), report.outcome)
                return report
            if ended is not None:
                return self._last(ended)
            if on_iteration is not None and (now := self._wire.pulse()) != pulse:
                pulse = now
                on_iteration(sum(now))
            time.sleep(_POLL_SECONDS)

    def _ended(self) -> Mapping[str, Any] | None:
        """What the guard says of a script that has ended; None while it runs."""
        assert self._guard is not None
        if self._guard.poll() is None:
            return None
        with contextlib.suppress(OSError, ValueError):
            values: dict[str, Any] = json.loads((self._scratch / guard.EXIT).read_text())
            return values
        return {"code": None, "signal": None}

    def _last(self, ended: Mapping[str, Any]) -> Report:
        name = self.config.method
        error = self.run.error
        killed = ended.get("signal") == 9 and (ended.get("oom_kills") or 0) > 0
        if killed or (error is not None and error["transient"]):
            peak = f"; its peak was {ended['memory'] / 1e9:.3g} GB" if ended.get("memory") else ""
            what = "the system killed it for want of memory" if error is None else f"{error['type']}: {error['text']}"
            raise ScriptError(f"{name}: {what}{peak}")
        report = self.run.end(ended, name)
        if report.outcome is Outcome.FAILED:
            report.trial["message"] = f"{report.trial['message']} (output/{self._output.name})"
        return report

    def _let_go(self, reason: str | None) -> None:
        """Tell a script to end, and end it where it does not in time; no process of it is left."""
        if self._guard is None:
            return
        if self._guard.poll() is None and reason:
            self._wire.tell(stop=reason)
            until = time.monotonic() + self._stop_seconds
            while self._guard.poll() is None and time.monotonic() < until:
                time.sleep(_POLL_SECONDS)
            if self._guard.poll() is None:
                self.run.remark(f"did not stop when told, ended after {self._stop_seconds:g} s")
        if self._guard.poll() is None:
            with contextlib.suppress(OSError):
                assert self._guard.stdin is not None
                self._guard.stdin.write(b"end\n")
                self._guard.stdin.flush()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(guard.GRACE_SECONDS + 5)
        if self._guard.poll() is None:
            self._guard.kill()
        if self._guard.stdin is not None:
            with contextlib.suppress(OSError):
                self._guard.stdin.close()
        self._guard.wait()

    # ------------------------------------------------------------------------------------------------ checkpoints

    def wind_up(self, reason: str) -> None:
        """Ask the script to save and to end, and take in what it reports until then.

        Args:
            reason: a word of `mebm.Monitor.stopping`.
        """
        self._await_end(reason, self._stop_seconds)

    def _await_end(self, reason: str, seconds: float) -> None:
        if not self.running:
            return
        self._wire.tell(stop=reason)
        until = time.monotonic() + seconds
        while self.running and time.monotonic() < until:
            self.run.take()
            time.sleep(_POLL_SECONDS)
        self.run.take()

    def save(self, folder: Path) -> None:
        """Write what the script saved last, and the accounts up to there.

        Args:
            folder: exists, empty.
        """
        if self.recorder is not None:
            self.recorder.write_signals(force=True)  # what goes on from here begins with them
        sealed: dict[str, list[Any]] = {}
        saved = self.run.saved
        if saved is not None:
            shutil.copytree(saved, folder / FILES, copy_function=_linked)
            self._saved_in_checkpoint = saved
            seal = saved / monitor.SEAL
            files = json.loads(seal.read_text()) | {monitor.SEAL: [seal.stat().st_size, digest_of(seal)]}
            sealed = {f"{FILES}/{name}": entry for name, entry in files.items()}
        write_text(folder / STATE, json.dumps(self.run.state(), allow_nan=False))
        seal_files(folder, sealed | {STATE: [(folder / STATE).stat().st_size, digest_of(folder / STATE)]})

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint; from the beginning where the script had saved nothing.

        Raises:
            CheckpointError: it is damaged.
        """
        verify_checkpoint(folder)
        state = json.loads((folder / STATE).read_text())
        files = folder / FILES
        if not files.is_dir():
            self.run.remark("saved nothing; started over from iteration 0")
            return
        self._resume = self._scratch / "resume"
        shutil.copytree(files, self._resume)
        self.run.load_state(state)

    def end(self, reason: str, seconds: float = 5.0) -> None:
        """Tell the script why it ends, and leave it some time to do so by itself."""
        if self.run.pid:
            self._await_end(reason, seconds)

    def close(self) -> None:
        """End the script and everything below it."""
        self._let_go(None)
        self._wire.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def _free_name(path: Path) -> Path:
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.stem}.{number}{path.suffix}")):
        number += 1
    return kept


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
