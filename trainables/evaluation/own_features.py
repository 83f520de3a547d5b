"""Feature extractors of a user's own, such as DINOv2 or CLIP: a TorchScript file, or code that builds a network.

Their `id` names the extractor and hashes its code and weights. It is part of the protocol's id, so that numbers of
different extractors, or of one with other weights, are never taken for the same quantity.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainables.config.protocols import TORCHSCRIPT
from trainables.evaluation.inception import Inception, NoFeaturesError
from trainables.plugins.calling import calling, said
from trainables.plugins.parts import own_part
from trainables.plugins.reference import check_trusted, code_hash, is_reference, named_file, on_change, short
from trainables.results.files import file_hash

MAX_SIZE = 16_384
"""Features of an image: a covariance of so many takes 2 GB."""


class _Own(nn.Module):
    """A user's network, whose features are checked."""

    def __init__(self, name: str, network: Any) -> None:
        super().__init__()
        self.name, self.network, self.size = name, network, 0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # Inside, what a user's code raises or prints becomes one line.
        with calling("extractor", self.name, f"of {len(images)} images", self.network):
            found = self.network(images)
        wrong = None
        if not isinstance(found, Tensor) or not found.is_floating_point():
            kind = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
            wrong = f"gives a {kind}, expected a float tensor (N, features)"
        elif found.dim() != 2 or len(found) != len(images) or not 2 <= found.shape[1] <= MAX_SIZE:
            wrong = f"gives {tuple(found.shape)} of {len(images)} images, expected (N, 2 to {MAX_SIZE:,} features)"
        if wrong:
            raise ValueError(said("extractor", self.name, wrong, self.network))
        return found, found[:, :0]


class OwnExtractor(Inception):
    """As `Inception`, with features alone."""

    what = "the extractor"
    cpu_layout = torch.preserve_format

    def __init__(self, name: str, network: Any, identity: str) -> None:
        super().__init__(_Own(name, network).eval().requires_grad_(False), identity)


_LOADED: dict[str, OwnExtractor] = {}
on_change(_LOADED.clear)


def own_extractor(name: str) -> OwnExtractor:
    """An extractor by its name, EXTRACTOR or EXTRACTOR@WEIGHTS; it is built once per process.

    A reference is called with the path of its weights, if some are named, and returns a network or a function of uint8
    images (N, 3, H, W). A TorchScript file is such a network itself.

    Raises:
        NoFeaturesError: the file or the weights are missing; one line that says where they are wanted.
        ValueError: it is no such thing, or its code may not run.
    """
    if name not in _LOADED:
        _LOADED[name] = _load(name)
    return _LOADED[name]


def _load(name: str) -> OwnExtractor:
    reference, _, weights = name.partition("@")
    shown = short(reference) if is_reference(reference) else Path(reference).name
    total = hashlib.sha256()
    file = _wanted(shown, "its weights", weights) if weights else None
    if file is not None:
        total.update(file_hash(file).encode())
    if is_reference(reference):
        build = own_part("extractor", reference)
        total.update(code_hash(reference).encode())
        with calling("extractor", shown, "is built", build):
            network = build(str(file)) if file is not None else build()
        if not callable(network):
            kind = type(network).__name__
            raise ValueError(said("extractor", shown, f"builds a {kind}, expected a network or a function", build))
    else:
        network = _torchscript(_wanted(shown, "its file", reference), total)
    return OwnExtractor(shown, network, f"{shown}-{total.hexdigest()[:8]}")


def _wanted(shown: str, what: str, place: str) -> Path:
    try:
        return named_file(place)
    except ValueError as error:
        raise NoFeaturesError(
            f"extractor {shown}: {what}: {error}; put it there, or name the file where it is"
        ) from None


def _torchscript(file: Path, total: Any) -> nn.Module:
    if not file.name.endswith(TORCHSCRIPT):
        raise ValueError(f"extractor {file.name}: expected TorchScript ({', '.join(TORCHSCRIPT)}) or FILE.py:NAME")
    code = file_hash(file)
    check_trusted(file, code)
    total.update(code.encode())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it is still what published extractors are files of
            found: nn.Module = torch.jit.load(str(file), map_location="cpu")
    except Exception as error:
        hint = f"weights alone have no network: name FILE.py:NAME@{file.name}"
        raise ValueError(f"extractor {file.name}: not a TorchScript file of torch.jit.save; {hint}") from error
    return found
