"""What a trial reports: names, types, units and meanings of the columns of every table. Standard library only.

null means "not measured"; NaN is never written as a number. Signals are the exception: there a NaN or an infinity is
what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from trainables.results.metric import Metric as Metric
from trainables.results.registry import records

SCHEMA_VERSION = 3
"""Of the tables, the manifest and the journal; `analysis/results/versions.py` says what earlier ones looked like."""

ColumnType = Literal["string", "int64", "float64", "bool"]


class Outcome(StrEnum):
    """How a trial stands or ended. A run is "stable for n iterations", never "stable"."""

    PENDING = "pending"
    """Proposed, not started."""
    RUNNING = "running"
    COMPLETED = "completed"
    """Trained for its whole budget without tripping the detector's verdict."""
    DIVERGED = "diverged"
    """Non-finite or blown-up energies: a measured result, not an error."""
    COLLAPSED = "collapsed"
    """Bounded energies, useless model: the L2 term's trivial optimum, or samples worse than p0's own."""
    STOPPED = "stopped"
    """Cut off by the study's budget; censored at its last iteration."""
    PRUNED = "pruned"
    """Ended early because other trials did better by then (`pruning`); censored at its last iteration."""
    INTERRUPTED = "interrupted"
    """Cut off by an interrupt, a kill or a lost machine; `mebm resume` goes on with it."""
    FAILED = "failed"
    """An error: a bug, out of memory, a lost worker. Says nothing about stability."""

    @property
    def finished(self) -> bool:
        """True where a resumed study does not run the trial again."""
        return self not in (Outcome.PENDING, Outcome.RUNNING, Outcome.INTERRUPTED)


class Cause(StrEnum):
    """Why a trial diverged or collapsed, or why the detector raised its alarm."""

    NONFINITE_LOSS = "nonfinite_loss"  # the released check `|loss| > 1e5` is False for NaN
    NONFINITE_ENERGY = "nonfinite_energy"
    NONFINITE_GRADIENT = "nonfinite_gradient"
    LOSS_LIMIT = "loss_limit"
    ENERGY_MAGNITUDE = "energy_magnitude"  # off by default: energies have a free offset
    GRADIENT_NORM = "gradient_norm"  # off by default
    ENERGY_GAP_HARD = "energy_gap_hard"
    ENERGY_GAP = "energy_gap"
    TRIVIAL_OPTIMUM = "trivial_optimum"
    WORSE_THAN_P0 = "worse_than_p0"  # by more than sampling error, after training had begun (`detector.begun`)


CAUSE_TEXT: dict[Cause, str] = {
    Cause.NONFINITE_LOSS: "loss is not finite",
    Cause.NONFINITE_ENERGY: "an energy is not finite",
    Cause.NONFINITE_GRADIENT: "gradient is not finite",
    Cause.LOSS_LIMIT: "|loss| above its limit",
    Cause.ENERGY_MAGNITUDE: "max |E| above its limit",
    Cause.GRADIENT_NORM: "gradient norm above its limit",
    Cause.ENERGY_GAP_HARD: "energy gap above the hard limit",
    Cause.ENERGY_GAP: "energy gap ran away",
    Cause.TRIVIAL_OPTIMUM: "energy gap at the L2 term's trivial optimum",
    Cause.WORSE_THAN_P0: "samples worse than p0's own",
}
"""A cause in words, for the console and the report."""


@dataclass(frozen=True)
class DetectorRule:
    """Thresholds of the divergence detector, free of the energies' arbitrary offset (`config.parts.DivergenceConfig`).

    Alarm when |gap| > min(gap_limit, l2_fraction / lambda) for `gap_patience` iterations in a row (lambda > 0; else
    gap_limit alone), |gap| > hard_gap_limit once, |generative loss| > loss_limit once (the released check,
    train_maebm.py), or a checked signal is not finite. gap = mean E(x+) - mean E(x-), in energy units.
    """

    gap_limit: float = 2.0
    gap_patience: int = 3
    l2_fraction: float = 0.5
    hard_gap_limit: float = 20.0
    loss_limit: float = 1e5

    def limit_for(self, l2_weight: float) -> float:
        """The limit on |energy gap| for a run whose L2 term has weight `l2_weight` (lambda >= 0)."""
        return min(self.gap_limit, self.l2_fraction / l2_weight) if l2_weight > 0 else self.gap_limit

    def __post_init__(self) -> None:
        for name in ("gap_limit", "l2_fraction", "hard_gap_limit", "loss_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, but got {getattr(self, name)}")
        if self.gap_patience < 1:
            raise ValueError(f"gap_patience must be >= 1, but got {self.gap_patience}")


