"""Dropout from an explicit generator, and precision under autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trainables.networks.layers import Dropout, seeded, set_dropout_generator, without_autocast


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_dropout_keeps_the_mean_and_sets_the_share_to_zero() -> None:
    layer = Dropout(0.3)
    layer.generator = _generator()
    out = layer(torch.ones(200_000))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (out == 0).double().mean().item() == pytest.approx(0.3, abs=0.005)
    assert out.mean().item() == pytest.approx(1, abs=0.01)


def test_dropout_draws_from_its_generator_alone() -> None:
    model = nn.Sequential(Dropout(0.5), nn.Identity(), nn.Sequential(Dropout(0.5)))
    x = torch.ones(1000)
    set_dropout_generator(model, _generator(1))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, next_one = model(x), model(x)
    assert torch.equal(torch.get_rng_state(), before)
    set_dropout_generator(model, _generator(1))
    assert torch.equal(model(x), one)
    assert not torch.equal(one, next_one)
    assert not model.state_dict()


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_dropout_is_the_identity(p: float, training: bool) -> None:
    x = torch.rand(10)
    assert Dropout(p).train(training)(x) is x


def test_dropout_without_generator_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="set_dropout_generator"):
        Dropout(0.5)(torch.ones(3))


def test_a_deep_copy_shares_the_generator() -> None:
    model = nn.Sequential(Dropout(0.5), Dropout(0.25)).eval()
    generator = _generator()
    set_dropout_generator(model, generator)
    copied = copy.deepcopy(model)
    assert [m.p for m in copied] == [0.5, 0.25] and not any(m.training for m in copied.modules())
    assert all(m.generator is generator for m in copied)


def test_without_autocast() -> None:
    x = torch.rand(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x):
            assert (x @ x).dtype == torch.float32
    with without_autocast(torch.zeros(1, device="meta")):
        pass


def test_seeded_puts_the_state_back() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with seeded(1):
        one = torch.rand(2)
    with seeded(1):
        assert torch.equal(torch.rand(2), one)
    assert torch.equal(torch.rand(3), expected)
