"""The methods' presets against the published settings, written out here (algorithms.md, sections 2 to 11)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from trainables.config.method import METHODS, method_class
from trainables.config.network import network_families, parse_network
from trainables.config.trial import TrialConfig
from trainables.methods.presets import build_trial
from trainables.networks.energy_model import build_network

# What the CIFAR-10 runs of several methods have in common.
_WRN = {"network": "wrn-28-10", "initialisation": "default"}
_SGD = {"optimiser": "sgd", "momentum": 0.9, "learning_rate": 0.1, "warmup_iterations": 1000, "decay_factor": 0.2}
_NO_SCHEDULE = {"warmup_iterations": 0, "decay_epochs": (), "weight_decay": 0.0}
_PLAIN_LOSS = {"l2_weight": 0.0, "kl_weight": 0.0, "entropy_weight": 0.0, "gradient_penalty": 0.0}
_NO_CLIP = {"clip_norm": None, "clip_sigma": None, "ema_decay": None}
_SIGNED_DATA = {"pixel_range": "signed", "dequantise": False}
_JEM_DATA = {
    **_SIGNED_DATA,
    "batch_size": 64,
    "label_batch_size": 64,
    "shared_batch": False,
    "batch_order": "shuffled",
    "augment": "crop_flip",
    "energy_augment": "crop_flip",
    "input_noise": 0.03,
    "label_noise": 0.03,
    "validation_images": 5000,
    "train_images": None,
    "iterations_per_epoch": None,
}
_REPLACED = {"buffer": "replace", "buffer_size": 10_000, "reinit_probability": 0.05, "buffer_augment": "none"}
# IGEBM and its fork f-EBM.
_IGEBM = {
    "norm": "spectral",
    "initialisation": "default",
    "pixel_range": "unit",
    "dequantise": True,
    "energy_augment": "none",
    "input_noise": 0.0,
    "batch_size": 128,
    "validation_images": 0,
    "initial": "uniform",
    "buffer": "ring",
    "buffer_size": 10_000,
    "buffer_augment": "none",
    "reinit_probability": 0.05,
    "sampling_steps": 60,
    "inner_steps": 1,
    "step_size": 10.0,
    "noise_std": 0.005,
    "noise_placement": "before",
    "gradient_clamp": 0.01,
    "sample_clamp": True,
    "sampler_norm_mode": "train",
    "l2_weight": 1.0,
    "l2_form": "paper",
    "kl_weight": 0.0,
    "entropy_weight": 0.0,
    "gradient_penalty": 0.0,
    "optimiser": "adam",
    "betas": (0.0, 0.999),
    "learning_rate": 3e-4,
    **_NO_SCHEDULE,
    "clip_sigma": 3.0,
    "clip_norm": None,
    "ema_decay": None,
}
# Section 2 and 3: scripts/maebm_cifar10.sh and majem_cifar10.sh.
_MEBM = {
    **_WRN,
    **_SGD,
    **_REPLACED,
    **_NO_CLIP,
    **_SIGNED_DATA,
    "norm": "batch",
    "norm_momentum": 0.9,
    "dropout": 0.0,
    "batch_size": 64,
    "label_batch_size": 128,
    "shared_batch": False,
    "augment": "crop_flip",
    "energy_augment": "none",
    "input_noise": 0.0,
    "label_noise": 0.0,
    "validation_images": 0,
    "initial": "gaussian",
    "covariance_jitter": 1e-4,
    "sampling_steps": 5,
    "inner_steps": 1,
    "step_size": 1.0,
    "noise_placement": "after",
    "gradient_clamp": 1.0,
    "sample_clamp": True,
    "sampler_norm_mode": "train",
    "kl_weight": 0.0,
    "entropy_weight": 0.0,
    "gradient_penalty": 0.0,
    "class_weight": 1.0,
    "weight_decay": 5e-4,
    "decay_epochs": (60, 120, 180),
    "epochs": 200,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "m-ebm": {**_MEBM, "noise_std": 0.001, "l2_weight": 0.5, "l2_form": "released"},
    "m-jem": {**_MEBM, "noise_std": 0.001, "l2_weight": 0.5, "l2_form": "released"},
    "lse-jem": {**_MEBM, "l2_weight": 0.0},
    "softmax": {
        **_WRN,
        **_SGD,
        "norm": "batch",
        "label_batch_size": 128,
        "augment": "crop_flip",
        "label_noise": 0.0,
        "weight_decay": 5e-4,
        "decay_epochs": (60, 120, 180),
        "epochs": 200,
        "class_weight": 1.0,
    },
    # Section 6.
    "jem": {
        **_WRN,
        **_JEM_DATA,
        **_REPLACED,
        **_PLAIN_LOSS,
        **_NO_CLIP,
        "norm": "none",
        "dropout": 0.0,
        "initial": "uniform",
        "sampling_steps": 20,
        "inner_steps": 1,
        "step_size": 1.0,
        "noise_std": 0.01,
        "noise_placement": "after",
        "gradient_clamp": None,
        "sample_clamp": False,
        "sampler_norm_mode": "eval",
        "class_weight": 1.0,
        "optimiser": "adam",
        "betas": (0.9, 0.999),
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "warmup_iterations": 1000,
        "decay_epochs": (160, 180),
        "decay_factor": 0.3,
        "epochs": 200,
    },
    # Section 7.
    "jem++": {
        **_WRN,
        **_JEM_DATA,
        **_REPLACED,
        **_PLAIN_LOSS,
        **_NO_CLIP,
        **_SGD,
        "norm": "batch",
        "norm_momentum": 0.9,
        "dropout": 0.0,
        "initial": "class-gaussian",
        "covariance_jitter": 1e-4,
        "inner_steps": 5,
        "step_size": 5 * 0.2,
        "noise_std": 0.0,
        "gradient_clamp": 1.0,
        "sample_clamp": True,
        "sampler_norm_mode": "train",
        "class_weight": 1.0,
        "weight_decay": 4e-4,
        "decay_epochs": (50, 100, 125),
        "epochs": 150,
    },
    # Section 8.
    "igebm": {**_IGEBM, "network": "igebm-128", "dropout": 0.5},
    # Section 9.1.
    "shortrun": {
        **_SIGNED_DATA,
        **_PLAIN_LOSS,
        **_NO_CLIP,
        **_NO_SCHEDULE,
        "network": "shortrun-64",
        "norm": "none",
        "initialisation": "default",
        "batch_size": 64,
        "batch_order": "replacement",
        "energy_augment": "none",
        "input_noise": 0.03,
        "validation_images": 0,
        "initial": "uniform",
        "buffer": "none",
        "sampling_steps": 100,
        "inner_steps": 1,
        "step_size": 1.0,
        "noise_std": 0.01,
        "noise_placement": "after",
        "gradient_clamp": None,
        "sample_clamp": False,
        "optimiser": "adam",
        "betas": (0.9, 0.999),
        "learning_rate": 1e-4,
    },
    # Section 10.
    "kl-ebm": {
        **_NO_SCHEDULE,
        "network": "multiscale-64",
        "norm": "instance",
        "initialisation": "default",
        "dropout": 0.0,
        "pixel_range": "unit",
        "dequantise": True,
        "energy_augment": "none",
        "input_noise": 0.0,
        "batch_size": 128,
        "validation_images": 0,
        "initial": "uniform",
        "buffer": "reservoir",
        "buffer_size": 10_000,
        "buffer_augment": "contrastive",
        "reinit_probability": 0.001,
        "sampling_steps": 40,
        "inner_steps": 1,
        "step_size": 100.0,
        "noise_std": 0.001,
        "noise_placement": "before",
        "gradient_clamp": None,
        "sample_clamp": True,
        "sampler_norm_mode": "train",
        "l2_weight": 1.0,
        "l2_form": "paper",
        "kl_weight": 1.0,
        "entropy_weight": 0.3,
        "gradient_penalty": 0.0,
        "optimiser": "adam",
        "betas": (0.0, 0.9),
        "learning_rate": 2e-4,
        "clip_norm": 0.5,
        "clip_sigma": None,
        "ema_decay": 0.99,
    },
    # Section 11.1.
    "f-ebm": {
        **_IGEBM,
        "network": "febm-128",
        "dropout": 0.0,
        "method_args": {"divergence": "jensen-shannon", "start_iteration": 11},
    },
    # Section 11.2.
    "vera": {
        **_WRN,
        **_SIGNED_DATA,
        **_NO_CLIP,
        "norm": "none",
        "dropout": 0.3,
        "batch_size": 40,
        "label_batch_size": 40,
        "shared_batch": True,
        "augment": "crop_flip",
        "energy_augment": "crop_flip",
        "input_noise": 0.0,
        "label_noise": 0.0,
        "validation_images": 0,
        "l2_weight": 0.0,
        "kl_weight": 0.0,
        "entropy_weight": 0.0,
        "gradient_penalty": 0.1,
        "class_weight": 100.0,
        "method_args": {
            "noise_dim": 128,
            "features": 256,
            "learning_rate": 6e-5,
            "posterior_learning_rate": 3e-5,
            "entropy_weight": 1e-4,
            "importance_samples": 20,
            "noise_std_range": (0.01, 0.3),
        },
        "optimiser": "adam",
        "betas": (0.0, 0.9),
        "learning_rate": 3e-5,
        "weight_decay": 0.0,
        "warmup_iterations": 2500,
        "decay_epochs": (150, 175),
        "decay_factor": 0.3,
        "epochs": 200,
    },
}
# Section 5 of algorithms_more.md.
PUBLISHED["sada-jem"] = {
    **_MEBM,
    **_PLAIN_LOSS,
    "initial": "class-gaussian",
    "noise_std": 0.0,
    "l2_form": "batch_means",
    "sam_rho": 2.0,
    "sam_adaptive": True,
}
# Section 1.
PUBLISHED["diffurecov"] = {
    **_SIGNED_DATA,
    **_PLAIN_LOSS,
    "network": "diffurecov-128-8",
    "norm": "spectral",
    "dropout": 0.0,
    "batch_size": 256,
    "energy_augment": "flip",
    "input_noise": 0.0,
    "initial": "normal",
    "buffer": "none",
    "sampling_steps": 30,
    "inner_steps": 1,
    "step_size": 0.5,
    "noise_std": 1.0,
    "noise_placement": "after",
    "gradient_clamp": None,
    "sample_clamp": False,
    "sampler_norm_mode": "train",
    "method_args": {"step_variance": 2e-4, "test_noise": 0.99},
    "optimiser": "adam",
    "betas": (0.9, 0.999),
    "learning_rate": 1e-4,
    "weight_decay": 0.0,
    "warmup_iterations": 1000,
    "decay_epochs": (),
    "clip_norm": None,
    "clip_sigma": None,
    "ema_decay": 0.999,
}
# Section 2.
PUBLISHED["cf-ebm"] = {
    **_SIGNED_DATA,
    **_PLAIN_LOSS,
    **_NO_CLIP,
    **_NO_SCHEDULE,
    "network": "cfebm-32",
    "norm": "spectral",
    "batch_size": 64,
    "energy_augment": "flip",
    "input_noise": 0.0,
    "initial": "uniform",
    "buffer": "none",
    "sampling_steps": 15,
    "inner_steps": 1,
    "step_size": 1.0,
    "noise_std": 0.015,
    "noise_placement": "after",
    "gradient_clamp": None,
    "sample_clamp": False,
    "sampler_norm_mode": "eval",
    "method_args": {"phase_images": 1_200_000},
    "optimiser": "adam",
    "betas": (0.5, 0.999),
    "learning_rate": 1e-3,
}
# Section 9.
PUBLISHED["gebm"] = {
    **_SIGNED_DATA,
    **_PLAIN_LOSS,
    **_NO_CLIP,
    **_NO_SCHEDULE,
    "network": "gebm-128",
    "norm": "spectral",
    "batch_size": 128,
    "energy_augment": "none",
    "input_noise": 0.0,
    "method_args": {
        "noise_dim": 100,
        "features": 128,
        "learning_rate": 1e-4,
        "penalty": 1.0,
        "energy_steps": 5,
        "long_steps": 100,
        "long_every": 500,
        "partition_batches": 100,
        "latent_step": 1e-4,
        "inverse_temperature": 100.0,
    },
    "optimiser": "adam",
    "betas": (0.5, 0.999),
    "learning_rate": 1e-4,
}
# Section 6.
PUBLISHED["clel"] = {
    **_PLAIN_LOSS,
    "network": "clel-128",
    "norm": "spectral",
    "dropout": 0.0,
    "batch_size": 64,
    "energy_augment": "none",
    "pixel_range": "unit",
    "dequantise": True,
    "input_noise": 0.0,
    "initial": "uniform",
    "buffer": "replace",
    "buffer_size": 10_000,
    "reinit_probability": 0.001,
    "sampling_steps": 60,
    "inner_steps": 1,
    "step_size": 100.0,
    "noise_std": 0.001,
    "noise_placement": "after",
    "gradient_clamp": 100.0,
    "sample_clamp": True,
    "sampler_norm_mode": "train",
    "l2_weight": 1.0,
    "l2_form": "paper",
    "method_args": {
        "alignment": 0.01,
        "temperature": 0.2,
        "encoder_channels": 64,
        "encoder_learning_rate": 0.03,
        "encoder_weight_decay": 5e-4,
        "rounds": 10,
    },
    "optimiser": "adam",
    "betas": (0.0, 0.999),
    "learning_rate": 1e-4,
    "weight_decay": 0.0,
    "warmup_iterations": 2000,
    "decay_epochs": (),
    "clip_norm": None,
    "clip_sigma": None,
    "ema_decay": 0.5 ** (64 / 20_000),
}
# Energy, cross-entropy, where x- comes from, critic (the comparison of section 0).
PARTS: dict[str, tuple[str | None, bool, str | None, bool]] = {
    "m-ebm": ("head", False, "chains", False),
    "m-jem": ("head", True, "chains", False),
    "lse-jem": ("logsumexp", True, "chains", False),
    "softmax": (None, True, None, False),
    "jem": ("logsumexp", True, "chains", False),
    "jem++": ("logsumexp", True, "chains", False),
    "igebm": ("head", False, "chains", False),
    "shortrun": ("head", False, "chains", False),
    "kl-ebm": ("head", False, "chains", False),
    "f-ebm": ("head", False, "chains", True),
    "vera": ("logsumexp", True, "generator", False),
    "sada-jem": ("logsumexp", True, "chains", False),
    "diffurecov": ("head", False, "chains", False),
    "cf-ebm": ("head", False, "chains", False),
    "gebm": ("head", False, "generator", False),
    "clel": ("head", False, "chains", False),
}
WITHOUT_BUFFER = {"shortrun", "diffurecov", "cf-ebm"}
OWN_NETWORK = {"diffurecov": "conditioned on t", "cf-ebm": "a part for each side", "clel": "make latents"}
"""Methods that take no network but their own, and what they say of another."""
SMALL = {
    "wrn": "wrn-10-1",
    "conv": "conv-8",
    "igebm": "igebm-4",
    "febm": "febm-4",
    "shortrun": "shortrun-4",
    "multiscale": "multiscale-4",
    "diffurecov": "diffurecov-4-1",
    "cfebm": "cfebm-1",
    "gebm": "gebm-4",
    "clel": "clel-4",
}


def _per_epoch(c: TrialConfig, images: int) -> int:
    return (images - c.validation_images) // c.label_batch_size


def test_every_method_has_a_definition_and_is_tested_here() -> None:
    assert set(METHODS) == set(PUBLISHED) == set(PARTS)
    assert set(SMALL) == set(network_families())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cifar10_settings(name: str) -> None:
    c = build_trial({"method": name, "dataset": "cifar10"})
    values = c.model_dump()
    assert {key: values[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", PARTS)
def test_parts(name: str) -> None:
    energy, classifies, sampler, critic = PARTS[name]
    c = build_trial({"method": name})
    method = c.method_args
    assert (method.head, c.classifies, c.samples) == (energy, classifies, sampler is not None)
    assert c.chains == (sampler == "chains") and ("generator" in method.kept) == (sampler == "generator")
    assert (method.energies == 2) == critic
    assert c.buffered == (PARTS[name][2] == "chains" and name not in WITHOUT_BUFFER)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("m-ebm", 390),
        ("m-jem", 390),
        ("softmax", 390),
        ("jem", 703),
        ("jem++", 703),
        ("igebm", 390),
        ("kl-ebm", 390),
        ("f-ebm", 390),
        ("vera", 1250),
        ("sada-jem", 390),
        ("diffurecov", 390),
        ("cf-ebm", 390),
        ("gebm", 390),
        ("clel", 390),
    ],
)
def test_iterations_in_an_epoch(name: str, wanted: int) -> None:
    c = build_trial({"method": name, "dataset": "cifar10"})
    assert c.iterations_per_epoch is None and _per_epoch(c, 50_000) == wanted


def test_iterations_of_methods_whose_papers_count_them() -> None:
    c = build_trial({"method": "shortrun", "dataset": "cifar10"})
    assert c.epochs * _per_epoch(c, 50_000) == pytest.approx(100_000, rel=0.005)
    c = build_trial({"method": "diffurecov", "dataset": "cifar10"})
    assert c.epochs * _per_epoch(c, 50_000) == pytest.approx(240_000, rel=0.005) and c.evaluation.weights == "ema"
    c = build_trial({"method": "gebm", "dataset": "cifar10"})
    assert c.epochs * _per_epoch(c, 50_000) == pytest.approx(150_000 * (100 + 499 * 5) / 500, rel=0.005)
    assert c.evaluation.fresh_steps == 1000
    c = build_trial({"method": "clel", "dataset": "cifar10"})
    assert c.epochs * _per_epoch(c, 50_000) == pytest.approx(100_000, rel=0.005)
    assert (c.evaluation.fresh_steps, c.evaluation.weights) == (60, "ema")


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("m-ebm", 1e5),
        ("m-jem", 1e5),
        ("sada-jem", 1e5),
        ("jem", 1e8),
        ("jem++", 1e8),
        ("diffurecov", 1e6),
        ("cf-ebm", 1e3),
    ],
)
def test_released_checks_for_divergence(name: str, limit: float) -> None:
    assert build_trial({"method": name, "dataset": "cifar10"}).divergence.loss_limit == limit


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20])
def test_settings_that_depend_on_k(steps: int) -> None:
    """lambda and sigma of M-EBM and M-JEM (section 2.4, 2.5); JEM++'s M leaves all else alone (section 7)."""
    l2, noise = (0.5, 0.001) if steps >= 5 else (0.1, 0.0)
    for name in ("m-ebm", "m-jem"):
        c = build_trial({"method": name, "dataset": "cifar10", "sampling_steps": steps})
        assert (c.sampling_steps, c.l2_weight, c.noise_std) == (steps, l2, noise)
    for name in ("jem", "jem++", "igebm", "shortrun", "kl-ebm", "f-ebm", "diffurecov", "cf-ebm"):
        base = build_trial({"method": name, "dataset": "cifar10"}).model_dump()
        c = build_trial({"method": name, "dataset": "cifar10", "sampling_steps": steps})
        changed = {key for key, value in c.model_dump().items() if value != base[key]}
        assert changed <= {"sampling_steps", "evaluation"}
        assert c.evaluation.fresh_steps == steps, "fresh chains are as long as those of training"


