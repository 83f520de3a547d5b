"""`mebm sweep --check-resume`: does a script that was cut off go on as one that was not?"""

from __future__ import annotations

import math
import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study.config.errors import UserError
from study.config.space import any_value
from study.config.study import StudyConfig
from trainables.config.script import ScriptConfig
from trainables.results.own import OWN
from trainables.results.schema import Outcome
from trainables.script.trial import ScriptTrial

_CLOCKS = frozenset(("seconds", "train_seconds", "evaluation_seconds"))
Row = Mapping[str, Any]


def check_resume(study: StudyConfig) -> tuple[bool, str]:
    """Run one trial of a study twice, the second time killed at its first checkpoint and taken up from there.

    Returns:
        Whether every epoch is the same, and what to say.

    Raises:
        UserError: the study is not a script's, or the trial fails.
    """
    point = {n: any_value(d) for n, d in study.space.distributions.items()} | dict(next(iter(study.space.start), {}))
    config = study.space.trial(point, study.seeds[0])
    if not isinstance(config, ScriptConfig):
        raise UserError("--check-resume: is for a script; that a built-in trial resumes exactly is tested")
    with tempfile.TemporaryDirectory(prefix="mebm-check-") as scratch:
        place = Path(scratch)
        whole, _ = _run(config, place / "whole")
        first, checkpoint = _run(config, place / "cut", cut=True)
        if checkpoint is None:
            return False, f"{config.method} saved nothing before its last epoch: one that is cut off starts over"
        second, _ = _run(config, place / "resumed", checkpoint=checkpoint)
    cut = first[-1]
    for one, other in zip(whole, [*first, *second], strict=False):
        if different := [n for n in one if n not in _CLOCKS and not _same(one[n], other.get(n))]:
            values = ", ".join(f"{n.removeprefix(OWN)} {one[n]} and {other.get(n)}" for n in different[:3])
            if one["epoch"] <= cut["epoch"]:
                return False, f"two runs of one seed differ before any cut, at epoch {one['epoch']}: {values}"
            return False, f"cut at epoch {cut['epoch']} and taken up, epoch {one['epoch']} differs: {values}"
    if len(whole) != len(first) + len(second):
        return False, f"cut at epoch {cut['epoch']}, it has {len(first) + len(second)} epochs in place of {len(whole)}"
    return True, f"cut at epoch {cut['epoch']} (iteration {cut['iteration']}) and taken up: the same to its end"


def _run(
    config: ScriptConfig, place: Path, *, cut: bool = False, checkpoint: Path | None = None
) -> tuple[list[Row], Path | None]:
    """The epochs of a trial; with `cut` up to its first checkpoint, which is the second answer."""
    trial = ScriptTrial(config, None, output=place / "output.log", folder=place / "own", checkpoint_seconds=0)
    rows: list[Row] = []
    try:
        if checkpoint is not None:
            trial.load(checkpoint)
        while True:
            report = trial.step()
            rows += [report.row] if report.row is not None else []
            if report.outcome is Outcome.FAILED:
                raise UserError(f"{config.method}: {report.trial['message']}")
            if report.done:
                return rows, None
            if cut and trial.has_news:
                saved = place / "checkpoint"
                saved.mkdir()
                trial.save(saved)
                os.kill(trial.run.pid, signal.SIGKILL)
                return rows, saved
    finally:
        trial.close()


def _same(one: Any, other: Any) -> bool:
    both = isinstance(one, float) and isinstance(other, float)
    return one == other or (both and math.isnan(one) and math.isnan(other))
