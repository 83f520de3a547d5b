"""What is there for speed alone changes no value: bit by bit, or but for rounding, as each field says."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from trainables.config.method import METHODS, method_class
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.networks import kernels
from trainables.networks.energy_model import build_network
from trainables.networks.igebm import SpectralConv2d
from trainables.networks.layers import SLOPE, DerivedWeight, FrozenWeights, Speed
from trainables.networks.multiscale import StandardisedConv2d
from trainables.results.schema import SIGNAL_NAMES
from trainables.training.trainer import Trainer

Make = Callable[..., ImageData]
Quick = Callable[..., TrialConfig]
CHAINS = [name for name in METHODS if name not in ("softmax", "vera", "gebm")]


def run(
    config: TrialConfig, data: ImageData, iterations: int = 3, begin: Callable[[Trainer], Trainer] = lambda t: t
) -> tuple[Tensor, dict[str, Tensor]]:
    """Signals of some iterations, and the weights and running statistics after them."""
    learner = begin(Trainer(config, data))
    record = torch.zeros(iterations, len(SIGNAL_NAMES))
    for i in range(iterations):
        learner.step(record[i])
        learner.iteration += 1
    return record, {name: value.clone() for name, value in learner.model.state_dict().items()}


# ------------------------------------------------------------------------------------------------ weights of a chain


@pytest.mark.parametrize("method", CHAINS)
def test_rounding_frozen_weights_once_changes_no_bit(quick: Quick, make_data: Make, method: str) -> None:
    fields: dict[str, Any] = {"method": method, "precision": "bf16", "warmup_iterations": 0, "buffer_size": 1100}
    if method_class(method).preset.get("network"):
        fields["network"] = method_class(method).preset["network"].split("-")[0] + "-4"
        fields["network"] += "-1" * (method == "diffurecov")
    data = make_data()
    runs = [run(quick(**fields, frozen_copies=copies), data) for copies in (True, False)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert bool((runs[0][0][:, SIGNAL_NAMES.index("grad_param_norm")] > 0).all())
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name


def test_frozen_copies_are_used_and_put_back() -> None:
    model = build_network("wrn-10-1", (3, 8, 8), 4, seed=0)
    frozen = FrozenWeights(model, torch.bfloat16)
    conv = model.trunk.stem
    before = dict(model.named_parameters())
    for _ in range(2):
        with torch.no_grad():
            conv.weight.add_(1)
        with pytest.raises(ZeroDivisionError), frozen.hold():
            held = conv.weight
            assert held.dtype == torch.bfloat16 and not held.requires_grad
            assert torch.equal(held, before["trunk.stem.weight"].bfloat16())
            assert model.energy_head.weight.dtype == torch.float32, "heads are outside autocast"
            assert not any(p.requires_grad for p in model.parameters())
            raise ZeroDivisionError
        after = dict(model.named_parameters())
        assert after.keys() == before.keys() and all(after[name] is p for name, p in before.items())
        assert all(p.requires_grad for p in after.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("method", "layer"), [("igebm", SpectralConv2d), ("kl-ebm", StandardisedConv2d)])
def test_a_derived_weight_is_derived_once_per_chain(
    quick: Quick, make_data: Make, monkeypatch: pytest.MonkeyPatch, method: str, layer: type, precision: str
) -> None:
    """Counted: x+, the chain, x- and, of KL-EBM, its two further passes, however many steps the chain has."""
    counts: list[int] = []
    plain = layer.derived_weight
    monkeypatch.setattr(layer, "derived_weight", lambda self: (counts.append(id(self)), plain(self))[1])
    made = []
    for steps in (1, 4):
        fields: dict[str, Any] = {"method": method, "precision": precision, "sampling_steps": steps}
        learner = Trainer(quick(**fields, buffer_size=1100), make_data())
        counts.clear()
        learner.step(torch.zeros(len(SIGNAL_NAMES)))
        made.append(len(counts))
    layers = sum(isinstance(m, layer) for m in learner.model.modules())
    assert made[0] == made[1] and made[0] % layers == 0
    assert made[0] // layers == (3 if method == "igebm" else 5)


def test_a_chain_in_held_weights_is_that_in_derived_ones(make_data: Make) -> None:
    for network, shape in (("igebm-4", (3, 8, 8)), ("febm-4", (3, 8, 8)), ("multiscale-4", (3, 8, 8))):
        model = build_network(network, shape, 4, seed=0)
        x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (plain,) = torch.autograd.grad(model.energy(x).sum(), x)
        with FrozenWeights(model).hold():
            assert all(m.held is not None for m in model.modules() if isinstance(m, DerivedWeight))
            (held,) = torch.autograd.grad(model.energy(x).sum(), x)
        assert torch.equal(plain, held)
        assert all(m.held is None for m in model.modules() if isinstance(m, DerivedWeight))


# ------------------------------------------------------------------------------------- equal but for rounding


@pytest.mark.parametrize("field", ["merge_bias", "flipped_backward", "parallel_branches"])
@pytest.mark.parametrize(
    "fields",
    [
        {"method": "m-ebm", "network": "conv-16"},
        {"method": "m-jem", "network": "conv-16"},
        {"method": "m-jem", "network": "wrn-10-2", "sampling_steps": 3},
        {"method": "jem++", "network": "wrn-10-2", "norm": "batch"},
        {"method": "m-jem", "network": "wrn-10-2", "norm": "none", "sampler_norm_mode": "eval"},
        {"method": "kl-ebm", "network": "multiscale-4", "norm": "instance", "buffer_size": 1100},
        {"method": "jem", "network": "wrn-10-2"},
        {"method": "f-ebm", "network": "conv-16", "norm": "batch"},
        {"method": "kl-ebm", "network": "conv-16", "norm": "batch", "buffer_size": 1100, "step_size": 1.0},
        {"method": "shortrun", "network": "shortrun-4"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_equal_but_for_rounding(
    quick: Quick, make_data: Make, nudged: Callable[[Trainer, int], Trainer], field: str, fields: dict[str, Any]
) -> None:
    # A rate of 1e-6: training amplifies a rounding error (or any other of 1e-7) a thousandfold in three iterations.
    common: dict[str, Any] = {"warmup_iterations": 0, "learning_rate": 1e-6, "norm_momentum": 0.9, **fields}
    if fields["method"] not in ("jem", "shortrun") and "norm" not in fields:
        common["norm"] = "batch"
        common["initialisation"] = "default"
    data = make_data()
    (plain, state), (fast, other) = (run(quick(**common, **{field: on}), data) for on in (False, True))
    share = SIGNAL_NAMES.index("clamped_pixel_share")  # counts pixels: one more or less is more than rounding
    torch.testing.assert_close(fast[:, share], plain[:, share], rtol=0, atol=2e-3)
    plain[:, share] = fast[:, share] = 0
    state, other = state | {"signals": plain}, other | {"signals": fast}
    allowed = {n: 5e-4 + 2e-3 * v.abs() if n == "signals" else 1e-3 + 1e-3 * v.abs() for n, v in state.items()}

    def wrong() -> list[str]:
        return [n for n, value in state.items() if bool(((other[n] - value).abs() > allowed[n]).any())]

    for seed in range(3 if wrong() else 0):
        # On some processors the chains of a small network amplify more: then by no more than a last digit of the weights.
        signals, weights = run(quick(**common), data, begin=lambda t, seed=seed: nudged(t, seed))
        signals[:, share] = 0
        for name, value in (weights | {"signals": signals}).items():
            allowed[name] = allowed[name].maximum(10 * (value - state[name]).abs())
    assert not wrong()
    counts = [name for name in state if name.endswith("num_batches_tracked")]
    if common.get("norm") == "batch":
        assert counts and all(int(state[name]) > 0 for name in counts)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sampler_norm_mode": "eval"}, "the sampler reads running statistics that x+ changes"),
        ({"dropout": 0.2}, "dropout draws from one stream of random numbers"),
        ({"method": "f-ebm"}, "f-ebm's x- needs x+"),
        ({"method": "softmax"}, "softmax has no chains"),
        ({"method": "vera"}, "vera has no chains"),
    ],
)
def test_branches_are_refused_where_they_would_change_a_value(
    quick: Quick, make_data: Make, fields: dict[str, Any], reason: str
) -> None:
    more = {} if "method" in fields else {"network": "wrn-10-1", "norm": "batch", "initialisation": "default"}
    learner = Trainer(quick(**more, **fields, parallel_branches=True), make_data())
    assert learner.context.branch is None
    assert learner.remarks == [f"no parallel branches: {reason}"]


def test_a_merged_bias_reaches_the_running_mean_and_has_no_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    norm, other = (nn.BatchNorm2d(4, momentum=0.3) for _ in range(2))
    x, bias = torch.randn(5, 4, 3, 3, generator=g), torch.randn(4, generator=g).requires_grad_()
    for _ in range(3):
        merged = kernels.plain_without_bias(x, norm, SLOPE, bias)
        plain, _ = kernels.plain(x, other, SLOPE, bias=bias)
        torch.testing.assert_close(merged, plain)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(norm, name), getattr(other, name))
    (slope,) = torch.autograd.grad((merged * x).sum(), bias)
    assert torch.equal(slope, torch.zeros(4))


def test_a_flipped_convolution_has_the_gradients_of_the_convolution() -> None:
    conv = nn.Conv2d(20, 24, 3, padding=1).double()
    x = torch.randn(2, 20, 5, 6, dtype=torch.double, requires_grad=True)
    assert kernels.flips(conv)
    assert torch.autograd.gradcheck(kernels.flipped_convolution, (x, conv.weight))
    assert torch.autograd.gradgradcheck(kernels.flipped_convolution, (x, conv.weight), fast_mode=True)
    for other in (nn.Conv2d(20, 64, 3, padding=1), nn.Conv2d(20, 24, 3, stride=2, padding=1), nn.Conv2d(20, 24, 1)):
        assert not kernels.flips(other)


def test_what_has_no_second_derivative_is_refused_where_one_is_needed(quick: Quick) -> None:
    with pytest.raises(ValidationError, match="fused_norm has no second derivative, which gradient_penalty needs"):
        quick(method="vera", norm="batch", fused_norm=True)
    with pytest.raises(ValidationError, match="fused_norm needs memory_format channels-last"):
        quick(method="m-ebm", memory_format="contiguous", fused_norm=True)


def test_without_kernels_the_fused_norm_is_the_plain_one(quick: Quick, make_data: Make) -> None:
    fields: dict[str, Any] = {"method": "m-jem", "network": "wrn-10-2", "norm": "batch", "initialisation": "default"}
    runs = [run(quick(**fields, fused_norm=fused), make_data()) for fused in (True, False)]
    assert torch.equal(runs[0][0], runs[1][0])


# ------------------------------------------------------------------------------------------------ Triton's kernels

INTERPRETED = """
import torch
from torch import nn
from trainables.networks import kernels
from trainables.networks.layers import SLOPE, Speed
from trainables.networks.energy_model import build_network

