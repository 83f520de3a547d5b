"""Short-run MCMC (NeurIPS 2019)."""

from __future__ import annotations

from typing import ClassVar

from trainables.methods.common import WIDE_GAP, FreshAsTrained, ended
from trainables.training.method import Contrastive


class ShortRun(FreshAsTrained, Contrastive):
    """ShortRun."""

    title: ClassVar = "ShortRun"
    formula: ClassVar = "E(x), five convolutions without normalisation"
    sampling: ClassVar = "K = 100 SGLD steps, alpha 1, sigma 0.01, from U[-1, 1] each time, no buffer"
    objective: ClassVar = "mean E+ - mean E-"
    source: ClassVar = "Short-run MCMC (NeurIPS 2019); enijkamp/short_run train_cifar10_minimal.py"
    rows: ClassVar = "Table 1: ShortRun (K = 100)"
    preset: ClassVar = {
        "network": "shortrun-64",
        "norm": "none",
        "initial": "uniform",
        "sampling_steps": 100,
        "noise_std": 0.01,
        "gradient_clamp": None,
        "sample_clamp": False,
        "buffer": "none",
        "input_noise": 0.03,
        "batch_order": "replacement",
        "augment": "none",
        "l2_weight": 0.0,
        "optimiser": "adam",
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "warmup_iterations": 0,
        "decay_epochs": (),
        "divergence": WIDE_GAP,
        "epochs": 256,  # 99,840 iterations on CIFAR-10; released: 100,000
    }
    small: ClassVar = {"network": "shortrun-16", "learning_rate": 1e-3}
    deviations: ClassVar[tuple[str, ...]] = (
        ended("it checks nothing"),
        "no buffer to score: its samples are fresh chains of K steps, as the method defines them",
    )
