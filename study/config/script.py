"""A study of somebody's training script: where it lies, what it declares, and the types of its arguments."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.config.errors import UserError, nearest, shown
from study.config.fields import is_script, make_trial
from trainables.config.script import PLACEHOLDER, ScriptConfig
from trainables.plugins.trust import trust, trusted

if TYPE_CHECKING:
    from study.config.study import StudyConfig
    from trainables.script.probe import Declaration

AUTO = "auto"
"""Objective of a script's study that names none: the first metric with a direction that the script declares."""


def script_study(values: dict[str, Any], source: str, beside: Path, *, probed: bool) -> dict[str, Any]:
    """A study's raw mapping, its script's paths made absolute; another study's is as it was.

    Args:
        beside: folder of the configuration, where a script is looked for that is not in the working directory.
        probed: run the script up to its `Monitor(...)`, and take its declarations: names, defaults, types.

    Raises:
        UserError: no such file; a script that fails before its `Monitor`; an argument it does not declare.
    """
    trial = values.get("trial")
    if not isinstance(trial, dict) or not is_script(trial):
        return values
    values = {**values, "trial": _placed(trial, source, beside)}
    return _declared(values, source) if probed else values


def _placed(trial: dict[str, Any], source: str, beside: Path) -> dict[str, Any]:
    here = Path.cwd()
    found = {"kind": "script", **trial}
    cwd = found.get("cwd")
    if cwd is None or isinstance(cwd, str):
        found["cwd"] = str(here / (cwd or ""))
        if not Path(found["cwd"]).is_dir():
            raise UserError(f"{source}: trial.cwd = {shown(cwd)}: no such folder")
    script, python = found.get("script"), found.get("python")
    places: list[Path] = []
    path = None
    if isinstance(script, str):
        with suppress(OSError, ValueError, RuntimeError):  # a name too long, a NUL, a user without a home
            places = list(dict.fromkeys(p / Path(script).expanduser() for p in (here, beside.resolve())))
            path = next((p for p in places if p.is_file()), None)
    if isinstance(script, str) and path is None and len(script.split()) > 1 and found.get("command") is None:
        found["command"] = found.pop("script")
    elif isinstance(script, str) and script.endswith(".py"):
        if path is None:
            kind = "is a folder" if any(p.is_dir() for p in places) else "no such file"
            looked = " or ".join(str(p.parent) for p in places)
            near = nearest(Path(script).name, (p.name for p in here.glob("*.py")))
            raise UserError(f"{source}: trial.script = {shown(script)}: {kind} (looked in {looked}){near}")
        found["script"] = os.path.abspath(path)  # noqa: PTH100  # a link stays one
    if isinstance(python, str):
        place = shutil.which(os.path.abspath(Path(python).expanduser()) if os.sep in python else python)  # noqa: PTH100
        if place is None:
            raise UserError(f"{source}: trial.python = {shown(python)}: no such program")
        found["python"] = place
    return found


