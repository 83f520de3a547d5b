"""New samples of a trained model, from the file a completed trial leaves or from a trial's checkpoint.

A checkpoint has the replay buffer and VERA's generator too. A p0 made of the training images needs those as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from trainables.config.dataset import dataset_info
from trainables.config.initial import initial_kind
from trainables.config.trial import TrialConfig
from trainables.data.pixels import RANGES
from trainables.data.subset import training_images
from trainables.models.model_file import SavedModel, fit, load_model, model_of, naming, read_state, threads_of
from trainables.models.views import load_data, load_initial
from trainables.networks.arithmetic import precision_kept, set_precision
from trainables.plugins.reference import use_study_of
from trainables.results.progress import note
from trainables.sampling.initial import Initial, build_initial
from trainables.training.device import derive_seed
from trainables.training.drawing import Drawing
from trainables.training.execution import layout_of, resolve_execution
from trainables.training.method import Method
from trainables.training.trainer import to_grid, upgrade_state

Shape = tuple[int, int, int]
_PART = 1000
"""Images of a buffer that are turned into uint8 at a time."""
WITHOUT_NETWORK = "a model file does not hold; take a checkpoint of the trial"


def fresh_samples(
    saved: SavedModel, count: int, steps: int, *, initial: Initial | None, seed: int, batch_size: int = 100
) -> Tensor:
    """`count` samples no buffer has seen, uint8 (count, C, H, W) on the CPU: `Trainer.fresh_samples` from a file.

    The same seed gives the same samples on a CPU, bit by bit; no other random state has a part in it. Batch norm uses
    the batch's own statistics, so with it an image depends on those of its batch. ValueError: the method makes no
    samples, what makes them is not given, a number is out of its range, or samples are not finite.

    Args:
        steps: K, Langevin steps of a chain; 0 gives p0's own draws. A generator takes none, and no p0.
        initial: p0, on the model's device (`initial_of`).
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
    lost = done = 0

    def keep(part: Tensor) -> None:
        nonlocal lost, done
        done += len(part)
        note("drawing samples", done, count)
        lost += int((~torch.isfinite(part).flatten(1).all(1)).sum())
        images.append(to_grid(part))

    draws = torch.Generator(saved.device).manual_seed(seed)
    method, networks = cast("Method", c.method_args), {"energy": saved.model, **saved.others}
    with precision_kept():
        set_precision(c.precision, cudnn_benchmark=c.cudnn_benchmark)
        if missing := [name for name in method.kept if name not in networks]:
            raise ValueError(f"{c.method} samples with its {missing[0]}, which {WITHOUT_NETWORK}")
        saved.model.to(memory_format=layout_of(c))  # as in training; the values stay
        # Not compiled: a file's samples seldom repay it, and it needs a compiler on this machine.
        graphed = resolve_execution(c, saved.device).graphed
        place = c, saved.device, networks, initial, steps, batch_size
        method.draw(Drawing(*place, graphed=graphed, on_remark=warnings.warn), count, draws, keep)
    if lost:  # `to_grid` would make them black, and black images would be scored as samples
        raise ValueError(f"{lost} of {count} samples of {c.method} are not finite after {steps} steps")
    return torch.cat(images).contiguous()


def initial_of(saved: SavedModel) -> Initial | None:
    """The model's p0 on its device; None for a method without chains. May raise as `load_data`, if it needs images."""
    c = saved.config
    if not c.chains:
        return None
    if saved.path.name:  # of a file
        use_study_of(saved.path)
    if not initial_kind(c.initial).needs_images:
        return build_initial(c.initial, saved, c.covariance_jitter, arguments=c.initial_args)
    return load_initial(saved, load_data(saved).to(saved.device))


def find_checkpoint(path: Path) -> Path:
    """`path`, or the only `*.pt` in that folder or in its `models`. ValueError: there is none, or there are several."""
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


