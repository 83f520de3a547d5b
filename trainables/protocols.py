"""The evaluation protocols: how samples are chosen and scored. Plain data, so a configuration can be checked early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Protocol:
    """How samples are chosen and scored.

    Attributes:
        source: `buffer`, the replay buffer as the paper does, or `fresh`, new chains from p0.
        features: `small` (the data set's small classifier, gives FD) or `inception` (gives FID and IS).
        count: images to score; None: all of them. A buffer with fewer images is scored whole, and the id says so.
        top_share: keep this share of each predicted class, by the class head's confidence; None keeps all.
        rounding: how [-1, 1] becomes uint8; the released code truncates (eval_buffer.py:55).
        citation: where the protocol comes from.
    """

    name: str
    source: Literal["buffer", "fresh"]
    features: Literal["small", "inception"]
    count: int | None
    top_share: float | None
    rounding: Literal["truncate", "round"]
    citation: str


PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol("small-buffer", "buffer", "small", 1000, None, "round", "this package; FD on small images"),
        Protocol("small-fresh", "fresh", "small", 1000, None, "round", "this package; FD on small images"),
        Protocol(
            "paper-mebm", "buffer", "inception", None, 0.9, "truncate",
            "sndnyang/mebm train_maebm.py:275, eval_buffer.py:39-55: top 90% of each predicted class; train set",
        ),
        Protocol(
            "paper-mjem", "buffer", "inception", None, 0.1, "truncate",
            "sndnyang/mebm train_maebm.py:275 with --pyx: top 10% of each predicted class; train set",
        ),
        Protocol("buffer-all", "buffer", "inception", None, None, "truncate", "sndnyang/mebm readme.md, --ratio 10000"),
        Protocol("fresh-10k", "fresh", "inception", 10_000, None, "round", "this package; chains the buffer never saw"),
    )
}  # fmt: skip
