"""Protocols that a command names: the package's, and those on features of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from study.config.errors import UserError, nearest, one_line
from study.config.own_code import bind_protocol
from trainables.config.protocols import PROTOCOLS, Protocol, parts_of, protocol_named
from trainables.evaluation.inception import NoFeaturesError
from trainables.evaluation.inception_scores import loaded, own_metrics_of
from trainables.evaluation.own_features import OwnExtractor, own_extractor
from trainables.plugins.reference import allow


@dataclass(frozen=True)
class Asked:
    """A protocol by the name that its results have, and the extractor of one on features of the user's own."""

    protocol: Protocol
    network: OwnExtractor | None = None

    def wanted(self, metrics: Sequence[str]) -> tuple[str, ...]:
        """What is taken where these metrics are asked for."""
        if self.protocol.features == "small":
            return ("fd",)
        return tuple(metrics) if self.network is None else own_metrics_of(metrics)


def asked(name: str) -> Asked:
    """A protocol that has no extractor of the user's own."""
    return Asked(PROTOCOLS[name])


def check_protocols(names: Sequence[str], others: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of protocols, each once. UserError: an unknown one."""
    known = [*PROTOCOLS, *others]
    for name in names:
        base = parts_of(name)[0]
        if name not in known and (base not in PROTOCOLS or "@" not in name):
            raise UserError(f"--protocol {name}: unknown (known: {', '.join(known)}){nearest(base, known)}")
    return tuple(dict.fromkeys(names))


def load_own(names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Asked]]:
    """Checked names, those with an extractor as they are called once it is loaded, and these by that name.

    The user has named the code in this command, so it is run. UserError: it cannot be, or its weights are missing.
    """
    found: dict[str, Asked] = {}
    called = []
    for name in names:
        if "@" in name:
            allow(Path.cwd())
            try:
                protocol = protocol_named(bind_protocol(name))
                assert protocol.extractor is not None
                network = own_extractor(protocol.extractor)
            except (ValueError, NoFeaturesError) as error:
                raise UserError(f"--protocol {name}: {one_line(error)}") from error
            protocol = loaded(protocol, network)
            found[protocol.name] = Asked(protocol, network)
            name = protocol.name
        called.append(name)
    return tuple(dict.fromkeys(called)), found
