"""Type of a figure in print: its size, how wide words are, and where they break."""

from __future__ import annotations

import re

PIXELS = 96
"""Pixels of a layout per inch, as a browser prints them."""
TYPE = 8 * PIXELS / 72
"""8 pt in pixels of a layout."""
LINE = 1.25 * TYPE
"""Height of a line of text, in pixels."""
LETTER = 0.52 * TYPE
"""Mean width of a letter, in pixels."""
_TOKEN = re.compile(r"(?:<[^>]*>|[^\s<])+")


def wide(text: str) -> float:
    """Width of a text's longest line in pixels, about."""
    return LETTER * max(len(re.sub(r"<[^>]*>", "", line)) for line in text.split("<br>"))


def wrapped(text: str, width: float) -> str:
    """A text of plotly's markup with line breaks, so that it is about `width` pixels wide at the most."""
    lines: list[str] = []
    for part in text.split("<br>"):
        line = ""
        for word in _TOKEN.findall(part):
            longer = f"{line} {word}".lstrip()
            if line and wide(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "<br>".join(lines)
