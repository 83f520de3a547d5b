"""Parts of a trial's configuration: divergence, evaluation."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from trainables.results.schema import DetectorRule


@cache
def _number_fields(model: type[BaseModel]) -> frozenset[str]:
    """Fields that take a number, or several, and no truth value."""

    def kinds(annotation: Any) -> set[Any]:
        inner = get_args(annotation)
        return set().union(*map(kinds, inner)) if inner else {annotation}

    found = {name: kinds(field.annotation) for name, field in model.model_fields.items()}
    return frozenset(name for name, types in found.items() if types & {int, float} and not types & {bool, Any})


def _worded(value: Any) -> Any:
    """`true` as the word where it stands for a number: pydantic would take it for 1, but says what a word is not."""
    if isinstance(value, bool):
        return str(value).lower()
    return [_worded(item) for item in value] if isinstance(value, list | tuple) else value


class StrictModel(BaseModel):
    """A model whose numbers are never truth values."""

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        numbers = _number_fields(cls)
        odd = [n for n, v in values.items() if v.__class__ in (bool, list, tuple) and n in numbers]
        return values | {name: _worded(values[name]) for name in odd} if odd else values


PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Model(StrictModel):
    """A part of a configuration: nothing unknown in it, and nothing changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split()) or None


class DivergenceConfig(Model):
    """When a trial is called diverged or collapsed. Thresholds were measured on 265 small runs (docs/divergence.md)."""

    gap_limit: PositiveFloat = 2.0
    """largest |E+ - E-| of a healthy run, in energy units"""
    gap_patience: int = Field(3, ge=1, le=10_000)
    """iterations in a row beyond the limit that raise the alarm"""
    l2_fraction: PositiveFloat = 0.5
    """with an L2 term the limit is at most this fraction of its trivial optimum 1/lambda"""
    hard_gap_limit: PositiveFloat = 20.0
    """|E+ - E-| that raises the alarm at once"""
    loss_limit: PositiveFloat = 1e5
    """|generative loss| of the released check (train_maebm.py:224)"""
    energy_limit: PositiveFloat | None = None
    """max |E|; off: energies have a free offset that drifts"""
    gradient_norm_limit: PositiveFloat | None = None
    """norm of the parameters' gradient; off"""
    collapse_patience: int = Field(20, ge=1, le=100_000)
    """with an L2 term: iterations in a row with the gap within 50% of -1/lambda that mean 'collapsed'"""
    collapse_ratio: PositiveFloat = 1.0
    """a trial that ends with its buffer's quality worse than this multiple of p0's own has collapsed: by more than the
    sampling error of the two scores, with at least three quarters of its iterations after the warm-up, five passes
    through the images (or 2,000 iterations) and |B| chains written; before that it is undertrained"""
    action: Literal["stop", "record"] = "stop"
    """stop: end the trial at the verdict, which ends runs that the released code would continue. record: note the alarm
    and train on until the released check or a non-finite value ends it (to compare the two)"""
    read_every: int = Field(50, ge=1, le=100_000)
    """iterations between two reads, by the host, of the check that watches training on the device (CUDA; CPU: 1)"""
    rule: Literal["limits", "learnt"] = "limits"
    """what |E+ - E-| is judged by. limits: the four fields above. learnt, for energies of unknown unit: 50 times the
    median of 100 earlier iterations three times in a row, or 1,000 times once (a method of yours without a gap_limit)
    """
    learn_from: int = Field(0, ge=0, le=10**12)
    """iteration from which the learnt rule learns and judges"""

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the younger fields where they are not used, so that settings keep their ids."""
        unused = {"rule": "limits", "learn_from": 0}
        return {name: value for name, value in handler(self).items() if value != unused.get(name, ...)}

    @property
    def limits(self) -> DetectorRule:
        """The alarm's thresholds as analysis replays them."""
        return DetectorRule(**{f.name: getattr(self, f.name) for f in dataclasses.fields(DetectorRule)})


class EvaluationConfig(Model):
    """Which quality numbers are taken, how often, under which protocol."""

    every: int = Field(5, ge=1, le=100_000)
    """epochs between evaluations, of samples and accuracy; the last epoch is always evaluated. The best epoch is one of
    these. Released M-EBM: FID after epochs 0, 5, 10, ... counted from 0 and the last, accuracy after every epoch"""
    protocols: tuple[str, ...] | Literal["auto", "none"] = "auto"
    """protocol names (see `mebm methods`), 'none', or 'auto': the small-classifier distance for small or grey images,
    the paper's FID and IS for the rest; on the buffer and on fresh chains. NAME@FILE.py:EXTRACTOR[@WEIGHTS] takes the
    images of NAME on features of your own"""
    fresh_steps: int = Field(20, ge=1, le=100_000)
    """Langevin steps of a fresh chain from p0"""
    batch_size: int = Field(100, ge=1, le=100_000)
    """images per batch of the evaluation"""
    keep_model: bool = True
    """keep weights and samples of a trial's end, if it completes, and of its best epoch, for `mebm figures`, `evaluate`
    and `sample` (WRN-28-10 with 10,000 samples: about 210 MB each)"""
    accuracy_on: Literal["test", "validation"] = "test"
    """images that accuracy is taken on. test, as released: a best accuracy is then selected on the test set.
    validation: the held-out training images (needs validation_images)"""
    metrics: tuple[Annotated[str, Field(min_length=3, max_length=300)], ...] = Field((), max_length=20)
    """metrics of your own that are taken too, each FILE.py:NAME"""
    weights: Literal["last", "ema"] = "last"
    """which weights are scored: the trained ones, or their moving average (needs ema_decay)"""
