"""Inception's features: torch-fidelity's inception-v3-compat, built once per process."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.config.protocols import Resize
from trainables.evaluation.frechet import DISTANCES
from trainables.networks.arithmetic import precision_kept, set_precision
from trainables.results.progress import counted

INCEPTION_VARIABLE = "MEBM_INCEPTION_WEIGHTS"
"""Environment variable with a local file of torch-fidelity's Inception weights."""
CANONICAL_FILE = "pt_inception-2015-12-05-6726825d.pth"
"""Name of torch-fidelity's own download."""
POOL, LOGITS, POOL_SIZE = "2048", "logits_unbiased", 2048
SIDE = 299
"""Pixels of a side of the images that the network sees."""
_BATCH = {"cpu": 50, "cuda": 125}
"""Images per forward. More would make a GPU no faster, and cost memory that other trials may need."""
_PER_COPY = 2000
"""Images whose features are gathered on the device before the host waits for them."""


class NoFeaturesError(RuntimeError):
    """Features are not to be had: no weights, no memory for one image, no finite ones of the reference. One line."""


@dataclass(frozen=True)
class Features:
    """Of N images: `pool` float32 (N, 2048) and `logits` float32 (N, 1008), on the CPU."""

    pool: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.pool)


def clean_resize(images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) to float32 (N, C, 299, 299) in [0, 255], as clean-fid does (Parmar et al. 2022).

    Pillow's bicubic of every channel as floats, with antialiasing and without rounding; PyTorch has the same filter.
    """
    resized = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 255)


class _OfCleanImages(torch.nn.Module):
    """torch-fidelity's network behind `clean_resize`. Its own forward resizes, and takes no floats."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        *layers, last = self.network.children()  # in the order of its forward, which a test compares
        x = (clean_resize(images) - 128) / 128
        for layer in layers:
            x = layer(x)
        pool = x.flatten(1)
        return pool, pool @ last.weight.T  # type: ignore[operator]


class Inception:
    """The feature network. `id`: name of the network, hash of its weights' file, and resizing if not the network's."""

    what = "Inception"
    """In messages."""
    cpu_layout: ClassVar[torch.memory_format] = torch.channels_last
    """Layout of its weights on a CPU, which makes it 1.8 times as fast; the features are the same to rounding."""

    def __init__(self, network: torch.nn.Module, identity: str) -> None:
        self._network, self.id = network, identity

    def features(self, images: Tensor, device: torch.device, batch_size: int | None = None) -> Features:
        """uint8 (N, 1 or 3, H, W) on any device to features on the CPU; grey images as three equal channels.

        The network stays there until `release`; where memory is short it takes half as many. NoFeaturesError: one is
        too much.
        """
        size = batch_size or _BATCH[device.type]
        while True:
            try:
                return self._features(images, device, size)
            except torch.OutOfMemoryError as error:
                if size == 1:
                    self.release()
                    raise NoFeaturesError(f"no memory left on {device} for {self.what}'s features") from error
            size //= 2
            DISTANCES.clear()
            gc.collect()
            _give_back(device)

    def _features(self, images: Tensor, device: torch.device, size: int) -> Features:
        pools: list[Tensor] = []
        logits: list[Tensor] = []
        self._network.to(device)
        if device.type == "cpu":
            self._network.to(memory_format=self.cpu_layout)
        with torch.no_grad(), precision_kept(), counted(f"scoring images with {self.what}", len(images)) as advance:
            set_precision("fp32")  # whatever the trial's: a number must not depend on how its model was trained
            for group in images.split(max(1, _PER_COPY // size) * size):
                found = []
                for part in group.to(device).split(size):
                    found.append(self._network(part.expand(-1, 3, -1, -1)))
                    advance(len(part))
                pools.append(torch.cat([pool.float() for pool, _ in found]).cpu())
                logits.append(torch.cat([logit.float() for _, logit in found]).cpu())
        _give_back(device)
        return Features(torch.cat(pools), torch.cat(logits))

    @cached_property
    def of_clean_images(self) -> Inception:
        """The same network, of images resized by `clean_resize`."""
        return Inception(_OfCleanImages(self._network), f"{self.id}-clean-fid")

    def release(self) -> None:
        """Leave the device; the next `features` comes back to it."""
        self._network.to("cpu")


def _give_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


_LOADED: dict[str | None, Inception] = {}
_MISSING: dict[str | None, str] = {}
"""Networks of this process by the weights' file, and why one could not be had: the download is tried once."""


def inception(resize: Resize = "tensorflow") -> Inception:
    """The network of `MEBM_INCEPTION_WEIGHTS`, or else torch-fidelity's download. NoFeaturesError: there are none."""
    path = os.environ.get(INCEPTION_VARIABLE) or None
    if path in _MISSING:
        raise NoFeaturesError(_MISSING[path])
    if path not in _LOADED:
        _LOADED[path] = _load(path)
    return _LOADED[path].of_clean_images if resize == "clean-fid" else _LOADED[path]


def release() -> None:
    """Take every network of this process off its device."""
    for network in _LOADED.values():
        network.release()


def _load(path: str | None) -> Inception:
    if path is not None and not Path(path).is_file():
        raise NoFeaturesError(f"{INCEPTION_VARIABLE}={path} is not a file")
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torch_fidelity.utils import create_feature_extractor

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # torch-fidelity itself would read the file with pickle, which executes what is in it.
            if path is None:
                there = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
                expected = there.stem.rpartition("-")[2]  # of its hash
                if there.is_file() and not hashlib.sha256(there.read_bytes()).hexdigest().startswith(expected):
                    raise ValueError(f"{there} is another file than its name says")
                with redirect_stdout(sys.stderr):  # it says there that it downloads
                    weights = torch.hub.load_state_dict_from_url(
                        URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
                    )
            else:
                weights = torch.load(path, map_location="cpu", weights_only=True)
            data = io.BytesIO()
            torch.save(weights, data)
            data.seek(0)
            # Only keywords that torch-fidelity knows: it ignores a misspelt one without a word.
            options = {"cuda": False, "feature_extractor_weights_path": data, "verbose": False}
            network = create_feature_extractor("inception-v3-compat", [POOL, LOGITS], **options)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if path is not None:
            raise NoFeaturesError(f"{INCEPTION_VARIABLE}={path}: {reason}") from error
        _MISSING[path] = (
            f"Inception weights not to be had ({reason}); put the file {CANONICAL_FILE} somewhere and set "
            f"{INCEPTION_VARIABLE} to it"
        )
        raise NoFeaturesError(_MISSING[path]) from error
    file = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / CANONICAL_FILE
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8] if file.is_file() else "download"
    return Inception(network, f"inception-v3-compat-{digest}")
