"""The published training methods as named configurations, each with its source, and how defaults are filled in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trainables.config import TrialConfig
from trainables.datasets import DATASETS

_STEPS = TypeAdapter(int)


def _nothing(_steps: int) -> dict[str, Any]:
    return {}


def _released_by_steps(steps: int) -> dict[str, Any]:
    """Weight of the L2 term and Langevin noise by K, as scripts/maebm_cifar10.sh of the released code sets them.

    The scripts have K=2 (lambda 0.1, sigma 0) and K>=5 (lambda 0.5, sigma 0.001); K=1, 3, 4 follow K=2.
    """
    return {"l2_weight": 0.5, "noise_std": 0.001} if steps >= 5 else {"l2_weight": 0.1, "noise_std": 0.0}


@dataclass(frozen=True)
class Method:
    """A published method that runs here."""

    name: str
    title: str
    energy: str
    """What the energy is, in the paper's symbols; empty for a plain classifier."""
    loss: str
    source: str
    rows: str
    """Rows of the paper's tables it can fill."""
    settings: Mapping[str, Any]
    """Fields that differ from `TrialConfig`'s defaults."""
    by_steps: Callable[[int], dict[str, Any]] = _nothing
    """Fields that depend on K."""


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method(
            "m-ebm",
            "M-EBM",
            "E(x) = -(w h(x) + b), energy head",
            "mean E+ - mean E- + lambda L2",
            "M-EBM (PAKDD 2023) Algorithm 1; sndnyang/mebm scripts/maebm_cifar10.sh",
            "Tables 1, 2, 6: M-EBM",
            {"method": "m-ebm"},
            _released_by_steps,
        ),
        Method(
            "m-jem",
            "M-JEM",
            "E(x) = -(w h(x) + b), energy head beside the class head",
            "M-EBM's loss + cross-entropy on a second, augmented batch of 128",
            "M-EBM (PAKDD 2023) section 4.1; sndnyang/mebm scripts/majem_cifar10.sh",
            "Tables 3, 4, 6: M-JEM",
            {"method": "m-jem"},
            _released_by_steps,
        ),
        Method(
            "lse-jem",
            "LSE-JEM",
            "E(x) = -logsumexp_y f(x)[y], no energy head",
            "mean E+ - mean E- + cross-entropy, no L2 (incompatible: section 4.2)",
            "M-EBM (PAKDD 2023) section 5.3 (M-JEM without its energy head)",
            "Figures 2b, 4a: LSE-JEM",
            {"method": "lse-jem", "l2_weight": 0.0},
        ),
        Method(
            "softmax",
            "Softmax classifier",
            "",
            "cross-entropy on the labelled batch",
            "M-EBM (PAKDD 2023) section 5; train_maebm.py with --px 0 --pyx 1",
            "Tables 3, 4: Softmax; Table 6: Classifier",
            {"method": "softmax", "l2_weight": 0.0},
        ),
    )
}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, nested mappings merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def build_trial(values: Mapping[str, Any]) -> TrialConfig:
    """A complete configuration from the fields a user gives.

    What is left out comes, in this order, from the data set's own defaults (the embedded digits want a small network
    and a short run), from the method (with its dependence on K), and from `TrialConfig`.

    Raises:
        pydantic.ValidationError: a field is unknown or its value impossible.
    """
    name = values.get("method", "m-ebm")
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        return TrialConfig.model_validate(dict(values))  # pydantic names the field and what is allowed
    dataset = values.get("dataset", TrialConfig.model_fields["dataset"].default)
    known = DATASETS.get(dataset) if isinstance(dataset, str) else None
    below = merge(method.settings, known.trial_defaults if known else {})
    steps = values.get(
        "sampling_steps", below.get("sampling_steps", TrialConfig.model_fields["sampling_steps"].default)
    )
    with suppress(ValidationError):  # the complete validation below says it better
        # "2" and 2.0 are K = 2 to pydantic, so they must be to the presets.
        below = merge(method.by_steps(_STEPS.validate_python(steps)), below)
    return TrialConfig.model_validate(merge(below, values))
