"""`mebm figures`: the paper's figures of trained models, made from the models that completed trials left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis import courses as course
from analysis import exhibits as shown
from analysis.exhibits import Exhibit, Picture
from analysis.load import load, typed_frame, write_parquet
from analysis.picture_grids import EMPTY, enlarged, write_grid
from study.errors import UserError, one_line
from study.exhibit_models import Chosen, Work, choose
from trainables import exhibits
from trainables.device import resolve_device
from trainables.exhibits import LogP, Scores
from trainables.files import alone
from trainables.saved import SavedModel
from trainables.schema import Column

GRID_SIDE = 8
"""Images in a row of a sample grid (Figs 1, 3, 8)."""
GRID_COLUMNS = 5
"""Centres in a row."""
_CENTRE_PIXELS = 90
PER_CLASS = 10
"""Images of a class in a row of a class grid (Figs 3, 5)."""


@dataclass(frozen=True)
class Made:
    """What a run of the command made, and what it could not make, one line each."""

    index: Path
    figures: list[Exhibit]
    notes: list[str]


def make_figures(
    folders: Sequence[Path],
    out: Path,
    *,
    kinds: Sequence[str] = (),
    trials: Sequence[str] = (),
    best: Sequence[str] = (),
    log_p: LogP | None = None,
    points: int = 200,
    device: str = "auto",
    required: bool = True,
) -> Made:
    """Make figures of the studies in `folders` and add them to the index of `out`.

    Figures of other kinds that `out` holds stay; those of the same kind are replaced.

    Args:
        kinds: of `analysis.exhibits.KINDS`; empty: every one that can be made.
        trials: TRIAL_ID or STUDY/TRIAL_ID; empty: of every study and method the best one.
        best: metrics, each of which chooses a model of every study and method; empty: FID or FD of the buffer.
        log_p: what stands for log p(x); None: what the paper's figures use, where the model has it.
        points: images per set and model of the t-SNE.
        required: whether it is a mistake that there is nothing to make at all.

    Raises:
        UserError: nothing can be made of a kind that was asked for, or an argument fits no trial.
        ResultsError: the index of `out` is damaged, or names files elsewhere.
    """
    results = load(*folders)
    try:
        where = resolve_device(device)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    chosen = choose(results, trials, best)
    wanted = kinds or shown.KINDS
    if not chosen and any(kind != "curves" for kind in kinds):
        raise UserError(
            f"{_names(folders)}: no model to show: models/ holds none; a trial leaves one when it completes"
        )
    work = Work(results, chosen, out, log_p, points, where, bool(trials or best))
    shown.read_index(out)  # one that is damaged is said now
    made: list[Exhibit] = []
    for kind in wanted:
        before = len(work.notes)
        found = _MAKERS[kind](work)
        if not found and kind in kinds:
            why = work.notes[before] if len(work.notes) > before else "no trial has a value over more than one epoch"
            raise UserError(f"{_names(folders)}: no figure of kind {kind}: {why}")
        made += found
    if not made:
        reason = work.notes[0] if work.notes else "no trial has completed"
        if not required:
            return Made(out / shown.INDEX, [], work.notes or [f"figures of models: {reason}"])
        raise UserError(f"{_names(folders)}: nothing to show: {reason}")
    if not chosen:
        work.notes.append("figures of models: models/ holds none; a trial leaves one when it completes")
    with alone(out):
        there = shown.read_index(out)
        kept = [e for e in there if e.kind not in wanted]
        replaced = [e for e in there if e.kind in wanted]
        used = {file for e in (*kept, *made) for file in e.files}
        for file in (f for e in replaced for f in e.files if f not in used):
            (out / file).unlink(missing_ok=True)
            if file.endswith(".html"):  # its other formats
                for kind in ("json", "png", "svg", "pdf"):
                    (out / file).with_suffix(f".{kind}").unlink(missing_ok=True)
        order = {kind: number for number, kind in enumerate(shown.KINDS)}
        index = shown.write_index(out, sorted([*kept, *made], key=lambda e: order[e.kind]))
    return Made(index, made, work.notes)


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(str(f) for f in folders)


# ------------------------------------------------------------------------------------------------------ figures


def _pool(saved: SavedModel) -> str:
    """What a model's samples are, in words."""
    c = saved.config
    if c.sampler == "generator":
        return "images of its generator"
    return "replay buffer" if c.buffered else f"fresh chains of {c.evaluation.fresh_steps} steps"


