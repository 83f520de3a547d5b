"""What a run is built of: its networks with their optimisers, and whether there are images enough for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.evaluation.scores import protocols_for
from trainables.networks.energy_model import EnergyModel, build_network
from trainables.networks.layers import Speed, seeded, set_dropout_generator
from trainables.training.device import derive_seed
from trainables.training.method import Progress
from trainables.training.network import MovingAverage, TrainedNetwork, build_optimiser
from trainables.training.objective import learning_rate

if TYPE_CHECKING:
    from trainables.training.context import Context


class Make:
    """What `Method.networks` builds with."""

    def __init__(self, ctx: Context) -> None:
        self.trial, self.device = ctx.trial, ctx.device
        self.shape, self.classes = ctx.data_set.shape, ctx.data_set.classes
        self.images = ctx.data_set.images
        self._ctx = ctx

    def seed(self, purpose: str) -> int:
        """A seed for the weights of a network."""
        return derive_seed(self.trial.seed, purpose)

    def seeded(self, purpose: str, build: Callable[[], nn.Module]) -> nn.Module:
        """A network of the method's own, with weights of the purpose's seed."""
        with seeded(self.seed(purpose)):
            return build()

    def energy(self, purpose: str | None = None) -> TrainedNetwork:
        """The trial's network with the trial's optimiser: the energy's, or with a purpose another of its kind.

        The other has its purpose's seed, no moving average and no bound on the gradient's norm.
        """
        c = self.trial
        model = build_model(c, self.shape, self.classes, c.seed if purpose is None else self.seed(purpose))
        # Inductor fuses what the kernels fuse, and cannot look into them; launched one by one they cost more than they
        # save (WRN-28-10, K = 5, bf16 on an H100: 68 ms eager without, 100 ms with them).
        fused = c.fused_norm and self._ctx.execution.name == "graphed" and c.norm == "batch"
        model.trunk.speed = Speed(c.merge_bias, fused, c.flipped_backward)
        model.to(memory_format=self._ctx.layout)
        model.to(self.device)
        set_dropout_generator(model, self._ctx.generators["dropout"])
        optimiser = build_optimiser(
            model.parameters(),
            c.optimiser,
            learning_rate=c.learning_rate,
            momentum=c.momentum,
            betas=c.betas,
            weight_decay=c.weight_decay,
            arguments=c.optimiser_args,
        )
        first = purpose is None
        return TrainedNetwork(
            model,
            optimiser,
            self.scheduled(c.learning_rate),
            clip_norm=c.clip_norm if first else None,
            clip_sigma=c.clip_sigma,
            average=MovingAverage(model, c.ema_decay) if first and c.ema_decay is not None else None,
        )

    def trained(
        self,
        network: nn.Module,
        learning_rate: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        scheduled: bool = True,
        watched: bool = True,
    ) -> TrainedNetwork:
        """A network of the method's own, with Adam.

        Args:
            scheduled: the rate follows the trial's warm-up and decays.
            watched: a step that is not finite ends the trial.
        """
        network.to(self.device)
        optimiser = build_optimiser(network.parameters(), "adam", learning_rate=learning_rate, betas=betas)
        rate = self.scheduled(learning_rate) if scheduled else None
        return TrainedNetwork(network, optimiser, rate, watched=watched)

    def scheduled(self, base: float) -> Callable[[Progress], float]:
        """The trial's warm-up and decays of a base rate."""
        c = self.trial
        return lambda at: learning_rate(
            at.iteration,
            at.epoch,
            base=base,
            warmup_iterations=c.warmup_iterations,
            decay_epochs=c.decay_epochs,
            factor=c.decay_factor,
        )


def build_model(config: TrialConfig, shape: tuple[int, int, int], classes: int, seed: int = 0) -> EnergyModel:
    """The untrained network of a configuration for images of a shape (channels, height, width), on the CPU."""
    return build_network(
        config.network,
        shape,
        classes,
        norm=config.norm,
        momentum=config.norm_momentum,
        initialisation=config.initialisation,
        energy=config.method_args.head or "head",
        dropout=config.dropout,
        class_head=True if config.classifies else None,
        arguments=config.network_args,
        seed=seed,
    )


def check_images(config: TrialConfig, data: ImageData) -> None:
    """Whether there are enough images for a trial's batches and for what it is scored against.

    Raises:
        ValueError: there are not; the message begins with the field that asks for them.
    """
    count, name = len(data.images), data.name
    labelled = config.classifies or config.iterations_per_epoch is None  # it sets the epoch
    for batch in ["batch_size"] * config.samples + ["label_batch_size"] * labelled:
        if (size := getattr(config, batch)) > count:
            raise ValueError(f"{batch}: {size} images, but there are {count} training images of {name}")
    if config.classifies and data.classes < 2:
        raise ValueError(f"method: {config.method} needs labels, but the images of {name} have one class")
    if len(data.test_images):
        return
    if config.classifies and config.evaluation.accuracy_on == "test":
        raise ValueError(
            f"evaluation.accuracy_on: test, but {name} has no test images; give it a test split, or set accuracy_on to "
            "validation and validation_images to how many training images are held out"
        )
    for protocol in protocols_for(config, data.shape):
        if protocol.reference != "train":
            raise ValueError(
                f"evaluation.protocols: {protocol.name} compares with test images, but {name} has none; give it a test "
                "split, or take a protocol against the training images"
            )
