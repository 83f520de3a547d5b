"""`mebm diagnose`: what chains of a trained model do when they run far longer than in training.

A model trained with short chains can be a good generator at K steps and no density at all: run on, its chains leave the
data (Nijkamp et al., "Learning Non-Convergent Non-Persistent Short-Run MCMC", NeurIPS 2019; "On the Anatomy of
MCMC-Based Maximum Likelihood Learning", AAAI 2020). Energy and FD along the chain tell the two apart.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.results.load import read_diagnosis
from analysis.results.parquet import records, typed_frame, write_parquet
from analysis.stats.trials.chains import Verdict, autocorrelation_time, split_r_hat, verdict
from study.config.errors import UserError, one_line
from study.models.evaluate import Target
from study.record.journal import utc_now
from trainables.data.datasets import to_float
from trainables.data.pixels import RANGES
from trainables.evaluation.scores import frozen_statistics, to_uint8
from trainables.evaluation.small_features import small_extractor
from trainables.models.model_file import SavedModel
from trainables.models.samples import initial_of, load_any
from trainables.models.views import load_data
from trainables.networks.arithmetic import precision_kept, set_precision, torch_threads
from trainables.networks.layers import without_dropout
from trainables.results.files import alone, making
from trainables.results.schema import DIAGNOSIS_COLUMNS
from trainables.training.device import derive_seed, resolve_device
from trainables.training.drawing import Drawing
from trainables.training.execution import autocast, layout_of, resolve_execution
from trainables.training.method import Method

Start = Literal["p0", "data", "buffer"]
STARTS: tuple[Start, ...] = ("p0", "data", "buffer")
Row = dict[str, Any]
TRACE = 200
"""Energies of every chain, evenly spaced over the second half of its steps: what autocorrelation is computed of."""


@dataclass(frozen=True)
class DiagnoseRequest:
    """The options of `mebm diagnose`."""

    steps: int = 10_000
    chains: int = 200
    starts: tuple[Start, ...] = ("p0", "data")
    seed: int = 0
    data_dir: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Rows (`DIAGNOSIS_COLUMNS`) of one model and start, and what they say."""

    rows: list[Row]
    verdict: Verdict


def recorded_steps(steps: int, trained: int) -> list[int]:
    """0, 1, 2, 5, 10, ... up to `steps`, with the K of training and `steps` itself."""
    ladder = {m * 10**e for e in range(len(str(steps))) for m in (1, 2, 5)}
    return sorted(s for s in ladder | {0, trained, steps} if s <= steps)


def diagnose(
    target: Target,
    request: DiagnoseRequest,
    out: Path,
    *,
    device: str = "auto",
    on_step: Callable[[str, int, int], None] | None = None,
) -> list[Diagnosis]:
    """Run long chains of a model, add their rows to a Parquet file, and return them.

    Args:
        on_step: told the start, the steps done, and how many of them are new.

    Raises:
        UserError: a method without chains, a file that cannot be read, a start that the file does not have.
    """
    with target.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    try:
        data_dir = Path(request.data_dir) if request.data_dir else None
        saved = load_any(target.path, resolve_device(device), data_dir=data_dir)
        if not saved.config.chains:
            raise UserError(f"{target.path}: {saved.config.method} draws no samples by chains")
        if type(saved.config.method_args).draw is not Method.draw:  # type: ignore[attr-defined]
            raise UserError(
                f"{target.path}: samples of {saved.config.method} are not single chains that could run longer"
            )
        with torch_threads(saved.threads):
            made = [_diagnosed(saved, start, request, on_step) for start in request.starts]
    except ValueError as error:
        raise UserError(one_line(error)) from error
    common: Row = {"study": target.study, "trial_id": target.trial_id, "model": target.model, "model_digest": digest}
    common |= {"method": saved.config.method, "created_at": utc_now(), "device": saved.device.type}
    common |= {"chains": request.chains, "seed": request.seed}
    done = [
        Diagnosis([{c.name: (common | row).get(c.name) for c in DIAGNOSIS_COLUMNS} for row in rows], said)
        for rows, said in made
    ]
    _write(out, [row for one in done for row in one.rows])
    return done


