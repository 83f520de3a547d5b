"""Batches of training images as a method asks for them: indices that the host draws, pixels that the device makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainables.data.batches import CROP_PADDING, Batches, crop_flip, flip
from trainables.data.datasets import ImageData
from trainables.data.pixels import PixelRange
from trainables.training.method import Batch, Stream


class Streams:
    """The streams of one run, made in a pixel range and a memory layout, with streams of random numbers by purpose."""

    def __init__(
        self,
        data: ImageData,
        generators: Mapping[str, torch.Generator],
        pixels: PixelRange,
        layout: torch.memory_format,
    ) -> None:
        self._data, self._generators, self._pixels, self._layout = data, generators, pixels, layout
        self._specs: dict[str, Stream] = {}
        self._batches: dict[str, Batches] = {}
        # The host writes indices into memory that stays, because a captured graph reads them from where they are.
        self._index: dict[str, Tensor] = {}

    def match(self, wanted: Mapping[str, Stream]) -> None:
        """From now on these; a stream equal to one that is there goes on where it was.

        Raises:
            ValueError: images are too small for an augmentation.
        """
        small = min(self._data.shape[1:]) <= CROP_PADDING
        if small and any(stream.augment == "crop_flip" for stream in wanted.values()):
            raise ValueError(f"augment: crop_flip needs images larger than {CROP_PADDING} pixels; use augment: none")
        for name, stream in wanted.items():
            if self._specs.get(name) != stream:
                g = self._generators[stream.random[0]]
                self._batches[name] = Batches(len(self._data.images), stream.batch_size, g)
                self._index[name] = torch.zeros(stream.batch_size, dtype=torch.int64, device=g.device)
        self._specs = dict(wanted)

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def advance(self) -> None:
        """Draw the indices of the coming iteration."""
        for name, stream in self._specs.items():
            if stream.order == "shuffled":
                index = self._batches[name].next()
            else:
                g = self._generators[stream.random[0]]
                index = torch.randint(0, len(self._data.images), (stream.batch_size,), generator=g, device=g.device)
            self._index[name].copy_(index)

    def batch(self, name: str) -> Batch:
        """The images of this iteration, augmented and with noise."""
        stream, index = self._specs[name], self._index[name]
        augment, noise = (self._generators[purpose] for purpose in stream.random[1:])
        images = self._data.images[index]
        if stream.augment == "crop_flip":
            images = crop_flip(images, augment)
        elif stream.augment == "flip":
            images = flip(images, augment)
        x = self._pixels.from_uint8(images, augment if stream.dequantise else None)
        if stream.noise_std != 0:
            x = x + stream.noise_std * torch.randn(x.shape, generator=noise, device=x.device)
        return Batch(x.contiguous(memory_format=self._layout), self._data.labels[index] if stream.labelled else None)

    def state_dict(self) -> dict[str, Any]:
        """Order of the images and place in it, by stream."""
        return {n: self._batches[n].state_dict() | {"batch_size": spec.batch_size} for n, spec in self._specs.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, with the sizes of its batches, which a stage may have changed."""
        sizes = {name: state[name].get("batch_size", spec.batch_size) for name, spec in self._specs.items()}
        self.match({name: replace(spec, batch_size=sizes[name]) for name, spec in self._specs.items()})
        for name in self._specs:
            self._batches[name].load_state_dict(state[name])
