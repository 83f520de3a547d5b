"""The numbers behind the paper's figures of a trained model: scores of images, their extremes, features, an embedding.

Settings are those of the released scripts (sndnyang/mebm Task/quality_analysis.py, eval_maebm.py), but for the labels
of the t-SNE, which eval_maebm.py:532-543 exchanges: it joins (x+, x0, x-) and labels them (x+, x-, x0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.data.subset import training_images
from trainables.evaluation.scores import eval_mode, frozen_statistics
from trainables.models.model_file import SavedModel
from trainables.networks.layers import set_dropout_generator
from trainables.sampling.initial import Initial, build_initial

LogP = Literal["logsumexp", "energy"]
BATCH = 100
"""Images per forward, which matters where batch norm takes the batch's statistics (both scripts use 100)."""
SEED = 1234
"""Which training images stand for x+, and which draws of p0 for x0 (eval_maebm.py:487)."""
SETS = ("x+", "x-", "x0")
"""Training images, samples of the model, draws of its p0."""
PANELS = ("samples", "highest_px", "lowest_px", "highest_pyx", "lowest_pyx")
"""The panels of Figs 5 and 9-17; the last two exist for models with a trained class head only."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def choose_log_p(config: TrialConfig, wanted: LogP | None = None) -> LogP:
    """What stands for log p(x) up to a constant: `logsumexp` of the class logits, or minus the `energy`.

    The paper's figures use the class head even where an energy head was trained (quality_analysis.py:57-58).
    ValueError: the model was not trained for what is wanted.
    """
    if wanted == "logsumexp" and not config.classifies:
        raise ValueError(f"log p(x) from class logits needs a trained class head, which {config.method} does not have")
    if wanted == "energy" and config.method_args.head is None:
        raise ValueError(f"log p(x) from the energy needs a trained energy, which {config.method} does not have")
    return wanted or ("logsumexp" if config.classifies else "energy")


@dataclass(frozen=True)
class Scores:
    """Of N images log p(x) up to its constant; with a class head the class of the largest logit, its p(y|x)."""

    log_p: Floats
    predicted: Ints | None
    confidence: Floats | None


def score_images(saved: SavedModel, images: Tensor, log_p: LogP) -> Scores:
    """Score uint8 images (N, C, H, W) in eval mode, in batches of 100 (quality_analysis.py:41-66)."""
    heights: list[Tensor] = []
    logits: list[Tensor] = []
    with eval_mode(saved.model):
        for x in map(saved.inputs, images.split(BATCH)):
            if saved.config.classifies:
                logits.append(saved.model.logits(x))
            heights.append(torch.logsumexp(logits[-1], dim=1) if log_p == "logsumexp" else -saved.energy(x))
    height = torch.cat(heights) if heights else torch.empty(0)
    if not saved.config.classifies:
        return Scores(_floats(height), None, None)
    probabilities = (torch.cat(logits) if logits else torch.empty(0, saved.classes)).softmax(1)
    confidence, predicted = probabilities.max(1)
    return Scores(_floats(height), predicted.cpu().numpy().astype(np.int64), _floats(confidence))


def _floats(x: Tensor) -> Floats:
    return x.double().cpu().numpy()


def first_per_class(predicted: Ints, classes: int, count: int = 10) -> Ints:
    """Indices of the first images of every class (eval_maebm.py:138-160): (classes, count), -1 where it has fewer."""
    return _padded([np.flatnonzero(predicted == label) for label in range(classes)], count)


def extremes(values: Floats, predicted: Ints, classes: int, count: int = 100) -> tuple[Ints, Ints]:
    """The images of every predicted class with the highest and with the lowest values, from the extreme inwards.

    Each (classes, count) of indices; -1 where a class has fewer images. Equal values keep the images' order.
    """
    members = [np.flatnonzero(predicted == label) for label in range(classes)]
    highest, lowest = ([m[np.argsort(sign * values[m], kind="stable")] for m in members] for sign in (-1, 1))
    return _padded(highest, count), _padded(lowest, count)


def _padded(rows: Sequence[Ints], count: int) -> Ints:
    out = np.full((len(rows), count), -1, dtype=np.int64)
    for row, found in zip(out, rows, strict=True):
        row[: len(found)] = found[:count]
    return out


def class_panels(scores: Scores, classes: int, count: int = 100) -> dict[str, Ints]:
    """The panels of Figs 5 and 9-17: `PANELS` to indices of images, (classes, count), -1 where a class has fewer.

    A model without a trained class head has one row, all its samples, and no panels by p(y|x).
    """
    if scores.predicted is None or scores.confidence is None:
        predicted, classes = np.zeros(len(scores.log_p), dtype=np.int64), 1
    else:
        predicted = scores.predicted
    found = [first_per_class(predicted, classes, count), *extremes(scores.log_p, predicted, classes, count)]
    if scores.confidence is not None:
        found += extremes(scores.confidence, predicted, classes, count)
    return dict(zip(PANELS, found, strict=False))


@dataclass(frozen=True)
class Features:
    """What a model makes of one set of images: pooled features (n, F) and energies (n,), None without an energy."""

    pooled: Floats
    energy: Floats | None


def set_features(saved: SavedModel, sets: Mapping[str, Tensor]) -> dict[str, Features]:
    """Features and energies of named sets of images, uint8 (n, C, H, W) or float in [-1, 1] (eval_maebm.py:487-536).

    In train mode: batch norm takes the statistics of each batch of 100 of one set, and its running ones stay.
    """
    found = {}
    set_dropout_generator(saved.model, torch.Generator(saved.device).manual_seed(SEED))
    with frozen_statistics(saved.model), torch.no_grad():
        for name, images in sets.items():
            pooled: list[Tensor] = []
            energies: list[Tensor] = []
            for x in map(saved.inputs, images.split(BATCH)):
                pooled.append(saved.model.pooled(x))
                if saved.config.method_args.head is not None:
                    energies.append(saved.energy(x))
            found[name] = Features(_floats(torch.cat(pooled)), _floats(torch.cat(energies)) if energies else None)
    return found


def data_images(images: Tensor, count: int) -> tuple[Tensor, Ints]:
    """`count` training images for x+, drawn with the seed of the released script, and their indices."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))[:count]
    return images[order.to(images.device)], order.numpy().astype(np.int64)


