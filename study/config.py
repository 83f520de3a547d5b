"""YAML to `StudyConfig`: the fixed fields of a trial, what is searched, seeds, objectives, budget and resources."""

from __future__ import annotations

import re
from collections import Counter
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from study.addresses import check_address
from study.errors import UserError, nearest, shown, validation_error
from study.yaml_input import parse_yaml, read_yaml, write_yaml
from trainables.config import StrictModel, TrialConfig
from trainables.methods import build_trial, merge
from trainables.schema import METRIC_BY_NAME

Scalar = bool | int | float | str | None
MOST = 10**9
"""Of anything that is counted or measured here."""
FARTHEST = 1e100
"""Ends of a range: the square of none is infinite."""
COST_METRICS = ("seconds_per_iteration", "train_seconds")
"""What else an objective can be: measured costs, minimised."""


class _Model(StrictModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Range(_Model):
    """One searched field: an interval (`low`, `high`, optionally `log` or `step`) or `choices`."""

    low: float | int | None = Field(None, description="smallest value, included")
    high: float | int | None = Field(None, description="largest value, included")
    log: bool = Field(False, description="uniform in the logarithm")
    step: float | int | None = Field(None, gt=0, description="grid within the interval")
    choices: tuple[Scalar, ...] | None = Field(None, description="the values to choose from")

    @model_validator(mode="after")
    def _either(self) -> Self:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("choices stand alone: no low, high, log or step beside them")
            if len(self.choices) == 0:
                raise ValueError("choices must not be empty")
            return self
        if self.low is None or self.high is None:
            raise ValueError("needs low and high, or choices")
        if self.low > self.high:
            raise ValueError(f"low <= high must hold, but got low={self.low}, high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range needs low > 0, but got low={self.low}")
        if self.log and self.step is not None:
            raise ValueError("log and step cannot be combined")
        if max(abs(self.low), abs(self.high)) > FARTHEST:
            raise ValueError(f"low and high must be within {FARTHEST:g} of 0, but are {self.low} and {self.high}")
        if self.step is not None and (self.high - self.low) / MOST > self.step:
            raise ValueError(f"step {self.step} makes more than {MOST:g} values of {self.low} to {self.high}")
        return self


class SearchConfig(_Model):
    """What varies from trial to trial."""

    sampler: Literal["tpe", "random", "nsga2", "gp", "grid"] = Field(
        "tpe", description="Optuna sampler, or a full grid"
    )
    trials: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="different settings to propose, or all if the space has fewer; times the seeds: trials",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the sampler")
    storage: str | None = Field(
        None,
        description="Optuna storage that several drivers share, such as postgresql+psycopg://user@host/optuna; "
        "${NAME} in it, or instead of it, is taken from the environment, as a password must be; null: optuna.db in the "
        "study's folder",
    )
    startup_trials: int = Field(8, ge=1, le=MOST, description="random settings before TPE or GP starts to model")
    space: dict[str, Range] = Field(default_factory=dict, description="searched trial fields (dotted for nested ones)")
    start: tuple[dict[str, Scalar], ...] = Field(
        (), description="settings to try first; what one leaves out is sampled"
    )
    grid: tuple[dict[str, Any], ...] = Field(
        (), description="blocks of a grid: each field has a value or a list; a block is the product of its lists"
    )

    @field_validator("storage")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value is not None:
            check_address(value)
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.sampler == "grid":
            if not self.grid:
                raise ValueError("sampler grid needs grid: a list of blocks")
            if self.space or self.start or self.trials is not None:
                raise ValueError("sampler grid takes no space, start or trials: the grid is all there is")
        else:
            if self.grid:
                raise ValueError(f"grid belongs to sampler grid, but sampler is {self.sampler}")
            if not self.space:
                raise ValueError("space is empty: name at least one trial field to search")
            if self.trials is None:
                raise ValueError(f"sampler {self.sampler} needs trials: how many settings to propose")
        return self


class Objective(_Model):
    """A number the search improves."""

    metric: str = Field(description="a quality metric (its best value so far), seconds_per_iteration or train_seconds")
    direction: Literal["minimize", "maximize"] | None = Field(None, description="null: the metric's own")

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str) -> str:
        known = [*METRIC_BY_NAME, *COST_METRICS]
        if value not in known:
            raise ValueError(f"must be one of {', '.join(known)}{nearest(value, known)}")
        return value

    @property
    def resolved_direction(self) -> Literal["minimize", "maximize"]:
        """The direction, filled in from the metric."""
        return self.direction or (
            METRIC_BY_NAME[self.metric].direction if self.metric in METRIC_BY_NAME else "minimize"
        )

    @property
    def column(self) -> str:
        """Column of `trials.parquet` with the value."""
        return f"{self.metric}_best" if self.metric in METRIC_BY_NAME else self.metric


