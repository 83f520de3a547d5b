"""How the fields that a user leaves out are filled in: by the method, the data set, the network."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trainables.config.arguments import is_own, own_part, parse_arguments
from trainables.config.dataset import dataset_info
from trainables.config.method import METHODS, MethodSpec, method_class
from trainables.config.network import parse_network
from trainables.config.own_hooks import told
from trainables.config.trial import TrialConfig, upgrade_config
from trainables.methods.common import SMALL_NETWORK

_STEPS = TypeAdapter(int)
SMALL_SIDE = 16
"""Images below this side take a method's small settings."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, nested mappings merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _of_family(values: Mapping[str, Any], below: Mapping[str, Any], published_norm: str | None) -> dict[str, Any]:
    """Norm, initialisation and dropout for a user's network of another family than the preset's."""
    network: Any = values.get("network")
    if is_own("network", network):
        return {"norm": _own_norm(network, values), "initialisation": "default", "dropout": 0.0}
    preset = below.get("network", TrialConfig.model_fields["network"].default)
    try:
        family, _ = parse_network(network)
    except (ValueError, TypeError, AttributeError):  # no network given, or one that the complete validation refuses
        return {}
    if family == parse_network(preset)[0]:
        return {}
    bare = published_norm == "none" and "none" in family.norms  # published without normalisation, it stays without
    changed = {"norm": "none" if bare else family.norms[0], "initialisation": family.initialisations[0]}
    return changed if family.dropout else changed | {"dropout": 0.0}


def _own_norm(network: str, values: Mapping[str, Any]) -> str:
    """The norm that a user's own network has."""
    if "norm" in values:
        return str(values["norm"])
    from trainables.networks.own import found_norm

    try:
        arguments = parse_arguments("network", network, values.get("network_args") or {})
        return found_norm(own_part("network", network), network, arguments) or "none"
    except ValueError:  # the complete validation says it
        return "none"


def _with_own_fields(method: type[MethodSpec], values: dict[str, Any]) -> dict[str, Any]:
    """A field of the method's own may stand under its bare name where no trial field is called so."""
    own = [n for n in values if n in method.model_fields and n not in TrialConfig.model_fields]
    if not own or not isinstance(values.get("method_args", {}), Mapping):
        return values
    args = {**(values.get("method_args") or {}), **{n: values[n] for n in own}}
    return {n: v for n, v in values.items() if n not in own} | {"method_args": args}


def _by_steps(method: type[MethodSpec], steps: int) -> Mapping[str, Any]:
    try:
        return method.by_steps(steps)
    except Exception as error:  # of somebody's own
        raise ValueError(told(error, method)) from error


def _of_unknown(method: type[MethodSpec], values: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for a method or network of a user's own where it does not say otherwise.

    Nothing is known of its energies: where neither it nor the user states a limit of their gap, its scale is learnt.
    """
    given: Any = values.get("divergence")
    stated = {**method.preset.get("divergence", {}), **(given if isinstance(given, Mapping) else {})}
    limits = {"rule", "gap_limit", "hard_gap_limit", "l2_fraction", "gap_patience"}
    return {} if limits & stated.keys() else {"divergence": {"rule": "learnt"}}


def build_trial(values: Mapping[str, Any]) -> TrialConfig:
    """A complete configuration from the fields a user gives.

    What is left out comes, in this order, from the method's settings for the data set, its small settings, the data
    set's own defaults, from the method (with its dependence on K), and from `TrialConfig`. A field that is unknown or
    impossible is a `pydantic.ValidationError`.
    """
    try:
        method = method_class(values.get("method", "m-ebm"))
    except (ValueError, TypeError, AttributeError):
        return TrialConfig.model_validate(dict(values))  # pydantic names the field and what is allowed
    values = _with_own_fields(method, upgrade_config(dict(values)))
    dataset = values.get("dataset", TrialConfig.model_fields["dataset"].default)
    unknown = values.get("method", "m-ebm") not in METHODS
    foreign = unknown or is_own("network", values.get("network"))
    below = merge(_of_unknown(method, values) if foreign else {}, method.preset)
    if isinstance(dataset, str) and (known := dataset_info(dataset)):
        below = merge(below, known.trial_defaults)
        small = method.small or (SMALL_NETWORK if unknown and "network" not in method.preset else {})
        below = merge(below, small if known.side < SMALL_SIDE else {})
        below = merge(below, method.by_dataset.get(known.name, {}))
    below |= _of_family(values, below, method.preset.get("norm"))
    steps = (below | values).get("sampling_steps", TrialConfig.model_fields["sampling_steps"].default)
    with suppress(ValidationError):  # the complete validation below says it better
        # "2" and 2.0 are K = 2 to pydantic, so they must be to the presets.
        below = merge(_by_steps(method, _STEPS.validate_python(steps)), below)
    return TrialConfig.model_validate(merge(below, values))
