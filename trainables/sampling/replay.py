"""Replay buffers of persistent chains, kept on the device: the three policies of the published methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trainables.config.trial import TrialConfig
from trainables.data.contrastive import contrastive
from trainables.data.pixels import RANGES, SIGNED, PixelRange
from trainables.sampling.initial import Initial

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""uint8 (N, C, H, W) to float (N, C, H, W) in 0..255."""
NEVER = 1e-12
"""Probability below which something is taken not to happen."""


def last_of_duplicates(indices: Tensor) -> Tensor:
    """For each position the last position with the same index, int64 (N,), without asking the host.

    Gathering values by it makes an indexed write independent of the order in which a device does it.
    """
    order = torch.arange(len(indices), device=indices.device)
    return torch.where(indices[:, None] == indices[None, :], order[None, :], -1).amax(dim=1)


@lru_cache
def most_restarts(count: int, probability: float) -> int:
    """A number of restarts that `count` chains pass with a probability below `NEVER`: 64 chains, rho = 5%: 21."""
    from scipy.special import bdtrc  # 0.1 s to import

    return next((number for number in range(count) if bdtrc(number, count, probability) < NEVER), count)


class ReplayBuffer:
    """M-EBM, JEM, JEM++ (sndnyang/mebm train_maebm.py:64-114): float images, filled from p0, overwritten in place.

    Args:
        size: |B|, which never grows.
        initial: p0, from which chains start and restart.
        reinit_probability: rho, the probability that a drawn chain restarts from p0.
        generator: source of indices and restarts; its device is the buffer's.
        pixels: range of the states that are drawn and written.

    Attributes:
        images: what is stored; `filled` of them are in use.
    """

    def __init__(
        self,
        size: int,
        initial: Initial,
        reinit_probability: float,
        generator: torch.Generator,
        pixels: PixelRange = SIGNED,
    ) -> None:
        self.initial, self.reinit_probability = initial, reinit_probability
        self.generator, self.pixels = generator, pixels
        self.images, self.filled = self._first(size), size

    def _first(self, size: int) -> Tensor:
        return self.pixels.from_signed(self.initial.sample(size, self.generator))

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Start states for `count` chains: indices, int64 (count,), uniform with replacement, and images.

        Each image, float32 (count, C, H, W), is with probability rho a fresh draw from p0, else that of its slot. How
        many restart is known to the device alone, and the host must not ask: `most_restarts` images are made, so once
        in some 10^12 iterations a restart is left out.
        """
        indices = self._indices(count)
        return indices, self.begin(indices)

    def begin(self, indices: Tensor) -> Tensor:
        """Start states of these slots, each a fresh draw from p0 with probability rho."""
        g, count = self.generator, len(indices)
        states = self._read(indices)
        restart = torch.rand(count, generator=g, device=g.device) < self.reinit_probability
        first = restart.to(torch.uint8).argsort(descending=True, stable=True)
        rows = first[: most_restarts(count, self.reinit_probability)]
        fresh = self.pixels.from_signed(self.initial.sample(count, g, rows))
        states[rows] = torch.where(restart[rows].view(-1, 1, 1, 1), fresh, states[rows])
        return states

    def distinct(self, count: int) -> Tensor:
        """Slots for `count` chains drawn without replacement: int64 (count,)."""
        g = self.generator
        return torch.rand(self.filled, generator=g, device=g.device).topk(count).indices

    def write(self, indices: Tensor, images: Tensor) -> None:
        """Store final states, drawn as `indices`; of duplicates the last one in the batch wins, on every device."""
        self.images[indices] = images.detach()[last_of_duplicates(indices)]

    def compare(self, count: int) -> Tensor:
        """`count` stored images as a draw gives them, without restarts: the neighbours of KL-EBM's entropy term."""
        return self._read(self._indices(count))

    def pool(self) -> Tensor:
        """What is stored, float (n, C, H, W) in [-1, 1]; n may be 0."""
        return self.pixels.to_signed(self.images)

    def state_dict(self) -> dict[str, Any]:
        """Everything it holds."""
        return {"images": self.images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.images.copy_(state["images"])

    def _indices(self, count: int) -> Tensor:
        g = self.generator
        return torch.randint(0, max(1, self.filled), (count,), generator=g, device=g.device)

    def _read(self, indices: Tensor) -> Tensor:
        return self.images[indices]


class _QuantisedBuffer(ReplayBuffer):
    """8-bit storage that starts empty; read back as (v + U(0, 1)) / 256 of the pixel range.

    The last row of `images` takes writes that are dropped; `seen` counts the images written so far, dropped ones too.
    """

    def __init__(
        self,
        size: int,
        initial: Initial,
        reinit_probability: float,
        generator: torch.Generator,
        pixels: PixelRange,
        augment: Augment | None = None,
    ) -> None:
        super().__init__(size, initial, reinit_probability, generator, pixels)
        self.capacity, self.augment = size, augment
        self.filled = self.seen = 0

    def _first(self, size: int) -> Tensor:
        g = self.generator
        shape = self.initial.sample(1, torch.Generator(g.device)).shape[1:]
        return torch.zeros(size + 1, *shape, dtype=torch.uint8, device=g.device)

    def _read(self, indices: Tensor) -> Tensor:
        stored = super()._read(indices)
        values = stored if self.augment is None else self.augment(stored, self.generator)
        return self.pixels.from_uint8(values, self.generator)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """See `ReplayBuffer.draw`; all start from p0 while there are few images (`ready`)."""
        g = self.generator
        fresh = self.pixels.from_signed(self.initial.sample(count, g))
        indices = self._indices(count)
        if not self.ready(count):
            return indices, fresh
        restart = torch.rand(count, 1, 1, 1, generator=g, device=g.device) < self.reinit_probability
        return indices, torch.where(restart, fresh, self._read(indices))

    def ready(self, count: int) -> bool:
        """Whether there are enough images for a batch of so many."""
        return self.filled >= count

    def pool(self) -> Tensor:
        """See `ReplayBuffer.pool`; grey levels are read at their middle."""
        return (self.images[: self.filled].float() + 0.5) / 256 * 2 - 1

    def state_dict(self) -> dict[str, Any]:
        """Everything it holds."""
        return {"images": self.images[: self.filled], "filled": self.filled, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.filled, self.seen = int(state["filled"]), int(state["seen"])
        self.images.zero_()
        self.images[: self.filled] = state["images"].to(self.images.device)


class RingBuffer(_QuantisedBuffer):
    """IGEBM, f-EBM (openai/ebm_code_release utils.py:40-98): the newest |B| chain states, used once more than a batch.

    The released list holds up to a batch more than |B| for a while before it wraps; here |B| is exact.
    """

    def ready(self, count: int) -> bool:
        """More than a batch of images."""
        return self.filled > count

    def write(self, indices: Tensor, images: Tensor) -> None:  # noqa: ARG002
        """Append; the oldest images go. `indices` are not used."""
        count = len(images)
        place = (torch.arange(count, device=images.device) + self.seen) % self.capacity
        self.images[place] = self.pixels.to_uint8(images.detach())
        self.seen += count
        self.filled = min(self.capacity, self.filled + count)


class ReservoirBuffer(_QuantisedBuffer):
    """KL-EBM (yilundu/improved_contrastive_divergence utils.py:166-299): a uniform sample of all chain states seen.

    It grows by whole batches until the released code's write position wraps, so it settles at |B| rounded up to a
    whole batch (10,112 for 10,000 and batches of 128). Most of what it holds was made by models long gone, so what is
    scored and shown (`pool`) is the newest |B| chain states, which are kept beside it and have no part in training.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        initial: Initial,
        reinit_probability: float,
        generator: torch.Generator,
        pixels: PixelRange,
        augment: Augment | None = None,
    ) -> None:
        capacity = -(-size // batch_size) * batch_size
        super().__init__(capacity, initial, reinit_probability, generator, pixels, augment)
        self.newest = RingBuffer(size, initial, reinit_probability, generator, pixels)

    def write(self, indices: Tensor, images: Tensor) -> None:
        """Append until full; then image n of all replaces a uniform one of n slots, if the buffer has that slot.

        `indices` are not used. Of two that fall on one slot the later one stays.
        """
        values, count = self.pixels.to_uint8(images.detach()), len(images)
        self.newest.write(indices, images)
        if self.filled < self.capacity:
            end = min(self.capacity, self.filled + count)
            self.images[self.filled : end] = values[: end - self.filled]
            self.filled = end
        else:
            g = self.generator
            total = torch.arange(count, device=g.device) + (self.seen + 1)
            # Uniform on 0..n-1; float64, because n grows to tens of millions.
            slot = (torch.rand(count, generator=g, device=g.device, dtype=torch.float64) * total).to(torch.int64)
            slot = torch.where(slot < self.capacity, slot, self.capacity)
            self.images[slot] = values[last_of_duplicates(slot)]
        self.seen += count

    def pool(self) -> Tensor:
        """The newest |B| chain states, as `ReplayBuffer.pool`."""
        return self.newest.pool()

    def state_dict(self) -> dict[str, Any]:
        """Everything it holds."""
        return super().state_dict() | {"newest": self.newest.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        super().load_state_dict(state)
        self.newest.load_state_dict(state["newest"])


def build_buffer(trial: TrialConfig, initial: Initial, generator: torch.Generator) -> ReplayBuffer | None:
    """The buffer of a trial's policy: `replace`, `ring`, `reservoir`, or None for `none`."""
    parts = initial, trial.reinit_probability, generator, RANGES[trial.pixel_range]
    augment = contrastive if trial.buffer_augment == "contrastive" else None
    if trial.buffer == "ring":
        return RingBuffer(trial.buffer_size, *parts, augment)
    if trial.buffer == "reservoir":
        return ReservoirBuffer(trial.buffer_size, trial.batch_size, *parts, augment)
    return ReplayBuffer(trial.buffer_size, *parts) if trial.buffer == "replace" else None