@dataclass(frozen=True)
class Column:
    """One column of a results table."""

    name: str
    type: ColumnType
    meaning: str
    unit: str = ""
    added: int = 0
    """The last version of the schema whose files may lack it: there it is read as nulls."""
    symbol: str = ""
    """In formulas, tables and figures; empty: its name."""
    direction: str = ""
    """minimize or maximize, of an added column; empty: no way is better."""


METRICS: tuple[Metric, ...] = tuple(sorted(records("trainables.evaluation.metrics", "METRICS"), key=lambda m: m.place))
"""Every metric, in the order of the columns."""
METRIC_BY_NAME: dict[str, Metric] = {m.name: m for m in METRICS}
RANKING: tuple[str, ...] = tuple(m.name for m in sorted(METRICS, key=lambda m: m.rank or 0) if m.rank is not None)
"""Metrics that choose a trial's best model: the first of these that was measured."""
_BEFORE = "; of a diverged trial the best before it diverged"
_ERROR = "standard error of the score's own sampling; null where not estimated. Training's chance is not in it"

SIGNALS: tuple[Column, ...] = (
    Column("energy_data_mean", "float64", "mean E(x+) over the batch", "energy"),
    Column("energy_sample_mean", "float64", "mean E(x-) over the batch", "energy"),
    Column("energy_gap", "float64", "energy_data_mean - energy_sample_mean", "energy"),
    Column("loss", "float64", "generative loss, L2 term included; the released check looks at its size", "energy"),
    Column("energy_abs_max", "float64", "max |E| over x+ and x-", "energy"),
    Column("grad_param_norm", "float64", "L2 norm of the parameters' gradient"),
    Column("clamped_pixel_share", "float64", "share of pixels of x- at the box's edge", "fraction"),
    Column("cross_entropy", "float64", "cross-entropy of the labelled batch; null without a classifier", "nat"),
)
"""What is recorded of every iteration, in the order of the device-side record."""
SIGNAL_NAMES: tuple[str, ...] = tuple(s.name for s in SIGNALS)

SIGNAL_COLUMNS: tuple[Column, ...] = (
    Column("trial_id", "string", "the trial"),
    Column("iteration", "int64", "training iteration, from 0"),
    *SIGNALS,
)

EPOCH_COLUMNS: tuple[Column, ...] = (
    Column("study", "string", "name of the study"),
    Column("trial_id", "string", "the trial; unique in its study"),
    Column("epoch", "int64", "epochs finished; 0 is the untrained model, whose buffer is p0"),
    Column("attempt", "int64", "which start of the trial produced the row, from 1"),
    Column("iteration", "int64", "iterations finished"),
    Column("seconds", "float64", "wall time of the trial so far, training and evaluation, replays not counted", "s"),
    Column("train_seconds", "float64", "wall time of this epoch's training", "s"),
    Column("evaluation_seconds", "float64", "wall time of this epoch's evaluation", "s"),
    Column("learning_rate", "float64", "learning rate of the epoch's last iteration"),
    Column("loss", "float64", "mean generative loss over the epoch's iterations", "energy"),
    Column("energy_gap", "float64", "energy gap at the epoch's last iteration", "energy"),
    Column("energy_gap_abs_max", "float64", "largest |energy gap| of the epoch", "energy"),
    Column("grad_param_norm", "float64", "mean norm of the parameters' gradient over the epoch"),
    Column("cross_entropy", "float64", "mean cross-entropy of the labelled batches", "nat"),
    Column("peak_memory_bytes", "int64", "peak device memory; null on a CPU", "byte"),
    Column("energy_joules", "float64", "energy its GPU took during the epoch, by NVML; null without", "J"),
    *(
        c
        for m in METRICS
        for c in (
            Column(m.name, "float64", m.meaning, m.unit, m.added),
            Column(m.error_column, "float64", _ERROR, m.unit, max(2, m.added)),
            Column(m.protocol_column, "string", f"protocol id of {m.name}", added=m.added),
        )
    ),
    Column("reported_at", "string", "UTC time of the report, ISO 8601"),
)

