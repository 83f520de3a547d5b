"""What a training method declares: its texts, settings, own fields and what of a trial's fields it reads. No torch.

A method is a frozen object: its fields are its settings, its class variables declare it. `training.method` has hooks.
"""
# ruff: noqa: ARG002, ARG003  # hooks are given what an implementation may need

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin

from pydantic import Field
from pydantic.fields import FieldInfo

from trainables.config.own_hooks import check_hooks, told
from trainables.config.parts import Model
from trainables.plugins.installed import BUILT_IN
from trainables.plugins.reference import TRUSTED as TRUSTED
from trainables.plugins.reference import is_reference, on_change, registered, resolve, short
from trainables.results.schema import Column, ColumnType

if TYPE_CHECKING:
    from trainables.config.trial import TrialConfig

Group = Literal["data", "langevin", "initial", "buffer", "l2", "gradient_penalty", "sampler_terms", "classifier"]
"""Fields of a trial that belong together: a method that does not use them has nulls there in tables. data: x+, and so
an energy; langevin: x- are ends of chains; sampler_terms: KL-EBM's two; classifier: a cross-entropy."""
Settings = Mapping[str, Any]

CHAINS: frozenset[Group] = frozenset({"data", "langevin", "initial", "buffer"})
CONTRASTIVE: frozenset[Group] = CHAINS | {"l2", "gradient_penalty", "sampler_terms"}


def field(
    default: Any, *, description: str, symbol: str = "", unit: str = "", suggest: tuple[Any, ...] = (), **limits: Any
) -> Any:
    """A method's own field: pydantic's `Field` with what tables and searches need to know.

    Args:
        symbol: in formulas and tables; empty: its name.
        suggest: (low, high) or (low, high, "log"), the range that is searched where a study says `auto`.
        limits: `ge`, `le`, `gt`, `lt` and the like.
    """
    extra: dict[str, Any] = {"symbol": symbol, "unit": unit, "suggest": list(suggest)}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class MethodSpec(Model):
    """The declaration of a method. A subclass states what differs.

    Attributes:
        title, formula, sampling, objective, source, rows: its texts in `mebm methods`: name in the paper, the energy,
            how x- is drawn, the loss, where it is published, the rows of the paper's tables it can fill.
        preset: fields of a trial that differ from `TrialConfig`'s defaults.
        small: fields for images below 16 pixels (digits): a small network, rates that train it in minutes.
        by_dataset: fields its authors set differently for a data set.
        deviations: where this differs from the released code, one line each.
        uses: groups of a trial's fields that it reads.
        head: what the energy is: a linear energy `head`, minus the `logsumexp` of the class logits, or None.
        purposes: further streams of random numbers that its hooks draw from.
        kept: names of the networks that new samples are drawn with.
        protocol: the protocol of replay-buffer samples that `auto` takes for images of 32 pixels and more.
        why_not_whole: why an iteration cannot be one CUDA graph; empty where it can.
        beside: False where x- needs what the loss of x+ finds, so that the two cannot run beside each other.
        energies: networks of the energy's kind that are trained.
        needs_one_energy: whether the losses take one energy per image (a network with three scales has three).
        column: names of own fields that fill a column of the setting's that is older than they are.
    """

    title: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    sampling: ClassVar[str] = ""
    objective: ClassVar[str] = ""
    source: ClassVar[str] = ""
    rows: ClassVar[str] = ""
    preset: ClassVar[Settings] = {}
    small: ClassVar[Settings] = {}
    by_dataset: ClassVar[Mapping[str, Settings]] = {}
    deviations: ClassVar[tuple[str, ...]] = ()
    uses: ClassVar[frozenset[Group]] = CHAINS
    head: ClassVar[Literal["head", "logsumexp"] | None] = "head"
    purposes: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[tuple[str, ...]] = ("energy",)
    protocol: ClassVar[str] = "buffer-all"
    why_not_whole: ClassVar[str] = ""
    beside: ClassVar[bool] = True
    energies: ClassVar[int] = 1
    needs_one_energy: ClassVar[bool] = False
    column: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def by_steps(cls, steps: int) -> dict[str, Any]:
        """Fields of a trial that depend on K."""
        return {}

    def checked(self, trial: TrialConfig) -> None:
        """`check`, whatever it raises: ValueError, one line."""
        try:
            self.check(trial)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(told(error, type(self))) from error

    def check(self, trial: TrialConfig) -> None:
        """Refuse a trial that the method cannot run. Raises ValueError: one line."""

    def trivial_optimum(self) -> float:
        """-lambda times the gap that is optimal for energies that ignore the image: 1 for contrastive divergence."""
        return 1.0

    def sources(self, trial: TrialConfig) -> tuple[str, ...]:
        """Where samples to score come from: `buffer` and `fresh`, or one of them, or nothing."""
        if "data" not in self.uses:
            return ()
        return ("buffer", "fresh") if trial.buffered else ("fresh",)

    def made_by(self, steps: int) -> str:
        """How fresh samples are made, where chains take so many steps; part of their protocol's id."""
        return f"{steps}steps"

    def extra_flops(self, trial: TrialConfig, shape: tuple[int, int, int], forward: int, chain: int) -> int:
        """Operations of an iteration that a trial's fields do not tell of: of second networks and their samples.

        `forward` are those of a batch through the energy, `chain` those of its chains.
        """
        return 0

    def settled(self, trial: TrialConfig, shape: tuple[int, int, int]) -> int:
        """The first iteration of the form that most of a training has, and whose cost is told; timing begins there."""
        return 0

    def extra_parameters(self, shape: tuple[int, int, int]) -> int:
        """Parameters of networks that are not of the energy's kind."""
        return 0

    @classmethod
    def suggested(cls) -> dict[str, dict[str, Any]]:
        """Ranges to search of own fields that declare one, by the field's dotted name."""
        found = {}
        for name, info in cls.model_fields.items():
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            given = extra.get("suggest")
            if isinstance(given, list) and given:
                found[f"method_args.{name}"] = {"low": given[0], "high": given[1], "log": "log" in given}
        return found

    @classmethod
    def own_columns(cls) -> tuple[Column, ...]:
        """The method's own fields as typed columns, nullable."""
        return tuple(_column(name, info) for name, info in cls.model_fields.items())


