"""May a measured number stand beside a published one as the same quantity? Every reason why not, in words.

The paper's settings are its Table 5 and Appendix A; where its released scripts say more, both are named.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from analysis.results.labels import symbol, text
from analysis.results.published import ROW_COLUMNS, baselines
from analysis.stats.trials.grouping import group_by
from analysis.stats.trials.spread import mean_interval, spread
from analysis.stats.trials.trial import Trial, identifier, joined
from trainables.results.schema import SETTING_NAMES, Column

if TYPE_CHECKING:
    from collections.abc import Sequence

NETWORKS: dict[str, str] = {
    "cifar10": "wrn-28-10",
    "cifar100": "wrn-28-10",
    "imagenet32": "wrn-28-2",
    "celeba_hq_128": "wrn-28-5",
}
"""The paper's network by data set (Appendix A)."""
LEARNING_RATES: dict[str, float] = {"cifar10": 0.1, "cifar100": 0.02, "imagenet32": 0.02, "celeba_hq_128": 0.02}
PROTOCOLS: dict[str, str] = {"m-ebm": "paper-mebm", "m-jem": "paper-mjem"}
"""Protocol id of the paper's own FID and inception score by method (the kept share of the buffer differs)."""
PAPER_HARDWARE = "Titan GPU"
EPOCHS = 200
ITERATIONS_PER_EPOCH = 390

_ALPHA = re.compile(r"alpha=([\d.]+)")
_SAMPLER_FIELDS = ("initial", "step_size", "noise_std", "buffer_size", "reinit_probability", "batch_size")
_ROWS: dict[tuple[int, str], str] = {
    (1, "igebm"): "the published value is an ensemble of ten checkpoints, this is one model",
    (1, "cf-ebm"): "the published K of 50 is not its released script's, which has 15 at each of three sides",
    (1, "f-ebm"): "the published model is class-conditional, this one is not",
    (3, "igebm"): "the published model is class-conditional, this one is not",
}
"""What a published row is that no trial of its method is, by table and method."""
_STEPS: dict[tuple[str, int], int] = {("cf-ebm", 50): 15}
"""K of trials that belong in the row of a method and K: CF-EBM's row counts the steps at all sides together."""


def paper_setting(dataset: str, method: str) -> dict[str, Any]:
    """What is published of the settings behind a method's rows, as far as they are a trial's settings.

    For M-EBM and M-JEM the paper's own; the L2 weight and form are not in it: the paper gives no value, and three forms
    exist in paper and code. For the other methods `baselines`.
    """
    if method in baselines():
        return {"precision": "fp32"} | baselines()[method]
    own = {"network": NETWORKS.get(dataset), "learning_rate": LEARNING_RATES.get(dataset)}
    setting = baselines()["paper"] | own
    if dataset in ("cifar10", "cifar100"):
        setting["iterations_per_epoch"] = ITERATIONS_PER_EPOCH
    absent = _SAMPLER_FIELDS if method == "softmax" else ()
    return {field: value for field, value in setting.items() if value is not None and field not in absent}


def differences(trial: Trial) -> list[str]:
    """Where a trial's setting and data differ from those published, one text each; empty where they agree."""
    found = []
    origin = "its authors'" if trial["method"] in baselines() else "paper"
    for field, value in paper_setting(trial["dataset"], trial["method"]).items():
        if trial.get(field) != value and not _released_noise(trial, field):
            found.append(f"{symbol(field)} {text(trial.get(field))}, {origin} {text(value)}")
    source = trial["data_source"]
    if source is None or not source.startswith("torchvision:"):
        found.append(f"images from {source or 'an unrecorded source'}, not the data set's own files")
    return found


def row_differences(table: int, method: str) -> list[str]:
    """What a published row is that no trial of its method can be; empty where there is nothing of the kind."""
    return [_ROWS[table, method]] if (table, method) in _ROWS else []


def remarks(trial: Trial) -> list[str]:
    """Choices where the paper and its released scripts contradict each other and the trial follows the scripts."""
    return ["σ 0 as in the released script (Table 5: 0.001)"] if _released_noise(trial, "noise_std") else []