def test_settings_that_depend_on_the_data_set() -> None:
    """Appendix A of the paper; the CelebA-HQ commands of M-EBM and KL-EBM (sections 2.7 and 10)."""

    def setting(name: str, dataset: str, *fields: str) -> tuple[Any, ...]:
        c = build_trial({"method": name, "dataset": dataset})
        return tuple(getattr(c, field) for field in fields)

    for name in ("m-ebm", "m-jem"):
        assert setting(name, "cifar100", "learning_rate", "network") == (0.02, "wrn-28-10")
        assert setting(name, "imagenet32", "learning_rate", "network") == (0.02, "wrn-28-2")
    fields = ("learning_rate", "network", "decay_epochs", "l2_weight", "l2_form", "noise_std", "iterations_per_epoch")
    expected = (0.02, "wrn-28-5", (80, 120, 160), 0.0, "batch_means", 0.0, 468)
    assert setting("m-ebm", "celeba_hq_128", *fields) == expected
    for steps, noise in ((1, 0.0), (2, 0.0), (5, 0.001), (10, 0.001)):
        for name in ("m-jem", "lse-jem"):  # one script
            assert build_trial({"method": name, "dataset": "cifar10", "sampling_steps": steps}).noise_std == noise
    assert setting("kl-ebm", "celeba_hq_128", "step_size", "sampling_steps") == (500.0, 40)
    for name in ("jem", "jem++", "igebm", "shortrun", "kl-ebm", "f-ebm", "vera"):
        ten, hundred = (build_trial({"method": name, "dataset": d}).learning_rate for d in ("cifar10", "cifar100"))
        assert ten == hundred, "0.02 is M-EBM's"


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "cifar100"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_method_builds(name: str, dataset: str) -> None:
    c = build_trial({"method": name, "dataset": dataset})
    assert (c.method, c.dataset) == (name, dataset)
    assert TrialConfig.model_validate_json(c.to_json()) == c
    own = build_trial({"method": name, "dataset": dataset, "learning_rate": 0.0123, "evaluation": {"every": 7}})
    assert (own.learning_rate, own.evaluation.every) == (0.0123, 7), "what the user says stands"
    assert own.evaluation.fresh_steps == c.evaluation.fresh_steps


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_for_digits(name: str) -> None:
    """A small network of the published kind where there is one for 8x8 images; digits keep their short schedule."""
    c = build_trial({"method": name, "dataset": "digits"})
    family = parse_network(c.network)[0].name
    own = {"igebm": "igebm", "f-ebm": "febm", "shortrun": "shortrun", "kl-ebm": "multiscale"}
    assert family == (own | {"diffurecov": "diffurecov", "cf-ebm": "cfebm", "gebm": "gebm", "clel": "clel"}).get(
        name, "conv"
    )
    assert (c.warmup_iterations, c.decay_epochs, c.validation_images) == (0, (), 0)
    assert c.augment == c.energy_augment == "none", "a mirrored digit is no digit"
    network = build_network(
        c.network,
        (1, 8, 8),
        10,
        norm=c.norm,
        initialisation=c.initialisation,
        energy=c.method_args.head or "head",
        class_head=True if c.classifies else None,
        dropout=0.0,
    )
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    energy = network.energy(x)
    assert energy.shape == (3,) and energy.isfinite().all()
    assert sum(p.numel() for p in network.parameters()) < 200_000
    if c.classifies:
        assert network.logits(x).shape == (3, 10)


