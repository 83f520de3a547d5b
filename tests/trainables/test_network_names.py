"""Names of networks, which a configuration checks without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trainables.network_names import NETWORK_FAMILIES, parse_network


@pytest.mark.parametrize("family", NETWORK_FAMILIES.values(), ids=lambda f: f.name)
def test_published_sizes_parse(family) -> None:
    parsed = parse_network(family.published)
    assert parsed.family is family
    assert "-".join([family.name, *map(str, parsed.sizes)]) == family.published
    family.check(norm=family.default_norm)


def test_forms_and_errors() -> None:
    assert parse_network("wrn-28-10").sizes == (28, 10)
    with pytest.raises(ValueError, match=r"wrn-DEPTH-WIDTH, conv-CHANNELS, .* or multiscale-FILTERS, but got 'vgg-16'"):
        parse_network("vgg-16")


def test_needs_no_torch() -> None:
    code = "import sys, trainables.network_names; assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
