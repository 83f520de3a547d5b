"""The configuration of one trial: every field with its meaning, unit and range.

Where the paper (M-EBM, PAKDD 2023) and the released code (sndnyang/mebm) differ, the difference is a field and its
description names both sides. `trainables.methods.build_trial` fills what a user leaves out.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trainables.protocols import PROTOCOLS
from trainables.schema import SETTING_NAMES, DetectorRule

MethodName = Literal["m-ebm", "m-jem", "lse-jem", "softmax"]
NETWORK_PATTERN = re.compile(r"wrn-(\d+)-(\d+)|conv-(\d+)")

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DivergenceConfig(_Model):
    """When a trial is called diverged or collapsed. Thresholds were measured on 265 small runs; see the README."""

    gap_limit: PositiveFloat = Field(2.0, description="largest |E+ - E-| of a healthy run, in energy units")
    gap_patience: int = Field(
        3, ge=1, le=10_000, description="iterations in a row beyond the limit that raise the alarm"
    )
    l2_fraction: PositiveFloat = Field(
        0.5, description="with an L2 term the limit is at most this fraction of its trivial optimum 1/lambda"
    )
    hard_gap_limit: PositiveFloat = Field(20.0, description="|E+ - E-| that raises the alarm at once")
    loss_limit: PositiveFloat = Field(1e5, description="|generative loss| of the released check (train_maebm.py:224)")
    energy_limit: PositiveFloat | None = Field(
        None, description="max |E|; off: energies have a free offset that drifts"
    )
    gradient_norm_limit: PositiveFloat | None = Field(None, description="norm of the parameters' gradient; off")
    collapse_patience: int = Field(
        20,
        ge=1,
        le=100_000,
        description="with an L2 term: iterations in a row with the gap within 50% of -1/lambda that mean 'collapsed'",
    )
    collapse_ratio: PositiveFloat = Field(
        1.0, description="a trial that ends with quality worse than this multiple of p0's own has collapsed"
    )
    action: Literal["stop", "record"] = Field(
        "stop",
        description="stop: end the trial at the verdict. record: note the alarm and train on until the released check "
        "or a non-finite value ends it (to compare the detector with it)",
    )
    read_every: int = Field(
        50, ge=1, le=100_000, description="iterations between the host's looks at the device-side latch (CUDA; CPU: 1)"
    )

    @property
    def rule(self) -> DetectorRule:
        """The alarm's thresholds as analysis replays them."""
        return DetectorRule(
            gap_limit=self.gap_limit,
            gap_patience=self.gap_patience,
            l2_fraction=self.l2_fraction,
            hard_gap_limit=self.hard_gap_limit,
            loss_limit=self.loss_limit,
        )


class EvaluationConfig(_Model):
    """Which quality numbers are taken, how often, under which protocol."""

    every: int = Field(
        5, ge=1, le=100_000, description="epochs between evaluations; the last epoch is always evaluated"
    )
    protocols: tuple[str, ...] | Literal["auto", "none"] = Field(
        "auto",
        description="protocol names (see `mebm methods`), 'none', or 'auto': the small-classifier distance "
        "for small or grey images, the paper's FID and IS for the rest; on the buffer and on fresh chains",
    )
    fresh_steps: int = Field(20, ge=1, le=100_000, description="Langevin steps of a fresh chain from p0")
    batch_size: int = Field(100, ge=1, le=100_000, description="images per batch of the evaluation")