kernels.ROWS, kernels.PROGRAMS = 32, 20  # several strips, the last one partly filled

def close(a, b, rtol):
    off = float((a - b).float().norm() / b.float().norm().clamp_min(1e-12))
    assert off < rtol, off

g = torch.Generator().manual_seed(0)
def draw(*shape, mean=0.0):
    return torch.randn(*shape, generator=g) + mean

for shape in ((5, 32, 7, 9), (2, 160, 8, 8), (3, 16, 4, 4)):
    for adds in (False, True):
        for biased in (False, True):
            channels = shape[1]
            # A mean of 30 standard deviations: sums of squares about 0 would lose half of the digits.
            x, added, bias = draw(*shape, mean=30.0), draw(*shape), draw(channels)
            dy, ds = draw(*shape), draw(*shape)
            found = []
            for how in (kernels.fused, kernels.plain):
                norm = nn.BatchNorm2d(channels, momentum=0.9)
                with torch.no_grad():
                    norm.weight.copy_(torch.linspace(0.5, 2, channels))
                    norm.bias.copy_(torch.linspace(-1, 1, channels))
                inputs = [x.clone().requires_grad_()] + ([added.clone().requires_grad_()] if adds else [])
                inputs += [bias.clone().requires_grad_()] if biased else []
                y, s = how(inputs[0], norm, SLOPE, inputs[1] if adds else None, inputs[-1] if biased else None)
                # Without `added` the bias stays out of s, so only y may be compared.
                loss = (y * dy).sum() + ((s * ds).sum() if adds or not biased else 0)
                gradients = torch.autograd.grad(loss, [*inputs, norm.weight, norm.bias])
                if biased and not adds:
                    assert how is kernels.plain or not gradients[-3].any()
                    gradients = gradients[:-3] + gradients[-2:]
                found.append([y, norm.running_mean, norm.running_var, *gradients])
                assert int(norm.num_batches_tracked) == 1
            for mine, theirs in zip(*found, strict=True):
                close(mine, theirs, 1e-4)