def _told(one: Chosen, saved: SavedModel) -> str:
    return f"{one.study}/{one.trial_id}, {saved.config.dataset}, epoch {saved.epoch}"


def _images(saved: SavedModel) -> NDArray[np.uint8]:
    return saved.samples.numpy()


def _samples(work: Work) -> list[Exhibit]:
    found, rows = [], []
    for one, saved in work.with_samples("samples"):
        count = min(GRID_SIDE**2, len(saved.samples))
        cells = np.full(GRID_SIDE**2, EMPTY)
        cells[:count] = np.arange(count)
        grids = {"samples": (cells.reshape(GRID_SIDE, GRID_SIDE), "samples")}
        caption = f"{count} of {len(saved.samples)} samples ({_pool(saved)}); {_told(one, saved)}."
        scored = work.score("conditional samples", one) if saved.config.classifies else None
        if scored is not None:
            assert scored[0].predicted is not None
            by_class = exhibits.first_per_class(scored[0].predicted, saved.classes, PER_CLASS)
            grids["conditional"] = (by_class, "rows: predicted class")
            caption += _missing(saved, by_class)
        pictures = []
        for name, (grid, label) in grids.items():
            pictures.append(_picture(work, one, saved, f"{name}.png", label, grid))
            rows += _cells(one, name, grid if name == "conditional" else grid.reshape(1, -1), scored, name != "samples")
        found.append(_pictures("samples", one, f"Samples of {one.label}", caption, pictures))
    return _with_table(work, "samples", rows, shown.CELL_COLUMNS, found)


def _classes(work: Work) -> list[Exhibit]:
    found, rows = [], []
    for one, saved in work.with_samples("classes"):
        scored = work.score("classes", one)
        if scored is None:
            continue
        scores, log_p = scored
        panels = exhibits.class_panels(scores, saved.classes)
        by_class = scores.predicted is not None
        pictures = []
        for name, cells in panels.items():
            grid = cells[:, :PER_CLASS] if by_class else cells.reshape(-1, PER_CLASS)
            label = shown.PANEL_TITLES[name]
            pictures.append(_picture(work, one, saved, f"classes_{name}.png", label, grid))
            rows += _cells(one, name, cells, scored, by_class)
        for number in range(saved.classes if by_class else 0):
            if (panels["samples"][number] == EMPTY).all():
                continue
            word = shown.class_name(saved.config.dataset, number)
            for name, cells in panels.items():
                title = f"{word}: {shown.PANEL_TITLES[name]}"
                file = f"class_{number}_{name}.png"
                grid = cells[number].reshape(-1, PER_CLASS)
                pictures.append(_picture(work, one, saved, file, title, grid, detail=True))
        order = "rows are predicted classes, from the extreme inwards" if by_class else "from the extreme inwards"
        caption = f"Of {len(saved.samples)} samples ({_pool(saved)}); {order}. {shown.LOG_P_TEXT[log_p]}; eval mode; "
        caption += f"{_told(one, saved)}." + (_missing(saved, panels["samples"]) if by_class else "")
        title = f"Samples of {one.label} by p(x) and p(y|x)" if by_class else f"Samples of {one.label} by p(x)"
        found.append(_pictures("classes", one, title, caption, pictures))
    return _with_table(work, "classes", rows, shown.CELL_COLUMNS, found)


def _missing(saved: SavedModel, cells: NDArray[np.int64]) -> str:
    """Classes no sample is predicted as, in words: a finding, and the reason for an empty row."""
    empty = [shown.class_name(saved.config.dataset, int(c)) for c in np.flatnonzero((cells == EMPTY).all(axis=1))]
    return f" No sample is predicted as {', '.join(empty)}." if empty else ""


def _picture(
    work: Work,
    one: Chosen,
    saved: SavedModel,
    name: str,
    label: str,
    cells: NDArray[np.int64],
    *,
    detail: bool = False,
) -> Picture:
    file = f"{one.key}/{name}"
    write_grid(work.out / file, _images(saved), cells)
    return Picture(file, label, detail)


def _cells(
    one: Chosen, panel: str, cells: NDArray[np.int64], scored: tuple[Scores, LogP] | None, by_class: bool
) -> list[dict[str, Any]]:
    """A panel as rows of `CELL_COLUMNS`; empty cells have none."""
    rows = []
    for (row, rank), index in np.ndenumerate(cells):
        if index != EMPTY:
            values = _values(scored, int(index))
            values |= {"panel": panel, "class": row if by_class else None, "rank": rank, "index": int(index)}
            rows.append(one.columns | values)
    return rows


