"""The configuration of a trial that is somebody's own training script."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from trainables.config.parts import Model, PositiveFloat
from trainables.results.own import SET, SYMBOLS, is_own
from trainables.results.schema import SETTING_FIELDS

Scalar = bool | int | float | str | None
_TYPES = {c.name: c.type for c in SETTING_FIELDS}
UNKNOWN = "own"
"""Data set of a script that names none."""
PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w.]*)(:hydra)?\}")
_SCRIPT = re.compile(r"[^\0]*\.py|[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_OF_A_SHELL = frozenset(("&&", "||", "|", ";", ">", ">>", "<", "2>&1", "&"))
OF_THE_RUN = ("seed", "folder", "args")
"""Placeholders that are no arguments."""


class ScriptDivergence(Model):
    """When a script's run is called diverged or collapsed."""

    rule: Literal["learnt", "m-ebm", "none"] = Field(
        "learnt",
        description="learnt: gaps beyond 50 times the run's own (1,000 times once); m-ebm: that method's limits, in "
        "its energies' units; none. All: a value that is not finite, |loss| above its limit, the optimum of an L2 term",
    )
    gap_limit: PositiveFloat = Field(2.0, description="of rule m-ebm: |E+ - E-| of a healthy run")
    gap_patience: int = Field(3, ge=1, le=10_000, description="of rule m-ebm: iterations in a row beyond it")
    l2_fraction: PositiveFloat = Field(0.5, description="of rule m-ebm: the limit as a fraction of 1 / l2_weight")
    hard_gap_limit: PositiveFloat = Field(20.0, description="of rule m-ebm: |E+ - E-| that ends a run at once")
    loss_limit: PositiveFloat = Field(1e5, description="|loss| of the released check")
    collapse_patience: int = Field(20, ge=1, le=100_000, description="iterations near -1 / l2_weight that mean it")
    learn_from: int = Field(0, ge=0, le=10**12, description="iteration from which the learnt rule learns")


