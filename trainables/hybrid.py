"""The numbers that users of hybrid energy models report: accuracy, calibration, and what tells foreign images apart.

A hybrid model is a classifier that is an energy as well (JEM, Grathwohl et al., ICLR 2020, and its family: JEM++,
M-JEM, LSE-JEM, VERA). Its papers report the accuracy, the expected calibration error (JEM section 5.2) and the area
under the ROC curve of telling test images from images of another data set, by log p(x) and by the confidence
max p(y|x) (section 5.3). A model without a trained class head has the AUROC by its energy alone.

Beside the released scripts (wgrathwohl/JEM eval_wrn_ebm.py, sndnyang/mebm eval_maebm.py):

- No noise is added to the images, as in eval_maebm.py; JEM's script adds a standard deviation of 0.03 by default.
- The norms are in eval mode, as in eval_maebm.py; JEM's script leaves the train mode on, but JEM has no norm.
- Log p(x) is the log-sum-exp of the class logits wherever a class head was trained, as in the paper's figures
  (`exhibits`). The OOD evaluation of eval_maebm.py takes the energy head of an M-JEM (`--uncond`).
- Log-sum-exp and softmax are taken in float64: in float32 confident images all get exactly 1 and tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainables.evaluation import eval_mode, frozen_statistics
from trainables.exhibits import LogP, choose_log_p
from trainables.saved import SavedModel

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

    An image's confidence is its largest probability, its prediction that class. Bin b of 1..B is ((b - 1) / B, b / B],
    as in the paper: an inner edge belongs to the bin below it, a confidence of exactly 1 to the last bin, and one of
    exactly 0 to the first. The edges are b / B rounded to the type of the probabilities, so 0.55 lies on the edge of
    0.55 in float32 as in float64. Empty bins count nothing; sums are in float64.

    Args:
        probabilities: p(y|x), float (N, C), rows that sum to 1.
        labels: whole numbers (N,) in 0..C-1.
        bins: B, at least 1.

    Returns:
        In [0, 1]; 0 is calibrated.

    Raises:
        ValueError: no images, shapes or types that do not fit, fewer than one bin, a label that is no class, or rows
            that are no probabilities (not finite, negative, or not summing to 1), with their number.
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
        raise ValueError(f"{bad} of {len(p)} rows are no probabilities (finite, at least 0, summing to 1)")
    confidence, predicted = wide.max(1)
    inner_edges = (torch.arange(1, bins, dtype=torch.float64) / bins).to(p.dtype).double()
    index = torch.bucketize(confidence, inner_edges)  # edges[i - 1] < confidence <= edges[i]
    # n_b / N * |right_b / n_b - sum of confidences_b / n_b|: the n_b cancel.
    difference = (predicted == truth).double() - confidence
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, difference)
    return float(gaps.abs().sum()) / len(p)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Area under the ROC curve: the probability that a score from inside exceeds one from outside, ties counting half.

    That is the statistic of Mann and Whitney over the number of pairs, and sklearn's `roc_auc_score` with 1 for inside.
    Scores are compared in float64 and pairs are counted in whole numbers, so the only rounding is the last division.

    Args:
        inside: scores of images of the model's data set, (N,); higher means more like the data.
        outside: scores of images of another set, (M,).

    Returns:
        In [0, 1]: 1 if every inside score exceeds every outside score, 0.5 for scores that tell nothing.

    Raises:
        ValueError: no scores, another shape, or scores that are not finite, with their number.
    """
    inner, outer = (_checked_scores(x, name) for x, name in ((inside, "inside"), (outside, "outside")))
    ordered = outer.sort().values
    below = torch.searchsorted(ordered, inner, right=False)  # outside scores less than each inside score
    not_above = torch.searchsorted(ordered, inner, right=True)  # and those equal to it too
    twice = int(below.sum()) + int(not_above.sum())
    return twice / (2 * len(inner) * len(outer))


