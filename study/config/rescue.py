"""`RescueConfig`: what is done with a trial that diverged or collapsed, as one does it by hand."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from study.config.errors import UserError, one_line, validation_error
from study.config.search import Part, Scalar
from study.config.space import any_value
from trainables.config.trial import TrialConfig
from trainables.results.spelling import nearest

if TYPE_CHECKING:
    from study.config.study import StudyConfig

CHANGEABLE = (
    "sampling_steps", "step_size", "inner_steps", "noise_std", "noise_placement", "gradient_clamp", "sample_clamp",
    "sampler_norm_mode", "reinit_probability", "input_noise", "label_noise", "l2_weight", "l2_form", "class_weight",
    "kl_weight", "entropy_weight", "gradient_penalty", "learning_rate", "momentum", "weight_decay",
    "clip_norm", "clip_sigma", "sam_rho", "sam_adaptive", "warmup_iterations", "decay_factor", "precision", "seed",
)  # fmt: skip
"""Fields that may change within a trial. The others decide what a checkpoint holds (network, norm, optimiser, data set,
batches, buffer, p0), how long the trial is, or by what it is judged (divergence, evaluation)."""
NEW = "new"
_FACTOR = re.compile(r"x\s*([0-9.]+(?:e[+-]?[0-9]+)?)")


class RescueConfig(Part):
    """Trials that ended badly go on from before that, with other settings.

    A rescue is a separate run (`t0007r1`), apart from the trials of the search: what a setting did, and what Optuna
    is told of it, is as it would be without.
    """

    on: tuple[Literal["diverged", "collapsed"], ...] = Field(("diverged", "collapsed"), min_length=1)
    """Ends that are rescued."""
    rewind: Literal["last-healthy"] | Annotated[int, Field(ge=1, le=1_000_000)] = "last-healthy"
    """Where it goes on: last-healthy, the newest kept state that is older than the alarm by the detector's measured
    lead (69 iterations, 6 without norm); or at least so many epochs before the alarm. Two states are kept, at epochs
    that are so far apart; where none is old enough it begins anew."""
    change: dict[str, Scalar] = Field(min_length=1)
    """What changes at every rescue: a field is multiplied (x2, x0.5) or set; seed: new gives other random numbers.
    Fields that decide what a checkpoint holds cannot change."""
    most: Annotated[int, Field(ge=1, le=100)] = 3
    """Rescues of a trial, at most."""

    @field_validator("on")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("rewind", mode="wrap")
    @classmethod
    def _state_or_epochs(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError("must be last-healthy, or a whole number of epochs from 1 to 1,000,000") from None

    @field_validator("change")
    @classmethod
    def _known(cls, value: dict[str, Scalar]) -> dict[str, Scalar]:
        for name, how in value.items():
            if name not in CHANGEABLE:
                known = name in TrialConfig.model_fields or "." in name
                why = "cannot change within a trial" if known else "is not a field of a trial"
                raise ValueError(f"{name[:80]} {why}; one that can: {', '.join(CHANGEABLE)}{nearest(name, CHANGEABLE)}")
            if name == "seed" and how != NEW:
                raise ValueError(f"seed must be {NEW}: another number for every rescue, made from the trial's own")
            factor_of(name, how)
        return value

    def text(self) -> str:
        """What changes, in words: `sampling_steps x2, seed new`."""
        return ", ".join(f"{name} {how}" for name, how in self.change.items())


def factor_of(name: str, how: Scalar) -> float | None:
    """What a value is multiplied by; None where it is set. ValueError: a factor that makes no sense."""
    if not isinstance(how, str) or not (found := _FACTOR.fullmatch(how.strip())):
        if isinstance(how, str) and how.strip().startswith("x"):
            raise ValueError(f"{name}: {how[:40]!r} is not a factor; expected such as x2 or x0.5")
        return None
    try:
        factor = float(found[1])
    except ValueError:
        factor = math.nan
    if not 0 < factor < 1e9 or factor == 1:
        raise ValueError(f"{name}: {how[:40]!r} must multiply by a number above 0 that is not 1")
    return factor


def rescued_trial(rescue: RescueConfig, trial: TrialConfig, number: int, seed: int) -> TrialConfig:
    """The trial of the next rescue.

    Args:
        trial: the one that ended badly, itself a rescue from the second on.
        number: which rescue it is, from 1.
        seed: of the trial of the search, from which new ones are made.

    Raises:
        ValueError: a value that the field does not take, or none changes.
    """
    values: dict[str, Any] = trial.model_dump(mode="json")
    _change(rescue, values)
    if "seed" in rescue.change:
        from trainables.training.device import derive_seed  # torch

        values["seed"] = derive_seed(seed, f"rescue {number}") % 2**31
    found = TrialConfig.model_validate(values)
    if found == trial:
        raise ValueError(f"{rescue.text()} changes nothing here: the trial would end as it did")
    return found


def _change(rescue: RescueConfig, values: dict[str, Any]) -> None:
    """Change a trial's values once, all but its seed. ValueError: one that cannot be multiplied."""
    for name, how in rescue.change.items():
        factor, old = factor_of(name, how), values[name]
        if name == "seed":
            continue
        if factor is None:
            values[name] = how
        elif isinstance(old, bool) or not isinstance(old, int | float):
            raise ValueError(f"{name} is {old}, which cannot be multiplied by {factor:g}")
        else:
            values[name] = max(1, round(old * factor)) if isinstance(old, int) else old * factor


def _points(study: StudyConfig) -> list[dict[str, Any]]:
    """A grid's settings; of another space its starting points and the ends of its ranges."""
    space = study.space
    if study.search.sampler == "grid":
        return [dict(point) for point in space.start]
    some = {name: any_value(d) for name, d in space.distributions.items()}
    ends = [
        some | {name: end}
        for name, d in space.distributions.items()
        for end in getattr(d, "choices", None) or (getattr(d, "low", None), getattr(d, "high", None))
    ]
    return [*(some | dict(point) for point in space.start), *ends]


def _ends(rescue: RescueConfig, trial: TrialConfig, seed: int) -> None:
    """Try the first and the last rescue of a trial: a value that is multiplied lies between those of the two.

    Raises:
        ValueError: one of them cannot be; the first that cannot may be another.
    """
    rescued_trial(rescue, trial, 1, seed)
    values = trial.model_dump(mode="json")
    for _ in range(rescue.most - 1):
        _change(rescue, values)
    rescued_trial(rescue, TrialConfig.model_validate(values), rescue.most, seed)


def check_rescue(study: StudyConfig, source: str) -> None:
    """Try a study's rescue on a setting of every kind. UserError: it cannot be."""
    rescue = study.rescue
    if rescue is None:
        return
    seed = study.seeds[0]
    for point in _points(study):
        trial = study.space.built_in(dict(point), seed)
        try:
            _ends(rescue, trial, seed)
        except (ValueError, OverflowError):
            _refuse_first(rescue, trial, seed, source)


def _refuse_first(rescue: RescueConfig, trial: TrialConfig, seed: int, source: str) -> None:
    """Say which rescue of a trial is the first that cannot be, and why."""
    for number in range(1, rescue.most + 1):
        place = source if number == 1 else f"{source}: at rescue {number}"
        try:
            trial = rescued_trial(rescue, trial, number, seed)
        except ValidationError as error:
            what = validation_error(place, error, TrialConfig, "rescue.change")
            raise UserError(f"{what}; expected such as x2, x0.5 or a value of the field") from error
        except (ValueError, OverflowError) as error:
            raise UserError(f"{place}: rescue.change: {one_line(error)[:300]}") from error
