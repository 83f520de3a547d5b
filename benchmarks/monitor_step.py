"""What `Monitor.step` costs a training script: a call of it, by what the energies are."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.commands import write_found
from mebm import monitor
from study.cli.main import main
from study.cli.options import command, json_option, out_option, show
from trainables.script.wire import Wire

CALLS, ROUNDS = 5000, 7


def measure() -> dict[str, Any]:
    """Medians over rounds, in microseconds per call: of `step` with each kind of energies, of an empty function."""
    kinds: dict[str, Any] = {
        "float": 1.0,
        "numpy (64,)": np.ones(64),
        "torch cpu ()": torch.tensor(1.0),
        "torch cpu (64,)": torch.ones(64),
    }
    if torch.cuda.is_available():
        kinds |= {"torch cuda ()": torch.tensor(1.0, device="cuda"), "torch cuda (64,)": torch.ones(64, device="cuda")}
    with tempfile.TemporaryDirectory() as folder:
        wire = Wire(Path(folder))
        wire.start(args={}, seed=0, checkpoint_seconds=1e9)
        wire.tell(ack=10**9)
        os.environ[monitor.WIRE] = folder
        with monitor.Monitor() as run:
            rounds: dict[str, list[float]] = {name: [] for name in ("nothing", *kinds)}
            for _ in range(ROUNDS):
                rounds["nothing"].append(_timed(lambda *_: None, 1.0, 0))
                for name, energies in kinds.items():
                    rounds[name].append(_timed(run.step, energies, run._last + 1))
    return {"calls": CALLS, "microseconds": {name: statistics.median(times) for name, times in rounds.items()}}


def _timed(step: Callable[..., Any], energies: Any, first: int) -> float:
    started = time.perf_counter()
    for iteration in range(first, first + CALLS):
        step(iteration, energies, energies, 0.5)
    return (time.perf_counter() - started) / CALLS * 1e6


@dataclass(frozen=True)
class MonitorStep:
    """Time a call of `Monitor.step` for energies of each kind."""

    out: Path = out_option("Folder of what was found.", default=Path("results/bench"))
    as_json: bool = json_option()

    def __call__(self) -> None:  # noqa: D102
        found = write_found(self.out, "monitor_step", measure())
        times = found["microseconds"].items()
        show(self.as_json, lambda: found, lambda: [f"{name:>16}: {t:.2f} microseconds a call" for name, t in times])


if __name__ == "__main__":
    main(command(MonitorStep))
