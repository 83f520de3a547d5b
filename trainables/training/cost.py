"""What an iteration costs, from the network's shape alone: floating-point operations and device memory.

One multiplication with its addition is two operations; convolutions, matrix products and attention count, norms and
activations do not. With F the forward pass of a batch, a Langevin step costs 2F (forward, and backward to the image
alone), x+ and x- 3F each, a labelled batch 3F of that batch's size: (2K + 6) F for M-EBM, (2K + 12) F for M-JEM.
SAM takes all but the chain twice. `shape` is (channels, height, width) of an image, `classes` of the data set.
"""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainables.config.arguments import Arguments, is_own
from trainables.config.initial import initial_kind
from trainables.config.trial import TrialConfig
from trainables.evaluation.scores import protocols_for
from trainables.networks.energy_model import EnergyModel, build_network
from trainables.networks.layers import Dropout
from trainables.networks.own import OwnTrunk
from trainables.training.execution import copies_dtype, not_branched, resolve_execution
from trainables.training.own_optimiser import gated, state_copies

Shape = tuple[int, int, int]
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}
"""Bytes of an activation by precision."""
USABLE = 0.9
"""Share of a device's memory that its trials may have together; no limit counts CUDA's contexts, for which the rest is.
"""
EXTRACTOR_BYTES = 5 * 2**29
"""Inception's: 95 MB of weights, three copies of its largest activation (of 125 images: 692 MB each, with the input of
its layer), cuDNN's workspace; the float64 arithmetic of a distance comes after these."""
MAX_DEVICE_BYTES = 2**40
"""Bytes of memory that no device has."""


def _network(config: TrialConfig, shape: Shape, classes: int) -> EnergyModel:
    head = "logsumexp" if config.method_args.head == "logsumexp" else "head"
    return _build(config.network, config.network_args, shape, classes, config.norm, head, config.classifies)


@lru_cache(maxsize=64)
def _build(
    network: str,
    arguments: Arguments,
    shape: Shape,
    classes: int,
    norm: str,
    head: Literal["head", "logsumexp"],
    classifies: bool,
) -> EnergyModel:
    """A network without memory, without dropout, in eval mode.

    Instance norm of one 1x1 image, and spectral norm's iteration, have no train mode on meta tensors.
    """
    with torch.device("meta"):
        model = build_network(
            network, shape, classes, norm=norm, energy=head, class_head=True if classifies else None,
            arguments=arguments,
        )  # fmt: skip
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    return model.eval()


@dataclass(frozen=True)
class _Passes:
    """Of one image: operations of an energy, of the logits, of the first layer; outputs of all layers; layers."""

    energy: int
    logits: int
    stem: int
    outputs: int
    layers: int


@lru_cache(maxsize=64)
def _passes(model: EnergyModel, shape: Shape, cut: bool) -> _Passes:
    own = isinstance(model.trunk, OwnTrunk)
    with redirect_stdout(sys.stderr) if own else nullcontext():  # a command's answer is not a place for what it prints
        return _measured(model, shape, cut, own=own)