# What the definition of a method fixes may not be lost on the small images.
KEPT = {
    "jem": ("norm", "initial", "gradient_clamp", "sample_clamp", "noise_std", "sampling_steps", "input_noise"),
    "jem++": ("initial", "inner_steps", "noise_std", "step_size", "weight_decay", "input_noise"),
    "igebm": ("norm", "buffer", "noise_placement", "gradient_clamp", "step_size", "l2_weight", "clip_sigma", "dropout"),
    "f-ebm": (
        "norm",
        "buffer",
        "noise_placement",
        "gradient_clamp",
        "step_size",
        "l2_weight",
        "clip_sigma",
        "method_args",
    ),
    "shortrun": ("norm", "buffer", "initial", "sampling_steps", "noise_std", "input_noise", "batch_order"),
    "kl-ebm": (
        "norm",
        "buffer",
        "buffer_augment",
        "kl_weight",
        "entropy_weight",
        "step_size",
        "clip_norm",
        "ema_decay",
    ),
    "vera": ("norm", "shared_batch", "class_weight", "gradient_penalty", "betas", "batch_size"),
    "gebm": ("norm", "betas", "sampler_norm_mode"),
    "clel": (
        "norm",
        "buffer",
        "sampling_steps",
        "step_size",
        "noise_std",
        "gradient_clamp",
        "reinit_probability",
        "l2_weight",
        "betas",
        "batch_size",
    ),
    "cf-ebm": (
        "norm",
        "buffer",
        "sampling_steps",
        "step_size",
        "noise_std",
        "sampler_norm_mode",
        "betas",
        "batch_size",
    ),
    "diffurecov": ("norm", "buffer", "initial", "sampling_steps", "noise_std", "step_size", "method_args"),
    "sada-jem": ("initial", "noise_std", "sampling_steps", "sam_rho", "sam_adaptive", "l2_weight"),
}


