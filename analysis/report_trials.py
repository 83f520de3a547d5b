"""Trials in the report's page: what filters choose among, what a pointer shows, the table, thumbnails of samples."""

from __future__ import annotations

import base64
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from analysis.aggregate import ENDED_BADLY, Trial
from analysis.figure_data import ending
from analysis.grouping import sort_key
from analysis.load import Results, records
from analysis.objective import objective, varied_or_all
from analysis.render import NOTHING
from analysis.words import brief, duration, symbol, text
from trainables.schema import SETTING_NAMES, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MAX_VALUES = 12
"""Most values of a field that gets a filter."""
THUMBNAIL_BYTES = 750_000
"""Most bytes of all thumbnails of a report, before they are written in base64."""
_STEPS = ((160, None), (160, 75), (112, 70), (80, 60))
"""Largest width in pixels and WebP quality (None is lossless) that thumbnails are tried at until all fit."""
_KINDS = {"end": "chains when it ended", "buffer": "replay buffer", "fresh": "fresh chains from p0"}


@dataclass(frozen=True)
class Filter:
    """A field of the trials that readers choose values of."""

    field: str
    label: str
    values: tuple[str, ...]
    """All values in words, in order; at least two."""


def filters(results: Results) -> list[Filter]:
    """Study, outcome, method, data set and every varied field that take 2 to `MAX_VALUES` values."""
    varied = dict.fromkeys(f for study in results.studies for f in varied_or_all(results, study))
    fields = list(dict.fromkeys(("study", "outcome", "method", "dataset", *varied)))
    trials = records(results.trials[fields])
    found = []
    for field in fields:
        values = {t[field] for t in trials}
        if field == "study":
            named = list(results.studies)
        elif field == "outcome":
            named = [o.value for o in Outcome if o.value in values]
        else:
            named = list(dict.fromkeys(text(v) for v in sorted(values, key=sort_key)))
        if 2 <= len(named) <= MAX_VALUES:
            found.append(Filter(field, symbol(field), tuple(named)))
    return found


def page_trials(results: Results) -> dict[str, Any]:
    """What the page's script knows of the trials.

    Returns:
        `filters` (field, label, values) and `studies`: for each its name, `common` (label and value of the settings
        all its trials share), `fields` (label of the others, whether it was varied), and by trial id: `ending`,
        `setting`, `seed`, `values` of `fields`, `chosen` (index of its value in every filter), and `samples` (label
        and image) where a grid was kept.
    """
    choices = filters(results)
    pictures = thumbnails(results)
    studies = []
    for study in results.studies:
        trials = records(results.trials[results.trials["study"] == study])
        varied = varied_or_all(results, study)
        texts = {f: [text(t[f]) for t in trials] for f in SETTING_NAMES}
        differing = [f for f in varied if f in texts]
        differing += [f for f in SETTING_NAMES if f not in differing and len(set(texts[f])) > 1]
        shared = [f for f in SETTING_NAMES if f not in differing and trials and trials[0][f] is not None]
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
                        "chosen": [c.values.index(text(t[c.field])) for c in choices],
                        **({"samples": picture} if (picture := pictures.get((study, t["trial_id"]))) else {}),
                    }
                    for i, t in enumerate(trials)
                },
            }
        )
    return {
        "filters": [{"field": c.field, "label": c.label, "values": list(c.values)} for c in choices],
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
        done = f"{_or_dash(t['iterations_done'])} of {_or_dash(t['iterations_planned'])}"
        cells += [(text(t["seed"]), t["seed"]), (t["outcome"], t["outcome"]), (done, t["iterations_done"])]
        if metric is not None:
            value = t[f"{metric.name}_best"]
            star, error = "*" if t["outcome"] in ENDED_BADLY else "", t[metric.best_error_column]
            sampled = "" if error is None else f" ± {error:.2g}"
            cells.append((NOTHING if value is None else f"{value:.3g}{star}{sampled}", value))
        pace, seconds = t["seconds_per_iteration"], t["train_seconds"]
        cells.append((NOTHING if pace is None else f"{1000 * pace:.3g}", pace))
        cells.append((NOTHING if seconds is None else duration(seconds), seconds))
        rows.append([*cells, (t["setting_id"], t["setting_id"])])
    return {"header": header, "rows": rows}


# ---------------------------------------------------------------------------------------------------- thumbnails


def thumbnails(results: Results, most: int = THUMBNAIL_BYTES) -> dict[tuple[str, str], list[str]]:
    """A small picture of the samples of every trial that has a grid: of its end where it ended badly, else its buffer.

    Args:
        results: One or many studies.
        most: Bytes all of them may take. Where they would take more all become smaller, and where even the smallest
            do not fit, those of the last trials are left out.

    Returns:
        By study and trial id: what the picture shows, and its data URI.
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
    for trial in records(results.trials[["study", "trial_id", "outcome"]]):
        for kind in _order(trial):
            path = results.sample_grid(trial["study"], trial["trial_id"], kind)
            if path is not None:
                yield (trial["study"], trial["trial_id"]), kind, path
                break


def _order(trial: Trial) -> Sequence[str]:
    # What a diverged trial made in the end says more than its buffer at some epoch before.
    return tuple(_KINDS) if trial["outcome"] in ENDED_BADLY else ("buffer", "fresh", "end")


def thumbnail(path: Path, width: int, quality: int | None) -> bytes | None:
    """A grid as a small WebP picture; None where the file is no picture (a study that runs may be writing it).

    Args:
        path: PNG file; an enlargement by a whole number is undone, which loses nothing.
        width: Most pixels across.
        quality: Of lossy WebP, 0 to 100; None is lossless where the picture is narrow enough as it is.
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


def _or_dash(value: Any) -> str:
    return NOTHING if value is None else text(value)
