"""The numbers of hybrid models against literal computations, on small models trained on digits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.evaluation.scores import accuracy
from trainables.models.calibration import (
    BATCH,
    BINS,
    NormMode,
    adapt_images,
    auroc,
    expected_calibration_error,
    model_outputs,
    score_hybrid,
)
from trainables.models.model_file import SavedModel, load_model, model_state
from trainables.training.trainer import Trainer

Quick = Callable[..., TrialConfig]


def ood_scores(
    saved: SavedModel, images: Tensor, batch_size: int = BATCH, norm_mode: NormMode = "eval"
) -> dict[str, Tensor]:
    """log p of images and, of a model with a trained class head, their confidence."""
    log_p, probabilities = model_outputs(saved, images, batch_size, norm_mode)
    return {"log_p": log_p} | ({} if probabilities is None else {"confidence": probabilities.max(1).values})


Make = Callable[..., SavedModel]


@pytest.fixture(scope="module")
def make(quick: Quick, digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A model trained for some iterations on digits, as it comes back from its file: `make(iterations, **fields)`."""
    made: dict[str, Path] = {}

    def build(iterations: int = 30, **fields: Any) -> SavedModel:
        key = repr((iterations, sorted(fields.items())))
        if key not in made:
            values = {"epochs": 1, "iterations_per_epoch": iterations, "buffer_size": 300} | fields
            trainer = Trainer(quick(**values), digits)
            trainer.train_epoch()
            made[key] = tmp_path_factory.mktemp("models") / "m.pt"
            torch.save(model_state(trainer), made[key])
        return load_model(made[key])  # each caller has its own network

    return build


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randint(0, 256, (150, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# --- expected calibration error ---------------------------------------------------------------------------------------


def _ece(confidences: list[float], right: list[bool], bins: int) -> float:
    """Guo et al. equation 3, bin by bin, with bins ((b - 1) / B, b / B]."""
    total = 0.0
    counted = 0
    for b in range(1, bins + 1):
        members = [
            i for i, c in enumerate(confidences) if (b - 1) / bins < c <= b / bins or (b == 1 and c == 0)
        ]  # fmt: skip
        counted += len(members)
        if members:
            share_right = sum(right[i] for i in members) / len(members)
            mean = sum(confidences[i] for i in members) / len(members)
            total += len(members) / len(confidences) * abs(share_right - mean)
    assert counted == len(confidences)
    return total


def _two_class(
    confidences: list[float], right: list[bool], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Probabilities of class 0 first, the larger one; label 0 where it is right."""
    first = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([first, 1 - first], 1).to(dtype), torch.tensor([0 if r else 1 for r in right])


def test_ece_of_cases_one_can_do_by_hand() -> None:
    # 0.55 ends its bin, 0.56 begins the next: 1/2 |1 - 0.55| + 1/2 |0 - 0.56|.
    assert expected_calibration_error(*_two_class([0.55, 0.56], [True, False])) == pytest.approx(0.505, abs=1e-12)
    # In one bin they share it: |1/2 - 0.555|.
    assert expected_calibration_error(*_two_class([0.55, 0.56], [True, False]), bins=1) == pytest.approx(0.055)
    # In the last bin, with 1 itself: |1/2 - 0.98|.
    assert expected_calibration_error(*_two_class([1.0, 0.96], [True, False])) == pytest.approx(0.48, abs=1e-12)
    assert expected_calibration_error(*_two_class([1.0] * 3, [True] * 3)) == 0
    assert expected_calibration_error(*_two_class([1.0] * 3, [False] * 3)) == 1
    assert expected_calibration_error(*_two_class([0.75] * 4, [True, True, True, False])) == 0


@pytest.mark.parametrize("bins", [1, 2, 7, 10, 15, 20, 64])
def test_ece_with_confidences_on_and_beside_every_edge(bins: int) -> None:
    edges = [b / bins for b in range(bins + 1) if b / bins > 0.5]
    confidences = edges + [math.nextafter(e, 0) for e in edges] + [math.nextafter(e, 2) for e in edges if e < 1]
    # Right on the edge and below it, wrong above: an edge in the bin above it would change the number.
    right = [True] * (2 * len(edges)) + [False] * (len(edges) - 1)
    assert 1.0 in confidences
    got = expected_calibration_error(*_two_class(confidences, right), bins=bins)
    assert got == pytest.approx(_ece(confidences, right, bins), abs=1e-12)
    if bins >= 7:
        shifted = [math.nextafter(c, 2) if c in edges and c < 1 else c for c in confidences]
        assert abs(_ece(shifted, right, bins) - got) > 1e-3, "the case must tell the two conventions apart"


def test_an_edge_in_float32_is_an_edge() -> None:
    # The float32 nearest to 0.55 is above 0.55.
    assert torch.tensor(0.55).double() > 0.55
    p, labels = _two_class([0.55, 0.57], [True, False], torch.float32)
    assert expected_calibration_error(p, labels) == pytest.approx(0.5 * 0.45 + 0.5 * 0.57, abs=1e-6)
    beside = p.clone()
    beside[0, 0] = torch.nextafter(p[0, 0], torch.tensor(1.0))
    assert expected_calibration_error(beside, labels) == pytest.approx(0.06, abs=1e-6), "in one bin: |1/2 - 0.56|"


@pytest.mark.parametrize("bins", [5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ece_of_many_classes(bins: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(bins)
    p = (torch.randn(700, 10, generator=g, dtype=torch.float64) * 2).softmax(1).to(dtype)
    labels = torch.randint(0, 10, (700,), generator=g)
    labels[:300] = p[:300].argmax(1)
    confidences = [max(row) for row in p.tolist()]
    right = [row.index(max(row)) == y for row, y in zip(p.tolist(), labels.tolist(), strict=True)]
    wanted = _ece(confidences, right, bins)
    assert wanted > 0.02
    assert expected_calibration_error(p, labels, bins) == pytest.approx(wanted, abs=1e-6)
    order = torch.randperm(700, generator=g)
    assert expected_calibration_error(p[order], labels[order].to(torch.uint8), bins) == pytest.approx(wanted, abs=1e-6)


def test_what_is_no_classification_is_refused() -> None:
    p, labels = _two_class([0.6, 0.7, 0.8], [True, True, False])
    bad = p.clone()
    bad[1] = math.nan
    negative = p.clone()
    negative[0] = torch.tensor([1.5, -0.5])
    cases: list[tuple[str, Tensor, Tensor, int]] = [
        ("1 of 3 rows are not probabilities", bad, labels, 20),
        ("1 of 3 rows are not probabilities", negative, labels, 20),
        ("3 of 3 rows are not probabilities", p.log(), labels, 20),
        ("3 of 3 rows are not probabilities", p * 2, labels, 20),
        ("at least 1 bin, but got 0", p, labels, 0),
        (r"probabilities must be float .* are float64 \(3,\)", p[:, 0], labels, 20),
        (r"probabilities must be float .* are int64 \(3, 2\)", p.long(), labels, 20),
        (r"probabilities must be float .* are float64 \(0, 2\)", p[:0], labels[:0], 20),
        (r"labels must be whole numbers \(3,\), but are int64 \(2,\)", p, labels[:2], 20),
        (r"labels must be whole numbers \(3,\), but are float32 \(3,\)", p, labels.float(), 20),
        (r"labels must be whole numbers \(3,\), but are bool \(3,\)", p, labels.bool(), 20),
        (r"1 of 3 labels are outside 0\.\.1", p, torch.tensor([0, 1, 2]), 20),
        (r"2 of 3 labels are outside 0\.\.1", p, torch.tensor([-1, 1, 2]), 20),
    ]
    for message, probabilities, truth, bins in cases:
        with pytest.raises(ValueError, match=message) as found:
            expected_calibration_error(probabilities, truth, bins)
        assert "\n" not in str(found.value)


# --- AUROC ------------------------------------------------------------------------------------------------------------


def _pairs(inside: list[float], outside: list[float]) -> Fraction:
    total = Fraction(0)
    for a in inside:
        for b in outside:
            total += 1 if a > b else Fraction(1, 2) if a == b else 0
    return total / (len(inside) * len(outside))


@pytest.mark.parametrize(
    ("inside", "outside", "wanted"),
    [
        ([3.0, 2.0], [1.0, 0.0], 1.0),
        ([0.0, -1.0], [1.0, 5.0], 0.0),
        ([2.0], [2.0], 0.5),
        ([1.0, 2.0, 2.0], [2.0, 0.0], 4 / 6),  # pairs: 0 + 1, 1/2 + 1, 1/2 + 1
        ([-0.0], [0.0], 0.5),
        ([1.0], [0.0, 0.0, 2.0, 1.0], 2.5 / 4),
    ],
)
def test_auroc_of_cases_one_can_do_by_hand(inside: list[float], outside: list[float], wanted: float) -> None:
    assert auroc(torch.tensor(inside), torch.tensor(outside)) == wanted


@pytest.mark.parametrize("levels", [2, 7, 50, None])
@pytest.mark.parametrize(("n", "m"), [(40, 60), (1, 30), (83, 1)])
def test_auroc_is_the_share_of_pairs(levels: int | None, n: int, m: int) -> None:
    """Ties within and between the sets, few levels and none."""
    g = torch.Generator().manual_seed(n + (levels or 0))
    inside, outside = torch.randn(n, generator=g) + 0.4, torch.randn(m, generator=g)
    if levels is not None:
        inside, outside = ((x * levels / 4).round() for x in (inside, outside))
        assert len(set(inside.tolist() + outside.tolist())) < n + m, "no ties"
    got = auroc(inside, outside)
    assert got == float(_pairs(inside.tolist(), outside.tolist()))
    truth = np.r_[np.ones(n), np.zeros(m)]
    assert got == pytest.approx(roc_auc_score(truth, torch.cat([inside, outside]).numpy()), abs=1e-12)
    assert auroc(outside, inside) == pytest.approx(1 - got, abs=1e-15)
    assert auroc(inside.double() ** 3 * 5, outside.double() ** 3 * 5) == got, "only the order counts"


def test_auroc_counts_more_pairs_than_a_small_integer_holds() -> None:
    n = 70_000  # 4.9e9 pairs; float32 cannot count them either
    assert auroc(torch.zeros(n), torch.zeros(n)) == 0.5
    ramp = torch.arange(n, dtype=torch.float64)
    wanted = Fraction(n * (n - 1), 2 * n * n)
    assert auroc(ramp, ramp + 0.5) == float(wanted)
    assert auroc(ramp, ramp + 0.5) != 0.5


def test_auroc_compares_in_double_precision() -> None:
    close = torch.tensor([1 + 1e-12], dtype=torch.float64)
    assert close.float() == 1
    assert auroc(close, torch.ones(1)) == 1
    assert auroc(torch.ones(1), close) == 0


def test_scores_that_are_not_finite_are_counted() -> None:
    bad = torch.tensor([0.0, math.nan, math.inf, -math.inf, 1.0])
    with pytest.raises(ValueError, match=r"3 of 5 inside scores are not finite \(1 NaN, 2 infinite\)"):
        auroc(bad, torch.zeros(2))
    with pytest.raises(ValueError, match=r"1 of 2 outside scores are not finite \(1 NaN, 0 infinite\)"):
        auroc(torch.zeros(3), bad[:2])
    with pytest.raises(ValueError, match=r"inside scores must be \(N,\) with N > 0, but are float32 \(0,\)"):
        auroc(torch.zeros(0), torch.zeros(2))
    with pytest.raises(ValueError, match=r"outside scores must be \(N,\) with N > 0, but are float32 \(2, 1\)"):
        auroc(torch.zeros(2), torch.zeros(2, 1))


# --- images of other sets ---------------------------------------------------------------------------------------------


def _random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_images_that_fit_are_left_alone() -> None:
    images = _random_images(3, 3, 8, 6)
    got, text = adapt_images(images, (3, 8, 6))
    assert got is images and text == "unchanged"


def test_grey_becomes_rgb_by_repeating() -> None:
    images = _random_images(250, 1, 4, 5)  # more than are adapted at a time
    got, text = adapt_images(images, (3, 4, 5))
    assert text == "grey-to-rgb"
    assert got.shape == (250, 3, 4, 5) and got.dtype == torch.uint8
    assert all(torch.equal(got[:, c], images[:, 0]) for c in range(3))


def test_rgb_becomes_grey_by_luma() -> None:
    images = _random_images(250, 3, 4, 5)
    images[0, :, 0] = torch.tensor([[255, 0, 0, 255, 0], [0, 255, 0, 255, 0], [0, 0, 255, 255, 0]], dtype=torch.uint8)
    got, text = adapt_images(images, (1, 4, 5))
    assert text == "rgb-to-luma"
    assert got.shape == (250, 1, 4, 5) and got.dtype == torch.uint8
    assert got[0, 0, 0].tolist() == [76, 150, 29, 255, 0]
    r, g, b = images.numpy().astype(np.int64).transpose(1, 0, 2, 3)
    thousandths = 299 * r + 587 * g + 114 * b
    wanted = np.vectorize(lambda t: round(Fraction(int(t), 1000)))(thousandths)  # halves to even
    assert np.array_equal(got[:, 0].numpy(), wanted)
    pil = np.stack([np.asarray(Image.fromarray(i.permute(1, 2, 0).numpy()).convert("L")) for i in images[:20]])
    assert np.abs(pil.astype(int) - got[:20, 0].numpy().astype(int)).max() <= 1
    same = _random_images(5, 1, 4, 5).repeat(1, 3, 1, 1)
    assert torch.equal(adapt_images(same, (1, 4, 5))[0][:, 0], same[:, 0]), "grey in RGB is that grey"


def _triangle(size: int, wanted: int) -> np.ndarray:
    """Weights (wanted, size) of a bilinear filter that widens with the scale: a triangle, cut off at the border."""
    scale = size / wanted
    support = max(scale, 1.0)
    weights = np.zeros((wanted, size))
    for i in range(wanted):
        centre = (i + 0.5) * scale
        for j in range(size):
            weights[i, j] = max(0.0, 1 - abs(j + 0.5 - centre) / support)
        weights[i] /= weights[i].sum()
    return weights


@pytest.mark.parametrize(("size", "wanted"), [((8, 8), (4, 4)), ((9, 14), (4, 6)), ((5, 4), (8, 8)), ((12, 6), (8, 8))])
def test_another_size_is_a_bilinear_filter_with_antialiasing(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    images = _random_images(130, 3, *size)
    got, text = adapt_images(images, (3, *wanted))
    assert text == f"{size[0]}x{size[1]}-to-{wanted[0]}x{wanted[1]}"
    assert got.shape == (130, 3, *wanted) and got.dtype == torch.uint8
    exact = np.einsum(
        "ih,nchw,jw->ncij", _triangle(size[0], wanted[0]), images.double().numpy(), _triangle(size[1], wanted[1])
    )
    assert np.abs(got.numpy() - exact).max() <= 0.5 + 1e-3
    white = torch.full((1, 3, *size), 255, dtype=torch.uint8)
    assert (adapt_images(white, (3, *wanted))[0] == 255).all()


def test_channels_and_size_at_once_are_rounded_once() -> None:
    colour = _random_images(40, 3, 9, 9)
    got, text = adapt_images(colour, (1, 4, 4))
    assert text == "rgb-to-luma-9x9-to-4x4"
    filter_ = _triangle(9, 4)
    luma = np.einsum("c,nchw->nhw", [0.299, 0.587, 0.114], colour.double().numpy())
    exact = np.einsum("ih,nhw,jw->nij", filter_, luma, filter_)
    assert np.abs(got[:, 0].numpy() - exact).max() <= 0.5 + 1e-3
    grey, text = adapt_images(_random_images(40, 1, 9, 9), (3, 4, 4))
    assert text == "grey-to-rgb-9x9-to-4x4"
    assert grey.shape == (40, 3, 4, 4) and torch.equal(grey[:, 0], grey[:, 2])


def test_images_that_cannot_be_adapted_are_refused() -> None:
    cases: list[tuple[str, Tensor, tuple[int, int, int]]] = [
        ("images of 4 channels cannot be adapted to 3", _random_images(2, 4, 8, 8), (3, 8, 8)),
        ("images of 3 channels cannot be adapted to 2", _random_images(2, 3, 8, 8), (2, 8, 8)),
        (r"shape of \(1, 0, 8\)", _random_images(2, 1, 8, 8), (1, 0, 8)),
        (r"uint8 .* are float32 \(2, 1, 8, 8\)", torch.zeros(2, 1, 8, 8), (1, 8, 8)),
        (r"uint8 .* are uint8 \(1, 8, 8\)", _random_images(1, 8, 8), (1, 8, 8)),
        (r"at least one, but are uint8 \(0, 1, 8, 8\)", _random_images(0, 1, 8, 8), (1, 8, 8)),
    ]
    for message, images, shape in cases:
        with pytest.raises(ValueError, match=message):
            adapt_images(images, shape)


# --- scores of images -------------------------------------------------------------------------------------------------


def _network_input(images: Tensor, saved: SavedModel) -> Tensor:
    x = images.float() / 255
    return x if saved.config.pixel_range == "unit" else 2 * x - 1


@pytest.mark.parametrize("method", ["m-jem", "lse-jem", "jem", "softmax", "vera"])
def test_scores_of_a_model_with_a_class_head(make: Make, digits: ImageData, method: str) -> None:
    saved = make(8, method=method)
    images = digits.test_images[:130]
    scores = ood_scores(saved, images)
    with torch.no_grad():
        logits = saved.model.logits(_network_input(images, saved)).double().numpy()
    assert list(scores) == ["log_p", "confidence"]
    assert all(s.dtype == torch.float64 and s.shape == (130,) and s.device.type == "cpu" for s in scores.values())
    powers = np.exp(logits)
    np.testing.assert_allclose(scores["log_p"].numpy(), np.log(powers.sum(1)), atol=1e-4)
    np.testing.assert_allclose(scores["confidence"].numpy(), powers.max(1) / powers.sum(1), atol=1e-5)
    assert scores["log_p"].std() > 1e-4, "the images must differ for the model"


@pytest.mark.parametrize("method", ["m-ebm", "igebm", "kl-ebm", "shortrun"])
def test_scores_of_a_model_without_one(make: Make, digits: ImageData, method: str) -> None:
    fields = {"buffer_size": 1002} if method == "kl-ebm" else {}
    saved = make(3, method=method, **fields)
    images = digits.test_images[:130]
    scores = ood_scores(saved, images)
    assert list(scores) == ["log_p"]
    with torch.no_grad():
        energy = saved.model.energy(_network_input(images, saved)).double().numpy()
    np.testing.assert_allclose(scores["log_p"].numpy(), -energy, rtol=1e-4, atol=1e-5)
    assert scores["log_p"].std() > 0


def test_confident_images_do_not_tie(make: Make, digits: ImageData) -> None:
    saved = make(method="softmax")
    assert saved.model.class_head is not None
    saved.model.class_head.weight.mul_(30)
    confidence = ood_scores(saved, digits.test_images)["confidence"]
    with torch.no_grad():
        single = saved.model.logits(_network_input(digits.test_images, saved)).softmax(1).max(1).values
    assert len(single.unique()) < 0.9 * len(single), "the case must be one where float32 makes ties"
    assert len(confidence.unique()) > len(single.unique())


@pytest.mark.parametrize("method", ["m-jem", "m-ebm"])
def test_eval_mode_does_not_depend_on_the_batches(make: Make, digits: ImageData, noise: Tensor, method: str) -> None:
    saved = make(8, method=method, norm="batch")
    images = torch.cat([digits.test_images[:101], noise[:50]])
    whole = ood_scores(saved, images, 151)
    order = torch.randperm(151, generator=torch.Generator().manual_seed(1))
    for size in (1, 7, 100):
        for name, values in ood_scores(saved, images, size).items():
            torch.testing.assert_close(values, whole[name], rtol=1e-4, atol=1e-4)
        for name, values in ood_scores(saved, images[order], size).items():
            torch.testing.assert_close(values, whole[name][order], rtol=1e-4, atol=1e-4)
    # With batch statistics it does depend on them, or this test would pass for any model.
    other = ood_scores(saved, images, 7, "train")["log_p"]
    assert (other - ood_scores(saved, images, 151, "train")["log_p"]).abs().max() > 0.01


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["m-jem", "m-ebm"])
def test_train_mode_takes_the_statistics_of_each_batch_and_keeps_none(
    make: Make, digits: ImageData, same: Callable[[Any, Any], bool], method: str, training: bool
) -> None:
    saved = make(8, method=method, norm="batch")
    saved.model.train(training)
    before = _state(saved.model)
    assert any("running" in name for name in before)
    images = digits.test_images[:150]
    got = ood_scores(saved, images, 60, "train")
    assert same(_state(saved.model), before)
    assert {m.training for m in saved.model.modules()} == {training}
    twin = copy.deepcopy(saved.model).train()
    with torch.no_grad():
        parts = [_network_input(images[i : i + 60], saved) for i in (0, 60, 120)]
        if method == "m-jem":
            wanted = torch.cat([twin.logits(x) for x in parts]).double().exp().sum(1).log()
        else:
            wanted = -torch.cat([twin.energy(x) for x in parts]).double()
    assert not same(_state(twin), before), "a train-mode forward moves the statistics"
    torch.testing.assert_close(got["log_p"], wanted, rtol=1e-4, atol=1e-4)
    by_running = ood_scores(saved, images, 60)["log_p"]
    assert same(_state(saved.model), before)
    assert {m.training for m in saved.model.modules()} == {training}
    assert (by_running - got["log_p"]).abs().max() > 0.01


def test_dropout_stays_off_with_batch_statistics(make: Make, digits: ImageData) -> None:
    saved = make(3, method="vera", network="wrn-10-1", norm="batch", dropout=0.5)
    first, second = (ood_scores(saved, digits.test_images[:40], 40, "train") for _ in range(2))
    assert torch.equal(first["log_p"], second["log_p"])
    assert (first["log_p"] - ood_scores(saved, digits.test_images[:40], 40)["log_p"]).abs().max() > 1e-3


def test_model_scores_that_are_not_finite_are_counted(make: Make, digits: ImageData, noise: Tensor) -> None:
    saved = make(8, method="m-jem")
    assert saved.model.class_head is not None
    x = _network_input(digits.test_images, saved)
    with torch.no_grad():
        # The first logit is one feature times a weight; it overflows for the half of the images with the larger ones.
        last = [m for m in saved.model.trunk.modules() if isinstance(m, nn.Conv2d)][-1]
        assert last.bias is not None
        last.weight.mul_(1e30)
        last.bias.mul_(1e30)
        medians = saved.model.pooled(x).median(0).values
        saved.model.class_head.weight.zero_()
        saved.model.class_head.weight[0, medians.argmax()] = torch.finfo(torch.float32).max / float(medians.max())
        logits = saved.model.logits(x).numpy()
    bad = sum(1 for row in logits if any(math.isnan(v) or v == math.inf for v in row))
    assert 50 < bad < 310
    with pytest.raises(
        ValueError, match=rf"^{bad} of 360 log_p scores of the images are not finite \(\d+ NaN, \d+ inf"
    ):
        ood_scores(saved, digits.test_images)
    with pytest.raises(ValueError, match=f"^{bad} of 360 log_p scores of the test images are not finite"):
        score_hybrid(saved, digits.test_images, digits.test_labels)
    broken = make(3, method="m-ebm")
    broken.model.energy_head.bias.fill_(math.nan)  # type: ignore[union-attr,operator]
    with pytest.raises(ValueError, match=r"^150 of 150 log_p scores of the images are not finite \(150 NaN, 0 inf"):
        ood_scores(broken, noise)


def test_images_a_model_cannot_take_are_refused(make: Make, digits: ImageData) -> None:
    saved = make(8, method="softmax")  # it has no samples, and yet a shape
    images = digits.test_images[:4]
    with pytest.raises(
        ValueError, match=r"the model takes images of \(1, 8, 8\), but these are \(3, 8, 8\); see adapt_"
    ):
        ood_scores(saved, images.repeat(1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"the images: images must be uint8 .* are float32"):
        ood_scores(saved, images.float())
    with pytest.raises(ValueError, match=r"at least one, but are uint8 \(0, 1, 8, 8\)"):
        ood_scores(saved, images[:0])
    with pytest.raises(ValueError, match="batch_size must be at least 1, but is 0"):
        ood_scores(saved, images, 0)
    with pytest.raises(ValueError, match="norm_mode must be one of eval, train, but is 'frozen'"):
        ood_scores(saved, images, norm_mode="frozen")  # type: ignore[arg-type]


# --- all of it --------------------------------------------------------------------------------------------------------


def test_a_hybrid_model_is_scored(make: Make, digits: ImageData, noise: Tensor) -> None:
    saved = make(60, method="m-jem", norm="batch")
    images, labels = digits.test_images, digits.test_labels
    colour = _random_images(90, 3, 12, 10, seed=3)
    found = score_hybrid(saved, images, labels, outside={"noise": noise, "colour": colour}, bins=15)
    with torch.no_grad():
        logits = saved.model.logits(_network_input(images, saved)).double()
    p = logits.softmax(1)
    right = (p.argmax(1) == labels).tolist()
    share, identity = found["accuracy"]
    assert share == sum(right) / 360 == accuracy(saved.model, digits.test_images, digits.test_labels, 77)
    assert share > 0.3, "the model must have learnt something"
    assert identity == "test-360-eval-norm-accuracy"
    wanted = pytest.approx(_ece([max(row) for row in p.tolist()], right, 15), abs=1e-4)
    assert found["ece"] == (wanted, "test-360-eval-norm-ece15")
    of_others = [f"auroc_{by}_{name}" for name in ("noise", "colour") for by in ("log_p", "confidence")]
    assert list(found) == ["accuracy", "ece", *of_others]
    luma = adapt_images(colour, (1, 8, 8))[0]
    for name, foreign in (("noise", noise), ("colour", luma)):
        with torch.no_grad():
            other = saved.model.logits(_network_input(foreign, saved)).double()
        truth = np.r_[np.ones(360), np.zeros(len(foreign))]
        both = torch.cat([logits, other])
        by_log_p = roc_auc_score(truth, both.exp().sum(1).log().numpy())
        by_confidence = roc_auc_score(truth, both.softmax(1).max(1).values.numpy())
        assert found[f"auroc_log_p_{name}"][0] == pytest.approx(by_log_p, abs=1e-3)
        assert found[f"auroc_confidence_{name}"][0] == pytest.approx(by_confidence, abs=1e-3)
        assert abs(by_log_p - by_confidence) > 0.01, "the two must not be confused"
    assert found["auroc_log_p_noise"][1] == "ood-noise-n150-logp-eval-norm"
    assert found["auroc_confidence_noise"][1] == "ood-noise-n150-confidence-eval-norm"
    assert found["auroc_log_p_colour"][1] == "ood-colour-n90-rgb-to-luma-12x10-to-8x8-logp-eval-norm"
    assert found["auroc_confidence_colour"][1] == "ood-colour-n90-rgb-to-luma-12x10-to-8x8-confidence-eval-norm"


def test_the_ids_tell_the_protocols_apart(make: Make, digits: ImageData, noise: Tensor) -> None:
    saved = make(8, method="lse-jem", norm="batch")
    before = _state(saved.model)
    by_default = score_hybrid(saved, digits.test_images, digits.test_labels, outside={"noise": noise})
    train = score_hybrid(
        saved, digits.test_images, digits.test_labels, outside={"noise": noise}, batch_size=50, norm_mode="train"
    )
    assert by_default["ece"][1] == f"test-360-eval-norm-ece{BINS}" == "test-360-eval-norm-ece20"
    assert {name: identity for name, (_, identity) in train.items()} == {
        "accuracy": "test-360-train-norm-b50-accuracy",
        "ece": "test-360-train-norm-b50-ece20",
        "auroc_log_p_noise": "ood-noise-n150-logp-train-norm-b50",
        "auroc_confidence_noise": "ood-noise-n150-confidence-train-norm-b50",
    }
    assert train["ece"][0] != by_default["ece"][0]
    inner, outer = (ood_scores(saved, x, 50, "train") for x in (digits.test_images, noise))
    assert train["auroc_log_p_noise"][0] == auroc(inner["log_p"], outer["log_p"])
    assert train["auroc_confidence_noise"][0] == auroc(inner["confidence"], outer["confidence"])
    assert all(torch.equal(value, before[name]) for name, value in saved.model.state_dict().items())
    # In eval mode the batch size is not part of a protocol.
    again = score_hybrid(saved, digits.test_images, digits.test_labels, outside={"noise": noise}, batch_size=33)
    assert again["auroc_log_p_noise"][1] == by_default["auroc_log_p_noise"][1]
    assert again["auroc_log_p_noise"][0] == pytest.approx(by_default["auroc_log_p_noise"][0], abs=1e-3)
    assert again["ece"][0] == pytest.approx(by_default["ece"][0], abs=1e-3)


def test_a_model_with_an_energy_alone_has_an_auroc_by_it(make: Make, digits: ImageData, noise: Tensor) -> None:
    saved = make(60, method="m-ebm")
    found = score_hybrid(saved, digits.test_images, digits.test_labels, outside={"noise": noise})
    with torch.no_grad():
        inside, outside = (-saved.model.energy(_network_input(x, saved)) for x in (digits.test_images, noise))
    wanted = float(_pairs(inside.tolist(), outside.tolist()))
    assert wanted > 0.9, "noise must be unlike digits, or the sign of the energy would not show"
    assert found == {"auroc_log_p_noise": (pytest.approx(wanted, abs=1e-3), "ood-noise-n150-logp-eval-norm")}
    unlabelled = torch.full((360,), -1)  # it looks at no label, but at their number
    assert score_hybrid(saved, digits.test_images, unlabelled) == {}
    with pytest.raises(ValueError, match=r"labels must be whole numbers \(360,\), but are int64 \(359,\)"):
        score_hybrid(saved, digits.test_images, unlabelled[1:])


def test_a_set_against_itself_and_no_other_set(make: Make, digits: ImageData) -> None:
    saved = make(8, method="m-jem")
    found = score_hybrid(saved, digits.test_images, digits.test_labels, outside={"itself": digits.test_images})
    assert found["auroc_log_p_itself"][0] == found["auroc_confidence_itself"][0] == 0.5
    assert list(score_hybrid(saved, digits.test_images, digits.test_labels)) == ["accuracy", "ece"]


def test_what_cannot_be_scored_is_refused_by_name(make: Make, digits: ImageData, noise: Tensor) -> None:
    saved = make(8, method="m-jem")
    images, labels = digits.test_images, digits.test_labels
    with pytest.raises(ValueError, match=r"^cmyk: images of 4 channels cannot be adapted to 1$"):
        score_hybrid(saved, images, labels, outside={"noise": noise, "cmyk": _random_images(3, 4, 8, 8)})
    with pytest.raises(ValueError, match=r"^floats: images must be uint8"):
        score_hybrid(saved, images, labels, outside={"floats": noise / 255})
    with pytest.raises(ValueError, match=r"^the test images: the model takes images of \(1, 8, 8\)"):
        score_hybrid(saved, _random_images(360, 1, 9, 9), labels)  # test images are never adapted
    with pytest.raises(ValueError, match=r"^360 of 360 labels are outside 0\.\.9$"):
        score_hybrid(saved, images, labels + 10)
    with pytest.raises(ValueError, match="at least 1 bin, but got 0"):
        score_hybrid(saved, images, labels, bins=0)
    with pytest.raises(ValueError, match="norm_mode must be one of eval, train"):
        score_hybrid(saved, images, labels, norm_mode="running")  # type: ignore[arg-type]
