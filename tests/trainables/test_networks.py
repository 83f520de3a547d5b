"""Networks against the counts measured on the released classes (algorithms.md, sections 1 and 14.1)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.networks import EnergyModel, build_network

# network, side, classes, trunk, energy head, class head, total, conv MACs, linear MACs, BN elements, convs, BNs,
# features
RELEASED = [
    ("wrn-28-10", 32, 10, 36_482_880, 641, 6_410, 36_489_931, 5_951_111_168, 7_040, 2_678_784, 28, 25, 640),
    ("wrn-28-10", 32, 100, 36_482_880, 641, 64_100, 36_547_621, 5_951_111_168, 64_640, 2_678_784, 28, 25, 640),
    ("wrn-28-5", 32, 10, 9_134_480, 321, 3_210, 9_138_011, 1_494_663_168, 3_520, 1_347_584, 28, 25, 320),
    ("wrn-28-2", 32, 10, 1_468_352, 129, 1_290, 1_469_771, 242_663_424, 1_408, 548_864, 28, 25, 128),
    ("wrn-28-2", 32, 1000, 1_468_352, 129, 129_000, 1_597_481, 242_663_424, 128_128, 548_864, 28, 25, 128),
    ("wrn-28-5", 128, 10, 37_003_280, 641, 6_410, 37_010_331, 32_460_505_088, 7_040, 23_363_584, 37, 33, 640),
    ("wrn-28-2", 128, 10, 5_931_200, 257, 2_570, 5_934_027, 5_249_957_888, 2_816, 9_502_720, 37, 33, 256),
]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("row", RELEASED, ids=lambda r: f"{r[0]}@{r[1]}-C{r[2]}")
def test_released_counts(row: tuple[Any, ...]) -> None:
    name, side, classes, trunk, energy, logits, total, conv_mac, linear_mac, bn_elements, convs, bns, features = row
    with torch.device("meta"):
        model = build_network(name, (3, side, side), classes)
        x = torch.zeros(1, 3, side, side)
    mac = {"conv": 0, "linear": 0, "bn": 0}

    def conv_hook(m: nn.Conv2d, _inputs: Any, out: Tensor) -> None:
        mac["conv"] += out[0].numel() * m.in_channels * m.kernel_size[0] * m.kernel_size[1]

    def bn_hook(_m: nn.Module, _inputs: Any, out: Tensor) -> None:
        mac["bn"] += out[0].numel()

    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(conv_hook)
        elif isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(bn_hook)
        elif isinstance(m, nn.Linear):
            mac["linear"] += m.in_features * m.out_features
    assert model.energy(x).shape == (1,)
    assert mac == {"conv": conv_mac, "linear": linear_mac, "bn": bn_elements}
    assert (_count(model.trunk), _count(model.energy_head), _count(model.class_head)) == (trunk, energy, logits)
    assert _count(model) == total
    kinds = [type(m) for m in model.modules()]
    assert (kinds.count(nn.Conv2d), kinds.count(nn.BatchNorm2d)) == (convs, bns)
    assert model.energy_head.in_features == features
    assert model.logits(x).shape == (1, classes)


def test_every_layer_has_a_bias_and_every_norm_is_affine() -> None:
    model = build_network("wrn-16-2", (3, 32, 32), 10)
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            assert m.bias is not None
        if isinstance(m, nn.BatchNorm2d):
            assert m.affine and m.track_running_stats
            assert (m.momentum, m.eps) == (0.9, 1e-5)


def _literal_forward(model: EnergyModel, x: Tensor) -> Tensor:
    """Pooled features of a WRN-10-1 from its parameters in order of use, batch statistics, as section 1 writes it."""
    shapes = [p for p in model.trunk.named_parameters() if not p[0].startswith("stem") and not p[0].startswith("norm.")]
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, p in shapes:
        grouped.setdefault(".".join(key.split(".")[:2]), {})[key.split(".", 2)[2]] = p
    act = lambda t: torch.where(t >= 0, t, 0.2 * t)  # noqa: E731

    def bn(t: Tensor, w: Tensor, b: Tensor) -> Tensor:
        mean = t.mean((0, 2, 3), keepdim=True)
        var = ((t - mean) ** 2).mean((0, 2, 3), keepdim=True)
        return (t - mean) / (var + 1e-5).sqrt() * w[None, :, None, None] + b[None, :, None, None]

    stem = dict(model.trunk.stem.named_parameters())
    h = F.conv2d(x, stem["weight"], stem["bias"], padding=1)
    for stage, block in enumerate(grouped.values()):
        stride = 1 if stage == 0 else 2
        y = act(bn(h, block["norm1.weight"], block["norm1.bias"]))
        y = F.conv2d(y, block["conv1.weight"], block["conv1.bias"], stride=1, padding=1)
        y = act(bn(y, block["norm2.weight"], block["norm2.bias"]))
        y = F.conv2d(y, block["conv2.weight"], block["conv2.bias"], stride=stride, padding=1)
        if stage > 0:
            h = F.conv2d(h, block["shortcut.weight"], block["shortcut.bias"], stride=stride)
        else:
            assert "shortcut.weight" not in block
        h = h + y
    last = dict(model.trunk.norm.named_parameters())
    h = act(bn(h, last["weight"], last["bias"]))
    return F.avg_pool2d(h, h.shape[-1]).flatten(1)


def test_forward_equals_the_literal_computation() -> None:
    model = build_network("wrn-10-1", (3, 32, 32), 10, seed=3).double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    x = torch.rand(5, 3, 32, 32, generator=g, dtype=torch.float64) * 2 - 1
    features = _literal_forward(model, x)
    energy = -(features @ model.energy_head.weight[0] + model.energy_head.bias[0])
    logits = features @ model.class_head.weight.T + model.class_head.bias
    model.train()
    torch.testing.assert_close(model.trunk(x), features, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.energy(x), energy, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(x), energy, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.logits(x), logits, rtol=1e-10, atol=1e-12)


def test_under_autocast_the_heads_stay_in_float32() -> None:
    model = build_network("conv-16", (1, 8, 8), 10)
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, energy = model.trunk(x), model.energy(x)
    assert (features.dtype, energy.dtype) == (torch.bfloat16, torch.float32)
    literal = -(features.float() @ model.energy_head.weight[0] + model.energy_head.bias[0])
    torch.testing.assert_close(energy, literal, rtol=1e-5, atol=1e-6)


def test_small_net_equals_the_literal_computation() -> None:
    model = build_network("conv-16", (1, 8, 8), 10, norm="none", seed=1).double()
    p = dict(model.trunk.named_parameters())
    assert [tuple(v.shape) for k, v in p.items() if k.endswith("weight")] == [
        (16, 1, 3, 3),
        (32, 16, 3, 3),
        (64, 32, 3, 3),
    ]
    weights = [v for k, v in p.items() if k.endswith("weight")]
    biases = [v for k, v in p.items() if k.endswith("bias")]
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    h = x
    for w, b, stride in zip(weights, biases, (1, 2, 2), strict=True):
        h = F.conv2d(h, w, b, stride=stride, padding=1)
        h = torch.where(h >= 0, h, 0.2 * h)
    torch.testing.assert_close(model.trunk(x), h.mean((2, 3)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("network", ["wrn-10-1", "conv-8"])
def test_batch_norm_momentum_is_nine_tenths_of_the_last_batch(network: str) -> None:
    model = build_network(network, (3, 16, 16), 10).train()
    layer = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].detach()))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.energy(torch.rand(8, 3, 16, 16, generator=g))
    torch.testing.assert_close(layer.running_mean, 0.9 * seen[0].mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, 0.1 + 0.9 * seen[0].transpose(0, 1).flatten(1).var(1, unbiased=True))


def test_without_norm_there_is_none() -> None:
    for network in ("wrn-10-1", "conv-8"):
        model = build_network(network, (3, 16, 16), 10, norm="none")
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert not list(model.buffers())


def test_default_initialisation_is_pytorchs() -> None:
    model = build_network("wrn-10-4", (3, 32, 32), 10)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            bound = 1 / math.sqrt(m.in_channels * m.kernel_size[0] ** 2)  # Kaiming uniform with a = sqrt(5)
            assert m.weight.abs().max() <= bound
            assert m.bias is not None and 0 < m.bias.abs().max() <= bound
            if m.weight.numel() > 4000:
                assert m.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_xavier_initialisation_is_the_one_the_released_code_defines() -> None:
    model = build_network("wrn-10-4", (3, 32, 32), 10, initialisation="xavier")
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            k = m.kernel_size[0] ** 2
            bound = math.sqrt(2) * math.sqrt(6 / (k * (m.in_channels + m.out_channels)))
            assert m.bias is not None and not m.bias.any()
            assert m.weight.abs().max() <= bound * (1 + 1e-6)
            if m.weight.numel() > 4000:
                assert m.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert model.class_head.bias.any()


def test_weights_follow_the_seed_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = build_network("conv-8", (1, 8, 8), 10, norm="none", seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(999)
    two = build_network("conv-8", (1, 8, 8), 10, norm="none", seed=5)
    other = build_network("conv-8", (1, 8, 8), 10, norm="none", seed=6)
    for a, b, c in zip(one.parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_energy_head_leaves_the_class_head_without_gradient() -> None:
    model = build_network("conv-8", (1, 8, 8), 10)
    model.energy(torch.rand(4, 1, 8, 8)).mean().backward()
    assert model.class_head.weight.grad is None and model.class_head.bias.grad is None
    assert model.energy_head.weight.grad is not None


def test_lse_energy() -> None:
    model = build_network("conv-8", (1, 8, 8), 5, from_logits=True).eval()
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = model.logits(x).double()
    torch.testing.assert_close(model.energy(x).double(), -torch.log(torch.exp(logits).sum(1)), rtol=1e-5, atol=1e-5)
    model.energy(x).sum().backward()
    assert model.energy_head.weight.grad is None and model.energy_head.bias.grad is None
    assert model.class_head.weight.grad is not None


@pytest.mark.parametrize("name", ["wrn", "resnet-18", "conv16", "", "wrn-28-10-x"])
def test_unknown_network(name: str) -> None:
    with pytest.raises(ValueError, match="network must be"):
        build_network(name, (3, 32, 32), 10)
