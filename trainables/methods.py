"""The published training methods as named configurations, each with its source, and how defaults are filled in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trainables.config import TrialConfig
from trainables.datasets import DATASETS
from trainables.network_names import parse_network

_STEPS = TypeAdapter(int)
SMALL_SIDE = 16
"""Images below this side take a method's small settings."""

Settings = Mapping[str, Any]


def _nothing(_steps: int) -> dict[str, Any]:
    return {}


def _released_by_steps(steps: int) -> dict[str, Any]:
    """Weight of the L2 term and Langevin noise by K, as scripts/maebm_cifar10.sh of the released code sets them.

    The scripts have K=2 (lambda 0.1, sigma 0) and K>=5 (lambda 0.5, sigma 0.001); K=1, 3, 4 follow K=2.
    """
    return {"l2_weight": 0.5, "noise_std": 0.001} if steps >= 5 else {"l2_weight": 0.1, "noise_std": 0.0}


def _as_trained(steps: int) -> dict[str, Any]:
    """Fresh chains as long as those of training."""
    return {"evaluation": {"fresh_steps": steps}}


@dataclass(frozen=True)
class Method:
    """A published method that runs here."""

    name: str
    title: str
    energy: str
    """What the energy is, in the paper's symbols; empty for a plain classifier."""
    sampler: str
    """How x- is drawn; empty for a plain classifier."""
    loss: str
    source: str
    rows: str
    """Rows of the paper's tables it can fill."""
    settings: Settings
    """Fields that differ from `TrialConfig`'s defaults."""
    by_steps: Callable[[int], dict[str, Any]] = _nothing
    """Fields that depend on K."""
    by_dataset: Mapping[str, Settings] = field(default_factory=dict)
    """Fields its authors set differently for a data set."""
    small: Settings = field(default_factory=dict)
    """Fields for images below 16 pixels (digits): a small network of the same kind, rates that train it in minutes."""
    departures: tuple[str, ...] = ()
    """Where this differs from the released code, one line each."""


# Appendix A: lr 0.02 off CIFAR-10, WRN-28-2 on ImageNet-32, WRN-28-5 on CelebA-HQ; decays of maebm_celeba.sh.
_MEBM_BY_DATASET: dict[str, Settings] = {
    "cifar100": {"learning_rate": 0.02},
    "imagenet32": {"learning_rate": 0.02, "network": "wrn-28-2"},
    "celeba_hq_128": {
        "learning_rate": 0.02,
        "network": "wrn-28-5",
        "decay_epochs": (80, 120, 160),
        "l2_weight": 0.0,
        "l2_form": "batch_means",
        "noise_std": 0.0,
        "label_batch_size": 64,
        "iterations_per_epoch": 468,  # floor(30,000 / 64), also where a test split is held out of the 30,000
    },
}


def _ended(check: str) -> str:
    """The line on runs that end here and do not in the released code."""
    return f"the detector ends runs that the released code would continue ({check}); divergence.action: record does not"