@pytest.mark.parametrize("name", KEPT)
def test_digits_keep_what_makes_the_method(name: str) -> None:
    small, large = (build_trial({"method": name, "dataset": d}) for d in ("digits", "cifar10"))
    assert {f: getattr(small, f) for f in KEPT[name]} == {f: getattr(large, f) for f in KEPT[name]}


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_of_another_family(name: str, family: str, dataset: str) -> None:
    """A user's network of another family brings its own norm, weights and dropout; one of the same keeps the preset's."""
    preset = build_trial({"method": name, "dataset": dataset})
    values = {"method": name, "dataset": dataset, "network": SMALL[family]}
    if name == "jem++" and family not in ("wrn", "conv"):
        with pytest.raises(ValidationError, match="inner_steps > 1 needs a wrn- or conv-network"):
            build_trial(values)
        return
    if name == "f-ebm" and family == "multiscale":
        with pytest.raises(ValidationError, match="one energy per image"):
            build_trial(values)
        return
    if name in OWN_NETWORK and family != parse_network(preset.network)[0].name:
        with pytest.raises(ValidationError, match=OWN_NETWORK[name]):
            build_trial(values)
        return
    c = build_trial(values)
    assert c.network == SMALL[family]
    if parse_network(preset.network)[0].name == family:
        assert (c.norm, c.initialisation, c.dropout) == (preset.norm, preset.initialisation, preset.dropout)
        return
    own = {"wrn": "batch", "conv": "batch", "igebm": "spectral", "febm": "spectral", "multiscale": "instance"}
    own["diffurecov"] = own["cfebm"] = own["gebm"] = own["clel"] = "spectral"
    bare = name in ("jem", "shortrun", "vera")  # published without normalisation, so they stay without
    assert (c.norm, c.initialisation) == ("none" if bare else own.get(family, "none"), "default")
    assert c.dropout == (preset.dropout if family in ("wrn", "igebm") else 0)
    # Only the network's own fields change.
    assert {k for k, v in c.model_dump().items() if v != preset.model_dump()[k]} <= {
        "network",
        "norm",
        "initialisation",
        "dropout",
    }
    asked = build_trial(values | {"norm": "none"})
    assert asked.norm == "none", "what the user says stands"


