"""`mebm figures`: the paper's figures of trained models, made from the models that completed trials left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.figures import learning_curves as course
from analysis.figures.models import drawings as shown
from analysis.figures.models.index import KINDS, Exhibit, Picture, read_index, write_index, write_page
from analysis.results.load import load
from analysis.results.parquet import typed_frame, write_parquet
from study.config.errors import UserError, one_line
from study.models.choose import Chosen, Work, choose
from trainables.models import views as exhibits
from trainables.models.model_file import SavedModel
from trainables.models.views import LogP, Scores
from trainables.results.files import alone
from trainables.results.grids import EMPTY, enlarged, grid_cells, write_grid
from trainables.results.schema import Column
from trainables.training.device import resolve_device
from trainables.training.trainer import to_grid

Row = dict[str, Any]
Made = Iterator[tuple[Exhibit, list[Row]]]
Ints = NDArray[np.int64]
GRID_SIDE = 8
"""Images in a row of a sample grid (Figs 1, 3, 8)."""
GRID_COLUMNS = 5
"""Centres in a row."""
_CENTRE_PIXELS = 90
_ENERGIES_CAPTION = (
    "E(x), low on data, in train mode as in the t-SNE. Energies have a free offset: every model has its axis"
)
PER_CLASS = 10
"""Images of a class in a row of a class grid (Figs 3, 5)."""


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
) -> tuple[list[Exhibit], list[str]]:
    """Make figures of the studies in `folders` and add them to the index of `out`, where those of other kinds stay.

    Arguments are the options of `mebm figures`; `required`: whether it is a mistake that there is nothing to make at
    all. Returned are what was made and a line for everything that was not. UserError: nothing can be made of a kind
    that was asked for, or an argument fits no trial. ResultsError: the index of `out` is damaged, or names files
    elsewhere.
    """
    results = load(*folders)
    try:
        where = resolve_device(device)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    work = Work(results, choose(results, trials, best), out, log_p, points, where, bool(trials or best))
    names, wanted = ", ".join(map(str, folders)), kinds or KINDS
    none = "models/ holds none; a trial leaves one when it completes"
    if not work.chosen and any(kind != "curves" for kind in kinds):
        raise UserError(f"{names}: no model to show: {none}")
    read_index(out)  # one that is damaged is said now
    made: list[Exhibit] = []
    for kind in wanted:
        before = len(work.notes)
        found = _make(work, kind)
        if not found and kind in kinds:
            why = work.notes[before] if len(work.notes) > before else "no trial has a value over more than one epoch"
            raise UserError(f"{names}: no figure of kind {kind}: {why}")
        made += found
    if not made:
        reason = work.notes[0] if work.notes else "no trial has completed"
        if required:
            raise UserError(f"{names}: nothing to show: {reason}")
        return [], work.notes or [f"figures of models: {reason}"]
    if not work.chosen:
        work.notes.append(f"figures of models: {none}")
    _into_index(out, wanted, made)
    return made, work.notes


def _make(work: Work, kind: str) -> list[Exhibit]:
    found, rows = list[Exhibit](), list[Row]()
    maker, columns = _MAKERS[kind]
    for exhibit, own in maker(work):
        found.append(exhibit)
        rows += own
    if found:
        write_parquet(rows, columns, work.out / f"{kind}.parquet")
    return found


def _into_index(out: Path, kinds: Sequence[str], made: Sequence[Exhibit]) -> None:
    with alone(out):
        there = read_index(out)
        whole = [*(e for e in there if e.kind not in kinds), *made]
        for name in {file for e in there for file in e.files} - {file for e in whole for file in e.files}:
            file = out / name
            file.unlink(missing_ok=True)
            for ending in ("json", "png", "svg", "pdf") if file.suffix == ".html" else ():
                file.with_suffix(f".{ending}").unlink(missing_ok=True)
        write_index(out, sorted(whole, key=lambda e: KINDS.index(e.kind)))


def _pool(saved: SavedModel) -> str:
    """What a model's samples are, in words."""
    c = saved.config
    if not c.chains and c.samples:
        return "images of its generator"
    return "replay buffer" if c.buffered else f"fresh chains of {c.evaluation.fresh_steps} steps"


def _told(one: Chosen, saved: SavedModel) -> str:
    return f"{one.study}/{one.trial_id}, {saved.config.dataset}, epoch {saved.epoch}"


