"""From YAML text and --set to a validated study; the studies that come with the package."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from study.config.errors import UserError, nearest, one_line, shown, validation_error
from study.config.fields import assign, is_script, parse_assignments, trial_model
from study.config.own_code import short_names
from study.config.own_names import methods_of, own_names, with_whole_names
from study.config.packaged import packaged_configs, packaged_text
from study.config.paths import meant
from study.config.rescue import check_rescue
from study.config.script import script_study
from study.config.search import Range
from study.config.space import build_space, check_names
from study.config.study import StudyConfig
from study.config.yaml_input import parse_yaml, read_bytes
from trainables.config.method import method_class
from trainables.plugins.reference import allow
from trainables.results.credentials import is_url
from trainables.results.own import field_of
from trainables.results.spelling import nearest_path


def _read(config: str) -> tuple[str, bytes, tuple[Path, ...]]:
    """What to call a config in a message, its bytes, and its folder where it is a file.

    Raises:
        UserError: no such file, or it cannot be read.
    """
    path = Path(config)
    with suppress(OSError, ValueError):  # too long for a name, a NUL
        if path.exists() and not path.is_dir():  # a folder beside a packaged config's name does not hide it
            return str(path), read_bytes(path), (path.resolve().parent,)
    names = packaged_configs()
    if config in names:
        return f"{config}.yaml", packaged_text(config), ()
    near = nearest(config, names) or nearest_path(path)
    wanted = shown(config, 300, quoted=False)
    raise UserError(f"{wanted}: no such file, and no packaged config; mebm configs lists those{near}")


def config_text(config: str) -> str:
    """The YAML of a config: its own text, comments and all. UserError: no such file, not YAML."""
    source, data, _ = _read(config)
    parse_yaml(data, source)
    return data.decode()


def read_config(config: str) -> tuple[str, dict[str, Any]]:
    """What to call a config, given a path or the name of a packaged one, in a message, and its raw mapping.

    Raises:
        UserError: no such file, not YAML, not a mapping.
    """
    source, data, folder = _read(config)
    allow(*folder)
    values = parse_yaml(data, source)
    if not isinstance(values, dict):
        raise UserError(f"{source}: must be a mapping of keys to values, but is {type(values).__name__}")
    return source, values


def load_study(config: str, assignments: tuple[str, ...] = (), *, probed: bool = False) -> StudyConfig:
    """A validated study from a path or packaged name, with `--set` on top.

    A key of `--set` that is not a study field but a trial field means `trial.KEY`. See `script_study` for `probed`.

    Raises:
        UserError: anything wrong with the file or the assignments.
    """
    source, values = read_config(config)
    return new_study(values, assignments, source, Path(config).parent, probed=probed)


def new_study(
    values: dict[str, Any], assignments: tuple[str, ...], source: str, beside: Path, *, probed: bool
) -> StudyConfig:
    """A validated study from a raw mapping, with `--set` on top; see `load_study` and `script_study`."""
    values = short_names(_assigned(values, assignments), source)
    return validate_study(script_study(values, source, beside, probed=probed), source)


def change_study(study: StudyConfig, assignments: tuple[str, ...], source: str) -> StudyConfig:
    """A study with `--set` on top; see `load_study`."""
    if not assignments:
        return study
    return validate_study(_assigned(study.model_dump(mode="json"), assignments), source)


def _assigned(values: dict[str, Any], assignments: tuple[str, ...]) -> dict[str, Any]:
    trial = values.get("trial")
    trial = trial if isinstance(trial, dict) else {}
    fields = trial_model(trial).model_fields
    for key, value in parse_assignments(assignments):
        key = key if is_script(trial) else field_of(key)
        head = key.split(".")[0]
        part = key.partition(".")[2]
        if head in fields and part in Range.model_fields:
            raise UserError(f"--set {shown(key, quoted=False)}: unknown key; did you mean {meant(key, trial)}?")
        if head not in StudyConfig.model_fields and head in fields:
            key = f"trial.{key}"
            _refuse_searched(key.removeprefix("trial."), value, values)
        elif key in own_names(*methods_of(values)):
            key = f"trial.method_args.{key}"
        elif head not in StudyConfig.model_fields:
            likely = meant(key, trial)
            near = f"; did you mean {likely}?" if likely is not None else ""
            raise UserError(f"--set {shown(key, quoted=False)}: unknown key{near}")
        values = assign(values, {key: value})
    return values


def _refuse_searched(name: str, value: Any, values: Mapping[str, Any]) -> None:
    """Refuse to fix what a study searches, and say how that is done."""
    search = values.get("search")
    search = search if isinstance(search, Mapping) else {}
    blocks = search.get("grid")
    parts = [search.get("space"), *(blocks if isinstance(blocks, list | tuple) else ())]
    if any(isinstance(part, Mapping) and name in map(field_of, part) for part in parts):
        text = shown(value, quoted=False)
        raise UserError(
            f"--set {name}={text}: the study searches {name}; mebm sweep -s {name}={text} fixes it, and "
            f"-s {name}=A,B or {name}=LOW:HIGH changes what is searched"
        )


def _with_own_ranges(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A study's raw mapping with the range that the method suggests in the place of every `auto` of `search.space`."""
    trial, search = values.get("trial") or {}, values.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    if not isinstance(search, dict) or not isinstance(space, dict) or not isinstance(trial, dict):
        return values
    wanted = [key for key, spec in space.items() if spec == "auto"]
    if not wanted:
        return values
    if is_script(trial):
        raise UserError(f"{source}: search.space.{wanted[0]}: auto is of a method's own fields; give low and high")
    name = trial.get("method", "m-ebm")
    try:
        ranges = method_class(name).suggested()
    except (ValueError, TypeError):  # no method: the trial's own check says what is wrong with it
        ranges = {}
    for key in wanted:
        if key not in ranges:
            known = f"; {name} has one for {', '.join(ranges)}" if ranges else f"; {shown(name)} has none"
            raise UserError(f"{source}: search.space.{key}: auto needs a range of the method's own{known}")
    return {**values, "search": {**search, "space": {k: ranges[k] if k in wanted else v for k, v in space.items()}}}


