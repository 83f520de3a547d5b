"""Long chains of trained models: energy and FD along them, from `mebm diagnose`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.figures import style
from analysis.figures.registry import Figure, Part, Study
from analysis.figures.style import DASHES, PALETTE, SHAPES
from analysis.results.load import read_diagnosis
from analysis.results.messages import ResultsError
from analysis.results.parquet import records
from analysis.stats.trials.chains import verdict
from analysis.stats.trials.grouping import group_by
from trainables.results.files import UnsafePathError, within
from trainables.results.layout import DIAGNOSIS_FILE
from trainables.results.schema import DIAGNOSIS_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

_ZERO = 0.5
"""Where 0 steps stand on a logarithmic axis."""
_WORDS = {"p0": "from p0", "data": "from test images", "buffer": "from the buffer"}


def diagnosis_figure(diagnosis: pd.DataFrame) -> go.Figure:
    """Energy and FD of long chains against their steps, of `diagnosis.parquet` (`DIAGNOSIS_COLUMNS`)."""
    return style.light(_drawn(diagnosis))


def _data(study: Study) -> Iterator[Part]:
    folder = study.results.folders.get(study.name)
    if folder is None:
        return
    try:
        path = within(folder, DIAGNOSIS_FILE)
        frame = read_diagnosis(path) if path.is_file() else None
    except (ResultsError, UnsafePathError) as error:
        study.results.note(f"{error}; left out")
        return
    if frame is None or not len(frame):
        return
    trained = {r["trial_id"]: r["sampling_steps"] for r in records(study.trials[["trial_id", "sampling_steps"]])}
    said = [
        f"{trial}: {verdict(rows, trained.get(trial) or 0).text}"
        for (trial, _, _), rows in group_by(records(frame), ("trial_id", "model", "start")).items()
    ]
    how = (
        "The trial's own sampler, run on from where chains begin; the band holds 80% of the chains' energies, the "
        "dotted line is the mean energy of test images. FD is on a small classifier's features, with its standard "
        "error. A model whose chains leave the data samples well at K steps without being a density (Nijkamp et al. "
        "2019)."
    )
    code = f"analysis.load.read_diagnosis(results.folders[{study.name!r}] / 'diagnosis.parquet')"
    yield Part(frame, f"{'; '.join(said[:2])}.", code, given=frame, how=how)


def _draw(study: Study, frame: pd.DataFrame) -> go.Figure:  # noqa: ARG001
    return _drawn(frame)


def _drawn(frame: pd.DataFrame) -> go.Figure:
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    groups = group_by(records(frame), ("trial_id", "model", "start"))
    many = len({trial for trial, _, _ in groups}) > 1
    for number, ((trial, model, start), rows) in enumerate(groups.items()):
        name = " ".join([*([trial] if many else []), *(["best"] if model == "best" else []), _WORDS.get(start, start)])
        colour, x = PALETTE[number % len(PALETTE)], [max(r["step"], _ZERO) for r in rows]
        look = {"color": colour, "dash": DASHES[number % len(DASHES)], "width": 1.8}
        marker = style.marker(colour, SHAPES[number % len(SHAPES)], 7)
        band = [r["energy_low"] for r in rows] + [r["energy_high"] for r in rows][::-1]
        figure.add_scatter(
            x=x + x[::-1], y=band, fill="toself", fillcolor=style.transparent(colour, 0.15), line={"width": 0},
            hoverinfo="skip", **style.grouped(name, shown=False), row=1, col=1,
        )  # fmt: skip
        figure.add_scatter(
            x=x, y=[r["energy_mean"] for r in rows], mode="lines+markers", line=look, marker=marker,
            **style.grouped(name, shown=True), row=1, col=1,
            hovertext=[f"{r['step']:,} steps: energy {r['energy_mean']:.3g}, {r['clamped_pixel_share']:.0%} of the "
                       f"pixels at an end, moved by {r['moved']:.2f}" for r in rows], hoverinfo="text",
        )  # fmt: skip
        scored = [r for r in rows if r["fd"] is not None]
        figure.add_scatter(
            x=[max(r["step"], _ZERO) for r in scored], y=[r["fd"] for r in scored], mode="lines+markers", line=look,
            marker=marker, **style.grouped(name, shown=False), row=2, col=1,
            error_y={"type": "data", "array": [r["fd_se"] or 0 for r in scored], "color": colour, "thickness": 1},
            hovertext=[f"{r['step']:,} steps: FD {r['fd']:.3g}" for r in scored], hoverinfo="text",
        )  # fmt: skip
        figure.add_hline(y=rows[0]["energy_data_mean"], line={"color": colour, "dash": "dot", "width": 1}, row=1, col=1)
    last = max(r["step"] for rows in groups.values() for r in rows)
    ticks = [t for t in (1, 10, 100, 1000, 10_000, 100_000, 1_000_000) if t <= last]
    along = {"type": "log", "tickvals": [_ZERO, *ticks], "ticktext": ["0", *(f"{t:,}" for t in ticks)]}
    figure.update_layout(
        height=520, showlegend=True, yaxis=style.axis("energy"), yaxis2=style.axis("FD, lower is better"),
        xaxis=style.axis("", **along), xaxis2=style.axis("Langevin steps", **along),
    )  # fmt: skip
    return figure


FIGURES = (
    Figure("diagnosis", "curves", "Whether long chains of a model stay on the data", DIAGNOSIS_COLUMNS, _data, _draw),
)
