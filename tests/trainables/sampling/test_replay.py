"""The three replay buffers against literal loops (algorithms.md, sections 2.3, 8 and 10)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainables.config.trial import TrialConfig
from trainables.data.pixels import SIGNED, UNIT, PixelRange
from trainables.sampling.initial import Uniform
from trainables.sampling.replay import ReplayBuffer, ReservoirBuffer, RingBuffer, build_buffer, last_of_duplicates

SHAPE = (1, 2, 2)


def _twin(generator: torch.Generator) -> torch.Generator:
    copy = torch.Generator()
    copy.set_state(generator.get_state())
    return copy


def _trial(policy: str, rho: float, pixels: PixelRange = UNIT) -> TrialConfig:
    fields = {"buffer": policy, "buffer_size": 20, "batch_size": 8, "reinit_probability": rho}
    return TrialConfig.model_validate(fields | {"pixel_range": "unit" if pixels == UNIT else "signed"})


def _buffer(rho: float, size: int = 40, seed: int = 0) -> tuple[ReplayBuffer, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return ReplayBuffer(size, Uniform(SHAPE), rho, generator), generator


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_draws_and_writes_as_a_literal_loop(rho: float) -> None:
    buffer, generator = _buffer(rho)
    state = [image.clone() for image in buffer.images]
    values = torch.Generator().manual_seed(9)
    for _ in range(30):
        twin = _twin(generator)
        indices, starts = buffer.draw(16)
        wanted_index = torch.randint(0, 40, (16,), generator=twin)
        chance = torch.rand(16, generator=twin)
        fresh = Uniform(SHAPE).sample(16, twin)
        assert indices.tolist() == wanted_index.tolist()
        for i in range(16):
            expected = fresh[i] if chance[i] < rho else state[int(wanted_index[i])]
            assert torch.equal(starts[i], expected)
        final = torch.rand(16, *SHAPE, generator=values)
        buffer.write(indices, final)
        for i in range(16):
            state[int(wanted_index[i])] = final[i]
        assert torch.equal(buffer.images, torch.stack(state))


def test_starts_as_p0() -> None:
    generator = torch.Generator().manual_seed(4)
    twin = _twin(generator)
    buffer = ReplayBuffer(50, Uniform(SHAPE), 0.05, generator)
    assert torch.equal(buffer.images, Uniform(SHAPE).sample(50, twin))


def test_of_duplicates_the_last_write_wins() -> None:
    buffer, _ = _buffer(0.05)
    before = buffer.images.clone()
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, *SHAPE)
    buffer.write(torch.tensor([3, 5, 3, 7, 5, 3]), images)
    assert buffer.images[3].unique().tolist() == [5]
    assert buffer.images[5].unique().tolist() == [4]
    assert buffer.images[7].unique().tolist() == [3]
    rest = [i for i in range(40) if i not in (3, 5, 7)]
    assert torch.equal(buffer.images[rest], before[rest])


def test_drawing_does_not_change_the_buffer_nor_share_with_it() -> None:
    buffer, _ = _buffer(0.0)
    before = buffer.images.clone()
    _, starts = buffer.draw(16)
    starts.zero_()
    assert torch.equal(buffer.images, before)


def test_never_grows() -> None:
    buffer, _ = _buffer(0.5, size=20)
    for _ in range(50):
        indices, starts = buffer.draw(64)
        assert starts.shape == (64, *SHAPE) and indices.max() < 20 and indices.min() >= 0
        buffer.write(indices, starts)
    assert buffer.images.shape == (20, *SHAPE)


def test_rates() -> None:
    """Indices are uniform with replacement; a chain restarts with probability rho, independently of its slot."""
    buffer, _ = _buffer(0.05, size=10)
    buffer.images.fill_(7.0)  # outside p0's support, so a restart shows
    indices, starts = buffer.draw(40_000)
    assert (starts[:, 0, 0, 0] != 7).double().mean().item() == pytest.approx(0.05, abs=0.005)
    counts = torch.bincount(indices, minlength=10)
    assert counts.min() > 3700 and counts.max() < 4300


def test_writes_hold_no_graph() -> None:
    buffer, _ = _buffer(0.05)
    buffer.write(torch.tensor([1]), torch.ones(1, *SHAPE, requires_grad=True) * 0.5)
    assert not buffer.images.requires_grad


def test_in_the_unit_range() -> None:
    generator = torch.Generator().manual_seed(4)
    twin = _twin(generator)
    buffer = ReplayBuffer(50, Uniform(SHAPE), 1.0, generator, UNIT)
    torch.testing.assert_close(buffer.images, (Uniform(SHAPE).sample(50, twin) + 1) / 2)
    _, starts = buffer.draw(500)
    assert starts.min() >= 0 and starts.max() <= 1 and starts.min() < 0.1
    torch.testing.assert_close(buffer.pool(), buffer.images * 2 - 1)


def test_last_of_duplicates() -> None:
    assert last_of_duplicates(torch.tensor([3, 5, 3, 7, 5, 3])).tolist() == [5, 4, 5, 3, 4, 5]


# ------------------------------------------------------------------------------------------------- 8-bit buffers


def _levels(image: Tensor) -> list[int]:
    """floor(clip(x, 0, 1) * 255) of every pixel, in plain Python."""
    return [int(min(max(float(v), 0.0), 1.0) * 255) for v in image.flatten().tolist()]


def _check_draw(
    buffer: RingBuffer | ReservoirBuffer, state: list[list[int]], count: int, rho: float, *, ready: bool
) -> tuple[Tensor, Tensor]:
    """A draw against: p0, and where ready, with probability 1 - rho, a stored image as v / 256 + U(0, 1/256)."""
    twin = _twin(buffer.generator)
    indices, starts = buffer.draw(count)
    fresh = (Uniform(SHAPE).sample(count, twin) + 1) / 2
    wanted_index = torch.randint(0, max(1, len(state)), (count,), generator=twin)
    if not ready:
        torch.testing.assert_close(starts, fresh)
        return indices, starts
    chance = torch.rand(count, generator=twin)
    noise = torch.rand(count, *SHAPE, generator=twin)
    assert indices.tolist() == wanted_index.tolist()
    for i in range(count):
        stored = torch.tensor(state[int(wanted_index[i])], dtype=torch.float32).view(SHAPE)
        expected = fresh[i] if chance[i] < rho else stored / 256 + noise[i] / 256
        torch.testing.assert_close(starts[i], expected, rtol=0, atol=1e-6)
    return indices, starts


def _check_storage(buffer: RingBuffer | ReservoirBuffer, state: list[list[int]]) -> None:
    assert buffer.filled == len(state)
    assert buffer.images.dtype == torch.uint8
    assert buffer.images[: buffer.filled].flatten(1).tolist() == state
    assert buffer.state_dict()["images"].flatten(1).tolist() == state
    if isinstance(buffer, ReservoirBuffer):
        return  # what it shows is another matter: see below
    wanted = (torch.tensor(state, dtype=torch.float64).view(-1, *SHAPE) + 0.5) / 256 * 2 - 1
    torch.testing.assert_close(buffer.pool().double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.05, 0.4])
def test_ring_as_a_literal_loop(rho: float) -> None:
    """Starts empty, appended to, the oldest overwritten; used once it holds more than one batch."""
    generator = torch.Generator().manual_seed(0)
    buffer = RingBuffer(20, Uniform(SHAPE), rho, generator, UNIT)
    state: list[list[int]] = []
    place = 0
    values = torch.Generator().manual_seed(9)
    for turn in range(14):
        indices, _ = _check_draw(buffer, state, 8, rho, ready=len(state) > 8)
        assert (len(state) > 8) == (turn >= 2), "one batch alone is not enough"
        final = torch.rand(8, *SHAPE, generator=values) * 1.2 - 0.1
        buffer.write(indices, final)
        for image in final:
            if len(state) < 20:
                state.append(_levels(image))
            else:
                state[place] = _levels(image)
            place = (place + 1) % 20
        _check_storage(buffer, state)
    assert buffer.seen == 14 * 8 and buffer.filled == 20


class _Uniforms:
    """The numbers a reservoir draws for its slots, from a copy of its generator."""

    def __init__(self, generator: torch.Generator, count: int) -> None:
        self.values = torch.rand(count, generator=_twin(generator), dtype=torch.float64).tolist()


@pytest.mark.parametrize("size", [20, 24])
def test_reservoir_as_a_literal_loop(size: int) -> None:
    """Grows by whole batches until the write position of the released code wraps; then slot randint(0, n - 1).

    The released condition, restated: extend while next >= len(storage), next = (next + batch) mod size.
    """
    generator = torch.Generator().manual_seed(1)
    buffer = ReservoirBuffer(size, 8, Uniform(SHAPE), 0.3, generator, UNIT)
    state: list[list[int]] = []
    position = seen = 0
    values = torch.Generator().manual_seed(9)
    for turn in range(15):
        assert (len(state) >= 8) == (turn >= 1)
        indices, _ = _check_draw(buffer, state, 8, 0.3, ready=len(state) >= 8)
        final = torch.rand(8, *SHAPE, generator=values)
        uniforms = _Uniforms(generator, 8).values
        buffer.write(indices, final)
        if position >= len(state):
            state += [_levels(image) for image in final]
            seen += 8
        else:
            for image, u in zip(final, uniforms, strict=True):
                seen += 1
                slot = int(u * seen)
                if slot < len(state):
                    state[slot] = _levels(image)
        position = (position + 8) % size
        _check_storage(buffer, state)
        assert buffer.seen == seen
    assert len(state) == 24


def test_published_reservoir_settles_at_79_batches() -> None:
    buffer = ReservoirBuffer(10_000, 128, Uniform(SHAPE), 0.001, torch.Generator(), UNIT)
    images = torch.rand(128, *SHAPE, generator=torch.Generator().manual_seed(0))
    for _ in range(90):
        buffer.write(torch.zeros(128, dtype=torch.int64), images)
    assert buffer.filled == len(buffer.images) - 1 == 10_112
    assert len(buffer.pool()) == 10_000


def test_the_newest_states_of_a_reservoir_are_scored() -> None:
    """The reservoir itself is a sample of the whole training: half of it comes from models of its first half."""
    buffer = ReservoirBuffer(40, 8, Uniform(SHAPE), 0.0, torch.Generator().manual_seed(0), UNIT)
    for turn in range(100):
        buffer.write(torch.zeros(8, dtype=torch.int64), torch.full((8, *SHAPE), (turn + 0.5) / 255))
    made = ((buffer.pool()[:, 0, 0, 0] + 1) * 128).int()
    assert sorted(made.tolist()) == sorted(turn for turn in range(95, 100) for _ in range(8))
    trained_on = (buffer.compare(1000)[:, 0, 0, 0] * 256).int()
    assert int((trained_on < 50).sum()) > 250
    copy = ReservoirBuffer(40, 8, Uniform(SHAPE), 0.0, torch.Generator().manual_seed(1), UNIT)
    copy.load_state_dict(buffer.state_dict())
    assert torch.equal(copy.pool(), buffer.pool()) and torch.equal(copy.images[:40], buffer.images[:40])


def test_published_ring_holds_10000() -> None:
    buffer = RingBuffer(10_000, Uniform(SHAPE), 0.05, torch.Generator(), UNIT)
    images = torch.rand(128, *SHAPE, generator=torch.Generator().manual_seed(0))
    for _ in range(90):
        buffer.write(torch.zeros(128, dtype=torch.int64), images)
    assert buffer.filled == len(buffer.pool()) == 10_000


def test_reservoir_is_a_uniform_sample_of_everything() -> None:
    """Each of n images is in the reservoir with probability capacity / n, early or late."""
    counts = torch.zeros(200)
    for seed in range(150):
        buffer = ReservoirBuffer(20, 10, Uniform(SHAPE), 0.0, torch.Generator().manual_seed(seed), UNIT)
        for first in range(0, 200, 10):
            level = (torch.arange(first, first + 10) + 0.5) / 255
            buffer.write(torch.zeros(10, dtype=torch.int64), level.view(10, 1, 1, 1).expand(10, *SHAPE))
        kept = buffer.images[: buffer.filled, 0, 0, 0].long()
        assert len(kept.unique()) == len(kept) == 20
        counts[kept] += 1
    share = counts.view(4, 50).mean(1) / 150
    assert share.tolist() == pytest.approx([0.1] * 4, abs=0.015)


@pytest.mark.parametrize("kind", ["ring", "reservoir"])
def test_share_that_restarts(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    buffer = build_buffer(_trial(kind, 0.05), Uniform(SHAPE), generator)
    assert buffer is not None
    buffer.write(torch.arange(8), torch.full((8, *SHAPE), 0.5))
    buffer.write(torch.arange(8), torch.full((8, *SHAPE), 0.5))
    starts = torch.cat([buffer.draw(8)[1] for _ in range(1500)])
    stored = ((starts * 256).floor() == 127).flatten(1).all(1)
    assert 1 - stored.double().mean().item() == pytest.approx(0.05, abs=0.008)


@pytest.mark.parametrize("kind", ["ring", "reservoir"])
def test_augmented_on_the_way_out(kind: str) -> None:
    """The augmentation sees what is stored, in 8 bits; what is stored stays; neighbours come the same way."""
    seen: list[Tensor] = []

    def darken(images: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(images.clone())
        return images.float() * 0.5 + torch.rand(1, generator=generator)

    generator = torch.Generator().manual_seed(0)
    parts = Uniform(SHAPE), 0.0, generator, UNIT, darken
    buffer = RingBuffer(20, *parts) if kind == "ring" else ReservoirBuffer(20, 4, *parts)
    for level in (0.25, 0.75):
        buffer.write(torch.arange(4), torch.full((4, *SHAPE), level))
    before = buffer.state_dict()["images"].clone()
    twin = _twin(generator)
    _, starts = buffer.draw(4)
    assert seen[0].dtype == torch.uint8 and set(seen[0].unique().tolist()) <= {63, 191}
    Uniform(SHAPE).sample(4, twin)
    torch.randint(0, 8, (4,), generator=twin)
    torch.rand(4, generator=twin)
    shift, noise = torch.rand(1, generator=twin), torch.rand(4, *SHAPE, generator=twin)
    torch.testing.assert_close(starts, (seen[0].float() * 0.5 + shift + noise) / 256, rtol=0, atol=1e-6)
    compared = buffer.compare(9)
    assert compared.shape == (9, *SHAPE) and len(seen) == 2
    assert compared.max() < 0.4, "neighbours are augmented and never restarted"
    assert torch.equal(buffer.state_dict()["images"], before)


def test_neighbours_of_the_float_buffer() -> None:
    buffer, generator = _buffer(1.0)
    twin = _twin(generator)
    assert torch.equal(buffer.compare(7), buffer.images[torch.randint(0, 40, (7,), generator=twin)])


@pytest.mark.parametrize("pixels", [SIGNED, UNIT])
@pytest.mark.parametrize("kind", ["replace", "ring", "reservoir"])
def test_state_round_trip(kind: str, pixels: PixelRange, same: Any, copy_of: Any) -> None:
    values = torch.Generator().manual_seed(3)

    def turn(buffer: Any) -> Tensor:
        indices, starts = buffer.draw(8)
        buffer.write(indices, pixels.from_signed(torch.rand(8, *SHAPE, generator=values) * 2 - 1))
        return torch.cat([starts, buffer.compare(5)])

    for turns in (0, 1, 2, 5):
        generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
        first, second = (build_buffer(_trial(kind, 0.2, pixels), Uniform(SHAPE), g) for g in generators)
        assert first is not None and second is not None
        for _ in range(turns):
            turn(first)
            turn(second)
        second.load_state_dict(copy_of(first.state_dict()))
        generators[1].set_state(generators[0].get_state())
        for _ in range(6):
            start = values.get_state()
            mine = turn(first)
            values.set_state(start)
            assert torch.equal(mine, turn(second))
        assert same(first.state_dict(), second.state_dict())


def test_no_buffer() -> None:
    assert build_buffer(_trial("none", 0.2), Uniform(SHAPE), torch.Generator()) is None