def embed(features: Sequence[Floats]) -> list[Floats]:
    """One joint t-SNE of several sets of features, (n_i, F): scikit-learn's, PCA start, perplexity 30, seed 0.

    With few images the perplexity is a third of their number. Returned are places, (n_i, 2), in the order given.
    ValueError: fewer than four images, or sets of unequal F.
    """
    from sklearn.manifold import TSNE  # seconds to import
    from threadpoolctl import threadpool_limits

    joined = np.concatenate(features)
    if len(joined) < 4:
        raise ValueError(f"t-SNE needs at least 4 images, but there are {len(joined)}")
    perplexity = min(30.0, (len(joined) - 1) / 3)
    tsne = TSNE(n_components=2, init="pca", random_state=0, perplexity=perplexity)
    # As many threads as torch may use: on a shared machine more would spend their time waiting for each other.
    with threadpool_limits(torch.get_num_threads()):
        found = tsne.fit_transform(joined)
    return np.split(found.astype(np.float64), np.cumsum([len(f) for f in features])[:-1])


def load_data(saved: SavedModel) -> ImageData:
    """The images a model was trained on; a `DataError` if they are not there, a `ValueError` if those are others."""
    data = training_images(saved.config)
    if data.fingerprint != saved.data_source.rpartition("#")[2]:
        raise ValueError(f"it was trained on {saved.data_source}, but the images here are {data.source}")
    return data


def load_initial(saved: SavedModel, data: ImageData) -> Initial | None:
    """The model's p0, on the data's device; None for a method without chains."""
    c = saved.config
    if not c.chains:
        return None
    return build_initial(c.initial, data, c.covariance_jitter, rank=c.initial_rank, arguments=c.initial_args)


def initial_draws(initial: Initial, count: int) -> Tensor:
    """`count` draws of p0 for x0, float (count, C, H, W) in [-1, 1], with the seed of the released script."""
    return initial.sample(count, torch.Generator().manual_seed(SEED))
