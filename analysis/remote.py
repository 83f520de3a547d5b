"""Results in object storage, read through pyarrow's file systems (and fsspec's, which pyarrow opens)."""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pyarrow import fs


class ResultsError(ValueError):
    """Results that cannot be read; its message is one line for the user: file, what is wrong, what is expected."""


def is_url(path: object) -> bool:
    """True for a URL of a store, false for a path."""
    return isinstance(path, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


_ARROW = frozenset({"abfs", "abfss", "file", "gcs", "gs", "hdfs", "mock", "s3", "viewfs"})
"""Schemes of pyarrow's own file systems; any other is fsspec's."""
_FIGURES = "figures"


@dataclass(frozen=True)
class Remote:
    """A folder of a store and the temporary copy of its small files, which goes when nobody holds this any more.

    Attributes:
        filesystem: holds it.
        path: its path there.
        shown: its URL without user, password and query.
        key: tells it from any other, also of the same name at another end point.
        folder: the copy.
        small: names of the files that are copied; marks: those of which a study's or a benchmark's folder has one.
        whole: what this is a part of, which keeps the copy.
    """

    filesystem: Any
    path: str
    shown: str
    key: str
    folder: Path
    small: tuple[str, ...]
    marks: tuple[str, ...]
    whole: Remote | None = None

    @classmethod
    def open(cls, url: str, small: tuple[str, ...], marks: tuple[str, ...]) -> Remote:
        """Copy the small files of a study, or of the studies directly below a URL.

        Raises:
            ResultsError: the store cannot be read, or one of its names is refused.
        """
        scheme, shown = url.partition("://")[0], _without_user(url)[0]
        try:
            try:
                if scheme.lower() not in _ARROW:
                    raise NotImplementedError
                filesystem, place = fs.FileSystem.from_uri(url)
            except NotImplementedError:  # not pyarrow's, or not in this build of it
                filesystem, place = fs.FileSystem.from_uri(url if scheme.startswith("fsspec+") else f"fsspec+{url}")
        except Exception as error:
            raise ResultsError(f"{shown}: cannot be opened ({_plain_reason(error, url)})") from None
        name = place.rstrip("/").rpartition("/")[2]
        if name in ("", ".", ".."):
            raise ResultsError(f"{shown}: expected the URL of a study's folder or of one that holds studies")
        base = Path(tempfile.mkdtemp(prefix="mebm-"))
        found = cls(filesystem, place.rstrip("/"), shown, f"{urlsplit(url).query} {shown}", base / name, small, marks)
        weakref.finalize(found, shutil.rmtree, base, ignore_errors=True)
        if not found._copy():
            for child in found._children():
                found.of(found.folder / child)._copy()
        return found

    def of(self, folder: Path) -> Remote:
        """The part of it that a folder of the copy is a copy of."""
        if folder == self.folder:
            return self
        name = folder.relative_to(self.folder).as_posix()
        return dataclasses.replace(
            self,
            path=f"{self.path}/{name}",
            shown=f"{self.shown}/{name}",
            key=f"{self.key}/{name}",
            folder=folder,
            whole=self,
        )

    def _infos(self, path: str, *, recursive: bool = False) -> list[Any]:
        try:
            found: list[Any] = self.filesystem.get_file_info(
                fs.FileSelector(path, recursive=recursive, allow_not_found=True)
            )
        except Exception as error:
            raise ResultsError(f"{self.shown}: cannot be listed ({_plain_reason(error, self.shown)})") from None
        return found

    def _children(self) -> list[str]:
        infos = [i for i in self._infos(self.path) if i.type is fs.FileType.Directory]
        return sorted(_checked(i.path.rstrip("/").rpartition("/")[2], self.shown) for i in infos)

    def _copy(self) -> bool:
        """Bring the small files; whether it is a study or holds timings. A folder that is there is in the copy too."""
        infos = self._infos(self.path)
        if not infos:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        present = {i.path.rpartition("/")[2] for i in infos if i.type is fs.FileType.File}
        if not present & set(self.marks):
            return False
        for name in self.small:
            if name in present:
                self.bring(name)
        for info in self._infos(f"{self.path}/{_FIGURES}", recursive=True):
            if info.type is fs.FileType.File and not info.path.endswith(".html"):
                self.bring(info.path.strip("/")[len(self.path.strip("/")) + 1 :])
        return True

    def bring(self, name: str) -> None:
        """Copy a file, if it is there.

        Raises:
            ResultsError: the store cannot be read, or the name would leave the copy.
        """
        target = self.folder / _checked(name, self.shown)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        try:
            with self.filesystem.open_input_file(f"{self.path}/{name}") as source, part.open("wb") as file:
                shutil.copyfileobj(source, file, 2**22)
            part.replace(target)
        except FileNotFoundError:
            pass
        except Exception as error:
            raise ResultsError(f"{self.shown}/{name}: cannot be read ({_plain_reason(error, self.shown)})") from None
        finally:
            part.unlink(missing_ok=True)


def _checked(name: str, where: str) -> str:
    if "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ResultsError(f"{where}: object name {name!r} refused: it must be relative, without '..'")
    return name


def _without_user(url: str) -> tuple[str, str]:
    """A URL without user, password, query and fragment, and the user and password."""
    scheme, _, rest = url.partition("://")
    plain = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority, slash, path = plain.partition("/")
    port = authority.rpartition(":")[2] if ":" in authority else ""
    if "@" in authority:
        user, _, host = authority.rpartition("@")
        plain = f"{host}{slash}{path}"
    elif port and not port.isdigit() and "@" in path:  # a password with a slash that is not written as %2F
        user, _, plain = plain.rpartition("@")
    else:
        user = ""
    return f"{scheme}://{plain}".rstrip("/"), user


def _plain_reason(error: Exception, url: str) -> str:
    """An error's first line, without credentials the URL may hold."""
    text = (str(error).splitlines() or [type(error).__name__])[0].replace(url, "the URL")
    user = _without_user(url)[1]
    for secret in (user, *user.split(":")):
        for form in (secret, unquote(secret)):
            text = text.replace(form, "***") if len(form) > 3 else text
    return text[:160]
