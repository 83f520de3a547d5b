"""Which code this user has run on this machine: a list of hashes, in a file of their own in the cache folder.

Whoever named code in a config, or gave `--trust-code`, has run it. A study from elsewhere is not in the list.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path

from trainables.results.files import alone, make_folder, read_limited, replacing

_MOST_BYTES, _MOST = 4_000_000, 10_000
NAME = "code-run.json"


def _file() -> Path | None:
    """Beside the downloads; None for a user without a home."""
    try:
        return Path(os.environ.get("MEBM_CACHE") or Path.home() / ".cache" / "mebm") / NAME
    except RuntimeError:
        return None


def _read(path: Path) -> dict[str, dict[str, str]]:
    """The list; nothing of one that somebody else can write, or that is damaged."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            return {}
        values = json.loads(read_limited(path, _MOST_BYTES))
        return {h: {str(k): str(v) for k, v in of.items()} for h, of in values.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def trusted(code: str) -> bool:
    """Whether code of this hash was run here by this user."""
    path = _file()
    return path is not None and code in _read(path)


def origin(code: str, study: Path) -> Path | None:
    """Where the file lay that a study here took this code from; None where that is not known."""
    path = _file()
    found = _read(path).get(code, {}).get(str(study.resolve())) if path is not None else None
    return Path(found) if found else None


def trust(code: str, study: Path | None = None, origin: Path | None = None) -> None:
    """Note that the user runs code of this hash; that of a file that a study copies, with where it lies.

    Without a cache that can be written nothing is noted, and `--trust-code` is needed again.
    """
    path = _file()
    if path is None:
        return
    with suppress(OSError):
        make_folder(path.parent)
        with alone(path.parent):
            known = _read(path)
            of = known.pop(code, {})
            if study is not None and origin is not None:
                of[str(study.resolve())] = str(origin)
            known[code] = of
            with replacing(path, "w") as file:
                os.fchmod(file.fileno(), 0o600)
                json.dump(dict(list(known.items())[-_MOST:]), file)
