"""`mebm score`: images of any generator, made by whatever program, scored under a named protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.results.load import read_scores
from analysis.results.parquet import records, typed_frame, write_parquet
from study.config.errors import UserError, one_line
from study.models.protocols import Asked, asked
from study.record.journal import utc_now
from trainables.config.protocols import Protocol
from trainables.data.datasets import ImageData
from trainables.data.readers.items import DataError, printable
from trainables.evaluation.frechet import MIN_SAMPLES
from trainables.evaluation.inception import NoFeaturesError, inception
from trainables.evaluation.inception_scores import inception_scores
from trainables.evaluation.small_features import small_extractor
from trainables.models.sample_sets import Range, SampleSet, read_samples
from trainables.results.files import alone, making
from trainables.results.schema import SCORE_COLUMNS
from trainables.training.device import resolve_device

Row = dict[str, Any]


@dataclass(frozen=True)
class ScoreRequest:
    """How to score: the options of `mebm score`. `own`: protocols on features of the user's own, by name."""

    model: str
    protocols: tuple[str, ...]
    metrics: tuple[str, ...] = ("fid", "isc")
    pixel_range: Range = "auto"
    own: Mapping[str, Asked] = field(default_factory=dict)

    def asked(self, name: str) -> Asked:
        """A protocol."""
        return self.own.get(name) or asked(name)


def score(
    paths: Sequence[Path],
    data: ImageData,
    request: ScoreRequest,
    out: Path,
    *,
    device: str = "auto",
    on_done: Callable[[str], None] | None = None,
) -> list[Row]:
    """Score image sets, append rows (`SCORE_COLUMNS`) to a Parquet file, and return them; none is scored twice.

    Args:
        paths: one image set each: a folder, or a file (`read_samples`).
        data: the reference.
        out: the file of rows.

    Raises:
        UserError: images that cannot be read or have another size than the reference's, one set given twice, or an
            extractor of the user's own that fails.
    """
    kept = records(read_scores(out)) if out.is_file() else []
    where, scored = resolve_device(device), list[Row]()
    seen: dict[str, Path] = {}
    for path in paths:
        scorer = _Scorer(path, data, request, where)
        digest = scorer.samples("round").digest
        if digest in seen:
            raise UserError(f"{printable(path)}: the same images as {printable(seen[digest])}; give them once")
        seen[digest] = path
        for name in request.protocols:
            told = request.asked(name)
            identity = (request.model, digest, data.name, data.source, name, told.protocol.digest)
            wanted = set(told.wanted(request.metrics))
            rows = [r for r in kept if _identity(r) == identity and r["value"] is not None]
            if not wanted <= {r["metric"] for r in rows}:
                started = time.perf_counter()
                try:
                    rows = list(scorer.rows(told))
                except ValueError as error:  # such as what an extractor of the user's own raises
                    raise UserError(one_line(error)) from error
                common = {"seconds": time.perf_counter() - started, "device": where.type, "created_at": utc_now()}
                common |= dict(zip(_IDENTITY, identity, strict=True)) | {"source": _last(path)}
                rows = [{c.name: (common | row).get(c.name) for c in SCORE_COLUMNS} for row in rows]
                kept = _write(out, rows)
            scored += rows
            if on_done:
                on_done(f"{path.name} {name}")
    return scored


_IDENTITY = ("model", "digest", "dataset", "data_source", "protocol", "protocol_digest")


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _IDENTITY)


def _last(path: Path) -> str:
    return printable(path.resolve().name)


def _write(out: Path, rows: Sequence[Row]) -> list[Row]:
    """Put rows into the file, also where another process has added some in the meantime; returns all that it holds."""
    ours = {(*_identity(row), row["metric"]) for row in rows}
    with making(out.parent), alone(out.parent):
        there = records(read_scores(out)) if out.is_file() else []
        kept = [row for row in there if (*_identity(row), row["metric"]) not in ours] + list(rows)
        write_parquet(typed_frame(kept, SCORE_COLUMNS), SCORE_COLUMNS, out)
    return kept


class _Scorer:
    """One image set."""

    def __init__(self, path: Path, data: ImageData, request: ScoreRequest, device: torch.device) -> None:
        self.path, self.data, self.request, self.device = path, data, request, device
        self._sets: dict[str, SampleSet] = {}

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.data.images.shape[1:]
        return channels, height, width

    def samples(self, rounding: Any) -> SampleSet:
        if not self._sets or (self._sets.get(rounding) is None and next(iter(self._sets.values())).remark):
            try:
                found = read_samples(self.path, self.shape, pixel_range=self.request.pixel_range, rounding=rounding)
            except DataError as error:
                raise UserError(one_line(error)) from error
            self._sets[rounding] = found
        return self._sets.get(rounding) or next(iter(self._sets.values()))

    def rows(self, told: Asked) -> Iterator[Row]:
        protocol, metrics = told.protocol, told.wanted(self.request.metrics)
        taken = self.samples(protocol.rounding)
        images, departures = self._chosen(protocol, taken.images)
        base: Row = {"samples": len(images), "departures": "; ".join(departures) or None}
        if protocol.features == "small":
            extractor = small_extractor(self.data)
            value, error = extractor.score(images)
            reference = f"{extractor.id}, {len(self.data.images)} training images"
            yield base | {"metric": "fd", "value": value, "se": error, "reference": reference, "remark": taken.remark}
            return
        try:
            network = told.network or inception(protocol.resize)
            features = network.features(images, self.device)
            found = inception_scores(images, self.data, self.device, protocol, metrics, features, network)
        except NoFeaturesError as error:
            yield from (base | {"metric": m, "remark": f"no {m}: {error}"} for m in metrics)
            return
        remark = "; ".join(r for r in (taken.remark, found.remark) if r) or None
        base |= {"reference": found.reference, "remark": remark}
        for metric in (*metrics, "isc_sd", "kid_sd"):
            if metric in metrics or metric in found.values:
                yield base | {"metric": metric, "value": found.values.get(metric), "se": found.errors.get(metric)}

    def _chosen(self, protocol: Protocol, images: Tensor) -> tuple[Tensor, list[str]]:
        """As many as the protocol takes, and where that is not what it asks for."""
        found = []
        if protocol.source == "buffer":
            found.append("images of unknown origin in place of the replay buffer")
        if protocol.top_share is not None:
            found.append(f"all images in place of the most confident {protocol.top_share:.0%}: they have no class head")
        if protocol.count is not None and len(images) > protocol.count:
            # Files are often sorted by class.
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(protocol.seed))
            images = images[order[: protocol.count].sort().values]
        elif protocol.count is not None and len(images) < protocol.count:
            found.append(f"{len(images):,} images in place of {protocol.count:,}")
        if len(images) < MIN_SAMPLES:
            raise UserError(f"{printable(self.path)}: {len(images)} images; a score needs at least {MIN_SAMPLES}")
        return images, found
