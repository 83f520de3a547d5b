"""The configuration of one trial: every field with its meaning, unit and range.

Where the paper (M-EBM, PAKDD 2023) and the released code (sndnyang/mebm) differ, the difference is a field and its
description names both sides. `trainables.methods.build_trial` fills what a user leaves out.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trainables.definitions import DEFINITIONS, Definition, MethodName
from trainables.network_names import parse_network
from trainables.protocols import PROTOCOLS
from trainables.schema import SETTING_NAMES, DetectorRule

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]


MOST_UNFILLED = 1000
"""KL-EBM's entropy term starts once the buffer holds more images (improved_contrastive_divergence train.py:423)."""

SPEED_OPTIONS = (
    "frozen_copies", "merge_bias", "fused_norm", "flipped_backward", "parallel_branches", "cudnn_benchmark",
)  # fmt: skip
"""Fields that change how fast an iteration is and, but for rounding, nothing else."""

Divergence = Literal["jensen-shannon", "squared-hellinger", "reverse-kl", "kl", "pearson"]
"""f-divergences of f-EBM."""


@cache
def _number_fields(model: type[BaseModel]) -> frozenset[str]:
    """Fields that take a number, or several, and no truth value."""

    def kinds(annotation: Any) -> set[Any]:
        inner = get_args(annotation)
        return set().union(*map(kinds, inner)) if inner else {annotation}

    found = {name: kinds(field.annotation) for name, field in model.model_fields.items()}
    return frozenset(name for name, types in found.items() if types & {int, float} and not types & {bool, Any})


def _worded(value: Any) -> Any:
    """`true` as the word where it stands for a number: pydantic would take it for 1, but says what a word is not."""
    if isinstance(value, bool):
        return str(value).lower()
    return [_worded(item) for item in value] if isinstance(value, list | tuple) else value


class StrictModel(BaseModel):
    """A model whose numbers are never truth values."""

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        numbers = _number_fields(cls)
        odd = [n for n, v in values.items() if v.__class__ in (bool, list, tuple) and n in numbers]
        return values | {name: _worded(values[name]) for name in odd} if odd else values


class _Model(StrictModel):
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
        1.0,
        description="a trial that ends with its buffer's quality worse than this multiple of p0's own has collapsed: "
        "by more than the sampling error of the two scores, with at least three quarters of its iterations after the "
        "warm-up, five passes through the images (or 2,000 iterations) and |B| chains written; before that it is "
        "undertrained",
    )
    action: Literal["stop", "record"] = Field(
        "stop",
        description="stop: end the trial at the verdict, which ends runs that the released code would continue. "
        "record: note the alarm and train on until the released check or a non-finite value ends it (to compare the "
        "two)",
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
        5,
        ge=1,
        le=100_000,
        description="epochs between evaluations, of samples and accuracy; the last epoch is always evaluated. The best "
        "epoch is one of these. Released M-EBM: FID after epochs 0, 5, 10, ... counted from 0 and the last, accuracy "
        "after every epoch",
    )
    protocols: tuple[str, ...] | Literal["auto", "none"] = Field(
        "auto",
        description="protocol names (see `mebm methods`), 'none', or 'auto': the small-classifier distance "
        "for small or grey images, the paper's FID and IS for the rest; on the buffer and on fresh chains",
    )
    fresh_steps: int = Field(20, ge=1, le=100_000, description="Langevin steps of a fresh chain from p0")
    batch_size: int = Field(100, ge=1, le=100_000, description="images per batch of the evaluation")
    keep_model: bool = Field(
        True,
        description="keep weights and samples of a trial's end, if it completes, and of its best epoch, for `mebm "
        "figures`, `evaluate` and `sample` (WRN-28-10 with 10,000 samples: about 210 MB each)",
    )
    accuracy_on: Literal["test", "validation"] = Field(
        "test",
        description="images that accuracy is taken on. test, as released: a best accuracy is then selected on the test "
        "set. validation: the held-out training images (needs validation_images)",
    )
    weights: Literal["last", "ema"] = Field(
        "last", description="which weights are scored: the trained ones, or their moving average (needs ema_decay)"
    )


