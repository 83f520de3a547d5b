"""The process's standard streams, made so that nothing that happens to them ends a study or is taken for its outcome.

Where a reader is gone or no longer reads, a disk is full or a stream closed, the study goes on and shows what it can;
what would steer a terminal is shown as the escape that stands for it.
"""

from __future__ import annotations

import codecs
import errno
import io
import logging
import os
import re
import select
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from study.config.errors import printable
from study.display.activity import touched

_PATIENCE = 5.0
"""Seconds that a study waits for somebody who does not read what it has to say; after that it waits no more."""
_MAX_WAITING = 1 << 18
"""Bytes that are kept for such a reader."""
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class _Sink:
    """Writes to a file descriptor.

    A strict one writes as any program does: it waits for its reader, and a write that fails ends the command. Any other
    waits for nobody for long, and never fails.

    Attributes:
        lost: why something was not written; None where all was, or nobody was there any more.
        gone: nobody is, so nothing more is tried.
    """

    def __init__(self, descriptor: int, *, strict: bool) -> None:
        self.descriptor, self.strict = descriptor, strict
        self.lost: OSError | None = None
        self.gone = self._ended = self._stalled = self._at_work = False
        self._is_terminal = os.isatty(descriptor)
        self._changed = threading.Condition(threading.RLock())
        self._waiting = bytearray()
        self._process: int | None = None
        """The one that has a thread which writes; a child has none."""

    def send(self, data: bytes) -> None:
        """Write bytes; a strict one raises SystemExit where nobody reads it any more, OSError where it cannot write."""
        if self.strict or self._ended or self._process not in (None, os.getpid()):
            self._write(data)
            self._raise()
            return
        with self._changed:
            if len(self._waiting) + len(data) > _MAX_WAITING:
                self.lost = OSError(errno.ETIMEDOUT, "is not read")
                return
            self._waiting += data
            if self._process is None:
                self._process = os.getpid()
                threading.Thread(target=self._work, name="output", daemon=True).start()
            self._changed.notify_all()
            if self._stalled or not self._changed.wait_for(self._done, _PATIENCE):
                self._stalled = not self._done()

    def look(self) -> None:
        """See whether a reader has gone, though there is nothing to write; SystemExit if so, and strict."""
        watch = select.poll()
        watch.register(self.descriptor, 0)
        self.gone = self.gone or any(found & select.POLLERR for _, found in watch.poll(0))
        self._raise()

    def end(self) -> None:
        """Before the process ends: wait for what is left; what comes after it is written as it comes, or not."""
        with self._changed:
            if not self._changed.wait_for(self._done, _PATIENCE):
                self.lost, self.gone = OSError(errno.ETIMEDOUT, "is not read"), True
        self.strict, self._ended = False, True

    def _done(self) -> bool:
        return not self._waiting and not self._at_work

    def _work(self) -> None:
        while True:
            with self._changed:
                self._at_work = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting)
                data = bytes(self._waiting)
                self._waiting.clear()
                self._at_work = True
            self._write(data)
            self._stalled = False

    def _write(self, data: bytes) -> None:
        """All of it, or as much as goes: a full disk may have room another time, but no reader comes back."""
        while data and not self.gone:
            try:
                data = data[os.write(self.descriptor, data) :]
            except BlockingIOError:  # somebody it is shared with made it so
                select.select([], [self.descriptor], [], _PATIENCE)
            except OSError as error:
                self.gone = error.errno in _GONE or (error.errno == errno.EIO and self._is_terminal)
                self.lost = self.lost if self.gone else error
                return

    def _raise(self) -> None:
        if self.strict and self.gone:
            raise SystemExit(0)
        if self.strict and self.lost is not None:
            lost, self.lost = self.lost, None  # it is said once
            raise OSError(lost.errno, lost.strerror, "standard output")


class Output(io.TextIOBase):
    """Takes a standard stream's place; `strict`: see `_Sink`; `trusted`: its text may steer the terminal."""

    def __init__(self, stream: TextIO, *, strict: bool = False, trusted: bool = False) -> None:
        self._stream, self._trusted = stream, trusted
        self._encoder = codecs.getincrementalencoder(stream.encoding or "utf-8")("replace")
        self.sink: _Sink | None = None
        with suppress(OSError, ValueError):  # a test's or a notebook's has no file
            self.sink = _Sink(stream.fileno(), strict=strict)

    def for_terminal(self) -> Output:
        """The same stream for what draws on a terminal and makes harmless itself what it is given."""
        twin = Output(self._stream, trusted=True)
        twin.sink, twin._encoder = self.sink, self._encoder
        return twin

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return self._stream.encoding or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """What becomes of letters it has not."""
        return "replace"

    def writable(self) -> bool:
        """Always."""
        return True

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Its number."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write a text; see `_Sink.send`."""
        if not isinstance(text, str):
            raise TypeError(f"a text is written, not {type(text).__name__}")
        shown = text if self._trusted else harmless(text)
        touched(shown)
        if self.sink is None:
            self._stream.write(shown)
        else:
            self.sink.send(self._encoder.encode(shown))
        return len(text)

    def flush(self) -> None:
        """Nothing waits, but for a reader that may have gone."""
        if self.sink is None:
            self._stream.flush()
        elif self.sink.strict:
            self.sink.look()


def harmless(text: str) -> str:
    """A text of any number of lines without what steers a terminal."""
    if text.isprintable():
        return text
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in _COLOURS.sub("", text).split("\n"))


def steady_streams() -> None:
    """Make this process's streams so (see this module): standard output strict until `go_on`, standard error never."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The next file to be opened would take its number, and a study's journal what was meant for the screen.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:  # it was closed
            stream = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (as long as the process)
        if not isinstance(stream, Output):
            setattr(sys, name, Output(stream, strict=name == "stdout"))
    logging.raiseExceptions = False  # a log that cannot be written, such as a study's on a full disk, says nothing


def go_on() -> None:
    """Something that matters depends on this process: whatever happens to its output, it goes on."""
    if isinstance(sys.stdout, Output) and sys.stdout.sink is not None:
        sys.stdout.sink.strict = False


def end_streams() -> OSError | None:
    """Before the process ends, write what waits; returns why some of standard output could not be written, if so."""
    lost = None
    for stream in (sys.stderr, sys.stdout):
        if isinstance(stream, Output) and stream.sink is not None:
            stream.sink.end()
            lost = stream.sink.lost
    return lost