class ResourcesConfig(_Model):
    """What one trial gets, and where."""

    cpus: Annotated[float, Field(gt=0, le=MOST)] | Literal["auto"] = Field(
        1.0, description="CPUs, and threads, of a trial; auto: its share of the cluster's, at most 4"
    )
    gpus: Annotated[float, Field(ge=0, le=MOST)] | Literal["auto"] = Field(
        0.0,
        description="GPUs of a trial. Nine tenths of a fraction are also its memory limit: the rest is for CUDA's "
        "contexts. auto: as many trials per GPU as memory and arithmetic allow (estimated; training's memory as `mebm "
        "bench` measured it, if its folder lies beside the study's), none where the cluster has none",
    )

    memory_gb: Annotated[float, Field(gt=0, le=MOST)] | None = Field(
        None,
        description="memory of the host that a trial may use, 10^9 bytes, its process included: as many run at once as "
        "fit a node, and one that uses more is ended and started again as after an error; null: no limit",
    )
    gpu_type: str | None = Field(
        None, description="only on nodes with this accelerator, by Ray's name for it, such as H100; null: any"
    )
    placement: Literal["pack", "spread"] = Field(
        "pack", description="fill one node after the other, or spread trials over the nodes"
    )

    @field_validator("gpus")
    @classmethod
    def _whole_or_fraction(cls, value: float | str) -> float | str:
        if isinstance(value, float) and value > 1 and value != int(value):
            raise ValueError("must be a fraction below 1 or a whole number")
        return value


class BudgetConfig(_Model):
    """When a study ends before its last trial: at the first of these. Running trials save and end as `stopped`."""

    hours: Annotated[float, Field(gt=0, le=MOST)] | None = Field(None, description="wall time of all runs of the study")
    gpu_hours: Annotated[float, Field(gt=0, le=MOST)] | None = Field(
        None, description="GPU-hours reserved by its trials, replayed work included"
    )
    trials: int | None = Field(None, ge=1, le=MOST, description="trials that start")
    deadline: datetime | None = Field(
        None, description="date and time, ISO 8601; without an offset it is the driver's local time"
    )


class PruningConfig(_Model):
    """Early stop of trials that do worse than others did by the same epoch.

    A trial that diverged or collapsed earlier stands last at every rung after its end: it is what the others are
    better than. A pruned trial is stable as far as it went; it is censored, and pruning on quality is informative
    censoring, so a study that asks for divergence rates leaves it off.
    """

    rule: Literal["none", "asha", "median"] = Field(
        "none",
        description="asha: asynchronous successive halving over epochs (Li et al. 2020); median: worse than the median",
    )
    metric: str | None = Field(
        None, description="the one metric that decides; null: the study's first objective that is a quality metric"
    )
    first_epoch: int = Field(1, ge=1, le=MOST, description="epoch before which none is pruned; ASHA's first rung")
    reduction: int = Field(
        3, ge=2, le=MOST, description="ASHA's eta: one in so many goes on, rungs at first_epoch * eta^i"
    )
    least: int = Field(3, ge=1, le=MOST, description="trials that must have come as far before the median rule prunes")

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in METRIC_BY_NAME:
            known = list(METRIC_BY_NAME)
            raise ValueError(f"must be one of {', '.join(known)}{nearest(value, known)}")
        return value