_BEST = "the best epoch is reported beside the last one (released: the checkpoint of the best test accuracy)"
_DECAY_IN_WARMUP = "a decay epoch inside the warm-up counts from its end on (released: the warm-up overwrites it)"
_SCORED_BY_JEM = (
    "samples and accuracy are scored after epochs 5, 10, ... and the last (released: accuracy after every epoch, no "
    "FID in training), which moves the best epoch"
)
_LAYOUT = (
    "channels-last memory: on a CPU in fp32 running statistics differ from the released code's by 4e-6 (with "
    "memory_format: contiguous by 2e-7)"
)
_MEBM_DEPARTURES = (
    _ended("it stops at |loss| > 1e5, and not at NaN"),
    "samples and accuracy are scored after epochs 5, 10, ... and the last (released: FID after epochs 0, 5, 10, ... "
    "counted from 0 and the last, accuracy after every epoch), which moves the best epoch",
    _BEST,
    "scripts and readme of the release disagree on the noise at K = 5 (0.001 and 0, the readme's M-EBM command being "
    "M-JEM's): the scripts are followed",
    "K = 1, 3, 4 take the L2 weight and the noise of the K = 2 script, which is the nearest there is",
    "CIFAR-100: the learning rate of 0.02 is the paper's (Appendix A); the release has no command for it",
    _DECAY_IN_WARMUP,
    _LAYOUT,
    "ImageNet-32: p0 of the training images, crops and flips (released: p0 of the validation images, flips alone)",
    "CelebA-HQ: WRN-28-5 with an energy head, as in the paper; L2 weight 0, no noise and 468 iterations, as in the "
    "script (whose network is narrower and whose energy is the log-sum-exp of ten unused classes)",
)
_SMALL: Settings = {"network": "conv-16", "norm": "none", "initialisation": "xavier"}
_MEBM_SMALL: Settings = {**_SMALL, "noise_std": 0.001, "l2_weight": 0.0, "l2_form": "paper"}
# The detector's gap limits were measured on M-EBM and M-JEM. Without normalisation or clamps gaps swing wider and come
# back (small JEM and ShortRun runs on CIFAR-10: up to 13 and 5), so these methods are judged by a blow-up alone.
_WIDE_GAP: Settings = {"gap_limit": 50.0, "hard_gap_limit": 1000.0}
# Hybrid models of Grathwohl et al. and JEM++: both batches augmented and noised, 5,000 images held out.
_JEM_DATA: Settings = {
    "label_batch_size": 64,
    "augment": "crop_flip",
    "energy_augment": "crop_flip",
    "input_noise": 0.03,
    "label_noise": 0.03,
    "validation_images": 5000,
}
_JEM_SMALL: Settings = {**_SMALL, "energy_augment": "none", "validation_images": 0}
# IGEBM, f-EBM and KL-EBM: images in [0, 1], dequantised; noise before the gradient; L2 on both energies per sample.
_UNIT_RANGE: Settings = {
    "pixel_range": "unit",
    "dequantise": True,
    "augment": "none",
    "initial": "uniform",
    "noise_placement": "before",
    "l2_weight": 1.0,
    "l2_form": "paper",
    "optimiser": "adam",
    "weight_decay": 0.0,
    "warmup_iterations": 0,
    "decay_epochs": (),
    "batch_size": 128,
}
_IGEBM: Settings = {
    **_UNIT_RANGE,
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

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method(
            "m-ebm",
            "M-EBM",
            "E(x) = -(w h(x) + b), energy head",
            "K SGLD steps, alpha 1, from a replay buffer that starts as N(mu, Sigma) of the data",
            "mean E+ - mean E- + lambda L2",
            "M-EBM (PAKDD 2023) Algorithm 1; sndnyang/mebm scripts/maebm_cifar10.sh",
            "Tables 1, 2, 6: M-EBM",
            {"method": "m-ebm"},
            _released_by_steps,
            _MEBM_BY_DATASET,
            _MEBM_SMALL,
            _MEBM_DEPARTURES,
        ),
        Method(
            "m-jem",
            "M-JEM",
            "E(x) = -(w h(x) + b), energy head beside the class head",
            "as M-EBM",
            "M-EBM's loss + cross-entropy on a second, augmented batch of 128",
            "M-EBM (PAKDD 2023) section 4.1; sndnyang/mebm scripts/majem_cifar10.sh",
            "Tables 3, 4, 6: M-JEM",
            {"method": "m-jem"},
            _released_by_steps,
            _MEBM_BY_DATASET,
            _MEBM_SMALL,
            _MEBM_DEPARTURES,
        ),
        Method(
            "lse-jem",
            "LSE-JEM",
            "E(x) = -logsumexp_y f(x)[y], no energy head",
            "as M-EBM",
            "mean E+ - mean E- + cross-entropy, no L2 (incompatible: section 4.2)",
            "M-EBM (PAKDD 2023) section 5.3 (M-JEM without its energy head)",
            "Figures 2b, 4a: LSE-JEM",
            {"method": "lse-jem", "l2_weight": 0.0, "divergence": _WIDE_GAP},
            _released_by_steps,
            _MEBM_BY_DATASET,
            _MEBM_SMALL,
            (*_MEBM_DEPARTURES, "neither paper nor scripts give its command: M-JEM's, without the L2 term"),
        ),
        Method(
            "softmax",
            "Softmax classifier",
            "",
            "",
            "cross-entropy on the labelled batch",
            "M-EBM (PAKDD 2023) section 5; train_maebm.py with --px 0 --pyx 1",
            "Tables 3, 4: Softmax; Table 6: Classifier",
            {"method": "softmax", "l2_weight": 0.0},
            by_dataset=_MEBM_BY_DATASET,
            small=_MEBM_SMALL,
            departures=(
                "a run ends at a loss or gradient that is not finite (released: it trains on)",
                "accuracy is taken after epochs 5, 10, ... and the last (released: after every epoch), which moves the "
                "best epoch",
                _BEST,
                "a batch of 128 (Table 6 speaks of 64 for all models)",
                "CIFAR-100: the learning rate of 0.02 is the paper's (Appendix A); the release has no command for it",
                _DECAY_IN_WARMUP,
                _LAYOUT,
            ),
        ),
        Method(
            "jem",
            "JEM",
            "E(x) = -logsumexp_y f(x)[y], no normalisation",
            "K = 20 SGLD steps, alpha 1, sigma 0.01, no clamps, from a replay buffer that starts as U[-1, 1]",
            "mean E+ - mean E- + cross-entropy on a second batch of 64",
            "JEM (ICLR 2020); wgrathwohl/JEM train_wrn_ebm.py",
            "Tables 3, 4, 6: JEM (K = 20, 30)",
            {
                "method": "jem",
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
                "divergence": {"loss_limit": 1e8, **_WIDE_GAP},
                **_JEM_DATA,
            },
            _as_trained,
            small={**_JEM_SMALL, "learning_rate": 1e-3},
            departures=(
                _ended("it stops at |loss| > 1e8, and not at NaN"),
                _SCORED_BY_JEM,
                "the 5,000 held-out images are another draw; none of them is used to choose a model",
                "accuracy is taken on clean test images (released: with noise of 0.03 by default)",
                "its unused layer `linear` is not there (6,410 parameters of a WRN-28-10, 650 of a WRN-10-1)",
                _DECAY_IN_WARMUP,
                "an epoch is 703 iterations as in JEM's code (the paper's Table 6 counts 390 for every row)",
                "no extra chains every 100 iterations (released: for plots, and they too are written to the buffer)",
            ),
        ),
        Method(
            "jem++",
            "JEM++",
            "E(x) = -logsumexp_y f(x)[y]",
            "M = 5, 10, 20 outer steps of N = 5 proximal steps of 0.2 through the first layer, no noise, from a buffer "
            "that starts as one Gaussian per class",
            "mean E+ - mean E- + cross-entropy on a second batch of 64",
            "JEM++ (ICCV 2021); sndnyang/JEMPP train_jempp.py",
            "Tables 3, 4, 6: JEM++ (M, also written K)",
            {
                "method": "jem++",
                "initial": "class-gaussian",
                "sampling_steps": 10,
                "inner_steps": 5,
                "noise_std": 0.0,
                "l2_weight": 0.0,
                "weight_decay": 4e-4,
                "decay_epochs": (50, 100, 125),
                "epochs": 150,
                "divergence": {"loss_limit": 1e8, **_WIDE_GAP},
                **_JEM_DATA,
            },
            _as_trained,
            small={**_JEM_SMALL},
            departures=(
                _ended("it stops at |loss| > 1e8, and not at NaN"),
                _SCORED_BY_JEM,
                "the 5,000 held-out images are another draw; none of them is used to choose a model",
                "accuracy is taken on clean test images (released: offline with noise of 0.03)",
                _DECAY_IN_WARMUP,
                _LAYOUT,
                "an epoch is 703 iterations as in its code (the paper's Table 6 counts 390 for every row)",
                "no extra chains every 100 iterations (released: for plots, and they too are written to the buffer)",
                "with noise, which the published setting has not, chains are clamped after it too",
                "the class Gaussians are of clean images (the released statistics are of augmented, noised ones)",
                "the buffer starts with classes drawn at random (released: equal blocks)",
                "the unused direct step of size sgld_lr = 0 is not computed",
            ),
        ),
        Method(
            "igebm",
            "IGEBM",
            "E(x), a residual network with spectral norm and a global sum",
            "K = 60 steps in [0, 1], alpha 10, noise 0.005 before a gradient clamped to 0.01, 8-bit ring buffer",
            "mean E+ - mean E- + mean E+^2 + mean E-^2",
            "IGEBM (NeurIPS 2019); openai/ebm_code_release, unconditional CIFAR-10 command of its README",
            "Tables 1, 2, 6: IGEBM (K = 60)",
            {"method": "igebm", "network": "igebm-128", "dropout": 0.5, **_IGEBM},
            _as_trained,
            small={"network": "igebm-8"},
            departures=(
                _ended("it checks nothing"),
                "unconditional only: Table 3's row is the class-conditional model",
                "the ring holds exactly |B| images (released: up to a batch more for a while)",
                "one worker's batch of 128 and 200 epochs of 390 iterations (released: until stopped, 75,000-120,000)",
                "scored as a single model at the end (Table 1's row is an ensemble of ten checkpoints), on the buffer "
                "and on fresh chains of K steps (released: 200 rounds of 20 steps over a buffer of its own)",
                "PyTorch's Adam: epsilon is added after the bias correction, not before",
            ),
        ),
        Method(
            "shortrun",
            "ShortRun",
            "E(x), five convolutions without normalisation",
            "K = 100 SGLD steps, alpha 1, sigma 0.01, from U[-1, 1] each time, no buffer",
            "mean E+ - mean E-",
            "Short-run MCMC (NeurIPS 2019); enijkamp/short_run train_cifar10_minimal.py",
            "Table 1: ShortRun (K = 100)",
            {
                "method": "shortrun",
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
                "divergence": _WIDE_GAP,
                "epochs": 256,  # 99,840 iterations on CIFAR-10; released: 100,000
            },
            _as_trained,
            small={"network": "shortrun-16", "learning_rate": 1e-3},
            departures=(
                _ended("it checks nothing"),
                "no buffer to score: its samples are fresh chains of K steps, as the method defines them",
            ),
        ),
        Method(
            "kl-ebm",
            "KL-EBM (improved contrastive divergence)",
            "E(x) in R^3, three networks on three scales; chains descend the sum, losses take the mean",
            "K = 40 steps in [0, 1], alpha 100, noise 0.001 before the gradient, reservoir of augmented 8-bit states",
            "mean E+ - mean E- + mean E+^2 + mean E-^2 + KL through the last step - 0.3 entropy",
            "Improved contrastive divergence (ICML 2021); yilundu/improved_contrastive_divergence, CIFAR-10 command",
            "Tables 1, 2, 6: KL-EBM (K = 40)",
            {
                "method": "kl-ebm",
                "network": "multiscale-64",
                "norm": "instance",
                **_UNIT_RANGE,
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
            },
            _as_trained,
            by_dataset={"celeba_hq_128": {"step_size": 500.0}},
            small={"network": "multiscale-8"},
            departures=(
                "200 epochs of 390 iterations (released: until stopped)",
                "every iteration has the KL gradient (released: not each 1,000th)",
                _ended("it crashes at |mean E+| > 10 or NaN, which this does not"),
                "scored at the end, on the newest |B| chain states and fresh chains of K steps (released: the best by "
                "IS, augmented rounds over a buffer of its own, against 10,000 training images)",
                "a crop of the buffer augmentation that does not fit is narrowed (released: drawn again)",
                "for 128-pixel images only its step size is taken: not its networks (128 filters), its class "
                "conditioning or its batch of 128 on each of 8 GPUs",
            ),
        ),
        Method(
            "f-ebm",
            "f-EBM",
            "E(x), a residual network with spectral norm, and a critic H of the same kind",
            "as IGEBM, one chain for the critic and one for the energy",
            "an f-divergence in its variational form (Jensen-Shannon, squared Hellinger, reverse KL, KL, Pearson) + L2",
            "f-EBM (ICML 2020); ermongroup/f-EBM image_generation/train_febm.py",
            "Table 1: f-EBM (K = 60)",
            {"method": "f-ebm", "network": "febm-128", **_IGEBM},
            _as_trained,
            small={"network": "febm-8"},
            departures=(
                _ended("it checks nothing"),
                "unconditional (the released command, and so Table 1's row, is class-conditional)",
                "a batch of 128 and 200 epochs of 390 iterations (released: 128 on each of four workers until stopped; "
                "its best log is at iteration 45,900)",
                "scored at the end, on the buffer and on fresh chains of K steps (released: the best by IS, 360 rounds "
                "of 5 steps over a buffer of its own)",
                "one power iteration of spectral norm per iteration (released: two, one in each of its session runs)",
                "PyTorch's Adam: epsilon is added after the bias correction, not before",
            ),
        ),
        Method(
            "vera",
            "VERA",
            "E(x) = -logsumexp_y f(x)[y], no normalisation, dropout",
            "a generator trained in the same loop with an entropy bonus; no chain in training",
            "mean E+ - mean E- + 0.1 mean |dE/dx+|^2 / 2 + alpha cross-entropy on the same batch (alpha = 100, 1)",
            "VERA (ICLR 2021); wgrathwohl/VERA train.py, CIFAR command of its README",
            "Tables 3, 4, 6: VERA (alpha = class_weight)",
            {
                "method": "vera",
                "norm": "none",
                "dropout": 0.3,
                "batch_size": 40,
                "label_batch_size": 40,
                "shared_batch": True,
                "energy_augment": "crop_flip",
                "l2_weight": 0.0,
                "class_weight": 100.0,
                "gradient_penalty": 0.1,
                "optimiser": "adam",
                "betas": (0.0, 0.9),
                "learning_rate": 3e-5,
                "weight_decay": 0.0,
                "warmup_iterations": 2500,
                "decay_epochs": (150, 175),
                "decay_factor": 0.3,
                "divergence": _WIDE_GAP,
            },
            small={
                **_SMALL,
                "dropout": 0.0,
                "energy_augment": "none",
                "learning_rate": 3e-4,
                "generator": {
                    "noise_dim": 32,
                    "features": 32,
                    "learning_rate": 6e-4,
                    "posterior_learning_rate": 3e-4,
                },
            },
            departures=(
                _ended("it has no such detector"),
                "samples are the generator's, with batch statistics; the optional refinement by MALA is not done",
                "an epoch is floor(images / 40) iterations, 1,250 on CIFAR",
                "dropout is 0.3 for every data set (its eval.py expects 0.4 off CIFAR-10)",
                "the warm-up's first iteration has rate 0 (released: a 2,500th of the rate)",
            ),
        ),
    )
}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, nested mappings merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _of_family(network: Any, below: Mapping[str, Any], published_norm: str | None) -> dict[str, Any]:
    """Norm, initialisation and dropout for a user's network of another family than the preset's."""
    preset = below.get("network", TrialConfig.model_fields["network"].default)
    try:
        family = parse_network(network).family
    except (ValueError, TypeError):  # no network given, or one that the complete validation refuses
        return {}
    if family == parse_network(preset).family:
        return {}
    # A method that is published without normalisation stays without.
    bare = published_norm == "none" and "none" in family.norms
    norm = "none" if bare else family.default_norm
    changed: dict[str, Any] = {"norm": norm, "initialisation": family.initialisations[0]}
    return changed if family.dropout else changed | {"dropout": 0.0}


