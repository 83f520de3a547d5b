"""`Trial`: a `Trainer` with its evaluations, its outcome and its accounts, one report per epoch.

A study runs it through Ray (`ray_trainable`), `mebm train` runs it directly; both see the same reports.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trainables.config import TrialConfig
from trainables.datasets import ImageData
from trainables.divergence import LatchReading, begun, beyond_error
from trainables.energy import EnergyMeter
from trainables.recorder import Recorder
from trainables.reports import GRID_IMAGES, EpochReport, Evaluation, absent_signals, to_grid
from trainables.saved import model_state
from trainables.schema import METRIC_BY_NAME, METRICS, Cause, Outcome
from trainables.trainer import Trainer

Value = float | int | str | None
SELECTION = ("fid_buffer", "fd_buffer", "fid_fresh", "fd_fresh", "accuracy")
"""The metric by which the best model is kept: the first of these that a trial has."""


@dataclass(frozen=True)
class Report:
    """What a step of a trial showed.

    Attributes:
        row: the step's columns of `epochs.parquet`, but for study, trial_id, attempt and reported_at; None where the
            step ended in a verdict before its epoch was over.
        trial: the trial's columns of `trials.parquet` as far as a trial knows them.
        outcome: `RUNNING` until the trial is over.
    """

    row: dict[str, Value] | None
    trial: dict[str, Value]
    outcome: Outcome

    @property
    def done(self) -> bool:
        """True for the trial's last report."""
        return self.outcome is not Outcome.RUNNING


