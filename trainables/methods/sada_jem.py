"""SADA-JEM (CVPR 2023): sharpness-aware joint energy-based models, by the authors of M-EBM."""

from __future__ import annotations

from typing import ClassVar

from trainables.config.method import CONTRASTIVE
from trainables.methods.common import BEST, DECAY_IN_WARMUP, LAYOUT, SMALL_NETWORK, WIDE_GAP, ended
from trainables.training.method import Classifies, Contrastive


class SadaJem(Classifies, Contrastive):
    """SADA-JEM: LSE-JEM's loop, chains from class Gaussians, and adaptive SAM (`TrialConfig.sam_rho`)."""

    title: ClassVar = "SADA-JEM"
    formula: ClassVar = "E(x) = -logsumexp_y f(x)[y]"
    sampling: ClassVar = "K = 5 steps, alpha 1, no noise, from a replay buffer that starts as one Gaussian per class"
    objective: ClassVar = "mean E+ - mean E- + cross-entropy on a second, augmented batch, by adaptive SAM (rho = 2)"
    source: ClassVar = "SADA-JEM (CVPR 2023); sndnyang/SADAJEM train_sadajem.py, scripts/sadajem_cifar10.sh"
    rows: ClassVar = "none of the paper's: two years younger"
    preset: ClassVar = {
        "initial": "class-gaussian",
        "noise_std": 0.0,
        "l2_weight": 0.0,
        "l2_form": "batch_means",
        "sam_rho": 2.0,
        "sam_adaptive": True,
        "divergence": WIDE_GAP,
    }
    small: ClassVar = SMALL_NETWORK
    deviations: ClassVar[tuple[str, ...]] = (
        ended("it stops at |loss| > 1e5, and not at NaN"),
        "samples and accuracy are scored after epochs 5, 10, ... and the last (released: accuracy after every epoch), "
        "which moves the best epoch",
        BEST,
        DECAY_IN_WARMUP,
        LAYOUT,
        "the log-sum-exp energy of its script (its code can take an energy head too)",
        "the inception score is of the samples that the FID is of, the most confident 90% (released: of 10%)",
        "the buffer starts with classes drawn at random (released: equal blocks)",
        "with an L2 weight, which the published setting has not, both passes have the term (released: the first alone)",
    )
    head: ClassVar = "logsumexp"
    protocol: ClassVar = "paper-mebm"
    uses: ClassVar = CONTRASTIVE | {"classifier"}
