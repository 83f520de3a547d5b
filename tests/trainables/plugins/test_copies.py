"""Copies of a user's code in a study: written, read, trusted, sent to a worker; what a stranger may have made of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainables.plugins import bundle as bundles
from trainables.plugins.bundle import read_bundle
from trainables.plugins.copies import INDEX, pack, read_copy, read_index, write_copies
from trainables.plugins.reference import allow, bind, resolve, trust_code, use, use_study_of
from trainables.plugins.trust import NAME, origin, trust, trusted
from trainables.results.files import UnsafePathError


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A study with a copy of nets.py, which leaves a trace when it is run."""
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "nets.py").write_text(
        "import util\nfrom pathlib import Path\nPath(__file__ + '.ran').touch()\nX = util.X\n"
    )
    (tmp_path / "util.py").write_text("X = 1\n")
    (tmp_path / "study").mkdir()
    write_copies(tmp_path / "study", {"nets.py": read_bundle(tmp_path / "nets.py")}, {})
    yield tmp_path / "study"
    trust_code(False)
    use(None)


def code_of(study: Path) -> str:
    return str(read_index(study)["nets.py"]["hash"])


def ran(study: Path) -> bool:
    return bool(list(study.parent.rglob("*.ran")))


def test_only_what_was_run_here_is_run(study: Path) -> None:
    use(study)
    with pytest.raises(ValueError, match="--trust-code"):
        resolve("nets.py:X", "network")
    assert not ran(study)
    trust(code_of(study), study, study.parent / "nets.py")
    assert resolve("nets.py:X", "network") == 1 and ran(study)
    assert origin(code_of(study), study) == study.parent / "nets.py"


def test_trust_code_is_remembered(study: Path) -> None:
    use_study_of(study / "tune" / "run-001" / "t0001" / "checkpoint_000001" / "trial.pt")
    trust_code(True)
    assert resolve("nets.py:X", "network") == 1
    trust_code(False)
    use(None)
    use(study)
    assert resolve("nets.py:X", "network") == 1


def test_the_list_is_the_users_alone(study: Path) -> None:
    trust(code_of(study))
    path = study.parent / "cache" / NAME
    assert path.stat().st_mode & 0o777 == 0o600 and trusted(code_of(study))
    path.chmod(0o666)
    assert not trusted(code_of(study))
    path.chmod(0o600)
    for text in ("[]", "{", '{"a": 1}', "[" * 10_000):
        path.write_text(text)
        assert not trusted(code_of(study))
    path.unlink()
    path.symlink_to("/dev/null")
    assert not trusted(code_of(study))


@pytest.mark.parametrize("what", ["changed", "missing", "link", "pipe", "index", "way out", "entry"])
def test_a_copy_that_is_not_what_was_hashed_is_not_run(study: Path, what: str) -> None:
    trust(code_of(study))
    index, copy = read_index(study), study / "code" / code_of(study) / "util.py"
    if what == "changed":
        copy.write_text("X = 2\n")
    elif what in ("missing", "link", "pipe"):
        copy.unlink()
        if what == "link":
            copy.symlink_to(study.parent / "util.py")
        elif what == "pipe":
            os.mkfifo(copy)
    elif what == "index":
        (study / INDEX).write_text("[]")
    elif what == "way out":
        index["nets.py"]["files"]["../../../util.py"] = "0"
    else:
        index["nets.py"]["entry"] = "util.py"
    if what in ("way out", "entry"):
        (study / INDEX).write_text(json.dumps(index))
    use(study)
    with pytest.raises(ValueError) as raised:
        resolve("nets.py:X", "network")
    assert "\n" not in str(raised.value) and not ran(study)


def test_a_worker_runs_what_the_driver_vouches_for(study: Path, tmp_path: Path) -> None:
    code = code_of(study)
    packed = pack(read_copy(study, "nets.py", read_index(study)["nets.py"]))
    use(study, {"nets.py": "0" * 16}, lambda _: None)
    with pytest.raises(ValueError, match="is not there"):
        resolve("nets.py:X", "network")
    use(study, {}, lambda _: packed)
    with pytest.raises(ValueError, match=r"does not know of nets\.py"):
        resolve("nets.py:X", "network")
    use(tmp_path / "on another machine", {"nets.py": code}, {code: packed}.get)
    assert resolve("nets.py:X", "network") == 1
    use(tmp_path / "on another machine", {"nets.py": "1" * 16}, lambda _: packed)
    with pytest.raises(ValueError, match="damaged"):
        resolve("nets.py:X", "network")


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "nets.py").write_text(f"X = {name!r}")
    allow(tmp_path)
    assert bind("a/nets.py:X")[0] == "nets.py:X"
    with pytest.raises(ValueError, match="have one name"):
        bind("b/nets.py:X")
    use(None)


def test_what_is_no_plug_in_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "loop.py").symlink_to("loop.py")
    (tmp_path / "large.py").write_text("#" * (bundles.MAX_FILE + 1))
    (tmp_path / "nul.py").write_bytes(b"X = 1\0")
    (tmp_path / "ünï code.py").write_text("X = 1")
    monkeypatch.chdir(tmp_path)
    allow()
    for name in ("folder", "pipe", "loop", "large", "nul", "gone", "a" * 5000, "x\0y"):
        with pytest.raises(ValueError) as raised:
            resolve(f"{name}.py:X", "network")
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    assert resolve("ünï code.py:X", "network") == 1
    assert resolve(f"{tmp_path}/../{tmp_path.name}/ünï code.py:X", "network") == 1
    use(None)


def test_a_package_is_copied_without_links_and_large_files(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    (package / ".git").mkdir(parents=True)
    for name, text in (
        ("__init__.py", ""),
        ("nets.py", "X = 1"),
        ("table.csv", "1"),
        (".git/config", ""),
        ("big.bin", "x"),
    ):
        (package / name).write_text(text)
    (package / "big.bin").write_bytes(b"x" * (bundles.MAX_DATA + 1))
    (package / "link.py").symlink_to("/etc/passwd")
    assert sorted(read_bundle(package / "nets.py").files) == ["pkg/__init__.py", "pkg/nets.py", "pkg/table.csv"]
    for i in range(bundles.MAX_FILES):
        (package / f"m{i}.py").touch()
    with pytest.raises(ValueError, match="more than 500 files"):
        read_bundle(package / "nets.py")


def test_writing_follows_no_link(study: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    (tmp_path / "outside").mkdir()
    (new / "code").symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafePathError):
        write_copies(new, {"nets.py": read_bundle(tmp_path / "nets.py")}, {})
    assert not list((tmp_path / "outside").iterdir())