SETTING_FIELDS: tuple[Column, ...] = (
    Column("method", "string", "training method, a name of `mebm methods`"),
    Column("dataset", "string", "name of the data set"),
    Column("network", "string", "the network, such as wrn-28-10 or conv-16"),
    Column("norm", "string", "normalisation: batch, none, spectral or instance"),
    Column("initial", "string", "the sampler's initial distribution p0; null without chains"),
    Column("sampling_steps", "int64", "K: Langevin steps per iteration; null without chains"),
    Column("step_size", "float64", "alpha: Langevin step size"),
    Column("noise_std", "float64", "sigma: standard deviation of the Langevin noise"),
    Column("gradient_clamp", "float64", "elementwise clamp of the sampler's gradient; null without"),
    Column("buffer_size", "int64", "|B|: slots of the replay buffer; null without one", "image"),
    Column("reinit_probability", "float64", "rho: probability that a chain restarts from p0", "fraction"),
    Column("buffer", "string", "policy of the replay buffer: replace, ring, reservoir or none"),
    Column("l2_weight", "float64", "lambda: weight of the L2 term on the energies"),
    Column("l2_form", "string", "form of the L2 term: paper, released or batch_means"),
    Column("class_weight", "float64", "weight of the cross-entropy (VERA's alpha); null without one"),
    Column("f_divergence", "string", "the f-divergence of a method with a critic; null otherwise"),
    Column("optimiser", "string", "sgd or adam"),
    Column("learning_rate", "float64", "base learning rate"),
    Column("batch_size", "int64", "images per energy batch", "image"),
    Column("precision", "string", "fp32, tf32 or bf16"),
    Column("epochs", "int64", "planned epochs"),
    Column("iterations_per_epoch", "int64", "iterations in an epoch"),
)
"""The settings of a trial as columns; the complete configuration is in `config` as JSON."""
SETTING_NAMES: tuple[str, ...] = tuple(c.name for c in SETTING_FIELDS)
UNWRITTEN: Mapping[str, Any] = {"sam_rho": 0.0, "sam_adaptive": False}
"""Fields that came later: the configuration of a trial leaves them out at these values, at which they do nothing."""


def with_unwritten(config: dict[str, Any]) -> dict[str, Any]:
    """A trial's configuration with the fields that it leaves out; that of a script or an import has none of them."""
    return config if not config or isinstance(config.get("kind"), str) else {**UNWRITTEN, **config}


