"""`StudyConfig`: the fixed fields of a trial, what is searched, seeds, objectives, budget and resources."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from study.config.errors import nearest
from study.config.fields import is_script
from study.config.own_objectives import own_objectives
from study.config.rescue import RescueConfig
from study.config.script import AUTO
from study.config.search import MAX, MODELLING, Count, Part, SearchConfig
from study.config.space import Space, any_value, build_space
from study.config.yaml_input import write_yaml
from trainables.config.script import ScriptConfig
from trainables.plugins.installed import BUILT_IN, registered
from trainables.results.own import OWN, SET, is_own
from trainables.results.schema import METRIC_BY_NAME

COST_METRICS = ("seconds_per_iteration", "train_seconds")
"""What else an objective can be: measured costs, minimised."""
Positive = Annotated[float, Field(gt=0, le=MAX)]
NotNegative = Annotated[float, Field(ge=0, le=MAX)]


def _one_of(known: Callable[[], list[str]], also: Callable[[str], bool] = lambda _: False) -> AfterValidator:
    def check(value: str) -> str:
        if value not in known() and not also(value):
            raise ValueError(f"must be one of {', '.join(known())}{nearest(value, known())}")
        return value

    return AfterValidator(check)


def _loggers() -> list[str]:
    """A logger is a module of `study.loggers`, known by its file, or an installed plug-in."""
    return [*_own_loggers(), *registered("logger")]


def _own_loggers() -> list[str]:
    places = list(getattr(importlib.util.find_spec("study.loggers"), "submodule_search_locations", None) or ())
    return sorted({module.name for module in pkgutil.iter_modules(places)} - {"base", "build"})


BUILT_IN["logger"] = _own_loggers


def _of_own(metric: str) -> bool:
    return metric == AUTO or (metric.startswith(OWN) and is_own(metric))


class Objective(Part):
    """A number the search improves."""

    metric: Annotated[str, _one_of(lambda: [*METRIC_BY_NAME, *COST_METRICS], _of_own)]
    """A quality metric (its best value so far), also one of evaluation.metrics (NAME_buffer, NAME_fresh);
    seconds_per_iteration or train_seconds; of a script's study a metric that it reports, auto: the first one that it
    declares with a direction."""
    direction: Literal["minimize", "maximize"] | None = None
    """null: the metric's own."""

    @property
    def resolved_direction(self) -> Literal["minimize", "maximize"]:
        """The direction, filled in from the metric."""
        known = METRIC_BY_NAME.get(self.metric)
        return self.direction or (known.direction if known else "minimize")

    @property
    def column(self) -> str:
        """Column of `trials.parquet` with the value."""
        return self.metric if self.metric in COST_METRICS else f"{self.metric}_best"

    def resolved(self, trial: Mapping[str, Any]) -> Objective | None:
        """With what a trial's columns tell of it: a script says itself what its metrics are.

        None: `auto`, and the script has declared no metric with a direction.
        """
        metric = self.metric
        if metric == AUTO:
            said = (n.removesuffix("_direction") for n, v in trial.items() if n.endswith("_direction") and v)
            if (metric := next(filter(is_own, said), "")) == "":
                return None
        return self.model_copy(
            update={"metric": metric, "direction": self.direction or trial.get(f"{metric}_direction")}
        )


class ResourcesConfig(Part):
    """What one trial gets, and where."""

    cpus: Positive | Literal["auto"] = 1.0
    """CPUs, and threads, of a trial; auto: its share of the cluster's, at most 4."""
    gpus: NotNegative | Literal["auto"] = 0.0
    """GPUs of a trial. Nine tenths of a fraction are also its memory limit: the rest is for CUDA's contexts. auto: as
    many trials per GPU as memory and arithmetic allow (estimated; training's memory as `mebm bench` measured it, if
    its folder lies beside the study's), none where the cluster has none."""

    memory_gb: Positive | None = None
    """Memory of the host that a trial may use, 10^9 bytes, its process included: as many run at once as fit a node, and
    one that uses more is ended and started again as after an error; null: no limit."""
    gpu_type: str | None = None
    """Only on nodes with this accelerator, by Ray's name for it, such as H100; null: any."""
    placement: Literal["pack", "spread"] = "pack"
    """Fill one node after the other, or spread trials over the nodes."""

    @field_validator("gpus")
    @classmethod
    def _whole_or_fraction(cls, value: float | str) -> float | str:
        if isinstance(value, float) and value > 1 and value != int(value):
            raise ValueError("must be a fraction below 1 or a whole number")
        return value


class BudgetConfig(Part):
    """When a study ends before its last trial: at the first of these. Running trials save and end as `stopped`."""

    hours: Positive | None = None
    """Wall time of all runs of the study."""
    gpu_hours: Positive | None = None
    """GPU-hours reserved by its trials, replayed work included."""
    trials: Count | None = None
    """Trials that start."""
    deadline: datetime | None = None
    """Date and time, ISO 8601; without an offset it is the driver's local time."""