def build_trial(values: Mapping[str, Any]) -> TrialConfig:
    """A complete configuration from the fields a user gives.

    What is left out comes, in this order, from the method's settings for the data set, its small settings (the
    embedded digits want a small network), the data set's own defaults (a short run for the digits), from the method
    (with its dependence on K), and from `TrialConfig`.

    Raises:
        pydantic.ValidationError: a field is unknown or its value impossible.
    """
    name = values.get("method", "m-ebm")
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        return TrialConfig.model_validate(dict(values))  # pydantic names the field and what is allowed
    dataset = values.get("dataset", TrialConfig.model_fields["dataset"].default)
    known = DATASETS.get(dataset) if isinstance(dataset, str) else None
    below = dict(method.settings)
    if known:
        below = merge(below, known.trial_defaults)
        below = merge(below, method.small if known.side < SMALL_SIDE else {})
        below = merge(below, method.by_dataset.get(known.name, {}))
    below |= _of_family(values.get("network"), below, method.settings.get("norm"))
    steps = values.get(
        "sampling_steps", below.get("sampling_steps", TrialConfig.model_fields["sampling_steps"].default)
    )
    with suppress(ValidationError):  # the complete validation below says it better
        # "2" and 2.0 are K = 2 to pydantic, so they must be to the presets.
        below = merge(method.by_steps(_STEPS.validate_python(steps)), below)
    return TrialConfig.model_validate(merge(below, values))
