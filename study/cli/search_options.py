"""What `mebm sweep` takes on its command line in a study's place, or on top of one: `-s`, `--script`, `--seeds`, ..."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study.config.errors import UserError, nearest, shown
from study.config.fields import assign, is_script
from study.config.yaml_input import parse_yaml
from trainables.results.own import field_of

_RANGE = re.compile(r"(?P<low>[^:\[\],{}'\"]+):(?P<high>[^:\[\],{}'\"]+)(?::(?P<how>[^:]+))?")
_DOTS = re.compile(r"(?P<low>[\d.e]*\d)\s*(\.\.+|-|to)\s*(?P<high>\d[\d.e]*)")
"""How other tools write a range."""
_EXAMPLE = "for example -s sampling_steps=1:20:log, -s step_size=0.1,1,10 or -s batch_size=64"


def given(assignment: str) -> tuple[str, Any]:
    """What `-s NAME=...` says: a name, and a range or `{"choices": [...]}`, or the value that is fixed.

    Raises:
        UserError: it says none of these.
    """
    name, equals, text = assignment.partition("=")
    name, text, option = name.strip(), text.strip(), f"-s {shown(assignment, quoted=False)}"
    if not equals or not name or not text:
        raise UserError(f"{option}: must be NAME=low:high[:log|:int|:STEP], NAME=a,b or NAME=value; {_EXAMPLE}")
    found = _RANGE.fullmatch(text)
    numbers = None if found is None else [_number(found[end], option) for end in ("low", "high")]
    if found is not None and numbers is not None and None not in numbers:
        return name, _range(numbers, found["how"], option)
    if (dots := _DOTS.fullmatch(text)) is not None:
        raise UserError(f"{option}: a range is {name}={dots['low']}:{dots['high']}, and choices are {name}=1,2,5")
    if text.startswith("["):
        value = parse_yaml(text, option)
    elif "," in text:
        value = [parse_yaml(word, option) for word in text.split(",")]
    else:
        return name, parse_yaml(text, option)
    if not isinstance(value, list) or not value or any(isinstance(v, list | dict) for v in value):
        raise UserError(f"{option}: must be a list of plain values")
    return name, {"choices": value}


def _number(text: str, option: str) -> int | float | None:
    value = parse_yaml(text, option)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _range(ends: Sequence[int | float | None], how: str | None, option: str) -> dict[str, Any]:
    found: dict[str, Any] = dict(zip(("low", "high"), ends, strict=True))
    if how == "log":
        found["log"] = True
    elif how == "int":
        if any(n != int(n) for n in found.values()):
            raise UserError(f"{option}: int needs whole ends, but got {found['low']} and {found['high']}")
        found = {end: int(n) for end, n in found.items()}
    elif how is not None:
        if (step := _number(how, option)) is None or step <= 0:
            raise UserError(f"{option}: {shown(how)} is none of log, int and a step")
        found["step"] = step
    return found


def seeds_of(text: str) -> list[int]:
    """`3` for the seeds 0, 1, 2; `0,4,7` for these. UserError: neither."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 19 for word in words) or (len(words) == 1 and int(words[0]) < 1):
        raise UserError(f"--seeds {shown(text, quoted=False)}: must be how many (3: 0, 1, 2), or a list such as 0,4,7")
    if len(words) == 1 and int(words[0]) > 100_000:
        raise UserError(f"--seeds {shown(text, quoted=False)}: at most 100,000")
    return [int(word) for word in words] if len(words) > 1 else list(range(int(words[0])))


def objective_of(text: str) -> dict[str, Any]:
    """`fid`, `fid:minimize` or `accuracy:maximize` as an objective. UserError: another word after the colon."""
    metric, colon, direction = text.partition(":")
    if colon and direction not in ("minimize", "maximize"):
        near = nearest(direction, ("minimize", "maximize"))
        raise UserError(f"--objective {shown(text, quoted=False)}: the direction is minimize or maximize{near}")
    return {"metric": metric.strip(), "direction": direction or None}


