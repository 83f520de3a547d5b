"""The Ray Tune adapter of a trial; the only module below `study` that knows Ray."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.result import DONE, SHOULD_CHECKPOINT

from trainables.config import TrialConfig
from trainables.recorder import Recorder
from trainables.trial import Trial

CHECKPOINT_FILE = "trial.pt"
ROW, TRIAL = "row", "trial"
"""Keys of a result: the epoch's columns, and the trial's."""


class MebmTrainable(tune.Trainable):
    """Runs one `Trial`; each `train()` is one step of it.

    Its `config` holds plain values: `trial` (a complete `TrialConfig` as JSON), `trial_id`, `folder` (the study's,
    absolute), `cpus`, `gpus`, `checkpoint_seconds`, and `resume_from` (a checkpoint folder of an earlier run, or None).
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Build the trial, or take it up from the checkpoint of an earlier run."""
        torch.set_num_threads(max(1, int(config["cpus"])))
        gpus = float(config["gpus"])
        if 0 < gpus < 1 and torch.cuda.is_available():
            # Ray's fractions are bookkeeping; this is the limit one trial cannot cross.
            torch.cuda.set_per_process_memory_fraction(gpus)
        settings = TrialConfig.model_validate_json(config["trial"])
        recorder = Recorder(Path(config["folder"]), config["trial_id"], settings.signal_every)
        self._trial = Trial(settings, recorder=recorder)
        self._checkpoint_seconds = float(config["checkpoint_seconds"])
        self._checkpointed = time.monotonic()
        if config.get("resume_from"):
            self.load_checkpoint(config["resume_from"])

    def step(self) -> dict[str, Any]:
        """One epoch. The result carries only finite numbers, strings and None."""
        report = self._trial.step()
        result: dict[str, Any] = {ROW: report.row, TRIAL: report.trial, DONE: report.done}
        due = time.monotonic() - self._checkpointed >= self._checkpoint_seconds
        if report.row is not None and (due or report.done):
            result[SHOULD_CHECKPOINT] = True
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the whole trial, under a temporary name first."""
        path = Path(checkpoint_dir) / CHECKPOINT_FILE
        part = path.with_suffix(".part")
        torch.save(self._trial.state_dict(), part)
        part.replace(path)
        self._checkpointed = time.monotonic()

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Continue where a checkpoint folder was written."""
        state = torch.load(Path(checkpoint) / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
        self._trial.load_state_dict(state)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take on another trial in the same process: importing torch costs more than a small trial's first epochs."""
        self._trial.close()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Write what is left; short, because Ray waits for it."""
        if hasattr(self, "_trial"):
            self._trial.close()