def protocol_differences(trials: Sequence[Trial], metric: str) -> list[str]:
    """Why a FID or inception score was not taken the way the paper took its own; empty where it was."""
    expected = PROTOCOLS.get(trials[0]["method"])
    measured = joined(t[f"{metric}_protocol"] for t in trials)
    if measured is None:
        return []
    if expected is None:
        return [f"protocol {measured}, that of the published value is not known"]
    return [] if measured == expected else [f"protocol {measured}, paper {expected}"]


def matching(trials: Sequence[Trial], row: dict[str, Any]) -> list[Trial]:
    """Trials of a published row's data set, method, K and, where its name gives one, alpha (VERA's class weight)."""
    if row["method"] is None:
        return []
    named = _ALPHA.search(row["model"])
    alpha = float(named[1]) if named else None
    steps = _STEPS.get((row["method"], row["sampling_steps"]), row["sampling_steps"])
    return [
        t
        for t in trials
        if t["dataset"] == row["dataset"]
        and t["method"] == row["method"]
        and (steps is None or t["sampling_steps"] == steps)
        and (alpha is None or t.get("class_weight") == alpha)
    ]


def nearest_setting(trials: Sequence[Trial]) -> tuple[list[Trial], int]:
    """Of trials that match one row, those of the setting that differs least from the paper's, and of how many settings.

    Ties go to the setting with more trials, then to the first. A setting is one across studies.
    """
    groups = list(group_by(trials, ("setting_id", *SETTING_NAMES)).values())
    if not groups:
        return [], 0
    best = min(range(len(groups)), key=lambda i: (len(differences(groups[i][0])), -len(groups[i]), i))
    return groups[best], len(groups)


def published_row(published: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What a published row says: `ROW_COLUMNS`, its remark, and the numbers of these names."""
    row = {c.name: published[c.name] for c in ROW_COLUMNS} | {"published_note": published["note"]}
    return row | {f"{name}_published": published[name] for name in names}


def number_columns(name: str, meaning: str) -> tuple[Column, ...]:
    """Columns of one number: published, then mean, sd, n, min, max and trials of what was measured."""
    return (
        Column(f"{name}_published", "float64", f"published {meaning}"),
        Column(f"{name}_mean", "float64", f"mean over trials of the measured {meaning}"),
        Column(f"{name}_sd", "float64", "its sample standard deviation; null below two values"),
        Column(f"{name}_n", "int64", "trials with a value"),
        Column(f"{name}_min", "float64", "smallest of them"),
        Column(f"{name}_max", "float64", "largest of them"),
        Column(f"{name}_trial_ids", "string", "these trials as STUDY/TRIAL, comma-separated"),
    )


def number(name: str, values: Sequence[float], trials: Sequence[Trial]) -> dict[str, Any]:
    """The measured columns of `number_columns`, of values and the trials that have them."""
    s = spread(values)
    found = {"mean": s.mean, "sd": s.sd, "n": s.n, "min": s.low, "max": s.high}
    return {f"{name}_{k}": v for k, v in found.items()} | {f"{name}_trial_ids": joined(map(identifier, trials))}


def difference_columns(name: str, meaning: str) -> tuple[Column, ...]:
    """Columns of a measured number less the published one."""
    return (
        Column(f"{name}_difference", "float64", f"mean of the measured {meaning} less the published one"),
        Column(f"{name}_difference_low", "float64", "lower end of its 95% t interval over trials; null below two"),
        Column(f"{name}_difference_high", "float64", "upper end; the published number counts as exact"),
    )


def difference(name: str, values: Sequence[float], published: float | None) -> dict[str, float | None]:
    """Values of `difference_columns`; empty where either side is missing."""
    if published is None or not values:
        return {}
    ends = zip(("", "_low", "_high"), mean_interval(values), strict=True)
    return {f"{name}_difference{end}": None if v is None else v - published for end, v in ends}


def _released_noise(trial: Trial, field: str) -> bool:
    # Table 5 gives one sigma for all; the released scripts set 0 at K=2 and for CelebA-HQ. Which of them made the
    # tables is unknown.
    if field != "noise_std" or trial["method"] not in PROTOCOLS:
        return False
    steps = trial["sampling_steps"]
    return trial[field] == 0 and steps is not None and (steps <= 2 or trial["dataset"] == "celeba_hq_128")
