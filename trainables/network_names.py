"""Names of networks and what each family allows. Standard library only: a configuration is checked without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


def _either(words: Iterable[str]) -> str:
    return " or ".join(words)


@dataclass(frozen=True)
class Family:
    """One kind of network.

    Attributes:
        name: what stands before the first dash of a network's name.
        sizes: what the numbers behind it mean.
        published: the name at the published size.
        norms: allowed normalisations, the published one first.
        initialisations: allowed ways to draw the weights, the published one first.
        class_head: whether the published network has a class head beside its energy head.
        dropout: whether its blocks have a dropout layer.
        stem: whether it can be cut behind its first convolution (JEM++'s proximal steps).
    """

    name: str
    sizes: tuple[str, ...]
    published: str
    norms: tuple[str, ...]
    initialisations: tuple[str, ...] = ("default",)
    class_head: bool = False
    dropout: bool = False
    stem: bool = False

    @property
    def form(self) -> str:
        """The whole name as a user reads it: `wrn-DEPTH-WIDTH`."""
        return "-".join((self.name, *self.sizes))

    @property
    def pattern(self) -> re.Pattern[str]:
        """The whole name; its groups are the sizes."""
        return re.compile("-".join((self.name, *[r"(\d+)"] * len(self.sizes))), re.ASCII)

    @property
    def default_norm(self) -> str:
        """The norm of the published network."""
        return self.norms[0]

    def check(self, *, norm: str, initialisation: str = "default", dropout: float = 0.0) -> None:
        """Refuse what this family cannot have.

        Raises:
            ValueError: one line that says what is allowed.
        """
        if norm not in self.norms:
            raise ValueError(f"norm must be {_either(self.norms)} with network {self.form}, but is {norm}")
        if initialisation not in self.initialisations:
            allowed = _either(self.initialisations)
            raise ValueError(f"initialisation must be {allowed} with network {self.form}, but is {initialisation}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, but is {dropout}")
        if dropout > 0 and not self.dropout:
            having = _either(f.form for f in NETWORK_FAMILIES.values() if f.dropout)
            raise ValueError(f"dropout must be 0 unless network is {having}, but is {dropout} with {self.form}")


@dataclass(frozen=True)
class ParsedNetwork:
    """A network's family and sizes: (28, 10) of wrn-28-10, (128,) of igebm-128."""

    family: Family
    sizes: tuple[int, ...]


LARGEST_SIZE, LARGEST_DEPTH = 10_000, 1_000
"""Bounds of the numbers in a name: a network beyond them takes minutes to describe, and no device holds it."""
_PLAIN = ("default", "xavier")
_FILTERS = ("FILTERS",)

NETWORK_FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("wrn", ("DEPTH", "WIDTH"), "wrn-28-10", ("batch", "none"), _PLAIN, True, dropout=True, stem=True),
        Family("conv", ("CHANNELS",), "conv-32", ("batch", "none"), _PLAIN, True, stem=True),
        Family("igebm", _FILTERS, "igebm-128", ("spectral", "none"), dropout=True),
        Family("febm", _FILTERS, "febm-128", ("spectral", "none")),
        Family("shortrun", _FILTERS, "shortrun-64", ("none",), _PLAIN),
        Family("multiscale", _FILTERS, "multiscale-64", ("instance", "none")),
    )
}
"""Every family by its name. `conv` is this project's own, for 8x8 images; the others are published networks."""


def parse_network(name: str) -> ParsedNetwork:
    """Family and sizes of a network's name.

    Raises:
        ValueError: no such network, a Wide ResNet whose depth is not 6n + 4, or a size of 0.
    """
    for family in NETWORK_FAMILIES.values():
        if match := family.pattern.fullmatch(name):
            if max(map(len, match.groups())) > 9:  # Python reads no number of thousands of digits
                raise ValueError(_too_large(name))
            sizes = tuple(int(group) for group in match.groups())
            if family.name == "wrn" and (sizes[0] < 10 or (sizes[0] - 4) % 6):
                raise ValueError(f"network must have a depth of 10, 16, 22, 28, ... (6n + 4), but got {name!r}")
            if min(sizes) < 1:
                raise ValueError(f"network must have sizes of at least 1, but got {name!r}")
            if sizes[-1] > LARGEST_SIZE or (family.name == "wrn" and sizes[0] > LARGEST_DEPTH):
                raise ValueError(_too_large(name))
            return ParsedNetwork(family, sizes)
    forms = [f.form for f in NETWORK_FAMILIES.values()]
    raise ValueError(f"network must be {', '.join(forms[:-1])} or {forms[-1]}, but got {_cut(name)}")


def _too_large(name: str) -> str:
    limits = f"sizes of at most {LARGEST_SIZE:,} and a depth of at most {LARGEST_DEPTH:,}"
    return f"network must have {limits}, but got {_cut(name)}"


def _cut(name: str) -> str:
    return repr(name) if len(name) <= 60 else f"{name[:56]!r}..."
