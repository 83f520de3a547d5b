"""The copies of a study's own code: written when it begins, compared when it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study.config.errors import UserError
from study.config.own_code import code_names, extractor_files, packages
from trainables.plugins.bundle import Bundle, read_bundle
from trainables.plugins.copies import Index, hash_of, pack, print_hash, read_copy, read_index, write_copies
from trainables.plugins.reference import find, split, use
from trainables.plugins.trust import origin, trust


def keep_code(folder: Path, values: Mapping[str, Any]) -> None:
    """Copy what a new study's configuration names into its folder, and use it from there from now on.

    Raises:
        UserError: it cannot be read.
    """
    bundles: dict[str, Bundle] = {}
    for kind, name in code_names(values):
        if ":" not in name:
            continue
        place, _ = split(name)
        try:
            bundle = find(place)
        except ValueError as error:
            raise UserError(f"{kind} {name}: {error}") from None
        if bundle is not None:
            bundles[place] = bundle
    prints = {name: text for name, text in packages(values).items() if name not in bundles}
    write_copies(folder, bundles, prints)
    for bundle in bundles.values():
        trust(bundle.hash, folder, bundle.root / bundle.entry)
    for text in prints.values():
        trust(print_hash(text))
    use(folder)


def code_hashes(folder: Path) -> dict[str, str]:
    """What a worker may run: hashes of a study's copies by the part of a reference before its colon, "" for modules."""
    return {name: str(said.get("hash", "")) for name, said in _index(folder).items()}


def packed_code(folder: Path) -> dict[str, bytes]:
    """The copies, for workers that do not see the folder, by hash."""
    copies = {n: said for n, said in _index(folder).items() if "hash" in said}
    return {str(said["hash"]): pack(_copy(folder, name, said)) for name, said in copies.items()}


def _index(folder: Path) -> Index:
    try:
        return read_index(folder)
    except ValueError as error:
        raise UserError(str(error)) from None


def _copy(folder: Path, name: str, said: Mapping[str, Any]) -> Bundle:
    try:
        return read_copy(folder, name, said)
    except ValueError as error:
        raise UserError(str(error)) from None


def code_prints(folder: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """What a study's own code is now, for its journal: hashes of copies and extractors' files, prints of packages."""
    found: dict[str, str] = {}
    index = _index(folder)
    for name, said in index.items():
        if "hash" in said:
            for file, code in dict(said["files"]).items():
                found[name if file == said["entry"] else f"{file} (of {name})"] = str(code)
    found |= {n: text for n, text in packages(values).items() if "hash" not in index.get(n, {})}
    return found | extractor_files(values)


def changed_code(folder: Path, values: Mapping[str, Any]) -> list[str]:
    """What of a study's own code is not what it began with, in words that name the file or the package.

    A copy is compared with the file that it was taken from, where that is on this machine; without it the copy is all
    there is.
    """
    said = []
    index = _index(folder)
    now = packages(values)
    for name, entry in index.items():
        if "package" in entry:
            if now.get(name) not in (None, entry["package"]):
                said.append(f"{name} was {entry['package']} and is {now[name]}")
            continue
        newer = _newer(folder, name, entry)
        if newer is not None:
            files = [f for f in {**newer.files, **entry["files"]} if _differs(folder, name, entry, newer, f)]
            said.append(", ".join(Path(f).name for f in sorted(files)) + " has changed" if len(files) == 1
                        else ", ".join(sorted(files)) + " have changed")  # fmt: skip
    return said


def _differs(folder: Path, name: str, entry: Mapping[str, Any], newer: Bundle, file: str) -> bool:
    return _copy(folder, name, entry).files.get(file) != newer.files.get(file)


def _newer(folder: Path, name: str, entry: Mapping[str, Any]) -> Bundle | None:
    """The plug-in as it is now where the study took it from, if that is not what it copied."""
    code = hash_of(entry)
    from_ = origin(code, folder) if code is not None else None
    if from_ is None or not from_.is_file():
        return None
    copy = _copy(folder, name, entry)
    below = from_
    for _ in Path(copy.entry).parts:
        below = below.parent
    try:
        now = read_bundle(from_, below)
    except ValueError as error:
        raise UserError(f"{error}; move it away, and the study goes on with its copy") from None
    return now if now.hash != code else None


def take_changes(folder: Path, values: Mapping[str, Any]) -> None:
    """`--accept-changes`: copy what has changed, and go on with it."""
    index = _index(folder)
    bundles = {n: _newer(folder, n, said) or _copy(folder, n, said) for n, said in index.items() if "hash" in said}
    prints = {n: text for n, text in packages(values).items() if n not in bundles}
    newer = {n: b for n, b in bundles.items() if b.hash != index[n]["hash"]}
    write_copies(folder, bundles, prints)
    for name, bundle in newer.items():
        trust(bundle.hash, folder, origin(str(index[name]["hash"]), folder))
    for text in prints.values():
        trust(print_hash(text))
    use(None)
    use(folder)
