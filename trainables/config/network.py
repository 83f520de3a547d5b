"""What a kind of network declares, and names of networks. The kinds are beside their code in `trainables.networks`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from trainables.plugins.installed import BUILT_IN, points_of
from trainables.plugins.parts import is_own, own_part
from trainables.results.registry import records

MAX_SIZE = 10_000
"""Of the numbers in a name: a network beyond it takes minutes to describe, and no device holds it."""
PLAIN = ("default", "xavier")


@dataclass(frozen=True)
class Family:
    """One kind of network.

    Attributes:
        name: what stands before the first dash of a network's name.
        sizes: what the numbers behind it mean.
        published: the name at the published size.
        norms: allowed normalisations, the published one first.
        build: gives its `networks.layers.Trunk`, of the sizes, the (channels, height, width) of an image, the norm,
            batch norm's momentum, and the dropout.
        initialisations: allowed ways to draw the weights, the published one first.
        class_head: whether the published network has a class head beside its energy head.
        dropout: whether its blocks have a dropout layer.
        stem: whether it can be cut behind its first convolution (JEM++'s proximal steps).
        energies: it gives an image.
        compiled: whether torch.compile takes it.
        xavier_head: the energy head is Xavier uniform with bias 0; else as PyTorch makes it.
        largest: the largest of each size.
        head: makes the energy head of so many features, with a norm; None: a linear layer.
        refuses: why sizes are impossible, or an empty text.
    """

    name: str
    sizes: tuple[str, ...]
    published: str
    norms: tuple[str, ...]
    build: Callable[..., Any]
    initialisations: tuple[str, ...] = ("default",)
    class_head: bool = False
    dropout: bool = False
    stem: bool = False
    energies: int = 1
    compiled: bool = False
    xavier_head: bool = False
    largest: tuple[int, ...] = (MAX_SIZE,)
    head: Callable[[int, str], Any] | None = None
    refuses: Callable[[tuple[int, ...]], str] = lambda _sizes: ""

    @property
    def form(self) -> str:
        """The whole name as a user reads it: `wrn-DEPTH-WIDTH`."""
        return "-".join((self.name, *self.sizes))

    def check(self, *, norm: str, initialisation: str = "default", dropout: float = 0.0) -> None:
        """Refuse what this family cannot have. Raises ValueError: one line that says what is allowed."""
        if norm not in self.norms:
            raise ValueError(f"norm must be {' or '.join(self.norms)} with network {self.form}, but is {norm}")
        if initialisation not in self.initialisations:
            allowed = " or ".join(self.initialisations)
            raise ValueError(f"initialisation must be {allowed} with network {self.form}, but is {initialisation}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, but is {dropout}")
        if dropout > 0 and not self.dropout:
            having = " or ".join(f.form for f in network_families().values() if f.dropout)
            raise ValueError(f"dropout must be 0 unless network is {having}, but is {dropout} with {self.form}")


@cache
def network_families() -> dict[str, Family]:
    """Every kind of network, by name."""
    return {f.name: f for f in sorted(records("trainables.networks", "NETWORKS"), key=lambda f: f.name)}


BUILT_IN["network"] = lambda: [n for n in points_of("network") if n.split("-")[0] in network_families()]


def _own_family(name: str) -> Family:
    """A user's network (`networks.own`). Its norm and what it gives are known once it is built."""
    from trainables.config.arguments import own_arguments

    own_arguments("network", name)
    make = own_part("network", name)
    stem = all(callable(getattr(make, part, None)) for part in ("first", "after_first"))
    compiled = bool(getattr(make, "compiles", True))
    return Family(name, (), name, ("batch", "none", "spectral", "instance"), make, stem=stem, compiled=compiled)


def parse_network(name: str) -> tuple[Family, tuple[int, ...]]:
    """Kind and sizes of a network's name: (28, 10) of wrn-28-10, (128,) of igebm-128; () of a user's own.

    Raises:
        ValueError: no such network, or impossible sizes.
    """
    if is_own("network", name):
        return _own_family(name), ()
    shown = repr(name) if len(name) <= 60 else f"{name[:56]!r}..."
    kind, *numbers = name.split("-")
    family = network_families().get(kind)
    if family is None or len(numbers) != len(family.sizes) or not all(re.fullmatch("[0-9]+", n) for n in numbers):
        *forms, last = (f.form for f in network_families().values())
        raise ValueError(
            f"network must be {', '.join(forms)} or {last}, but got {shown}; for example conv-16 or wrn-28-10"
        )
    # Python reads no number of thousands of digits.
    sizes = tuple(int(n) if len(n) <= 9 else 10**9 for n in numbers)
    if any(size > most for size, most in zip(sizes, family.largest, strict=True)):
        limits = " and ".join(f"{m:,} for {s}" for s, m in zip(family.sizes, family.largest, strict=True))
        raise ValueError(f"network must have sizes of at most {limits}, but got {shown}")
    if reason := family.refuses(sizes) or ("sizes of at least 1" if min(sizes) < 1 else ""):
        raise ValueError(f"network must have {reason}, but got {shown}")
    return family, sizes
