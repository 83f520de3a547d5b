"""A run of a method in this process, for tests and notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from study.config.fields import make_built_in
from trainables.plugins.reference import allow
from trainables.training.trainer import Trainer


def trainer(method: str, **fields: Any) -> Trainer:
    """A trainer of a method, `my_ebm.py:MyEbm` or a registered one, on the digits and the CPU where not said otherwise.

    `train_epoch()` trains, `evaluate()` scores, `fresh_samples(count, steps, generator)` draws.

    Args:
        fields: of a trial, as in a study's `trial:`; the method's own among them.

    Raises:
        UserError: the method or a field is wrong.
    """
    allow(Path.cwd())
    return Trainer(make_built_in({"method": method, "device": "cpu"} | fields, "trainer", ""))
