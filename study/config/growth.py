"""A study at growing size: which field grows, and the studies of its sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from study.config.errors import UserError, shown
from study.config.space import any_value
from study.config.study import StudyConfig
from study.config.yaml_input import parse_yaml
from trainables.config.network import network_families, parse_network
from trainables.config.trial import TrialConfig
from trainables.results.own import field_of

_WIDTH = ("CHANNELS", "FILTERS", "WIDTH", "BASE")
_DEPTH = ("DEPTH", "BLOCKS")
_MOST = 100
"""Sizes of one law."""


@dataclass(frozen=True)
class Axis:
    """What grows.

    Attributes:
        option: that named it, for messages.
        word: in names of studies: width, depth, resolution, batch, or the field.
        sizes: ascending.
        field: the field that is set; None where the size is a number in the network's name.
    """

    option: str
    word: str
    sizes: tuple[float, ...]
    field: str | None = None

    def assignment(self, study: StudyConfig, size: float) -> str:
        """The `KEY=VALUE` that gives a study this size. UserError: its network has no such size."""
        if self.field is not None:
            return f"{self.field}={_number(size)}"
        trial = study.space.trial(_any(study), study.seeds[0])
        if not isinstance(trial, TrialConfig):
            raise UserError(f"{self.option}: a script's size is an argument of it: --over args.NAME=8,16")
        if "network" in study.varied:
            raise UserError(f"{self.option}: the study searches network; fix it with -s network=NAME")
        family, sizes = parse_network(trial.network)
        wanted = _WIDTH if self.word == "width" else _DEPTH
        place = next((i for i, name in enumerate(family.sizes) if name in wanted), None)
        if place is None:
            forms = [f.form for f in network_families().values() if set(f.sizes) & set(wanted)]
            raise UserError(
                f"{self.option}: network {shown(trial.network)} has no {self.word} in its name; those of "
                f"{', '.join(forms)} have one, and another field grows by --over FIELD=8,16"
            )
        numbers = [_number(size) if i == place else str(n) for i, n in enumerate(sizes)]
        return f"network={'-'.join((family.name, *numbers))}"


def axis_of(options: dict[str, str | None], over: str | None) -> Axis:
    """The one axis that the options name.

    Args:
        options: widths, depths, resolutions and batches as given, such as `8,16,32`; None where not given.
        over: `FIELD=V,V`.

    Raises:
        UserError: none or several, or no list of sizes.
    """
    given = [name for name, text in options.items() if text is not None] + (["over"] if over is not None else [])
    if len(given) != 1:
        what = "--widths, --depths, --resolutions, --batches or --over"
        raise UserError(f"give one of {what}, such as --widths 8,16,32" + (", not several" if given else ""))
    (name,) = given
    option = f"--{name}"
    if over is not None:
        field, equals, text = over.partition("=")
        if not equals or not field.strip():
            raise UserError(
                f"--over {shown(over, quoted=False)}: must be FIELD=V,V, such as --over buffer_size=500,2000"
            )
        key = field_of(field.strip().removeprefix("trial."))
        return Axis(option, key.rpartition(".")[2], sizes_of(text, option), key)
    fields = {"resolutions": "image_size", "batches": "batch_size"}
    words = {"widths": "width", "depths": "depth", "resolutions": "resolution", "batches": "batch"}
    sizes = sizes_of(str(options[name]), option)
    if broken := [s for s in sizes if s != int(s)]:
        raise UserError(f"{option} {broken[0]:g}: must be a whole number")
    return Axis(option, words[name], sizes, fields.get(name))


def sizes_of(text: str, option: str) -> tuple[float, ...]:
    """Sizes of a comma-separated list, ascending. UserError: something else, a size twice, or too many."""
    found = [_size(word, option) for word in text.split(",")]
    if twice := [s for s in found if found.count(s) > 1]:
        raise UserError(f"{option} {shown(text, quoted=False)}: {twice[0]:g} is there twice")
    if len(found) > _MOST:
        raise UserError(f"{option}: {len(found)} sizes, but expected at most {_MOST}")
    return tuple(sorted(found))


def _size(word: str, option: str) -> float:
    value = parse_yaml(word.strip(), option) if word.strip() else None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not 0 < value <= 1e9
    ):
        raise UserError(
            f"{option}: {shown(word.strip())} is not a size; expected numbers above 0, such as {option} 8,16,32"
        )
    return float(value)


def _number(size: float) -> str:
    return str(int(size)) if size == int(size) else repr(size)


def _any(study: StudyConfig) -> dict[str, Any]:
    first = {name: any_value(d) for name, d in study.space.distributions.items()}
    return first | dict(next(iter(study.space.start), {}))


def study_name(study: StudyConfig, axis: Axis, size: float) -> str:
    """Name of the study of a size: that of all, the axis and the size."""
    return f"{study.name}-{axis.word}-{_number(size).replace('+', '')}"


def boundary_field(study: StudyConfig, wanted: str | None) -> str:
    """The one field that a study searches, a number.

    Raises:
        UserError: it searches several fields, another one than `wanted`, or one whose values are not numbers above 0,
            or it prunes.
    """
    varied = [name for name in study.varied if len(set(_ends(study, name))) > 1]
    if wanted is not None and wanted not in varied:
        raise UserError(f"--boundary {wanted}: the study does not search it; -s {wanted}=LOW:HIGH:log does")
    if not varied:
        raise UserError(f"{study.name}: searches no field, so there is no boundary; -s FIELD=LOW:HIGH:log searches one")
    if len(varied) > 1:
        others = [name for name in varied if name != (wanted or varied[0])]
        kept = wanted or varied[0]
        fixed = " ".join(f"-s {name}=VALUE" for name in others)
        raise UserError(
            f"{study.name}: searches {', '.join(varied)}; a boundary is that of one field: fix the others; to study "
            f"{kept}: {fixed}"
        )
    (field,) = varied
    values = _ends(study, field)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in values):
        raise UserError(f"{study.name}: {field} has {shown(values[0])}; a boundary is that of numbers above 0")
    if study.pruning.rule != "none":
        raise UserError(f"{study.name}: pruning ends trials before their stability is known; --set pruning.rule=none")
    return field


def _ends(study: StudyConfig, field: str) -> Sequence[Any]:
    """Values of a searched field, or the ends of its range."""
    spec = study.space.distributions[field]
    return getattr(spec, "choices", None) or (getattr(spec, "low", None), getattr(spec, "high", None))
