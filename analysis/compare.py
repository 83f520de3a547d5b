"""May a measured number stand beside a published one as the same quantity? Every reason why not, in words.

The paper's settings are its Table 5 and Appendix A; where the released scripts (sndnyang/mebm) are more specific than
the paper's text, both are named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.aggregate import Trial, group_by, joined
from analysis.words import symbol, text
from trainables.schema import SETTING_NAMES, Column

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

_SAMPLER_FIELDS = ("initial", "step_size", "noise_std", "buffer_size", "reinit_probability", "batch_size")


def paper_setting(dataset: str, method: str) -> dict[str, Any]:
    """What the paper says of the settings behind its rows, as far as they are a trial's settings.

    The L2 weight and form are not in it: the paper gives no value, and three forms exist in paper and code.
    """
    setting: dict[str, Any] = {
        "epochs": EPOCHS,
        "network": NETWORKS.get(dataset),
        "norm": "batch",
        "learning_rate": LEARNING_RATES.get(dataset),
        "precision": "fp32",
        "initial": "gaussian",
        "step_size": 1.0,
        "noise_std": 0.001,
        "buffer_size": 10_000,
        "reinit_probability": 0.05,
        "batch_size": 64,
    }
    if dataset in ("cifar10", "cifar100"):
        setting["iterations_per_epoch"] = ITERATIONS_PER_EPOCH
    if method == "softmax":
        for field in _SAMPLER_FIELDS:
            del setting[field]
    return {field: value for field, value in setting.items() if value is not None}


def differences(trial: Trial) -> list[str]:
    """Where a trial's setting and data differ from the paper's, one text each; empty where they agree."""
    found = []
    for field, value in paper_setting(trial["dataset"], trial["method"]).items():
        if trial[field] != value and not _released_noise(trial, field):
            found.append(f"{symbol(field)} {text(trial[field])}, paper {text(value)}")
    source = trial["data_source"]
    if source is None or not source.startswith("torchvision:"):
        found.append(f"images from {source or 'an unrecorded source'}, not the data set's own files")
    return found


def remarks(trial: Trial) -> list[str]:
    """Choices where the paper and its released scripts contradict each other and the trial follows the scripts."""
    return ["σ 0 as in the released script for K <= 2 (Table 5: 0.001)"] if _released_noise(trial, "noise_std") else []


def protocol_differences(trials: Sequence[Trial], metric: str) -> list[str]:
    """Why a FID or inception score was not taken the way the paper took its own; empty where it was."""
    method = trials[0]["method"]
    expected = PROTOCOLS.get(method)
    measured = joined(t[f"{metric}_protocol"] for t in trials)
    if measured is None:
        return []
    if expected is None:
        return [f"protocol {measured}, that of the published value is not known"]
    return [] if measured == expected else [f"protocol {measured}, paper {expected}"]


def matching(trials: Sequence[Trial], row: dict[str, Any]) -> list[Trial]:
    """Trials of a published row's data set, method and K.

    A row whose name sets something that a trial does not report (the alpha of VERA) matches nothing.
    """
    if row["method"] is None or "alpha=" in row["model"]:
        return []
    return [
        t
        for t in trials
        if t["dataset"] == row["dataset"]
        and t["method"] == row["method"]
        and (row["sampling_steps"] is None or t["sampling_steps"] == row["sampling_steps"])
    ]


def nearest_setting(trials: Sequence[Trial]) -> tuple[list[Trial], int]:
    """Of trials that match one row, those of the setting that differs least from the paper's.

    Ties go to the setting with more trials, then to the first. A setting is one across studies.

    Returns:
        Its trials, and how many settings there were to choose from.
    """
    groups = list(group_by(trials, ("setting_id", *SETTING_NAMES)).values())
    if not groups:
        return [], 0
    best = min(range(len(groups)), key=lambda i: (len(differences(groups[i][0])), -len(groups[i]), i))
    return groups[best], len(groups)


def number_columns(name: str, meaning: str) -> tuple[Column, ...]:
    """Columns of one number: published, then mean, sd, n, min and max of what was measured."""
    return (
        Column(f"{name}_published", "float64", f"published {meaning}"),
        Column(f"{name}_mean", "float64", f"mean over trials of the measured {meaning}"),
        Column(f"{name}_sd", "float64", "its sample standard deviation; null below two values"),
        Column(f"{name}_n", "int64", "trials with a value"),
        Column(f"{name}_min", "float64", "smallest of them"),
        Column(f"{name}_max", "float64", "largest of them"),
    )


def _released_noise(trial: Trial, field: str) -> bool:
    # Table 5 gives one sigma for every K; the released scripts set 0 at K=2. Which of them made the tables is unknown.
    if field != "noise_std" or trial["method"] not in PROTOCOLS:
        return False
    steps = trial["sampling_steps"]
    return trial[field] == 0 and steps is not None and steps <= 2