def _values(scored: tuple[Scores, LogP] | None, index: int) -> dict[str, Any]:
    if scored is None:
        return {}
    scores, log_p = scored
    confidence = None if scores.confidence is None else float(scores.confidence[index])
    return {"log_p": float(scores.log_p[index]), "log_p_kind": log_p, "confidence": confidence}


def _pictures(kind: str, one: Chosen, title: str, caption: str, pictures: Sequence[Picture]) -> Exhibit:
    return Exhibit(kind, "pictures", title, caption, one.label, f"{kind}.parquet", tuple(pictures))


def _histogram(work: Work) -> list[Exhibit]:
    found, rows = [], []
    for one, saved in work.with_samples("histogram"):
        scored = work.score("histogram", one)
        if scored is None:
            continue
        own = _score_rows(one, saved, "samples", scored, scored[0].predicted)
        data = work.data("test images in the histogram", one)
        if data is not None:
            test = exhibits.score_images(saved, data.test_images, scored[1])
            own += _score_rows(one, saved, "test", (test, scored[1]), data.test_labels.numpy())
        rows += own
        histograms = shown.class_histograms(typed_frame(own, shown.SCORE_COLUMNS))
        page = f"histogram_{one.key}.html"
        shown.write_page(work.out / page, shown.histogram_figure(histograms))
        caption = f"Number of samples / test images in brackets. {shown.LOG_P_TEXT[scored[1]]}; {_told(one, saved)}."
        title = f"log p(x) of {one.label}" + (" by class" if scored[0].predicted is not None else "")
        found.append(Exhibit("histogram", "histogram", title, caption, one.label, "histogram.parquet", (), page))
    return _with_table(work, "histogram", rows, shown.SCORE_COLUMNS, found)


def _score_rows(
    one: Chosen, saved: SavedModel, images: str, scored: tuple[Scores, LogP], classes: NDArray[np.int64] | None
) -> list[dict[str, Any]]:
    rows = []
    for index in range(len(scored[0].log_p)):
        label = None if classes is None else int(classes[index])
        name = None if label is None else shown.class_name(saved.config.dataset, label)
        own = {"images": images, "index": index, "class": label, "class_name": name}
        rows.append(one.columns | own | _values(scored, index))
    return rows