def _samples(work: Work) -> Made:
    for one, saved in work.with_samples("samples"):
        count = min(GRID_SIDE**2, len(saved.samples))
        grids = {"samples": (grid_cells(count, GRID_SIDE, GRID_SIDE), "samples")}
        caption = f"{count} of {len(saved.samples)} samples ({_pool(saved)}); {_told(one, saved)}."
        scored = work.score("conditional samples", one) if saved.config.classifies else None
        if scored is not None:
            assert scored[0].predicted is not None
            by_class = exhibits.first_per_class(scored[0].predicted, saved.classes, PER_CLASS)
            grids["conditional"] = (by_class, "rows: predicted class")
            caption += _missing(saved, by_class)
        pictures, rows = [], list[Row]()
        for name, (grid, label) in grids.items():
            pictures.append(_picture(work, one, saved, f"{name}.png", label, grid))
            rows += _cells(one, name, grid if name == "conditional" else grid.reshape(1, -1), scored, name != "samples")
        yield _pictures("samples", one, f"Samples of {one.label}", caption, pictures), rows


def _classes(work: Work) -> Made:
    for one, saved in work.with_samples("classes"):
        scored = work.score("classes", one)
        if scored is None:
            continue
        scores, log_p = scored
        panels = exhibits.class_panels(scores, saved.classes)
        by_class = scores.predicted is not None
        pictures, rows = [], list[Row]()
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
        yield _pictures("classes", one, title, caption, pictures), rows


def _missing(saved: SavedModel, cells: Ints) -> str:
    """Classes no sample is predicted as, in words: a finding, and the reason for an empty row."""
    empty = [shown.class_name(saved.config.dataset, int(c)) for c in np.flatnonzero((cells == EMPTY).all(axis=1))]
    return f" No sample is predicted as {', '.join(empty)}." if empty else ""


def _picture(
    work: Work, one: Chosen, saved: SavedModel, name: str, label: str, cells: Ints, *, detail: bool = False
) -> Picture:
    file = f"{one.key}/{name}"
    write_grid(work.out / file, saved.samples.numpy(), cells)
    return Picture(file, label, detail)


def _cells(one: Chosen, panel: str, cells: Ints, scored: tuple[Scores, LogP] | None, by_class: bool) -> list[Row]:
    return [
        {**one.columns, **_values(scored, int(index)), "panel": panel, "class": row if by_class else None}
        | {"rank": rank, "index": int(index)}
        for (row, rank), index in np.ndenumerate(cells)
        if index != EMPTY
    ]


def _values(scored: tuple[Scores, LogP] | None, index: int) -> Row:
    if scored is None:
        return {}
    scores, log_p = scored
    confidence = None if scores.confidence is None else float(scores.confidence[index])
    return {"log_p": float(scores.log_p[index]), "log_p_kind": log_p, "confidence": confidence}


def _pictures(kind: str, one: Chosen, title: str, caption: str, pictures: Sequence[Picture]) -> Exhibit:
    return Exhibit(kind, "pictures", title, caption, one.label, f"{kind}.parquet", tuple(pictures))


def _histogram(work: Work) -> Made:
    for one, saved in work.with_samples("histogram"):
        scored = work.score("histogram", one)
        if scored is None:
            continue
        own = _score_rows(one, saved, "samples", scored, scored[0].predicted)
        data = work.data("test images in the histogram", one)
        if data is not None:
            test = exhibits.score_images(saved, data.test_images, scored[1])
            own += _score_rows(one, saved, "test", (test, scored[1]), data.test_labels.numpy())
        histograms = shown.class_histograms(typed_frame(own, shown.SCORE_COLUMNS))
        page = f"histogram_{one.key}.html"
        write_page(work.out / page, shown.histogram_figure(histograms))
        caption = f"Number of samples / test images in brackets. {shown.LOG_P_TEXT[scored[1]]}; {_told(one, saved)}."
        title = f"log p(x) of {one.label}" + (" by class" if scored[0].predicted is not None else "")
        yield Exhibit("histogram", "histogram", title, caption, one.label, "histogram.parquet", (), page), own


def _score_rows(
    one: Chosen, saved: SavedModel, images: str, scored: tuple[Scores, LogP], classes: Ints | None
) -> list[Row]:
    rows = []
    for index in range(len(scored[0].log_p)):
        label = None if classes is None else int(classes[index])
        name = None if label is None else shown.class_name(saved.config.dataset, label)
        own = {"images": images, "index": index, "class": label, "class_name": name}
        rows.append(one.columns | own | _values(scored, index))
    return rows


