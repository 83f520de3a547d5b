"""The key-value store of a Ray cluster, whose functions are private, in the version it was written against."""

from __future__ import annotations

import inspect

import pytest
import ray
from ray.experimental import internal_kv

from trainables.trial import ray_kv


def test_ray_is_the_version_that_its_private_parts_were_read_in():
    assert ray.__version__ == ray_kv.VERSION, (
        f"trainables/trial/ray_kv.py was written against Ray {ray_kv.VERSION}, and this is Ray {ray.__version__}: "
        "read what it uses in the new version, then change VERSION and pyproject.toml"
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_internal_kv_put", {"key", "value", "overwrite", "namespace"}),
        ("_internal_kv_get", {"key", "namespace"}),
        ("_internal_kv_del", {"key", "namespace"}),
    ],
)
def test_a_private_function_takes_what_it_took(name, parameters):
    found = set(inspect.signature(getattr(internal_kv, name)).parameters)
    assert parameters <= found, f"Ray {ray.__version__}: {name}({', '.join(sorted(found))})"
