"""`mebm evaluate`: trained models scored again under other protocols, without training."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.results.load import read_evaluations
from analysis.results.parquet import records, typed_frame, write_parquet
from analysis.stats.survival.rates import wilson
from study.config.errors import UserError, nearest, one_line, shown
from study.models.protocols import Asked, asked, check_protocols
from study.record.journal import utc_now
from trainables.config.dataset import datasets
from trainables.config.protocols import Protocol
from trainables.data.datasets import ImageData, load_dataset, to_float
from trainables.evaluation.frechet import MIN_SAMPLES, fid_infinity
from trainables.evaluation.inception import NoFeaturesError, inception
from trainables.evaluation.inception_scores import ReferenceCache, inception_scores
from trainables.evaluation.scores import confidences, most_confident
from trainables.evaluation.small_features import small_extractor
from trainables.models.calibration import score_hybrid
from trainables.models.model_file import SavedModel
from trainables.models.robustness import Attack, parse_attack, robust_accuracy
from trainables.models.samples import fresh_samples, initial_of, load_any
from trainables.models.views import load_data
from trainables.networks.arithmetic import torch_threads
from trainables.results.files import alone, making, within
from trainables.results.layout import EVALUATIONS_FILE
from trainables.results.schema import EVALUATION_COLUMNS
from trainables.results.spelling import nearest_path
from trainables.training.device import resolve_device
from trainables.training.trainer import fresh_seed

HYBRID = "hybrid"
"""Not a protocol of samples: accuracy, calibration and AUROC of a model with a class head, or of its energy."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A file to score; name of its study's folder, trial, and whether it is `last`, `best` or a `checkpoint`."""

    path: Path
    study: str
    trial_id: str
    model: str


@dataclass(frozen=True)
class Request:
    """How to score: the options of `mebm evaluate`. `own`: protocols on features of the user's own, by name."""

    protocols: tuple[str, ...]
    metrics: tuple[str, ...] = ("fid", "isc")
    confidence: bool = False
    seed: int | None = None
    steps: int | None = None
    outside: tuple[tuple[str, str | None], ...] = ()
    norm_mode: str = "eval"
    attacks: tuple[Attack, ...] = ()
    data_dir: str | None = None
    own: Mapping[str, Asked] = field(default_factory=dict)

    def asked(self, name: str) -> Asked:
        """A protocol of samples."""
        return self.own.get(name) or asked(name)


def find_targets(path: Path, which: str = "last") -> list[Target]:
    """A file, or of a folder its `last`, `best` or `all` models. UserError: none; UnsafePathError: a link out of it."""
    if not path.exists():
        expected = "expected a model file, a checkpoint or a study's folder"
        raise UserError(f"{path}: no such file or folder; {expected}{nearest_path(path)}")
    if path.is_file():
        if path.parent.name != "models":
            return [Target(path, path.resolve().parent.name, path.stem.removesuffix("_best"), "checkpoint")]
        within(path.parent.parent, f"models/{path.name}")
        return [_of_models(path)]
    found = [t for t in map(_of_models, sorted((path / "models").glob("*.pt"))) if which in ("all", t.model)]
    if not found and (path / "checkpoint.pt").is_file():
        return [Target(path / "checkpoint.pt", path.resolve().name, "t0001", "checkpoint")]
    if not found:
        kind = which if which != "all" else ""
        raise UserError(f"{path}: models/ holds no {kind} model; a trial leaves one at its end")
    return found


def _of_models(file: Path) -> Target:
    trial_id = file.stem.removesuffix("_best")
    return Target(file, file.parent.parent.resolve().name, trial_id, "last" if trial_id == file.stem else "best")


def parse_protocols(names: Sequence[str]) -> tuple[str, ...]:
    """Names of protocols, each once. UserError: an unknown one."""
    return check_protocols(names, (HYBRID,))


def evaluate(
    targets: Sequence[Target],
    request: Request,
    out: Path,
    *,
    device: str = "auto",
    on_done: Callable[[str], None] | None = None,
) -> list[Row]:
    """Score models, append rows to a Parquet file as they come, and return them; what is in it is not done again.

    Under a protocol of the trial's own, with its seed and steps, a model file gives the number that training gave, to
    the digit where it runs as it did then (the device, the arithmetic); what it does not hold is said in `remark`.
    UserError: a file that is damaged, or images that are missing.
    """
    kept = records(read_evaluations(out)) if out.is_file() else []
    scored: list[Row] = []
    where = resolve_device(device)
    for target in targets:
        scorer = _Scorer(target, request, where)
        with target.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
        for name in request.protocols:
            wanted = (digest, *_identity(name, request))
            done = [r for r in kept if (r["model_digest"], r["protocol"], r["protocol_digest"]) == wanted]
            try:
                if any(r["made_by"] for r in done):  # other draws, or chains of another length, are another number
                    done = [r for r in done if scorer.fresh.items() <= r.items()]
                rows = None if done and _complete(done, name, request) else scorer.score(name)
            except ValueError as error:
                raise UserError(one_line(error)) from error
            if rows is not None:
                common = scorer.common | {"created_at": utc_now(), "device": where.type}
                common |= dict(zip(("model_digest", "protocol", "protocol_digest"), wanted, strict=True))
                rows = [{c.name: (common | row).get(c.name) for c in EVALUATION_COLUMNS} for row in rows]
                kept = _write(out, done, rows)
            scored += done if rows is None else rows
            if on_done:
                on_done(f"{target.trial_id} {name}")
    return scored


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
    """Where rows of a file or a study go: `evaluations.parquet`, no link, of the study's folder or beside the file."""
    if not path.is_dir():
        path = path.parent.parent if path.parent.name == "models" else path.parent
    return within(path, EVALUATIONS_FILE)


