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
from analysis.stats.trials.trial import ENDED_BADLY, Trial
from analysis.tables.registry import NOTHING, or_dash
from trainables.results.schema import CAUSE_TEXT, Cause, Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
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
    """Study, outcome, cause, alarm, saved time, method, data set and varied fields of 2 to `MAX_VALUES` values."""
    varied = dict.fromkeys(f for study in results.studies for f in varied_or_all(results, study))
    fields = list(dict.fromkeys(("study", "outcome", *_SAID, "method", "dataset", *varied)))
    trials = records(results.trials[[*dict.fromkeys((*(f for f in fields if f in results.trials), *_SAID_FROM))]])
    found = {}
    for field in fields:
        if field == "study":
            named = list(results.studies)
        else:
            values = [v for _, v in sorted({(sort_key(_sortable(t, field)), choice(t, field)) for t in trials})]
            named = list(dict.fromkeys(values))
            if field == "outcome":
                named = [o.value for o in Outcome if o.value in named]
        if 2 <= len(named) <= MAX_VALUES:
            found[field] = named
    return found


_SAID: dict[str, Callable[[Trial], str]] = {
    "cause": lambda t: CAUSE_TEXT[Cause(t["cause"])] if t["cause"] is not None else NOTHING,
    "alarm": lambda t: "alarm" if t["alarm_iteration"] is not None else "no alarm",
    "saved": lambda t: "time saved" if t["saved_seconds"] else "nothing saved",
}
"""What can be said of a trial beside its columns."""
_SAID_FROM = ("cause", "alarm_iteration", "saved_seconds")


def choice(trial: Trial, field: str) -> str:
    """A trial's value of a filter, in words."""
    return _SAID[field](trial) if field in _SAID else text(trial[field])


def _sortable(trial: Trial, field: str) -> Any:
    return choice(trial, field) if field in _SAID else trial[field]


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
                        "chosen": [values.index(choice(t, field)) for field, values in choices.items()],
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
    """Every trial of a study: `header`, `rows` of cells as (text, value to sort by), and a `note` on marks.

    A column in which no trial has anything is left out.
    """
    trials = records(results.trials[results.trials["study"] == study])
    metric = objective(results, study)
    shown = [] if metric is None else _twins(results, metric)
    fields = varied_or_all(results, study)
    table = [_cells(t, fields, shown) for t in trials]
    kept = [i for i in range(len(table[0]) if table else 0) if any(cells[i][1] != NOTHING for cells in table)]
    rows = [[cells[i][1:] for i in kept] for cells in table]
    marks = [
        ("*", "* best value before the trial ended."),
        ("↻", "↻ rescued: how often, and how the last rescue ended; the other columns are of the trial before that."),
        ("±", "± standard error of the score by its own sampling."),
    ]
    note = " ".join(words for mark, words in marks if any(mark in cell for row in rows for cell, _ in row))
    return {"header": [table[0][i][0] for i in kept], "rows": rows, "note": note}


def _cells(t: Trial, fields: Sequence[str], metrics: Sequence[Metric]) -> list[tuple[str, str, Any]]:
    """A trial's cells as name of the column, text and value to sort by."""
    done = t["iterations_done"] if t["iteration"] is None else t["iteration"]
    pace, cause = t["seconds_per_iteration"], _SAID["cause"](t)
    return [
        ("Trial", t["trial_id"], t["trial_id"]),
        *((symbol(f), brief(t[f]), t[f]) for f in fields),
        ("Seed", text(t["seed"]), t["seed"]),
        ("Outcome", t["outcome"], t["outcome"]),
        ("Cause", cause, cause),
        ("Rescued", f"↻ {t['rescues']}: {t['rescued']}" if t["rescues"] else NOTHING, t["rescues"]),
        ("Alarm", or_dash(t["alarm_iteration"]), t["alarm_iteration"]),
        ("Iterations", f"{or_dash(done)} of {or_dash(t['iterations_planned'])}", done),
        *((f"best {m.label}", *_best(t, m)) for m in metrics),
        ("ms / iteration", or_dash(pace, lambda s: f"{1000 * s:.3g}"), pace),
        ("Training", or_dash(t["train_seconds"], duration), t["train_seconds"]),
        ("Saved", duration(t["saved_seconds"]) if t["saved_seconds"] else NOTHING, t["saved_seconds"]),
    ]


def _twins(results: Results, metric: Metric) -> list[Metric]:
    """A metric, and the same of fresh chains where it is of the buffer and that was measured too."""
    fresh = f"{metric.name.removesuffix('_buffer')}_fresh"
    return [metric, *(m for m in results.metrics(directed=True) if m.name == fresh and m.name != metric.name)]


def _best(trial: Trial, metric: Metric) -> tuple[str, Any]:
    value, error = trial[f"{metric.name}_best"], trial[metric.best_error_column]
    after = "*" if trial["outcome"] in ENDED_BADLY else ""
    after += "" if error is None else f" ± {error:.2g}"
    return (NOTHING if value is None else f"{value:.3g}{after}", value)


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
