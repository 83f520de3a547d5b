"""Trials in the report's page: what filters choose among, what a pointer shows, the table, thumbnails of samples."""

from __future__ import annotations

import base64
import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from analysis.figures.hover import ending
from analysis.results.labels import brief, duration, symbol, text
from analysis.results.load import Results
from analysis.results.own import setting_names
from analysis.results.parquet import plain, records
from analysis.stats.trials.grouping import sort_key
from analysis.stats.trials.objective import objective, varied_or_all
from analysis.stats.trials.trial import ENDED_BADLY
from analysis.tables.registry import NOTHING, or_dash
from trainables.results.schema import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_VALUES = 12
"""Most values of a field that gets a filter."""
THUMBNAIL_BYTES = 750_000
"""Most bytes of all thumbnails of a report, before they are written in base64."""
_STEPS = ((160, None), (160, 75), (112, 70), (80, 60))
"""Largest width in pixels and WebP quality (None is lossless) that thumbnails are tried at until all fit."""
_KINDS = {
    "end": "chains when it ended", "buffer": "replay buffer", "fresh": "fresh chains from p0",
    "samples": "samples that its script gave",
}  # fmt: skip


def filters(results: Results) -> dict[str, list[str]]:
    """Study, outcome, method, data set and every varied field that take 2 to `MAX_VALUES` values, and these."""
    varied = dict.fromkeys(f for study in results.studies for f in varied_or_all(results, study))
    fields = list(dict.fromkeys(("study", "outcome", "method", "dataset", *varied)))
    trials = records(results.trials[fields])
    found = {}
    for field in fields:
        values = {t[field] for t in trials}
        if field == "study":
            named = list(results.studies)
        elif field == "outcome":
            named = [o.value for o in Outcome if o.value in values]
        else:
            named = list(dict.fromkeys(text(v) for v in sorted(values, key=sort_key)))
        if 2 <= len(named) <= MAX_VALUES:
            found[field] = named
    return found


def page_trials(results: Results) -> dict[str, Any]:
    """What the page's script knows: `filters`, and of each study its settings and trials.

    Of a study `common` has label and value of the settings that all its trials share, `fields` the label of the others
    and whether it was varied; a trial has `values` of these `fields`, in `chosen` the index of its value in every
    filter, and `samples` (label and image) where a grid was kept.
    """
    choices = filters(results)
    pictures = thumbnails(results)
    studies = []
    for study in results.studies:
        trials = records(results.trials[results.trials["study"] == study])
        varied = varied_or_all(results, study)
        names = setting_names(results.trials.columns)
        texts = {f: [text(t[f]) for t in trials] for f in names}
        differing = [f for f in varied if f in texts]
        differing += [f for f in names if f not in differing and len(set(texts[f])) > 1]
        shared = [f for f in names if f not in differing and trials and trials[0][f] is not None]
        studies.append(
            {
                "name": study,
                "common": [[symbol(f), texts[f][0]] for f in shared],
                "fields": [[symbol(f), f in varied] for f in differing],
                "trials": {
                    t["trial_id"]: {
                        "ending": ending(t),
                        "setting": t["setting_id"],
                        "seed": t["seed"],
                        "values": [texts[f][i] for f in differing],
                        "chosen": [values.index(text(t[field])) for field, values in choices.items()],
                        **({"samples": picture} if (picture := pictures.get((study, t["trial_id"]))) else {}),
                    }
                    for i, t in enumerate(trials)
                },
            }
        )
    return {
        "filters": [{"field": f, "label": symbol(f), "values": values} for f, values in choices.items()],
        "studies": studies,
    }


