"""New samples of a trained model, from the file a completed trial leaves or from a trial's checkpoint.

A model file holds the energy network and stored samples (`saved`). A checkpoint holds the whole trial, so also its
replay buffer and VERA's generator. Either is enough to start new chains; only a p0 made of the training images needs
those as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from trainables.chain_graph import run_new_chains
from trainables.config import TrialConfig
from trainables.datasets import DATASETS
from trainables.device import precision_kept, set_precision
from trainables.execution import resolve_execution
from trainables.exhibits import load_data
from trainables.generator import FIRST_SIDE, build_generator
from trainables.initial import Initial, Uniform, build_initial
from trainables.learner import derive_seed, training_images
from trainables.pixels import RANGES
from trainables.reports import to_grid
from trainables.saved import SavedModel, fit, load_model, model_of, threads_of
from trainables.tensor_file import load_tensors
from trainables.vera import Generator

Shape = tuple[int, int, int]
_PART = 1000
"""Images of a buffer that are turned into uint8 at a time."""
WITHOUT_GENERATOR = "a model file does not hold; take a checkpoint of the trial"


@dataclass(frozen=True)
class Loaded:
    """What a model file or a checkpoint gives to sample from.

    Attributes:
        path: the file itself, where a folder was named.
        kind: which of the two it is.
        saved: the scored network and the stored samples. Those of a checkpoint are its whole replay buffer, shuffled as
            a model file's are; n = 0 where there is no buffer, or none that was written to. Its `classes` is 0 where
            neither a class head nor the data set's name tells.
        generator: VERA's, from a checkpoint; None for every other method, and for a model file, which does not hold it.
    """

    path: Path
    kind: Literal["model", "checkpoint"]
    saved: SavedModel
    generator: Generator | None = None

    @property
    def shape(self) -> Shape:
        """(C, H, W) of an image."""
        return cast("Shape", tuple(self.saved.samples.shape[1:]))


# ------------------------------------------------------------------------------------------------------- sampling


def fresh_samples(
    saved: SavedModel,
    count: int,
    steps: int,
    *,
    initial: Initial | None,
    seed: int,
    batch_size: int = 100,
    generator: Generator | None = None,
) -> Tensor:
    """`count` samples no buffer has seen, uint8 (count, C, H, W) on the CPU: `Trainer.fresh_samples` from a file.

    Chains of the trial's own sampler from p0, or the generator's images where the method has one. The same seed gives
    the same samples on a CPU, bit by bit; no other random state has a part in it. Batch norm uses the batch's own
    statistics, as in training, so with it an image depends on those of its batch; the running statistics stay as they
    are.

    Args:
        count: at least 1.
        steps: K, Langevin steps of a chain; 0 gives p0's own draws. A generator takes none.
        initial: p0, on the model's device (`initial_of`); not used by a generator.
        seed: of every draw, 0 to 2^63 - 1.
        batch_size: images per forward.
        generator: VERA's (`Loaded.generator`).

    Raises:
        ValueError: the method makes no samples, what makes them is not given, a number is out of its range, or samples
            are not finite.
    """
    c = saved.config
    for name, value, least in (("count", count, 1), ("steps", steps, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, expected 0 to 2^63 - 1")
    if not c.samples:
        raise ValueError(f"{c.method} is a plain classifier and makes no samples")
    images: list[Tensor] = []
    lost = 0

    def keep(part: Tensor) -> None:
        nonlocal lost
        lost += int((~torch.isfinite(part).flatten(1).all(1)).sum())
        images.append(to_grid(part))

    draws = torch.Generator(saved.device).manual_seed(seed)
    with precision_kept():
        set_precision(c.precision, cudnn_benchmark=c.cudnn_benchmark)
        if c.sampler == "generator":
            if generator is None:
                raise ValueError(f"{c.method} samples with its generator, which {WITHOUT_GENERATOR}")
            for part in generator.sample(count, batch_size, draws).split(batch_size):
                keep(part)
        else:
            if initial is None:
                raise ValueError(f"chains of {c.method} start from its p0, which is not given")
            if c.memory_format == "channels-last":
                saved.model.to(memory_format=torch.channels_last)  # as in training; the values stay
            run_new_chains(
                saved.model,
                c,
                saved.pixels.from_signed(initial.sample(count, draws)),
                steps,
                draws,
                lambda end: keep(saved.pixels.to_signed(end)),
                batch_size=batch_size,
                # Not compiled: a file's samples seldom repay it, and it needs a compiler on this machine.
                graphed=resolve_execution(c, saved.device).graphed,
                on_remark=warnings.warn,
            )
    if lost:  # `to_grid` would make them black, and black images would be scored as samples
        raise ValueError(f"{lost} of {count} samples of {c.method} are not finite after {steps} steps")
    return torch.cat(images).contiguous()


def _autocast(config: TrialConfig, device: torch.device) -> AbstractContextManager[Any]:
    if config.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def initial_of(loaded: Loaded) -> Initial | None:
    """The model's p0 on its device; None for a method without chains. A uniform p0 needs no images.

    Raises:
        DataError: the training images are not there.
        ValueError: those that are there are others.
    """
    saved, c = loaded.saved, loaded.saved.config
    if c.sampler != "chains":
        return None
    if c.initial == "uniform":
        return Uniform(loaded.shape)
    data = load_data(saved).to(saved.device)
    return build_initial(c.initial, data, c.covariance_jitter, rank=c.initial_rank)


# -------------------------------------------------------------------------------------------------------- reading


def find_checkpoint(path: Path) -> Path:
    """The file that is meant: `path`, or the only `*.pt` in that folder, or in its `models` where it has none itself.

    So the folder of `mebm train` stands for its checkpoint.

    Raises:
        ValueError: a folder with none or with several.
    """
    if not path.is_dir():
        return path
    found: list[Path] = []
    for place in (path, path / "models"):
        found = found or sorted(p for p in place.glob("*.pt") if p.is_file())
    if not found:
        raise ValueError(f"{path}: a folder without a model file or checkpoint (*.pt)")
    if len(found) > 1:
        shown = ", ".join(p.name for p in found[:4]) + (", ..." if len(found) > 4 else "")
        raise ValueError(f"{found[0].parent}: holds {len(found)} models; name one of {shown}")
    return found[0]


def load_any(path: Path, device: str | torch.device = "cpu", *, data_dir: Path | None = None) -> Loaded:
    """Read a model file (`models/ID.pt`) or a trial's checkpoint (`checkpoint.pt`, `trial.pt`), or a folder with one.

    No images are read, but for a checkpoint without buffer and generator on images of one's own: then nothing else
    knows their shape.

    Args:
        device: where the network goes.
        data_dir: where the training images are now, in place of the configuration's `data_dir`.

    Raises:
        ValueError: not one of these files, damaged, or of another version; one line that names the file.
    """
    path = find_checkpoint(path)
    try:
        # Mapped: of a checkpoint the weights and the buffer are read, and not optimisers and second networks.
        state = load_tensors(path, mmap=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch raises whatever the damage leads to
        raise ValueError(f"{path}: not a model file or a checkpoint, or damaged ({type(error).__name__})") from error
    if isinstance(state, dict) and "format" in state:
        saved = load_model(path, device)
        return Loaded(path, "model", replace(saved, config=_moved(saved.config, data_dir)))
    if not isinstance(state, dict) or not {"config", "data_source", "trainer"} <= state.keys():
        raise ValueError(f"{path}: neither a model file (models/ID.pt) nor the checkpoint of a trial")
    return _from_checkpoint(path, state, torch.device(device), data_dir)


def _moved(config: TrialConfig, data_dir: Path | None) -> TrialConfig:
    return config if data_dir is None else config.model_copy(update={"data_dir": str(data_dir.resolve())})


def _from_checkpoint(path: Path, state: Mapping[str, Any], device: torch.device, data_dir: Path | None) -> Loaded:
    try:
        config = _moved(TrialConfig.model_validate_json(state["config"]), data_dir)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ValueError(f"{path}: its configuration is of another version of this package ({where})") from error
    try:
        parts = state["trainer"]
        # As `Trainer.scored_model`: the configuration sees to it that there is an average where it is asked for.
        weights = parts["average" if config.evaluation.weights == "ema" else "model"]
        shape, classes = _image_shape(config, parts), _classes(config, weights)
        model = model_of(config, shape, classes, weights, "state does")
        generator = None
        if config.sampler == "generator":
            source = torch.Generator(device)
            autocast = partial(_autocast, config, device)
            g = config.generator
            with torch.device("meta"):
                network = build_generator(shape, noise_dim=g.noise_dim, features=g.features)
            if not fit(parts["generator"]["network"], network.state_dict()):
                raise LookupError
            generator = Generator(config.generator, shape, config.betas, 0, source, autocast)
            generator.load_state_dict(parts["generator"])
        saved = SavedModel(
            config,
            model.to(device).eval().requires_grad_(False),
            _stored(config, parts["buffer"], shape, int(parts["epoch"])),
            str(state["data_source"]),
            classes,
            int(parts["epoch"]),
            int(parts["iteration"]),
            threads=threads_of(state),
        )
    except ValueError as error:  # DataError too: the images were asked for their shape
        raise ValueError(f"{path}: {error}") from error
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:  # whatever a damaged or old state leads to
        raise ValueError(f"{path}: its state does not fit a {config.network} trial of this version") from error
    return Loaded(path, "checkpoint", saved, generator)


def _image_shape(config: TrialConfig, parts: Mapping[str, Any]) -> Shape:
    """(C, H, W), which no checkpoint names: from its buffer, its generator, or the data set."""
    if parts["buffer"] is not None:
        channels, height, width = parts["buffer"]["images"].shape[1:]
        return channels, height, width
    if parts["generator"] is not None:
        network = parts["generator"]["network"]
        blocks = {name.split(".")[1] for name in network if name.startswith("blocks.")}
        side = FIRST_SIDE << len(blocks)
        return network["conv.weight"].shape[0], side, side
    known = DATASETS.get(config.dataset)
    if known is None:
        return training_images(config).shape
    side = config.image_size or known.side
    return known.channels, side, side


def _classes(config: TrialConfig, weights: Mapping[str, Tensor]) -> int:
    """Classes of the class head, else of the data set; 0 where neither tells."""
    if "class_head.weight" in weights:  # a WRN of M-EBM has one too, which is not trained
        return len(weights["class_head.weight"])
    return DATASETS[config.dataset].classes if config.dataset in DATASETS else 0


def _stored(config: TrialConfig, buffer: Mapping[str, Any] | None, shape: Shape, epoch: int) -> Tensor:
    """What a buffer's `pool` gives, in the order of `Trainer.sample_pool` on a CPU: uint8 (n, C, H, W)."""
    if buffer is None:
        return torch.empty(0, *shape, dtype=torch.uint8)
    images: Tensor = buffer["newest"]["images"] if config.buffer == "reservoir" else buffer["images"]
    draws = torch.Generator().manual_seed(derive_seed(config.seed, f"pool {epoch}"))
    found = torch.empty(len(images), *shape, dtype=torch.uint8)
    order = torch.randperm(len(images), generator=draws)
    for place, rows in zip(found.split(_PART), order.split(_PART), strict=True):
        part = images[rows]
        if part.dtype == torch.uint8:
            place.copy_(to_grid((part.float() + 0.5) / 256 * 2 - 1))  # grey levels at their middle
        else:
            place.copy_(to_grid(RANGES[config.pixel_range].to_signed(part)))
    return found
