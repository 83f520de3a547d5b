"""JEM (ICLR 2020) and JEM++ (ICCV 2021), hybrid models of Grathwohl et al. and of Yang and Ji."""

from __future__ import annotations

from typing import ClassVar

from trainables.config.method import CONTRASTIVE, Settings
from trainables.methods.common import (
    DECAY_IN_WARMUP,
    LAYOUT,
    SCORED_BY_JEM,
    SMALL_NETWORK,
    WIDE_GAP,
    FreshAsTrained,
    ended,
)
from trainables.training.method import Classifies, Contrastive

# Hybrid models of Grathwohl et al. and JEM++: both batches augmented and noised, 5,000 images held out.
JEM_DATA: Settings = {
    "label_batch_size": 64,
    "augment": "crop_flip",
    "energy_augment": "crop_flip",
    "input_noise": 0.03,
    "label_noise": 0.03,
    "validation_images": 5000,
}
JEM_SMALL: Settings = {**SMALL_NETWORK, "energy_augment": "none", "validation_images": 0}


class Jem(FreshAsTrained, Classifies, Contrastive):
    """JEM."""

    title: ClassVar = "JEM"
    formula: ClassVar = "E(x) = -logsumexp_y f(x)[y], no normalisation"
    sampling: ClassVar = (
        "K = 20 SGLD steps, alpha 1, sigma 0.01, no clamps, from a replay buffer that starts as U[-1, 1]"
    )
    objective: ClassVar = "mean E+ - mean E- + cross-entropy on a second batch of 64"
    source: ClassVar = "JEM (ICLR 2020); wgrathwohl/JEM train_wrn_ebm.py"
    rows: ClassVar = "Tables 3, 4, 6: JEM (K = 20, 30)"
    preset: ClassVar = {
        "norm": "none",
        "initial": "uniform",
        "sampling_steps": 20,
        "noise_std": 0.01,
        "gradient_clamp": None,
        "sample_clamp": False,
        "sampler_norm_mode": "eval",
        "l2_weight": 0.0,
        "optimiser": "adam",
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "decay_epochs": (160, 180),
        "decay_factor": 0.3,
        "divergence": {"loss_limit": 1e8, **WIDE_GAP},
        **JEM_DATA,
    }
    small: ClassVar[Settings] = {**JEM_SMALL, "learning_rate": 1e-3}
    deviations: ClassVar[tuple[str, ...]] = (
        ended("it stops at |loss| > 1e8, and not at NaN"),
        SCORED_BY_JEM,
        "the 5,000 held-out images are another draw; none of them is used to choose a model",
        "accuracy is taken on clean test images (released: with noise of 0.03 by default)",
        "its unused layer `linear` is not there (6,410 parameters of a WRN-28-10, 650 of a WRN-10-1)",
        DECAY_IN_WARMUP,
        "an epoch is 703 iterations as in JEM's code (the paper's Table 6 counts 390 for every row)",
        "no extra chains every 100 iterations (released: for plots, and they too are written to the buffer)",
    )
    head: ClassVar = "logsumexp"
    uses: ClassVar = CONTRASTIVE | {"classifier"}


class JemPlusPlus(Jem):
    """JEM++: proximal steps through the first layer (`TrialConfig.inner_steps`)."""

    title: ClassVar = "JEM++"
    formula: ClassVar = "E(x) = -logsumexp_y f(x)[y]"
    sampling: ClassVar = (
        "M = 5, 10, 20 outer steps of N = 5 proximal steps of 0.2 through the first layer, no noise, from a "
        "buffer that starts as one Gaussian per class"
    )
    source: ClassVar = "JEM++ (ICCV 2021); sndnyang/JEMPP train_jempp.py"
    rows: ClassVar = "Tables 3, 4, 6: JEM++ (M, also written K)"
    preset: ClassVar = {
        "initial": "class-gaussian",
        "sampling_steps": 10,
        "inner_steps": 5,
        "noise_std": 0.0,
        "l2_weight": 0.0,
        "weight_decay": 4e-4,
        "decay_epochs": (50, 100, 125),
        "epochs": 150,
        "divergence": {"loss_limit": 1e8, **WIDE_GAP},
        **JEM_DATA,
    }
    small: ClassVar = JEM_SMALL
    deviations: ClassVar[tuple[str, ...]] = (
        ended("it stops at |loss| > 1e8, and not at NaN"),
        SCORED_BY_JEM,
        "the 5,000 held-out images are another draw; none of them is used to choose a model",
        "accuracy is taken on clean test images (released: offline with noise of 0.03)",
        DECAY_IN_WARMUP,
        LAYOUT,
        "an epoch is 703 iterations as in its code (the paper's Table 6 counts 390 for every row)",
        "no extra chains every 100 iterations (released: for plots, and they too are written to the buffer)",
        "with noise, which the published setting has not, chains are clamped after it too",
        "the class Gaussians are of clean images (the released statistics are of augmented, noised ones)",
        "the buffer starts with classes drawn at random (released: equal blocks)",
        "the unused direct step of size sgld_lr = 0 is not computed",
    )
