"""The evaluation protocols: which images, how many, chosen how, against what. A named protocol never changes: `digest`
is over everything that makes the number, and a test pins it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Literal

from trainables.results.metric import Source
from trainables.results.spelling import nearest

Reference = Literal["train", "test", "train+test"]
Resize = Literal["tensorflow", "clean-fid"]


@dataclass(frozen=True)
class Protocol:
    """How samples are chosen and scored.

    Attributes:
        source: `buffer`, as the paper does, or `fresh`.
        features: `small` (the data set's small classifier, gives FD), `inception` (gives FID, IS, KID, precision and
            recall: torch-fidelity's inception-v3-compat, layer 2048 and the unbiased logits) or `own` (`extractor`).
        count: images to score; None: all of them. A buffer with fewer images is scored whole, and the id says so.
        top_share: keep this share of each predicted class, by the class head's confidence; None keeps all.
        rounding: how [-1, 1] becomes uint8; the released code truncates (eval_buffer.py:55).
        citation: where the protocol comes from.
        reference: the images that samples are compared with.
        reference_count: how many of them, drawn with the seed; None: all.
        isc_splits: parts of the inception score.
        seed: of every draw of the scoring: reference images, IS shuffle, KID subsets.
        resize: how images become 299 pixels wide for Inception. tensorflow: torch-fidelity's own, the bilinear of the
            first FID code, without antialiasing. clean-fid: the antialiased bicubic of Parmar et al. 2022, of floats.
        extractor: of a user's own: EXTRACTOR or EXTRACTOR@WEIGHTS as named, or its `id` once it is loaded.
    """

    name: str
    source: Source
    features: Literal["small", "inception", "own"]
    count: int | None
    top_share: float | None
    rounding: Literal["truncate", "round"]
    citation: str
    reference: Reference = "train"
    reference_count: int | None = None
    isc_splits: int = 10
    seed: int = 2020
    resize: Resize = "tensorflow"
    extractor: str | None = None

    @property
    def digest(self) -> str:
        """Eight hex digits over all that makes the number; name and citation do not."""
        values = {key: value for key, value in asdict(self).items() if key not in ("name", "citation")}
        # A younger field is left out at its default, so that the older protocols keep their digests.
        values = {key: value for key, value in values.items() if value != _YOUNGER.get(key, ...)}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    def text(self) -> str:
        """The protocol in words."""
        what = "all images" if self.count is None else f"{self.count:,} images"
        where = "of the replay buffer" if self.source == "buffer" else "from fresh chains"
        chosen = "" if self.top_share is None else f", the most confident {self.top_share:.0%} of each predicted class"
        if self.features == "small":
            return f"{what} {where}, small classifier's features, against the training images"
        against = {"train": "training", "test": "test", "train+test": "training and test"}[self.reference]
        number = "all" if self.reference_count is None else f"{self.reference_count:,}"
        made = "truncated to 8 bits" if self.rounding == "truncate" else "rounded to 8 bits"
        if self.features == "own":
            return f"{what} {where}{chosen}, {made}, features of {self.extractor}, against {number} {against} images"
        resized = ", resized as in clean-fid" if self.resize == "clean-fid" else ""
        return f"{what} {where}{chosen}, {made}{resized}, Inception features, against {number} {against} images"


_YOUNGER = {"resize": "tensorflow", "extractor": None}
_CLEAN = "Parmar et al., CVPR 2022 (clean-fid): PIL's antialiased bicubic of floats to 299 pixels"
_IGEBM = "openai/ebm_code_release test_inception.py:30-40, :126-237"
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
        Protocol("buffer-10k", "buffer", "inception", 10_000, None, "round", "this package; equal numbers compare"),
        Protocol(
            "buffer-60k-ref", "buffer", "inception", None, None, "round",
            "sndnyang/JEMPP eval_jempp.py:275-311 (ratio 10000), sndnyang/mebm before 2022-07-24: train and test set",
            reference="train+test",
        ),
        Protocol("fresh-10k", "fresh", "inception", 10_000, None, "round", "this package; chains the buffer never saw"),
        Protocol("fresh-50k", "fresh", "inception", 50_000, None, "round", "50,000 images as in Heusel et al. 2017"),
        Protocol(
            "igebm-60k-ref", "fresh", "inception", 50_000, None, "round",
            f"{_IGEBM}: 50,000 new images, train and test set; f-EBM likewise", reference="train+test",
        ),
        Protocol(
            "kl-ebm-10k-ref", "fresh", "inception", 1000, None, "round",
            "yilundu/improved_contrastive_divergence test_inception.py:21-42, :345-375: 1,000 images (its default), "
            "10,000 training images, one IS split",
            reference_count=10_000, isc_splits=1,
        ),
        Protocol(
            "buffer-test-ref", "buffer", "inception", 10_000, None, "round",
            "this package; against images no training saw", reference="test",
        ),
        Protocol("buffer-10k-clean", "buffer", "inception", 10_000, None, "round", _CLEAN, resize="clean-fid"),
        Protocol("fresh-10k-clean", "fresh", "inception", 10_000, None, "round", _CLEAN, resize="clean-fid"),
        Protocol("fresh-50k-clean", "fresh", "inception", 50_000, None, "round", _CLEAN, resize="clean-fid"),
    )
}  # fmt: skip


def parts_of(name: str) -> tuple[str, str, str | None]:
    """`fresh-10k`, `dino.py:Dino` and `dino.safetensors` of `fresh-10k@dino.py:Dino@dino.safetensors`.

    Without an extractor of one's own the second part is empty; without weights the third is None.
    """
    base, _, rest = name.partition("@")
    extractor, _, weights = rest.partition("@")
    return base.strip(), extractor.strip(), weights.strip() or None


def protocol_named(name: str) -> Protocol:
    """A protocol by its name, or by NAME@EXTRACTOR[@WEIGHTS], the same images on features of a user's own.

    Raises:
        ValueError: there is none; one line.
    """
    base, extractor, weights = parts_of(name)
    if base not in PROTOCOLS:
        close = nearest(base, PROTOCOLS)
        raise ValueError(f"{name[:200]!r} is unknown (known: {', '.join(PROTOCOLS)}){close}")
    if "@" not in name:
        return PROTOCOLS[base]
    if not extractor or len(name) > 4000 or "\0" in name:
        raise ValueError(
            f"{name[:200]!r}: expected PROTOCOL@FILE.py:NAME, @MODULE:NAME or @FILE.pt, and @WEIGHTS if any"
        )
    if ":" not in extractor and not extractor.endswith(TORCHSCRIPT):
        kinds = "FILE.py:NAME, MODULE:NAME or a TorchScript file (.pt)"
        raise ValueError(f"{name[:200]!r}: {extractor[:100]} is not an extractor; expected {kinds}")
    named = extractor if weights is None else f"{extractor}@{weights}"
    own = replace(PROTOCOLS[base], features="own", resize="tensorflow", isc_splits=10)
    return replace(own, name=name, extractor=named, citation="features of your own")


TORCHSCRIPT = (".pt", ".pth", ".ts")
"""Endings of an extractor that is a file of TorchScript."""
