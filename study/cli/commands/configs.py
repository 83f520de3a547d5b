"""`mebm configs`: the studies that come with the package."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from study.cli.options import json_option, option, show
from study.display import console
from trainables.results.progress import note


@dataclass(frozen=True)
class Configs:
    """The packaged studies: what each asks, needs and costs. `mebm show NAME` prints one, to be changed."""

    gpu: str = option("Device to estimate the cost for.", default="H100", metavar="NAME")
    as_json: bool = json_option()

    def __call__(self) -> None:
        note("reading the studies")
        show(self.as_json, lambda: [_about(name, self.gpu) for name in _names()], self._lines)

    def _lines(self) -> Iterator[str]:
        names = _names()
        wide = max(map(len, names))
        for name in names:
            found = _about(name, self.gpu)
            yield f"{name:<{wide}}  {found['trials']:>4} trials  {found['needs']:<32}  {found['cost']}"
            yield from textwrap.wrap(
                found["asks"], console.width(), initial_indent=" " * (wide + 2), subsequent_indent=" " * (wide + 2)
            )


def _names() -> list[str]:
    """Those that a CPU runs come first."""
    from study.config.load import load_study
    from study.config.packaged import packaged_configs

    return sorted(
        packaged_configs(), key=lambda name: (load_study(name).resources.gpus != 0, name != "quickstart", name)
    )


def _about(name: str, gpu: str) -> dict[str, Any]:
    from study.cli.running import estimate
    from study.config.load import load_study
    from study.estimate.plan import operations
    from trainables.config.dataset import dataset_info

    study = load_study(name)
    trial = study.space.built_in(study.space.start[0] if study.space.start else {}, study.seeds[0])
    known = dataset_info(trial.dataset)
    assert known is not None
    plan = estimate(study, gpu, ())
    on_gpu = study.resources.gpus != 0
    cost = plan.gpu_time if on_gpu and plan.gpu_time else operations(plan.flops)
    images = "nothing else" if known.read is not None else f"images of {trial.dataset}"
    return {
        "name": name,
        "asks": study.description,
        "trials": plan.trials,
        "method": trial.method,
        "dataset": trial.dataset,
        "needs": f"{'a GPU' if on_gpu else 'a CPU'}, {images}",
        "cost": cost,
        "gpu_hours": plan.gpu_hours,
        "flops": plan.flops,
    }