def adapt_images(images: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, str]:
    """Images of another data set in the shape that a model takes, and a short text that says what was done to them.

    Size: bilinear with antialiasing (`torch.nn.functional.interpolate`, the filter of PIL and so of JEM's CelebA), to
    the given height and width whatever the aspect ratio. RGB to grey: the luma of ITU-R BT.601. Grey to RGB: the
    channel three times. All in float32, rounded once at the end (halves to even).

    Args:
        images: uint8 (N, C, H, W), N > 0.
        shape: (channels, height, width) wanted.

    Returns:
        uint8 (N, *shape) on the same device (the tensor itself if it fits), and `unchanged` or the steps, such as
        `rgb-to-luma`, `grey-to-rgb`, `28x28-to-32x32` (height x width), joined by `-`.

    Raises:
        ValueError: not such images, a shape of no size, or channels that are neither equal nor 1 and 3.
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


def ood_scores(
    saved: SavedModel, images: Tensor, batch_size: int = BATCH, norm_mode: NormMode = "eval"
) -> dict[str, Tensor]:
    """What a model makes of images, higher for images like its data: the scores of JEM section 5.3.

    Args:
        images: uint8 (N, C, H, W) of the model's shape, N > 0; see `adapt_images`.
        batch_size: images per forward.
        norm_mode: `eval`: batch norm takes its running statistics, and an image's score depends on nothing else.
            `train`: it takes the statistics of each batch, in the order given (the last one may be small), and the
            running ones are put back. Then the other images of a batch are part of a score: two sets are told apart
            more easily than any image of them. Nothing else is in train mode: no dropout.

    Returns:
        float64 (N,) on the CPU: `log_p`, the log-sum-exp of the class logits where the class head is trained, else
        minus the energy, up to the model's constant; and with a trained class head `confidence`, max p(y|x).

    Raises:
        ValueError: not such images, a batch size below 1, an unknown norm mode, or scores that are not finite, with
            their number.
    """
    log_p, probabilities = _outputs(saved, images, batch_size, norm_mode, "the images")
    scores = {"log_p": log_p}
    if probabilities is not None:
        scores["confidence"] = probabilities.max(1).values
    return scores


@dataclass(frozen=True)
class OutsideScores:
    """How well a model tells its test images from one other set.

    Attributes:
        n: images of the other set.
        adapted: what `adapt_images` did to them.
        auroc_log_p: by log p(x), in [0, 1].
        auroc_confidence: by max p(y|x); None without a trained class head.
        log_p_id, confidence_id: protocols of the two, such as `ood-svhn-n1000-logp-eval-norm`.
    """

    n: int
    adapted: str
    auroc_log_p: float
    log_p_id: str
    auroc_confidence: float | None = None
    confidence_id: str | None = None


@dataclass(frozen=True)
class HybridScores:
    """The numbers of a hybrid model, each with its protocol's id.

    Attributes:
        n: test images.
        norm_mode: see `ood_scores`.
        log_p: what stood for log p(x): `logsumexp` of the class logits or minus the `energy`.
        accuracy: share of test images classified right, in [0, 1]; None without a trained class head.
        ece: expected calibration error, in [0, 1]; None without a trained class head.
        accuracy_id, ece_id: protocols of the two, such as `test-360-eval-norm-ece20`.
        outside: by name of the other set, in the order given.
    """

    n: int
    norm_mode: NormMode
    log_p: LogP
    accuracy: float | None = None
    accuracy_id: str | None = None
    ece: float | None = None
    ece_id: str | None = None
    outside: Mapping[str, OutsideScores] = field(default_factory=dict)


def score_hybrid(
    saved: SavedModel,
    images: Tensor,
    labels: Tensor,
    *,
    outside: Mapping[str, Tensor] = {},
    batch_size: int = BATCH,
    norm_mode: NormMode = "eval",
    bins: int = BINS,
) -> HybridScores:
    """Accuracy, calibration error and the AUROC against other sets of images.

    Args:
        images: test images, uint8 (N, C, H, W) of the model's shape.
        labels: their classes, whole numbers (N,); a model without a trained class head does not look at the values.
        outside: other sets by a name that their ids carry, uint8 (M, C', H', W'); they are put through `adapt_images`.
        batch_size: images per forward; part of the ids with `norm_mode="train"`, where the numbers depend on it.
        norm_mode: see `ood_scores`; a batch holds images of one set only.
        bins: of the calibration error.

    Raises:
        ValueError: as of `ood_scores`, `adapt_images` and `expected_calibration_error`; it names the set.
    """
    kind = choose_log_p(saved.config)
    log_p, probabilities = _outputs(saved, images, batch_size, norm_mode, "the test images")
    count = len(log_p)
    norm = "eval-norm" if norm_mode == "eval" else f"train-norm-b{batch_size}"
    accuracy, ece = None, None
    if probabilities is not None:
        truth = _checked_labels(labels, count, probabilities.shape[1])
        accuracy = int((probabilities.argmax(1) == truth).sum()) / count
        ece = expected_calibration_error(probabilities, truth, bins)
    else:
        _checked_labels(labels, count, None)
    others = {}
    for name, foreign in outside.items():
        try:
            fitting, adapted = adapt_images(foreign, _shape(saved))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        other_log_p, other = _outputs(saved, fitting, batch_size, norm_mode, name)
        prefix = f"ood-{name}-n{len(foreign)}" + ("" if adapted == UNCHANGED else f"-{adapted}")
        by_confidence = None
        if probabilities is not None and other is not None:
            by_confidence = auroc(probabilities.max(1).values, other.max(1).values)
        others[name] = OutsideScores(
            n=len(foreign),
            adapted=adapted,
            auroc_log_p=auroc(log_p, other_log_p),
            log_p_id=f"{prefix}-logp-{norm}",
            auroc_confidence=by_confidence,
            confidence_id=None if by_confidence is None else f"{prefix}-confidence-{norm}",
        )
    return HybridScores(
        n=count,
        norm_mode=norm_mode,
        log_p=kind,
        accuracy=accuracy,
        accuracy_id=None if accuracy is None else f"test-{count}-{norm}-accuracy",
        ece=ece,
        ece_id=None if ece is None else f"test-{count}-{norm}-ece{bins}",
        outside=others,
    )


def _outputs(
    saved: SavedModel, images: Tensor, batch_size: int, norm_mode: NormMode, what: str
) -> tuple[Tensor, Tensor | None]:
    """log p (N,) and, with a trained class head, p(y|x) (N, C); float64 on the CPU, finite."""
    try:
        _check_images(images)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    if images.shape[1:] != _shape(saved):
        found, wanted = tuple(images.shape[1:]), _shape(saved)
        raise ValueError(f"{what}: the model takes images of {wanted}, but these are {found}; see adapt_images")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}")
    model, classifies = saved.model, saved.config.classifies
    with _norms(model, norm_mode):
        parts = [
            (model.logits(x) if classifies else -model.energy(x)).cpu().double()
            for x in map(saved.inputs, images.split(batch_size))
        ]
    found_all = torch.cat(parts)
    log_p = torch.logsumexp(found_all, dim=1) if classifies else found_all
    _refuse_non_finite(log_p, f"log_p scores of {what}")
    # A finite log-sum-exp has finite probabilities: no logit is NaN or plus infinity, and not all are minus infinity.
    return log_p, found_all.softmax(1) if classifies else None


@contextmanager
def _norms(model: nn.Module, mode: NormMode) -> Iterator[None]:
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


def _shape(saved: SavedModel) -> tuple[int, int, int]:
    channels, height, width = saved.samples.shape[1:]  # also of a classifier, which has no samples
    return channels, height, width


def _check_images(images: Tensor) -> None:
    if images.dim() != 4 or images.dtype != torch.uint8 or 0 in images.shape:
        raise ValueError(f"images must be uint8 (N, C, H, W) and at least one, but are {_described(images)}")


def _checked_labels(labels: Tensor, count: int, classes: int | None) -> Tensor:
    """Labels as int64 on the CPU; their values are looked at if there are classes."""
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