def _centres(work: Work) -> list[Exhibit]:
    """One exhibit per p0: models that start from the same one share it."""
    groups: dict[bytes, list[tuple[Chosen, SavedModel, NDArray[np.float32]]]] = {}
    for one in work.chosen:
        saved = work.model(one)
        data = work.data("centres", one)
        initial = work.initial("centres", one, data) if data is not None else None
        if initial is None:
            continue
        try:
            centres = exhibits.p0_centres(initial).numpy()
        except ValueError as error:
            work.note("centres", one, error)
        else:
            groups.setdefault(centres.tobytes(), []).append((one, saved, centres))
    found: list[Exhibit] = []
    rows: list[dict[str, Any]] = []
    for members in groups.values():
        first, saved, centres = members[0]
        models = ", ".join(one.label for one, _, _ in members)
        images = enlarged(exhibits.centre_images(centres), _CENTRE_PIXELS)
        side = min(len(images), GRID_COLUMNS)
        cells = np.full(-(-len(images) // side) * side, EMPTY)
        cells[: len(images)] = np.arange(len(images))
        file = f"{first.key}/centres.png"
        write_grid(work.out / file, images, cells.reshape(-1, side))
        of = f"the means of its {len(images)} classes" if len(images) > 1 else "its mean"
        trials = ", ".join(f"{one.study}/{one.trial_id}" for one, _, _ in members)
        caption = f"p0 is {saved.config.initial}, of {saved.config.dataset}: {of}; {trials}."
        pictures = (Picture(file, saved.config.initial),)
        title = f"Centre of p0: {models}"
        found.append(Exhibit("centres", "pictures", title, caption, models, "centres.parquet", pictures))
        for (label, channel, row, column), value in np.ndenumerate(centres):
            place = {"class": label if len(images) > 1 else None, "channel": channel, "row": row, "column": column}
            rows.append(first.columns | {"model": models} | place | {"value": float(value)})
    return _with_table(work, "centres", rows, shown.CENTRE_COLUMNS, found)


def _tsne(work: Work) -> list[Exhibit]:
    groups: dict[int, list[tuple[Chosen, dict[str, exhibits.Features], dict[str, NDArray[np.int64]]]]] = {}
    for one, saved in work.with_samples("tsne"):
        data = work.data("tsne", one)
        if data is None:
            continue
        positive, numbers = exhibits.data_images(data.images, work.points)
        sets = {"x+": positive, "x-": saved.samples[: work.points]}
        initial = work.initial("x0 of the tsne", one, data)
        if initial is not None:
            sets["x0"] = exhibits.initial_draws(initial, work.points)
        features = exhibits.set_features(saved, sets)
        indices = {name: np.arange(len(images)) for name, images in sets.items()} | {"x+": numbers}
        groups.setdefault(features["x-"].pooled.shape[1], []).append((one, features, indices))
    found, rows = [], []
    for number, (size, members) in enumerate(groups.items()):
        pairs = [(one, name, f, index[name]) for one, features, index in members for name, f in features.items()]
        places = exhibits.embed([f.pooled for _, _, f, _ in pairs])
        own = []
        for (one, name, f, index), place in zip(pairs, places, strict=True):
            own += _point_rows(one.columns | {"embedding": number, "features": size, "set": name}, f, index, place)
        rows += own
        frame = typed_frame(own, shown.POINT_COLUMNS)
        models = ", ".join(one.label for one, _, _ in members)
        trials = ", ".join(f"{one.study}/{one.trial_id}" for one, _, _ in members)
        suffix = f"_{number}" if number else ""
        energies = (
            "E(x), low on data, in train mode as in the t-SNE. Energies have a free offset: every model has its axis"
        )
        for drawing, title, caption in (
            ("tsne", "t-SNE of x⁺, x⁻ and x⁰", _tsne_caption(members, size, len(groups))),
            ("energies", "Energies of x⁺, x⁻ and x⁰", energies),
        ):
            if drawing == "energies" and frame["energy"].isna().all():
                continue
            page = f"{drawing}{suffix}.html"
            shown.write_page(work.out / page, DRAWINGS[drawing](frame))
            title, caption = f"{title}: {models}", f"{caption}; {trials}."
            found.append(Exhibit("tsne", drawing, title, caption, str(number), "tsne.parquet", (), page))
    if len(groups) > 1:
        sizes = "; ".join(f"{size}: {', '.join(o.label for o, _, _ in group)}" for size, group in groups.items())
        work.notes.append(f"one joint tsne: features of unequal number have an embedding of their own ({sizes})")
    return _with_table(work, "tsne", rows, shown.POINT_COLUMNS, found)


def _tsne_caption(members: Sequence[Any], size: int, groups: int) -> str:
    counts = sorted({len(f.pooled) for _, features, _ in members for f in features.values()})
    per_set = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    text = f"{size} pooled features, {per_set} images per set and model, train mode, perplexity 30"
    if len(members) > 1:
        text += (
            "; features of different networks in one embedding, as in the paper: distances between models mean little"
        )
    if groups > 1:
        text += "; models with another number of features have an embedding of their own"
    return text


def _point_rows(
    common: dict[str, Any], f: exhibits.Features, index: NDArray[np.int64], place: NDArray[np.float64]
) -> list[dict[str, Any]]:
    energies = [None] * len(index) if f.energy is None else f.energy.tolist()
    return [
        common | {"index": int(i), "x": float(x), "y": float(y), "energy": e}
        for i, (x, y), e in zip(index, place, energies, strict=True)
    ]


def _curves(work: Work) -> list[Exhibit]:
    settings = {one.setting_id for one in work.chosen} if work.by_hand else None
    found = course.courses(work.results, settings)
    if not found:
        return []
    shown.write_page(work.out / "curves.html", course.courses_figure(found))
    write_parquet(course.course_rows(found), course.COURSE_COLUMNS, work.out / "curves.parquet")
    caption = course.courses_caption(found)
    return [Exhibit("curves", "courses", "Quality over epochs", caption, "", "curves.parquet", (), "curves.html")]


def _with_table(
    work: Work, kind: str, rows: list[dict[str, Any]], columns: Sequence[Column], found: list[Exhibit]
) -> list[Exhibit]:
    if found:
        write_parquet(rows, columns, work.out / f"{kind}.parquet")
    return found


DRAWINGS: dict[str, Callable[[Any], Any]] = {"tsne": shown.tsne_figure, "energies": shown.energies_figure}
_MAKERS: dict[str, Callable[[Work], list[Exhibit]]] = {
    "samples": _samples,
    "classes": _classes,
    "histogram": _histogram,
    "centres": _centres,
    "tsne": _tsne,
    "curves": _curves,
}
