"""The Ray Tune adapter of a trial; the only module below `study` that knows Ray."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pyarrow.fs import FileType
from ray import tune
from ray.experimental.internal_kv import _internal_kv_put
from ray.tune.result import DONE, SHOULD_CHECKPOINT

from trainables.checkpoint import CheckpointError, newest_whole, read_checkpoint, write_checkpoint
from trainables.config import TrialConfig
from trainables.cost import USABLE
from trainables.credentials import redacted
from trainables.faults import may_pass
from trainables.host_memory import MemoryLimit
from trainables.recorder import Recorder
from trainables.reporting import pack_report
from trainables.schema import Outcome
from trainables.storage import NotThereError, Store, StoreError
from trainables.trial import Trial

PULSE = "mebm-pulse"
"""Namespace of the cluster's key-value store for signs of life: trial id to iteration."""
_PULSE_SECONDS = 5.0
_AWAY_SECONDS = 30.0
"""Time after which a store that was away is looked for again."""
_PATIENCE = 900.0
"""Seconds that a trial which is in a store waits for one that is away, before that counts as its failure."""
OVER_MEMORY = "mebm-memory"
"""Namespace for what a worker says that ends because its trial uses more memory than it may, by trial id."""


class MebmTrainable(tune.Trainable):
    """Runs one `Trial`; each `train()` is one step of it.

    Its `config` holds plain values: `trial` (a complete `TrialConfig` as JSON), `trial_id`, `folder` (the study's,
    absolute), `store` (URL of the study's place in object storage, where it has one), `cpus`, `gpus`, `memory_gb`
    (optional; host memory it may use, 10^9 bytes), `checkpoint_seconds`, and `resume_from` (checkpoint folders of
    earlier runs, the newest first).
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Build the trial, or take it up from the checkpoint of an earlier run."""
        torch.set_num_threads(max(1, int(config["cpus"])))
        gpus = float(config["gpus"])
        if 0 < gpus < 1 and torch.cuda.is_available():
            # Ray's fractions are bookkeeping; this is the limit one trial cannot cross.
            torch.cuda.set_per_process_memory_fraction(USABLE * gpus)
        self._trial_id = str(config["trial_id"])
        memory = config.get("memory_gb")
        self._memory = MemoryLimit(round(memory * 1e9), self._over_memory) if memory else None
        self._checkpoint_seconds = float(config["checkpoint_seconds"])
        self._checkpointed = time.monotonic()
        self._pulse_at = self._away_until = 0.0
        self._broken: str | None = None
        self._stored: str | None = None
        self._store: Store | None = None
        try:
            settings = TrialConfig.model_validate_json(config["trial"])
            self._store = Store(config["store"]) if config.get("store") else None
            if self._store is not None:
                self._recorder = Recorder.into(self._store, self._trial_id, settings.signal_every)
            else:
                self._recorder = Recorder(Path(config["folder"]), self._trial_id, settings.signal_every)
            self._trial = Trial(settings, recorder=self._recorder, gpu_share=gpus)
            self._take_up(list(config.get("resume_from") or ()))
        except Exception as error:
            self._fail(error)

    def _take_up(self, folders: list[str]) -> None:
        """Go on from the first of these checkpoints that is whole; from the beginning where none is."""
        if self._store is None:
            self._take_up_local(folders)
            return
        if folders:
            self._await_store()
        with tempfile.TemporaryDirectory(prefix="mebm-") as scratch:
            self._take_up_local(self._brought(self._store, folders, Path(scratch)))

    def _brought(self, store: Store, folders: Iterable[str], scratch: Path) -> list[str]:
        """Local copies of those folders of the store that are there."""
        local = []
        if folders:
            store.refuse_gone()
        for number, name in enumerate(folders):
            with contextlib.suppress(NotThereError):
                store.get_folder(name, scratch / str(number))
                local.append(f"{scratch}/{number}")
        return local

    def _take_up_local(self, folders: list[str]) -> None:
        whole, wrong = newest_whole(folders)
        if whole is not None:
            self._trial.load_state_dict(read_checkpoint(whole))
        for text in wrong:
            self._trial.remark(f"{text}; went on from epoch {self._trial.trainer.epoch}")

    def _over_memory(self, used: int) -> None:
        """End this process, which frees what it holds; the driver finds the reason where it looks for it."""
        assert self._memory is not None
        limit = self._memory.limit / 1e9
        text = f"used {used / 1e9:.3g} GB of the host's memory, more than resources.memory_gb = {limit:g}"
        with contextlib.suppress(Exception):  # it ends for the same reason, said or not
            _internal_kv_put(self._trial_id, text, overwrite=True, namespace=OVER_MEMORY)
        os._exit(1)

    def _fail(self, error: Exception) -> None:
        """An error another start may help is raised for Ray to start the trial again; any other is its result."""
        if may_pass(error):
            raise error
        self._broken = redacted(f"{type(error).__name__}: {error}")

    def step(self) -> dict[str, Any]:
        """One epoch. The result holds a report; see `read_report`."""
        if self._broken is None:
            try:
                return self._step()
            except Exception as error:
                self._fail(error)
        failed = {"outcome": Outcome.FAILED.value, "cause": None, "iteration": None, "message": self._broken}
        return {**pack_report(None, failed), DONE: True}

    def _step(self) -> dict[str, Any]:
        self._beat(self._trial.trainer.iteration)
        report = self._trial.step(self._beat)
        if report.done and self._recorder.flush():
            self._await_store()  # the worker's scratch folder is no place for results
        if report.done and (left := self._recorder.flush()):
            text = f"not in the store: {', '.join(left)}; kept on {socket.gethostname()} in {self._recorder.folder}"
            report.trial["message"] = "; ".join(filter(None, (str(report.trial["message"] or ""), text)))
        result: dict[str, Any] = {**pack_report(report.row, report.trial), DONE: report.done}
        due = time.monotonic() - self._checkpointed >= self._checkpoint_seconds
        if report.row is not None and due and not report.done and self._store_answers():
            result[SHOULD_CHECKPOINT] = True
        return result

    def _store_answers(self) -> bool:
        """Whether a checkpoint can be stored now: one that cannot would end the trial, which can as well go on."""
        if self._store is None:
            return True
        if time.monotonic() < self._away_until:
            return False
        try:
            self._store.refuse_gone()
            self._store.exists("tune")
        except StoreError:
            self._away_until = time.monotonic() + _AWAY_SECONDS
            return False
        return True

    def _await_store(self) -> None:
        """Wait for a store that is away: it has the checkpoint to go on from, or takes what a trial has left."""
        until = time.monotonic() + _PATIENCE
        while not self._store_answers() and time.monotonic() < until:
            self._beat(self._trial.trainer.iteration)
            time.sleep(1.0)

    def _beat(self, iteration: int) -> None:
        """Leave a sign of life where the driver finds it, now and then."""
        now = time.monotonic()
        if now - self._pulse_at < _PULSE_SECONDS:
            return
        self._pulse_at = now
        try:
            _internal_kv_put(self._trial_id, str(iteration), overwrite=True, namespace=PULSE)
        except Exception:  # the driver looks at reports as well
            self._pulse_at = now + 60

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the whole trial."""
        write_checkpoint(Path(checkpoint_dir), self._state())
        self._checkpointed = time.monotonic()

    def _state(self) -> Mapping[str, Any]:
        if self._broken is not None:
            raise RuntimeError(f"a trial that failed has no state ({self._broken})")
        return self._trial.state_dict()

    def restore(self, checkpoint_path: Any) -> None:
        """Ray's own, which knows where the checkpoint lies; `load_checkpoint` sees but a copy of what is in a store."""
        checkpoint = getattr(checkpoint_path, "checkpoint", checkpoint_path)
        place = str(getattr(checkpoint, "path", checkpoint))
        self._stored = self._store.name_of(place) if self._store is not None else None
        self._await_store()
        try:
            # Ray refuses one that is gone; here it is one that is damaged.
            gone = isinstance(checkpoint, tune.Checkpoint) and not _is_there(checkpoint)
            if gone:
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
            self._trial.load_state_dict(read_checkpoint(folder))
        except CheckpointError:
            if self._store is not None and self._stored is not None:
                parent, _, name = self._stored.rpartition("/")
                older = [f"{parent}/{n}" for n in self._store.folders(parent) if "checkpoint_" <= n < name]
                with tempfile.TemporaryDirectory(prefix="mebm-") as scratch:
                    brought = self._brought(self._store, reversed(older), Path(scratch))
                    self._take_up_local([str(folder), *brought])
                return
            near = sorted((p for p in folder.parent.glob("checkpoint_*") if p.name < folder.name), reverse=True)
            self._take_up_local([str(folder), *map(str, near)])

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


def _is_there(checkpoint: tune.Checkpoint) -> bool:
    filesystem: Any = checkpoint.filesystem
    return bool(filesystem.get_file_info(checkpoint.path).type is not FileType.NotFound)
