"""What a study searches, as its YAML says it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from study.config.addresses import check_address
from trainables.config.parts import StrictModel
from trainables.results.credentials import is_url, may_hold_secret

Scalar = bool | int | float | str | None
MODELLING = ("tpe", "gp", "nsga2", "nsga3", "cmaes")
"""Samplers that learn from the trials so far."""
MAX = 10**9
"""Of anything that is counted or measured here."""
Count = Annotated[int, Field(ge=1, le=MAX)]
MAX_END = 1e100
"""Ends of a range: the square of none is infinite."""


class Part(StrictModel):
    """A part of a study's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Range(Part):
    """One searched field: an interval (`low`, `high`, optionally `log` or `step`) or `choices`."""

    low: float | int | None = None
    """Smallest value, included."""
    high: float | int | None = None
    """Largest value, included."""
    log: bool = False
    """Uniform in the logarithm."""
    step: float | int | None = Field(None, gt=0)
    """Grid within the interval."""
    choices: tuple[Scalar, ...] | None = None
    """The values to choose from."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_list(cls, value: Any) -> Any:
        """A list is one of choices; a single value is not a range."""
        if isinstance(value, list | tuple):
            return {"choices": list(value)}
        if isinstance(value, str | int | float):
            raise ValueError("is not a range: give {low: 1, high: 5} or {choices: [1, 2]}; a fixed value is trial's")
        return value

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
        if max(abs(self.low), abs(self.high)) > MAX_END:
            raise ValueError(f"low and high must be within {MAX_END:g} of 0, but are {self.low} and {self.high}")
        if self.step is not None and (self.high - self.low) / MAX > self.step:
            raise ValueError(f"step {self.step} makes more than {MAX:g} values of {self.low} to {self.high}")
        return self


def _place(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError("must be the folder or the URL of a study")
    if is_url(text) and may_hold_secret(text):
        raise ValueError("must not hold credentials, which would be written into the study's folder")
    return text


class SearchConfig(Part):
    """What varies from trial to trial."""

    sampler: Literal["tpe", "random", "nsga2", "gp", "grid", "qmc", "cmaes", "nsga3"] = "tpe"
    """Optuna sampler, or a full grid. qmc: a scrambled Sobol sequence, which fills the space; cmaes: CMA-ES, of numeric
    ranges and one objective, needs the extra cmaes; nsga2, nsga3: of several objectives, of three or more."""
    trials: Count | None = None
    """Settings to propose, all if the space has fewer; each is run with every seed."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the sampler."""
    storage: Annotated[str, AfterValidator(check_address)] | None = None
    """Optuna storage that several drivers share, such as postgresql+psycopg://user@host/optuna; ${NAME} in it, or
    instead of it, is taken from the environment, as a password must be; null: optuna.db in the study's folder."""
    startup_trials: Count = 8
    """Random settings before TPE or GP starts to model."""
    space: dict[str, Range] = Field(default_factory=dict)
    """Searched trial fields (dotted for nested ones); auto: the range that the method has for its own field."""
    start: tuple[dict[str, Scalar], ...] = ()
    """Settings to try first; what one leaves out is sampled."""
    grid: tuple[dict[str, Any], ...] = ()
    """Blocks of a grid: each field has a value or a list; a block is the product of its lists."""
    # `from` is a word of Python, so that the field cannot be written as the others are.
    __annotations__["from"] = tuple[Annotated[str, AfterValidator(_place)], ...]
    vars()["from"] = Field(
        (),
        max_length=100,
        description="Earlier studies, folders or URLs, from whose trials the sampler and pruning learn; see the page "
        "on warm starts.",
    )

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
            if self.sampler == "cmaes":
                self._of_numbers()
            if self.trials is None:
                raise ValueError(f"sampler {self.sampler} needs trials: how many settings to propose")
        return self

    def _of_numbers(self) -> None:
        chosen = [name for name, spec in self.space.items() if spec.choices is not None]
        if chosen:
            raise ValueError(
                f"sampler cmaes needs low and high for every field, but {chosen[0]} has choices; choose tpe"
            )
        if len(self.space) < 2:
            raise ValueError("sampler cmaes needs two fields or more in space; choose tpe")

    @property
    def earlier(self) -> tuple[str, ...]:
        """Places of the studies under `from`."""
        found: tuple[str, ...] = getattr(self, "from")
        return found

    @property
    def varied(self) -> list[str]:
        """Names of the searched fields."""
        if self.sampler == "grid":
            return list(dict.fromkeys(key for block in self.grid for key in block))
        return list(self.space)
