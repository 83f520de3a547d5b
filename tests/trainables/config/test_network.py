"""Names of networks, which a configuration checks without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trainables.config.network import network_families, parse_network


@pytest.mark.parametrize("family", network_families().values(), ids=lambda f: f.name)
def test_published_sizes_parse(family) -> None:
    found, sizes = parse_network(family.published)
    assert found is family
    assert "-".join([family.name, *map(str, sizes)]) == family.published
    family.check(norm=family.norms[0])


def test_forms_and_errors() -> None:
    assert parse_network("wrn-28-10")[1] == (28, 10)
    with pytest.raises(ValueError, match=r"conv-CHANNELS, .*, shortrun-FILTERS or wrn-DEPTH-WIDTH, but got 'vgg-16'"):
        parse_network("vgg-16")


def test_needs_no_torch() -> None:
    code = "import sys, trainables.config.network; assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