def script_values(script: str | None, command: str | None, python: str | None) -> dict[str, Any]:
    """A study of a script as a raw mapping, named after it. UserError: neither or both."""
    if script is None and command is None:
        raise UserError("Missing argument 'CONFIG'. Give a study, or --script or --command.")
    if script is not None and command is not None:
        raise UserError("give a CONFIG, --script or --command, and one of them alone")
    try:
        one = script is not None and (Path(script).is_file() or len(script.split()) < 2)
        words = [script] if one and script is not None else shlex.split(command or script or "")
    except ValueError as error:
        raise UserError(f"--command: {error}") from None
    word = next((w for w in words if w and w.endswith(".py")), words[0] if words else "")
    stem = Path(word.partition(":")[0]).name.removesuffix(".py") if word else ""
    trial = {"script": script, "command": command, "python": python}
    return {
        "name": re.sub(r"[^A-Za-z0-9_.-]", "-", stem).lstrip("_.-")[:200] or "script",
        "trial": {key: value for key, value in trial.items() if value is not None},
        "search": {},
    }


def searched(values: dict[str, Any], assignments: Sequence[str], trials: int | None) -> dict[str, Any]:
    """A study's raw mapping with what `-s` and `--trials` say on top.

    Where nothing but choices is searched, and nobody says how many trials, it is the grid.

    Raises:
        UserError: a range in a grid; a name that is given twice.
    """
    trial = dict(_mapping(values.get("trial")))
    script = is_script(trial)
    # A script's arguments are called as it likes.
    pairs = [(n if script else field_of(n.removeprefix("trial.")), what) for n, what in map(given, assignments)]
    if twice := [n for n, _ in pairs if [m for m, _ in pairs].count(n) > 1]:
        raise UserError(f"-s {twice[0]}: is given twice")
    search = dict(_mapping(values.get("search")))
    space = dict(_mapping(search.get("space")))
    fixed = dict(_mapping(trial.get("args"))) if script else trial
    grid = [dict(_mapping(b)) for b in search.get("grid") or ()] if search.get("sampler") == "grid" else None
    starts = [dict(_mapping(point)) for point in search.get("start") or ()]
    for name, spec in pairs:
        for place in (space, *(grid or ()), *starts):
            for there in [n for n in place if n == name or (not script and field_of(n) == name)]:
                del place[there]
        fixed = {n: v for n, v in fixed.items() if n != name} if script else _without(fixed, name.split("."))
        if not isinstance(spec, dict):
            fixed = {**fixed, name: spec} if script else assign(fixed, {name: spec})
        elif grid is None:
            space[name] = spec
        elif "choices" in spec:
            grid = [{**block, name: spec["choices"]} for block in grid]
        else:
            raise UserError(f"-s {name}: the study is a grid, which has no ranges; give choices: -s {name}=1,2,5")
    trial = {**trial, "args": fixed} if script else fixed
    if starts:
        search["start"] = [point for point in starts if point]
    if trials is not None:
        search["trials"] = trials
    if grid is not None:
        search["grid"] = grid if any(grid) else [{}]
    elif space:
        choices = all(isinstance(spec, Mapping) and set(spec) == {"choices"} for spec in space.values())
        if choices and search.get("trials") is None and search.get("sampler") is None:
            search = {**search, "sampler": "grid", "grid": [{n: list(s["choices"]) for n, s in space.items()}]}
            search.pop("space", None)
        else:
            search["space"] = space
    elif script or search.get("space"):  # nothing is left to search: one setting, with all its seeds
        search = {"sampler": "grid", "grid": [{}]}
    return {**values, "trial": trial, "search": search}


def _without(values: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """A trial's fields without the one of a dotted name."""
    head, *rest = path
    if rest and isinstance(below := values.get(head), Mapping):
        return {**values, head: _without(below, rest)}
    return {n: v for n, v in values.items() if n != head or rest}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def here(config: str | None) -> Path:
    """Folder beside which a script is looked for."""
    return Path(os.curdir) if config is None else Path(config).parent