class Trial:
    """One trial of a study.

    Args:
        config: what to train.
        data: its images; read by name where not given.
        recorder: takes signals, sample grids and the trained model; None: they are dropped.
        gpu_share: GPUs reserved for it; below 1 others may run on the same one. None: it has the GPU for itself.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: ImageData | None = None,
        recorder: Recorder | None = None,
        *,
        gpu_share: float | None = None,
    ) -> None:
        started = time.perf_counter()
        self.config = config
        self.trainer = Trainer(config, data)
        self._setup_seconds = time.perf_counter() - started
        self.recorder = recorder
        if recorder:
            recorder.absent = absent_signals(config)
        self._evaluated_at = -1
        self._best: dict[str, tuple[float, int]] = {}
        self._best_errors: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._last_errors: dict[str, float] = {}
        self._initial: dict[str, float] = {}
        self._initial_errors: dict[str, float] = {}
        self._protocols: dict[str, str] = {}
        self._remarks: list[str] = list(self.trainer.data.remarks)
        self._model: tuple[str, int] | None = None
        self._train_seconds = self._evaluation_seconds = 0.0
        self._iteration_seconds: list[float] = []
        self._meter = EnergyMeter(self.trainer.device)
        self._energy: float | None = None
        self._energy_shared: bool | None = None
        if self.trainer.device.type == "cuda":
            self._energy = 0.0
            self._energy_shared = self._meter.shared or (gpu_share is not None and gpu_share < 1)

    def remark(self, text: str) -> None:
        """Add to what the trial's `message` says."""
        if text not in self._remarks:
            self._remarks.append(text)

    def step(self, on_iteration: Callable[[int], None] | None = None) -> Report:
        """Score the untrained model (first call), then train one epoch per call.

        Args:
            on_iteration: see `Trainer.train_epoch`.

        Returns:
            The step's report; after one that is `done` the trial must not be stepped again.
        """
        trainer = self.trainer
        self._meter.read()  # what the GPU took between two steps is no epoch's
        if self._evaluated_at < 0:
            spent = self._evaluate()
            row = self._row(None, spent, self._take_energy())
            return Report(row, self._trial_values(trainer.latch.read(), Outcome.RUNNING, None), Outcome.RUNNING)
        epoch = trainer.train_epoch(on_iteration)
        self._train_seconds += epoch.seconds
        if len(epoch.iterations):
            self._iteration_seconds.append(epoch.seconds / len(epoch.iterations))
        if self.recorder:
            self.recorder.add_signals(epoch.iterations, epoch.signals)
        if verdict := epoch.latch.verdict:
            self._write(force=True)
            if self.recorder and trainer.last_samples is not None:
                # The forensic record: the signals up to the end, and the samples of the end.
                self.recorder.write_grids({"end": to_grid(trainer.last_samples[:GRID_IMAGES])})
            self._take_energy()
            values = self._trial_values(epoch.latch, verdict.outcome, verdict.cause, verdict.iteration)
            return Report(None, values, verdict.outcome)
        last = trainer.epoch >= self.config.epochs
        seconds = None
        if last or trainer.epoch % self.config.evaluation.every == 0:
            seconds = self._evaluate()
        self._write(force=last)
        collapsed = last and self._worse_than_p0()
        if last and not collapsed and seconds is not None:
            seconds += self._write_model()
        row = self._row(epoch, seconds, self._take_energy())
        if not last:
            return Report(row, self._trial_values(epoch.latch, Outcome.RUNNING, None), Outcome.RUNNING)
        if collapsed:
            values = self._trial_values(epoch.latch, Outcome.COLLAPSED, Cause.WORSE_THAN_P0, trainer.iteration)
            return Report(row, values, Outcome.COLLAPSED)
        return Report(row, self._trial_values(epoch.latch, Outcome.COMPLETED, None), Outcome.COMPLETED)

    def _take_energy(self) -> float | None:
        """Joules of the step so far, added to the trial's. One step that was not measured leaves no sum to tell."""
        joules = self._meter.read()
        self._energy = None if joules is None or self._energy is None else self._energy + joules
        return joules

    def _evaluate(self) -> float:
        started = time.perf_counter()
        evaluation: Evaluation = self.trainer.evaluate()
        epoch = self._evaluated_at = self.trainer.epoch
        self._last, self._last_errors = evaluation.values, evaluation.errors
        self._protocols |= evaluation.protocols
        self._remarks += [r for r in evaluation.remarks if r not in self._remarks]
        if epoch == 0:
            self._initial, self._initial_errors = evaluation.values, evaluation.errors
        else:
            for name, value in evaluation.values.items():
                best = self._best.get(name)
                sign = 1 if METRIC_BY_NAME[name].direction == "minimize" else -1
                if best is None or sign * value < sign * best[0]:
                    self._best[name] = (value, epoch)
                    self._best_errors.pop(name, None)
                    if name in evaluation.errors:
                        self._best_errors[name] = evaluation.errors[name]
            self._keep_best()
        if self.recorder:
            self.recorder.write_grids(evaluation.grids)
        seconds = time.perf_counter() - started
        self._evaluation_seconds += seconds
        return seconds

    def _keep_best(self) -> None:
        """Keep the model of an epoch that is the best so far, unless the last epoch's is about to be kept anyhow."""
        metric = next((name for name in SELECTION if name in self._best), None)
        if metric is None or self._best[metric][1] != self.trainer.epoch:
            return
        self._model = metric, self.trainer.epoch
        if self.recorder and self.config.evaluation.keep_model and self.trainer.epoch < self.config.epochs:
            self.recorder.write_model(model_state(self.trainer), best=True)

    def _write(self, *, force: bool) -> None:
        if self.recorder:
            self.recorder.write_signals(force=force)

    def _write_model(self) -> float:
        """Keep the model of a trial that completed; returns the time it took, which counts as evaluation."""
        if not self.recorder or not self.config.evaluation.keep_model:
            return 0.0
        started = time.perf_counter()
        self.recorder.write_model(model_state(self.trainer))
        if self._model is not None and self._model[1] == self.trainer.epoch:
            self.recorder.last_is_best()
        seconds = time.perf_counter() - started
        self._evaluation_seconds += seconds
        return seconds

    def _begun(self) -> bool:
        """Whether training had begun in earnest, so that its samples tell anything of it."""
        trainer = self.trainer
        return begun(self.config, trainer.iteration, len(trainer.data.images))

    def _worse_than_p0(self) -> bool:
        """Samples of the buffer score worse than p0's own, which filled the buffer before training."""
        if not self._begun():
            return False
        for name in ("fd_buffer", "fid_buffer"):
            if name in self._last and name in self._initial:
                return beyond_error(
                    self._last[name],
                    self.config.divergence.collapse_ratio * self._initial[name],
                    self._last_errors.get(name, 0.0),
                    self.config.divergence.collapse_ratio * self._initial_errors.get(name, 0.0),
                )
        return False

    def _row(
        self, epoch: EpochReport | None, evaluation_seconds: float | None, joules: float | None
    ) -> dict[str, Value]:
        trainer = self.trainer
        row: dict[str, Value] = {
            "epoch": trainer.epoch,
            "iteration": trainer.iteration,
            "seconds": self._train_seconds + self._evaluation_seconds,
            "train_seconds": epoch.seconds if epoch else None,
            "evaluation_seconds": evaluation_seconds,
            "learning_rate": epoch.learning_rate if epoch else None,
            "loss": epoch.mean("loss") if epoch else None,
            "energy_gap": epoch.last("energy_gap") if epoch else None,
            "energy_gap_abs_max": epoch.largest("energy_gap") if epoch else None,
            "grad_param_norm": epoch.mean("grad_param_norm") if epoch else None,
            "cross_entropy": epoch.mean("cross_entropy") if epoch else None,
            "peak_memory_bytes": trainer.peak_memory(),
            "energy_joules": joules,
        }
        fresh = evaluation_seconds is not None
        for metric in METRICS:
            value = self._last.get(metric.name) if fresh else None
            row[metric.name] = value
            row[metric.error_column] = self._last_errors.get(metric.name) if value is not None else None
            row[metric.protocol_column] = self._protocols.get(metric.name) if value is not None else None
        return row

    def _trial_values(
        self, latch: LatchReading, outcome: Outcome, cause: Cause | None, iteration: int | None = None
    ) -> dict[str, Value]:
        trainer = self.trainer
        per_iteration = statistics.median(self._iteration_seconds) if self._iteration_seconds else None
        cut = outcome in (Outcome.DIVERGED, Outcome.COLLAPSED) and per_iteration is not None
        left = trainer.iterations_planned - trainer.iteration
        values: dict[str, Value] = {
            "outcome": outcome.value,
            "cause": cause.value if cause else None,
            "iteration": iteration,
            "alarm_iteration": latch.alarm_iteration,
            "alarm_cause": latch.alarm_cause.value if latch.alarm_cause else None,
            "loss_limit_iteration": latch.loss_limit_iteration,
            "undertrained": not self._begun() if outcome is Outcome.COMPLETED and self.config.samples else None,
            "epochs_done": trainer.epoch,
            "iterations_done": trainer.iteration,
            "iterations_planned": trainer.iterations_planned,
            "iterations_per_epoch": trainer.iterations_per_epoch,
            "train_seconds": self._train_seconds,
            "evaluation_seconds": self._evaluation_seconds,
            "saved_seconds": left * per_iteration if cut and per_iteration is not None else 0.0,
            "seconds_per_iteration": per_iteration,
            "model_metric": self._model[0] if self._model else None,
            "model_epoch": self._model[1] if self._model else None,
            "selected_on": self._selected_on(),
            "setup_seconds": self._setup_seconds,
            "first_iteration_seconds": trainer.first_iteration_seconds,
            "energy_joules": self._energy,
            "energy_shared": self._energy_shared,
            "execution": trainer.execution.name,
            "device": trainer.device.type,
            "hardware": trainer.hardware(),
            "data_source": trainer.data.source,
            "message": "; ".join(dict.fromkeys([*self._remarks, *trainer.remarks])) or None,
        }
        for metric in METRICS:
            best = self._best.get(metric.name)
            values[f"{metric.name}_best"] = best[0] if best else None
            values[metric.best_error_column] = self._best_errors.get(metric.name)
            values[f"{metric.name}_best_epoch"] = best[1] if best else None
            values[f"{metric.name}_last"] = self._last.get(metric.name)
            values[f"{metric.name}_initial"] = self._initial.get(metric.name)
            values[metric.protocol_column] = self._protocols.get(metric.name)
        assert not any(isinstance(v, float) and math.isnan(v) for v in values.values())
        return values

    def _selected_on(self) -> str | None:
        """The images that decided which model is best: a distance's reference, or those accuracy was taken on."""
        if self._model is None:
            return None
        if self._model[0] == "accuracy":
            return self.config.evaluation.accuracy_on
        source = "buffer" if self._model[0].endswith("buffer") else "fresh"
        return next((p.reference for p in self.trainer.protocols if p.source == source), None)

    def state_dict(self) -> dict[str, Any]:
        """The trainer and everything the trial has found so far; tensors and plain Python only."""
        self._write(force=True)
        return {
            "config": self.config.to_json(),
            "data_source": self.trainer.data.source,
            "threads": torch.get_num_threads(),
            "trainer": self.trainer.state_dict(),
            "evaluated_at": self._evaluated_at,
            "best": {name: list(best) for name, best in self._best.items()},
            "last": dict(self._last),
            "initial": dict(self._initial),
            "errors": {"best": self._best_errors, "last": self._last_errors, "initial": self._initial_errors},
            "protocols": dict(self._protocols),
            "remarks": list(self._remarks),
            "model": list(self._model) if self._model else None,
            "train_seconds": self._train_seconds,
            "evaluation_seconds": self._evaluation_seconds,
            "iteration_seconds": list(self._iteration_seconds),
            "energy_joules": self._energy,
            "energy_shared": self._energy_shared,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: the state is of another configuration or of other images.
        """
        if state["config"] != self.config.to_json():
            raise ValueError("the checkpoint is of another trial configuration")
        if state["data_source"] != self.trainer.data.source:
            raise ValueError(
                f"the checkpoint was trained on {state['data_source']}, but the images here are "
                f"{self.trainer.data.source}"
            )
        self.trainer.load_state_dict(state["trainer"])
        self._evaluated_at = int(state["evaluated_at"])
        self._best = {name: (float(value), int(epoch)) for name, (value, epoch) in state["best"].items()}
        self._last, self._initial = dict(state["last"]), dict(state["initial"])
        errors = state.get("errors", {})  # a checkpoint from before they were estimated has none
        self._best_errors, self._last_errors = dict(errors.get("best", {})), dict(errors.get("last", {}))
        self._initial_errors = dict(errors.get("initial", {}))
        self._protocols, self._remarks = dict(state["protocols"]), list(state["remarks"])
        self._model = (str(state["model"][0]), int(state["model"][1])) if state["model"] else None
        self._train_seconds = float(state["train_seconds"])
        self._evaluation_seconds = float(state["evaluation_seconds"])
        self._iteration_seconds = [float(s) for s in state["iteration_seconds"]]
        # A checkpoint from before energy was measured has none, so neither has what goes on from it.
        energy = state.get("energy_joules")
        self._energy = None if energy is None else float(energy)
        if state.get("energy_shared"):
            self._energy_shared = True
        if self.recorder:
            self.recorder.resume(self.trainer.iteration)

    def close(self) -> None:
        """Write what is left and give the device's memory back."""
        self._write(force=True)
        self._meter.close()
        self.trainer.close()
