"""Configurations, their presets and what they refuse."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from trainables.config.trial import TrialConfig
from trainables.methods.f_ebm import FEbm
from trainables.methods.presets import build_trial, merge
from trainables.methods.vera import Vera
from trainables.results.schema import SETTING_NAMES, UNWRITTEN, with_unwritten


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"sampling_step": 5}, "sampling_step"),
        ({"divergence": {"gap": 2}}, "gap"),
        ({"evaluation": {"often": 2}}, "often"),
    ],
)
def test_unknown_keys(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as error:
        build_trial(values)
    assert error.value.errors()[0]["type"] == "extra_forbidden"
    assert error.value.errors()[0]["loc"][-1] == key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "mebm"),
        ("method", 3),
        ("dataset", ""),
        ("batch_size", 1),
        ("network", "wrn-27-10"),
        ("network", "wrn-4-1"),
        ("network", "wrn-10-0"),
        ("network", "conv-0"),
        ("network", "resnet-50"),
        ("network", "igebm-0"),
        ("network", "multiscale"),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("inner_steps", 0),
        ("noise_placement", "both"),
        ("buffer", "fifo"),
        ("buffer_augment", "crop_flip"),
        ("pixel_range", "byte"),
        ("batch_order", "sorted"),
        ("energy_augment", "contrastive"),
        ("input_noise", -0.01),
        ("label_noise", float("inf")),
        ("validation_images", -1),
        ("image_size", 3),
        ("train_images", 1),
        ("bad_images", "ignore"),
        ("sampler_norm_mode", "test"),
        ("initial_rank", 0),
        ("class_weight", 0),
        ("kl_weight", -1),
        ("entropy_weight", float("nan")),
        ("gradient_penalty", -0.1),
        ("optimiser", "rmsprop"),
        ("betas", [0.9, 1.0]),
        ("betas", [-0.1, 0.9]),
        ("betas", [0.9]),
        ("clip_norm", 0),
        ("clip_sigma", -3),
        ("ema_decay", 1.0),
        ("ema_decay", 0.0),
        ("norm", "layer"),
        ("norm_momentum", 1.5),
        ("initial", "gauss"),
        ("sampling_steps", 0),
        ("sampling_steps", 2.5),
        ("sampling_steps", None),
        ("step_size", 0),
        ("step_size", -1),
        ("step_size", float("inf")),
        ("step_size", float("nan")),
        ("noise_std", -0.1),
        ("noise_std", float("nan")),
        ("gradient_clamp", 0),
        ("buffer_size", 0),
        ("reinit_probability", 1.01),
        ("reinit_probability", -0.01),
        ("reinit_probability", float("nan")),
        ("l2_weight", -0.1),
        ("l2_form", "mean"),
        ("learning_rate", 0),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("warmup_iterations", -1),
        ("decay_epochs", [120, 60]),
        ("decay_epochs", [60, 60]),
        ("decay_epochs", [0]),
        ("epochs", 0),
        ("iterations_per_epoch", 0),
        ("precision", "fp16"),
        ("device", "tpu"),
        ("seed", -1),
        ("seed", 2**63),
        ("signal_every", 0),
    ],
)
@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_impossible_values(key: str, value: Any, dataset: str) -> None:
    with pytest.raises(ValidationError) as error:
        build_trial({"dataset": dataset} | {key: value})
    assert {e["loc"][0] for e in error.value.errors()} == {key}


@pytest.mark.parametrize("key", ["gap_limit", "hard_gap_limit", "loss_limit", "l2_fraction", "collapse_ratio"])
def test_impossible_thresholds(key: str) -> None:
    for value in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValidationError):
            build_trial({"divergence": {key: value}})


def test_buffer_smaller_than_a_batch() -> None:
    with pytest.raises(ValidationError, match=r"buffer_size \(50\) must be at least batch_size \(64\)"):
        build_trial({"buffer_size": 50})
    assert build_trial({"buffer_size": 64}).buffer_size == 64


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "cifar100"])
def test_lse_jem_refuses_the_l2_term(dataset: str) -> None:
    with pytest.raises(ValidationError, match="l2_weight must be 0 for lse-jem"):
        build_trial({"method": "lse-jem", "dataset": dataset, "l2_weight": 0.1})
    for steps in (1, 2, 5, 10):
        assert build_trial({"method": "lse-jem", "dataset": dataset, "sampling_steps": steps}).l2_weight == 0


SCRIPTS = [(1, 0.1, 0.0), (2, 0.1, 0.0), (5, 0.5, 0.001), (10, 0.5, 0.001), (20, 0.5, 0.001)]


@pytest.mark.parametrize(("steps", "l2", "noise"), SCRIPTS)
@pytest.mark.parametrize("method", ["m-ebm", "m-jem"])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_presets_follow_the_released_scripts(dataset: str, method: str, steps: int, l2: float, noise: float) -> None:
    c = build_trial({"method": method, "dataset": dataset, "sampling_steps": steps})
    assert (c.l2_weight, c.noise_std, c.l2_form) == (l2, noise, "released")
    own = build_trial(
        {"method": method, "dataset": dataset, "sampling_steps": steps, "l2_weight": 0.3, "noise_std": 0.02}
    )
    assert (own.l2_weight, own.noise_std) == (0.3, 0.02), "what the user says stands"


@pytest.mark.parametrize("steps", [2.0, "2", np.int64(2)], ids=["float", "text", "numpy"])
def test_presets_by_k_see_every_spelling_of_k(steps: Any) -> None:
    """pydantic takes 2.0, "2" and numpy's 2 for K = 2, so the preset must not be K >= 5's."""
    try:
        c = build_trial({"dataset": "cifar10", "sampling_steps": steps})
    except ValidationError:
        return  # refusing it is as good
    assert c.sampling_steps == 2
    assert (c.l2_weight, c.noise_std) == (0.1, 0.0)


def test_released_cifar10_script() -> None:
    c = build_trial({"method": "m-ebm", "dataset": "cifar10", "sampling_steps": 5})
    wanted = {
        "batch_size": 64,
        "label_batch_size": 128,
        "network": "wrn-28-10",
        "norm": "batch",
        "norm_momentum": 0.9,
        "sampler_norm_mode": "train",
        "initialisation": "default",
        "initial": "gaussian",
        "covariance_jitter": 1e-4,
        "step_size": 1.0,
        "gradient_clamp": 1.0,
        "sample_clamp": True,
        "buffer_size": 10_000,
        "reinit_probability": 0.05,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "warmup_iterations": 1000,
        "decay_epochs": (60, 120, 180),
        "decay_factor": 0.2,
        "epochs": 200,
        "input_noise": 0.0,
        "augment": "crop_flip",
        "iterations_per_epoch": None,
        "precision": "fp32",
    }
    assert {k: getattr(c, k) for k in wanted} == wanted
    assert c.divergence.loss_limit == 1e5
    assert build_trial({"dataset": "cifar100"}).learning_rate == 0.02


def test_digits_are_the_small_studys_base_setting() -> None:
    c = build_trial({"dataset": "digits", "sampling_steps": 2})
    wanted = {
        "network": "conv-16",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "batch_size": 64,
        "step_size": 1.0,
        "noise_std": 0.001,
        "gradient_clamp": 1.0,
        "buffer_size": 2000,
        "reinit_probability": 0.05,
        "l2_weight": 0.0,
        "l2_form": "paper",
        "warmup_iterations": 0,
    }
    assert {k: getattr(c, k) for k in wanted} == wanted
    assert c.epochs * (c.iterations_per_epoch or 0) == 1000
    assert build_trial({"evaluation": {"fresh_steps": 3}}).evaluation.every == 1, "nested defaults are merged"


def test_detector_of_the_note() -> None:
    d = TrialConfig().divergence
    assert (d.gap_limit, d.gap_patience, d.l2_fraction, d.hard_gap_limit) == (2.0, 3, 0.5, 20.0)
    for l2, limit in ((0.0, 2.0), (0.1, 2.0), (0.25, 2.0), (0.5, 1.0), (2.0, 0.25)):
        assert d.limits.limit_for(l2) == pytest.approx(limit)


def test_json_is_stable_and_complete() -> None:
    c = build_trial({"method": "m-jem", "dataset": "cifar10", "sampling_steps": 10, "seed": 7})
    text = c.to_json()
    assert TrialConfig.model_validate_json(text) == c
    assert TrialConfig.model_validate_json(text).to_json() == text
    assert list(json.loads(text)) == sorted(json.loads(text))
    again = build_trial({"seed": 7, "sampling_steps": 10, "dataset": "cifar10", "method": "m-jem"})
    assert again.to_json() == text
    other = c.model_copy(update={"seed": 8})
    assert other.to_json() != text
    assert other.to_json(with_seed=False) == c.to_json(with_seed=False)
    assert "seed" not in json.loads(c.to_json(with_seed=False))
    changed = build_trial({"method": "m-jem", "dataset": "cifar10", "sampling_steps": 10, "step_size": 0.5})
    assert changed.to_json(with_seed=False) != c.to_json(with_seed=False)


def test_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        TrialConfig().step_size = 2.0  # type: ignore[misc]


def test_setting_columns() -> None:
    c = build_trial({"iterations_per_epoch": None})
    assert tuple(c.setting(11)) == SETTING_NAMES
    assert c.setting(11)["iterations_per_epoch"] == 11
    assert c.setting()["iterations_per_epoch"] is None


def test_merge_leaves_its_arguments_alone() -> None:
    base, over = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}}
    assert merge(base, over) == {"a": {"b": 9, "c": 2}, "d": 3}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3} and over == {"a": {"b": 9}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "igebm", "norm": "batch"}, "norm must be spectral or none with network igebm-FILTERS"),
        ({"network": "shortrun-16", "norm": "batch"}, "norm must be none with network shortrun-FILTERS"),
        ({"network": "multiscale-8", "norm": "spectral"}, "norm must be instance or none"),
        ({"network": "conv-8", "dropout": 0.1}, "dropout must be 0 unless network is igebm-FILTERS or wrn-DEPTH-WIDTH"),
        ({"network": "igebm-8", "initialisation": "xavier"}, "initialisation must be default"),
        ({"inner_steps": 2, "network": "shortrun-8"}, "inner_steps > 1 needs a wrn- or conv-network"),
        ({"clip_sigma": 3}, "clip_sigma uses Adam's second moment"),
        ({"evaluation": {"weights": "ema"}}, "ema_decay is null"),
        ({"method": "igebm", "energy_augment": "crop_flip"}, "energy_augment and dequantise exclude each other"),
        (
            {"method": "m-ebm", "shared_batch": True},
            "shared_batch needs a method whose energy comes from its class logits",
        ),
        (
            {"method": "m-jem", "shared_batch": True},
            "shared_batch needs a method whose energy comes from its class logits",
        ),
        ({"method": "f-ebm", "kl_weight": 1}, "kl_weight must be 0 for f-ebm"),
        ({"method": "vera", "entropy_weight": 0.1}, "entropy_weight must be 0 for vera"),
        ({"method": "softmax", "kl_weight": 0.1}, "kl_weight must be 0 for softmax"),
        ({"method": "kl-ebm", "buffer": "none"}, "entropy_weight needs a replay buffer"),
        ({"method": "jem++", "kl_weight": 1.0}, "kl_weight and entropy_weight need inner_steps 1"),
        ({"method": "kl-ebm", "buffer_size": 100}, r"buffer_size \(100\) must be at least batch_size \(128\)"),
    ],
    ids=lambda value: value.split(" ")[0] if isinstance(value, str) else None,
)
@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_fields_that_exclude_each_other(values: dict[str, Any], message: str, dataset: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build_trial({"dataset": dataset} | values)


@pytest.mark.parametrize(
    "values",
    [
        {"method": "jem", "shared_batch": True},
        {"method": "kl-ebm", "buffer": "none", "entropy_weight": 0, "buffer_augment": "none"},
        {"method": "m-ebm", "kl_weight": 1.0, "entropy_weight": 0.3},
        {"optimiser": "adam", "clip_sigma": 3},
        {"ema_decay": 0.99, "evaluation": {"weights": "ema"}},
        {"method": "vera", "network": "wrn-10-1", "dropout": 0.4},
        {"method": "m-ebm", "inner_steps": 5, "network": "wrn-10-1"},
        {"method": "igebm", "energy_augment": "crop_flip", "dequantise": False},
    ],
    ids=str,
)
def test_fields_that_go_together(values: dict[str, Any]) -> None:
    c = build_trial(values)
    assert all(getattr(c, key) == value for key, value in values.items() if key != "evaluation")


@pytest.mark.parametrize(
    "values",
    [
        {"method": "f-ebm", "method_args": {"divergence": "js"}},
        {"method": "f-ebm", "method_args": {"start_iteration": -1}},
        {"method": "f-ebm", "method_args": {"steps": 1}},
        {"method": "vera", "method_args": {"noise_dim": 0}},
        {"method": "vera", "method_args": {"learning_rate": 0}},
        {"method": "vera", "method_args": {"entropy_weight": -1e-4}},
        {"method": "vera", "method_args": {"importance_samples": 0}},
        {"method": "vera", "method_args": {"noise_std_range": [0.0, 0.3]}},
        {"method": "vera", "method_args": {"noise_std_range": [0.1]}},
        {"evaluation": {"protocols": ["fid"]}},
        {"evaluation": {"fresh_steps": 0}},
        {"evaluation": {"weights": "best"}},
    ],
    ids=str,
)
def test_impossible_values_of_a_part(values: dict[str, Any]) -> None:
    for method in ("m-ebm", "f-ebm", "vera"):
        with pytest.raises(ValidationError) as error:
            build_trial({"method": method} | values)
        assert {e["loc"][0] for e in error.value.errors()} == set(values) - {"method"}


def test_a_part_given_in_part_keeps_the_rest() -> None:
    c = build_trial({"method": "f-ebm", "critic": {"divergence": "pearson"}})
    assert c.method_args == FEbm(divergence="pearson", start_iteration=11)
    assert c.setting()["f_divergence"] == "pearson"
    g = build_trial({"method": "vera", "dataset": "cifar10", "generator": {"noise_dim": 5}}).method_args
    assert isinstance(g, Vera)
    assert (g.noise_dim, g.features, g.learning_rate) == (5, 256, 6e-5)
    small = build_trial({"method": "vera", "dataset": "digits", "generator": {"noise_dim": 5}}).method_args
    assert isinstance(small, Vera)
    assert small.noise_dim == 5 and small.features < 256


CHAINS = {"initial", "sampling_steps", "step_size", "noise_std", "buffer"}
BUFFER = {"buffer_size", "reinit_probability"}
LOSS = {"l2_weight", "l2_form"}


@pytest.mark.parametrize(
    ("method", "without"),
    [
        ("m-ebm", {"class_weight", "f_divergence"}),
        ("m-jem", {"f_divergence"}),
        ("softmax", CHAINS | BUFFER | LOSS | {"gradient_clamp", "f_divergence"}),
        ("jem", {"gradient_clamp", "f_divergence"}),
        ("igebm", {"class_weight", "f_divergence"}),
        ("shortrun", BUFFER | {"class_weight", "gradient_clamp", "f_divergence"}),
        ("kl-ebm", {"class_weight", "gradient_clamp", "f_divergence"}),
        ("f-ebm", {"class_weight"}),
        ("vera", CHAINS | BUFFER | {"gradient_clamp", "f_divergence"}),
    ],
)
def test_setting_columns_of_what_a_method_lacks_are_null(method: str, without: set[str]) -> None:
    values = build_trial({"method": method}).setting(11)
    assert {name for name, value in values.items() if value is None} == without


def test_columns_of_a_critic() -> None:
    for name in ("jensen-shannon", "squared-hellinger", "reverse-kl", "kl", "pearson"):
        c = build_trial({"method": "f-ebm", "critic": {"divergence": name}})
        assert c.setting()["f_divergence"] == name
    assert build_trial({"method": "igebm"}).setting()["f_divergence"] is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "igebm", "buffer_size": 64, "batch_size": 64}, "of a ring must be more than batch_size"),
        ({"method": "m-ebm", "buffer_augment": "contrastive"}, "buffer_augment needs a buffer of 8-bit images"),
        ({"method": "shortrun", "buffer_augment": "contrastive"}, "ring or reservoir"),
        ({"method": "f-ebm", "network": "multiscale-8"}, "one energy per image"),
        ({"method": "vera", "batch_size": 64}, r"label_batch_size \(40\) must be batch_size \(64\)"),
        ({"method": "vera", "generator": {"noise_std_range": [0.3, 0.1]}}, "a lower and an upper bound"),
    ],
)
def test_what_would_be_ignored_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build_trial(values)


def test_a_size_without_a_buffer_does_not_matter() -> None:
    assert build_trial({"method": "shortrun", "buffer_size": 10}).setting()["buffer_size"] is None


def test_what_a_configuration_leaves_out_is_at_the_value_that_readers_take():
    plain = build_trial({"method": "m-ebm"})
    config = json.loads(plain.to_json())
    assert not UNWRITTEN.keys() & config.keys()
    assert {name: getattr(plain, name) for name in UNWRITTEN} == dict(UNWRITTEN)
    assert with_unwritten(config) == config | dict(UNWRITTEN)
    sharp = json.loads(build_trial({"method": "m-ebm", "sam_rho": 0.5}).to_json())
    assert with_unwritten(sharp)["sam_rho"] == 0.5
    script = {"kind": "script", "args": {}}
    assert with_unwritten(script) == script
