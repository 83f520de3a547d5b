"""Where studies and benchmarks are in a folder, and that no link leads out of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis.results.messages import ResultsError, counted, plural
from trainables.results.files import UnsafePathError, refuse_links_out
from trainables.results.layout import ATTEMPTS, BENCH_FILE, EPOCHS, JOURNAL, MANIFEST, OWN_FOLDERS, SCORES_FILE, TRIALS
from trainables.results.spelling import nearest_path


def is_study(path: Path) -> bool:
    """Whether a folder holds a study, whole or damaged: a damaged one is named as such, never passed over."""
    if (path / MANIFEST).is_file() or (path / TRIALS).is_file():
        return True
    return any((path / name).is_file() and (path / name).stat().st_size > 0 for name in (EPOCHS, ATTEMPTS, JOURNAL))


def holds_rows(path: Path) -> bool:
    """Whether a folder holds rows of `mebm bench` or `mebm score`."""
    return any((path / name).is_file() for name in (BENCH_FILE, SCORES_FILE))


def find_files(path: Path | str, name: str) -> list[Path]:
    """Files of a name at `path`: in it, or in its children by name; none that a link out of it leads to."""
    path = Path(path)
    found = [path / name] if (path / name).is_file() else sorted(path.glob(f"*/{name}"))
    inside = path.resolve()
    return [file for file in found if file.resolve().is_relative_to(inside)]


def find_studies(path: Path | str) -> list[Path]:
    """Study folders at `path`: itself, or its children by name; none where it holds only what `holds_rows` looks for.

    A `ResultsError` says what is missing where there is neither.
    """
    path = Path(path)
    if not path.is_dir():
        wrong = "not a folder" if path.exists() else "no such folder"
        near = "" if path.exists() else nearest_path(path)
        raise ResultsError(f"{path}: {wrong}; expected a study's folder or one that holds studies{near}")
    if is_study(path):
        return [path]
    found = [child for child in children(path) if is_study(child)]
    if not found and not any(find_files(path, name) for name in (BENCH_FILE, SCORES_FILE)):
        raise ResultsError(f"{path}: not a study folder: neither it nor a folder in it holds {MANIFEST} and {TRIALS}")
    return found


def children(path: Path) -> list[Path]:
    """The folders directly in a folder, by name."""
    return sorted(child for child in path.iterdir() if child.is_dir())


def confine(path: Path) -> None:
    """Refuse a folder of a study or of studies in which a link leads out of it: somebody else may have made it.

    Folders in it that hold no study are not looked through: nothing in them is read or written.
    """
    try:
        if not path.is_dir() or _is_read(path):
            refuse_links_out(path)
            return
        refuse_links_out(path, deep=False)
        for child in children(path):
            if _is_read(child) or child.name in OWN_FOLDERS:
                refuse_links_out(child)
    except UnsafePathError as error:
        raise ResultsError(f"{error.filename}: {error.strerror}") from None


def _is_read(path: Path) -> bool:
    return is_study(path) or holds_rows(path)


def about_others(path: Path, folders: Sequence[Path]) -> list[str]:
    """What is said of the folders in a folder of studies that are none."""
    others = [f.name for f in folders if f.name not in OWN_FOLDERS and not f.name.startswith(".")]
    if not others:
        return []
    return [f"{path}: {plural(len(others), 'folder')} without results left out ({counted(others)})"]
