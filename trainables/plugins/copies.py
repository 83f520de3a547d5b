"""The copies of plug-ins in a study: `code/HASH/` with the files of each; `code/code.json` says what is what.

What is read of them is a stranger's until its hash is known: names stay in the folder, sizes are bounded.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainables.plugins.bundle import DIGITS, MAX_BYTES, MAX_FILES, Bundle
from trainables.results.files import (
    UnsafePathError,
    check_name,
    make_folder,
    read_limited,
    within,
    write_bytes,
    write_text,
)
from trainables.results.layout import CODE

INDEX = f"{CODE}/code.json"
Index = dict[str, dict[str, Any]]
"""By `nets.py`, a module or `method NAME`: `hash`, `entry` and `files` of a copy, or `package`, the print of one."""


def entry_of(bundle: Bundle) -> dict[str, Any]:
    """What `code.json` says of a copy."""
    files = {name: hashlib.sha256(data).hexdigest()[:12] for name, data in sorted(bundle.files.items())}
    return {"hash": bundle.hash, "entry": bundle.entry, "files": files}


def write_copies(study: Path, bundles: Mapping[str, Bundle], packages: Mapping[str, str]) -> None:
    """Write what a study uses into its folder; copies that are there already stay.

    Args:
        bundles: by the part of a reference before its colon; packages: prints, by module or `method NAME`.
    """
    if not bundles and not packages and not (study / CODE).exists():
        return
    for bundle in bundles.values():
        for name, data in bundle.files.items():
            path = within(study, f"{CODE}/{bundle.hash}/{name}")
            make_folder(path.parent)
            write_bytes(path, data)
    index: Index = {name: entry_of(bundle) for name, bundle in bundles.items()}
    index |= {name: {"package": text} for name, text in packages.items()}
    make_folder(study / CODE)
    write_text(study / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def read_index(study: Path) -> Index:
    """What a study says of its code; nothing where it has none. Raises ValueError: damaged."""
    from trainables.results.bounded import read_json  # pyarrow, which names of networks do without

    try:
        found = read_json(within(study, INDEX))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{study / INDEX}: {getattr(error, 'strerror', None) or 'damaged'}") from None
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise ValueError(f"{study / INDEX}: damaged")
    return found


def hash_of(said: Mapping[str, Any]) -> str | None:
    """The hash of a copy, or of a package's print; None where the entry has neither."""
    if isinstance(code := said.get("hash"), str) and re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", code):
        return code
    return print_hash(said["package"]) if isinstance(said.get("package"), str) else None


def print_hash(text: str) -> str:
    """What stands for a package's print in the list of code that was run."""
    return hashlib.sha256(f"package {text}".encode()).hexdigest()[:DIGITS]


def read_copy(study: Path, name: str, said: Mapping[str, Any]) -> Bundle:
    """A copy. Raises ValueError: it is not what `code.json` says, or was changed; one line."""
    code, entry, files = said.get("hash"), said.get("entry"), said.get("files")
    root = study / CODE / str(code)
    if hash_of(said) != code or not isinstance(entry, str) or not isinstance(files, dict) or entry not in files:
        raise ValueError(f"{study / INDEX}: damaged")
    if len(files) > MAX_FILES:
        raise ValueError(f"{study / INDEX}: names more than {MAX_FILES} files")
    found: dict[str, bytes] = {}
    for file in files:
        try:
            path = within(study, f"{CODE}/{code}/{check_name(file, study / INDEX)}")
            if path.exists() and not path.is_file():
                raise UnsafePathError(path, "is not a regular file")
            found[file] = read_limited(path, MAX_BYTES)
        except (UnsafePathError, OSError) as error:
            raise ValueError(f"{root / str(file)[:200]}: {error.strerror}") from None
        if sum(map(len, found.values())) > MAX_BYTES:
            raise ValueError(f"{root}: holds more than {MAX_BYTES // 10**6} MB")
    bundle = Bundle(root, entry, found)
    if bundle.hash != code:
        now = entry_of(bundle)["files"]
        other = next((f for f in files if now[f] != files[f]), entry)
        raise ValueError(f"{root / other}: the study's copy of {name} was changed; put it back as it was")
    return bundle


def pack(bundle: Bundle) -> bytes:
    """A bundle as bytes, for a worker that does not see the study's folder."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = bundle.entry.encode()
        for name, data in sorted(bundle.files.items()):
            archive.writestr(zipfile.ZipInfo(name), data)
    return file.getvalue()


def unpack(data: bytes, root: Path) -> Bundle:
    """The bundle of `pack`, written below a root that is this process's own."""
    files: dict[str, bytes] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            files[name] = archive.read(name)
            path = within(root, name)
            make_folder(path.parent)
            write_bytes(path, files[name])
        entry = archive.comment.decode()
    return Bundle(root, entry, files)
