"""What `mebm train` takes on a CPU where nobody says otherwise: a run that is over in minutes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from study.config.fields import make_built_in
from study.display.status import rough
from study.estimate.resources import image_count, image_shape
from trainables.config.trial import TrialConfig
from trainables.methods.common import SMALL_NETWORK
from trainables.methods.presets import SMALL_SIDE, merge
from trainables.timing.dry_run import iteration_flops
from trainables.training.device import resolve_device

RATE = 1.5e10
"""FLOP/s that a thread reaches on small convolutions; rough on purpose."""
MINUTES = 5.0
"""What the chosen training may take by its arithmetic."""
LONG_HOURS = 1.0
"""A training that takes longer by its arithmetic is worth a word before it starts."""
_EPOCHS, _ITERATIONS, _LEAST = 10, 100, 10
_IMAGES = 5000


def seconds_on_cpu(config: TrialConfig) -> float:
    """Time of a training on this machine's CPU by its arithmetic, without what scores it; rough."""
    per_epoch = config.iterations_per_epoch
    if per_epoch is None:
        images = config.train_images or image_count(config) - config.validation_images
        per_epoch = max(1, images // config.label_batch_size)
    work = iteration_flops(config, *image_shape(config)) * per_epoch * config.epochs
    return work / (RATE * torch.get_num_threads())


def with_cpu_defaults(values: Mapping[str, Any], source: str) -> tuple[dict[str, Any], str]:
    """A trial's raw fields with what fits a CPU in the place of a preset that would take hours; and that in a line.

    What is given stays. Where the preset is short enough, or there is a GPU, nothing is changed and the line is empty.

    Raises:
        UserError: the fields make no trial.
    """
    wanted = make_built_in(dict(values), source, "")
    if _has_gpu(wanted) or (before := seconds_on_cpu(wanted)) <= 60 * MINUTES:
        return dict(values), ""
    (_, side, _), _ = image_shape(wanted)
    small: Mapping[str, Any] = {}
    if side >= SMALL_SIDE and "network" not in values:  # below, the preset has the small network already
        small = type(wanted.method_args).small or SMALL_NETWORK
    chosen = merge(small, {"epochs": min(_EPOCHS, wanted.epochs), "decay_epochs": [], "warmup_iterations": 0})
    if side >= SMALL_SIDE:
        chosen["evaluation"] = {"protocols": ["small-buffer", "small-fresh"], "every": _EPOCHS // 2}
        if image_count(wanted) > 2 * _IMAGES:
            chosen["train_images"] = _IMAGES
    if wanted.samples and wanted.buffered:
        chosen["buffer_size"] = min(2000, wanted.buffer_size)
    chosen["iterations_per_epoch"] = min(_ITERATIONS, wanted.iterations_per_epoch or _ITERATIONS)
    found = make_built_in(merge(chosen, values), source, "")
    if "iterations_per_epoch" not in values and (seconds := seconds_on_cpu(found)) > 60 * MINUTES:
        fitting = int((found.iterations_per_epoch or _ITERATIONS) * 60 * MINUTES / seconds)
        chosen["iterations_per_epoch"] = max(_LEAST, fitting)
        found = make_built_in(merge(chosen, values), source, "")
    images = f" on {found.train_images:,} images" if found.train_images else ""
    length = f"{found.network}, {found.epochs} epochs of {found.iterations_per_epoch} iterations{images}"
    scored = ", FD in the place of FID" if side >= SMALL_SIDE and found.samples else ""
    whole = f"{wanted.network} for {wanted.epochs} epochs would take {rough(before)}"
    return merge(chosen, values), (
        f"chosen for a CPU: {length}{scored}, some {rough(seconds_on_cpu(found))}; {whole}; --set FIELD=VALUE has it"
        " otherwise"
    )


def long_on_cpu(config: TrialConfig) -> str:
    """A line on a training that takes hours on this machine's CPU; empty where it does not."""
    if _has_gpu(config) or (seconds := seconds_on_cpu(config)) < 3600 * LONG_HOURS:
        return ""
    return f"on this CPU the training takes some {rough(seconds)} by its arithmetic"


def _has_gpu(config: TrialConfig) -> bool:
    try:
        return resolve_device(config.device).type == "cuda"
    except ValueError:  # whoever trains says it
        return True
