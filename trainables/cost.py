"""What an iteration costs, from the network's shape alone: floating-point operations and device memory.

One multiplication with its addition is two operations; convolutions, matrix products and attention count, norms and
activations do not. With F the forward pass of a batch, a Langevin step costs 2F (forward, and backward to the image
alone), x+ and x- 3F each, a labelled batch 3F of its own size: (2K + 6) F for M-EBM, (2K + 12) F for M-JEM with its
labelled batch of twice the size.
"""

from __future__ import annotations

import math
import os
import resource
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainables.config import TrialConfig
from trainables.evaluation import protocols_for
from trainables.execution import copies_dtype, not_branched, resolve_execution
from trainables.generator import build_generator
from trainables.layers import Dropout
from trainables.networks import EnergyModel, build_network

Shape = tuple[int, int, int]
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}
"""Bytes of an activation by precision."""
USABLE = 0.9
"""Share of a device's memory that its trials may have together; no limit counts CUDA's contexts, for which the rest is.
"""
EXTRACTOR_BYTES = 5 * 2**29
"""Inception's: 95 MB of weights, three copies of its largest activation (of 125 images: 692 MB each, with the input of
its layer), cuDNN's workspace; the float64 arithmetic of a distance comes after these."""


LARGEST_DEVICE = 2**40
"""Bytes of memory that no device has."""


_Key = tuple[str, Shape, int, str, str, bool]


def _key(config: TrialConfig, shape: Shape, classes: int) -> _Key:
    return config.network, shape, classes, config.norm, config.definition.energy or "head", config.classifies


def _plan(config: TrialConfig, shape: Shape, classes: int) -> tuple[int, int, int, int, int, int]:
    return _counts(*_key(config, shape, classes), config.inner_steps > 1)


def _network(network: str, shape: Shape, classes: int, norm: str, energy: str, classifies: bool) -> EnergyModel:
    """A network without memory."""
    with torch.device("meta"):
        return build_network(
            network,
            shape,
            classes,
            norm=norm,
            energy="logsumexp" if energy == "logsumexp" else "head",
            class_head=True if classifies else None,
        )


@lru_cache(maxsize=64)
def _parameters(network: str, shape: Shape, classes: int, norm: str, energy: str, classifies: bool) -> int:
    return sum(p.numel() for p in _network(network, shape, classes, norm, energy, classifies).parameters())


@lru_cache(maxsize=64)
def _counts(
    network: str, shape: Shape, classes: int, norm: str, energy: str, classifies: bool, stem: bool
) -> tuple[int, int, int, int, int, int]:
    """Of one image: operations of an energy, of the logits, of the first layer; activations; parameters; layers."""
    model = _network(network, shape, classes, norm, energy, classifies)
    image = torch.empty(1, *shape, device="meta")
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    model.eval()  # instance norm of one 1x1 image, and spectral norm's iteration, have no train mode on meta tensors
    elements = 0

    def count(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal elements
        if isinstance(output, torch.Tensor):
            elements += output.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if not list(m.children())]
    energy_flops = _flops(model, image)
    for hook in hooks:
        hook.remove()
    logits_flops = stem_flops = 0
    if model.has_class_head:
        with FlopCounterMode(display=False) as counter:
            model.logits(image)
        logits_flops = counter.get_total_flops()
    if stem:
        with FlopCounterMode(display=False) as counter:
            model.stem(image)
        stem_flops = counter.get_total_flops()
    parameters = sum(p.numel() for p in model.parameters())
    return energy_flops, logits_flops, stem_flops, elements, parameters, len(hooks)