def _resolved(place: str, where: str) -> str:
    """A path made absolute. UserError: it cannot be, as in a loop of links."""
    try:
        return str(Path(place).resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{where}: {shown(place, 200)} cannot be followed ({one_line(error)})") from None


def validate_study(values: dict[str, Any], source: str) -> StudyConfig:
    """A study from a raw mapping; every setting it can propose is a valid trial.

    Raises:
        UserError: the first thing that is wrong.
    """
    try:
        trial = values.get("trial")
        if not (isinstance(trial, dict) and is_script(trial)):  # whose arguments are called as it likes
            values = with_whole_names(values, source)
            check_names(values, source)  # before what stands under a name: a misspelt one is the reason of much else
        study = StudyConfig.model_validate(_with_own_ranges(values, source))
    except ValidationError as error:
        raise validation_error(source, error, StudyConfig) from error
    space = build_space(study.trial, study.search, study.seeds[0], source)
    if isinstance(study.trial.get("data_dir"), str) and not is_script(study.trial):
        # Ray's workers have working directories of their own, so a path is made absolute where the user gave it.
        resolved = {"data_dir": _resolved(study.trial["data_dir"], f"{source}: data_dir")}
        study = study.model_copy(update={"trial": {**study.trial, **resolved}})
        space = replace(space, base={**space.base, **resolved})
    if study.search.earlier:  # the same folders from wherever it is resumed
        places = tuple(p if is_url(p) else _resolved(p, f"{source}: search.from") for p in study.search.earlier)
        study = study.model_copy(update={"search": study.search.model_copy(update={"from": places})})
    study.__dict__["space"] = space
    check_rescue(study, source)
    return study