TRIAL_COLUMNS: tuple[Column, ...] = (
    Column("study", "string", "name of the study"),
    Column("trial_id", "string", "the trial; unique in its study"),
    Column("setting_id", "string", "equal for trials that differ in their seed alone"),
    Column("seed", "int64", "seed of every random draw of the trial"),
    Column("outcome", "string", "one of Outcome"),
    Column("cause", "string", "one of Cause: why it diverged or collapsed; null otherwise"),
    Column("iteration", "int64", "iteration at which it diverged or collapsed; null otherwise"),
    Column("alarm_iteration", "int64", "first iteration at which the detector raised its alarm; null if never"),
    Column("alarm_cause", "string", "one of Cause: what raised the alarm"),
    Column("loss_limit_iteration", "int64", "first iteration at which the released check would stop; null if never"),
    Column("undertrained", "bool", "true of a completed trial too short for a verdict on its quality", added=2),
    Column("epochs_done", "int64", "epochs finished"),
    Column("iterations_done", "int64", "iterations finished"),
    Column("iterations_planned", "int64", "iterations of the whole budget"),
    *SETTING_FIELDS,
    *(
        c
        for m in METRICS
        for c in (
            Column(f"{m.name}_best", "float64", f"best {m.name}{_BEFORE}", m.unit, m.added),
            Column(m.best_error_column, "float64", _ERROR, m.unit, max(2, m.added)),
            Column(f"{m.name}_best_epoch", "int64", f"epoch of {m.name}_best", added=m.added),
            Column(f"{m.name}_last", "float64", f"last {m.name}", m.unit, m.added),
            Column(f"{m.name}_initial", "float64", f"{m.name} at epoch 0: p0's own", m.unit, m.added),
            Column(m.protocol_column, "string", f"protocol id of {m.name}", added=m.added),
        )
    ),
    Column("seconds", "float64", "wall time spent on the trial in all attempts", "s"),
    Column("train_seconds", "float64", "of which training that counts", "s"),
    Column("evaluation_seconds", "float64", "of which evaluation that counts", "s"),
    Column("replayed_seconds", "float64", "of which spent in attempts whose work was lost and done again", "s"),
    Column(
        "saved_seconds", "float64", "training time the early stop saved: iterations left times time per iteration", "s"
    ),
    Column("seconds_per_iteration", "float64", "median over epochs, evaluation not counted", "s"),
    Column("setup_seconds", "float64", "from the start of its last attempt to a trial that can train", "s"),
    Column(
        "first_iteration_seconds",
        "float64",
        "time of the first iteration of its last attempt, compilation included",
        "s",
    ),
    Column("execution", "string", "how iterations were issued: eager, compiled, graphed, compiled-graphed"),
    Column("model_metric", "string", "the metric by which the best model was kept, models/ID_best.pt"),
    Column("model_epoch", "int64", "epoch of that model; of a diverged trial the best before it diverged"),
    Column("selected_on", "string", "images that decided which was best: train, test or validation"),
    Column("gpus", "float64", "GPUs reserved for the trial; 0 on a CPU", "GPU"),
    Column("energy_joules", "float64", "energy its GPU took for the epochs that count, from NVML", "J"),
    Column("energy_shared", "bool", "true where other trials ran on that GPU: the energy is theirs too"),
    Column("attempts", "int64", "times the trial was started"),
    Column("rescue", "int64", "of a rescue: which one of its trial, from 1; null for a trial of the search", added=3),
    Column("rescue_of", "string", "of a rescue: the trial of the search that it rescues", added=3),
    Column("rescue_from", "int64", "of a rescue: iteration of the healthy state it went on from", added=3),
    Column("rescues", "int64", "how often the trial was rescued after it had ended as said here", added=3),
    Column("rescued", "string", "outcome of its last rescue; null of a trial that was not rescued", added=3),
    Column(
        "rescue_seconds",
        "float64",
        "wall time of its rescues, which is in their rows and not in `seconds`",
        "s",
        added=3,
    ),
    Column("lost_seconds", "float64", "wall time of ended attempts that no row holds: set-up, parts of epochs", "s"),
    Column("device", "string", "device it trained on: cpu or cuda"),
    Column("hardware", "string", "name of that device"),
    Column("data_source", "string", "where the images came from, with a fingerprint of them"),
    Column("message", "string", "the error of a failed trial, or a remark (a metric that could not be taken)"),
    Column("started_at", "string", "UTC time of the first start, ISO 8601"),
    Column("ended_at", "string", "UTC time of the end, ISO 8601"),
    Column("config", "string", "the complete trial configuration as JSON with sorted keys"),
)

