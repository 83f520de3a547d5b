"""A first study of a method on a data set that a budget of GPU-hours pays for; `mebm init` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from analysis.results.labels import symbol
from study.config.errors import UserError
from study.config.fields import make_built_in
from study.config.load import validate_study
from study.config.study import StudyConfig
from study.config.yaml_input import write_yaml
from study.estimate.plan import make_plan
from trainables.config.dataset import dataset_info
from trainables.config.trial import TrialConfig

SETTINGS = (32, 24, 16, 12)
"""Settings that a study proposes: as many of these as are paid for."""
SHARES = (1.0, 0.5, 0.25, 0.1, 0.05)
"""Of a method's epochs: late divergences are not seen in shorter runs, so the longest that are paid for."""
ON_CPU: dict[str, Any] = {"epochs": 6, "iterations_per_epoch": 150, "evaluation": {"every": 2}}
SPACE: dict[str, dict[str, Any]] = {
    "sampling_steps": {"low": 1, "high": 20, "log": True},
    "step_size": {"low": 0.1, "high": 10.0, "log": True},
    "reinit_probability": {"low": 0.01, "high": 0.5, "log": True},
    "initial": {"choices": ["gaussian", "uniform"]},
    "learning_rate": {"low": 1e-4, "high": 0.3, "log": True},
}


def propose(
    name: str, method: str, dataset: str, *, data_dir: str | None, gpu: str | None, gpu_hours: float, seeds: int
) -> tuple[StudyConfig, str]:
    """The largest study that fits, and its YAML.

    Args:
        method, dataset: as in a trial.
        data_dir: folder of the images; None: downloaded, or they come with the package.
        gpu: device the budget is of; None: a CPU, on which only small images are trained in minutes.
        gpu_hours: the budget.
        seeds: of every setting.

    Raises:
        UserError: nothing fits, or a field is wrong.
    """
    trial = {"method": method, "dataset": dataset} | ({"data_dir": data_dir} if data_dir else {})
    base = make_built_in(trial, "mebm init")
    known = dataset_info(dataset)
    if gpu is None:
        if known is None or known.side >= 32:
            raise UserError(f"mebm init: {dataset} takes a GPU: name one with --gpu (H100), or take --dataset digits")
        return _study(name, trial | ON_CPU, base, 20, seeds, None)
    for fields, settings in _sizes(base):
        study, text = _study(name, trial | fields, base, settings, seeds, gpu_hours)
        hours = make_plan(study, gpu).gpu_hours
        if hours is None:
            raise UserError(f"mebm init: the rate of {gpu} is not known; mebm plan lists those that are")
        if hours <= gpu_hours:
            return study, text
    raise UserError(
        f"mebm init: {gpu_hours:g} GPU-hours of {gpu} pay for no study of {method} on {dataset}: "
        f"{settings} short trials of its smallest network take {hours:.2g}"
    )


def _sizes(base: TrialConfig) -> Iterator[tuple[dict[str, Any], int]]:
    """Fields and numbers of settings, from what is best to what is cheapest."""
    networks = [base.network]
    if base.network.startswith("wrn-"):
        networks += [n for n in ("wrn-28-4", "wrn-16-4", "wrn-16-2") if n != base.network]
    for network in networks:
        for share in SHARES:
            epochs = max(5, round(share * base.epochs))
            decay = [max(1, round(e * epochs / base.epochs)) for e in base.decay_epochs]
            fields = {"network": network, "precision": "bf16", "epochs": epochs, "signal_every": 10}
            fields |= {"decay_epochs": decay} if decay else {}
            fields["evaluation"] = {"every": max(1, epochs // 4)}
            for settings in SETTINGS:
                yield fields, settings


def _study(
    name: str, trial: dict[str, Any], base: TrialConfig, settings: int, seeds: int, gpu_hours: float | None
) -> tuple[StudyConfig, str]:
    chains = ["sampling_steps", "step_size"] if base.chains else ["learning_rate"]
    used = base.setting()
    chains += [key for key in ("reinit_probability", "initial") if used.get(key) is not None]
    known = dataset_info(base.dataset)
    small = known is not None and known.side < 32
    metric = "accuracy" if not base.samples else "fd_buffer" if small else "fid_buffer"
    if base.samples and "buffer" not in base.method_args.sources(base):
        metric = metric.replace("buffer", "fresh")
    values: dict[str, Any] = {
        "name": name,
        "description": f"For which {', '.join(chains)} does {base.method} train on {base.dataset} without diverging?",
        "trial": trial,
        "search": {"sampler": "tpe", "trials": settings, "startup_trials": max(4, settings // 3),
                   "space": {key: SPACE[key] for key in chains}},
        "seeds": list(range(seeds)),
        "objectives": [{"metric": metric}],
    }  # fmt: skip
    if gpu_hours is not None:
        values |= {"resources": {"cpus": 4, "gpus": 1}, "budget": {"gpu_hours": gpu_hours}}
    lines = write_yaml(values).splitlines()
    wide = max(len(line) for line in lines if line.strip(" :") in chains)
    lines = [f"{x:<{wide}}  # {symbol(x.strip(' :'))}" if x.strip(" :") in chains else x for x in lines]
    return validate_study(values, "mebm init"), "\n".join(lines) + "\n"
