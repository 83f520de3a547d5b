"""IGEBM (NeurIPS 2019)."""

from __future__ import annotations

from typing import ClassVar

from trainables.config.method import Settings
from trainables.methods.common import UNIT_RANGE, FreshAsTrained, ended
from trainables.training.method import Contrastive

IGEBM: Settings = {
    **UNIT_RANGE,
    "norm": "spectral",
    "sampling_steps": 60,
    "step_size": 10.0,
    "noise_std": 0.005,
    "gradient_clamp": 0.01,
    "buffer": "ring",
    "reinit_probability": 0.05,
    "betas": (0.0, 0.999),
    "learning_rate": 3e-4,
    "clip_sigma": 3.0,
    # The sum over the image makes an untrained network's gap large: up to 6 in the first iterations, then below 0.1.
    "divergence": {"gap_limit": 10.0, "l2_fraction": 10.0},
}


class Igebm(FreshAsTrained, Contrastive):
    """IGEBM."""

    title: ClassVar = "IGEBM"
    formula: ClassVar = "E(x), a residual network with spectral norm and a global sum"
    sampling: ClassVar = (
        "K = 60 steps in [0, 1], alpha 10, noise 0.005 before a gradient clamped to 0.01, 8-bit ring buffer"
    )
    objective: ClassVar = "mean E+ - mean E- + mean E+^2 + mean E-^2"
    source: ClassVar = "IGEBM (NeurIPS 2019); openai/ebm_code_release, unconditional CIFAR-10 command of its README"
    rows: ClassVar = "Tables 1, 2, 6: IGEBM (K = 60)"
    preset: ClassVar = {"network": "igebm-128", "dropout": 0.5, **IGEBM}
    small: ClassVar = {"network": "igebm-8"}
    deviations: ClassVar[tuple[str, ...]] = (
        ended("it checks nothing"),
        "unconditional only: Table 3's row is the class-conditional model",
        "the ring holds exactly |B| images (released: up to a batch more for a while)",
        "one worker's batch of 128 and 200 epochs of 390 iterations (released: until stopped, 75,000-120,000)",
        "scored as a single model at the end (Table 1's row is an ensemble of ten checkpoints), on the buffer "
        "and on fresh chains of K steps (released: 200 rounds of 20 steps over its own buffer)",
        "PyTorch's Adam: epsilon is added after the bias correction, not before",
    )
