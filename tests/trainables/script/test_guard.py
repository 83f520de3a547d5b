"""The guard of a script: what it leaves of it, and that it leaves no process, however who started it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainables.script import guard

WAIT = 60.0
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a guard over a Python script; this process is its worker."""
    started: list[subprocess.Popen[bytes]] = []

    def run(text: str, *arguments: str) -> subprocess.Popen[bytes]:
        (tmp_path / "script.py").write_text(text)
        command = [sys.executable, str(tmp_path / "script.py"), *arguments]
        return launch(command)

    def launch(command: list[str]) -> subprocess.Popen[bytes]:
        head = [sys.executable, "-I", "-S", guard.__file__, str(tmp_path), str(tmp_path / "out.log"), str(os.getpid())]
        started.append(subprocess.Popen([*head, "--", *command], stdin=subprocess.PIPE))
        return started[-1]

    run.launch = launch  # type: ignore[attr-defined]
    yield run
    for process in started:
        process.kill()
        process.wait()


def ended(folder: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads((folder / guard.EXIT).read_text())
    return values


def await_file(path: Path, process: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + WAIT
    while not (path.exists() and path.read_text().endswith("\n")):
        assert process.poll() is None and time.monotonic() < until, path
        time.sleep(0.01)
    return path.read_text()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def await_gone(pids: list[int]) -> None:
    until = time.monotonic() + WAIT
    while any(map(alive, pids)):
        assert time.monotonic() < until, [p for p in pids if alive(p)]
        time.sleep(0.02)


FAMILY = """
import os, signal, subprocess, sys, time
{prelude}
child = subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); time.sleep(600)"])
read, write = os.pipe()
if os.fork() == 0:
    if os.fork():
        os._exit(0)
    os.setsid()
    os.write(write, str(os.getpid()).encode())
    time.sleep(600)
orphan = int(os.read(read, 20))
with open("{pids}", "w") as file:
    file.write(f"{{os.getpid()}} {{child.pid}} {{orphan}}\\n")
time.sleep({seconds})
"""


def family(tmp_path: Path, seconds: float = 600, prelude: str = "") -> str:
    return FAMILY.format(pids=tmp_path / "pids", seconds=seconds, prelude=prelude)


@pytest.mark.parametrize("text", ["pass", "import sys; sys.exit(3)", "raise ValueError", "import os; os.abort()"])
def test_the_end_of_a_script_is_told(text: str, start: Start, tmp_path: Path) -> None:
    process = start(text)
    assert process.wait(WAIT) == 0
    code = {"pass": 0, "import sys; sys.exit(3)": 3, "raise ValueError": 1}.get(text)
    assert (ended(tmp_path)["code"], ended(tmp_path)["signal"]) == (code, None if code is not None else signal.SIGABRT)
    assert ended(tmp_path)["memory"] > 1e6 and ended(tmp_path)["cpu_seconds"] > 0  # type: ignore[operator]


def test_a_command_that_is_not_there(start: Start, tmp_path: Path) -> None:
    assert start.launch(["/nowhere/python"]).wait(WAIT) == 127  # type: ignore[attr-defined]
    assert ended(tmp_path)["error"] == "/nowhere/python: No such file or directory"


@pytest.mark.parametrize("way", ["end", "gone", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("deaf", [False, True])
def test_no_process_is_left_when_the_worker_lets_go(way: str, deaf: bool, start: Start, tmp_path: Path, monkeypatch):
    prelude = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" if deaf else ""
    process = start(family(tmp_path, prelude=prelude))
    pids = list(map(int, await_file(tmp_path / "pids", process).split()))
    assert all(map(alive, pids))
    assert process.stdin is not None
    if way == "end":
        process.stdin.write(b"end\n")
        process.stdin.flush()
    elif way == "gone":
        process.stdin.close()
    else:
        process.send_signal(getattr(signal, way))
    assert process.wait(WAIT) == 0
    await_gone(pids)
    assert ended(tmp_path)["signal"] == (signal.SIGKILL if deaf else signal.SIGTERM)


def test_no_process_is_left_when_the_worker_is_killed(tmp_path: Path) -> None:
    """The worker is its own process, whose death nobody can catch."""
    (tmp_path / "script.py").write_text(family(tmp_path))
    worker = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-I', '-S', {guard.__file__!r}, {str(tmp_path)!r}, "
        f"{str(tmp_path / 'out.log')!r}, str(os.getpid()), '--', sys.executable, {str(tmp_path / 'script.py')!r}], "
        "stdin=subprocess.PIPE)\ntime.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", worker])
    try:
        pids = list(map(int, await_file(tmp_path / "pids", process).split()))
        pids += guard.descendants(process.pid)
    finally:
        process.kill()
        process.wait()
    await_gone(pids)


def test_what_a_script_leaves_behind_is_ended_and_counted(start: Start, tmp_path: Path) -> None:
    process = start(family(tmp_path, seconds=0))
    assert process.wait(WAIT) == 0
    await_gone(list(map(int, (tmp_path / "pids").read_text().split())))
    assert ended(tmp_path)["left"] == 2 and ended(tmp_path)["code"] == 0


def test_a_script_that_stands_still_ends(start: Start, tmp_path: Path) -> None:
    process = start(family(tmp_path))
    pids = list(map(int, await_file(tmp_path / "pids", process).split()))
    os.kill(pids[0], signal.SIGSTOP)
    process.terminate()
    assert process.wait(WAIT) == 0
    await_gone(pids)


def test_output_is_kept_at_both_ends(start: Start, tmp_path: Path) -> None:
    lines = 300_000
    process = start(f"for i in range({lines}): print(f'{{i:06d}} of an output that is long')")
    assert process.wait(WAIT) == 0
    kept = (tmp_path / "out.log").read_bytes()
    assert kept.startswith(b"000000 of") and kept.endswith(b"%06d of an output that is long\n" % (lines - 1))
    left_out = int(kept.partition(b"... ")[2].split()[0])
    assert left_out > 0 and len(kept) - len(b"... %d bytes left out ...\n" % left_out) + left_out == lines * 33
    assert len(kept) < guard.FIRST_BYTES + guard.LAST_BYTES + 100


def test_a_line_that_is_written_over_is_kept_once(start: Start, tmp_path: Path) -> None:
    text = "import sys\nfor i in range(50000): sys.stderr.write(f'\\r{i} it/s')\nprint()\nprint('a\\r\\nb', end='')"
    assert start(text).wait(WAIT) == 0
    assert (tmp_path / "out.log").read_text() in ("49999 it/s\na\nb", "\n49999 it/sa\nb")
