"""docs/internals.md: the functions it names are there, and the loop it quotes is the loop."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

from trainables.training.iteration import Iteration

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/internals.md").read_text(encoding="utf-8")
STOPS = re.findall(r"^\d+\. `([\w.]+)`", TEXT, flags=re.M)


def test_k_makes_few_stops():
    assert STOPS[0] == "study.config.load.read_config" and STOPS[-1] == "analysis.tables.comparability.matching"
    before_the_sampler = STOPS.index("trainables.sampling.langevin.Langevin.run_keeping")
    assert before_the_sampler <= 25


@pytest.mark.parametrize("stop", STOPS)
def test_every_stop_is_a_function(stop):
    parts = stop.split(".")
    for at in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:at]))
        except ModuleNotFoundError:
            continue
        for name in parts[at:]:
            found = getattr(found, name)
        assert callable(found)
        return
    pytest.fail(f"{stop}: no such module")


def test_the_quoted_loop_is_the_loop():
    """Without its docstring, as the page has it."""
    lines = textwrap.dedent(inspect.getsource(Iteration.issue)).splitlines()
    code = [line for line in lines if '"""' not in line]
    assert "\n".join(code) in TEXT


def test_the_files_and_rooms_it_names_are_there():
    for path in re.findall(r"`((?:study|trainables|analysis|benchmarks|mebm)/[\w/]+(?:\.py)?)`", TEXT):
        assert (ROOT / path).exists(), path
    tree = TEXT.split("```")[1]
    package = ""
    for line in tree.splitlines():
        if (found := re.match(r"(\w+)/", line)) is not None:
            package = found[1]
        elif line.startswith("  "):
            for room in re.findall(r"(\w+)/ ", line):
                assert (ROOT / package / room / "__init__.py").is_file(), f"{package}/{room}"
    last = tree.strip().splitlines()[-1]
    assert re.findall(r"(\w+)/ ", last) == ["mebm", "benchmarks"]
