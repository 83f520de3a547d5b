"""Names of a user's own code: what they find, how it is imported, and what is said where that fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainables.plugins.reference import allow, is_reference, resolve, short, use


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    allow(tmp_path)
    yield tmp_path
    use(None)


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/').replace('INIT', '__init__')}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text, encoding="utf-8")


def test_names() -> None:
    assert is_reference("nets.py:Net") and is_reference("a.b:C") and not is_reference("wrn-28-10")
    assert short("/x/my nets.py:Net") == "my nets.py:Net" and short("a.b:C") == "a.b:C" and short("jem") == "jem"


def test_siblings_are_found_and_shadow_nobody(folder: Path) -> None:
    write(folder, my="import util, random, study\nfrom . import other\nfrom pkg.deep import Y\n"
          "def f():\n    import late\n    return util.X, other.Z, Y, late.L, random.random, study.S",
          util="X = 1", other="import util as u\nZ = u.X + 1", late="L = 4", random="raise SystemExit",
          study="S = 'mine'", pkg__deep="Y = 3")  # fmt: skip
    import random

    assert resolve("my.py:f", "network")() == (1, 2, 3, 4, random.random, "mine")
    import study

    assert not hasattr(study, "S") and "util" not in sys.modules


def test_two_files_of_one_name_do_not_meet(folder: Path) -> None:
    for name in ("a", "b"):
        write(folder, **{f"{name}__nets": "from util import X", f"{name}__util": f"X = {name!r}"})
    assert [resolve(f"{n}/nets.py:X", "network") for n in "ab"] == ["a", "b"]


def test_a_module_of_a_package_finds_its_own(folder: Path) -> None:
    write(folder, pkg__INIT="", pkg__nets="from .layers import A\nfrom pkg.layers import A as B\nimport layers\n"
          "N = A + B + layers.A", pkg__layers="A = 2")  # fmt: skip
    assert resolve("pkg/nets.py:N", "network") == 6


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(:", "my.py:1: SyntaxError"),
        ("\n1 / 0", "my.py:2: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)", "my.py:2: it calls sys.exit when it is imported"),
        ("import nowhere_at_all", "my.py:1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def f(): f()\nf()", "my.py:1: RecursionError"),
        ("", "Net cannot be imported: my.py has none"),
        ("raise KeyboardInterrupt", None),
    ],
)
def test_what_goes_wrong_is_one_line(folder: Path, source: str, said: str | None) -> None:
    write(folder, my=source)
    with pytest.raises((ValueError, KeyboardInterrupt)) as raised:
        resolve("my.py:Net", "network")
    assert said is None or f"network my.py:Net: {said}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_it_prints_is_not_on_standard_output(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(folder, my="print('hello')\nX = 1")
    assert resolve("my.py:X", "network") == 1
    assert capfd.readouterr() == ("", "hello\n")