class TrialConfig(_Model):
    """One training run. Defaults are the released CIFAR-10 scripts of M-EBM (scripts/maebm_cifar10.sh)."""

    method: MethodName = Field("m-ebm", description="training method")

    # Data
    dataset: str = Field("digits", min_length=1, description="digits, cifar10, cifar100, or a name of your own data")
    data_dir: str | None = Field(
        None, description="folder of the images: torchvision's layout, or Hugging Face Parquet files (train*, test*)"
    )
    batch_size: int = Field(64, ge=2, le=65_536, description="images in the energy batch x+ and in the chains x-")
    label_batch_size: int = Field(128, ge=2, le=65_536, description="images in the labelled batch; it sets the epoch")
    augment: Literal["none", "crop_flip"] = Field(
        "crop_flip", description="augmentation of the labelled batch: reflect-pad 4, random crop, horizontal flip"
    )
    input_noise: NonNegativeFloat = Field(
        0.0, description="std of Gaussian noise added to x+ (0 in M-EBM, 0.03 in JEM)"
    )

    # Network
    network: str = Field("wrn-28-10", description="wrn-DEPTH-WIDTH (depth 10, 16, 22, 28, ...) or conv-CHANNELS")
    norm: Literal["batch", "none"] = Field("batch", description="normalisation layers of the network")
    norm_momentum: Probability = Field(0.9, description="batch norm's momentum in PyTorch's sense (released: 0.9)")
    sampler_norm_mode: Literal["train", "eval"] = Field(
        "train", description="mode of batch norm inside the sampler (released: train; not in the paper)"
    )
    initialisation: Literal["default", "xavier"] = Field(
        "default",
        description="convolution weights: PyTorch's default (what the released code does) or Xavier uniform with gain "
        "sqrt(2) (what it defines and never applies)",
    )

    # Sampler
    initial: Literal["gaussian", "uniform"] = Field("gaussian", description="p0: N(mu, Sigma) of the data, or U[-1, 1]")
    covariance_jitter: NonNegativeFloat = Field(
        1e-4, description="added to Sigma's diagonal (released; not in the paper)"
    )
    sampling_steps: int = Field(5, ge=1, le=100_000, description="K: Langevin steps per iteration")
    step_size: PositiveFloat = Field(1.0, description="alpha: Langevin step size")
    noise_std: NonNegativeFloat = Field(
        0.001, description="sigma of the Langevin noise. Paper: 0.001; released scripts: 0 at K=2, 0.001 at K>=5"
    )
    gradient_clamp: PositiveFloat | None = Field(
        1.0, description="elementwise clamp of the sampler's gradient (released: 1; not in the paper); null: none"
    )
    sample_clamp: bool = Field(True, description="clamp chains to [-1, 1] at every step (released; not in the paper)")
    buffer_size: int = Field(10_000, ge=1, le=10_000_000, description="|B|: slots of the replay buffer")
    reinit_probability: Probability = Field(0.05, description="rho: probability that a chain restarts from p0")

    # Objective
    l2_weight: NonNegativeFloat = Field(
        0.5,
        description="lambda of the L2 term on the energies. Released: 0.1 at K=2, 0.5 at K>=5; no value in the paper",
    )
    l2_form: Literal["paper", "released", "batch_means"] = Field(
        "released",
        description="paper: mean(E+^2) + mean(E-^2); released: mean(E+^2) + mean(E-)^2 (train_maebm.py:219); "
        "batch_means: mean(E+)^2 + mean(E-)^2 (before 2022-07-24, and the CelebA script)",
    )

    # Optimisation
    learning_rate: PositiveFloat = Field(0.1, description="base learning rate of SGD (0.02 for CIFAR-100)")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="momentum of SGD")
    weight_decay: NonNegativeFloat = Field(5e-4, description="weight decay of every parameter that gets a gradient")
    warmup_iterations: int = Field(
        1000, ge=0, description="lr = base * it / warmup for the first iterations; it 0 has lr 0"
    )
    decay_epochs: tuple[Annotated[int, Field(ge=1)], ...] = Field((60, 120, 180), description="epochs where lr decays")
    decay_factor: PositiveFloat = Field(0.2, description="factor of each decay")
    epochs: int = Field(200, ge=1, le=1_000_000, description="epochs to train")
    iterations_per_epoch: int | None = Field(
        None, ge=1, description="iterations in an epoch; null: floor(training images / label_batch_size), 390 for CIFAR"
    )

    divergence: DivergenceConfig = Field(default_factory=DivergenceConfig, description="detector of divergence")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="quality numbers")

    # Numerics and bookkeeping
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32", description="arithmetic of convolutions and products; tf32 means fp32 on a CPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train; auto: CUDA where there is one")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random draw")
    signal_every: int = Field(1, ge=1, description="record the signals of every n-th iteration")

    @field_validator("evaluation")
    @classmethod
    def _known_protocols(cls, value: EvaluationConfig) -> EvaluationConfig:
        if isinstance(value.protocols, tuple):
            for name in value.protocols:
                if name not in PROTOCOLS:
                    raise ValueError(f"protocols: {name!r} is unknown; known: {', '.join(PROTOCOLS)}")
        return value

    @field_validator("network")
    @classmethod
    def _known_network(cls, value: str) -> str:
        match = NETWORK_PATTERN.fullmatch(value)
        if not match:
            raise ValueError("must be wrn-DEPTH-WIDTH such as wrn-28-10, or conv-CHANNELS such as conv-16")
        if match[1] and (int(match[1]) < 10 or (int(match[1]) - 4) % 6):
            raise ValueError("a Wide ResNet's depth must be 6n + 4 with n >= 1: 10, 16, 22, 28, ...")
        if int(match[2] or match[3]) < 1:
            raise ValueError("width must be at least 1")
        return value

    @field_validator("decay_epochs")
    @classmethod
    def _sorted_epochs(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("must be increasing")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method == "lse-jem" and self.l2_weight > 0:
            # Section 4.2 of the paper: an L2 term on log-sum-exp energies fights the cross-entropy.
            raise ValueError("l2_weight must be 0 for lse-jem: the paper (section 4.2) calls the two incompatible")
        if self.buffer_size < self.batch_size:
            raise ValueError(f"buffer_size ({self.buffer_size}) must be at least batch_size ({self.batch_size})")
        return self

    @property
    def samples(self) -> bool:
        """True for the methods with an energy and a sampler."""
        return self.method != "softmax"

    @property
    def classifies(self) -> bool:
        """True for the methods trained with a cross-entropy term."""
        return self.method != "m-ebm"

    def setting(self, iterations_per_epoch: int | None = None) -> dict[str, Any]:
        """The setting's columns of `trials.parquet` (`schema.SETTING_FIELDS`).

        Args:
            iterations_per_epoch: what the data's size made of `iterations_per_epoch`, once known.
        """
        values = {name: getattr(self, name) for name in SETTING_NAMES}
        values["iterations_per_epoch"] = iterations_per_epoch or self.iterations_per_epoch
        return values

    def to_json(self, *, with_seed: bool = True) -> str:
        """The complete configuration as JSON with sorted keys; the same text means the same training run."""
        values = self.model_dump(mode="json")
        if not with_seed:
            del values["seed"]
        return json.dumps(values, sort_keys=True)
