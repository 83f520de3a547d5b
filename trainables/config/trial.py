"""The configuration of one trial: every field with its meaning, unit and range.

Where the paper (M-EBM, PAKDD 2023) and the released code (sndnyang/mebm) differ, the difference is a field and its
description names both sides. `trainables.methods.presets.build_trial` fills what a user leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from trainables.config.arguments import Arguments, is_own, own_arguments, parse_arguments, part_of
from trainables.config.initial import initial_kind, initial_kinds
from trainables.config.method import METHODS, MethodSpec, method_class
from trainables.config.network import parse_network
from trainables.config.parts import (
    DivergenceConfig,
    EvaluationConfig,
    Model,
    NonNegativeFloat,
    PositiveFloat,
    Probability,
)
from trainables.config.protocols import protocol_named
from trainables.plugins.installed import BUILT_IN
from trainables.plugins.reference import is_reference, registered
from trainables.results.schema import SETTING_NAMES, UNWRITTEN

MAX_UNFILLED = 1000
"""KL-EBM's entropy term starts once the buffer holds more images (improved_contrastive_divergence train.py:423)."""

SPEED_OPTIONS = (
    "frozen_copies", "merge_bias", "fused_norm", "flipped_backward", "parallel_branches", "cudnn_benchmark",
)  # fmt: skip
"""Fields that change how fast an iteration is and, but for rounding, nothing else."""


OPTIMISERS = ("sgd", "adam")
BUILT_IN["optimiser"] = lambda: OPTIMISERS
ARGUMENTS = ("dataset_args", "network_args", "initial_args", "optimiser_args")


def _none_of(known: Iterable[str]) -> PydanticKnownError:
    return PydanticKnownError("literal_error", {"expected": ", ".join(f"'{name}'" for name in known)})


