"""The Ray Tune adapter of a trial; torch is imported by trials that need it."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow.fs import FileType
from ray import tune
from ray.tune.result import DONE, SHOULD_CHECKPOINT

from trainables.plugins.reference import use
from trainables.results.credentials import redacted
from trainables.results.files import check_name, within
from trainables.results.layout import CHECKPOINTS, RESCUE
from trainables.results.schema import Outcome
from trainables.results.store import NotThereError, Store, StoreError
from trainables.trial import ray_kv
from trainables.trial.checkpoint import CheckpointError, newest_whole, read_checkpoint, write_checkpoint
from trainables.trial.host_memory import MemoryLimit, private_bytes
from trainables.trial.ray_report import pack_report
from trainables.trial.recorder import Recorder
from trainables.trial.transient_errors import is_transient

_HEARTBEAT_SECONDS = 5.0
_AWAY_SECONDS = 30.0
"""Time after which a store that was away is looked for again."""
_PATIENCE = 900.0
"""Seconds that a trial which is in a store waits for one that is away, before that counts as its failure."""


class MebmTrainable(tune.Trainable):
    """Runs one `Trial`; each `train()` is one step of it. Its hooks say what is a built-in trial's own.

    Its `config` holds plain values: `trial` (a complete `TrialConfig` as JSON), `trial_id`, `folder` (the study's,
    absolute), `code` (hashes of the user's own code that it may run), `store` (URL of the study's place in object
    storage, where it has one), `cpus`, `gpus`, `memory_gb` (optional; host memory it may use, 10^9 bytes),
    `checkpoint_seconds`, `resume_from` (checkpoint folders of earlier runs, the newest first), and where the study
    rescues trials `rescue` (`HealthyStates`'s arguments) and `rescue_from` (the trial that this one rescues).
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Build the trial, or take it up from the checkpoint of an earlier run."""
        self._prepare(config)
        self._trial_id = str(config["trial_id"])
        memory = config.get("memory_gb")
        self._memory = MemoryLimit(round(memory * 1e9), self._over_memory, self._used) if memory else None
        self._checkpoint_seconds = float(config["checkpoint_seconds"])
        self._checkpointed = time.monotonic()
        self._heartbeat_at = self._away_until = 0.0
        self._broken: str | None = None
        self._given: Any = None
        self._claimed = self._due = False
        self._stored: str | None = None
        self._store: Store | None = None
        try:
            use(Path(config["folder"]), config.get("code") or {}, partial(ray_kv.get, ray_kv.CODE))
            settings = self._given = self._settings(config["trial"])
            if config.get("store"):
                self._store = Store(config["store"])
                self._recorder = Recorder.into(self._store, self._trial_id, settings.signal_every)
            else:
                self._recorder = Recorder(Path(config["folder"]), self._trial_id, settings.signal_every)
            self._trial = self._build(settings, config)
            self._recorder.superseded = True  # Ray sets up workers to spare: who is told to train writes, see `_step`
            earlier = list(config.get("resume_from") or ())
            if self._store is not None and earlier:
                self._await_store()
            if not self._take_up(earlier if self._store is None else [], earlier) and config.get("rescue_from"):
                self._rescue(str(config["rescue_from"]))
        except (Exception, SystemExit) as error:
            self._fail(error)

    # ------------------------------------------------------------------------------ what is a built-in trial's own

    def _prepare(self, config: dict[str, Any]) -> None:
        """What this process may use."""
        import torch

        from trainables.training.cost import USABLE

        torch.set_num_threads(max(1, int(config["cpus"])))
        gpus = float(config["gpus"])
        if 0 < gpus < 1 and torch.cuda.is_available():
            # Ray's fractions are bookkeeping; this is the limit one trial cannot cross.
            torch.cuda.set_per_process_memory_fraction(USABLE * gpus)

    def _settings(self, text: str) -> Any:
        from trainables.config.trial import TrialConfig

        return TrialConfig.model_validate_json(text)

    def _told(self, error: Exception | SystemExit) -> str | None:
        """What a trial says that fails of this; None of an end of the process that is not its own doing."""
        from trainables.config.method import MethodSpec
        from trainables.training.hooks import explain, left_by

        method = self._given.method_args if self._given is not None else MethodSpec()
        if isinstance(error, SystemExit) and not left_by(error, method):
            return None
        return explain(error, method)

    def _build(self, settings: Any, config: dict[str, Any]) -> Any:
        from trainables.trial.healthy import HealthyStates
        from trainables.trial.trial import Trial

        healthy = None
        if rescue := config.get("rescue"):
            healthy = HealthyStates(frozenset(rescue["on"]), rescue["rewind"])
        return Trial(settings, recorder=self._recorder, gpu_share=float(config["gpus"]), healthy=healthy)

    def _used(self) -> int | None:
        """Bytes of the host's memory that count."""
        return private_bytes()

    def _state(self) -> Any:
        """What a checkpoint holds."""
        return self._trial.state_dict()

    def _write(self, folder: Path, state: Any) -> None:
        write_checkpoint(folder, state)

    def _load(self, folder: Path) -> None:
        """Go on from a checkpoint. CheckpointError: it is damaged."""
        self._trial.load_state_dict(read_checkpoint(folder))

    def _worth_keeping(self) -> bool:
        """Whether a checkpoint would hold anything new."""
        return True

    def _leave(self) -> None:
        """Publish what the recorder does not write itself."""

    # ----------------------------------------------------------------------------------------------- what all have

    def _rescue(self, trial_id: str) -> None:
        """Begin at the healthy state of the trial that this one rescues. CheckpointError: it is gone, or damaged."""
        name = f"{RESCUE}/{check_name(trial_id, Path(RESCUE))}"
        if self._store is None:
            self._trial.rescue(read_checkpoint(within(self._recorder.folder, name)))
            return
        self._await_store()
        with tempfile.TemporaryDirectory(prefix="mebm-") as scratch:
            self._store.refuse_gone()
            self._store.get_folder(name, Path(scratch) / "healthy")
            self._trial.rescue(read_checkpoint(Path(scratch) / "healthy"))

    def _take_up(self, local: list[str], stored: list[str]) -> bool:
        """Go on from the first of these checkpoints that is whole; from the beginning, and False, where none is.

        Args:
            local: folders on this machine, the newest first.
            stored: older ones in the store, of which those that are there are copied here.
        """
        with tempfile.TemporaryDirectory(prefix="mebm-") as scratch:
            if self._store is not None and stored:
                self._store.refuse_gone()
                for number, name in enumerate(stored):
                    with contextlib.suppress(NotThereError):
                        self._store.get_folder(name, Path(scratch) / str(number))
                        local = [*local, f"{scratch}/{number}"]
            whole, wrong = newest_whole(local)
            if whole is not None:
                self._load(whole)
        for text in wrong:
            self._trial.remark(f"{text}; went on from epoch {self._trial.epoch}")
        return whole is not None

    def _over_memory(self, used: int) -> None:
        """End this process, which frees what it holds; the driver finds the reason where it looks for it."""
        assert self._memory is not None
        limit = self._memory.limit / 1e9
        text = f"used {used / 1e9:.3g} GB of the host's memory, more than resources.memory_gb = {limit:g}"
        with contextlib.suppress(Exception):  # it ends for the same reason, said or not
            ray_kv.put(ray_kv.OVER_MEMORY, self._trial_id, text)
        os._exit(1)

    def _fail(self, error: Exception | SystemExit) -> None:
        """An error another start may help is raised for Ray to start the trial again; any other is its result."""
        if is_transient(error) or (text := self._told(error)) is None:
            raise error
        self._broken = redacted(text)

    def step(self) -> dict[str, Any]:
        """One epoch. The result holds a report; see `read_report`."""
        if self._broken is None:
            try:
                return self._step()
            except (Exception, SystemExit) as error:
                self._fail(error)
        failed = {"outcome": Outcome.FAILED.value, "cause": None, "iteration": None, "message": self._broken}
        return {**pack_report(None, failed), DONE: True}

    def _step(self) -> dict[str, Any]:
        self._beat(self._trial.iteration)
        if not self._claimed:
            self._await_store()
            self._recorder.claim()
            self._claimed = True
        report = self._trial.step(self._beat)
        if report.done:
            self._leave()
        if report.done and self._recorder.flush():
            self._await_store()  # the worker's scratch folder is not a place for results
        if report.done and (left := self._recorder.flush()):
            text = f"not in the store: {', '.join(left)}; kept on {socket.gethostname()} in {self._recorder.folder}"
            report.trial["message"] = "; ".join(filter(None, (str(report.trial["message"] or ""), text)))
        self._refuse_superseded()
        result: dict[str, Any] = {**pack_report(report.row, report.trial), DONE: report.done}
        due = time.monotonic() - self._checkpointed >= self._checkpoint_seconds
        due = due and report.row is not None and not report.done and self._worth_keeping() and self._store_answers()
        if due:
            result[SHOULD_CHECKPOINT] = True
        self._due = due
        return result

    def _refuse_superseded(self) -> None:
        """A worker whose trial another has taken over ends it here; one that Ray still counts on starts again."""
        if self._recorder.superseded:
            raise OSError("another worker trains this trial, or the study's folder is not what it was")

    def _store_answers(self) -> bool:
        """Whether a checkpoint can be stored now: one that cannot would end the trial, which can as well go on."""
        if self._store is None:
            return True
        if time.monotonic() < self._away_until:
            return False
        try:
            self._store.refuse_gone()
            self._store.exists(CHECKPOINTS)
        except StoreError:
            self._away_until = time.monotonic() + _AWAY_SECONDS
            return False
        return True

    def _await_store(self) -> None:
        """Wait for a store that is away: it has the checkpoint to go on from, or takes what a trial has left."""
        until = time.monotonic() + _PATIENCE
        while not self._store_answers() and time.monotonic() < until:
            self._beat(self._trial.iteration)
            time.sleep(1.0)

    def _beat(self, iteration: int) -> None:
        """Leave a sign of life where the driver finds it, now and then; a number that has not changed is none."""
        now = time.monotonic()
        if now - self._heartbeat_at < _HEARTBEAT_SECONDS:
            return
        self._heartbeat_at = now
        try:
            ray_kv.put(ray_kv.HEARTBEAT, self._trial_id, str(iteration))
        except Exception:  # the driver looks at reports as well
            self._heartbeat_at = now + 60

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the whole trial."""
        if self._broken is not None:
            raise RuntimeError(f"a trial that failed has no state ({self._broken})")
        state = self._state()
        self._recorder.holds()
        self._refuse_superseded()
        self._write(Path(checkpoint_dir), state)
        self._checkpointed = time.monotonic()

    def restore(self, checkpoint_path: Any) -> None:
        """Ray's own, which knows where the checkpoint lies; `load_checkpoint` sees but a copy of what is in a store."""
        checkpoint = getattr(checkpoint_path, "checkpoint", checkpoint_path)
        place = str(getattr(checkpoint, "path", checkpoint))
        self._stored = self._store.name_of(place) if self._store is not None else None
        self._await_store()
        try:
            # Ray refuses one that is gone; here it is one that is damaged.
            files: Any = checkpoint.filesystem if isinstance(checkpoint, tune.Checkpoint) else None
            if files is not None and files.get_file_info(place).type is FileType.NotFound:
                self.load_checkpoint(place)
            else:
                super().restore(checkpoint_path)
        finally:
            self._stored = None

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Continue where a checkpoint folder was written, or the one before it if that is damaged.

        Where neither is whole the trial stays as `setup` built it: at the checkpoint of an earlier run, or at its
        beginning. Either way it trains what it trained before.
        """
        if self._broken is not None:
            return
        folder = Path(checkpoint)
        try:
            self._load(folder)
        except CheckpointError:
            if self._store is not None and self._stored is not None:
                parent, _, name = self._stored.rpartition("/")
                older = [f"{parent}/{n}" for n in self._store.folders(parent) if "checkpoint_" <= n < name]
                self._take_up([checkpoint], older[::-1])
                return
            near = sorted((p for p in folder.parent.glob("checkpoint_*") if p.name < folder.name), reverse=True)
            self._take_up([checkpoint, *map(str, near)], [])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take on another trial in the same process: importing torch costs more than a small trial's first epochs."""
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Write what is left; short, because Ray waits for it."""
        if self._memory is not None:
            self._memory.close()
        if hasattr(self, "_trial"):
            self._trial.close()
            self._recorder.close()
            del self._trial