def _flops(model: EnergyModel, image: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model.energy(image)
    return int(counter.get_total_flops())


@lru_cache(maxsize=16)
def _generator_flops(shape: Shape, noise_dim: int, features: int) -> int:
    with torch.device("meta"):
        network = build_generator(shape, noise_dim=noise_dim, features=features).eval()
        latent = torch.empty(1, noise_dim)
    with FlopCounterMode(display=False) as counter:
        network(latent)
    return int(counter.get_total_flops())


def forward_flops(config: TrialConfig, shape: Shape, classes: int) -> int:
    """F of the table in the paper's notes: operations of one energy forward of `batch_size` images.

    Args:
        shape: (channels, height, width) of an image.
        classes: of the data set.
    """
    energy, logits, *_ = _plan(config, shape, classes)
    return (energy if config.samples else logits) * config.batch_size


def parameters(config: TrialConfig, shape: Shape, classes: int) -> int:
    """Parameters of the network. No pass through it is made: its first one would import a compiler."""
    return _parameters(*_key(config, shape, classes))


def layers(config: TrialConfig, shape: Shape, classes: int) -> int:
    """Layers (modules without parts) of the network."""
    return _plan(config, shape, classes)[-1]


def iteration_flops(config: TrialConfig, shape: Shape, classes: int) -> int:
    """Operations of one training iteration of a method.

    Args:
        shape: (channels, height, width) of an image.
        classes: of the data set.
    """
    energy, logits, stem, *_ = _plan(config, shape, classes)
    batch, steps = config.batch_size, config.sampling_steps
    forward = energy * batch
    total = 0
    if config.samples:
        total += 6 * forward  # x+ and x-: forward, backward to weights and to activations
    if config.sampler == "chains":
        step = 2 * forward
        if config.inner_steps > 1:  # the rest of the network once, the first layer forward and back N times
            step = 2 * (energy - stem) * batch + (1 + 2 * config.inner_steps) * stem * batch
        total += steps * step * (2 if config.definition.critic else 1)
    if config.definition.critic:
        total += 9 * forward  # H trains on x+ and x- and values them for E; E values the critic's samples
    if config.gradient_penalty > 0:
        total += 3 * forward  # dE/dx with a graph, and the way back through it
    if config.kl_weight > 0 or config.entropy_weight > 0:
        total += 8 * forward  # the last step again with a graph, E at its end, the way back through both
    if config.sampler == "generator":
        made = _generator_flops(shape, config.generator.noise_dim, config.generator.features) * batch
        total += 2 * forward + 3 * made
        if config.generator.entropy_weight > 0:
            total += (config.generator.importance_samples + 2) * made
    if config.classifies and not config.shared_batch:
        total += 3 * logits * config.label_batch_size
    return total


@dataclass(frozen=True)
class Memory:
    """Device memory of a trial in bytes, without the CUDA context.

    Attributes:
        held: weights with their gradient, average and optimiser state; images; replay buffer; p0's factor.
        training: activations of an iteration.
        sampling: activations of a batch of new chains, and the samples that an evaluation looks at.
        features: what Inception needs, where it scores the trial.
        graphed: the trial's iterations are a CUDA graph, whose memory nothing else may use meanwhile.
    """

    held: int
    training: int
    sampling: int
    features: int
    graphed: bool

    @property
    def total(self) -> int:
        """The most at one time: an evaluation's parts follow each other, and training waits for them."""
        evaluation = max(self.sampling, self.features)
        return self.held + (self.training + evaluation if self.graphed else max(self.training, evaluation))


def memory(config: TrialConfig, shape: Shape, classes: int, images: int) -> Memory:
    """Estimated device memory of a trial.

    Activations are every layer's output twice (the forward's and the backward's). The memory of eager iterations before
    a capture is given back at the capture, and does not count.

    Args:
        shape: (channels, height, width) of an image.
        classes: of the data set.
        images: training images.
    """
    *_, elements, parameters, _ = _plan(config, shape, classes)
    copies = (3 if config.optimiser == "sgd" else 4) + (config.ema_decay is not None)
    networks = 2 if config.definition.critic else 1
    pixels = math.prod(shape)
    held = networks * copies * 4 * parameters + images * pixels
    if copies_dtype(config):
        held += 2 * parameters
    if config.buffered:
        held += config.buffer_size * pixels * (4 if config.buffer == "replace" else 1)
    if config.sampler == "chains" and config.initial in ("gaussian", "class-gaussian"):
        side = min(pixels, 3072)  # larger images are down-sampled to this before their Gaussian is fitted
        held += 4 * side**2 * (classes if config.initial == "class-gaussian" else 1)
    graphed = resolve_execution(config, torch.device("cuda")).graphed
    at_once = max(config.batch_size, config.label_batch_size if config.classifies else 0)
    if graphed and config.parallel_branches and not_branched(config) is None:
        at_once += config.batch_size  # the chains, beside it
    of_an_image = 2 * BYTES[config.precision] * elements
    protocols = protocols_for(config, shape)
    fresh = max((p.count or 0 for p in protocols if p.source == "fresh"), default=0)
    sampling = of_an_image * config.evaluation.batch_size if fresh else 0
    sampling += 4 * pixels * (3 * fresh + (config.buffer_size if config.buffered else 0))  # starts, ends, all of them
    return Memory(
        held=held,
        training=of_an_image * at_once,
        sampling=sampling,
        features=EXTRACTOR_BYTES if any(p.features == "inception" for p in protocols) else 0,
        graphed=graphed,
    )


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a device; of the host no more than its control group may have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    there = min(there, limit) if limit != resource.RLIM_INFINITY else there
    try:
        return min(there, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # none, or `max`
        return there


def check_fits(config: TrialConfig, shape: Shape, classes: int, device: torch.device | None = None) -> None:
    """Refuse a trial that cannot fit into memory, before any of it is allocated.

    It is refused by the least it can need: what it holds, and each layer's output of a batch once.

    Args:
        shape: (channels, height, width) of an image.
        classes: of the data set.
        device: where it is to train; None: any device there may be.

    Raises:
        ValueError: one line with what it needs and what there is.
    """
    here = device is not None and (device.type != "cuda" or torch.cuda.is_available())
    there = device_memory(device) if device is not None and here else LARGEST_DEVICE
    held = _least_held(config, shape, classes)
    at_once = max(config.batch_size, config.label_batch_size if config.classifies else 0)
    needed = held
    if held <= there and held + _most_activations(config, shape, classes) * at_once > there:
        *_, elements, _, _ = _plan(config, shape, classes)  # only now: the first pass imports a compiler
        needed += BYTES[config.precision] * elements * at_once
    if needed > there:
        raise ValueError(
            f"network {config.network} with batch_size {config.batch_size}"
            + (f" and buffer_size {config.buffer_size}" if config.buffered else "")
            + f" needs at least {_gigabytes(needed)} of memory for images of {shape[1]}x{shape[2]}, but "
            + (f"{device} has " if here else "no device has more than ")
            + _gigabytes(there)
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.0f} GB" if count >= 1e10 else f"{count / 1e9:.2g} GB"


def _least_held(config: TrialConfig, shape: Shape, classes: int) -> int:
    """Bytes of weights with their gradient and optimiser state, and of the buffer."""
    copies = 3 if config.optimiser == "sgd" else 4
    held = (2 if config.definition.critic else 1) * copies * 4 * parameters(config, shape, classes)
    if config.sampler == "generator":
        held += 4 * 4 * _generator_parameters(shape, config.generator.noise_dim, config.generator.features)
    if config.buffered:  # one that is filled from p0 comes from as many random numbers
        held += config.buffer_size * math.prod(shape) * (8 if config.buffer == "replace" else 1)
    return held


@lru_cache(maxsize=16)
def _generator_parameters(shape: Shape, noise_dim: int, features: int) -> int:
    with torch.device("meta"):
        network = build_generator(shape, noise_dim=noise_dim, features=features)
    return sum(p.numel() for p in network.parameters())


def _most_activations(config: TrialConfig, shape: Shape, classes: int) -> int:
    """Bytes that the layers' outputs of an image cannot exceed: no layer makes the image larger."""
    return BYTES[config.precision] * shape[1] * shape[2] * _channels(*_key(config, shape, classes))


@lru_cache(maxsize=64)
def _channels(network: str, shape: Shape, classes: int, norm: str, energy: str, classifies: bool) -> int:
    model = _network(network, shape, classes, norm, energy, classifies)
    # Norms have weights too; what has none, an activation, follows something that has.
    weights = (getattr(module, "weight", None) for module in model.modules())
    return sum(2 * weight.shape[0] for weight in weights if isinstance(weight, torch.Tensor))