# The network whose norms are fused, biases and shortcuts with them, is the network.
kernels.fusible = lambda x: x.shape[1] % 16 == 0

def passed(name, speed, half):
    model = build_network(name, (3, 8, 8), 4, norm="batch", class_head=True, seed=0)
    model.trunk.speed = speed
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        energy, logits = model.energy(x), model.logits(x)
    (energy.sum() + logits[:, 1].sum()).backward()
    # A bias before a norm has the gradient 0 but for rounding.
    weights = {n: p.grad for n, p in model.named_parameters() if not n.startswith("trunk") or p.dim() == 4}
    return {"energy": energy.detach(), "logits": logits.detach(), "x": x.grad, **weights, **dict(model.named_buffers())}

def off(a, b):
    return float((a - b).float().norm() / b.float().norm().clamp_min(1e-12))

fast = Speed(fused_norm=True, flipped_backward=True)
for name in ("wrn-16-2", "conv-16"):
    true = passed(name, Speed(), False)
    for key, value in passed(name, fast, False).items():
        assert off(value, true[key]) < 1e-4, (name, key, off(value, true[key]))
    # In bfloat16 a deep network's gradients are off by a third either way, and the interpreter cuts where a GPU rounds.
    fused, plain = passed(name, fast, True), passed(name, Speed(), True)
    for key, value in fused.items():
        assert off(value, true[key]) < 3 * off(plain[key], true[key]) + 0.03, (name, key)
print("agreed")
"""


@pytest.mark.slow
def test_the_kernels_agree_with_pytorch_in_tritons_interpreter() -> None:
    """Triton runs them on the CPU, element by element; what a GPU's compiler makes of them is `test_gpu`'s."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERPRETED)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter (3.6) does not run on this NumPy (2.4 or newer)")
    assert done.returncode == 0 and done.stdout.endswith("agreed\n"), done.stderr[-2000:]


def test_the_speed_of_a_trunk_is_the_configurations(quick: Quick, make_data: Make) -> None:
    fields = {"method": "m-ebm", "network": "conv-16", "merge_bias": True, "fused_norm": True, "flipped_backward": True}
    # Fused norms are for captured graphs, which a CPU has not; test_gpu has them.
    assert Trainer(quick(**fields), make_data()).model.trunk.speed == Speed(True, False, True)
    assert Trainer(quick(method="m-ebm", network="conv-16"), make_data()).model.trunk.speed == Speed()
