"""The process between a trial's worker and a training script: it starts the script, keeps what it prints, and leaves
no process behind, however the worker ends.

Run by its path with `python -I -S guard.py WIRE OUTPUT -- COMMAND...`; standard library alone. Its standard input is
the worker's hand: the line `end` asks for the script's end, and its own end means that the worker is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""
FIRST_BYTES, LAST_BYTES = 1 << 20, 4 << 20
"""Of a script's output that are kept."""
EXIT = "exit.json"
_libc = ctypes.CDLL(None, use_errno=True)


class Output:
    """What a script prints, in a file: its first MiB and its last four; of a line that is rewritten (`\\r`) the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")  # follows no link
        self._size, self._skipped = 0, 0
        self._line = b""
        self._tail: deque[bytes] = deque()
        self._tail_size = 0

    def write(self, data: bytes) -> None:
        """Take in what was printed."""
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._keep(line.removesuffix(b"\r").rpartition(b"\r")[2] + b"\n")
        if len(self._line) > 1 << 16:  # no line: a progress bar that only rewrites, or binary
            head, _, rest = self._line.rpartition(b"\r")
            if not head:
                self._keep(self._line)
            self._line = rest if head else b""

    def _keep(self, line: bytes) -> None:
        if self._size + len(line) <= FIRST_BYTES and not self._tail:
            self._file.write(line)
            self._file.flush()
            self._size += len(line)
            return
        self._tail.append(line)
        self._tail_size += len(line)
        while self._tail_size > LAST_BYTES:
            gone = len(self._tail.popleft())
            self._tail_size -= gone
            self._skipped += gone

    def close(self) -> None:
        """Write what is left."""
        if self._line:
            self._keep(self._line.rstrip(b"\r").rpartition(b"\r")[2])
        with contextlib.suppress(OSError):  # a full disk: the script's end matters more
            if self._skipped:
                self._file.write(b"... %d bytes left out ...\n" % self._skipped)
            self._file.writelines(self._tail)
            self._file.close()


def descendants(root: int) -> list[int]:
    """Processes below one, as far as /proc tells."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208  # names alone
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents.setdefault(int(fields[1]), []).append(int(entry))
    found, left = [], [root]
    while left:
        below = parents.get(left.pop(), [])
        found += below
        left += below
    return found


def end_all(grace: float) -> int:
    """End every process below this one, which adopts orphans; returns how many there were."""
    seen: set[int] = set()
    until = time.monotonic() + grace
    told: set[int] = set()
    while True:
        there = descendants(os.getpid())
        if not there:
            return len(seen)
        seen.update(there)
        late = time.monotonic() > until
        for pid in there:
            if late or pid not in told:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
                    os.kill(pid, signal.SIGCONT)  # one that stands still ends, too
                told.add(pid)
        _reap()
        time.sleep(0.02)


def _reap() -> dict[int, int]:
    """Collect children that have ended: their wait statuses by pid."""
    found: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found[ended[0]] = ended[1]
    return found


def oom_kills() -> int:
    """Kills for want of memory in this process's cgroup, so far."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        group = Path("/proc/self/cgroup").read_text().strip().splitlines()[-1].split(":", 2)[2]
        for folder in (Path("/sys/fs/cgroup") / group.lstrip("/"), Path("/sys/fs/cgroup")):
            events = folder / "memory.events"
            if events.is_file():
                return sum(int(n) for k, n in map(str.split, events.read_text().splitlines()) if k == "oom_kill")
    return 0


def _child() -> None:
    """In the script's process, before it becomes the script."""
    os.setsid()
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def main(wire: Path, output: Path, command: list[str], parent: int) -> int:
    """Run a command to its end.

    Args:
        wire: takes `exit.json`.
        output: takes what it prints.
        command: program and arguments.
        parent: the worker; where that is no longer this process's parent, the command ends.
    """
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    ending = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: ending.append(True))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    before, status = oom_kills(), None
    kept = Output(output)
    try:
        script = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_child
        )
    except OSError as error:
        kept.write(f"{command[0]}: {error.strerror}\n".encode())
        kept.close()
        _write_exit(wire, {"code": 127, "signal": None, "error": f"{command[0]}: {error.strerror}"})
        return 127
    assert script.stdout is not None
    pipe, hand = script.stdout.fileno(), sys.stdin.fileno()
    os.set_blocking(pipe, False)
    watched = [pipe, hand]
    while status is None:
        ready, _, _ = select.select(watched, [], [], 0.1)
        if pipe in ready and not _take(pipe, kept):
            watched.remove(pipe)
        if hand in ready:
            told = os.read(hand, 4096)
            if not told or b"end" in told:
                ending.append(True)
                watched.remove(hand)
        if os.getppid() != parent:
            ending.append(True)
        status = _reap().get(script.pid)
        if ending and status is None:
            # What it prints on its way out is kept where it fits the pipe.
            with contextlib.suppress(OSError):
                os.kill(script.pid, signal.SIGTERM)
            status = _ended_within(GRACE_SECONDS, script.pid, pipe, kept)
            break
    left = len(descendants(os.getpid())) if status is not None and not ending else 0
    end_all(0.0 if ending else 1.0)
    while _take(pipe, kept, once=True):
        pass
    kept.close()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = os.waitstatus_to_exitcode(status) if status is not None else -signal.SIGKILL
    _write_exit(
        wire,
        {
            "code": max(code, 0) if code >= 0 else None, "signal": -code if code < 0 else None,
            "memory": usage.ru_maxrss * 1024, "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "oom_kills": oom_kills() - before, "left": left,
        },
    )  # fmt: skip
    return 0


def _take(pipe: int, kept: Output, *, once: bool = False) -> bool:
    """Take what is in the pipe; False at its end, or with `once` where there is nothing."""
    try:
        data = os.read(pipe, 1 << 16)
    except BlockingIOError:
        return not once
    except OSError:
        return False
    with contextlib.suppress(OSError):
        kept.write(data)
    return bool(data)


def _ended_within(seconds: float, pid: int, pipe: int, kept: Output) -> int | None:
    """The script's wait status once it has ended, None where it does not in time."""
    until = time.monotonic() + seconds
    for process in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGTERM)
    while time.monotonic() < until:
        if (status := _reap().get(pid)) is not None:
            return status
        _take(pipe, kept)
        time.sleep(0.02)
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]
    return None


def _write_exit(wire: Path, values: dict[str, object]) -> None:
    part = wire / f".{EXIT}.part"
    with contextlib.suppress(OSError):  # the worker has removed it: nobody asks any more
        part.write_text(json.dumps(values))
        part.replace(wire / EXIT)


if __name__ == "__main__":
    _wire, _output, _parent, _, *_command = sys.argv[1:]
    sys.exit(main(Path(_wire), Path(_output), _command, int(_parent)))
