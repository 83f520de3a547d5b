"""The Ray Tune adapter of a script's trial: everything but the trial itself is `MebmTrainable`'s."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from trainables.config.script import ScriptConfig
from trainables.results.layout import OUTPUT
from trainables.script.trial import ScriptTrial
from trainables.trial import ray_kv
from trainables.trial.host_memory import private_bytes
from trainables.trial.ray_trainable import MebmTrainable


class ScriptTrainable(MebmTrainable):
    """Runs one `ScriptTrial`. This process imports no torch."""

    _trial: ScriptTrial

    def _prepare(self, config: dict[str, Any]) -> None:
        """Nothing: the script's process has its own limits."""

    def _settings(self, text: str) -> ScriptConfig:
        return ScriptConfig.model_validate_json(text)

    def _build(self, settings: Any, config: dict[str, Any]) -> ScriptTrial:
        place = self._recorder.folder / OUTPUT
        return ScriptTrial(
            settings,
            self._recorder,
            output=place / f"{self._trial_id}.log",
            folder=place / self._trial_id,
            cpus=float(config["cpus"]),
            gpu_share=float(config["gpus"]),
            checkpoint_seconds=float(config["checkpoint_seconds"]),
            stop_seconds=float(config["stop_seconds"]),
        )

    def _told(self, error: Exception | SystemExit) -> str | None:
        return None if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"

    def _used(self) -> int | None:
        below = self._trial.processes() if hasattr(self, "_trial") else []
        found = [private_bytes(), *(private_bytes(Path(f"/proc/{pid}/status")) for pid in below)]
        return sum(n for n in found if n is not None)

    def _step(self) -> dict[str, Any]:
        if not self._claimed:
            with contextlib.suppress(Exception):  # of an earlier run on the same cluster
                ray_kv.delete(ray_kv.ENDING, self._trial_id)
        return super()._step()

    def _leave(self) -> None:
        self._recorder.publish(self._recorder.folder / OUTPUT)

    def _ending(self) -> str | None:
        """Why the driver ends this trial, where it does."""
        with contextlib.suppress(Exception):
            return (ray_kv.get(ray_kv.ENDING, self._trial_id) or b"").decode() or None
        return None

    def _state(self) -> None:
        if not self._due:  # the driver asked: the trial ends here
            self._trial.wind_up(self._ending() or "drained")

    def _write(self, folder: Path, state: None) -> None:  # noqa: ARG002
        self._trial.save(folder)

    def _load(self, folder: Path) -> None:
        self._trial.load(folder)

    def _worth_keeping(self) -> bool:
        return self._trial.has_news

    def cleanup(self) -> None:
        """End the script, and write what is left."""
        if hasattr(self, "_trial") and self._trial.running:
            self._trial.end(self._ending() or "interrupted")
        super().cleanup()
