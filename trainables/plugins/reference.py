"""Names of code of a user's own: what they stand for, and the object behind one.

`nets.py:MyNet` is a file's, `my_package.nets:MyNet` a module's; a name without a colon is that of an installed plug-in.

A process looks for code in one of two ways. After `allow` the user has named a config: what stands in it is run, files
from the config's folder or the working directory. After `use` it is a study's: the copies in its `code/` are run, if
they were run here before, or the user says so. Before either, nothing is.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from trainables.plugins.bundle import Bundle, read_bundle
from trainables.plugins.copies import INDEX, hash_of, print_hash, read_copy, read_index, unpack
from trainables.plugins.importing import import_bundle, import_named, told
from trainables.plugins.installed import fingerprint
from trainables.plugins.installed import registered as registered
from trainables.plugins.trust import trust, trusted
from trainables.results.layout import CODE

TRUSTED = "MEBM_METHODS"
"""Environment variable with modules that any study or model may name as `module:Class`."""
Fetch = Callable[[str], bytes | None]


class NotTrustedError(ValueError):
    """Code that nobody has allowed to run here."""


@dataclass
class _Places:
    """Where this process looks for code, and what it found.

    Attributes:
        folders: of the config and the working directory, after `allow`.
        bound: files named in the config, by their names without folders.
        study: whose copies are used, after `use`; given: hashes of them that the driver vouches for; fetch: gets one
            that is not in the folder.
        anything: `--trust-code`.
        found: objects by kind and name.
    """

    folders: tuple[Path, ...] = ()
    bound: dict[str, Bundle] = field(default_factory=dict)
    study: Path | None = None
    given: Mapping[str, str] | None = None
    fetch: Fetch | None = None
    anything: bool = False
    found: dict[tuple[str, str], Any] = field(default_factory=dict)
    changed: list[Callable[[], object]] = field(default_factory=list)


_HERE = _Places()


def is_reference(name: object) -> bool:
    """Whether a name is one of code: it has a colon."""
    return isinstance(name, str) and ":" in name


def split(name: str) -> tuple[str, str]:
    """File or module, and object. Raises ValueError: it has not both."""
    place, _, attribute = name.rpartition(":")
    if not place.strip() or "\0" in place or not all(part.isidentifier() for part in attribute.split(".")):
        raise ValueError("expected FILE.py:NAME or MODULE:NAME")
    if not is_file(place) and not all(part.isidentifier() for part in place.split(".")):
        raise ValueError(f"{_cut(place)} is neither a Python file (.py) nor a module")
    return place, attribute


def _cut(text: str) -> str:
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= 100 else f"{shown[:96]}..."


def is_file(place: str) -> bool:
    """Whether the part before the colon is a file."""
    return place.endswith(".py")


def short(name: str) -> str:
    """`nets.py:MyNet` of `/home/me/nets.py:MyNet`; other names as they are."""
    place, colon, attribute = name.rpartition(":")
    return f"{PurePosixPath(place).name}:{attribute}" if colon and is_file(place) else name


def allow(*folders: Path) -> None:
    """The user named a config in this command: what it names is run, from its folder or the working directory."""
    use(None)
    _HERE.folders = tuple(dict.fromkeys((*folders, Path.cwd())))


def use(folder: Path | None, given: Mapping[str, str] | None = None, fetch: Fetch | None = None) -> None:
    """What is resolved from now on is of this study: the copies in its `code/`; None: nothing is run.

    Args:
        given: hashes of copies that the driver vouches for, by the part of a reference before its colon, "" of a module
            that is installed; None: what was run on this machine before is run.
        fetch: gets a packed copy by its hash, where the folder is not to be seen from here.
    """
    now = (folder, given, bool(_HERE.folders))
    if now != (_HERE.study, _HERE.given, False):
        _HERE.found.clear()
        _HERE.bound.clear()
        for forget in _HERE.changed:
            forget()
    _HERE.study, _HERE.given, _HERE.fetch, _HERE.folders = folder, given, fetch, ()


def use_study_of(file: Path) -> None:
    """As `use`, of the study that a model file or a checkpoint lies in; its own folder where it is in none."""
    above = list(file.absolute().parents)[:6]
    use(next((p for p in above if (p / INDEX).is_file()), above[0]))


def trust_code(given: bool) -> None:
    """`--trust-code`: whether the code of the studies of this command is run, wherever it is from."""
    _HERE.anything = given


def on_change(forget: Callable[[], object]) -> None:
    """Call this whenever a name may stand for other code than before: whoever keeps what was read of it."""
    _HERE.changed.append(forget)


def resolve(name: str, kind: str) -> Any:
    """The object of a name, imported at its first use in this process.

    Args:
        kind: method, network, initial, dataset, optimiser or metric; of `registered`, and for messages.

    Raises:
        ValueError: no such file, module, object or plug-in, its import fails, or its code is not trusted; one line.
    """
    key = (kind, name)
    if key not in _HERE.found:
        try:
            _HERE.found[key] = _object(name, kind)
        except ValueError as error:
            raise type(error)(f"{kind} {_cut(name)}: {error}") from error.__cause__
    return _HERE.found[key]


def _object(name: str, kind: str) -> Any:
    if not is_reference(name):
        point = registered(kind).get(name)
        if point is None:
            raise ValueError("no installed package has a plug-in of this name")
        with told(point.value):
            return point.load()
    place, attribute = split(name)
    bundle = find(place)
    module = import_bundle(bundle) if bundle is not None else import_module(place)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            shown = PurePosixPath(place).name if is_file(place) else place
            raise ValueError(f"{attribute} cannot be imported: {shown} has none")
        found = getattr(found, part)
    return found


def bind(name: str) -> tuple[str, Bundle | None]:
    """What a reference in the user's config is called from now on, its files found and read; None for a module.

    Raises:
        ValueError: there is no such file or module, or another file of this name was named before.
    """
    place, _ = split(name)
    key = PurePosixPath(place).name if is_file(place) else place
    bundle = _HERE.bound.get(key) if key == place else None
    if bundle is None:
        bundle = _named(place)
    if bundle is None:
        return name, None
    there = _HERE.bound.setdefault(key, bundle)
    if there.hash != bundle.hash:
        raise ValueError(
            f"{there.root / there.entry} and {bundle.root / bundle.entry} have one name: rename one of them"
        )
    return short(name), bundle


def named_file(place: str) -> Path:
    """A file that the user's config or command names, relative to the config or the working directory.

    Raises:
        ValueError: there is none; one line.
    """
    folders = _HERE.folders or (Path.cwd(),)
    found = next((path for f in folders if (path := f / Path(place).expanduser()).is_file()), None)
    if found is None:
        where = "" if Path(place).is_absolute() else f" in {' or '.join(map(str, folders))}"
        raise ValueError(f"there is no file {_cut(place)}{where}")
    return found.resolve()


def check_trusted(file: Path, code: str) -> None:
    """Whether a file that holds code, of this hash, may run: the user named it here, or has run it before.

    Raises:
        NotTrustedError: neither.
    """
    if not trusted(code):
        if not (_HERE.folders or _HERE.anything):
            raise NotTrustedError(f"{file} holds code that you have not run on this machine; --trust-code runs it")
        trust(code)


def code_hash(name: str) -> str:
    """A hash of the code behind a reference. Raises ValueError: see `find`."""
    place, _ = split(name)
    bundle = find(place)
    return bundle.hash if bundle is not None else print_hash(fingerprint(place))


def find(place: str) -> Bundle | None:
    """The files behind a reference's part before the colon; None for a module that Python imports by itself.

    Raises:
        ValueError: there are none, or they cannot be read. NotTrustedError: nobody has allowed to run them.
    """
    if _HERE.study is not None:
        return _of_study(_HERE.study, place)
    if _HERE.folders:
        return _HERE.bound.get(place) or _named(place)
    if place not in _trusted_modules():
        how = f"only where you name it in a config, or with --trust-code; {TRUSTED}={place} trusts a module"
        raise NotTrustedError(f"its code is run {how}")
    return None


def _named(place: str) -> Bundle | None:
    """What the user's own config names."""
    if is_file(place):
        for folder in _HERE.folders:
            if os.path.lexists(path := folder / place):
                return read_bundle(path)
        raise ValueError(f"there is no file {_cut(place)} in {' or '.join(map(str, _HERE.folders))}")
    if not _importable(place):  # a package that lies beside the config, and is not installed
        for folder in _HERE.folders:
            path = folder.joinpath(*place.split("."))
            for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
                if file.is_file():
                    return read_bundle(file, folder)
    return None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _trusted_modules() -> list[str]:
    return os.environ.get(TRUSTED, "").replace(",", " ").split()


