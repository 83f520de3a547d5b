"""The replay buffer against a literal loop (algorithms.md, section 2.3)."""

from __future__ import annotations

import pytest
import torch

from trainables.initial import Uniform
from trainables.replay import ReplayBuffer

SHAPE = (1, 2, 2)


def _twin(generator: torch.Generator) -> torch.Generator:
    copy = torch.Generator()
    copy.set_state(generator.get_state())
    return copy


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