def _centres(work: Work) -> Made:
    """One exhibit per p0: models that start from the same one share it."""
    groups: dict[bytes, list[tuple[Chosen, SavedModel, NDArray[np.float32]]]] = {}
    for one in work.chosen:
        saved = work.model(one)
        data = work.data("centres", one)
        initial = work.initial("centres", one, data) if data is not None else None
        if initial is None:
            continue
        try:
            centres = initial.centres().numpy()
        except ValueError as error:
            work.note("centres", one, error)
        else:
            groups.setdefault(centres.tobytes(), []).append((one, saved, centres))
    for members in groups.values():
        first, saved, centres = members[0]
        models = ", ".join(one.label for one, _, _ in members)
        images = enlarged(to_grid(torch.from_numpy(centres)).numpy(), _CENTRE_PIXELS)
        file = f"{first.key}/centres.png"
        write_grid(work.out / file, images, grid_cells(len(images), min(len(images), GRID_COLUMNS)))
        of = f"the means of its {len(images)} classes" if len(images) > 1 else "its mean"
        trials = ", ".join(f"{one.study}/{one.trial_id}" for one, _, _ in members)
        caption = f"p0 is {saved.config.initial}, of {saved.config.dataset}: {of}; {trials}."
        pictures = (Picture(file, saved.config.initial),)
        title = f"Centre of p0: {models}"
        rows = []
        for (label, channel, row, column), value in np.ndenumerate(centres):
            place = {"class": label if len(images) > 1 else None, "channel": channel, "row": row, "column": column}
            rows.append(first.columns | {"model": models} | place | {"value": float(value)})
        yield Exhibit("centres", "pictures", title, caption, models, "centres.parquet", pictures), rows


def _tsne(work: Work) -> Made:
    groups: dict[int, list[tuple[Chosen, dict[str, exhibits.Features], dict[str, Ints]]]] = {}
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
    for number, (size, members) in enumerate(groups.items()):
        pairs = [(one, name, f, index[name]) for one, features, index in members for name, f in features.items()]
        places = exhibits.embed([f.pooled for _, _, f, _ in pairs])
        own = list[Row]()
        for (one, name, f, index), place in zip(pairs, places, strict=True):
            common = one.columns | {"embedding": number, "features": size, "set": name}
            energies = [None] * len(index) if f.energy is None else f.energy.tolist()
            for i, (x, y), energy in zip(index, place, energies, strict=True):
                own.append(common | {"index": int(i), "x": float(x), "y": float(y), "energy": energy})
        frame = typed_frame(own, shown.POINT_COLUMNS)
        models = ", ".join(one.label for one, _, _ in members)
        trials = ", ".join(f"{one.study}/{one.trial_id}" for one, _, _ in members)
        suffix = f"_{number}" if number else ""
        for drawing, draw, title, caption in (
            ("tsne", shown.tsne_figure, "t-SNE of x⁺, x⁻ and x⁰", _tsne_caption(members, size, len(groups))),
            ("energies", shown.energies_figure, "Energies of x⁺, x⁻ and x⁰", _ENERGIES_CAPTION),
        ):
            if drawing == "energies" and frame["energy"].isna().all():
                continue
            page = f"{drawing}{suffix}.html"
            write_page(work.out / page, draw(frame))
            title, caption = f"{title}: {models}", f"{caption}; {trials}."
            exhibit = Exhibit("tsne", drawing, title, caption, str(number), "tsne.parquet", (), page)
            yield exhibit, own if drawing == "tsne" else []
    if len(groups) > 1:
        sizes = "; ".join(f"{size}: {', '.join(o.label for o, _, _ in group)}" for size, group in groups.items())
        work.notes.append(f"one joint tsne: features of unequal number have an embedding of their own ({sizes})")


def _tsne_caption(members: Sequence[Any], size: int, groups: int) -> str:
    counts = sorted({len(f.pooled) for _, features, _ in members for f in features.values()})
    per_set = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    text = f"{size} pooled features, {per_set} images per set and model, train mode, perplexity 30"
    if len(members) > 1:
        text += "; features of different networks in one embedding, as in the paper: distances between models mean "
        text += "little"
    if groups > 1:
        text += "; models with another number of features have an embedding of their own"
    return text


def _curves(work: Work) -> Made:
    settings = {one.setting_id for one in work.chosen} if work.by_hand else None
    if found := course.courses(work.results, settings):
        write_page(work.out / "curves.html", course.draw_courses(found))
        caption = course.courses_caption(found)
        exhibit = Exhibit("curves", "courses", "Quality over epochs", caption, "", "curves.parquet", (), "curves.html")
        yield exhibit, course.course_rows(found)


# What makes the exhibits of a kind, each with its rows of the kind's table.
_MAKERS: dict[str, tuple[Callable[[Work], Made], Sequence[Column]]] = {
    "samples": (_samples, shown.CELL_COLUMNS),
    "classes": (_classes, shown.CELL_COLUMNS),
    "histogram": (_histogram, shown.SCORE_COLUMNS),
    "centres": (_centres, shown.CENTRE_COLUMNS),
    "tsne": (_tsne, shown.POINT_COLUMNS),
    "curves": (_curves, course.COURSE_COLUMNS),
}
