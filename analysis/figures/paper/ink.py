"""Colours of a figure in print, and what else tells apart what differs in colour: dashes, shapes, hatching."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from analysis.figures import style

INK = {
    style.BLUE: "#08519c",
    style.ORANGE: "#e8701a",
    style.GREEN: "#1b8a5a",
    style.PINK: "#e08fc0",
    style.OLIVE: "#c4a000",
    style.PURPLE: "#4b3b8f",
    style.SKY: "#7cc4f0",
    style.GREY: "#6e6e6e",
}
"""The palette on paper, where it differs in lightness too."""
_RAMP = ("#440154", "#3b528b", "#21918c", "#5ec962", "#b8de29")
"""Viridis without its palest end: the lightness rises along it."""
_DASHES = (*style.DASHES, "longdash", "longdashdot", "6px,2px,1px,2px,1px,2px", "1px,4px")
_SHAPES = ("circle", "square-open", "diamond", "triangle-up-open", "cross", "star-open", "triangle-down", "x-open")
_HATCHES = ("", "/", ".", "x", "-", "\\", "+", "|")
Spec = dict[str, Any]
"""A part of a figure as plotly writes it in JSON."""

_HEX = re.compile(r"#[0-9a-fA-F]{6}")
_RGBA = re.compile(r"rgba\((\d+), ?(\d+), ?(\d+), ?([\d.]+)\)")


def lightness(colour: str) -> float:
    """Lightness L* on white paper of a colour #rrggbb or rgba(...), from 0 to 100; 100 of any other."""
    (*rgb, alpha) = _parts(colour)
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in rgb]
    light = alpha * float(np.dot(linear, (0.2126, 0.7152, 0.0722))) + 1 - alpha
    return 116 * light ** (1 / 3) - 16 if light > 0.008856 else 903.3 * light


def _parts(colour: str) -> tuple[int, int, int, float]:
    if _HEX.fullmatch(colour):
        return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:], 16), 1.0
    match = _RGBA.fullmatch(colour)
    return (int(match[1]), int(match[2]), int(match[3]), float(match[4])) if match else (255, 255, 255, 1.0)


def _ink(colour: str, alpha: float | None = None) -> str:
    """A colour of the palette as it is printed, any other as it is; `alpha` instead of that of a transparent one."""
    if _HEX.fullmatch(colour):
        return INK.get(colour.lower(), colour)
    if not _RGBA.fullmatch(colour):
        return colour
    *rgb, own = _parts(colour)
    solid = "#{:02x}{:02x}{:02x}".format(*rgb)
    return style.transparent(INK.get(solid, solid), own if alpha is None else alpha)


def inked(value: Any, others: dict[str, str]) -> Any:
    """A part of a figure with its colours as they are printed, also those in the markup of its texts."""
    if isinstance(value, dict):
        return {k: inked(v, others) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [inked(v, others) for v in value]
    if not isinstance(value, str):
        return value
    if value in others:
        return others[value]
    return _HEX.sub(lambda m: _ink(m[0]), value) if "<span" in value else _ink(value)


def scale_colours(spec: Spec) -> dict[str, str]:
    """The colours of scales whose lightness does not only rise or only fall, with colours whose lightness does."""
    new: dict[str, str] = {}
    for scale in found(spec, "colorscale"):
        if isinstance(scale, str):
            continue
        colours = list(dict.fromkeys(colour for _, colour in scale))
        steps = np.diff([lightness(_ink(c)) for c in colours])
        if not len(steps) or (steps > 3).all() or (steps < -3).all():
            continue
        shares = np.linspace(0, 1, len(colours)).tolist()
        # Tints lie behind marks and text, and are light; a solid colour is a mark.
        tints = all(_parts(c)[-1] < 1 for c in colours)
        ends = [
            _ink(c, round(0.1 + 0.4 * s, 2)) if tints else _on_ramp(s) for c, s in zip(colours, shares, strict=True)
        ]
        scale[:] = [[at, ends[colours.index(colour)]] for at, colour in scale]
        if tints:
            new |= dict(zip(colours, ends, strict=True))
    return new


def _on_ramp(share: float) -> str:
    at = share * (len(_RAMP) - 1)
    low, high = _parts(_RAMP[math.floor(at)])[:3], _parts(_RAMP[math.ceil(at)])[:3]
    return "#{:02x}{:02x}{:02x}".format(*(round(a + (b - a) * (at % 1)) for a, b in zip(low, high, strict=True)))


def found(value: Any, name: str) -> Iterator[Any]:
    """What any part of a figure has by a name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == name:
                yield inner
            yield from found(inner, name)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from found(inner, name)


def tell_apart(traces: Sequence[Spec]) -> None:
    """Give what differs in colour alone dashes, shapes or its own hatching."""
    lines = [t for t in traces if "lines" in t.get("mode", "") and t.get("line", {}).get("width") != 0]
    _part([(t["line"].get("color"), t["line"]) for t in lines if "line" in t], "dash", _DASHES)
    marks = [t["marker"] for t in traces if "markers" in t.get("mode", "") and "marker" in t]
    _part([(m.get("color"), m) for m in marks], "symbol", _SHAPES)
    bars = [t["marker"] for t in traces if t.get("type") in ("bar", "histogram") and "marker" in t]
    _part([(m.get("color"), m.setdefault("pattern", {})) for m in bars], "shape", _HATCHES)


def _part(looks: Sequence[tuple[Any, Spec]], name: str, values: Sequence[str]) -> None:
    """Of looks of several colours that share a value of `name` the first colour keeps it; the others get free ones.

    `values` are what there is, the first what a look has that says none; any other value means its own something,
    and stays where its colour has a look without it to be known by. Tints are told apart by their lightness, and
    points of many colours or shapes show numbers by them.
    """
    plain = [(c, look) for c, look in looks if isinstance(c, str) and isinstance(look.get(name, ""), str)]
    plain = [(c, look) for c, look in plain if _parts(c)[-1] == 1 and look.get(name, values[0]) in values]
    pairs = list(dict.fromkeys((c, look.get(name, values[0])) for c, look in plain))
    known = {c for c, value in pairs if value == values[0]}
    free = [v for v in values if v not in {value for _, value in pairs}]
    owners: dict[str, str] = {}
    given: dict[tuple[str, str], str] = {}
    for colour, value in pairs:
        if owners.setdefault(value, colour) != colour and (value == values[0] or colour not in known) and free:
            given[colour, value] = free.pop(0)
    for colour, look in plain:
        if new := given.get((colour, look.get(name, values[0]))):
            look[name] = new