class CriticConfig(_Model):
    """The second network of f-EBM (ermongroup/f-EBM train_febm.py)."""

    divergence: Divergence = Field("jensen-shannon", description="the f-divergence that energy and critic play for")
    start_iteration: int = Field(
        11,
        ge=0,
        le=10**9,
        description="iterations before it train the L2 terms alone, on chains the buffer does not keep",
    )


class GeneratorConfig(_Model):
    """The generator of VERA (wgrathwohl/VERA models/generator.py, train.py)."""

    noise_dim: int = Field(128, ge=1, le=65_536, description="dimension of the latent z ~ N(0, I)")
    features: int = Field(256, ge=1, le=65_536, description="channels of the generator's residual blocks")
    learning_rate: PositiveFloat = Field(6e-5, description="base learning rate of the generator's Adam")
    posterior_learning_rate: PositiveFloat = Field(
        3e-5, description="learning rate of the posterior's Adam, without schedule"
    )
    entropy_weight: NonNegativeFloat = Field(1e-4, description="weight of the generator's entropy")
    importance_samples: int = Field(20, ge=1, le=10_000, description="posterior samples per estimate of its gradient")
    noise_std_range: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.01, 0.3), description="bounds of the learned noise that is added to g(z)"
    )

    @field_validator("noise_std_range")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("must be a lower and an upper bound")
        return value


