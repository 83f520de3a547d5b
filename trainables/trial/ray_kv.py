"""The key-value store of a Ray cluster, by which a worker tells the driver what is in no report.

Not public in Ray: written against `VERSION`; `tests/trainables/trial/test_ray_kv.py` names what is gone in another.
"""

from __future__ import annotations

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

VERSION = "2.60.0"
HEARTBEAT = "mebm-heartbeat"
"""Namespace of heartbeats: trial id to iteration."""
ENDING = "mebm-ending"
"""Namespace of the reasons why the driver ends trials at a report: trial id to a word of `mebm.Monitor.stopping`."""
OVER_MEMORY = "mebm-memory"
"""Namespace of the last words of workers that end because their trial exceeds its memory limit, by trial id."""

CODE = "mebm-code"
"""Namespace of the packed code of a study, by its hash: for workers that do not see the study's folder."""


def put(namespace: str, trial_id: str, text: str | bytes) -> None:
    """Store a text under a trial's id. Any error is one of the cluster."""
    _internal_kv_put(trial_id, text, overwrite=True, namespace=namespace)


def get(namespace: str, trial_id: str) -> bytes | None:
    """What is stored under a trial's id; None where nothing is."""
    found: bytes | None = _internal_kv_get(trial_id, namespace=namespace)
    return found


def delete(namespace: str, trial_id: str) -> None:
    """Forget what is stored under a trial's id."""
    _internal_kv_del(trial_id, namespace=namespace)
