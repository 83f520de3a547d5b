"""Energy models: a trunk, an energy head and, where the published network has one, a class head.

Here are the trunks of M-EBM, M-JEM, LSE-JEM, JEM, JEM++, VERA and the softmax classifier (one Wide ResNet) and of
ShortRun; those of other methods are in files of their names.

The Wide ResNet is the released one (sndnyang/mebm models/wideresnet.py), which is not the stock one: LeakyReLU(0.2),
biases on every convolution, the stride on the second convolution of a block, no norm on the shortcut, and PyTorch's
default initialisation. Parameter counts and MACs are checked against the released classes in the tests.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from trainables.config.arguments import Arguments, is_own, parse_arguments
from trainables.config.network import parse_network
from trainables.networks.layers import Trunk, half_to_float, seeded, without_autocast


class ScaleHeads(nn.Module):
    """One linear head per network of a trunk: (N, sum of features) to (N, number of networks)."""

    def __init__(self, features: tuple[int, ...]) -> None:
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList([nn.Linear(f, 1) for f in features])

    def forward(self, h: Tensor) -> Tensor:
        """One number per image and network."""
        parts = h.split(self.features, dim=1)
        return torch.cat([head(part) for head, part in zip(self.heads, parts, strict=True)], dim=1)


class EnergyModel(nn.Module):
    """A trunk with an energy head and, if wanted, a class head, all linear with bias (models/jem_models.py).

    The energy is minus the energy head's output for every trunk. IGEBM, f-EBM and KL-EBM take the output itself; the
    initial distribution of the head is symmetric about 0, so the two are one method.

    Args:
        classes: None: no class head.
        energy: `head`, or `logsumexp`: -logsumexp of the class logits (JEM, JEM++, LSE-JEM, VERA). The unused energy
            head then stays without gradient, as in the released code.
        head: of the family's own, (N, F) to (N, 1); None: linear.

    What the energy is conditioned on, (N, ...) each, follows the images in every pass, where the trunk takes it.
    """

    def __init__(
        self,
        trunk: Trunk,
        classes: int | None,
        *,
        energy: Literal["head", "logsumexp"] = "head",
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if energy == "logsumexp" and classes is None:
            raise ValueError("energy logsumexp needs a class head")
        self.trunk = trunk
        parts = trunk.scale_features
        if head is None:
            head = nn.Linear(parts[0], 1) if len(parts) == 1 else ScaleHeads(parts)
        self.energy_head: nn.Module = head
        self.class_head: nn.Linear | None = nn.Linear(trunk.features, classes) if classes is not None else None
        self.energy_kind = energy

    @property
    def has_class_head(self) -> bool:
        """Whether `logits` works."""
        return self.class_head is not None

    def energy(self, x: Tensor, *cond: Tensor) -> Tensor:
        """E(x), low on data: (N, C, H, W) to (N,), in float32 under autocast too. The sum of `energy_terms`."""
        return _total(self.energy_terms(x, *cond))

    def energy_terms(self, x: Tensor, *cond: Tensor) -> Tensor:
        """(N,), or (N, 3) with the small, mid and large network's energy; KL-EBM's losses use their mean."""
        return self._terms(self.trunk(x, *cond))

    def logits(self, x: Tensor) -> Tensor:
        """Class logits: (N, C, H, W) to (N, classes), in float32 under autocast too.

        Raises:
            RuntimeError: the model has no class head.
        """
        return self._logits(self.trunk(x))

    def pooled(self, x: Tensor) -> Tensor:
        """Features under the heads: (N, C, H, W) to (N, F), in float32 under autocast too."""
        return half_to_float(self.trunk(x))

    def stem(self, x: Tensor) -> Tensor:
        """Output of the first convolution; a RuntimeError where the trunk cannot be cut there."""
        return self.trunk.first(x)

    def energy_from_stem(self, h: Tensor) -> Tensor:
        """E of the image whose `stem` is h: (N,). Raises RuntimeError: the trunk cannot be cut there."""
        return _total(self._terms(self.trunk.after_first(h)))

    def forward(self, x: Tensor, *cond: Tensor) -> Tensor:
        """The energy, so that `model(x)` is what the sampler descends."""
        return self.energy(x, *cond)

    def _terms(self, features: Tensor) -> Tensor:
        if self.energy_kind == "logsumexp":
            return -torch.logsumexp(self._logits(features), dim=1)
        out = -_apply(self.energy_head, features)
        return out.squeeze(1) if out.shape[1] == 1 else out

    def _logits(self, features: Tensor) -> Tensor:
        if self.class_head is None:
            raise RuntimeError("this network has no class head: build it with class_head=True")
        return _apply(self.class_head, features)


def _apply(head: nn.Module, features: Tensor) -> Tensor:
    # Autocast: the trunk may be bfloat16; the energy gap, a small difference of large numbers, must not be.
    with without_autocast(features):
        return head(half_to_float(features))  # type: ignore[no-any-return]


def _total(terms: Tensor) -> Tensor:
    return terms if terms.dim() == 1 else terms.sum(dim=1)


def build_network(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    *,
    norm: str | None = None,
    momentum: float = 0.9,
    initialisation: str = "default",
    energy: Literal["head", "logsumexp"] = "head",
    dropout: float = 0.0,
    class_head: bool | None = None,
    arguments: Arguments | None = None,
    seed: int = 0,
) -> EnergyModel:
    """A freshly initialised network; the same arguments give the same weights, and no global random state changes.

    Args:
        name: of a `config.network.Family`, with its sizes.
        shape: (channels, height, width) of an image.
        norm: None for the family's published one; momentum: batch norm's in PyTorch's sense.
        initialisation: `default` for the published one, `xavier` for the one that the released code defines only.
        energy: `head` or `logsumexp`.
        dropout: inside residual blocks; then `layers.set_dropout_generator` must be called before training.
        class_head: None for what is published, plus a head wherever the energy needs one.
        arguments: of a user's own network; None: its defaults.

    Raises:
        ValueError: unknown name, or something that the family cannot have.
    """
    family, sizes = parse_network(name)
    asked, norm = norm is not None, family.norms[0] if norm is None else norm
    family.check(norm=norm, initialisation=initialisation, dropout=dropout)
    if class_head is None:
        class_head = family.class_head or energy == "logsumexp"
    if is_own("network", name):
        from trainables.networks.own import own_network

        arguments = parse_arguments("network", name, arguments or {})
        heads = {"energy": energy, "class_head": class_head, "norm": norm if asked else None}
        return own_network(name, arguments, shape, classes, momentum=momentum, seed=seed, **heads)  # type: ignore[arg-type]
    with seeded(seed):
        trunk: Trunk = family.build(sizes, shape, norm, momentum, dropout)
        head = None if family.head is None else family.head(trunk.features, norm)
        model = EnergyModel(trunk, classes if class_head else None, energy=energy, head=head)
        if family.xavier_head:
            assert isinstance(model.energy_head, nn.Linear)
            nn.init.xavier_uniform_(model.energy_head.weight)  # TensorFlow's default (IGEBM utils.py:101-132)
            nn.init.zeros_(model.energy_head.bias)
        if initialisation == "xavier":
            for module in trunk.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.xavier_uniform_(module.weight, gain=math.sqrt(2))
                    assert module.bias is not None
                    nn.init.zeros_(module.bias)
    return model
