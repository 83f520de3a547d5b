"""A user's own parts, each used once before a trial trains: what they give is checked, errors name part and place."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from trainables.config.arguments import is_own
from trainables.config.dataset import DatasetInfo
from trainables.config.protocols import protocol_named
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData, to_float
from trainables.data.pixels import RANGES
from trainables.data.subset import training_images
from trainables.evaluation.inception import NoFeaturesError
from trainables.evaluation.own_features import own_extractor
from trainables.evaluation.own_metric import MetricContext, own_metrics
from trainables.evaluation.scores import frozen_statistics, to_uint8
from trainables.networks.energy_model import EnergyModel
from trainables.networks.layers import without_dropout
from trainables.networks.own import OwnTrunk
from trainables.plugins.calling import calling, heard, said
from trainables.sampling.initial import build_initial
from trainables.training.build import build_model, check_images
from trainables.training.device import random_kept
from trainables.training.own_optimiser import check_optimiser

COUNT = 4
"""Images that each part is shown."""


def has_own_parts(config: TrialConfig) -> bool:
    """Whether a part of a trial is a user's own."""
    named = (("network", config.network), ("initial", config.initial), ("dataset", config.dataset))
    optimiser = is_own("optimiser", config.optimiser)
    own = bool(config.evaluation.metrics) or bool(_extractors(config))
    return optimiser or own or any(is_own(part, name) for part, name in named)


def rehearse(config: TrialConfig, data: ImageData | None = None) -> list[str]:
    """Use every part of a user's own once, on the CPU; returns what a user should know.

    Args:
        data: the trial's images; None: they are read.

    Raises:
        ValueError: a part cannot be used; one line.
    """
    heard()
    if data is None:
        data = training_images(config)
        check_images(config, data)
    remarks: list[str] = []
    model = None
    if is_own("network", config.network):
        model = build_model(config, data.shape, data.classes, config.seed)
        check_network(config, model, _images(data))
        remarks += _checked_on_gpu(config, model, data.shape)
    if is_own("initial", config.initial) and config.chains:
        random = torch.Generator().manual_seed(0)
        build_initial(config.initial, data, 0.0, arguments=config.initial_args).sample(2, random)
    if is_own("optimiser", config.optimiser):
        check_optimiser(config.optimiser, config.optimiser_args)
    check_extractors(config, data)
    check_metrics(config, data)
    return [*remarks, *heard()]


def _images(data: ImageData) -> Tensor:
    """The first images in [-1, 1], on their device."""
    return to_float(data.images[:COUNT])


def check_network(config: TrialConfig, model: EnergyModel, images: Tensor) -> None:
    """One forward and backward of images (N, C, H, W) in [-1, 1] in train mode; the model stays as it is.

    Raises:
        ValueError: it fails, its output has no graph or is not finite, or its state cannot be copied or saved.
    """
    name, network = config.network, model.trunk.network if isinstance(model.trunk, OwnTrunk) else model
    x = RANGES[config.pixel_range].from_signed(images).detach().requires_grad_()
    wanted = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad(), frozen_statistics(model), random_kept(x.device):
        without_dropout(model)
        with calling("network", name, f"forward of {tuple(x.shape)} in train mode", network):
            energy = model.energy(x)
            logits = model.logits(x) if config.classifies else None
        with calling("network", name, "backward", network):
            wrong = next(_wrong(energy, logits, x, wanted, twice=config.gradient_penalty > 0), None)
    if wrong is not None:
        raise ValueError(said("network", name, wrong, network))
    with calling("network", name, "its state", network):
        copy.deepcopy(model).load_state_dict(model.state_dict())
    if odd := next((n for n, v in model.state_dict().items() if not isinstance(v, Tensor)), None):
        raise ValueError(said("network", name, f"its state_dict() holds {odd}, which is not a tensor", network))