ATTEMPT_COLUMNS: tuple[Column, ...] = (
    Column("study", "string", "name of the study"),
    Column("trial_id", "string", "the trial"),
    Column("attempt", "int64", "which start of the trial, from 1"),
    Column("node", "string", "address of the node it ran on, once it has reported"),
    Column("gpus", "float64", "GPUs reserved for it", "GPU"),
    Column("first_epoch", "int64", "epoch it went on from: 0, or that of the checkpoint it started from"),
    Column("last_epoch", "int64", "last epoch it reported"),
    Column("seconds", "float64", "wall time from its start to its end, or to its last sign of life", "s"),
    Column("replayed_seconds", "float64", "of which epochs that a later attempt did again", "s"),
    Column("lost_seconds", "float64", "of which after its last report: no row holds that work", "s"),
    Column("ended", "string", "finished, failed, interrupted, stopped, killed (its driver was) or running"),
    Column("reason", "string", "why it failed; null otherwise"),
    Column("started_at", "string", "UTC time of its start, ISO 8601"),
    Column("ended_at", "string", "UTC time of its end or last sign of life, ISO 8601"),
)
"""`attempts.parquet`: one row per start of a trial."""

BENCH_COLUMNS: tuple[Column, ...] = (
    Column("bench", "string", "the run of `mebm bench` the row is from"),
    Column("row_id", "string", "the row; unique in its run"),
    Column("implementation", "string", "package, or released-loop: its authors' loop, restated"),
    Column("method", "string", "training method, a name of `mebm methods`"),
    Column("sampling_steps", "int64", "K: Langevin steps per iteration; null without chains"),
    Column("dataset", "string", "name of the data set whose images' shape was used"),
    Column("network", "string", "the network"),
    Column("norm", "string", "normalisation"),
    Column("precision", "string", "fp32, tf32 or bf16; of the released loop PyTorch's default for its device"),
    Column("execution", "string", "eager, compiled, graphed or compiled-graphed: what was really done"),
    Column("memory_format", "string", "channels-last or contiguous"),
    Column("options", "string", "fields for speed alone that are not at their defaults, joined by +"),
    Column("batch_size", "int64", "images per energy batch", "image"),
    Column("label_batch_size", "int64", "images per labelled batch", "image"),
    Column("threads", "int64", "CPU threads of the training process"),
    Column("loader_workers", "int64", "processes of each data loader of the released loop; null for the package"),
    Column("seconds_per_iteration", "float64", "median over windows", "s"),
    Column("seconds_low", "float64", "lower quartile of the windows", "s"),
    Column("seconds_high", "float64", "upper quartile of the windows", "s"),
    Column("windows", "int64", "windows timed"),
    Column("iterations", "int64", "iterations in a window"),
    Column("first_seconds", "float64", "time of the first iteration, compilation included", "s"),
    Column("flops_per_iteration", "float64", "operations of an iteration, from the network's shape", "FLOP"),
    Column("flops_per_second", "float64", "operations per second", "FLOP/s"),
    Column("peak_flops_per_second", "float64", "of a large matrix product at this precision, measured", "FLOP/s"),
    Column("mfu", "float64", "flops_per_second / peak_flops_per_second", "fraction"),
    Column("peak_memory_bytes", "int64", "largest device memory of the row's training; null on a CPU", "byte"),
    Column("speedup_over_baseline", "float64", "median over rounds of the released loop's time / the row's"),
    Column("speedup_over_jem", "float64", "time of JEM(K=20) at the row's precision and execution / the row's"),
    Column("device", "string", "cpu or cuda"),
    Column("hardware", "string", "name of that device"),
    Column("created_at", "string", "UTC time of the run, ISO 8601"),
    Column("config", "string", "the complete trial configuration as JSON with sorted keys"),
)
"""`bench.parquet`, what `mebm bench` measures."""