def _column(name: str, info: FieldInfo) -> Column:
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    kinds: dict[Any, ColumnType] = {bool: "bool", int: "int64", float: "float64"}
    options = (info.annotation, *(get_args(info.annotation) if get_origin(info.annotation) is not tuple else ()))
    kind: ColumnType = next((kinds[o] for o in kinds if o in options), "string")  # of several numbers, or words: text
    unit, symbol = str(extra.get("unit", "")), str(extra.get("symbol", ""))
    return Column(f"method_args.{name}", kind, info.description or "", unit, symbol=symbol)


METHODS: dict[str, str] = {
    "m-ebm": "trainables.methods.m_ebm:MEbm",
    "m-jem": "trainables.methods.m_ebm:MJem",
    "lse-jem": "trainables.methods.m_ebm:LseJem",
    "softmax": "trainables.methods.m_ebm:Softmax",
    "jem": "trainables.methods.jem:Jem",
    "jem++": "trainables.methods.jem:JemPlusPlus",
    "igebm": "trainables.methods.igebm:Igebm",
    "shortrun": "trainables.methods.shortrun:ShortRun",
    "kl-ebm": "trainables.methods.kl_ebm:KlEbm",
    "f-ebm": "trainables.methods.f_ebm:FEbm",
    "vera": "trainables.methods.vera:Vera",
    "sada-jem": "trainables.methods.sada_jem:SadaJem",
    "diffurecov": "trainables.methods.diffurecov:DiffuRecov",
    "cf-ebm": "trainables.methods.cf_ebm:CfEbm",
    "gebm": "trainables.methods.gebm:Gebm",
    "clel": "trainables.methods.clel:Clel",
}
"""Methods by name, each a class in a module that is imported when it is asked for: they need torch."""
BUILT_IN["method"] = METHODS.keys
_MET: dict[str, type[MethodSpec]] = {}
"""Methods of others' that this process has met."""
on_change(_MET.clear)


def method_class(name: str) -> type[MethodSpec]:
    """The method of a name, a reference or an installed plug-in's. Raises ValueError: there is none, or no trust."""
    if name in METHODS:
        return _built_in(name)
    if not is_reference(name) and name not in registered("method"):
        known = ", ".join(f"'{n}'" for n in [*METHODS, *registered("method")])
        raise ValueError(f"unknown method; expected {known}, or FILE.py:CLASS or MODULE:CLASS")
    found = resolve(name, "method")
    if not (isinstance(found, type) and issubclass(found, MethodSpec)):
        raise ValueError(f"method {name}: {name.rpartition(':')[2]} is not a method (a subclass of mebm.Method)")
    try:
        check_hooks(found, get_args(Group))
    except ValueError as error:
        raise ValueError(f"method {short(name)}: {error}") from None
    _MET[name] = found
    return found


@cache
def _built_in(name: str) -> type[MethodSpec]:
    module, _, attribute = METHODS[name].partition(":")
    found: type[MethodSpec] = getattr(import_module(module), attribute)
    return found


def all_methods() -> dict[str, type[MethodSpec]]:
    """The methods that come with the package and those that this process has met, by name."""
    return {name: _built_in(name) for name in METHODS} | _MET


def with_own_fields(
    rows: Sequence[Mapping[str, Any]], columns: tuple[Column, ...]
) -> tuple[list[Mapping[str, Any]], tuple[Column, ...]]:
    """Rows of trials with their methods' own fields, each a typed column after the others.

    What a method has not is null, and so are the fields of one that cannot be imported here.
    """
    found: dict[str, Column] = {}
    whole = []
    for row in rows:
        own = json.loads(row["config"]).get("method_args") if "method_args" in (row.get("config") or "") else None
        if own:
            try:
                mine = method_class(row["method"]).own_columns()
            except ValueError:
                mine = ()
            found |= {c.name: c for c in mine}
            values = {c.name: own.get(c.name.removeprefix("method_args.")) for c in mine}
            row = {**row, **{n: json.dumps(v) if isinstance(v, list | dict) else v for n, v in values.items()}}
        whole.append(row)
    return whole, (*columns, *found.values())
