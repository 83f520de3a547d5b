"""Running a study from a notebook or a script, as the commands `mebm sweep` and `mebm resume` do."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.results.load import Results, load
from study.cli import running
from study.cli.options import PLACE
from study.config.load import change_study, load_study, new_study
from study.config.study import StudyConfig
from study.display.console import StudyConsole
from trainables.plugins.reference import allow

if TYPE_CHECKING:
    from study.run.ending import Ending


def run(
    config: str | Path | Mapping[str, Any] | StudyConfig,
    *,
    changes: Mapping[str, Any] | None = None,
    results: str | Path = "results",
    address: str | None = None,
    show: bool = False,
) -> Results:
    """Run a study to its end and load what it found; tables and report are in its folder, as after `mebm sweep`.

    A trial that diverged is a result; for one that failed there is a warning.

    Args:
        config: the name of a packaged study, a YAML file, what such a file holds as a mapping, or a `StudyConfig`.
        changes: fields to change by their dotted keys, as `--set` does; a field of a trial needs no `trial.` before it.
        results: folder for study folders, or a URL of object storage.
        address: Ray cluster to use (`auto`: the one on this machine); None starts one for this study.
        show: print what `mebm sweep` prints; a terminal shows a live table, a notebook one line per event.

    Raises:
        UserError: a mistake in the configuration, a place that is taken, missing images.
        RunError: Ray does not start, or is lost.
        KeyboardInterrupt: it was interrupted; `resume` continues it.
    """
    assignments = _assignments(changes)
    if isinstance(config, StudyConfig):
        study = change_study(config, assignments, "config")
    elif isinstance(config, Mapping):
        allow()
        study = new_study(dict(config), assignments, "config", Path(), probed=True)
    else:
        study = load_study(str(config), assignments, probed=True)
    running.check(study, address)
    with _console(show) as console:
        return _ended(*running.start(study, PLACE.convert(results, None, None), address, console))


def resume(
    folder: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    address: str | None = None,
    retry_failed: bool = False,
    accept_changes: bool = False,
    show: bool = False,
) -> Results:
    """Continue a study from its last checkpoints and load what it found; arguments and errors as of `run`.

    Args:
        folder: the study's folder or URL.
        changes: budget, resources and run, more settings, and seeds at the end may be changed.
        retry_failed: run trials that failed once more, from their last checkpoint.
        accept_changes: continue with other code or images than the study began with.
    """
    how = {"retry_failed": retry_failed, "accept_changes": accept_changes}
    place = PLACE.convert(folder, None, None)
    with _console(show) as console:
        return _ended(*running.resume(place, _assignments(changes), address, console, **how))


def _assignments(changes: Mapping[str, Any] | None) -> tuple[str, ...]:
    return tuple(f"{key}={json.dumps(value, default=str)}" for key, value in (changes or {}).items())  # JSON is YAML


@contextmanager
def _console(show: bool) -> Iterator[StudyConsole]:
    if show:
        yield StudyConsole(sys.stdout)
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        yield StudyConsole(nowhere)


def _ended(ending: Ending, run: running.Run) -> Results:
    place = run.url or run.folder
    if ending.interrupted:
        raise KeyboardInterrupt(f"interrupted; continue with mebm.resume({str(place)!r})")
    if ending.failed:
        warnings.warn(f"{ending.failed} trial(s) failed; see {run.folder / 'study.log'}", stacklevel=3)
    return load(place)