def _write(out: Path, rows: Sequence[Row]) -> None:
    """Put rows into the file in the place of those of the same models and starts."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("study", "trial_id", "model", "start"))

    ours = {key(row) for row in rows}
    with making(out.parent), alone(out.parent):
        there = records(read_diagnosis(out)) if out.is_file() else []
        kept = [row for row in there if key(row) not in ours] + list(rows)
        write_parquet(typed_frame(kept, DIAGNOSIS_COLUMNS), DIAGNOSIS_COLUMNS, out)


def _diagnosed(
    saved: SavedModel, start: Start, request: DiagnoseRequest, on_step: Callable[[str, int, int], None] | None
) -> tuple[list[Row], Verdict]:
    c, data = saved.config, load_data(saved)
    pixels, draws = RANGES[c.pixel_range], torch.Generator(saved.device)
    draws.manual_seed(derive_seed(request.seed, f"diagnose {start}"))
    extractor = small_extractor(data)
    x = begin = pixels.from_signed(_starts(saved, start, request.chains, draws))
    energy = _energies(saved)
    real = energy(pixels.from_signed(to_float(data.test_images[:1000]).to(saved.device)))
    ladder = recorded_steps(request.steps, c.sampling_steps)
    later = np.linspace(request.steps // 2, request.steps, min(TRACE, max(2, request.steps // 2))).round().astype(int)
    rows: list[Row] = []
    trace: list[NDArray[np.float64]] = []
    done = 0
    for step in sorted({*ladder, *later.tolist()}):
        x, new, done = _moved_on(saved, x, step - done, draws), step - done, step
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"chains of {c.method} from {start} are not finite after {step} steps")
        values = energy(x)
        if step in later:
            trace.append(values)
        if step in ladder:
            rows.append(_row(start, step, values, real, x, begin, pixels))
            shown = to_uint8(pixels.to_signed(x), "round").cpu()
            rows[-1]["fd"], rows[-1]["fd_se"] = extractor.score(shown) if len(shown) > 1 else (None, None)
            rows[-1]["reference"] = f"{extractor.id}, {len(data.images)} training images"
        if on_step:
            on_step(start, step, new)
    mixing = np.stack(trace, axis=1)
    spacing = (request.steps - request.steps // 2) / max(1, len(trace) - 1)
    found = {"autocorrelation_time": autocorrelation_time(mixing, spacing), "r_hat": split_r_hat(mixing)}
    rows = [row | found for row in rows]
    return rows, verdict(rows, c.sampling_steps)


def _starts(saved: SavedModel, start: Start, count: int, draws: torch.Generator) -> Tensor:
    """Where chains begin, float (count, C, H, W) in [-1, 1] on the model's device."""
    if start == "p0":
        initial = initial_of(saved)
        if initial is None:
            raise ValueError(f"{saved.config.method} has no p0")
        return initial.sample(count, draws)
    images = load_data(saved).test_images if start == "data" else saved.samples
    if len(images) < count:
        there = "the test split has" if start == "data" else "the file keeps"
        raise ValueError(f"--start {start}: {there} {len(images)} images; expected --chains at most that")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return to_float(images[order].to(saved.device))


def _moved_on(saved: SavedModel, x: Tensor, steps: int, draws: torch.Generator) -> Tensor:
    """The trial's own sampler, `steps` further; batch norm as in training."""
    if not steps:
        return x
    c, parts = saved.config, list[Tensor]()
    with precision_kept():
        set_precision(c.precision, cudnn_benchmark=c.cudnn_benchmark)
        saved.model.to(memory_format=layout_of(c))
        graphed = resolve_execution(c, saved.device).graphed
        networks = {"energy": saved.model, **saved.others}
        place = c, saved.device, networks, None, steps, c.evaluation.batch_size
        Drawing(*place, graphed=graphed, on_remark=warnings.warn).run(x, draws, parts.append)
    return torch.cat(parts)


def _energies(saved: SavedModel) -> Callable[[Tensor], NDArray[np.float64]]:
    c, model = saved.config, saved.model
    method = cast("Method", c.method_args)

    def energies(x: Tensor) -> NDArray[np.float64]:
        found = []
        with torch.no_grad(), frozen_statistics(model), autocast(c.precision, saved.device):
            without_dropout(model)
            if c.sampler_norm_mode == "eval":
                model.eval()
            for batch in x.split(c.evaluation.batch_size):
                found.append(method.energy(model, batch).double().reshape(len(batch), -1).sum(1).cpu().numpy())
        return np.concatenate(found)

    return energies


def _row(
    start: str, step: int, values: NDArray[np.float64], real: NDArray[np.float64], x: Tensor, begin: Tensor, pixels: Any
) -> Row:
    low, high = np.quantile(values, (0.1, 0.9))
    ends = ((x <= pixels.low) | (x >= pixels.high)).double().mean()
    scale = 2 / (pixels.high - pixels.low)
    return {
        "start": start,
        "step": step,
        "energy_mean": float(values.mean()),
        "energy_low": float(low),
        "energy_high": float(high),
        "energy_data_mean": float(real.mean()),
        "energy_data_sd": float(real.std(ddof=1)),
        "clamped_pixel_share": float(ends),
        "moved": scale * math.sqrt(float(((x - begin).double() ** 2).mean())),
    }


def lines(done: Sequence[Diagnosis]) -> Iterator[str]:
    """What was found, for people."""
    for one in done:
        yield one.verdict.text