def _of_study(study: Path, place: str) -> Bundle | None:
    """What a study's configuration names, if its code may run here."""
    if _HERE.given is not None:
        return _of_driver(study, place, _HERE.given)
    said = read_index(study).get(place, {})
    code = hash_of(said)
    if "package" in said or (code is None and not is_file(place)):
        if place not in _trusted_modules():
            _refuse_unknown(study, place, print_hash(fingerprint(place)))
        return None
    if code is None:
        if not _HERE.anything:
            raise NotTrustedError(f"{study} has no copy of its code; with {place} beside it, --trust-code runs that")
        return _beside(study, place)
    _refuse_unknown(study, place, code)
    return read_copy(study, place, said)


def _refuse_unknown(study: Path, place: str, code: str) -> None:
    if trusted(code):
        return
    if not _HERE.anything:
        raise NotTrustedError(
            f"{study} would run code that you have not run on this machine; read it "
            f"({study / CODE if is_file(place) else place}), then --trust-code runs it"
        )
    trust(code)


def _beside(study: Path, place: str) -> Bundle:
    for folder in (study, Path.cwd()):
        if (folder / place).is_file() and "/" not in place:
            return read_bundle(folder / place)
    raise ValueError(f"{study} has no copy of its code, and there is no file {_cut(place)} in it or in {Path.cwd()}")


def _of_driver(study: Path, place: str, given: Mapping[str, str]) -> Bundle | None:
    """What the driver vouches for: the copy in the folder, or where that is not to be seen from here, the driver's."""
    code = given.get(place)
    if code is None and place not in _trusted_modules():
        raise NotTrustedError(f"the study's driver does not know of {place}")
    if not code:
        return None
    said = read_index(study).get(place, {})
    if said.get("hash") == code:
        return read_copy(study, place, said)
    packed = _HERE.fetch(code) if _HERE.fetch is not None else None
    if packed is None:
        raise ValueError(f"{study / CODE}: the copy of {place} that the study runs is not there")
    bundle = unpack(packed, Path(tempfile.mkdtemp(prefix="mebm-code-")))
    if bundle.hash != code:
        raise ValueError(f"the driver's copy of {place} is damaged")
    return bundle


def import_module(name: str) -> Any:
    """A module that Python finds by itself. Raises ValueError: it cannot be imported; one line."""
    try:
        return import_named(name, name)
    except ValueError as error:
        raise ValueError(f"cannot be imported: {error}") from error.__cause__
