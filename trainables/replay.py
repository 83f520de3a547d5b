"""Replay buffers of persistent chains, kept on the device: the three policies of the published methods.

- `ReplayBuffer` (M-EBM, JEM, JEM++; sndnyang/mebm train_maebm.py:64-114): float images, filled from p0, drawn with
  replacement and overwritten in place.
- `RingBuffer` (IGEBM, f-EBM; openai/ebm_code_release utils.py:40-98): 8-bit images, starts empty, the oldest goes.
- `ReservoirBuffer` (KL-EBM; yilundu/improved_contrastive_divergence utils.py:166-299): 8-bit images, a uniform sample
  of every chain state so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from trainables.initial import Initial
from trainables.pixels import SIGNED, PixelRange

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""uint8 (N, C, H, W) to float (N, C, H, W) in 0..255."""


class Buffer(Protocol):
    """What a trainer needs of a replay buffer."""

    @property
    def filled(self) -> int:
        """Images in it."""
        ...

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Indices int64 (count,) and start states float32 (count, C, H, W) in the method's pixel range."""
        ...

    def write(self, indices: Tensor, images: Tensor) -> None:
        """Store final states, drawn as `indices`."""
        ...

    def compare(self, count: int) -> Tensor:
        """`count` stored images as a draw gives them, without restarts, in the method's pixel range."""
        ...

    def pool(self) -> Tensor:
        """What is stored, float (n, C, H, W) in [-1, 1]; n may be 0."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything it holds."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        ...


def last_of_duplicates(indices: Tensor) -> Tensor:
    """For each position the last position with the same index, int64 (N,), without asking the host.

    Gathering values by it makes an indexed write independent of the order in which a device does it.
    """
    order = torch.arange(len(indices), device=indices.device)
    return torch.where(indices[:, None] == indices[None, :], order[None, :], -1).amax(dim=1)


NEVER = 1e-12
"""Probability below which something is taken not to happen."""


@lru_cache
def most_restarts(count: int, probability: float) -> int:
    """A number of restarts that `count` chains pass with a probability below `NEVER`: 64 chains, rho = 5%: 21."""
    if not 0 < probability < 1:
        return count if probability >= 1 else 0
    below = 0.0
    for restarts in range(count):
        ways = math.lgamma(count + 1) - math.lgamma(restarts + 1) - math.lgamma(count - restarts + 1)
        below += math.exp(ways + restarts * math.log(probability) + (count - restarts) * math.log1p(-probability))
        if below > 1 - NEVER:
            return restarts
    return count


def with_restarts(
    states: Tensor, probability: float, initial: Initial, pixels: PixelRange, generator: torch.Generator
) -> Tensor:
    """Each chain restarts from p0 with the probability, else keeps its state; p0 is drawn only where it is needed.

    How many restart is known to the device alone, and the host must not ask: `most_restarts` images are made, so once
    in some 10^12 iterations a restart is left out.

    Args:
        states: float (N, C, H, W), modified in place.
    """
    count, g = len(states), generator
    restart = torch.rand(count, generator=g, device=g.device) < probability
    rows = restart.to(torch.uint8).argsort(descending=True, stable=True)[: most_restarts(count, probability)]
    fresh = pixels.from_signed(initial.sample(count, g, rows))
    states[rows] = torch.where(restart[rows].view(-1, 1, 1, 1), fresh, states[rows])
    return states


class ReplayBuffer:
    """|B| chain states, drawn with replacement and overwritten in place; it never grows.

    Args:
        size: slots.
        initial: p0; fills the buffer and restarts chains.
        reinit_probability: rho, the probability that a drawn chain restarts from p0.
        generator: source of indices and restarts; its device is the buffer's.
        pixels: range of the stored images.
    """

    def __init__(
        self,
        size: int,
        initial: Initial,
        reinit_probability: float,
        generator: torch.Generator,
        pixels: PixelRange = SIGNED,
    ) -> None:
        self.initial, self.reinit_probability, self.generator, self.pixels = (
            initial,
            reinit_probability,
            generator,
            pixels,
        )
        self.images = pixels.from_signed(initial.sample(size, generator))

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Start states for `count` chains.

        Returns:
            indices: int64 (count,), uniform with replacement.
            starts: float32 (count, C, H, W); each with probability rho a fresh draw from p0, else its slot's image.
        """
        g = self.generator
        indices = torch.randint(0, len(self.images), (count,), generator=g, device=g.device)
        return indices, with_restarts(self.images[indices], self.reinit_probability, self.initial, self.pixels, g)

    def write(self, indices: Tensor, images: Tensor) -> None:
        """Put final states back; of duplicates the last one in the batch wins, on every device."""
        self.images[indices] = images.detach()[last_of_duplicates(indices)]

    @property
    def filled(self) -> int:
        """Images in it: always all of them."""
        return len(self.images)

    def compare(self, count: int) -> Tensor:
        """See `Buffer.compare`."""
        g = self.generator
        return self.images[torch.randint(0, len(self.images), (count,), generator=g, device=g.device)]

    def pool(self) -> Tensor:
        """See `Buffer.pool`."""
        return self.pixels.to_signed(self.images)

    def state_dict(self) -> dict[str, Any]:
        """See `Buffer.state_dict`."""
        return {"images": self.images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Buffer.load_state_dict`."""
        self.images.copy_(state["images"])


class _QuantisedBuffer:
    """8-bit storage that starts empty; read back as (v + U(0, 1)) / 256 of the pixel range.

    Attributes:
        images: uint8 (capacity + 1, C, H, W); the last row takes writes that are dropped.
        filled: rows in use.
        seen: images written so far, dropped ones included.
    """

    def __init__(
        self,
        capacity: int,
        initial: Initial,
        reinit_probability: float,
        generator: torch.Generator,
        pixels: PixelRange,
        augment: Augment | None = None,
    ) -> None:
        self.capacity, self.initial, self.reinit_probability = capacity, initial, reinit_probability
        self.generator, self.pixels, self.augment = generator, pixels, augment
        shape = initial.sample(1, torch.Generator(generator.device)).shape[1:]
        self.images = torch.zeros(capacity + 1, *shape, dtype=torch.uint8, device=generator.device)
        self.filled = self.seen = 0

    def _read(self, indices: Tensor) -> Tensor:
        stored = self.images[indices]
        values = stored if self.augment is None else self.augment(stored, self.generator)
        return self.pixels.from_uint8(values, self.generator)

    def _indices(self, count: int) -> Tensor:
        g = self.generator
        return torch.randint(0, max(1, self.filled), (count,), generator=g, device=g.device)

    def compare(self, count: int) -> Tensor:
        """See `Buffer.compare`; KL-EBM's entropy term takes its neighbours here."""
        return self._read(self._indices(count))

    def pool(self) -> Tensor:
        """See `Buffer.pool`; grey levels are read at their middle."""
        values = (self.images[: self.filled].float() + 0.5) / 256
        return values * 2 - 1

    def state_dict(self) -> dict[str, Any]:
        """See `Buffer.state_dict`."""
        return {"images": self.images[: self.filled], "filled": self.filled, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Buffer.load_state_dict`."""
        self.filled, self.seen = int(state["filled"]), int(state["seen"])
        self.images.zero_()
        self.images[: self.filled] = state["images"].to(self.images.device)

    def _draw(self, count: int, *, ready: bool) -> tuple[Tensor, Tensor]:
        g = self.generator
        fresh = self.pixels.from_signed(self.initial.sample(count, g))
        indices = self._indices(count)
        if not ready:
            return indices, fresh
        restart = torch.rand(count, 1, 1, 1, generator=g, device=g.device) < self.reinit_probability
        return indices, torch.where(restart, fresh, self._read(indices))


class RingBuffer(_QuantisedBuffer):
    """The newest |B| chain states. Used once it holds more than one batch; until then chains start from p0.

    The released list holds up to a batch more than |B| for a while before it wraps; here |B| is exact.
    """

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """See `Buffer.draw`; the buffer is used once more than `count` images are in it."""
        return self._draw(count, ready=self.filled > count)

    def write(self, indices: Tensor, images: Tensor) -> None:  # noqa: ARG002
        """Append; the oldest images go. `indices` are not used."""
        count = len(images)
        place = (torch.arange(count, device=images.device) + self.seen) % self.capacity
        self.images[place] = self.pixels.to_uint8(images.detach())
        self.seen += count
        self.filled = min(self.capacity, self.filled + count)


class ReservoirBuffer(_QuantisedBuffer):
    """A uniform sample of all chain states seen (reservoir sampling).

    It grows by whole batches until the released code's write position wraps, so it settles at |B| rounded up to a
    whole batch (10,112 for 10,000 and batches of 128); `batch_size` is that batch.

    Most of what it holds was made by models long gone, so what is scored and shown (`pool`) is not that: it is the
    newest |B| chain states, which are kept beside it and have no part in training.
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

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """See `Buffer.draw`; the buffer is used once at least `count` images are in it."""
        return self._draw(count, ready=self.filled >= count)

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
            self.seen += count
            return
        g = self.generator
        total = torch.arange(count, device=g.device) + (self.seen + 1)
        # Uniform on 0..n-1; float64, because n grows to tens of millions.
        slot = (torch.rand(count, generator=g, device=g.device, dtype=torch.float64) * total).to(torch.int64)
        slot = torch.where(slot < self.capacity, slot, self.capacity)
        self.images[slot] = values[last_of_duplicates(slot)]
        self.seen += count

    def pool(self) -> Tensor:
        """The newest |B| chain states, as `Buffer.pool`."""
        return self.newest.pool()

    def state_dict(self) -> dict[str, Any]:
        """See `Buffer.state_dict`."""
        return super().state_dict() | {"newest": self.newest.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Buffer.load_state_dict`."""
        super().load_state_dict(state)
        self.newest.load_state_dict(state["newest"])


def build_buffer(
    policy: str,
    size: int,
    batch_size: int,
    initial: Initial,
    reinit_probability: float,
    generator: torch.Generator,
    pixels: PixelRange,
    augment: Augment | None = None,
) -> ReplayBuffer | RingBuffer | ReservoirBuffer | None:
    """The buffer of a policy: `replace`, `ring`, `reservoir`, or None for `none`."""
    if policy == "ring":
        return RingBuffer(size, initial, reinit_probability, generator, pixels, augment)
    if policy == "reservoir":
        return ReservoirBuffer(size, batch_size, initial, reinit_probability, generator, pixels, augment)
    return ReplayBuffer(size, initial, reinit_probability, generator, pixels) if policy == "replace" else None
