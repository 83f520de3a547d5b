"""What a training script is made of: its file, the local modules it imports, and whatever else its trial names."""

from __future__ import annotations

import ast
import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mebm import monitor
from trainables.config.script import ScriptConfig

PREFIX = "script/"
"""How the names of its files begin among those of a study's code."""
_MAX_FILES, _MAX_BYTES = 2000, 100_000_000


def script_files(config: ScriptConfig) -> list[Path]:
    """The files a script is made of, the script itself first; at most 2,000, none above 100 MB.

    Modules are found by their import statements, below the script's folder and its working directory; what is imported
    by a name made while it runs is not.
    """
    cwd = Path(config.cwd or ".")
    roots, first = [cwd], list(_named(config, cwd))
    if config.script is not None and config.script.endswith(".py"):
        roots.insert(0, Path(config.script).parent)
    for path in first:
        if path.suffix == ".py" and path.parent not in roots:
            roots.append(path.parent)
    found: dict[Path, None] = {}
    queue = [p for p in first if p.suffix == ".py"]
    found |= dict.fromkeys(first)
    while queue and len(found) < _MAX_FILES:
        for path in _imported(queue.pop(0), roots):
            if path not in found:
                found[path] = None
                queue.append(path)
    for pattern in config.files:
        with suppress(ValueError, NotImplementedError, OSError):
            found |= dict.fromkeys(p for p in sorted(cwd.glob(pattern)) if p.is_file())
    return list(found)[:_MAX_FILES]


def _named(config: ScriptConfig, cwd: Path) -> Iterator[Path]:
    if config.script is not None and config.script.endswith(".py"):
        yield cwd / config.script
    elif config.script is not None:
        yield from _module(config.script.partition(":")[0], [cwd])
    else:
        words = shlex.split(config.command or "")
        yield from (cwd / w for w in dict.fromkeys(words) if "\0" not in w and (cwd / w).is_file() and _own(cwd / w))


def _own(path: Path) -> bool:
    """Whether a word of a command is a file of the user's, and no program of the system."""
    return not (os.access(path, os.X_OK) and path.is_absolute())


def _imported(path: Path, roots: list[Path]) -> Iterator[Path]:
    """Local modules that a file imports."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            return
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module(alias.name, roots)
        elif isinstance(node, ast.ImportFrom):
            above = path.parent
            for _ in range(max(0, node.level - 1)):
                above = above.parent
            places = [above] if node.level else roots
            base = node.module or ""
            yield from _module(base, places)
            for alias in node.names:
                yield from _module(f"{base}.{alias.name}".strip("."), places)


def _module(name: str, roots: list[Path]) -> Iterator[Path]:
    """Files of a dotted module below the first root that has it: its packages' `__init__`s and itself."""
    parts = name.split(".")
    for root in roots:
        files = []
        for depth in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:depth])
            files += [p for p in (place / "__init__.py", place.with_name(f"{place.name}.py")) if p.is_file()]
        if files:
            yield from files
            return


def script_print(config: ScriptConfig) -> dict[str, str]:
    """Hashes of a script's files by name, of the client, and the interpreter's version."""
    cwd = Path(config.cwd or ".")
    found: dict[str, str] = {}
    for path in script_files(config):
        name = str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)
        found[PREFIX + name] = "absent"
        with suppress(OSError):
            if path.stat().st_size <= _MAX_BYTES:
                found[PREFIX + name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
            else:
                found[PREFIX + name] = f"{path.stat().st_size} bytes"
    found["mebm/monitor.py"] = hashlib.sha256(Path(monitor.__file__).read_bytes()).hexdigest()[:12]
    if config.python is not None:
        found["script's python"] = _version(config.python)
    return found


def _version(python: str) -> str:
    if python == sys.executable:
        return ".".join(map(str, sys.version_info[:3]))
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run([python, "-I", "-V"], capture_output=True, text=True, timeout=60, check=False)
        return (said.stdout or said.stderr).strip().removeprefix("Python ")[:40]
    return "absent"
