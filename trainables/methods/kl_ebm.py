"""KL-EBM: improved contrastive divergence (ICML 2021)."""

from __future__ import annotations

from typing import ClassVar

from trainables.methods.common import UNIT_RANGE, FreshAsTrained, ended
from trainables.training.method import Contrastive


class KlEbm(FreshAsTrained, Contrastive):
    """KL-EBM. Its terms through the sampler are shared fields (`kl_weight`, `entropy_weight`)."""

    title: ClassVar = "KL-EBM (improved contrastive divergence)"
    formula: ClassVar = "E(x) in R^3, three networks on three scales; chains descend the sum, losses take the mean"
    sampling: ClassVar = (
        "K = 40 steps in [0, 1], alpha 100, noise 0.001 before the gradient, reservoir of augmented 8-bit states"
    )
    objective: ClassVar = "mean E+ - mean E- + mean E+^2 + mean E-^2 + KL through the last step - 0.3 entropy"
    source: ClassVar = (
        "Improved contrastive divergence (ICML 2021); yilundu/improved_contrastive_divergence, CIFAR-10 command"
    )
    rows: ClassVar = "Tables 1, 2, 6: KL-EBM (K = 40)"
    preset: ClassVar = {
        "network": "multiscale-64",
        "norm": "instance",
        **UNIT_RANGE,
        "sampling_steps": 40,
        "step_size": 100.0,
        "noise_std": 0.001,
        "gradient_clamp": None,
        "buffer": "reservoir",
        "buffer_augment": "contrastive",
        "reinit_probability": 0.001,
        "kl_weight": 1.0,
        "entropy_weight": 0.3,
        "betas": (0.0, 0.9),
        "learning_rate": 2e-4,
        "clip_norm": 0.5,
        "ema_decay": 0.99,
    }
    small: ClassVar = {"network": "multiscale-8"}
    by_dataset: ClassVar = {"celeba_hq_128": {"step_size": 500.0}}
    deviations: ClassVar[tuple[str, ...]] = (
        "200 epochs of 390 iterations (released: until stopped)",
        "every iteration has the KL gradient (released: not each 1,000th)",
        ended("it crashes at |mean E+| > 10 or NaN, which this does not"),
        "scored at the end, on the newest |B| chain states and fresh chains of K steps (released: the best by "
        "IS, augmented rounds over its own buffer, against 10,000 training images)",
        "a crop of the buffer augmentation that does not fit is narrowed (released: drawn again)",
        "for 128-pixel images only its step size is taken: not its networks (128 filters), its class "
        "conditioning or its batch of 128 on each of 8 GPUs",
    )
