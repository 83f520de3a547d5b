"""What a training script declares, before any of it is trusted with forty trials: it runs up to its `Monitor(...)`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mebm import monitor
from trainables.config.script import ScriptConfig
from trainables.script import guard
from trainables.script.environment import script_environment

_SECONDS = 600.0
"""A script that takes longer to import what it needs is started without a probe."""
_SCALARS = ("bool", "int", "float", "str")
_FRAME = re.compile(r'\s*File "(.+)", line (\d+)')


class ProbeError(ValueError):
    """A script that does not come as far as its `Monitor(...)`; one line."""


@dataclass(frozen=True)
class Declaration:
    """What a script's `Monitor(...)` says.

    Attributes:
        script: its name, for messages.
        defaults: by argument.
        kinds: names of the defaults' types; None where the default is None.
        options: symbols, rule, learn_from, every.
    """

    script: str
    defaults: Mapping[str, Any]
    kinds: Mapping[str, str | None]
    options: Mapping[str, Any]

    @property
    def values(self) -> dict[str, Any]:
        """Defaults that a table can hold."""
        return {n: v for n, v in self.defaults.items() if self.kinds[n] in _SCALARS and n != "seed"}

    def typed(self, name: str, value: Any) -> Any:
        """A study's value of an argument in its default's type; as it is where the script does not declare it.

        Raises:
            ValueError: it has none there.
        """
        kind = self.kinds.get(name)
        if kind is None:
            return value
        if kind not in _SCALARS:
            raise ValueError(f"{value!r} cannot take the place of its default, a {kind}")
        try:
            return monitor.typed(name, value, self.defaults[name])
        except monitor.MonitorError as error:
            raise ValueError(str(error).removeprefix(f"{name}: ")) from None


def probe(config: ScriptConfig) -> Declaration:
    """Run a script up to its `Monitor(...)`; nothing of it is left.

    Raises:
        ProbeError: it does not come so far.
    """
    with tempfile.TemporaryDirectory(prefix="mebm-probe-") as scratch:
        place = Path(scratch)
        output, answer = place / "output", place / "answer.json"
        try:
            command = config.argv(sys.executable, place)
        except ValueError as error:
            raise ProbeError(str(error)) from None
        environment = script_environment(config, place) | {monitor.PROBE: str(answer)}
        head = [sys.executable, "-I", "-S", guard.__file__, scratch, str(output), str(os.getpid()), "--"]
        watched = subprocess.Popen(
            [*head, *command], stdin=subprocess.PIPE, cwd=config.cwd, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until = time.monotonic() + _SECONDS
        while watched.poll() is None and not answer.exists() and time.monotonic() < until:
            time.sleep(0.02)
        late = watched.poll() is None and not answer.exists()
        assert watched.stdin is not None
        watched.stdin.close()  # ends what is left of it
        watched.wait()
        if answer.exists():
            return _declaration(config, json.loads(answer.read_text(encoding="utf-8")))
        if late:
            raise ProbeError(f"{config.method} did not reach Monitor(...) within {_SECONDS / 60:.0f} minutes")
        text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
        raise ProbeError(_why(config, text, json.loads((place / guard.EXIT).read_text(encoding="utf-8"))))


def _declaration(config: ScriptConfig, told: Mapping[str, Any]) -> Declaration:
    parameters = told["parameters"]
    return Declaration(
        config.method, {n: v for n, _, v in parameters}, {n: kind for n, kind, _ in parameters},
        {n: told[n] for n in ("symbols", "rule", "learn_from", "every")},
    )  # fmt: skip


def _why(config: ScriptConfig, text: str, ended: Mapping[str, Any]) -> str:
    """The exception of a trace with the line of the script's own that led to it, or how it ended."""
    lines = text.splitlines()
    words = next((line.strip() for line in reversed(lines) if line.strip()), "")
    frames = [(found[1], int(found[2])) for line in lines if (found := _FRAME.match(line))]
    if frames and re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)?\b", words):
        home = Path(config.script).parent if config.script and config.script.endswith(".py") else Path(config.cwd or "")
        own = [f for f in frames if Path(f[0]).is_relative_to(home) and "site-packages" not in f[0]]
        file, line = (own or frames)[-1]
        return f"{Path(file).name}:{line}: {words}"
    how = f"signal {ended['signal']}" if ended.get("signal") else f"code {ended.get('code')}"
    said = f"; it said: {words}" if words else ""
    return ended.get("error") or f"{config.method} ended ({how}) and never reached Monitor(...){said}"