class RunConfig(_Model):
    """How trials are run."""

    checkpoint_seconds: Annotated[float, Field(ge=0, le=MOST)] = Field(
        60,
        description="least time between two checkpoints of a trial; what was trained since is done again after a kill",
    )
    max_failures: int = Field(
        2,
        ge=0,
        le=MOST,
        description="times a trial is started again after an error that another start can help: a lost worker or node, "
        "memory, a full disk, storage out of reach; a bug fails at once",
    )
    hang_minutes: Annotated[float, Field(gt=0, le=MOST)] | None = Field(
        60,
        description="a trial without a sign of life (an iteration or a report; its start is none) for so long is "
        "killed and started again; null: never",
    )
    node_seconds: Annotated[float, Field(ge=0, le=MOST)] = Field(
        45,
        description="a study that has no node left that can run a trial for so long ends, to be resumed; longer where "
        "others come in the place of nodes that were taken away",
    )
    drain_seconds: Annotated[float, Field(ge=0, le=MOST)] = Field(
        90, description="after SIGUSR1 trials may finish their epoch and save for so long"
    )
    checkpoint_gb: Annotated[float, Field(gt=0, le=MOST)] | None = Field(
        None,
        description="disk for checkpoints, 10^9 bytes; each running trial keeps two, so it limits how many run at "
        "once; null: what is free",
    )
    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        (), description="also log to these; each needs the extra of its name"
    )
    reuse_workers: bool = Field(
        True,
        description="train trial after trial in one process, so that only the first pays for its start; false: a "
        "process for every trial, whose end frees all its memory",
    )
    max_concurrent: int | None = Field(
        None, ge=1, le=MOST, description="trials at once; null: as many as the resources allow"
    )


class StudyConfig(_Model):
    """A study: many trials of one question."""

    name: str = Field(description="name of the study and of its folder")
    description: str = Field("", description="what the study asks")
    trial: dict[str, Any] = Field(default_factory=dict, description="fixed trial fields; see `mebm methods`")
    search: SearchConfig
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1, max_length=100_000, description="seeds of every setting"
    )
    objectives: tuple[Objective, ...] = Field(
        (Objective(metric="fd_buffer", direction=None),),
        min_length=1,
        max_length=20,
        description="what the search improves",
    )
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    pruning: PruningConfig = Field(default_factory=PruningConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @field_validator("resources", mode="before")
    @classmethod
    def _all_auto(cls, value: Any) -> Any:
        return {"cpus": "auto", "gpus": "auto"} if value == "auto" else value

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", value):
            raise ValueError("must be made of letters, digits, '_', '-' and '.', at most 200 of them")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"must be distinct, but {Counter(value).most_common(1)[0][0]} is there more than once")
        return value

    @model_validator(mode="after")
    def _pruning_metric(self) -> Self:
        if self.pruning.rule != "none" and self.pruning_metric is None:
            raise ValueError("pruning.metric must be named: no objective is a quality metric")
        return self

    @property
    def pruning_metric(self) -> str | None:
        """The metric that pruning looks at."""
        quality = [o.metric for o in self.objectives if o.metric in METRIC_BY_NAME]
        return self.pruning.metric or (quality[0] if quality else None)

    @property
    def varied(self) -> list[str]:
        """Names of the searched fields."""
        if self.search.sampler == "grid":
            return list(dict.fromkeys(key for block in self.search.grid for key in block))
        return list(self.search.space)

    def to_yaml(self) -> str:
        """The study as YAML that gives an equal study back."""
        return write_yaml(self.model_dump(mode="json"))


def packaged_configs() -> list[str]:
    """Names of the studies that ship with the package."""
    return sorted(
        f.name.removesuffix(".yaml") for f in resources.files("configs").iterdir() if f.name.endswith(".yaml")
    )