def test_unknown_methods_are_named() -> None:
    for wrong in ("ebm", "JEM", None, 4):
        with pytest.raises(ValidationError) as error:
            build_trial({"method": wrong})
        assert error.value.errors()[0]["loc"] == ("method",)


def test_presets_are_not_shared_with_the_caller() -> None:
    """Building with own values does not change what the next one gets."""
    before = {name: build_trial({"method": name}).to_json() for name in METHODS}
    for name in METHODS:
        build_trial({"method": name, "divergence": {"gap_limit": 7.5}, "evaluation": {"every": 3}, "epochs": 2})
    assert {name: build_trial({"method": name}).to_json() for name in METHODS} == before


def test_every_method_names_its_source_and_rows() -> None:
    for name in METHODS:
        method = method_class(name)
        assert method.title and method.objective and method.source and method.rows
        assert bool(method.formula) == bool(method.sampling) == (name != "softmax")
        assert all(line and "\n" not in line for line in method.deviations)
        unknown = (set(method.preset) | set(method.small)) - set(TrialConfig.model_fields)
        assert not unknown


def test_deviations_that_every_method_has() -> None:
    """review.md A2-A4: what moves a best epoch or ends a run is in the list of the method it applies to."""
    for name in METHODS:
        method = method_class(name)
        text = " | ".join(method.deviations)
        assert ("ends runs that the released code would continue" in text) == (name != "softmax"), name
        family = name in ("m-ebm", "m-jem", "lse-jem")
        for words, has in (
            ("moves the best epoch", family or name in ("softmax", "jem", "jem++", "sada-jem")),
            ("a decay epoch inside the warm-up", family or name in ("softmax", "jem", "jem++", "sada-jem")),
            ("channels-last memory", family or name in ("softmax", "jem++", "sada-jem")),
            ("CIFAR-100: the learning rate of 0.02 is the paper's", family or name == "softmax"),
            ("scripts and readme of the release disagree", family),
            ("650 of a WRN-10-1", name == "jem"),
        ):
            assert (words in text) == has, (name, words)


def test_a_default_says_where_it_is_from() -> None:
    """review.md A1: the defaults are no single command of the release."""
    fields = TrialConfig.model_fields
    assert (fields["sampling_steps"].default, fields["l2_weight"].default, fields["noise_std"].default) == (
        5,
        0.5,
        0.001,
    )
    for name, words in (
        ("sampling_steps", "M-EBM's script has 2"),
        ("noise_std", "At K=2 the script has 0, and so have the readme's commands at K=5"),
        ("l2_weight", "At K=2 the script has 0.1"),
        ("learning_rate", "0.02 for CIFAR-100, CelebA-HQ and ImageNet-32 is the paper's"),
    ):
        assert words in (fields[name].description or ""), name
    script = build_trial({"method": "m-ebm", "dataset": "cifar10", "sampling_steps": 2})
    assert (script.l2_weight, script.noise_std) == (0.1, 0.0)