def _identity(name: str, request: Request) -> tuple[str, str]:
    if name != HYBRID:
        return name, request.asked(name).protocol.digest
    text = f"{request.norm_mode} {sorted(request.outside, key=str)}"
    text += "".join(sorted(f" {a.text}-{a.images}" for a in request.attacks))
    return name, hashlib.sha256(text.encode()).hexdigest()[:8]


def _complete(rows: Sequence[Row], name: str, request: Request) -> bool:
    """Every number asked for is among the rows; one that could not be had is asked for again."""
    if any(r["value"] is None and r["metric"] != "fid_infinity" for r in rows):
        return False  # such as Inception's weights, which may be there now
    if any(r["se"] is None and r["metric"] in ("fd", "fid") and r["samples"] >= MIN_SAMPLES for r in rows):
        return False  # of a version that scored other draws, and no errors
    if name == HYBRID:
        return True
    have = {r["metric"] for r in rows}
    wanted = set(request.asked(name).wanted(request.metrics))
    if request.confidence and "fid" in wanted:
        wanted |= {"fid_infinity"}
    return wanted <= have


class _Scorer:
    """One model: what its protocols share is made once, when it is asked for."""

    def __init__(self, target: Target, request: Request, device: torch.device) -> None:
        self.target, self.request, self.device = target, request, device
        self._fresh: dict[int, Tensor] = {}

    @cached_property
    def saved(self) -> SavedModel:
        data_dir = Path(self.request.data_dir) if self.request.data_dir else None
        return load_any(self.target.path, self.device, data_dir=data_dir)

    @cached_property
    def data(self) -> ImageData:
        return load_data(self.saved)

    @property
    def common(self) -> Row:
        found = {name: getattr(self.target, name) for name in ("study", "trial_id", "model")}
        return found | {"epoch": self.saved.epoch, "method": self.saved.config.method}

    @property
    def fresh(self) -> Row:
        """What tells fresh samples from others: their seed, and how they are made."""
        seed, config = self.request.seed, self.saved.config
        return {"seed": config.seed if seed is None else seed, "made_by": config.method_args.made_by(self._steps)}

    @property
    def _steps(self) -> int:
        asked = self.request.steps
        return self.saved.config.evaluation.fresh_steps if asked is None else asked

    def score(self, name: str) -> list[Row]:
        started = time.perf_counter()
        # As the trial was scored: by another number of threads a sum ends in other digits.
        with torch_threads(self.saved.threads):
            rows = list(self._hybrid() if name == HYBRID else self._samples(self.request.asked(name)))
        spent = time.perf_counter() - started
        return [row | {"seconds": spent} for row in rows]

    def _samples(self, asked: Asked) -> Iterator[Row]:
        saved, protocol = self.saved, asked.protocol
        base: Row = {"source": protocol.source, "metric": "fid" if protocol.features == "inception" else "fd"}
        if not saved.config.samples or (protocol.source == "buffer" and not saved.config.buffered):
            yield base | {"remark": f"{saved.config.method} has no {protocol.source} samples"}
            return
        images, remark = self._images(protocol)
        base |= {"samples": len(images)}
        if protocol.source == "fresh":
            base |= self.fresh
        if len(images) < 2:
            yield base | {"remark": f"{len(images)} image(s) to score: the file keeps no more of the {protocol.source}"}
        elif protocol.features == "small":
            extractor = small_extractor(self.data)
            value, error = extractor.score(images)
            reference = f"{extractor.id}, {len(self.data.images)} training images"
            yield base | {"value": value, "reference": reference, "remark": remark} | _bounds(value, error)
        else:
            yield from self._features(asked, images, base, remark)

    def _images(self, protocol: Protocol) -> tuple[Tensor, str | None]:
        """uint8 images as the protocol chooses and rounds them, and what was done otherwise."""
        saved, remarks = self.saved, []
        truncate = protocol.rounding == "truncate"
        if protocol.source == "fresh":
            kept = self._fresh_samples(protocol.count or 10_000)
            if truncate:
                remarks.append("fresh samples are rounded")
        else:
            kept = saved.truncated if truncate and saved.truncated is not None else saved.samples
            if truncate and saved.truncated is None:
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
            saved, seed = self.saved, fresh_seed(self.fresh["seed"], count)
            batch, initial = saved.config.evaluation.batch_size, initial_of(saved)
            found = fresh_samples(saved, count, self._steps, initial=initial, seed=seed, batch_size=batch)
            self._fresh[count] = found
        return self._fresh[count]

    def _features(self, asked: Asked, images: Tensor, base: Row, remark: str | None) -> Iterator[Row]:
        protocol, metrics = asked.protocol, asked.wanted(self.request.metrics)
        try:
            network = asked.network or inception(protocol.resize)
            features = network.features(images, self.device) if len(images) else None
            scores = inception_scores(images, self.data, self.device, protocol, metrics, features, network)
        except NoFeaturesError as error:
            for metric in metrics:
                yield base | {"metric": metric, "remark": f"no {metric}: {error}"}
            return
        base |= {"reference": scores.reference}
        if self.request.confidence and "fid" in scores.values and features is not None:
            distance = ReferenceCache(self.data, protocol, network, self.device).frechet()
            extrapolated: Row = {"metric": "fid_infinity", "remark": remark}
            try:
                extrapolated["value"] = fid_infinity(features.pool, distance, seed=protocol.seed)
            except ValueError as error:
                extrapolated["remark"] = one_line(error)
            yield base | extrapolated
        remarks = "; ".join(r for r in (remark, scores.remark) if r) or None
        for metric in metrics:
            value = scores.values.get(metric)
            row = base | {"metric": metric, "value": value, "remark": remarks}
            yield row | _bounds(value, scores.errors.get(metric))
            if metric in ("isc", "kid") and value is not None:
                # Over splits or subsets, as torch-fidelity gives it: no interval of the number.
                yield base | {"metric": f"{metric}_sd", "value": scores.values[f"{metric}_sd"], "remark": remarks}

    def _hybrid(self) -> Iterator[Row]:
        outside = {name: load_dataset(name, folder).test_images for name, folder in self.request.outside}
        data = self.data
        if not len(data.test_images):
            yield {"source": "images", "metric": "accuracy", "samples": 0, "remark": f"{data.name} has no test images"}
            return
        norm_mode: Any = self.request.norm_mode
        found = score_hybrid(self.saved, data.test_images, data.test_labels, outside=outside, norm_mode=norm_mode)
        for metric, (value, identity) in found.items():
            row = {"metric": metric, "value": value, "reference": identity}
            yield {"source": "images", "samples": len(data.test_images)} | row
        for attack in self.request.attacks:
            row = {"source": "images", "metric": attack.metric}
            if not self.saved.config.classifies:
                yield row | {"samples": 0, "remark": f"{self.saved.config.method} has no trained class head to attack"}
                continue
            share, count = robust_accuracy(self.saved, data.test_images, data.test_labels, attack, norm_mode=norm_mode)
            interval = wilson(round(share * count), count)
            bounds = {"se": (share * (1 - share) / count) ** 0.5, "low": interval.low, "high": interval.high}
            yield row | {"samples": count, "value": share, "reference": f"test-{count}-{attack.text}"} | bounds