class PruningConfig(Part):
    """Early stop of trials that do worse than others did by the same epoch.

    A trial that diverged or collapsed earlier stands last at every rung after its end: it is what the others are
    better than. A pruned trial is stable as far as it went; it is censored, and pruning on quality is informative
    censoring, so a study that asks for divergence rates leaves it off.
    """

    rule: Literal["none", "asha", "median"] = "none"
    """asha: asynchronous successive halving over epochs (Li et al. 2020); median: worse than the median."""
    metric: Annotated[str, _one_of(lambda: list(METRIC_BY_NAME), _of_own)] | None = None
    """The one metric that decides; null: the study's first objective that is a quality metric."""
    first_epoch: Count = 1
    """Epoch before which none is pruned; ASHA's first rung."""
    reduction: int = Field(3, ge=2, le=MAX)
    """ASHA's eta: the top 1/eta of the trials go on at each rung, first_epoch * eta^i."""
    min_trials: Count = 3
    """Trials that must have come as far before the median rule prunes."""
    seeds: Literal["all", "wilcoxon"] = "all"
    """Seeds that a setting gets. wilcoxon: no further ones once a Wilcoxon test over paired seeds finds it worse than
    the best setting; the trials themselves are not cut short."""
    seeds_alpha: float = Field(0.1, gt=0, le=0.5)
    """Probability at most that wilcoxon gives up a setting that is no worse, over all its looks at the seeds."""

    @model_validator(mode="before")
    @classmethod
    def _former_key(cls, values: Any) -> Any:
        """Studies that began with earlier versions say `least`."""
        if isinstance(values, dict) and "least" in values and "min_trials" not in values:
            return {"min_trials" if key == "least" else key: value for key, value in values.items()}
        return values


class RunConfig(Part):
    """How trials are run."""

    checkpoint_seconds: NotNegative = 60
    """Least time between two checkpoints of a trial; what was trained since is done again after a kill."""
    max_failures: int = Field(2, ge=0, le=MAX)
    """Times a trial is started again after an error that another start can help: a lost worker or node, memory, a full
    disk, storage out of reach; a bug fails at once."""
    hang_minutes: Positive | None = 60
    """A trial without a sign of life (an iteration or a report; its start is none) for so long is killed and started
    again; null: never."""
    node_seconds: NotNegative = 45
    """A study that has no node left that can run a trial for so long ends, to be resumed; longer where others come in
    the place of nodes that were taken away."""
    drain_seconds: NotNegative = 90
    """After SIGUSR1 trials may finish their epoch and save for so long."""
    stop_seconds: NotNegative = 30
    """A script that was told to stop, its run having diverged or the study wanting it, may take so long to end by
    itself."""
    checkpoint_gb: Positive | None = None
    """Disk for checkpoints, 10^9 bytes; each running trial keeps two, so it limits how many run at once; null: what is
    free."""
    loggers: tuple[Annotated[str, _one_of(_loggers)], ...] = ()
    """Also log to these; each needs the extra of its name."""
    reuse_workers: bool = True
    """Train trial after trial in one process, so that only the first pays for its start; false: a process for every
    trial, whose end frees all its memory."""
    max_concurrent: Count | None = None
    """Trials at once; null: as many as the resources allow."""