def read_config(config: str) -> tuple[str, dict[str, Any]]:
    """The raw mapping of a config, given a path or the name of a packaged one.

    Returns:
        What to call the source in a message, and the mapping.

    Raises:
        UserError: no such file, not YAML, not a mapping.
    """
    path = Path(config)
    if _is_there(path):
        source, values = str(path), read_yaml(path)
    elif config in packaged_configs():
        source = f"{config}.yaml"
        values = parse_yaml((resources.files("configs") / source).read_bytes(), source)
    else:
        names = packaged_configs()
        raise UserError(
            f"{shown(config, 300, quoted=False)}: no such file, and no packaged config ({', '.join(names)})"
            f"{nearest(config, names)}"
        )
    if not isinstance(values, dict):
        raise UserError(f"{source}: must be a mapping of keys to values, but is {type(values).__name__}")
    return source, values


def _is_there(path: Path) -> bool:
    """Whether a path is something else than a folder: one beside a packaged config's name does not hide it."""
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):  # too long for a name, a NUL
        return False


def parse_assignments(assignments: tuple[str, ...], option: str = "--set") -> list[tuple[str, Any]]:
    """`KEY=VALUE` texts of an option to pairs; the value is read as YAML.

    Raises:
        UserError: no `=`, or not YAML.
    """
    pairs = []
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            example = "trial.epochs=5" if option == "--set" else "fused_norm=true"
            raise UserError(f"{option} {shown(text, quoted=False)}: must be KEY=VALUE, for example {option} {example}")
        pairs.append((key.strip(), parse_yaml(value, f"{option} {shown(text, quoted=False)}")))
    return pairs


def assign(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`values` with the dotted `key` set."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return merge(values, value)


def load_study(config: str, assignments: tuple[str, ...] = ()) -> StudyConfig:
    """A validated study from a path or packaged name, with `--set` on top.

    A key of `--set` that is no study field but a trial field means `trial.KEY`.

    Raises:
        UserError: anything wrong with the file or the assignments.
    """
    source, values = read_config(config)
    return _assigned(values, assignments, source)


def change_study(study: StudyConfig, assignments: tuple[str, ...], source: str) -> StudyConfig:
    """A study with `--set` on top; see `load_study`."""
    return _assigned(study.model_dump(mode="json"), assignments, source) if assignments else study


def _assigned(values: dict[str, Any], assignments: tuple[str, ...], source: str) -> StudyConfig:
    for key, value in parse_assignments(assignments):
        head = key.split(".")[0]
        if head not in StudyConfig.model_fields and head in TrialConfig.model_fields:
            key = f"trial.{key}"
        elif head not in StudyConfig.model_fields:
            known = [*StudyConfig.model_fields, *TrialConfig.model_fields]
            raise UserError(f"--set {shown(key, quoted=False)}: unknown key{nearest(head, known)}")
        values = assign(values, key, value)
    return validate_study(values, source)


def validate_study(values: dict[str, Any], source: str) -> StudyConfig:
    """A study from a raw mapping; every setting it can propose is a valid trial.

    Raises:
        UserError: the first thing that is wrong.
    """
    try:
        study = StudyConfig.model_validate(values)
    except ValidationError as error:
        raise validation_error(source, error, StudyConfig) from error
    from study.space import build_space  # the space needs a StudyConfig's type

    build_space(study, source)
    if isinstance(study.trial.get("data_dir"), str):
        # Ray's workers have working directories of their own, so a path is made absolute where the user gave it.
        resolved = {**study.trial, "data_dir": str(Path(study.trial["data_dir"]).resolve())}
        study = study.model_copy(update={"trial": resolved})
    return study


def make_trial(values: dict[str, Any], source: str, prefix: str = "trial") -> TrialConfig:
    """`build_trial` with its findings as a `UserError`."""
    try:
        return build_trial(values)
    except ValidationError as error:
        raise validation_error(source, error, TrialConfig, prefix) from error