def _bounds(value: float | None, error: float | None) -> Row:
    """A score's standard error, and its 95% interval over draws of the samples."""
    if value is None or error is None:
        return {}
    return {"se": error, "low": value - 1.96 * error, "high": value + 1.96 * error}


def parse_attacks(texts: Sequence[str]) -> tuple[Attack, ...]:
    """Attacks of `--attack`. UserError: one is not one, or two share norm and radius."""
    found: dict[str, Attack] = {}
    for text in texts:
        try:
            attack = parse_attack(text)
        except ValueError as error:
            raise UserError(f"--attack {shown(text, 60, quoted=False)}: {error}") from None
        if attack.metric in found:
            raise UserError(f"--attack {shown(text, 60, quoted=False)}: its norm and radius are given twice")
        found[attack.metric] = attack
    return tuple(found.values())


def parse_outside(texts: Sequence[str]) -> tuple[tuple[str, str | None], ...]:
    """`NAME` or `NAME=FOLDER` of other data sets. UserError: a name that needs a folder and has none."""
    found: list[tuple[str, str | None]] = []
    for text in texts:
        name, _, folder = text.partition("=")
        if not folder and name not in datasets():
            raise UserError(f"--outside {text}: unknown; give NAME=FOLDER{nearest(name, datasets())}")
        found.append((name, str(Path(folder).resolve()) if folder else None))
    return tuple(found)