def _described(study: StudyConfig) -> str:
    """Hash of what a script's study runs, and with which arguments; how much of it may change."""
    search = {k: v for k, v in study.search.model_dump(mode="json").items() if k != "trials"}
    text = json.dumps({"trial": study.trial, "search": search}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def note_begun(study: StudyConfig) -> None:
    """The user begins a study: the script that it names is run when it is resumed."""
    if study.is_script:
        trust(_described(study))


def refuse_unknown_script(study: StudyConfig, place: str, *, given: bool) -> None:
    """Refuse a script's study that this user did not begin on this machine: it may be a stranger's.

    Args:
        given: `--trust-code` was.

    Raises:
        UserError: so, and it was not.
    """
    if not study.is_script or trusted(_described(study)):
        return
    if not given:
        runs = study.trial.get("script") or study.trial.get("command")
        raise UserError(
            f"{place}: was not begun by you on this machine, and would run {shown(runs, 200, quoted=False)}; read it, "
            "then --trust-code runs it"
        )
    note_begun(study)


def refuse_missing_script(study: StudyConfig) -> None:
    """Refuse a study whose script, interpreter or working directory is gone. UserError: so."""
    for key in ("script", "python", "cwd"):
        path = study.trial.get(key)
        if isinstance(path, str) and (key != "script" or path.endswith(".py")) and not Path(path).exists():
            raise UserError(f"trial.{key} = {shown(path)}: is gone; put it back where the study began with it")


def _declared(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The study with what its script declares: every argument it does not set at its default, each of its type."""
    from trainables.script.probe import ProbeError, probe

    trial, search = values["trial"], values.get("search")
    searched = _searched(search)
    some = {name: _any_value(spec) for name, spec in searched}
    config = make_trial({**trial, "args": {**_mapping(trial.get("args")), **some}}, source)
    assert isinstance(config, ScriptConfig)
    try:
        told = probe(config)
    except ProbeError as error:
        raise UserError(f"{error}; nothing was started") from None
    names = dict.fromkeys([*_mapping(trial.get("args")), *(name for name, _ in searched)])
    for name in names:
        _refuse_unknown(name, config, told)
    args = {n: _typed(told, f"trial.args.{n}", n, v, source) for n, v in _mapping(trial.get("args")).items()}
    rest = {n: v for n, v in told.values.items() if n not in names}
    options = told.options
    divergence = {"rule": options["rule"], "learn_from": options["learn_from"], **_mapping(trial.get("divergence"))}
    trial = {
        "signal_every": options["every"], **trial, "args": {**rest, **args}, "divergence": divergence,
        "symbols": {**options["symbols"], **_mapping(trial.get("symbols"))},
    }  # fmt: skip
    return {**values, "trial": trial, "search": _typed_search(search, told, source)}


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _searched(search: Any) -> list[tuple[str, Any]]:
    """Names and what they are searched over, of a mapping that nobody has validated yet."""
    search = _mapping(search)
    blocks = search.get("grid") if isinstance(search.get("grid"), list | tuple) else []
    return [*_mapping(search.get("space")).items(), *(p for block in blocks for p in _mapping(block).items())]


def _any_value(spec: Any) -> Any:
    if isinstance(spec, Mapping):
        spec = spec.get("choices", spec.get("low"))
    return spec[0] if isinstance(spec, list | tuple) and spec else spec


def _refuse_unknown(name: str, config: ScriptConfig, told: Declaration) -> None:
    """An argument that neither `Monitor(...)` declares nor a command has a place for."""
    known = dict(told.defaults)
    if config.command is not None:
        places = {m[1] for m in PLACEHOLDER.finditer(config.command)}
        if "args" in places:
            return
        known |= dict.fromkeys(places)
    if name not in known and (known or config.command is not None):
        has = nearest(name, known) or f"; it has {', '.join(known) or 'none'}"
        raise UserError(f"{told.script} declares no {name!r}{has}")


def _typed(told: Declaration, place: str, name: str, value: Any, source: str) -> Any:
    try:
        return told.typed(name, value)
    except ValueError as error:
        raise UserError(f"{source}: {place}: {error}") from None


def _typed_search(search: Any, told: Declaration, source: str) -> Any:
    """What is searched, every end and choice of its default's type; what is malformed is left to be refused."""
    if not isinstance(search, Mapping):
        return search

    def each(place: str, name: str) -> Callable[[Any], Any]:
        return lambda value: _typed(told, place, name, value, source)

    space = {}
    for name, spec in _mapping(search.get("space")).items():
        typed = each(f"search.space.{name}", name)
        if isinstance(spec, Mapping):
            ordered = told.kinds.get(name) not in ("bool", "str")
            spec = {
                k: [typed(v) for v in given] if k == "choices" and isinstance(given, list | tuple)
                else typed(given) if k in ("low", "high", "step") and given is not None and ordered else given
                for k, given in spec.items()
            }  # fmt: skip
            if not ordered and "low" in spec:
                raise UserError(f"{source}: search.space.{name}: has no order, give choices instead of low and high")
        space[name] = spec
    found = {**search, "space": space} if "space" in search else dict(search)
    if isinstance(search.get("grid"), list | tuple):
        found["grid"] = [
            {
                n: [each(f"search.grid[{i}].{n}", n)(x) for x in v] if isinstance(v, list | tuple)
                else each(f"search.grid[{i}].{n}", n)(v)
                for n, v in block.items()
            } if isinstance(block, Mapping) else block
            for i, block in enumerate(search["grid"])
        ]  # fmt: skip
    if isinstance(search.get("start"), list | tuple):
        found["start"] = [
            {n: each(f"search.start[{i}].{n}", n)(v) for n, v in point.items()} if isinstance(point, Mapping) else point
            for i, point in enumerate(search["start"])
        ]
    return found
