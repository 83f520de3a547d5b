"""The numbers that users of hybrid energy models report: accuracy, calibration, and what tells foreign images apart.

A hybrid model is a classifier that is an energy as well (JEM, JEM++, M-JEM, LSE-JEM, VERA). Its papers report accuracy,
expected calibration error (JEM section 5.2) and the area under the ROC curve of telling test images from those of
another data set, by log p(x) and by max p(y|x) (section 5.3). Beside the released scripts (wgrathwohl/JEM
eval_wrn_ebm.py, sndnyang/mebm eval_maebm.py):

- No noise is added to the images, as in eval_maebm.py; JEM's script adds a standard deviation of 0.03 by default.
- The norms are in eval mode, as in eval_maebm.py; JEM's script leaves the train mode on, but JEM has no norm.
- Log p(x) is the log-sum-exp of the class logits wherever a class head was trained, as in the paper's figures
  (`views`). The OOD evaluation of eval_maebm.py takes the energy head of an M-JEM (`--uncond`).
- Log-sum-exp and softmax are taken in float64: in float32 confident images all get exactly 1 and tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainables.evaluation.scores import eval_mode, frozen_statistics
from trainables.models.model_file import SavedModel

NormMode = Literal["eval", "train"]
BINS = 20
"""Buckets of the calibration error (JEM section 5.2; ECELoss(20) in eval_maebm.py)."""
BATCH = 100
"""Images per forward (both scripts); it changes the numbers with `norm_mode="train"` only."""
UNCHANGED = "unchanged"
"""What `adapt_images` says of images that fit already."""
LUMA = (299, 587, 114)
"""Thousandths of red, green and blue in the luma of ITU-R BT.601."""
_SUM_TOLERANCE = 0.01
"""How far a row of probabilities may be from 1: the rounding of 16-bit numbers, and far less than logits are."""
_ADAPTED_AT_ONCE = 100
"""Images adapted at a time: whole sets of large photographs would not fit into memory as floats."""


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al., ICML 2017, equation 3): sum of n_b / N * |accuracy_b - confidence_b|.

    Bin b of 1..B is ((b - 1) / B, b / B], as in the paper; a confidence of exactly 0 belongs to the first. Edges are
    b / B rounded to the type of the probabilities, so 0.55 lies on the edge of 0.55 in float32 as in float64.
    `probabilities` are p(y|x), float (N, C), rows that sum to 1; `labels` whole numbers (N,) in 0..C-1. ValueError: an
    argument is not as above; rows that are no probabilities are counted.
    """
    if bins < 1:
        raise ValueError(f"the calibration error needs at least 1 bin, but got {bins}")
    if probabilities.dim() != 2 or not probabilities.is_floating_point() or 0 in probabilities.shape:
        raise ValueError(f"probabilities must be float (N, C) with N, C > 0, but are {_described(probabilities)}")
    p = probabilities.detach().cpu()
    truth = _checked_labels(labels, *p.shape)
    wide = p.double()
    # Written so that NaN counts as bad.
    good = torch.isfinite(wide).all(1) & (wide >= 0).all(1) & ((wide.sum(1) - 1).abs() <= _SUM_TOLERANCE)
    if bad := int((~good).sum()):
        raise ValueError(f"{bad} of {len(p)} rows are not probabilities (finite, at least 0, summing to 1)")
    confidence, predicted = wide.max(1)
    inner_edges = (torch.arange(1, bins, dtype=torch.float64) / bins).to(p.dtype).double()
    index = torch.bucketize(confidence, inner_edges)  # edges[i - 1] < confidence <= edges[i]
    # n_b / N * |right_b / n_b - sum of confidences_b / n_b|: the n_b cancel.
    difference = (predicted == truth).double() - confidence
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, difference)
    return float(gaps.abs().sum()) / len(p)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Area under the ROC curve: the probability that a score from inside exceeds one from outside, ties counting half.

    That is the statistic of Mann and Whitney over the number of pairs. Scores, (N,) and (M,), are compared in float64
    and pairs are counted in whole numbers, so the only rounding is the last division. ValueError: no scores, another
    shape, or scores that are not finite, with their number.
    """
    inner, outer = (_checked_scores(x, name) for x, name in ((inside, "inside"), (outside, "outside")))
    ordered = outer.sort().values
    below = torch.searchsorted(ordered, inner, right=False)  # outside scores less than each inside score
    not_above = torch.searchsorted(ordered, inner, right=True)  # and those equal to it too
    twice = int(below.sum()) + int(not_above.sum())
    return twice / (2 * len(inner) * len(outer))


def adapt_images(images: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, str]:
    """Images, uint8 (N, C, H, W), in the (C, H, W) that a model takes, and a short text that says what was done.

    Size: bilinear with antialiasing (the filter of PIL and so of JEM's CelebA), whatever the aspect ratio. RGB to grey:
    the luma of ITU-R BT.601. Grey to RGB: the channel three times. All in float32, rounded once at the end (halves to
    even). The text is `unchanged`, for the tensor itself, or the steps joined by `-`, such as `rgb-to-luma`,
    `grey-to-rgb`, `28x28-to-32x32` (height x width). ValueError: not such images, a shape of no size, or channels that
    are neither equal nor 1 and 3.
    """
    _check_images(images)
    channels, height, width = shape
    if min(shape) < 1:
        raise ValueError(f"images cannot be adapted to a shape of {shape}")
    steps = []
    if images.shape[1] != channels:
        steps.append({(3, 1): "rgb-to-luma", (1, 3): "grey-to-rgb"}.get((images.shape[1], channels), ""))
        if not steps[0]:
            raise ValueError(f"images of {images.shape[1]} channels cannot be adapted to {channels}")
    if images.shape[2:] != (height, width):
        steps.append(f"{images.shape[2]}x{images.shape[3]}-to-{height}x{width}")
    if not steps:
        return images, UNCHANGED
    return torch.cat([_adapted(part, shape) for part in images.split(_ADAPTED_AT_ONCE)]), "-".join(steps)


def _adapted(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    x = images.to(torch.float32)
    if channels == 1 and x.shape[1] == 3:
        # Whole thousandths first: sums below 2^24 are exact, so the result is the same on every device.
        x = (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True) / 1000
    if x.shape[2:] != (height, width):
        x = F.interpolate(x, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    # The filter's weights are positive and sum to 1 but for rounding.
    return x.round().clamp(0, 255).to(torch.uint8).repeat(1, channels // x.shape[1], 1, 1)


def score_hybrid(
    saved: SavedModel,
    images: Tensor,
    labels: Tensor,
    *,
    outside: Mapping[str, Tensor] = {},
    batch_size: int = BATCH,
    norm_mode: NormMode = "eval",
    bins: int = BINS,
) -> dict[str, tuple[float, str]]:
    """Accuracy, calibration error (in `bins`) and the AUROC against other sets of images, all in [0, 1].

    Returned are value and protocol's id (`test-360-eval-norm-ece20`, `ood-svhn-n1000-logp-eval-norm`) by name:
    `accuracy` and `ece`, which need a trained class head, and of every other set `auroc_log_p_NAME` and, by max p(y|x),
    `auroc_confidence_NAME`, which needs one too. Other sets, uint8 (M, C', H', W'), are put through `adapt_images`; a
    batch holds images of one set only. ValueError: as of `model_outputs`, `adapt_images` and
    `expected_calibration_error`; it names the set.
    """
    log_p, probabilities = model_outputs(saved, images, batch_size, norm_mode, "the test images")
    count = len(log_p)
    truth = _checked_labels(labels, count, None if probabilities is None else probabilities.shape[1])
    norm = "eval-norm" if norm_mode == "eval" else f"train-norm-b{batch_size}"
    found = {}
    if probabilities is not None:
        share = int((probabilities.argmax(1) == truth).sum()) / count
        found["accuracy"] = share, f"test-{count}-{norm}-accuracy"
        found["ece"] = expected_calibration_error(probabilities, truth, bins), f"test-{count}-{norm}-ece{bins}"
    for name, foreign in outside.items():
        try:
            fitting, adapted = adapt_images(foreign, saved.shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        other_log_p, other = model_outputs(saved, fitting, batch_size, norm_mode, name)
        prefix = f"ood-{name}-n{len(foreign)}" + ("" if adapted == UNCHANGED else f"-{adapted}")
        found[f"auroc_log_p_{name}"] = auroc(log_p, other_log_p), f"{prefix}-logp-{norm}"
        if probabilities is not None and other is not None:
            by_confidence = auroc(probabilities.max(1).values, other.max(1).values)
            found[f"auroc_confidence_{name}"] = by_confidence, f"{prefix}-confidence-{norm}"
    return found


def model_outputs(
    saved: SavedModel, images: Tensor, batch_size: int = BATCH, norm_mode: NormMode = "eval", what: str = "the images"
) -> tuple[Tensor, Tensor | None]:
    """What a model makes of images, uint8 (N, C, H, W) of its shape: log p and p(y|x), the scores of JEM section 5.3.

    Float64 on the CPU, finite: log p, (N,), up to a constant, is the log-sum-exp of the class logits where the class
    head is trained, else minus the energy; p(y|x), (N, C), is there with a trained class head. In `eval` mode batch
    norm takes its running statistics. In `train` mode it takes those of each batch, in the order given, and the running
    ones are put back: the other images of a batch are part of a score, and two sets are told apart more easily than any
    image of them; nothing else is in train mode. ValueError: not such images, a batch size below 1, an unknown norm
    mode, or scores that are not finite, with their number.
    """
    _check_images(images, f"{what}: ")
    if (found := tuple(images.shape[1:])) != saved.shape:
        raise ValueError(f"{what}: the model takes images of {saved.shape}, but these are {found}; see adapt_images")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}")
    model, classifies = saved.model, saved.config.classifies
    with norms(model, norm_mode):
        parts = [
            (model.logits(x) if classifies else -saved.energy(x)).cpu().double()
            for x in map(saved.inputs, images.split(batch_size))
        ]
    outputs = torch.cat(parts)
    log_p = torch.logsumexp(outputs, dim=1) if classifies else outputs
    _refuse_non_finite(log_p, f"log_p scores of {what}")
    # A finite log-sum-exp has finite probabilities: no logit is NaN or plus infinity, and not all are minus infinity.
    return log_p, outputs.softmax(1) if classifies else None


@contextmanager
def norms(model: nn.Module, mode: NormMode) -> Iterator[None]:
    """No gradients, and the model in eval mode, or in eval mode but for its batch norms; put back afterwards."""
    if mode not in get_args(NormMode):
        raise ValueError(f"norm_mode must be one of {', '.join(get_args(NormMode))}, but is {mode!r}")
    if mode == "eval":
        with eval_mode(model):
            yield
        return
    with frozen_statistics(model), torch.no_grad():
        model.eval()  # dropout is not a norm
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        yield


def _check_images(images: Tensor, whose: str = "") -> None:
    if images.dim() != 4 or images.dtype != torch.uint8 or 0 in images.shape:
        raise ValueError(f"{whose}images must be uint8 (N, C, H, W) and at least one, but are {_described(images)}")


def _checked_labels(labels: Tensor, count: int, classes: int | None) -> Tensor:
    if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be whole numbers ({count},), but are {_described(labels)}")
    truth = labels.cpu().long()
    if classes is not None and (wrong := int(((truth < 0) | (truth >= classes)).sum())):
        raise ValueError(f"{wrong} of {count} labels are outside 0..{classes - 1}")
    return truth


def _checked_scores(scores: Tensor, name: str) -> Tensor:
    if scores.dim() != 1 or len(scores) == 0:
        raise ValueError(f"{name} scores must be (N,) with N > 0, but are {_described(scores)}")
    wide = scores.detach().cpu().double()
    _refuse_non_finite(wide, f"{name} scores")
    return wide


def _refuse_non_finite(scores: Tensor, what: str) -> None:
    nan, infinite = int(scores.isnan().sum()), int(scores.isinf().sum())
    if nan or infinite:
        raise ValueError(f"{nan + infinite} of {len(scores)} {what} are not finite ({nan} NaN, {infinite} infinite)")


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