class TrialConfig(Model):
    """One training run. Defaults are M-EBM's on CIFAR-10 with K = 5, on the digits.

    They are no single command of the release: its script (scripts/maebm_cifar10.sh) runs K = 2 with lambda 0.1 and
    sigma 0 and says lambda 0.5 and sigma 0.001 for K >= 5; the commands of its readme run K = 5 with sigma 0. Every
    field that differs between paper, script and readme says what each has and which its default is. The presets of
    `methods` take lambda and sigma by K, as the script does.
    """

    method: str = "m-ebm"
    """training method: a name of `mebm methods`, or module:Class"""
    method_args: SerializeAsAny[MethodSpec] = Field(default_factory=MethodSpec)
    """the method's own fields (see `mebm methods`)"""

    # Data
    dataset: str = Field("digits", min_length=1, max_length=200)
    """digits (this package's default), cifar10, cifar100, celeba_hq_128, imagenet32, a name of your own data, or
    FILE.py:NAME of what reads them"""
    dataset_args: SerializeAsAny[Arguments] = Field(default_factory=Arguments)
    """arguments of a data set's reader of your own"""
    data_dir: str | None = None
    """folder of the images: torchvision's layout, Hugging Face Parquet files, image folders, or ImageNet-32's
    batches"""
    image_size: int | None = Field(None, ge=4, le=1024)
    """side to which images of a folder or Parquet file are cropped and scaled; null: the data set's own"""
    bad_images: Literal["refuse", "skip"] = "refuse"
    """images that cannot be read or are of an odd size: an error, or left out and counted"""
    train_images: int | None = Field(None, ge=2, le=10**9)
    """train on so many images, the same for every seed; null: all that are not held out"""
    validation_images: int = Field(0, ge=0, le=10**9)
    """training images that are held out and not used, the same for every seed (JEM and JEM++: 5000)"""
    batch_size: int = Field(64, ge=2, le=65_536)
    """images in the energy batch x+ and in the chains x-"""
    label_batch_size: int = Field(128, ge=2, le=65_536)
    """images in the labelled batch; it sets the epoch"""
    augment: Literal["none", "crop_flip"] = "crop_flip"
    """augmentation of the labelled batch: reflect-pad 4, random crop, horizontal flip"""
    energy_augment: Literal["none", "flip", "crop_flip"] = "none"
    """augmentation of x+ (none in M-EBM; crop_flip in JEM, JEM++ and VERA; flip, horizontal alone, in DiffuRecov
    and CF-EBM)"""
    shared_batch: bool = False
    """the labelled batch is x+ itself, in one forward (VERA), not a second batch"""
    batch_order: Literal["shuffled", "replacement"] = "shuffled"
    """x+ in shuffled passes through the data, or drawn with replacement (ShortRun)"""
    pixel_range: Literal["signed", "unit"] = "signed"
    """range of the images: signed [-1, 1], or unit [0, 1] (IGEBM, f-EBM, KL-EBM). alpha, sigma and the gradient clamp
    are in its units"""
    dequantise: bool = False
    """x+ is uint8 plus uniform noise of one grey level, divided by 256 (IGEBM, f-EBM, KL-EBM)"""
    input_noise: NonNegativeFloat = 0.0
    """std of Gaussian noise added to x+ (0 in M-EBM, 0.03 in JEM)"""
    label_noise: NonNegativeFloat = 0.0
    """std of Gaussian noise added to the labelled batch (0 in M-JEM, 0.03 in JEM)"""

    # Network
    network: str = "wrn-28-10"
    """wrn-DEPTH-WIDTH (depth 10, 16, 22, 28, ...), conv-CHANNELS, or a method's own network at a width of your choice:
    igebm-128, febm-128, shortrun-64, multiscale-64, diffurecov-128-8, cfebm-32, gebm-128, clel-128; or FILE.py:NAME
    of your own"""
    network_args: SerializeAsAny[Arguments] = Field(default_factory=Arguments)
    """arguments of a network of your own; searchable as network_args.NAME"""
    norm: Literal["batch", "none", "spectral", "instance"] = "batch"
    """normalisation. wrn, conv: batch or none; igebm, febm, diffurecov, cfebm, gebm, clel: spectral or none;
    multiscale: instance or none; shortrun: none; of a network of your own what it has"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout inside residual blocks, in every training forward (VERA 0.3, IGEBM 0.5)"""
    norm_momentum: Probability = 0.9
    """batch norm's momentum in PyTorch's sense (released: 0.9)"""
    sampler_norm_mode: Literal["train", "eval"] = "train"
    """the network's mode inside the sampler, for batch norm and dropout (released: train; not in the paper)"""
    initialisation: Literal["default", "xavier"] = "default"
    """convolution weights: PyTorch's default (what the released code does) or Xavier uniform with gain sqrt(2) (what it
    defines and never applies)"""

    # Sampler
    initial: str = "gaussian"
    """p0: N(mu, Sigma) of the data (from 64 pixels up estimated on down-sampled images, as released); the same at full
    resolution with a low-rank Sigma; one Gaussian per class (JEM++); uniform in the pixel range; normal, N(0, 1) in
    every pixel (DiffuRecov); or FILE.py:NAME of your own"""
    initial_args: SerializeAsAny[Arguments] = Field(default_factory=Arguments)
    """arguments of a p0 of your own"""
    initial_rank: int | None = Field(None, ge=1, le=65_536)
    """principal directions of gaussian-low-rank; null: its default"""
    covariance_jitter: NonNegativeFloat = 1e-4
    """added to Sigma's diagonal (released; not in the paper)"""
    sampling_steps: int = Field(5, ge=1, le=100_000)
    """K: Langevin steps per iteration. Default 5: M-JEM's script and the readme's commands; M-EBM's script has 2, the
    paper's tables 1 to 20"""
    step_size: PositiveFloat = 1.0
    """alpha: Langevin step size"""
    inner_steps: int = Field(1, ge=1, le=1000)
    """N of JEM++: proximal steps through the first layer per Langevin step, each of size alpha / N with its own clamps;
    1: plain SGLD"""
    noise_std: NonNegativeFloat = 0.001
    """sigma of the Langevin noise. Default 0.001: the paper at every K, the released scripts at K>=5. At K=2 the script
    has 0, and so have the readme's commands at K=5 and the CelebA script"""
    noise_placement: Literal["after", "before"] = "after"
    """noise after the gradient step, or before the gradient is taken (IGEBM, f-EBM, KL-EBM)"""
    gradient_clamp: PositiveFloat | None = 1.0
    """elementwise clamp of the sampler's gradient (released: 1; not in the paper); null: none"""
    sample_clamp: bool = True
    """clamp chains to the pixel range at every step (released; not in the paper)"""
    buffer: Literal["replace", "ring", "reservoir", "none"] = "replace"
    """replay buffer. replace: filled from p0, chains overwrite their slots; ring: uint8, starts empty, the oldest goes
    (IGEBM); reservoir: uint8, keeps a uniform sample of all chains (KL-EBM); none (ShortRun)"""
    buffer_augment: Literal["none", "contrastive"] = "none"
    """contrastive: crops, flips and colour jitter of every drawn chain state (KL-EBM)"""
    buffer_size: int = Field(10_000, ge=1, le=10_000_000)
    """|B|: slots of the replay buffer"""
    reinit_probability: Probability = 0.05
    """rho: probability that a chain restarts from p0"""

    # Objective
    l2_weight: NonNegativeFloat = 0.5
    """lambda of the L2 term on the energies. Default 0.5: the released scripts at K>=5. At K=2 the script has 0.1, the
    CelebA script 0; the paper gives no value"""
    l2_form: Literal["paper", "released", "batch_means"] = "released"
    """paper: mean(E+^2) + mean(E-^2); released: mean(E+^2) + mean(E-)^2 (train_maebm.py:219); batch_means: mean(E+)^2 +
    mean(E-)^2 (before 2022-07-24, and the CelebA script)"""
    class_weight: PositiveFloat = 1.0
    """weight of the cross-entropy, for methods with a classifier (VERA's alpha: 100 or 1)"""
    kl_weight: NonNegativeFloat = 0.0
    """weight of the KL term: energy of x- through the last Langevin step (KL-EBM: 1)"""
    entropy_weight: NonNegativeFloat = 0.0
    """weight of the log nearest-neighbour distance of x- to buffer samples (KL-EBM: 0.3)"""
    gradient_penalty: NonNegativeFloat = 0.0
    """weight of mean |dE/dx+|^2 / 2 (VERA: 0.1)"""

    # Optimisation
    optimiser: str = "sgd"
    """sgd with momentum, adam, or FILE.py:NAME of your own (torch.optim:RMSprop), which is given the learning rate and
    none of momentum, betas and weight_decay"""
    optimiser_args: SerializeAsAny[Arguments] = Field(default_factory=Arguments)
    """arguments of an optimiser of your own"""
    learning_rate: PositiveFloat = 0.1
    """base learning rate. Default 0.1: the released CIFAR-10 scripts. 0.02 for CIFAR-100, CelebA-HQ and ImageNet-32 is
    the paper's (Appendix A); for CIFAR-100 the release has no command"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """momentum of SGD (released: 0.9; not in the paper)"""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """decay rates of Adam's moments"""
    weight_decay: NonNegativeFloat = 5e-4
    """weight decay of every parameter that gets a gradient (released: 5e-4; not in the paper)"""
    clip_norm: PositiveFloat | None = None
    """bound on the gradient's norm (KL-EBM: 0.5)"""
    clip_sigma: PositiveFloat | None = None
    """bound on every gradient element: this many of Adam's standard deviations + 0.1 (IGEBM: 3)"""
    sam_rho: NonNegativeFloat = 0.0
    """radius of sharpness-aware minimisation: the gradient is taken again, on the same images, a step of this length up
    the first one (SADA-JEM: 2); 0: plain, one pass"""
    sam_adaptive: bool = False
    """that step is measured and taken in units of each weight's size (ASAM; SADA-JEM)"""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """decay per iteration of a moving average of the weights (KL-EBM: 0.99); null: none"""
    warmup_iterations: int = Field(1000, ge=0, le=10**12)
    """lr = base * it / warmup for the first iterations; it 0 has lr 0 (released: 1000; not in the paper)"""
    decay_epochs: tuple[Annotated[int, Field(ge=1, le=10**9)], ...] = (60, 120, 180)
    """epochs where lr decays (the released CIFAR-10 scripts; not in the paper). One inside the warm-up holds from its
    end on; in the release the warm-up overwrites it"""
    decay_factor: PositiveFloat = 0.2
    """factor of each decay"""
    epochs: int = Field(200, ge=1, le=1_000_000)
    """epochs to train. Default 200: the scripts and Appendix A; section 5 of the paper has 150 at most, and 50 on
    ImageNet-32"""
    iterations_per_epoch: int | None = Field(None, ge=1, le=10**9)
    """iterations in an epoch; null: floor(training images / label_batch_size), 390 for CIFAR"""

    divergence: DivergenceConfig = Field(default_factory=DivergenceConfig)
    """detector of divergence"""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """quality numbers"""

    # Numerics and bookkeeping
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """arithmetic of convolutions and products; tf32 means fp32 on a CPU"""
    memory_format: Literal["channels-last", "contiguous"] = "channels-last"
    """how images and convolution weights lie in memory; for speed, equal but for rounding. Against the released code,
    on a CPU in fp32, running statistics differ by 4e-6 with channels-last, by 2e-7 with contiguous"""
    execution: Literal["eager", "compiled", "graphed", "compiled-graphed"] = "eager"
    """how an iteration is issued; speed only. compiled: torch.compile of the network; graphed: one CUDA graph per
    iteration, eager on a CPU. A method that cannot do it runs without and says so"""
    frozen_copies: bool = True
    """bf16: the sampler's frozen weights are rounded once per iteration, not in every pass; speed only, the same
    values"""
    merge_bias: bool = False
    """a convolution's bias before a batch norm is not added, since the norm takes it away again; its running mean has
    it. Speed only; equal but for rounding"""
    fused_norm: bool = False
    """execution graphed: batch norm, LeakyReLU, bias and shortcut of wrn- and conv-networks in two kernels instead of
    PyTorch's; elsewhere it does nothing. Speed only; equal but for rounding"""
    flipped_backward: bool = False
    """the gradient to the image of 3x3 convolutions whose channels are no multiple of 64 is taken as a convolution with
    flipped weights: cuDNN has no fast kernel for it in bf16. Speed only; equal but for rounding"""
    parallel_branches: bool = False
    """in a CUDA graph x+ and the labelled batch run beside the sampler; eager runs them in the same order, one after
    another. Speed only; equal but for rounding"""
    cudnn_benchmark: bool = False
    """cuDNN tries its algorithms for every shape and keeps the fastest (CUDA); speed only"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto: CUDA where there is one"""
    seed: int = Field(0, ge=0, lt=2**63)
    """seed of every random draw (released scripts: 1)"""
    signal_every: int = Field(1, ge=1, le=10**9)
    """record the signals of every n-th iteration"""

    @model_validator(mode="before")
    @classmethod
    def _as_today(cls, values: Any) -> Any:
        return upgrade_config(values) if isinstance(values, dict) else values

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS and not is_reference(value) and value not in registered("method"):
            raise _none_of([*METHODS, *registered("method")])
        method_class(value)
        return value

    @field_validator("method_args", mode="before")
    @classmethod
    def _own_fields(cls, value: Any, info: ValidationInfo) -> Any:
        if "method" not in info.data:  # unknown, which is said already
            return MethodSpec()
        kind = method_class(info.data["method"])
        if isinstance(value, MethodSpec):
            value = value if type(value) is kind else {}
        if isinstance(value, dict):  # in a grid of several methods a field that this one has not is null
            value = {name: v for name, v in value.items() if v is not None or name in kind.model_fields}
        return value if isinstance(value, kind) else kind.model_validate(value)

    @field_validator("initial")
    @classmethod
    def _known_initial(cls, value: str) -> str:
        if is_own("initial", value):
            initial_kind(value)
        elif value not in initial_kinds():
            raise _none_of(initial_kinds())
        return value

    @field_validator("optimiser")
    @classmethod
    def _known_optimiser(cls, value: str) -> str:
        if is_own("optimiser", value):
            own_arguments("optimiser", value)
        elif value not in OPTIMISERS:
            raise PydanticKnownError("literal_error", {"expected": "'sgd', 'adam' or FILE.py:NAME"})
        return value

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, value: str) -> str:
        if is_own("dataset", value):
            own_arguments("dataset", value)
        return value

    @field_validator("network_args", "initial_args", "dataset_args", "optimiser_args", mode="before")
    @classmethod
    def _own_arguments(cls, value: Any, info: ValidationInfo) -> Any:
        part = part_of(str(info.field_name))
        return parse_arguments(part, info.data[part], value) if part in info.data else Arguments()

    @field_validator("evaluation")
    @classmethod
    def _known_protocols(cls, value: EvaluationConfig) -> EvaluationConfig:
        if isinstance(value.protocols, tuple):
            try:
                own = [p for p in map(protocol_named, value.protocols) if p.features == "own"]
            except ValueError as error:
                raise ValueError(f"protocols: {error}") from None
            if len({p.source for p in own}) < len(own):
                raise ValueError(
                    "protocols: a trial has one extractor of your own for the buffer and one for fresh chains; "
                    "`mebm evaluate -p` takes any number afterwards"
                )
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
        self.method_args.checked(self)
        if reason := next(chain(self._of_buffer_and_network(), self._of_objective_and_speed()), None):
            raise ValueError(reason)
        return self

    def _of_buffer_and_network(self) -> Iterator[str]:
        spec = self.method_args
        if self.buffered and self.buffer_size < self.batch_size:
            yield f"buffer_size ({self.buffer_size}) must be at least batch_size ({self.batch_size})"
        if self.buffered and self.buffer == "ring" and self.buffer_size == self.batch_size:
            yield f"buffer_size ({self.buffer_size}) of a ring must be more than batch_size"
        family, _ = parse_network(self.network)
        family.check(norm=self.norm, initialisation=self.initialisation, dropout=self.dropout)
        if self.inner_steps > 1 and not family.stem:
            yield f"inner_steps > 1 needs a wrn- or conv-network, but network is {self.network}"
        if spec.needs_one_energy and family.energies > 1:
            yield f"{self.method} plays with one energy per image, which a {family.name}-network does not have"
        if self.clip_sigma is not None and self.optimiser != "adam":
            yield "clip_sigma uses Adam's second moment: set optimiser to adam"
        if self.evaluation.metrics and (self.evaluation.protocols == "none" or not spec.sources(self)):
            why = "evaluation.protocols is none" if spec.sources(self) else f"{self.method} has none"
            yield f"evaluation.metrics are taken of samples, but {why}"
        if self.evaluation.weights == "ema" and self.ema_decay is None:
            yield "evaluation.weights is ema, but ema_decay is null"
        if self.evaluation.accuracy_on == "validation" and self.validation_images == 0:
            yield "evaluation.accuracy_on is validation, but validation_images is 0"
        if self.energy_augment != "none" and self.dequantise:
            yield "energy_augment and dequantise exclude each other"
        if self.shared_batch and not (self.classifies and spec.head == "logsumexp"):
            yield "shared_batch needs a method whose energy comes from its class logits"

    def _of_objective_and_speed(self) -> Iterator[str]:
        terms = [name for name in ("kl_weight", "entropy_weight") if getattr(self, name) > 0]
        if terms and "sampler_terms" not in self.method_args.uses:
            yield f"{terms[0]} must be 0 for {self.method}"
        if self.entropy_weight > 0 and self.buffer == "none":
            yield "entropy_weight needs a replay buffer, but buffer is none"
        if self.entropy_weight > 0 and self.buffer_size <= MAX_UNFILLED:
            yield (
                f"the entropy term starts once the buffer holds more than {MAX_UNFILLED} images, but buffer_size is "
                f"{self.buffer_size}; set entropy_weight to 0 or a larger buffer_size"
            )
        if terms and self.inner_steps > 1:
            yield "kl_weight and entropy_weight need inner_steps 1"
        if self.buffer_augment != "none" and self.buffer not in ("ring", "reservoir"):
            yield "buffer_augment needs a buffer of 8-bit images, ring or reservoir"
        if self.fused_norm and self.memory_format != "channels-last":
            yield "fused_norm needs memory_format channels-last"
        if self.fused_norm and (second := ["gradient_penalty"] * (self.gradient_penalty > 0) + terms):
            yield f"fused_norm has no second derivative, which {second[0]} needs: turn it off"
        if self.shared_batch and self.label_batch_size != self.batch_size:
            yield f"label_batch_size ({self.label_batch_size}) must be batch_size ({self.batch_size}) with shared_batch"

    @property
    def chains(self) -> bool:
        """True for the methods whose x- are ends of Langevin chains."""
        return "langevin" in self.method_args.uses

    @property
    def samples(self) -> bool:
        """True for the methods with an energy and a sampler."""
        return "data" in self.method_args.uses

    @property
    def buffered(self) -> bool:
        """True for the methods that keep a replay buffer of chains."""
        return "buffer" in self.method_args.uses and self.buffer != "none"

    @property
    def classifies(self) -> bool:
        """True for the methods trained with a cross-entropy term."""
        return "classifier" in self.method_args.uses

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
        values |= self._own_arguments_by_column()
        own = self.method_args
        values |= {column: getattr(own, name) for name, column in own.column.items()}
        # What a method does not have is null, not its unused default.
        for names, has in (
            (("initial",), "initial" in own.uses),
            (("sampling_steps", "step_size", "noise_std", "gradient_clamp", "buffer"), self.chains),
            (("buffer_size", "reinit_probability"), self.buffered),
            (("l2_weight", "l2_form"), "l2" in own.uses),
            (("class_weight",), self.classifies),
        ):
            if not has:
                values |= dict.fromkeys(names)
        return values

    def _own_arguments_by_column(self) -> dict[str, Any]:
        found = {f"{a}.{n}": v for a in ARGUMENTS for n, v in getattr(self, a).model_dump(mode="json").items()}
        return {name: json.dumps(v) if isinstance(v, list) else v for name, v in found.items() if v is not None}

    def to_json(self, *, with_seed: bool = True) -> str:
        """The complete configuration as JSON with sorted keys; the same text means the same training run."""
        values = self.model_dump(mode="json")
        if not with_seed:
            del values["seed"]
        for name in (
            "method_args",
            *ARGUMENTS,
            *UNWRITTEN,
        ):  # without what is not used, so that settings keep their ids
            if not values[name]:
                del values[name]
        if not values["evaluation"]["metrics"]:
            del values["evaluation"]["metrics"]
        return json.dumps(values, sort_keys=True)

    def identity(self) -> str:
        """What makes it one setting with all others that differ in their seed alone: JSON with sorted keys.

        Own fields stand where they stood before `method_args`, so a setting keeps its id.
        """
        values = json.loads(self.to_json(with_seed=False))
        for name, method in OLD_PARTS.items():
            own = values.pop("method_args", {}) if self.method == method else None
            values[name] = method_class(method)().model_dump(mode="json") if own is None else own
        return json.dumps(values, sort_keys=True)


OLD_PARTS = {"critic": "f-ebm", "generator": "vera"}
"""Names under which the own fields of two methods stood, in every configuration, before `method_args`."""


def upgrade_config(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration as they are called today.

    `critic.*` and `generator.*` become `method_args.*` of the method they belong to; for the others they said nothing.
    """
    if not OLD_PARTS.keys() & values.keys():
        return values
    values = dict(values)
    for name, method in OLD_PARTS.items():
        part = values.pop(name, None)
        if part is None:
            continue
        if values.get("method", "m-ebm") == method and isinstance(part, dict):
            values["method_args"] = part | dict(values.get("method_args") or {})
        else:
            said = {n: v for n, v in part.items() if v is not None} if isinstance(part, dict) else part
            method_class(method).model_validate(said)
    return values
