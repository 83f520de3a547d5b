"""Own parts of a study, used once before a worker starts."""

from __future__ import annotations

from typing import Any

from study.config.errors import UserError, one_line
from study.config.study import StudyConfig
from trainables.config.dataset import dataset_info
from trainables.config.trial import ARGUMENTS, TrialConfig

MOST = 24
"""Settings that are tried."""
_PARTS = (*ARGUMENTS, *(name.removesuffix("_args") for name in ARGUMENTS), "evaluation", "method")


def rehearse_study(study: StudyConfig) -> list[str]:
    """Use the own parts of a study's settings once, on this machine's CPU; returns what a user should know.

    Every choice of a part and both ends of a range of its arguments, up to `MOST` settings.

    Raises:
        UserError: a part cannot be used; one line with file, line and object.
    """
    from trainables.training.rehearsal import has_own_parts

    if study.is_script:
        return []
    remarks: dict[str, None] = {}
    tried: set[str] = set()
    for point in _points(study):
        trial = study.space.built_in(point, study.seeds[0])
        key = repr([(name, getattr(trial, name)) for name in _PARTS])
        if len(tried) < MOST and key not in tried and has_own_parts(trial):
            tried.add(key)
            remarks |= dict.fromkeys(rehearse_trial(trial))
    return list(remarks)


def rehearse_trial(trial: TrialConfig) -> list[str]:
    """Likewise of a trial."""
    from trainables.data.readers.items import DataError
    from trainables.training.rehearsal import has_own_parts, rehearse, stand_in

    if not has_own_parts(trial):
        return []
    known = dataset_info(trial.dataset)
    # Images that would have to be downloaded, or read from a large folder, are not needed for it.
    data = stand_in(known) if known is not None and known.read is None else None
    try:
        return rehearse(trial, data)
    except (DataError, ValueError) as error:
        raise UserError(one_line(error)) from error


def _points(study: StudyConfig) -> list[dict[str, Any]]:
    """Settings in which every choice and both ends of a range of a part are met."""
    if study.search.sampler == "grid":
        return [dict(point) for point in study.space.start]
    ends: dict[str, Any] = {
        key: getattr(d, "choices", None) or (d.high, d.low)  # type: ignore[attr-defined]
        for key, d in study.space.distributions.items()
    }
    first = {key: values[0] for key, values in ends.items()}
    varied = {key: values for key, values in ends.items() if key.partition(".")[0] in _PARTS}
    return [first, *({**first, key: value} for key, values in varied.items() for value in values[1:])]