class StudyConfig(Part):
    """A study: many trials of one question."""

    name: str
    """Name of the study and of its folder."""
    description: str = ""
    """What the study asks."""
    trial: dict[str, Any] = Field(default_factory=dict)
    """Fixed trial fields; see `mebm methods`."""
    search: SearchConfig
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1, max_length=100_000)
    """Seeds of every setting."""
    objectives: tuple[Objective, ...] = Field(
        (Objective(metric="fd_buffer", direction=None),), min_length=1, max_length=20
    )
    """What the search improves."""
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    pruning: PruningConfig = Field(default_factory=PruningConfig)
    rescue: RescueConfig | None = None
    """How trials that diverged or collapsed go on; null: they end there."""
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

    @model_validator(mode="before")
    @classmethod
    def _of_own_metrics(cls, values: Any) -> Any:
        """Metrics of the user's own are named `own.NAME_buffer`, as their columns are; each has a direction."""
        return own_objectives(values) if isinstance(values, dict) else values

    @model_validator(mode="before")
    @classmethod
    def _of_a_script(cls, values: Any) -> Any:
        """A script's own metrics are named `own.NAME`, as their columns are."""
        trial = values.get("trial") if isinstance(values, dict) else None
        if not isinstance(trial, dict) or not is_script(trial):
            return values

        def named(part: Any) -> Any:
            name = part.get("metric") if isinstance(part, dict) else None
            plain = isinstance(name, str) and name not in COST_METRICS and name != AUTO and not name.startswith(OWN)
            return part | {"metric": f"{OWN}{name}"} if plain else part

        objectives = values.get("objectives", [{"metric": AUTO}])
        if isinstance(objectives, list | tuple):
            objectives = [named(o) for o in objectives]
        return values | {"objectives": objectives, "pruning": named(values.get("pruning", {}))}

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        """Objectives by their names alone, and pruning by its rule."""
        if not isinstance(values, dict):
            return values
        found = dict(values)
        if isinstance(objectives := found.get("objectives"), str):
            objectives = [objectives]
        if isinstance(objectives, list | tuple):
            found["objectives"] = [{"metric": o} if isinstance(o, str) else o for o in objectives]
        if isinstance(rule := found.get("pruning"), str):
            found["pruning"] = {"rule": rule}
        return found

    @model_validator(mode="after")
    def _own_or_built_in(self) -> Self:
        metrics = [*(o.metric for o in self.objectives), *filter(None, [self.pruning.metric])]
        if self.is_script:
            if "auto" in (self.resources.cpus, self.resources.gpus):
                raise ValueError("resources: auto needs a built-in method: nothing is known of what a script takes")
            if self.rescue is not None:
                raise ValueError("rescue: is of built-in methods and your own: a script keeps its states itself")
            return self
        named = self.trial.get("evaluation")
        own = isinstance(named, Mapping) and bool(named.get("metrics"))
        for metric in metrics:
            if metric == AUTO or (_of_own(metric) and not own):
                known = ", ".join([*METRIC_BY_NAME, *COST_METRICS])
                raise ValueError(
                    f"objectives: {metric} is a script's or of evaluation.metrics; expected one of {known}"
                )
        return self

    @property
    def is_script(self) -> bool:
        """Whether its trials are runs of a script."""
        return is_script(self.trial)

    @model_validator(mode="after")
    def _pruning_metric(self) -> Self:
        if self.pruning.seeds != "all" and 2.0 ** (1 - len(self.seeds)) > self.pruning.seeds_alpha:
            raise ValueError(
                f"pruning.seeds: wilcoxon cannot tell settings apart by {len(self.seeds)} seeds at seeds_alpha "
                f"{self.pruning.seeds_alpha:g}; give more seeds, or choose all"
            )
        if (self.pruning.rule, self.pruning.seeds) != ("none", "all") and self.pruning_metric is None:
            raise ValueError("pruning.metric must be named: no objective is a quality metric")
        return self

    @model_validator(mode="after")
    def _fitting_sampler(self) -> Self:
        number, sampler = len(self.objectives), self.search.sampler
        if sampler == "nsga3" and number < 3:
            raise ValueError(
                f"search.sampler: nsga3 needs three objectives or more, but there are {number}; choose nsga2"
            )
        if sampler == "cmaes" and number > 1:
            raise ValueError(f"search.sampler: cmaes takes one objective, but there are {number}; choose tpe or nsga2")
        return self

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if self.search.earlier and self.search.sampler not in MODELLING and self.pruning.rule == "none":
            raise ValueError(
                f"search.from: sampler {self.search.sampler} learns from no trial and nothing is pruned; choose "
                f"{', '.join(MODELLING)}, set pruning.rule, or leave from out"
            )
        return self

    @property
    def pruning_metric(self) -> str | None:
        """The metric that pruning looks at."""
        quality = [o.metric for o in self.objectives if o.metric not in COST_METRICS]
        return self.pruning.metric or (quality[0] if quality else None)

    @property
    def varied(self) -> list[str]:
        """Names of the searched fields."""
        return self.search.varied

    @property
    def varied_columns(self) -> list[str]:
        """Their columns in the tables: a script's arguments fill the paper's, or have one of their own."""
        if not self.is_script:
            return self.varied
        values = {n: any_value(d) for n, d in self.space.distributions.items()}
        trial = self.space.trial(values | dict(next(iter(self.space.start), {})), self.seeds[0])
        assert isinstance(trial, ScriptConfig)
        columns = trial.setting()
        return [own if (own := f"{SET}{n}") in columns else trial.column_of(n) or own for n in self.varied]

    @cached_property
    def space(self) -> Space:
        """What the study can propose (see `build_space`); `validate_study` has built it, else it is built once."""
        return build_space(self.trial, self.search, self.seeds[0])

    @property
    def planned_trials(self) -> int:
        """Trials in all: settings times seeds."""
        return self.space.settings * len(self.seeds)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Pydantic's; a changed study has its own space."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("space", None)
        return copy

    def to_yaml(self) -> str:
        """The study as YAML that gives an equal study back."""
        return write_yaml(self.model_dump(mode="json"))
