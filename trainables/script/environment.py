"""The environment of a training script's process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mebm import monitor
from trainables.config.script import ScriptConfig

_NOT_THE_SCRIPTS = ("RAY_", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "AWS_", "GOOGLE_APPLICATION_CREDENTIALS")
"""How names of environment variables begin that are the study's business alone."""
CLIENT = "client"
USABLE = 0.9
"""Of a GPU's memory; the rest is for contexts, as for built-in trials."""


def script_environment(
    config: ScriptConfig, scratch: Path, *, cpus: float = 0, gpu_share: float | None = None
) -> dict[str, str]:
    """What a script's process finds in its environment; the client comes after all that is the script's own.

    Args:
        scratch: private folder of the run; takes a copy of the client where another interpreter runs the script.
        cpus: threads it is told to use; 0: it is not told.
        gpu_share: fraction of a GPU it may use; None, 0 or 1: it is not told.
    """
    kept = {n: v for n, v in os.environ.items() if not n.startswith(_NOT_THE_SCRIPTS)}
    for name in (monitor.WIRE, monitor.PROBE, monitor.OUT):
        kept.pop(name, None)
    kept["PYTHONUNBUFFERED"] = "1"
    if cpus:
        threads = str(max(1, int(cpus)))
        kept |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    if gpu_share is not None and 0 < gpu_share < 1:
        kept |= {
            monitor.GPU_SHARE: f"{USABLE * gpu_share:g}",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{gpu_share:g}",
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        }
    root = str(Path(monitor.__file__).parents[1])
    if config.python is not None or config.command is not None:  # our packages may be none of that interpreter's
        root = str(scratch / CLIENT)
        (scratch / CLIENT).mkdir(exist_ok=True)
        shutil.copyfile(monitor.__file__, scratch / CLIENT / "mebm.py")
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (kept.get("PYTHONPATH"), root)))
    return kept
