"""What defines each training method, as against what is a setting of it. Standard library only.

A setting (K, a clamp, the optimiser) may be changed in a study; a definition may not: changing it makes another method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MethodName = Literal[
    "m-ebm", "m-jem", "lse-jem", "softmax", "jem", "jem++", "igebm", "shortrun", "kl-ebm", "f-ebm", "vera"
]


@dataclass(frozen=True)
class Definition:
    """The parts a method is made of.

    Attributes:
        energy: `head`, a linear energy head; `logsumexp`, minus log-sum-exp of the class logits; None: no energy.
        classifies: trained with a cross-entropy term.
        sampler: where x- comes from: Langevin `chains`, a trained `generator`, or None.
        critic: trained against a second network, with an f-divergence in place of contrastive divergence.
    """

    energy: Literal["head", "logsumexp"] | None
    classifies: bool
    sampler: Literal["chains", "generator"] | None
    critic: bool = False


DEFINITIONS: dict[str, Definition] = {
    "m-ebm": Definition("head", False, "chains"),
    "m-jem": Definition("head", True, "chains"),
    "lse-jem": Definition("logsumexp", True, "chains"),
    "softmax": Definition(None, True, None),
    "jem": Definition("logsumexp", True, "chains"),
    "jem++": Definition("logsumexp", True, "chains"),
    "igebm": Definition("head", False, "chains"),
    "shortrun": Definition("head", False, "chains"),
    "kl-ebm": Definition("head", False, "chains"),
    "f-ebm": Definition("head", False, "chains", critic=True),
    "vera": Definition("logsumexp", True, "generator"),
}
