"""The numbers of the paper's figures against literal restatements of the released scripts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData, to_float
from trainables.data.subset import subset
from trainables.models.model_file import SavedModel, build_model
from trainables.models.views import (
    PANELS,
    SETS,
    Scores,
    choose_log_p,
    class_panels,
    data_images,
    embed,
    extremes,
    first_per_class,
    initial_draws,
    load_data,
    load_initial,
    score_images,
    set_features,
)
from trainables.sampling.gaussians import Gaussian
from trainables.sampling.initial import Initial

Quick = Callable[..., TrialConfig]


@pytest.fixture
def make(quick: Quick, digits: ImageData) -> Callable[..., SavedModel]:
    """A model with weights that tell images apart and running statistics that differ from a batch's."""

    def build(**fields: Any) -> SavedModel:
        config = quick(**fields)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = build_model(config, (1, 8, 8), 10)
            for parameter in model.parameters():
                parameter.data.add_(torch.randn(parameter.shape) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.fill_(0.3)
        samples = digits.images[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
        return SavedModel(config, model.eval().requires_grad_(False), samples, digits.source, 10, 1, 8)

    return build


def test_scores_are_those_of_the_released_script(make: Callable[..., SavedModel]) -> None:
    saved = make(method="m-jem", norm="batch")
    scores = score_images(saved, saved.samples, "logsumexp")
    with torch.no_grad():
        logits = saved.model.logits(to_float(saved.samples))  # in eval mode the batches do not matter
    torch.testing.assert_close(torch.from_numpy(scores.log_p), logits.double().exp().sum(1).log(), atol=1e-4, rtol=1e-4)
    assert scores.predicted is not None and scores.confidence is not None
    assert scores.predicted.tolist() == logits.argmax(1).tolist()
    probabilities = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    np.testing.assert_allclose(scores.confidence, probabilities.max(1).values.numpy(), rtol=1e-4)


def test_log_p_by_the_energy_head_is_another_number(make: Callable[..., SavedModel]) -> None:
    saved = make(method="m-jem")
    by_head = score_images(saved, saved.samples, "energy").log_p
    with torch.no_grad():
        np.testing.assert_allclose(by_head, -saved.model.energy(to_float(saved.samples)).numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(by_head - score_images(saved, saved.samples, "logsumexp").log_p).max() > 0.1
    lse = make(method="lse-jem")  # there the two are one
    np.testing.assert_allclose(
        score_images(lse, lse.samples, "energy").log_p, score_images(lse, lse.samples, "logsumexp").log_p, atol=1e-4
    )


def test_a_model_without_a_trained_class_head_has_no_classes(make: Callable[..., SavedModel]) -> None:
    saved = make(method="m-ebm")
    scores = score_images(saved, saved.samples, "energy")
    assert scores.predicted is None and scores.confidence is None
    panels = class_panels(scores, 10)
    assert list(panels) == ["samples", "highest_px", "lowest_px"]
    assert {p.shape for p in panels.values()} == {(1, 100)}
    assert panels["samples"][0].tolist() == list(range(100))


def test_images_reach_the_network_in_its_own_range(make: Callable[..., SavedModel]) -> None:
    saved = make(method="m-ebm", pixel_range="unit")
    with torch.no_grad():
        expected = -saved.model.energy(saved.samples.float() / 255)
    np.testing.assert_allclose(
        score_images(saved, saved.samples, "energy").log_p, expected.numpy(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("method", "default", "refused"),
    [("m-ebm", "energy", "logsumexp"), ("m-jem", "logsumexp", None), ("softmax", "logsumexp", "energy")],
)
def test_what_stands_for_log_p(quick: Quick, method: str, default: str, refused: Any) -> None:
    config = quick(method=method)
    assert choose_log_p(config) == default
    if refused:
        with pytest.raises(ValueError, match=f"log p\\(x\\) from .* needs a trained .*, which {method} does not have"):
            choose_log_p(config, refused)
    else:
        assert choose_log_p(config, "energy") == "energy"


def test_extremes_are_sorted_from_the_extreme_inwards_within_each_class() -> None:
    predicted = np.array([0, 2, 0, 2, 0, 0])
    values = np.array([3.0, 9.0, 5.0, -1.0, 3.0, 4.0])
    highest, lowest = extremes(values, predicted, 3, 3)
    assert highest.tolist() == [[2, 5, 0], [-1, -1, -1], [1, 3, -1]]
    assert lowest.tolist() == [[0, 4, 5], [-1, -1, -1], [3, 1, -1]]
    assert first_per_class(predicted, 3, 2).tolist() == [[0, 2], [-1, -1], [1, 3]]


def test_panels_by_p_x_and_by_confidence_are_not_confused() -> None:
    scores = Scores(np.array([1.0, 2.0, 3.0]), np.zeros(3, dtype=np.int64), np.array([0.9, 0.5, 0.7]))
    panels = class_panels(scores, 1, 2)
    assert tuple(panels) == PANELS
    assert {k: v[0].tolist() for k, v in panels.items()} == {
        "samples": [0, 1],
        "highest_px": [2, 1],
        "lowest_px": [0, 1],
        "highest_pyx": [0, 2],
        "lowest_pyx": [1, 2],
    }


def test_features_are_taken_with_the_statistics_of_batches_of_one_hundred(
    make: Callable[..., SavedModel], digits: ImageData
) -> None:
    saved = make(method="m-ebm", norm="batch")
    before = copy.deepcopy(saved.model.state_dict())
    images = digits.images[:150]
    found = set_features(saved, {"x+": images, "x-": saved.samples[:100]})
    reference = copy.deepcopy(saved.model).train()
    with torch.no_grad():
        parts = [reference.pooled(to_float(p)) for p in (images[:100], images[100:])]
        energies = [reference.energy(to_float(p)) for p in (images[:100], images[100:])]
    np.testing.assert_allclose(found["x+"].pooled, torch.cat(parts).numpy(), rtol=1e-5, atol=1e-6)
    assert found["x+"].energy is not None
    np.testing.assert_allclose(found["x+"].energy, torch.cat(energies).numpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(found["x+"].pooled - saved.model.pooled(to_float(images)).numpy()).max() > 0.01, "that is eval mode"
    assert not saved.model.training
    for name, value in saved.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_set_keeps_its_name(make: Callable[..., SavedModel]) -> None:
    """The released script swaps the labels of x- and x0 (eval_maebm.py:532-543)."""
    saved = make(method="m-ebm")
    level = {"x+": 0, "x-": 110, "x0": 255}
    sets = {name: torch.full((100, 1, 8, 8), value, dtype=torch.uint8) for name, value in level.items()}
    with torch.no_grad():
        expected = {name: saved.model.pooled(to_float(images))[0].numpy() for name, images in sets.items()}
    for order in (SETS, SETS[::-1], ("x0", "x+", "x-")):
        found = set_features(saved, {name: sets[name] for name in order})
        for name in SETS:
            np.testing.assert_allclose(found[name].pooled[7], expected[name], rtol=1e-4, atol=1e-5)
    floats = set_features(saved, {"x0": torch.full((100, 1, 8, 8), 1.0)})  # draws of p0 come as floats in [-1, 1]
    np.testing.assert_allclose(floats["x0"].pooled, found["x0"].pooled, rtol=1e-5)


def test_dropout_of_the_train_mode_is_the_same_every_time(make: Callable[..., SavedModel]) -> None:
    saved = make(method="igebm", dropout=0.5)
    first, second = (set_features(saved, {"x-": saved.samples[:100]})["x-"].pooled for _ in range(2))
    assert np.array_equal(first, second)


def test_an_embedding_gives_every_set_its_own_points() -> None:
    rng = np.random.default_rng(0)
    data, near, far = (rng.normal(c, 0.05, (n, 8)) for c, n in ((0.0, 40), (0.1, 30), (9.0, 35)))
    places = embed([data, near, far])
    assert [p.shape for p in places] == [(40, 2), (30, 2), (35, 2)]
    middle = [p.mean(axis=0) for p in places]
    assert np.linalg.norm(middle[0] - middle[1]) < 0.5 * np.linalg.norm(middle[0] - middle[2])
    spread = max(np.linalg.norm(p - m, axis=1).mean() for p, m in zip(places, middle, strict=True))
    assert spread < np.linalg.norm(middle[1] - middle[2])
    again = embed([data, near, far])
    assert all(np.array_equal(a, b) for a, b in zip(places, again, strict=True))
    assert [len(p) for p in embed([data[:3], far[:2]])] == [3, 2]  # perplexity gives way to few images
    with pytest.raises(ValueError, match="at least 4 images, but there are 3"):
        embed([data[:2], far[:1]])


def test_the_training_images_shown_are_fixed(digits: ImageData) -> None:
    images, index = data_images(digits.images, 50)
    assert torch.equal(images, digits.images[torch.from_numpy(index)])
    assert len(set(index.tolist())) == 50
    assert index.tolist() == data_images(digits.images, 60)[1][:50].tolist()
    assert (
        index.tolist()
        == torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(1234))[:50].tolist()
    )


def test_data_and_p0_are_those_of_training(make: Callable[..., SavedModel], digits: ImageData) -> None:
    saved = make(method="m-ebm", validation_images=100)
    object.__setattr__(saved, "data_source", subset(digits, saved.config).source)
    data = load_data(saved)
    assert len(data.images) == len(digits.images) - 100
    initial = load_initial(saved, data)
    assert initial is not None
    draws = initial_draws(initial, 400)
    assert torch.equal(draws[:1], initial_draws(initial, 400)[:1])
    assert (draws.mean(0) - to_float(data.images).mean(0)).abs().mean() < 0.1
    object.__setattr__(saved, "data_source", "sklearn:digits#0123")
    with pytest.raises(ValueError, match="was trained on sklearn:digits#0123, but the images here are"):
        load_data(saved)
    assert load_initial(make(method="softmax"), digits) is None


@pytest.mark.parametrize("initial", ["gaussian", "uniform", "gaussian-low-rank", "class-gaussian"])
def test_centres_are_the_means_of_p0(make: Callable[..., SavedModel], digits: ImageData, initial: str) -> None:
    p0 = load_initial(make(method="m-ebm", initial=initial), digits)
    assert p0 is not None
    centres = p0.centres()
    images = to_float(digits.images)
    expected = {
        "uniform": torch.zeros(1, 1, 8, 8),
        "class-gaussian": torch.stack([images[digits.labels == label].mean(0) for label in range(10)]),
    }.get(initial, images.mean(0, keepdim=True))
    torch.testing.assert_close(centres, expected, atol=1e-5, rtol=1e-5)


def test_a_centre_of_down_sampled_images_is_enlarged(
    make: Callable[..., SavedModel], make_data: Callable[..., ImageData]
) -> None:
    data = make_data(count=40, shape=(3, 64, 64))
    p0 = load_initial(make(method="m-ebm"), data)
    assert isinstance(p0, Gaussian)
    (centre,) = p0.centres()
    coarse = torch.nn.functional.avg_pool2d(to_float(data.images).mean(0), p0.grain)
    assert p0.grain > 1
    assert centre.shape == (3, 64, 64)
    torch.testing.assert_close(centre[:, p0.grain - 1 :: p0.grain, :: p0.grain], coarse, atol=1e-4, rtol=1e-4)
    assert torch.equal(centre[:, 0 :: p0.grain], centre[:, p0.grain - 1 :: p0.grain])
    with pytest.raises(ValueError, match="no centre is known of a Initial p0"):
        Initial().centres()
