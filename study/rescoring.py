"""`mebm evaluate`: trained models scored again under other protocols, without training."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.load import EVALUATIONS_FILE, read_evaluations, records, typed_frame, write_parquet
from study.errors import UserError, nearest, one_line, parse_choices
from study.ledger import utc_now
from trainables.datasets import DATASETS, DataError, ImageData, load_dataset, to_float
from trainables.device import resolve_device
from trainables.evaluation import confidences, most_confident
from trainables.exhibits import load_data
from trainables.features import JACKKNIFE_GROUPS, small_extractor
from trainables.files import alone, making, within
from trainables.hybrid import HybridScores, score_hybrid
from trainables.inception import (
    METRICS,
    Features,
    NoFeaturesError,
    ReferenceCache,
    fid_infinity,
    inception,
    inception_scores,
)
from trainables.learner import fresh_seed
from trainables.protocols import PROTOCOLS, Protocol
from trainables.sampling import Loaded, fresh_samples, initial_of, load_any
from trainables.schema import EVALUATION_COLUMNS

HYBRID = "hybrid"
"""Not a protocol of samples: accuracy, calibration and AUROC of a model with a class head, or of its energy."""


@dataclass(frozen=True)
class Target:
    """A file to score.

    Attributes:
        path: the model file or checkpoint.
        study: name of its study's folder; trial_id: its trial; model: last, best or checkpoint.
    """

    path: Path
    study: str
    trial_id: str
    model: str


@dataclass(frozen=True)
class Request:
    """How to score.

    Attributes:
        protocols: names of `PROTOCOLS`, and `hybrid`.
        metrics: of Inception's, for protocols that use it.
        confidence: also the FID's extrapolation to infinitely many samples.
        seed: of fresh samples; None: the trial's own, which gives the samples that training scored.
        steps: Langevin steps of their chains; None: as many as the trial's evaluations took.
        outside: other data sets for `hybrid`: name, folder or None.
        norm_mode: batch norm's mode in `hybrid`.
        data_dir: where the images are now, in place of where the trials read them.
    """

    protocols: tuple[str, ...]
    metrics: tuple[str, ...] = ("fid", "isc")
    confidence: bool = False
    seed: int | None = None
    steps: int | None = None
    outside: tuple[tuple[str, str | None], ...] = ()
    norm_mode: str = "eval"
    data_dir: str | None = None


def find_targets(path: Path, which: str = "last") -> list[Target]:
    """The files meant by `path`: a file, a study's folder, or a folder with `models`.

    Args:
        which: of a study: `last`, `best` or `all`.

    Raises:
        UserError: there is none.
        UnsafePathError: a file in a study's `models` is a link out of the study.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a model file, a checkpoint or a study's folder")
    if path.is_file():
        best = path.stem.endswith("_best")
        inside = path.parent.name == "models"
        if inside:
            within(path.parent.parent, f"models/{path.name}")
        study = path.parent.parent.resolve().name if inside else path.resolve().parent.name
        kind = ("best" if best else "last") if inside else "checkpoint"
        return [Target(path, study, path.stem.removesuffix("_best"), kind)]
    found = []
    for file in sorted((path / "models").glob("*.pt")):
        kind = "best" if file.stem.endswith("_best") else "last"
        if which in ("all", kind):
            found.append(Target(file, path.resolve().name, file.stem.removesuffix("_best"), kind))
    if not found and (path / "checkpoint.pt").is_file():
        found = [Target(path / "checkpoint.pt", path.resolve().name, "t0001", "checkpoint")]
    if not found:
        raise UserError(
            f"{path}: models/ holds no {which if which != 'all' else ''} model; a trial leaves one at its end"
        )
    return found


def parse_protocols(names: Sequence[str]) -> tuple[str, ...]:
    """Names of protocols, each once.

    Raises:
        UserError: an unknown one.
    """
    known = [*PROTOCOLS, HYBRID]
    for name in names:
        if name not in known:
            raise UserError(f"--protocol {name}: unknown{nearest(name, known)}; known: {', '.join(known)}")
    return tuple(dict.fromkeys(names))


Row = dict[str, Any]


