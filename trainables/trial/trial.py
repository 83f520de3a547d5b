"""`Trial`: a `Trainer` with its evaluations, outcome and accounts, one report per epoch; with Ray or without."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.evaluation.own_metric import own_columns
from trainables.models.model_file import model_state
from trainables.results.own import OWN, own_metric_values
from trainables.results.schema import METRIC_BY_NAME, METRICS, RANKING, Cause, Outcome
from trainables.training.detector import LatchReading, begun, beyond_error
from trainables.training.trainer import GRID_IMAGES, EpochReport, Trainer, absent_signals, to_grid
from trainables.trial.gpu_energy import EnergyMeter
from trainables.trial.healthy import HealthyStates, copied
from trainables.trial.recorder import Recorder
from trainables.trial.report import Report as Report
from trainables.trial.report import Value


@dataclass
class Findings:
    """What a trial has found so far, under the names that its state has; by metric where it is a mapping.

    Attributes:
        evaluated_at: epoch of the newest evaluation; -1: none.
        best: score and epoch; `errors` are of best, last and initial.
        model: metric and epoch of the model that is kept as the best.
        energy_joules: of the whole trial; None where a step was not measured.
        rescue_from: of a rescue, the iteration of the healthy state it went on from.
    """

    evaluated_at: int = -1
    best: dict[str, tuple[float, int]] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    initial: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=lambda: {"best": {}, "last": {}, "initial": {}})
    protocols: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    model: tuple[str, int] | None = None
    train_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    iteration_seconds: list[float] = field(default_factory=list)
    energy_joules: float | None = None
    energy_shared: bool | None = None
    rescue_from: int | None = None


class Trial:
    """One trial of a study; without data they are read by name, without a recorder nothing is written.

    Args:
        gpu_share: GPUs reserved for it; below 1 others may run on the same one. None: it has the GPU for itself.
        brief_start: of the untrained model only what is quickly had is scored, see `Trainer.evaluate`.
        healthy: keeps what a rescue goes back to; the recorder writes it where the trial ends badly.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: ImageData | None = None,
        recorder: Recorder | None = None,
        *,
        gpu_share: float | None = None,
        brief_start: bool = False,
        healthy: HealthyStates | None = None,
    ) -> None:
        started = time.perf_counter()
        self.config = config
        self.trainer = Trainer(config, data)
        self._own = own_columns(self.trainer.metrics, (p.source for p in self.trainer.protocols))
        self._brief_start, self._healthy = brief_start, healthy
        self._setup_seconds = time.perf_counter() - started
        self.recorder = recorder
        if recorder:
            recorder.absent = absent_signals(config)
        self._meter = EnergyMeter(self.trainer.device)
        self._found = Findings(remarks=list(self.trainer.data.remarks))
        if self.trainer.device.type == "cuda":
            self._found.energy_joules = 0.0
            self._found.energy_shared = self._meter.shared or (gpu_share is not None and gpu_share < 1)

    @property
    def iteration(self) -> int:
        """Iterations finished."""
        return self.trainer.iteration

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.trainer.epoch

    def remark(self, text: str) -> None:
        """Add to what the trial's `message` says."""
        if text not in self._found.remarks:
            self._found.remarks.append(text)

    def step(self, on_iteration: Callable[[int], None] | None = None) -> Report:
        """Score the untrained model, then train an epoch per call until `done`; `on_iteration`: see `train_epoch`."""
        trainer = self.trainer
        self._meter.read()  # what the GPU took between two steps belongs to no epoch
        if self._found.evaluated_at < 0:
            row = self._row(None, self._timed(self._evaluate), self._take_energy())
            return self._report(row, trainer.latch.read(), Outcome.RUNNING)
        epoch = trainer.train_epoch(on_iteration)
        self._found.train_seconds += epoch.seconds
        if len(epoch.iterations):
            self._found.iteration_seconds.append(epoch.seconds / len(epoch.iterations))
        if self.recorder:
            self.recorder.add_signals(epoch.iterations, epoch.signals)
        if verdict := epoch.latch.verdict:
            self._write(force=True)
            if self.recorder and trainer.last_samples is not None:
                # The forensic record: the signals up to the end, and the samples of the end.
                self.recorder.write_grids({"end": to_grid(trainer.last_samples[:GRID_IMAGES])})
            self._take_energy()
            self._leave_healthy(verdict.outcome, epoch.latch, verdict.iteration)
            return self._report(None, epoch.latch, verdict.outcome, verdict.cause, verdict.iteration)
        last = trainer.epoch >= self.config.epochs
        seconds = None
        if last or trainer.epoch % self.config.evaluation.every == 0:
            seconds = self._timed(self._evaluate)
        self._write(force=last)
        collapsed = last and self._worse_than_p0()
        if last and not collapsed and seconds is not None:
            seconds += self._timed(self._write_model)
        row = self._row(epoch, seconds, self._take_energy())
        if collapsed:
            self._leave_healthy(Outcome.COLLAPSED, epoch.latch, trainer.iteration)
            return self._report(row, epoch.latch, Outcome.COLLAPSED, Cause.WORSE_THAN_P0, trainer.iteration)
        if self._healthy is not None and not last and epoch.latch.alarm_iteration is None:
            self._healthy.offer(trainer.iteration, self._margin(), self._trained)
        return self._report(row, epoch.latch, Outcome.COMPLETED if last else Outcome.RUNNING)

    def _margin(self) -> int:
        assert self._healthy is not None
        return self._healthy.margin(self.config, self.trainer.iterations_per_epoch)

    def _trained(self) -> dict[str, Any]:
        return {"epoch": self.trainer.epoch, "trainer": self.trainer.state_dict()}

    def _leave_healthy(self, outcome: Outcome, latch: LatchReading, iteration: int) -> None:
        """Write what a rescue goes on from: the newest healthy state, or the beginning."""
        healthy, found = self._healthy, self._found
        if healthy is None or self.recorder is None or outcome.value not in healthy.on:
            return
        state = healthy.before(latch.alarm_iteration, iteration, self._margin())
        self.recorder.write_healthy(
            (state or {"epoch": 0, "iteration": 0, "trainer": None})
            | {"config": self.config.to_json(), "data_source": self.trainer.data.source}
            | {"initial": found.initial, "errors": found.errors["initial"], "protocols": found.protocols}
        )

    def rescue(self, state: Mapping[str, Any]) -> None:
        """Go on from a healthy state of another trial, with this one's settings; a `ValueError`: of other images.

        Scores, times and signals are this trial's own, from here on; the untrained model's are the other's. Where the
        seeds differ so do the random numbers; equal ones go on where they were.
        """
        if state["data_source"] != self.trainer.data.source:
            raise ValueError(f"the healthy state was trained on {state['data_source']}, not on these images")
        other = TrialConfig.model_validate_json(state["config"])
        if state["trainer"] is not None:
            if self._healthy is not None:  # the next rescue may go back to it too
                self._healthy.kept = [copied({k: state[k] for k in ("epoch", "iteration", "trainer")})]
            self.trainer.take_over(state["trainer"], own_random=other.seed != self.config.seed)
        found, initial, errors = self._found, dict(state["initial"]), dict(state["errors"])
        found.evaluated_at, found.rescue_from = int(state["epoch"]), int(state["iteration"])
        found.initial, found.last, found.protocols = initial, dict(initial), dict(state["protocols"])
        found.errors |= {"initial": errors, "last": dict(errors)}

    def _take_energy(self) -> float | None:
        """Joules of the step so far, added to the trial's. One step that was not measured leaves no sum to tell."""
        joules, before = self._meter.read(), self._found.energy_joules
        self._found.energy_joules = None if joules is None or before is None else before + joules
        return joules

    def _timed(self, work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        self._found.evaluation_seconds += seconds
        return seconds

    def _evaluate(self) -> None:
        found = self._found
        evaluation = self.trainer.evaluate(brief=self._brief_start and self.trainer.iteration == 0)
        epoch = found.evaluated_at = self.trainer.epoch
        found.last, found.errors["last"] = evaluation.values, evaluation.errors
        found.protocols |= evaluation.protocols
        found.remarks += [r for r in evaluation.remarks if r not in found.remarks]
        if epoch == 0:
            found.initial, found.errors["initial"] = evaluation.values, evaluation.errors
        else:
            for name, value in evaluation.values.items():
                sign = (self._own.get(name) or METRIC_BY_NAME[name]).sign
                if name not in found.best or sign * value < sign * found.best[name][0]:
                    found.best[name] = value, epoch
                    found.errors["best"].pop(name, None)
                    if name in evaluation.errors:
                        found.errors["best"][name] = evaluation.errors[name]
            metric = next((name for name in RANKING if name in found.best), None)
            if metric is not None and found.best[metric][1] == epoch:
                found.model = metric, epoch
                if epoch < self.config.epochs:  # the last epoch's is kept anyhow
                    self._write_model(best=True)
        if self.recorder:
            self.recorder.write_grids(evaluation.grids)

    def _write(self, *, force: bool) -> None:
        if self.recorder:
            self.recorder.write_signals(force=force)

    def _write_model(self, *, best: bool = False) -> None:
        if self.recorder and self.config.evaluation.keep_model:
            self.recorder.write_model(model_state(self.trainer), best=best)
            if not best and self._found.model is not None and self._found.model[1] == self.trainer.epoch:
                self.recorder.last_is_best()

    def _begun(self) -> bool:
        """Whether training had begun in earnest, so that its samples tell anything of it."""
        return begun(self.config, self.trainer.iteration, len(self.trainer.data.images))

    def _worse_than_p0(self) -> bool:
        """Samples of the buffer score worse than p0's own, which filled the buffer before training."""
        last, initial = self._found.last, self._found.initial
        ranked = (m.name for m in METRICS if m.source == "buffer" and m.direction == "minimize" and m.rank is not None)
        name = next((n for n in ranked if n in last and n in initial), None)
        if name is None or not self._begun():
            return False
        ratio = self.config.divergence.collapse_ratio
        errors = [self._found.errors[moment].get(name, 0.0) for moment in ("last", "initial")]
        return beyond_error(last[name], ratio * initial[name], errors[0], ratio * errors[1])

    def _row(
        self, epoch: EpochReport | None, evaluation_seconds: float | None, joules: float | None
    ) -> dict[str, Value]:
        trainer = self.trainer
        row: dict[str, Value] = {
            "epoch": trainer.epoch,
            "iteration": trainer.iteration,
            "seconds": self._found.train_seconds + self._found.evaluation_seconds,
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
            value = self._found.last.get(metric.name) if fresh else None
            row[metric.name] = value
            row[metric.error_column] = self._found.errors["last"].get(metric.name) if value is not None else None
            row[metric.protocol_column] = self._found.protocols.get(metric.name) if value is not None else None
        return row | {name: self._found.last.get(name) if fresh else None for name in self._own}

    def _report(
        self,
        row: dict[str, Value] | None,
        latch: LatchReading,
        outcome: Outcome,
        cause: Cause | None = None,
        iteration: int | None = None,
    ) -> Report:
        trainer, found = self.trainer, self._found
        per_iteration = statistics.median(found.iteration_seconds) if found.iteration_seconds else None
        cut = outcome in (Outcome.DIVERGED, Outcome.COLLAPSED)
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
            "train_seconds": found.train_seconds,
            "evaluation_seconds": found.evaluation_seconds,
            "saved_seconds": left * per_iteration if cut and per_iteration is not None else 0.0,
            "seconds_per_iteration": per_iteration,
            "model_metric": found.model[0] if found.model else None,
            "model_epoch": found.model[1] if found.model else None,
            "selected_on": self._selected_on(),
            "setup_seconds": self._setup_seconds,
            "first_iteration_seconds": trainer.first_iteration_seconds,
            "energy_joules": found.energy_joules,
            "energy_shared": found.energy_shared,
            "rescue_from": found.rescue_from,
            "execution": trainer.execution.name,
            "device": trainer.device.type,
            "hardware": trainer.hardware(),
            "data_source": trainer.data.source,
            "message": "; ".join(dict.fromkeys([*found.remarks, *trainer.remarks])) or None,
        }
        for metric in METRICS:
            best, best_epoch = found.best.get(metric.name, (None, None))
            values[f"{metric.name}_best"] = best
            values[metric.best_error_column] = found.errors["best"].get(metric.name)
            values[f"{metric.name}_best_epoch"] = best_epoch
            values[f"{metric.name}_last"] = found.last.get(metric.name)
            values[f"{metric.name}_initial"] = found.initial.get(metric.name)
            values[metric.protocol_column] = found.protocols.get(metric.name)
        for column, own in self._own.items():
            told = {"direction": own.direction, "unit": own.unit, "protocol": found.protocols.get(column)}
            ends = found.best.get(column), found.last.get(column), found.initial.get(column)
            values |= own_metric_values(column.removeprefix(OWN), told, *ends)
        assert not any(isinstance(v, float) and math.isnan(v) for v in values.values())
        return Report(row, values, outcome)

    def _selected_on(self) -> str | None:
        """The images that decided which model is best: a distance's reference, or those accuracy was taken on."""
        if self._found.model is None:
            return None
        source = METRIC_BY_NAME[self._found.model[0]].source
        if source is None:
            return self.config.evaluation.accuracy_on
        return next((p.reference for p in self.trainer.protocols if p.source == source), None)

    def state_dict(self) -> dict[str, Any]:
        """The trainer and everything the trial has found so far; tensors and plain Python only."""
        self._write(force=True)
        return {
            "config": self.config.to_json(),
            "data_source": self.trainer.data.source,
            "threads": torch.get_num_threads(),
            "trainer": self.trainer.state_dict(),
            **asdict(self._found),
            **({"healthy": self._healthy.kept} if self._healthy is not None else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; a `ValueError` if that was another configuration or other images."""
        if TrialConfig.model_validate_json(state["config"]) != self.config:
            raise ValueError("the checkpoint is of another trial configuration")
        if state["data_source"] != self.trainer.data.source:
            raise ValueError(
                f"the checkpoint was trained on {state['data_source']}, but the images here are "
                f"{self.trainer.data.source}"
            )
        self.trainer.load_state_dict(state["trainer"])
        # A checkpoint from before errors were estimated, or energy measured, has none, nor has what goes on from it.
        shared = self._found.energy_shared
        self._found = Findings(**deepcopy({f.name: state[f.name] for f in fields(Findings) if f.name in state}))
        self._found.energy_shared = bool(state.get("energy_shared")) or shared
        if self._healthy is not None:
            self._healthy.kept = list(state.get("healthy") or ())
        if self.recorder:
            self.recorder.resume(self.trainer.iteration)

    def close(self) -> None:
        """Write what is left and give the device's memory back."""
        self._write(force=True)
        self._meter.close()
        self.trainer.close()