def _measured(model: EnergyModel, shape: Shape, cut: bool, *, own: bool) -> _Passes:
    outputs = 0

    def count(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal outputs
        if isinstance(output, torch.Tensor):
            outputs += output.numel()

    device = next((p.device for p in model.parameters()), torch.device("meta"))

    def flops(run: Callable[[torch.Tensor], object], wanted: bool = True) -> int:
        with FlopCounterMode(display=False) as counter:
            if wanted:
                run(torch.zeros(1, *shape, device=device))
        return int(counter.get_total_flops())

    hooks = [m.register_forward_hook(count) for m in model.modules() if not list(m.children())]
    energy = flops(model.energy)
    for hook in hooks:
        hook.remove()
    if own:  # whose layers are not all modules
        outputs = max(outputs, _kept_for_backward(model, torch.zeros(1, *shape, device=device)))
    return _Passes(energy, flops(model.logits, model.has_class_head), flops(model.stem, cut), outputs, len(hooks))


def _kept_for_backward(model: EnergyModel, x: torch.Tensor) -> int:
    """Numbers that autograd keeps of the forward of an image, the weights not counted."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in weights:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.energy(x.requires_grad_())
    return sum(tensor.numel() for tensor in kept.values())


def _plan(config: TrialConfig, shape: Shape, classes: int) -> _Passes:
    return _passes(_network(config, shape, classes), shape, config.inner_steps > 1)


def copies_of_weights(config: TrialConfig) -> int:
    """The weights, their gradient, SAM's copies of both, what the optimiser keeps, and what a gated step copies."""
    kept, own = kept_by_optimiser(config), is_own("optimiser", config.optimiser)
    return (
        2
        + 2 * (config.sam_rho > 0)
        + kept
        + (1 + kept if own and gated(config.optimiser, config.optimiser_args) else 0)
    )


def kept_by_optimiser(config: TrialConfig) -> int:
    """Numbers that the optimiser keeps for each weight."""
    if is_own("optimiser", config.optimiser):
        return state_copies(config.optimiser, config.optimiser_args)
    return 1 if config.optimiser == "sgd" else 2


def side_flops(config: TrialConfig, shape: Shape, side: int) -> int:
    """Operations of an energy of one image of another side, by a network that reads several."""
    return _passes(_network(config, shape, 1), (shape[0], side, side), False).energy


def forward_flops(config: TrialConfig, shape: Shape, classes: int) -> int:
    """F of the table in the paper's notes: operations of one energy forward of `batch_size` images."""
    found = _plan(config, shape, classes)
    return (found.energy if config.samples else found.logits) * config.batch_size


def parameters(config: TrialConfig, shape: Shape, classes: int) -> int:
    """Parameters of the network. No pass through it is made: its first one would import a compiler."""
    return sum(p.numel() for p in _network(config, shape, classes).parameters())


def layers(config: TrialConfig, shape: Shape, classes: int) -> int:
    """Layers (modules without parts) of the network."""
    return _plan(config, shape, classes).layers


def closed_flops(config: TrialConfig, shape: Shape, classes: int) -> int:
    """Operations of one training iteration of a method that comes with the package."""
    found, batch = _plan(config, shape, classes), config.batch_size
    forward = found.energy * batch
    losses = chain = 0
    if config.samples:
        losses += 6 * forward  # x+ and x-: forward, backward to weights and to activations
    if config.chains:
        step = 2 * forward
        if config.inner_steps > 1:  # the rest of the network once, the first layer forward and back N times
            step = 2 * (found.energy - found.stem) * batch + (1 + 2 * config.inner_steps) * found.stem * batch
        chain = config.sampling_steps * step
    if config.gradient_penalty > 0:
        losses += 3 * forward  # dE/dx with a graph, and the way back through it
    if config.kl_weight > 0 or config.entropy_weight > 0:
        losses += 8 * forward  # the last step again with a graph, E at its end, the way back through both
    if config.classifies and not config.shared_batch:
        losses += 3 * found.logits * config.label_batch_size
    passes = 2 if config.sam_rho > 0 else 1
    return passes * losses + chain + config.method_args.extra_flops(config, shape, forward, chain)


@dataclass(frozen=True)
class Memory:
    """Device memory of a trial in bytes, without the CUDA context.

    Attributes:
        held: weights with their gradient, average and optimiser state; images; replay buffer; p0's factor.
        training: activations of an iteration.
        sampling: activations of a batch of new chains, and the samples that an evaluation looks at.
        features: what Inception needs, where it scores the trial.
        graphed: iterations are a CUDA graph, whose memory nothing else may use meanwhile.
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
    """Estimated device memory of a trial on so many training images.

    Activations are every layer's output twice (the forward's and the backward's). The memory of eager iterations before
    a capture is given back at the capture, and does not count.
    """
    weights, pixels = parameters(config, shape, classes), math.prod(shape)
    copies = copies_of_weights(config) + (config.ema_decay is not None)
    held = config.method_args.energies * copies * 4 * weights + images * pixels
    if copies_dtype(config):
        held += 2 * weights
    if config.buffered:
        held += config.buffer_size * pixels * (4 if config.buffer == "replace" else 1)
    if config.chains:
        held += 4 * initial_kind(config.initial).parameters(pixels, classes)
    graphed = resolve_execution(config, torch.device("cuda")).graphed
    at_once = max(config.batch_size, config.label_batch_size if config.classifies else 0)
    if graphed and config.parallel_branches and not_branched(config) is None:
        at_once += config.batch_size  # the chains, beside it
    of_an_image = 2 * BYTES[config.precision] * _plan(config, shape, classes).outputs
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

    It is refused by the least it can need on its device (None: any there may be): what it holds, and each layer's
    output of a batch once.

    Raises:
        ValueError: one line with what it needs and what there is.
    """
    here = device is not None and (device.type != "cuda" or torch.cuda.is_available())
    there = device_memory(device) if device is not None and here else MAX_DEVICE_BYTES
    needed = _least_held(config, shape, classes)
    at_once = BYTES[config.precision] * max(config.batch_size, config.label_batch_size if config.classifies else 0)
    own = is_own("network", config.network)  # one that may make the image larger
    if needed <= there and (own or needed + _most_outputs(config, shape, classes) * at_once > there):
        needed += _plan(config, shape, classes).outputs * at_once  # only now: the first pass imports a compiler
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


@lru_cache(maxsize=64)
def _least_held(config: TrialConfig, shape: Shape, classes: int) -> int:
    """Bytes of weights with their gradient and optimiser state, and of the buffer."""
    copies = copies_of_weights(config)
    held = config.method_args.energies * copies * 4 * parameters(config, shape, classes)
    held += 4 * 4 * config.method_args.extra_parameters(shape)
    if config.buffered:  # one that is filled from p0 comes from as many random numbers
        held += config.buffer_size * math.prod(shape) * (8 if config.buffer == "replace" else 1)
    return held


def _most_outputs(config: TrialConfig, shape: Shape, classes: int) -> int:
    """What the layers' outputs of an image cannot exceed: no layer makes the image larger."""
    # Norms have weights too; what has none, an activation, follows something that has.
    weights = (getattr(module, "weight", None) for module in _network(config, shape, classes).modules())
    channels = sum(2 * weight.shape[0] for weight in weights if isinstance(weight, torch.Tensor))
    return shape[1] * shape[2] * channels
