"""Networks against the counts of the released classes, and the Wide ResNet and the plain nets against literal forms.

The counts were taken on the released code with forward hooks, or added up from its layers' shapes.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.network import parse_network
from trainables.networks.energy_model import EnergyModel, build_network
from trainables.networks.layers import Dropout, set_dropout_generator
from trainables.networks.vera_generator import build_generator

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
    model = build_network("conv-8", (1, 8, 8), 5, energy="logsumexp").eval()
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = model.logits(x).double()
    torch.testing.assert_close(model.energy(x).double(), -torch.log(torch.exp(logits).sum(1)), rtol=1e-5, atol=1e-5)
    model.energy(x).sum().backward()
    assert model.energy_head.weight.grad is None and model.energy_head.bias.grad is None
    assert model.class_head.weight.grad is not None


# network, side, parameters, weights of convolutions, MACs of convolutions, MACs of linear layers; no class head
OTHERS = [
    ("igebm-128", 32, 18_591_105, 18_582_912, 1_362_493_440, 512),
    ("febm-128", 32, 5_312_129, 5_311_872, 852_885_504, 256),
    ("shortrun-64", 32, 2_763_393, 2_754_240, 102_432_768, 8_192),
    ("shortrun-32", 32, 693_569, 688_992, 26_050_560, 4_096),
    ("multiscale-64", 32, 6_564_196, 6_550_592, 453_079_040, 896),
]


def _measure(module: nn.Module, x: Tensor) -> tuple[int, int, int, int]:
    """Parameters, convolution weights, MACs per image of convolutions and of linear layers."""
    mac = {4: 0, 2: 0}

    def hook(m: nn.Module, _inputs: Any, out: Tensor) -> None:
        pixels = out[0].numel() // out.shape[1]
        mac[m.weight.dim()] += pixels * m.weight.numel()  # type: ignore[operator, index, union-attr]

    handles = [
        m.register_forward_hook(hook)
        for m in module.modules()
        if isinstance(weight := getattr(m, "weight", None), Tensor) and weight.dim() in mac
    ]
    module(x)
    for handle in handles:
        handle.remove()
    weights = sum(p.numel() for p in module.parameters() if p.dim() == 4)
    return _count(module), weights, mac[4], mac[2]


@pytest.mark.parametrize("row", OTHERS, ids=lambda r: f"{r[0]}@{r[1]}")
def test_counts_of_the_other_methods(row: tuple[Any, ...]) -> None:
    name, side, *expected = row
    with torch.device("meta"):
        model = build_network(name, (3, side, side), 10)
        x = torch.zeros(1, 3, side, side)
    assert _measure(model, x) == tuple(expected)
    assert not model.has_class_head


def test_counts_of_the_generator() -> None:
    with torch.device("meta"):
        generator = build_generator((3, 32, 32))
        z = torch.zeros(1, 128)
    parameters, _, convolutions, linear = _measure(generator, z)
    assert (parameters, convolutions + linear) == (4_079_363, 1_593_049_088)


SMALL = ["wrn-10-1", "conv-8", "igebm-8", "febm-8", "shortrun-8", "multiscale-8"]
SHAPES = [(1, 8, 8), (3, 16, 16), (3, 32, 32), (3, 64, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", SMALL)
def test_every_network_at_every_size(name: str, shape: tuple[int, int, int]) -> None:
    model = build_network(name, shape, 10, class_head=True, seed=2)
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    energy, terms = model.energy(x), model.energy_terms(x)
    assert energy.shape == (4,) and terms.shape == ((4, 3) if name == "multiscale-8" else (4,))
    torch.testing.assert_close(terms.reshape(4, -1).sum(1), energy)
    assert model.logits(x).shape == (4, 10)
    assert model.pooled(x).shape == (4, model.trunk.features)
    (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    (gradient**2).sum().backward()  # the gradient penalty and the sampler term differentiate twice
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halves = [model.energy(x), model.energy_terms(x), model.logits(x), model.pooled(x)]
    assert {t.dtype for t in halves} == {torch.float32}
    # The parts that cancel in an energy are at most its features' sum: the scale of what 8 bits of mantissa can lose.
    scale = model.pooled(x).abs().sum(1).max().item() / 20
    torch.testing.assert_close(halves[0], energy, rtol=0.02, atol=0.02 * max(1.0, scale))


@pytest.mark.parametrize("name", SMALL)
def test_seeds(name: str) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one, two, other = (build_network(name, (1, 8, 8), 10, seed=s).state_dict() for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("name", SMALL)
def test_state_dict_round_trip(name: str) -> None:
    one, two = (build_network(name, (1, 8, 8), 10, seed=s).eval() for s in (0, 1))
    two.load_state_dict(one.state_dict())
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(one.energy(x), two.energy(x))


@pytest.mark.parametrize("name", ["shortrun-8", "multiscale-8", "igebm-8"])
def test_log_sum_exp_brings_its_class_head(name: str) -> None:
    model = build_network(name, (1, 8, 8), 5, energy="logsumexp").eval()
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.energy(x), -model.logits(x).logsumexp(1))
    torch.testing.assert_close(model.energy_terms(x), model.energy(x))


def test_class_head_can_be_left_out() -> None:
    model = build_network("wrn-10-1", (1, 8, 8), 10, class_head=False)
    assert not model.has_class_head and model.class_head is None
    assert not any(key.startswith("class_head") for key in model.state_dict())
    with pytest.raises(RuntimeError, match="no class head"):
        model.logits(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="needs a class head"):
        build_network("wrn-10-1", (1, 8, 8), 10, class_head=False, energy="logsumexp")


@pytest.mark.parametrize("energy", ["head", "logsumexp"])
@pytest.mark.parametrize("name", ["wrn-10-1", "conv-8"])
def test_energy_from_the_stem(name: str, energy: Any) -> None:
    model = build_network(name, (3, 16, 16), 10, norm="none", energy=energy).double()
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert parse_network(name)[0].stem
    h = model.stem(x)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    torch.testing.assert_close(h, F.conv2d(x, first.weight, first.bias, padding=1))
    assert torch.equal(model.energy_from_stem(h), model.energy(x))
    # The chain rule through an affine first layer: what makes JEM++'s inner steps equal one SGLD step.
    (p,) = torch.autograd.grad(model.energy_from_stem(h).sum(), h, retain_graph=True)
    (via_stem,) = torch.autograd.grad((model.stem(x) * p).sum(), x)
    (whole,) = torch.autograd.grad(model.energy(x).sum(), x)
    torch.testing.assert_close(via_stem, whole)


@pytest.mark.parametrize("name", ["igebm-8", "febm-8", "shortrun-8", "multiscale-8"])
def test_no_stem(name: str) -> None:
    model = build_network(name, (1, 8, 8), 10)
    assert not parse_network(name)[0].stem
    for call in (model.stem, model.energy_from_stem):
        with pytest.raises(RuntimeError, match="first convolution"):
            call(torch.zeros(1, 1, 8, 8))


def test_dropout_stands_behind_the_first_convolution_of_every_block() -> None:
    shape = (3, 16, 16)
    plain = build_network("wrn-16-1", shape, 10, norm="none")
    model = build_network("wrn-16-1", shape, 10, norm="none", dropout=0.3)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [m.p for m in model.modules() if isinstance(m, Dropout)] == [0.3] * 6
    x = torch.rand(2, *shape)
    assert torch.equal(model.eval().energy(x), plain.energy(x))
    model.train()
    set_dropout_generator(model, torch.Generator().manual_seed(3))
    literal, g = model.trunk.stem(x), torch.Generator().manual_seed(3)
    act = lambda t: torch.where(t >= 0, t, 0.2 * t)  # noqa: E731
    for block in model.trunk.blocks:
        h = block.conv1(act(literal))
        h = h * torch.empty_like(h).bernoulli_(0.7, generator=g) / 0.7
        literal = block.conv2(act(h)) + block.shortcut(literal)
    torch.testing.assert_close(model.trunk(x), act(literal).mean((2, 3)))


def test_shortrun_equals_the_published_layers() -> None:
    model = build_network("shortrun-8", (3, 32, 32), 10, seed=4).double()
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 32, 32, generator=g, dtype=torch.float64)
    convs = [m for m in model.trunk.modules() if isinstance(m, nn.Conv2d)]
    assert [tuple(m.weight.shape) for m in convs] == [(8, 3, 3, 3), (16, 8, 4, 4), (32, 16, 4, 4), (64, 32, 4, 4)]
    h = x
    for i, m in enumerate(convs):
        h = F.conv2d(h, m.weight, m.bias, stride=1 if i == 0 else 2, padding=1)
        h = torch.where(h >= 0, h, 0.2 * h)
    assert h.shape == (3, 64, 4, 4)
    last = model.energy_head.weight.view(1, 64, 4, 4)
    literal = F.conv2d(h, last, model.energy_head.bias).flatten()
    torch.testing.assert_close(model.energy(x), -literal)
    bound = 1 / math.sqrt(64 * 16)  # of a 4x4 convolution from 64 channels in PyTorch's default initialisation
    assert 0.9 * bound < last.abs().max() <= bound
    assert sum(isinstance(m, nn.Conv2d) for m in build_network("shortrun-8", (1, 8, 8), 10).modules()) == 2


@pytest.mark.parametrize("side", [2, 12, 28])
def test_shortrun_needs_a_power_of_two(side: int) -> None:
    with pytest.raises(ValueError, match=f"4, 8, 16.*got {side}"):
        build_network("shortrun-8", (1, side, side), 10)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("igebm-8", {"norm": "batch"}, "norm must be spectral or none with network igebm-FILTERS, but is batch"),
        ("shortrun-8", {"norm": "batch"}, "norm must be none with"),
        ("multiscale-8", {"norm": "spectral"}, "norm must be instance or none"),
        ("wrn-10-1", {"norm": "instance"}, "norm must be batch or none"),
        ("conv-8", {"dropout": 0.5}, "dropout must be 0 unless network is igebm-FILTERS or wrn-DEPTH-WIDTH"),
        ("wrn-10-1", {"dropout": 1.0}, "less than 1"),
        ("igebm-8", {"initialisation": "xavier"}, "initialisation must be default with"),
        ("wrn-12-1", {}, "depth of 10, 16, 22"),
        ("conv-0", {}, "at least 1"),
    ],
)
def test_what_a_family_cannot_have(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(name, (1, 8, 8), 10, **settings)


@pytest.mark.parametrize("name", ["wrn", "resnet-18", "conv16", "", "wrn-28-10-x", "igebm-8-8", "conv-\u0663"])
def test_unknown_network(name: str) -> None:
    with pytest.raises(ValueError, match="network must be"):
        build_network(name, (3, 32, 32), 10)