def load_any(path: Path, device: str | torch.device = "cpu", *, data_dir: Path | None = None) -> SavedModel:
    """Read a model file (`models/ID.pt`) or a trial's checkpoint (`checkpoint.pt`, `trial.pt`), or a folder with one.

    The samples of a checkpoint are its whole replay buffer, shuffled as a model file's are; n = 0 where there is none
    that was written to. Its `classes` is 0 where neither a class head nor the data set's name tells. Images are read,
    from `data_dir` if given, only for a checkpoint without buffer and generator on images of one's own, to know their
    shape. ValueError: not one of these files, damaged, or of another version; one line that names the file.
    """
    path = find_checkpoint(path)
    # Mapped: of a checkpoint the weights and the buffer are read, and not optimisers and second networks.
    state = read_state(path, "a model file or a checkpoint", mmap=True)
    moved = {} if data_dir is None else {"data_dir": str(data_dir.resolve())}
    if isinstance(state, dict) and "format" in state:
        saved = load_model(path, device)
        return replace(saved, config=saved.config.model_copy(update=moved))
    if not isinstance(state, dict) or not {"config", "data_source", "trainer"} <= state.keys():
        raise ValueError(f"{path}: neither a model file (models/ID.pt) nor the checkpoint of a trial")
    with naming(path, "damaged"):
        use_study_of(path)
        config = TrialConfig.model_validate_json(state["config"]).model_copy(update=moved)
    with naming(path, f"its state does not fit a {config.network} trial of this version"):
        return replace(_from_checkpoint(config, state, torch.device(device)), path=path)


def _from_checkpoint(config: TrialConfig, state: Mapping[str, Any], device: torch.device) -> SavedModel:
    parts = upgrade_state(state["trainer"])
    # As `Trainer.scored_model`: the configuration sees to it that there is an average where it is asked for.
    weights = parts["networks"]["energy"]["average" if config.evaluation.weights == "ema" else "weights"]
    shape, classes = _image_shape(config, parts), 0
    if "class_head.weight" in weights:  # a WRN of M-EBM has one too, which is not trained
        classes = len(weights["class_head.weight"])
    elif (known := dataset_info(config.dataset)) is not None:
        classes = known.classes
    method, others = cast("Method", config.method_args), {}
    model = model_of(config, shape, classes, weights, device, "state does not fit a {} trial")
    epoch, iteration = int(parts["epoch"]), int(parts["iteration"])
    stored, source = _stored(config, parts["buffer"], shape, epoch), str(state["data_source"])
    for name in method.kept[1:]:
        with torch.device("meta"):
            wanted = method.untrained(name, shape).state_dict()
        if not fit(parts["networks"][name]["weights"], wanted):
            raise LookupError
        others[name] = method.untrained(name, shape).to(device).requires_grad_(False)
        others[name].load_state_dict(parts["networks"][name]["weights"])
    return SavedModel(
        config, model, stored, source, classes, epoch, iteration, threads=threads_of(state), others=others
    )


def _image_shape(config: TrialConfig, parts: Mapping[str, Any]) -> Shape:
    """(C, H, W), which old checkpoints may not name: then of the data set."""
    if parts["shape"] is not None:
        channels, height, width = parts["shape"]
        return channels, height, width
    known = dataset_info(config.dataset)
    if known is None:
        return training_images(config).shape
    side = config.image_size or known.side
    return known.channels, side, side


def _stored(config: TrialConfig, buffer: Mapping[str, Any] | None, shape: Shape, epoch: int) -> Tensor:
    """What a buffer's `pool` gives, in the order of `Trainer.sample_pool` on a CPU: uint8 (n, C, H, W)."""
    if buffer is None:
        return torch.empty(0, *shape, dtype=torch.uint8)
    images: Tensor = buffer["newest"]["images"] if config.buffer == "reservoir" else buffer["images"]
    pixels, draws = RANGES[config.pixel_range], torch.Generator().manual_seed(derive_seed(config.seed, f"pool {epoch}"))
    found = torch.empty(len(images), *shape, dtype=torch.uint8)
    order = torch.randperm(len(images), generator=draws)
    for place, rows in zip(found.split(_PART), order.split(_PART), strict=True):
        part = images[rows]
        # Grey levels at their middle.
        whole = (part.float() + 0.5) / 256 * 2 - 1 if part.dtype == torch.uint8 else pixels.to_signed(part)
        place.copy_(to_grid(whole))
    return found