EVALUATION_COLUMNS: tuple[Column, ...] = (
    Column("study", "string", "name of the study, or of the folder of the file"),
    Column("trial_id", "string", "the trial, or the file's name"),
    Column("model", "string", "last, best, or checkpoint"),
    Column("model_digest", "string", "hash of the file that was scored"),
    Column("epoch", "int64", "epochs it was trained for"),
    Column("method", "string", "training method"),
    Column("protocol", "string", "name of the protocol"),
    Column("protocol_digest", "string", "hash of everything the protocol says"),
    Column("source", "string", "buffer, fresh or images (of the data set)"),
    Column("made_by", "string", "how fresh samples were made, such as 20steps or generator; null otherwise"),
    Column("samples", "int64", "images that were scored", "image"),
    Column(
        "metric",
        "string",
        "fd, fid, isc, kid, mmd, precision, recall, density, coverage, memorisation, fid_infinity, accuracy, ece, "
        "auroc_..., robust_accuracy_NORM_RADIUS; isc_sd and kid_sd are torch-fidelity's own, over splits and subsets",
    ),
    Column("value", "float64", "the number"),
    Column("low", "float64", "lower end of its 95% interval over draws of the samples; null where none was taken"),
    Column("high", "float64", "upper end of it"),
    Column("se", "float64", "standard error of the score's own sampling; null where not estimated", added=2),
    Column("reference", "string", "what it is compared with: data, images, extractor; null for a metric without"),
    Column("seed", "int64", "seed of fresh samples"),
    Column("seconds", "float64", "time of the protocol's scoring", "s"),
    Column("device", "string", "where it was scored"),
    Column("remark", "string", "what could not be had, or was done otherwise"),
    Column("created_at", "string", "UTC time, ISO 8601"),
)
SCORE_COLUMNS: tuple[Column, ...] = (
    Column("model", "string", "the model that made the images, as its row in the paper's tables is called"),
    Column("source", "string", "file or folder the images were read from, without the folders above it"),
    Column("digest", "string", "SHA-256 of their pixels, whatever form the file has"),
    Column("dataset", "string", "data set they are compared with"),
    Column("data_source", "string", "where that was read from, with a hash of its images"),
    Column("protocol", "string", "name of the protocol"),
    Column("protocol_digest", "string", "hash of everything the protocol says"),
    Column("samples", "int64", "images that were scored", "image"),
    Column(
        "metric",
        "string",
        "a metric of `mebm score --metrics`, or fd; isc_sd and kid_sd are torch-fidelity's own",
    ),
    Column("value", "float64", "the number"),
    Column("se", "float64", "standard error of the score's own sampling; null where not estimated"),
    Column("reference", "string", "what it is compared with: data, images, extractor"),
    Column("departures", "string", "where the images are not what the protocol asks for; separated by semicolons"),
    Column("remark", "string", "what could not be had"),
    Column("seconds", "float64", "time of the protocol's scoring", "s"),
    Column("device", "string", "where it was scored"),
    Column("created_at", "string", "UTC time, ISO 8601"),
)
DIAGNOSIS_COLUMNS: tuple[Column, ...] = (
    Column("study", "string", "name of the study, or of the folder of the file"),
    Column("trial_id", "string", "the trial, or the file's name"),
    Column("model", "string", "last, best, or checkpoint"),
    Column("model_digest", "string", "hash of the file"),
    Column("method", "string", "training method"),
    Column("start", "string", "where the chains begin: p0, data (test images) or buffer"),
    Column("step", "int64", "Langevin steps from there, of the trial's sampler"),
    Column("chains", "int64", "how many chains"),
    Column("energy_mean", "float64", "mean energy over the chains; its offset is free"),
    Column("energy_low", "float64", "10% quantile over the chains"),
    Column("energy_high", "float64", "90% quantile over the chains"),
    Column("energy_data_mean", "float64", "mean energy of test images"),
    Column("energy_data_sd", "float64", "standard deviation of it over images"),
    Column("fd", "float64", "Frechet distance of the chains to the training images on a small classifier's features"),
    Column("fd_se", "float64", "its standard error over draws of the chains; null below 40"),
    Column("clamped_pixel_share", "float64", "pixels at an end of their range", "fraction"),
    Column("moved", "float64", "root mean square distance per pixel from the start, of a range of 2", "pixel value"),
    Column(
        "autocorrelation_time",
        "float64",
        "of the energy in the second half; null: too long to tell",
        "step",
    ),
    Column("r_hat", "float64", "split R-hat of the energies in the second half"),
    Column("reference", "string", "extractor and images of the FD"),
    Column("seed", "int64", "of the chains"),
    Column("device", "string", "where they ran"),
    Column("created_at", "string", "UTC time, ISO 8601"),
)
"""`evaluations.parquet`, what `mebm evaluate` measures: one row per model, protocol and metric."""