def trial_table(results: Results, study: str) -> dict[str, Any]:
    """Every trial of a study: `header`, and `rows` of cells as (text, value to sort by)."""
    trials = records(results.trials[results.trials["study"] == study])
    metric = objective(results, study)
    fields = varied_or_all(results, study)
    best = [f"best {metric.label}"] if metric is not None else []
    named = [symbol(f) for f in fields]
    header = ["Trial", *named, "Seed", "Outcome", "Iterations", *best, "ms / iteration", "Training", "Setting"]
    rows = []
    for t in trials:
        cells: list[tuple[str, Any]] = [(t["trial_id"], t["trial_id"])]
        cells += [(brief(t[f]), t[f]) for f in fields]
        done = f"{or_dash(t['iterations_done'])} of {or_dash(t['iterations_planned'])}"
        cells += [(text(t["seed"]), t["seed"]), (t["outcome"], t["outcome"]), (done, t["iterations_done"])]
        if metric is not None:
            value, error = t[f"{metric.name}_best"], t[metric.best_error_column]
            after = "*" if t["outcome"] in ENDED_BADLY else ""
            after += "" if error is None else f" ± {error:.2g}"
            cells.append((NOTHING if value is None else f"{value:.3g}{after}", value))
        pace, seconds = t["seconds_per_iteration"], t["train_seconds"]
        cells += [(or_dash(pace, lambda s: f"{1000 * s:.3g}"), pace), (or_dash(seconds, duration), seconds)]
        rows.append([*cells, (t["setting_id"], t["setting_id"])])
    return {"header": header, "rows": rows}


def thumbnails(results: Results, most: int = THUMBNAIL_BYTES) -> dict[tuple[str, str], list[str]]:
    """A small picture of the samples of every trial that has a grid: of its end where it ended badly, else its buffer.

    Where all would take more than `most` bytes they become smaller, and at the smallest those of the last trials are
    left out. By study and trial id: what the picture shows, and its data URI.
    """
    grids = list(_grids(results))
    for width, quality in _STEPS:
        last = (width, quality) == _STEPS[-1]
        found: dict[tuple[str, str], list[str]] = {}
        total = 0
        for key, kind, path in grids:
            data = thumbnail(path, width, quality)
            if data is None:
                continue
            total += len(data)
            if total > most:
                break
            found[key] = [_KINDS[kind], f"data:image/webp;base64,{base64.b64encode(data).decode('ascii')}"]
        if total <= most or last:
            break
    return found


def _grids(results: Results) -> Iterator[tuple[tuple[str, str], str, Path]]:
    for study, trial, outcome in zip(
        *(plain(results.trials[c]) for c in ("study", "trial_id", "outcome")), strict=True
    ):
        # What a diverged trial made in the end says more than its buffer at some epoch before.
        for kind in _KINDS if outcome in ENDED_BADLY else ("buffer", "fresh", "samples", "end"):
            path = results.sample_grid(study, trial, kind)
            if path is not None:
                yield (study, trial), kind, path
                break


def thumbnail(path: Path, width: int, quality: int | None) -> bytes | None:
    """A PNG file as a small WebP picture; None where it is no picture (a study that runs may be writing it).

    An enlargement by a whole number is undone, which loses nothing; the picture is at most `width` pixels across.
    `quality` (0 to 100) is of lossy WebP; None is lossless where the picture is narrow enough as it is.
    """
    try:
        with Image.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = _undo_enlargement(file.convert("L" if file.mode in ("1", "L") else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombWarning):
        return None
    if picture.width > width:
        height = max(1, round(picture.height * width / picture.width))
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        quality = quality or 75
    out = io.BytesIO()
    picture.save(out, "WEBP", lossless=quality is None, quality=80 if quality is None else quality, method=4)
    return out.getvalue()


def _undo_enlargement(picture: Image.Image) -> Image.Image:
    """The picture before every pixel was repeated a whole number of times; as it is where none was."""
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    for factor in range(min(16, height, width), 1, -1):
        if height % factor or width % factor:
            continue
        small = pixels[::factor, ::factor]
        if np.array_equal(small.repeat(factor, axis=0).repeat(factor, axis=1), pixels):
            return Image.fromarray(np.ascontiguousarray(small))
    return picture
