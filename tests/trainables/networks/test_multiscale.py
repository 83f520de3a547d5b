"""KL-EBM's network against literal forms in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.networks.energy_model import build_network
from trainables.networks.multiscale import SelfAttention, StandardisedConv2d


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_weight_standardisation() -> None:
    conv = StandardisedConv2d(3, 5).double()
    x = _random(2, 3, 6, 6)
    weight = torch.empty_like(conv.weight)
    for i, w in enumerate(conv.weight.detach()):
        mean = w.sum() / 27
        std = (((w - mean) ** 2).sum() / 26).sqrt()
        weight[i] = (w - mean) / (std + 1e-5)
    torch.testing.assert_close(conv(x), F.conv2d(x, weight, conv.bias, padding=1))


def test_attention_starts_as_the_identity_and_is_a_softmax_over_pixels() -> None:
    layer = SelfAttention(16).double()
    x = _random(2, 16, 3, 4)
    assert layer.query.out_channels == layer.key.out_channels == 2
    assert torch.equal(layer(x), x)
    with torch.no_grad():
        layer.gamma.fill_(0.7)
    q, k, v = (m(x).flatten(2) for m in (layer.query, layer.key, layer.value))
    literal = torch.empty(2, 16, 12, dtype=torch.float64)
    for n in range(2):
        for i in range(12):
            share = torch.softmax(torch.stack([q[n, :, i] @ k[n, :, j] for j in range(12)]), 0)
            literal[n, :, i] = sum(share[j] * v[n, :, j] for j in range(12))
    torch.testing.assert_close(layer(x), x + 0.7 * literal.view(2, 16, 3, 4))


def test_small_channel_counts_have_an_attention_too() -> None:
    assert SelfAttention(4)(torch.rand(1, 4, 2, 2)).shape == (1, 4, 2, 2)


def _halve(x: Tensor) -> Tensor:
    padded = F.pad(x, (1, 1, 1, 1))
    rows = [padded[..., i : i + x.shape[-2] : 2, j : j + x.shape[-1] : 2] for i in range(3) for j in range(3)]
    return torch.stack(rows).sum(0) / 9


def _swish(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _instance_norm(x: Tensor, layer: nn.Module) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    var = ((x - mean) ** 2).mean((2, 3), keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)


def _literal_block(block: nn.Module, x: Tensor) -> Tensor:
    h = _swish(_instance_norm(block.conv1(x), block.norm1))
    h = _swish(_instance_norm(block.conv2(h), block.norm2)) + x
    if block.down is None:
        return h
    return _swish(_halve(F.conv2d(h, block.down.weight, block.down.bias, padding=1)))


def test_terms_equal_the_literal_computation() -> None:
    model = build_network("multiscale-8", (3, 32, 32), 10, seed=1).double()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    x = _random(2, 3, 32, 32)
    inputs = {"small": _halve(_halve(x)), "mid": _halve(x), "large": x}
    assert [v.shape[-1] for v in inputs.values()] == [8, 16, 32]
    channels = {"small": [8, 8, 8, 8], "mid": [8, 8, 8, 8, 16, 16], "large": [8, 8, 8, 8, 16, 16, 32, 32]}
    ends = {"small": 16, "mid": 32, "large": 64}
    terms, vectors = [], []
    for i, (name, h) in enumerate(inputs.items()):
        conv, _, *rest, _ = getattr(model.trunk, name).layers
        blocks = [m for m in rest if not isinstance(m, SelfAttention)]
        assert [b.conv1.in_channels for b in blocks] == channels[name]
        assert [b.down is not None for b in blocks] == [False, True] * (len(blocks) // 2)
        # The large net attends behind its fourth block, where the image is 8x8; the others never do.
        assert [j for j, m in enumerate(rest) if isinstance(m, SelfAttention)] == ([4] if name == "large" else [])
        h = _swish(F.conv2d(h, conv.weight, conv.bias, padding=1))
        for m in rest:
            h = m(h) if isinstance(m, SelfAttention) else _literal_block(m, h)
        assert h.shape == (2, ends[name], 2, 2)
        vectors.append(_swish(h).mean((2, 3)))
        head = model.energy_head.heads[i]
        terms.append(-(vectors[-1] @ head.weight[0] + head.bias[0]))
    torch.testing.assert_close(model.energy_terms(x), torch.stack(terms, 1), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model.energy(x), sum(terms), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model.pooled(x), torch.cat(vectors, 1), rtol=1e-9, atol=1e-11)


def test_norms_follow_the_channels() -> None:
    with torch.device("meta"):
        model = build_network("multiscale-64", (3, 32, 32), 10)
    norms = [m for m in model.modules() if isinstance(m, nn.InstanceNorm2d | nn.GroupNorm)]
    for m in norms:
        if isinstance(m, nn.InstanceNorm2d):
            assert m.num_features <= 128 and m.affine and not m.track_running_stats
        else:
            assert (m.num_channels, m.num_groups) == (256, 32)
    assert len(norms) == 2 * (8 + 6 + 4)
    assert not list(model.buffers())


def test_groups_divide_the_channels() -> None:
    with torch.device("meta"):
        model = build_network("multiscale-35", (3, 32, 32), 10)  # 140 channels
    assert {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {4}


def test_without_norm() -> None:
    model = build_network("multiscale-8", (1, 8, 8), 10, norm="none")
    assert not any(isinstance(m, nn.InstanceNorm2d | nn.GroupNorm) for m in model.modules())
    assert model.energy(torch.rand(2, 1, 8, 8)).isfinite().all()


def test_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 8 pixels, but got 4"):
        build_network("multiscale-8", (1, 4, 4), 10)
