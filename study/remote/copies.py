"""Local copies of studies in object storage, for those who read them."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from study.config.errors import UserError
from study.record.folder import lock_held
from study.remote.claim import refuse_other_driver
from study.remote.layout import OF_WORKERS, is_temporary, mistakes
from trainables.results.files import refuse_links_out, within
from trainables.results.layout import CHECKPOINTS, JOURNAL, LOG_FILE, MODELS, OUTPUT, STORAGE, STUDY_FILE
from trainables.results.store import Entry, NotThereError, Store, split


def bring(store: Store, local: Path, found: Mapping[str, Entry]) -> list[str]:
    """Copy objects that are new or changed, which the store's time tells; returns the names of what was brought."""
    brought = []
    for name, entry in found.items():
        target, modified = within(local, name), entry.modified
        if modified is not None and target.is_file():
            stat = target.stat()
            if stat.st_size == entry.size and abs(stat.st_mtime - modified) < 1e-3:
                continue
        store.get(name, target)
        if modified is not None:
            os.utime(target, (modified, modified))
        brought.append(name)
    return brought


def refuse_taken(url: str) -> None:
    """A new study needs its own place in the store; a `UserError` where there is one already."""
    store = Store(url)
    with mistakes():
        if store.exists(STUDY_FILE) or store.exists(JOURNAL):
            raise UserError(f"{store.shown}: holds a study already; continue with: mebm resume {store.shown}")


def compare(store: Store, local: Path) -> str:
    """Which journal goes on from the other's: `local` (also where they are the same), `store`, or `apart`."""
    path = local / JOURNAL
    here = path.read_bytes() if path.is_file() else b""
    here = here[: here.rfind(b"\n") + 1]  # a line that was cut off never happened
    try:
        there = store.read_bytes(JOURNAL)
    except NotThereError:
        there = b""
    if here.startswith(there):
        return "local"
    return "store" if there.startswith(here) else "apart"


def two_accounts(store: Store, local: Path) -> UserError:
    """What to say of a store and a live folder whose journals went on differently."""
    return UserError(
        f"{store.shown} and {local} are two accounts of this study, and neither goes on from the other; move away the "
        "one that is not to be continued"
    )


def fetch(url: str, local: Path) -> bool:
    """Make the live folder ready to go on with the study at a URL; returns whether it was filled from the store.

    It is used as it is where its journal goes on from the store's, which lacks what could not be sent, and else filled
    with all that a driver reads; signals and sample grids come with `Mirror.collect`. It is a `UserError` where both
    went on differently, or another driver is at work.
    """
    store = Store(url)
    with mistakes():
        refuse_other_driver(store)
        if local.is_dir() and lock_held(local):
            raise UserError(f"{local}: another process is running this study")
        here = (local / STUDY_FILE).is_file() or (local / JOURNAL).is_file()
        if not store.exists(STUDY_FILE) and not store.exists(JOURNAL):
            if here:
                return False  # nothing was ever sent
            raise UserError(f"{store.shown}: no study there: it has no {STUDY_FILE}")
        if here:
            standing = compare(store, local)
            if standing == "local":
                return False
            if standing == "apart":
                raise two_accounts(store, local)
        found = store.list(skip=(MODELS, OUTPUT, CHECKPOINTS, *OF_WORKERS))
        store.get_folder("", local, [name for name in found if not is_temporary(name)])
    return True


def local_copy(place: Path | str, *, models: bool = False) -> Path:
    """A folder to read a study from: its own, or of a URL a temporary copy (`refresh_copy`) that goes at the exit."""
    if isinstance(place, Path):
        if place.is_dir():
            refuse_links_out(place)
        return place
    with mistakes():
        name = split(place)[1]
        base = Path(tempfile.mkdtemp(prefix="mebm-"))
        atexit.register(shutil.rmtree, base, ignore_errors=True)
        folder = base / Store(base).checked(name)
    folder.mkdir()
    refresh_copy(place, folder, models=models)
    return folder


def refresh_copy(url: str, folder: Path, *, models: bool = False) -> None:
    """Bring a copy up to date: all that `mebm status` and `mebm evaluate` read, without checkpoints and signals."""
    store = Store(url)
    with mistakes():
        found = store.list(skip=(CHECKPOINTS, OUTPUT, *OF_WORKERS, *(() if models else (MODELS,))))
        if STUDY_FILE not in found and JOURNAL not in found:
            raise UserError(f"{store.shown}: no study there: it has no {STUDY_FILE}")
        bring(store, folder, {n: e for n, e in found.items() if not is_temporary(n) and n not in (STORAGE, LOG_FILE)})