class ScriptConfig(Model):
    """One run of a training script that reports through `mebm.Monitor`."""

    kind: Literal["script"] = "script"
    """What tells it from a built-in trial's configuration."""
    script: str | None = Field(
        None,
        max_length=4000,
        description="path of a Python file, or module:function, which is called with the run and its arguments",
    )
    command: str | None = Field(
        None,
        max_length=20_000,
        description="a command in the script's place, split as a shell splits it and filled: {NAME}, {seed}, {folder} "
        "or {args} (--a=1 --b=2), {args:hydra} (a=1 b=2)",
    )
    shell: bool = Field(False, description="command is run by /bin/sh, its values quoted")
    args: dict[str, Scalar] = Field(default_factory=dict, description="arguments by name")
    python: str | None = Field(None, max_length=4000, description="interpreter; null: the study's own")
    cwd: str | None = Field(None, max_length=4000, description="working directory; null: where the study was started")
    files: tuple[str, ...] = Field(
        (), description="further files that are part of the code, as patterns (nets/**/*.py)"
    )
    symbols: dict[str, str | None] = Field(
        default_factory=dict, description="what an argument is in the paper's terms: {n_steps: sampling_steps}"
    )
    divergence: ScriptDivergence = Field(default_factory=ScriptDivergence, description="detector of divergence")
    signal_every: int = Field(1, ge=1, le=10**9, description="keep the signals of every n-th iteration")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the run")

    @field_validator("args")
    @classmethod
    def _named(cls, value: dict[str, Scalar]) -> dict[str, Scalar]:
        for name in value:
            if not is_own(f"{SET}{name}"):
                raise ValueError(f"{name!r} is not a name of an argument: letters, digits, '_', '.' and '-'")
        return value

    @field_validator("symbols")
    @classmethod
    def _columns(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        for name, column in value.items():
            if column is not None and column not in _TYPES:
                raise ValueError(f"{name}: {column!r} is not a setting; expected one of {', '.join(_TYPES)}")
        return value

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.script is None) == (self.command is None):
            raise ValueError("needs script or command, and not both")
        if self.script is not None and not _SCRIPT.fullmatch(self.script):
            raise ValueError(
                f"script: {self.script!r} is neither a Python file (*.py) nor module:function; see command"
            )
        if self.shell and self.command is None:
            raise ValueError("shell belongs to command")
        if self.command is not None:
            try:
                words = [self.command] if self.shell else shlex.split(self.command)
            except ValueError as error:
                raise ValueError(f"command: {error}") from None
            if not words:
                raise ValueError("command is empty")
            if not self.shell and (odd := _OF_A_SHELL.intersection(words)):
                raise ValueError(f"command: {sorted(odd)[0]} is for a shell, which needs shell: true")
        return self

    @property
    def method(self) -> str:
        """What stands in the place of a method's name: the script's file or module, or the command's script."""
        if self.script is not None:
            return Path(self.script).name if self.script.endswith(".py") else self.script
        words = shlex.split(self.command or "")
        return next((Path(w).name for w in words if w.endswith(".py")), Path(words[0]).name)

    def column_of(self, name: str) -> str | None:
        """The setting's column that an argument fills; None where it has its own."""
        column = self.symbols[name] if name in self.symbols else SYMBOLS.get(name, name)
        return column if column in _TYPES else None

    def setting(self, _iterations_per_epoch: int | None = None) -> dict[str, Any]:
        """The setting's columns of `trials.parquet`, and one `set.NAME` for every argument that fills none of them."""
        values: dict[str, Any] = dict.fromkeys(_TYPES) | {"method": self.method, "dataset": UNKNOWN}
        for name, value in self.args.items():
            column = self.column_of(name)
            if column is not None and column != "method" and _fits(_TYPES[column], value):
                values[column] = value
            else:
                values[f"{SET}{name}"] = value
        return values

    def to_json(self, *, with_seed: bool = True) -> str:
        """The complete configuration as JSON with sorted keys."""
        values = self.model_dump(mode="json")
        if not with_seed:
            del values["seed"]
        return json.dumps(values, sort_keys=True)

    def identity(self) -> str:
        """What makes it one setting with all others that differ in their seed alone: JSON with sorted keys.

        The code is not part of it, nor where it lies: a study refuses to go on with other code.
        """
        return json.dumps({"method": self.method, "command": self.command, "args": self.args}, sort_keys=True)

    def argv(self, python: str, folder: Path) -> list[str]:
        """The command that runs it.

        Args:
            python: the study's interpreter.
            folder: of the trial's own outputs.

        Raises:
            ValueError: a placeholder names no argument.
        """
        interpreter = self.python or python
        if self.script is not None:
            if self.script.endswith(".py"):
                return [interpreter, self.script]
            return [interpreter, "-c", "import sys; from mebm import Monitor; Monitor.call(sys.argv[1])", self.script]
        fixed = {"seed": str(self.seed), "folder": str(folder)}
        if self.shell:
            filled = PLACEHOLDER.sub(lambda m: " ".join(map(shlex.quote, self._filled(m, fixed))), self.command or "")
            return ["/bin/sh", "-c", filled]
        words: list[str] = []
        for word in shlex.split(self.command or ""):
            whole = PLACEHOLDER.fullmatch(word)
            if whole:
                words += self._filled(whole, fixed)
            else:
                words.append(PLACEHOLDER.sub(lambda m: " ".join(self._filled(m, fixed)), word))
        return words

    def _filled(self, match: re.Match[str], fixed: Mapping[str, str]) -> list[str]:
        name = match[1]
        if name == "args":
            dashes = "" if match[2] else "--"
            return [f"{dashes}{n}={_text(v)}" for n, v in self.args.items()]
        if name not in fixed and name not in self.args:
            known = ", ".join([*self.args, *OF_THE_RUN])
            raise ValueError(f"command: {{{name}}} is not an argument; there are {known}")
        return [fixed[name] if name in fixed else _text(self.args[name])]


def _text(value: Scalar) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _fits(kind: str, value: Scalar) -> bool:
    if kind == "string":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return kind == "float64" or value == int(value)