def _wrong(
    energy: Tensor, logits: Tensor | None, x: Tensor, weights: list[nn.Parameter], *, twice: bool
) -> Iterator[str]:
    if tuple(energy.shape) != (len(x),):
        yield f"gives energies of shape {tuple(energy.shape)} for {len(x)} images"
    for what, values in (("energy", energy), ("class logits", logits)):
        if values is not None and not bool(torch.isfinite(values).all()):
            yield f"its {what} of the first training images {'is' if what == 'energy' else 'are'} not finite"
    if not weights:
        yield "has no parameters to train"
    if not energy.requires_grad:
        yield "its output has no graph: something in forward detaches it (no_grad, detach, NumPy)"
    slopes: Sequence[Tensor | None] = torch.autograd.grad(
        energy.sum(), [x, *weights], allow_unused=True, create_graph=twice, retain_graph=True
    )
    if slopes[0] is None:
        yield "its energy has no gradient to the image, which the sampler descends: something in forward detaches x"
    used = [s for s in slopes[1:] if s is not None]
    if not used:
        yield "its energy has no gradient to any parameter"
    for what, found in (("the image", slopes[:1]), ("the parameters", used)):
        if not all(bool(torch.isfinite(s).all()) for s in found if s is not None):
            yield f"the gradient of its energy to {what} is not finite"
    if twice and slopes[0] is not None:
        slopes[0].square().sum().backward(inputs=weights)


def _checked_on_gpu(config: TrialConfig, model: EnergyModel, shape: tuple[int, int, int]) -> list[str]:
    """Whether a forward would meet a tensor that stayed on the CPU, were the network on a GPU; none is needed here.

    Raises:
        ValueError: it would, and the trial is to run on one.
    """
    if config.device == "cpu":
        return []
    network = model.trunk.network if isinstance(model.trunk, OwnTrunk) else model
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), random_kept(torch.device("cpu")):
            state = {n: torch.empty(v.shape, dtype=v.dtype, device="cuda") for n, v in _tensors(model).items()}
            x = torch.empty(COUNT, *shape, device="cuda")
            with calling("network", config.network, "forward on a GPU", network):
                functional_call(model.eval(), state, (x,))
    except ValueError as error:
        if "same device" not in str(error):  # something else of a dry run, which a real pass does not mind
            return []
        if config.device == "cuda" or torch.cuda.is_available():
            raise
        return [f"would fail on a GPU: {error}"]
    except Exception:  # the mode's own limits
        return []
    return []


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _extractors(config: TrialConfig) -> list[str]:
    names = config.evaluation.protocols
    found = [protocol_named(name).extractor for name in names] if isinstance(names, tuple) else []
    return [name for name in found if name is not None]


def check_extractors(config: TrialConfig, data: ImageData) -> None:
    """Take features of the first training images by every extractor of a user's own.

    Raises:
        ValueError: one cannot be loaded, or gives no features.
    """
    images = to_uint8(_images(data), "round")
    for name in _extractors(config):
        try:
            own_extractor(name).features(images, images.device)
        except NoFeaturesError as error:
            raise ValueError(str(error)) from error


def check_metrics(config: TrialConfig, data: ImageData) -> None:
    """Take every metric of a user's own of the first training images, as if they were samples.

    Raises:
        ValueError: one fails, or gives no number.
    """
    images = to_uint8(_images(data), "round")
    for metric in own_metrics(config.evaluation.metrics):
        random = torch.Generator(images.device).manual_seed(0)
        ctx = MetricContext("buffer", "rehearsal", data, images.device, random, lambda x: x.flatten(1).mean(1))
        metric.take(images, ctx)


def stand_in(known: DatasetInfo) -> ImageData:
    """Noise of the shape of a known data set's images, two for each class."""
    count = max(2 * known.classes, 2 * COUNT)
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, known.channels, known.side, known.side), generator=random)
    labels = torch.arange(count) % known.classes
    pixels = images.to(torch.uint8)
    return ImageData(known.name, pixels, labels, pixels, labels, known.classes, "noise#")