def evaluate(
    targets: Sequence[Target],
    request: Request,
    out: Path,
    *,
    device: str = "auto",
    on_done: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Score models and append rows to a Parquet file as they come; what is in it already is not done again.

    Under a protocol of the trial's own, with its seed and steps, a model file gives the number that training gave, to
    the digit where it runs as it did then (the device, the arithmetic); what it does not hold is said in `remark`.

    Args:
        out: `evaluations.parquet`.
        on_done: called with words after each model and protocol.

    Returns:
        The rows asked for (`EVALUATION_COLUMNS`), those of earlier runs included.

    Raises:
        UserError: a file that is damaged, or images that are missing.
    """
    kept = records(read_evaluations(out)) if out.is_file() else []
    asked: list[dict[str, Any]] = []
    where = resolve_device(device)
    for target in targets:
        digest = _digest(target.path)
        scorer: _Scorer | None = None
        for name in request.protocols:
            identity = _identity(name, request)
            done = [
                r for r in kept if r["model_digest"] == digest and (r["protocol"], r["protocol_digest"]) == identity
            ]
            if any(r["made_by"] for r in done):
                try:  # other draws, or chains of another length, are another number
                    scorer = scorer or _Scorer(target, request, where)
                except (DataError, ValueError) as error:
                    raise UserError(one_line(error)) from error
                done = [r for r in done if (r["made_by"], r["seed"]) == (scorer.made_by, scorer.seed)]
            if done and _complete(done, name, request):
                asked += done
            else:
                try:
                    scorer = scorer or _Scorer(target, request, where)
                    rows = list(scorer.score(name))
                except (DataError, ValueError) as error:
                    raise UserError(one_line(error)) from error
                common = scorer.common | {"model_digest": digest, "created_at": utc_now(), "device": where.type}
                common |= {"protocol": identity[0], "protocol_digest": identity[1]}
                rows = [{c.name: (common | row).get(c.name) for c in EVALUATION_COLUMNS} for row in rows]
                kept = _write(out, done, rows)
                asked += rows
            if on_done:
                on_done(f"{target.trial_id} {name}")
    return asked


def _write(out: Path, replaced: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Put rows into the file, also where another process has added some in the meantime; returns all that it holds."""
    ours = {_key(row) for row in (*replaced, *rows)}
    with making(out.parent), alone(out.parent):
        there = records(read_evaluations(out)) if out.is_file() else []
        kept = [row for row in there if _key(row) not in ours] + list(rows)
        write_parquet(typed_frame(kept, EVALUATION_COLUMNS), EVALUATION_COLUMNS, out)
    return kept


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model_digest", "protocol", "protocol_digest", "seed", "made_by", "metric"))


def default_out(path: Path) -> Path:
    """Where rows of a file or a study go: `evaluations.parquet` of the study's folder, or beside the file.

    Raises:
        UnsafePathError: it is a link out of the folder, and would be read.
    """
    if path.is_dir():
        return within(path, EVALUATIONS_FILE)
    parent = path.parent.parent if path.parent.name == "models" else path.parent
    return within(parent, EVALUATIONS_FILE)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _identity(name: str, request: Request) -> tuple[str, str]:
    if name != HYBRID:
        return name, PROTOCOLS[name].digest
    text = f"{request.norm_mode} {sorted(request.outside, key=str)}"
    return name, hashlib.sha256(text.encode()).hexdigest()[:8]


def _complete(rows: Sequence[dict[str, Any]], name: str, request: Request) -> bool:
    """Every number asked for is among the rows; one that could not be had is asked for again."""
    if any(r["value"] is None and r["metric"] != "fid_infinity" for r in rows):
        return False  # such as Inception's weights, which may be there now
    if any(r["se"] is None and r["metric"] in ("fd", "fid") and r["samples"] >= 2 * JACKKNIFE_GROUPS for r in rows):
        return False  # of a version that scored other draws, and no errors
    if name == HYBRID:
        return True
    have = {r["metric"] for r in rows}
    wanted = {"fd"} if PROTOCOLS[name].features == "small" else set(request.metrics)
    if request.confidence and "fid" in wanted:
        wanted |= {"fid_infinity"}
    return wanted <= have


class _Scorer:
    """One model: what its protocols share is made once."""

    def __init__(self, target: Target, request: Request, device: torch.device) -> None:
        self.request, self.device = request, device
        data_dir = Path(request.data_dir) if request.data_dir else None
        self.loaded: Loaded = load_any(target.path, device, data_dir=data_dir)
        saved = self.loaded.saved
        self.common: dict[str, Any] = {
            "study": target.study,
            "trial_id": target.trial_id,
            "model": target.model,
            "epoch": saved.epoch,
            "method": saved.config.method,
        }
        self._data: ImageData | None = None
        self._fresh: dict[int, Tensor] = {}
        self._features: dict[tuple[Any, ...], Features] = {}

    @property
    def data(self) -> ImageData:
        """The trial's images."""
        if self._data is None:
            self._data = load_data(self.loaded.saved)
        return self._data

    def score(self, name: str) -> Iterator[dict[str, Any]]:
        """Rows of one protocol, without what all rows of the model have in common."""
        started = time.perf_counter()
        with _threads(self.loaded.saved.threads):
            rows = list(self._hybrid() if name == HYBRID else self._samples(PROTOCOLS[name]))
        spent = time.perf_counter() - started
        for row in rows:
            yield row | {"seconds": spent}

    # ------------------------------------------------------------------------------------------------- samples

    def _samples(self, protocol: Protocol) -> Iterator[dict[str, Any]]:
        saved = self.loaded.saved
        base: dict[str, Any] = {"source": protocol.source, "metric": "fd" if protocol.features == "small" else "fid"}
        if not saved.config.samples or (protocol.source == "buffer" and not saved.config.buffered):
            yield base | {"remark": f"{saved.config.method} has no {protocol.source} samples"}
            return
        images, remark = self._images(protocol)
        base |= {"samples": len(images)}
        if protocol.source == "fresh":
            base |= {"seed": self.seed, "made_by": self.made_by}
        if len(images) < 2:
            yield base | {"remark": f"{len(images)} image(s) to score: the file keeps no more of the {protocol.source}"}
        elif protocol.features == "small":
            extractor = small_extractor(self.data)
            value, error = extractor.score(images)
            reference = f"{extractor.id}, {len(self.data.images)} training images"
            yield base | {"value": value, "reference": reference, "remark": remark} | _bounds(value, error)
        else:
            yield from self._inception(protocol, images, base, remark)

    @property
    def seed(self) -> int:
        """Of fresh samples."""
        return self.loaded.saved.config.seed if self.request.seed is None else self.request.seed

    @property
    def made_by(self) -> str:
        """How fresh samples are made."""
        c = self.loaded.saved.config
        return "generator" if c.sampler == "generator" else f"{self._steps}steps"

    @property
    def _steps(self) -> int:
        asked = self.request.steps
        return self.loaded.saved.config.evaluation.fresh_steps if asked is None else asked

    def _images(self, protocol: Protocol) -> tuple[Tensor, str | None]:
        """uint8 images as the protocol chooses and rounds them, and what was done otherwise."""
        saved, remarks = self.loaded.saved, []
        truncate = protocol.rounding == "truncate"
        if protocol.source == "fresh":
            kept = self._fresh_samples(protocol.count or 10_000)
            if truncate:
                remarks.append("fresh samples are rounded")
        else:
            kept = saved.samples
            if truncate and saved.truncated is not None:
                kept = saved.truncated
            elif truncate:
                remarks.append("samples are rounded: truncated ones are not known")
            whole = saved.config.buffer_size
            if protocol.count is None and saved.config.buffer == "replace" and len(kept) < whole:
                remarks.append(f"{len(kept)} of the buffer's {whole} samples are in the file")
        chosen = kept[: protocol.count]
        if protocol.count is not None and len(chosen) < protocol.count:
            remarks.append(f"{len(chosen)} samples in place of {protocol.count}")
        if protocol.top_share is not None and len(chosen):
            if not saved.model.has_class_head:
                remarks.append("no class head: all images in place of the most confident")
            else:
                found = saved.confidences
                if found is None or protocol.source == "fresh":
                    on_device = to_float(chosen.to(self.device))
                    found = confidences(saved.model, on_device, saved.config.evaluation.batch_size)
                    remarks.append("confidence taken of 8-bit samples")
                confidence, predicted = (values[: len(chosen)].cpu() for values in found)
                chosen = chosen[most_confident(confidence, predicted, protocol.top_share)]
        return chosen, "; ".join(remarks) or None

    def _fresh_samples(self, count: int) -> Tensor:
        if count not in self._fresh:
            saved = self.loaded.saved
            self._fresh[count] = fresh_samples(
                saved,
                count,
                self._steps,
                initial=initial_of(self.loaded),
                seed=fresh_seed(self.seed, count),
                batch_size=saved.config.evaluation.batch_size,
                generator=self.loaded.generator,
            )
        return self._fresh[count]

    def _inception(
        self, protocol: Protocol, images: Tensor, base: dict[str, Any], remark: str | None
    ) -> Iterator[dict[str, Any]]:
        try:
            network = inception()
            features = network.features(images, self.device) if len(images) else None
            scores = inception_scores(images, self.data, self.device, protocol, self.request.metrics, features)
        except NoFeaturesError as error:
            for metric in self.request.metrics:
                yield base | {"metric": metric, "remark": f"no {metric}: {error}"}
            return
        base |= {"reference": scores.reference}
        if self.request.confidence and "fid" in scores.values and features is not None:
            distance = ReferenceCache(self.data, protocol, network, self.device).frechet()
            extrapolated: dict[str, Any] = {"metric": "fid_infinity", "remark": remark}
            try:
                extrapolated["value"] = fid_infinity(features.pool, distance, seed=protocol.seed)
            except ValueError as error:
                extrapolated["remark"] = one_line(error)
            yield base | extrapolated
        remarks = "; ".join(r for r in (remark, scores.remark) if r) or None
        for metric in self.request.metrics:
            value = scores.values.get(metric)
            row = base | {"metric": metric, "value": value, "remark": remarks}
            yield row | _bounds(value, scores.errors.get(metric))
            if metric in ("isc", "kid") and value is not None:
                # Over splits or subsets, as torch-fidelity gives it: no interval of the number.
                yield base | {"metric": f"{metric}_sd", "value": scores.values[f"{metric}_sd"], "remark": remarks}

    # -------------------------------------------------------------------------------------------------- hybrid

    def _hybrid(self) -> Iterator[dict[str, Any]]:
        outside = {name: load_dataset(name, folder).test_images for name, folder in self.request.outside}
        data = self.data
        if not len(data.test_images):
            yield {"source": "images", "metric": "accuracy", "samples": 0, "remark": f"{data.name} has no test images"}
            return
        scores: HybridScores = score_hybrid(
            self.loaded.saved,
            data.test_images,
            data.test_labels,
            outside=outside,
            norm_mode="train" if self.request.norm_mode == "train" else "eval",
        )
        base = {"source": "images", "samples": scores.n}
        for metric, value, identity in (
            ("accuracy", scores.accuracy, scores.accuracy_id),
            ("ece", scores.ece, scores.ece_id),
        ):
            if value is not None:
                yield base | {"metric": metric, "value": value, "reference": identity}
        for name, found in scores.outside.items():
            yield base | {"metric": f"auroc_log_p_{name}", "value": found.auroc_log_p, "reference": found.log_p_id}
            if found.auroc_confidence is not None:
                row = {"metric": f"auroc_confidence_{name}", "value": found.auroc_confidence}
                yield base | row | {"reference": found.confidence_id}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """As many threads as the trial was scored with: by another number of them a sum ends in other digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bounds(value: float | None, error: float | None) -> Row:
    """A score's standard error, and its 95% interval over draws of the samples."""
    if value is None or error is None:
        return {}
    return {"se": error, "low": value - 1.96 * error, "high": value + 1.96 * error}


def parse_outside(texts: Sequence[str]) -> tuple[tuple[str, str | None], ...]:
    """`NAME` or `NAME=FOLDER` of other data sets.

    Raises:
        UserError: a name that needs a folder and has none.
    """
    found: list[tuple[str, str | None]] = []
    for text in texts:
        name, _, folder = text.partition("=")
        if not folder and name not in DATASETS:
            raise UserError(f"--outside {text}: unknown{nearest(name, DATASETS)}; give NAME=FOLDER")
        found.append((name, str(Path(folder).resolve()) if folder else None))
    return tuple(found)


def parse_metrics(text: str) -> tuple[str, ...]:
    """A comma-separated list of Inception's metrics.

    Raises:
        UserError: an unknown one.
    """
    return parse_choices("--metrics", text, METRICS)