class TrialConfig(_Model):
    """One training run. Defaults are M-EBM's on CIFAR-10 with K = 5, on the digits.

    They are no single command of the release: its script (scripts/maebm_cifar10.sh) runs K = 2 with lambda 0.1 and
    sigma 0 and says lambda 0.5 and sigma 0.001 for K >= 5; the commands of its readme run K = 5 with sigma 0. Every
    field that differs between paper, script and readme says what each has and which its default is. The presets of
    `methods` take lambda and sigma by K, as the script does.
    """

    method: MethodName = Field("m-ebm", description="training method")

    # Data
    dataset: str = Field(
        "digits",
        min_length=1,
        max_length=200,
        description="digits (this package's default), cifar10, cifar100, celeba_hq_128, imagenet32, or a name of your "
        "own data",
    )
    data_dir: str | None = Field(
        None,
        description="folder of the images: torchvision's layout, Hugging Face Parquet files, image folders, or "
        "ImageNet-32's batches",
    )
    image_size: int | None = Field(
        None,
        ge=4,
        le=1024,
        description="side to which images of a folder or Parquet file are cropped and scaled; null: the data set's own",
    )
    bad_images: Literal["refuse", "skip"] = Field(
        "refuse", description="images that cannot be read or are of an odd size: an error, or left out and counted"
    )
    train_images: int | None = Field(
        None,
        ge=2,
        le=10**9,
        description="train on so many images, the same for every seed; null: all that are not held out",
    )
    validation_images: int = Field(
        0,
        ge=0,
        le=10**9,
        description="training images that are held out and not used, the same for every seed (JEM and JEM++: 5000)",
    )
    batch_size: int = Field(64, ge=2, le=65_536, description="images in the energy batch x+ and in the chains x-")
    label_batch_size: int = Field(128, ge=2, le=65_536, description="images in the labelled batch; it sets the epoch")
    augment: Literal["none", "crop_flip"] = Field(
        "crop_flip", description="augmentation of the labelled batch: reflect-pad 4, random crop, horizontal flip"
    )
    energy_augment: Literal["none", "crop_flip"] = Field(
        "none", description="augmentation of x+ (none in M-EBM; crop_flip in JEM, JEM++ and VERA)"
    )
    shared_batch: bool = Field(
        False, description="the labelled batch is x+ itself, in one forward (VERA), not a second batch"
    )
    batch_order: Literal["shuffled", "replacement"] = Field(
        "shuffled", description="x+ in shuffled passes through the data, or drawn with replacement (ShortRun)"
    )
    pixel_range: Literal["signed", "unit"] = Field(
        "signed",
        description="range of the images: signed [-1, 1], or unit [0, 1] (IGEBM, f-EBM, KL-EBM). alpha, sigma and the "
        "gradient clamp are in its units",
    )
    dequantise: bool = Field(
        False, description="x+ is uint8 plus uniform noise of one grey level, divided by 256 (IGEBM, f-EBM, KL-EBM)"
    )
    input_noise: NonNegativeFloat = Field(
        0.0, description="std of Gaussian noise added to x+ (0 in M-EBM, 0.03 in JEM)"
    )
    label_noise: NonNegativeFloat = Field(
        0.0, description="std of Gaussian noise added to the labelled batch (0 in M-JEM, 0.03 in JEM)"
    )

    # Network
    network: str = Field(
        "wrn-28-10",
        description="wrn-DEPTH-WIDTH (depth 10, 16, 22, 28, ...), conv-CHANNELS, or a method's own network at a width "
        "of your choice: igebm-128, febm-128, shortrun-64, multiscale-64",
    )
    norm: Literal["batch", "none", "spectral", "instance"] = Field(
        "batch",
        description="normalisation. wrn, conv: batch or none; igebm, febm: spectral or none; multiscale: instance or "
        "none; shortrun: none",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="dropout inside residual blocks, in every training forward (VERA 0.3, IGEBM 0.5)"
    )
    norm_momentum: Probability = Field(0.9, description="batch norm's momentum in PyTorch's sense (released: 0.9)")
    sampler_norm_mode: Literal["train", "eval"] = Field(
        "train",
        description="the network's mode inside the sampler, for batch norm and dropout (released: train; not in the "
        "paper)",
    )
    initialisation: Literal["default", "xavier"] = Field(
        "default",
        description="convolution weights: PyTorch's default (what the released code does) or Xavier uniform with gain "
        "sqrt(2) (what it defines and never applies)",
    )

    # Sampler
    initial: Literal["gaussian", "gaussian-low-rank", "class-gaussian", "uniform"] = Field(
        "gaussian",
        description="p0: N(mu, Sigma) of the data (from 64 pixels up estimated on down-sampled images, as released); "
        "the same at full resolution with a low-rank Sigma; one Gaussian per class (JEM++); uniform in the pixel range",
    )
    initial_rank: int | None = Field(
        None, ge=1, le=65_536, description="principal directions of gaussian-low-rank; null: its default"
    )
    covariance_jitter: NonNegativeFloat = Field(
        1e-4, description="added to Sigma's diagonal (released; not in the paper)"
    )
    sampling_steps: int = Field(
        5,
        ge=1,
        le=100_000,
        description="K: Langevin steps per iteration. Default 5: M-JEM's script and the readme's commands; M-EBM's "
        "script has 2, the paper's tables 1 to 20",
    )
    step_size: PositiveFloat = Field(1.0, description="alpha: Langevin step size")
    inner_steps: int = Field(
        1,
        ge=1,
        le=1000,
        description="N of JEM++: proximal steps through the first layer per Langevin step, each of size alpha / N with "
        "its own clamps; 1: plain SGLD",
    )
    noise_std: NonNegativeFloat = Field(
        0.001,
        description="sigma of the Langevin noise. Default 0.001: the paper at every K, the released scripts at K>=5. "
        "At K=2 the script has 0, and so have the readme's commands at K=5 and the CelebA script",
    )
    noise_placement: Literal["after", "before"] = Field(
        "after", description="noise after the gradient step, or before the gradient is taken (IGEBM, f-EBM, KL-EBM)"
    )
    gradient_clamp: PositiveFloat | None = Field(
        1.0, description="elementwise clamp of the sampler's gradient (released: 1; not in the paper); null: none"
    )
    sample_clamp: bool = Field(
        True, description="clamp chains to the pixel range at every step (released; not in the paper)"
    )
    buffer: Literal["replace", "ring", "reservoir", "none"] = Field(
        "replace",
        description="replay buffer. replace: filled from p0, chains overwrite their slots; ring: uint8, starts empty, "
        "the oldest goes (IGEBM); reservoir: uint8, keeps a uniform sample of all chains (KL-EBM); none (ShortRun)",
    )
    buffer_augment: Literal["none", "contrastive"] = Field(
        "none", description="contrastive: crops, flips and colour jitter of every drawn chain state (KL-EBM)"
    )
    buffer_size: int = Field(10_000, ge=1, le=10_000_000, description="|B|: slots of the replay buffer")
    reinit_probability: Probability = Field(0.05, description="rho: probability that a chain restarts from p0")

    # Objective
    l2_weight: NonNegativeFloat = Field(
        0.5,
        description="lambda of the L2 term on the energies. Default 0.5: the released scripts at K>=5. At K=2 the "
        "script has 0.1, the CelebA script 0; the paper gives no value",
    )
    l2_form: Literal["paper", "released", "batch_means"] = Field(
        "released",
        description="paper: mean(E+^2) + mean(E-^2); released: mean(E+^2) + mean(E-)^2 (train_maebm.py:219); "
        "batch_means: mean(E+)^2 + mean(E-)^2 (before 2022-07-24, and the CelebA script)",
    )
    class_weight: PositiveFloat = Field(
        1.0, description="weight of the cross-entropy, for methods with a classifier (VERA's alpha: 100 or 1)"
    )
    kl_weight: NonNegativeFloat = Field(
        0.0, description="weight of the KL term: energy of x- through the last Langevin step (KL-EBM: 1)"
    )
    entropy_weight: NonNegativeFloat = Field(
        0.0, description="weight of the log nearest-neighbour distance of x- to buffer samples (KL-EBM: 0.3)"
    )
    gradient_penalty: NonNegativeFloat = Field(0.0, description="weight of mean |dE/dx+|^2 / 2 (VERA: 0.1)")
    critic: CriticConfig = Field(default_factory=CriticConfig, description="the critic of f-EBM")
    generator: GeneratorConfig = Field(default_factory=GeneratorConfig, description="the generator of VERA")

    # Optimisation
    optimiser: Literal["sgd", "adam"] = Field("sgd", description="SGD with momentum, or Adam")
    learning_rate: PositiveFloat = Field(
        0.1,
        description="base learning rate. Default 0.1: the released CIFAR-10 scripts. 0.02 for CIFAR-100, CelebA-HQ and "
        "ImageNet-32 is the paper's (Appendix A); for CIFAR-100 the release has no command",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="momentum of SGD (released: 0.9; not in the paper)"
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="decay rates of Adam's moments"
    )
    weight_decay: NonNegativeFloat = Field(
        5e-4, description="weight decay of every parameter that gets a gradient (released: 5e-4; not in the paper)"
    )
    clip_norm: PositiveFloat | None = Field(None, description="bound on the gradient's norm (KL-EBM: 0.5)")
    clip_sigma: PositiveFloat | None = Field(
        None, description="bound on every gradient element: this many of Adam's standard deviations + 0.1 (IGEBM: 3)"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay per iteration of a moving average of the weights (KL-EBM: 0.99); null: none"
    )
    warmup_iterations: int = Field(
        1000,
        ge=0,
        le=10**12,
        description="lr = base * it / warmup for the first iterations; it 0 has lr 0 (released: 1000; not in the "
        "paper)",
    )
    decay_epochs: tuple[Annotated[int, Field(ge=1, le=10**9)], ...] = Field(
        (60, 120, 180),
        description="epochs where lr decays (the released CIFAR-10 scripts; not in the paper). One inside the warm-up "
        "holds from its end on; in the release the warm-up overwrites it",
    )
    decay_factor: PositiveFloat = Field(0.2, description="factor of each decay")
    epochs: int = Field(
        200,
        ge=1,
        le=1_000_000,
        description="epochs to train. Default 200: the scripts and Appendix A; section 5 of the paper has 150 at most, "
        "and 50 on ImageNet-32",
    )
    iterations_per_epoch: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="iterations in an epoch; null: floor(training images / label_batch_size), 390 for CIFAR",
    )

    divergence: DivergenceConfig = Field(default_factory=DivergenceConfig, description="detector of divergence")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="quality numbers")

    # Numerics and bookkeeping
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32", description="arithmetic of convolutions and products; tf32 means fp32 on a CPU"
    )
    memory_format: Literal["channels-last", "contiguous"] = Field(
        "channels-last",
        description="how images and convolution weights lie in memory; for speed, equal but for rounding. Against the "
        "released code, on a CPU in fp32, running statistics differ by 4e-6 with channels-last, by 2e-7 with "
        "contiguous",
    )
    execution: Literal["eager", "compiled", "graphed", "compiled-graphed"] = Field(
        "eager",
        description="how an iteration is issued; speed only. compiled: torch.compile of the network; graphed: one CUDA "
        "graph per iteration, eager on a CPU. A method that cannot do it runs without and says so",
    )
    frozen_copies: bool = Field(
        True,
        description="bf16: the sampler's frozen weights are rounded once per iteration, not in every pass; speed only, "
        "the same values",
    )
    merge_bias: bool = Field(
        False,
        description="a convolution's bias before a batch norm is not added, since the norm takes it away again; its "
        "running mean has it. Speed only; equal but for rounding",
    )
    fused_norm: bool = Field(
        False,
        description="execution graphed: batch norm, LeakyReLU, bias and shortcut of wrn- and conv-networks in "
        "two kernels instead of PyTorch's; elsewhere it does nothing. Speed only; equal but for rounding",
    )
    flipped_backward: bool = Field(
        False,
        description="the gradient to the image of 3x3 convolutions whose channels are no multiple of 64 is taken as a "
        "convolution with flipped weights: cuDNN has no fast kernel for it in bf16. Speed only; equal but for rounding",
    )
    parallel_branches: bool = Field(
        False,
        description="in a CUDA graph x+ and the labelled batch run beside the sampler; eager runs them in the same "
        "order, one after another. Speed only; equal but for rounding",
    )
    cudnn_benchmark: bool = Field(
        False, description="cuDNN tries its algorithms for every shape and keeps the fastest (CUDA); speed only"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train; auto: CUDA where there is one")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random draw (released scripts: 1)")
    signal_every: int = Field(1, ge=1, le=10**9, description="record the signals of every n-th iteration")

    @field_validator("evaluation")
    @classmethod
    def _known_protocols(cls, value: EvaluationConfig) -> EvaluationConfig:
        if isinstance(value.protocols, tuple):
            for name in value.protocols:
                if name not in PROTOCOLS:
                    raise ValueError(f"protocols: {name!r} is unknown; known: {', '.join(PROTOCOLS)}")
        return value

    @field_validator("data_dir")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        if value is not None and ("\0" in value or len(value) > 4000):
            raise ValueError("must be a path of at most 4,000 characters")
        return value

    @field_validator("network")
    @classmethod
    def _known_network(cls, value: str) -> str:
        parse_network(value)
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
        if self.buffered and self.buffer_size < self.batch_size:
            raise ValueError(f"buffer_size ({self.buffer_size}) must be at least batch_size ({self.batch_size})")
        if self.buffered and self.buffer == "ring" and self.buffer_size == self.batch_size:
            raise ValueError(f"buffer_size ({self.buffer_size}) of a ring must be more than batch_size")
        family = parse_network(self.network).family
        family.check(norm=self.norm, initialisation=self.initialisation, dropout=self.dropout)
        if self.inner_steps > 1 and not family.stem:
            raise ValueError(f"inner_steps > 1 needs a wrn- or conv-network, but network is {self.network}")
        if self.definition.critic and family.name == "multiscale":
            raise ValueError(f"{self.method} plays with one energy per image, which a multiscale-network does not have")
        if self.clip_sigma is not None and self.optimiser != "adam":
            raise ValueError("clip_sigma uses Adam's second moment: set optimiser to adam")
        if self.evaluation.weights == "ema" and self.ema_decay is None:
            raise ValueError("evaluation.weights is ema, but ema_decay is null")
        if self.evaluation.accuracy_on == "validation" and self.validation_images == 0:
            raise ValueError("evaluation.accuracy_on is validation, but validation_images is 0")
        if self.energy_augment != "none" and self.dequantise:
            raise ValueError("energy_augment and dequantise exclude each other")
        if self.shared_batch and not (self.classifies and self.definition.energy == "logsumexp"):
            raise ValueError("shared_batch needs a method whose energy comes from its class logits")
        if self.sampler != "chains" or self.definition.critic:
            for name in ("kl_weight", "entropy_weight"):
                if getattr(self, name) > 0:
                    raise ValueError(f"{name} must be 0 for {self.method}")
        if self.entropy_weight > 0 and self.buffer == "none":
            raise ValueError("entropy_weight needs a replay buffer, but buffer is none")
        if self.entropy_weight > 0 and self.buffer_size <= MOST_UNFILLED:
            raise ValueError(
                f"the entropy term starts once the buffer holds more than {MOST_UNFILLED} images, but buffer_size is "
                f"{self.buffer_size}; set entropy_weight to 0 or a larger buffer_size"
            )
        if (self.kl_weight > 0 or self.entropy_weight > 0) and self.inner_steps > 1:
            raise ValueError("kl_weight and entropy_weight need inner_steps 1")
        if self.buffer_augment != "none" and self.buffer not in ("ring", "reservoir"):
            raise ValueError("buffer_augment needs a buffer of 8-bit images, ring or reservoir")
        if self.fused_norm and self.memory_format != "channels-last":
            raise ValueError("fused_norm needs memory_format channels-last")
        if self.fused_norm:
            for name in ("gradient_penalty", "kl_weight", "entropy_weight"):
                if getattr(self, name) > 0:
                    raise ValueError(f"fused_norm has no second derivative, which {name} needs: turn it off")
        if self.shared_batch and self.label_batch_size != self.batch_size:
            raise ValueError(
                f"label_batch_size ({self.label_batch_size}) must be batch_size ({self.batch_size}) with shared_batch"
            )
        return self

    @property
    def definition(self) -> Definition:
        """The parts that make the method what it is."""
        return DEFINITIONS[self.method]

    @property
    def sampler(self) -> Literal["chains", "generator"] | None:
        """Where x- comes from; None for a plain classifier."""
        return self.definition.sampler

    @property
    def samples(self) -> bool:
        """True for the methods with an energy and a sampler."""
        return self.sampler is not None

    @property
    def buffered(self) -> bool:
        """True for the methods that keep a replay buffer of chains."""
        return self.sampler == "chains" and self.buffer != "none"

    @property
    def classifies(self) -> bool:
        """True for the methods trained with a cross-entropy term."""
        return self.definition.classifies

    @property
    def divergence_name(self) -> str | None:
        """The f-divergence of a method with a critic; None for the others."""
        return self.critic.divergence if self.definition.critic else None

    @property
    def trivial_optimum(self) -> float:
        """Where the losses with an L2 term of weight lambda have their optimum for energies that ignore the image.

        The gap there is -trivial_optimum / lambda: 1 for contrastive divergence; for f-EBM u'(0) = v'(0), since r+ = r-
        = 0 there.
        """
        slopes = {"jensen-shannon": 0.5, "squared-hellinger": 0.5, "reverse-kl": 1.0, "kl": 1.0, "pearson": 2.0}
        return slopes[self.critic.divergence] if self.definition.critic else 1.0

    @property
    def options(self) -> str:
        """The fields that are there for speed alone and not at their defaults: `fused_norm+cudnn_benchmark`."""
        named = {"frozen_copies": "no-frozen_copies"}
        fields = type(self).model_fields
        return "+".join(named.get(f, f) for f in SPEED_OPTIONS if getattr(self, f) != fields[f].default)

    def setting(self, iterations_per_epoch: int | None = None) -> dict[str, Any]:
        """The setting's columns of `trials.parquet` (`schema.SETTING_FIELDS`).

        Args:
            iterations_per_epoch: what the data's size made of `iterations_per_epoch`, once known.
        """
        values = {name: getattr(self, name, None) for name in SETTING_NAMES}
        values["iterations_per_epoch"] = iterations_per_epoch or self.iterations_per_epoch
        values["f_divergence"] = self.divergence_name
        # What a method does not have is null, not its unused default.
        chains = ("initial", "sampling_steps", "step_size", "noise_std", "gradient_clamp", "buffer")
        for names, has in (
            (chains, self.sampler == "chains"),
            (("buffer_size", "reinit_probability"), self.buffered),
            (("l2_weight", "l2_form"), self.samples),
            (("class_weight",), self.classifies),
        ):
            if not has:
                values |= dict.fromkeys(names)
        return values

    def to_json(self, *, with_seed: bool = True) -> str:
        """The complete configuration as JSON with sorted keys; the same text means the same training run."""
        values = self.model_dump(mode="json")
        if not with_seed:
            del values["seed"]
        return json.dumps(values, sort_keys=True)
