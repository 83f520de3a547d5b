"""Results in object storage: a temporary copy of the small files, and of others when they are asked for."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from analysis.results.messages import ResultsError
from trainables.results.layout import FIGURES
from trainables.results.store import NotThereError, Store, StoreError, identity


@dataclass(frozen=True)
class Remote:
    """A folder of a store and the temporary copy of its small files, which goes when nobody holds this any more.

    Attributes:
        store: holds it.
        prefix: what its names begin with there: nothing, or a study's folder and a slash.
        folder: the copy.
        small: names of the files that are copied; marks: those of which a study's or a benchmark's folder has one.
        whole: what this is a part of, which keeps the copy.
    """

    store: Store
    prefix: str
    folder: Path
    small: tuple[str, ...]
    marks: tuple[str, ...]
    whole: Remote | None = None

    @classmethod
    def open(cls, url: str, small: tuple[str, ...], marks: tuple[str, ...]) -> Remote:
        """Copy the small files of a study, or of the studies directly below a URL; what fails is a `ResultsError`."""
        store = Store(url)
        with _mistakes():
            name = store.root.rpartition("/")[2]
            if name in ("", ".", ".."):
                raise ResultsError(f"{store.shown}: expected the URL of a study's folder or of one that holds studies")
            base = Path(tempfile.mkdtemp(prefix="mebm-"))
            found = cls(store, "", base / name, small, marks)
            weakref.finalize(found, shutil.rmtree, base, ignore_errors=True)
            if not found._copy():
                for child in store.folders():
                    found.of(found.folder / store.checked(child))._copy()
        return found

    def of(self, folder: Path) -> Remote:
        """The part of it that a folder of the copy is a copy of."""
        if folder == self.folder:
            return self
        name = folder.relative_to(self.folder).as_posix()
        return dataclasses.replace(self, prefix=f"{self.prefix}{name}/", folder=folder, whole=self)

    @property
    def shown(self) -> str:
        """Its URL without user, password and query."""
        return f"{self.store.shown.rstrip('/')}/{self.prefix}".rstrip("/")

    @property
    def key(self) -> str:
        """Tells it from any other, also of the same name at another end point."""
        return f"{identity(self.store.url).rpartition('?')[2]} {self.shown}"

    def _copy(self) -> bool:
        """Bring the small files; whether it is a study or holds timings. A folder that is there is in the copy too."""
        under = self.prefix.rstrip("/")
        there = {name[len(self.prefix) :] for name in self.store.list(under, only=(FIGURES,))}
        if not there and not self.store.folders(under):
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        if there.isdisjoint(self.marks):
            return False
        for name in there:
            if name in self.small or ("/" in name and not name.endswith(".html")):
                self.bring(name)
        return True

    def bring(self, name: str) -> None:
        """Copy a file, if it is there; errors as of `open`."""
        with _mistakes(), suppress(NotThereError):
            self.store.get(self.prefix + self.store.checked(name), self.folder / name)


@contextmanager
def _mistakes() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise ResultsError(str(error)) from None
