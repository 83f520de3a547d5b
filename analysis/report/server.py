"""The report of a study while it runs: a server for this machine alone that follows the study's files."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from analysis.report.page import report_html, template_text
from analysis.results.load import load
from analysis.results.messages import ResultsError

HOST = "127.0.0.1"
_WATCHED = ("*.parquet", "manifest.json", "samples/*.png", "figures/*")
"""What makes a page old: a new epoch, trial, score, grid or figure. Signals grow between epochs and would too often."""
_CLIENT_SECONDS = 60
"""How long a client may take to ask, and to take its answer: each holds a thread."""
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Everything the page needs is in it; all it may ask for is the version."""
_HEADERS = {"Cache-Control": "no-store", "Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}


class LiveReport:
    """The report of a folder, rebuilt when its files have changed; a page looks for changes every so many seconds."""

    def __init__(self, folder: Path, every_seconds: float = 3.0) -> None:
        self.folder = Path(folder)
        self.every_seconds = every_seconds
        self._lock = threading.Lock()
        self._made: tuple[str, bytes] | None = None

    def version(self) -> str:
        """A hash of the names, sizes and times of the files the report is made of."""
        found = []
        for path in (
            path for pattern in _WATCHED for depth in ("", "*/") for path in self.folder.glob(depth + pattern)
        ):
            with suppress(FileNotFoundError):  # replaced this very moment; the next look sees its successor
                status = path.stat()
                found.append(f"{path.relative_to(self.folder)} {status.st_size} {status.st_mtime_ns}")
        return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:16]

    def page(self) -> bytes:
        """The report as it is now, or a `ResultsError` where the folder holds no study or a file cannot be read."""
        with self._lock:
            version = self.version()
            if self._made is None or self._made[0] != version:
                script = template_text("live.html").replace("VERSION", json.dumps(version))
                script = script.replace("EVERY", str(int(1000 * self.every_seconds)))
                before, end, after = report_html(load(self.folder)).rpartition("</body>")
                self._made = version, f"{before}{script}{end}{after}".encode()
            return self._made[1]

    def state(self) -> dict[str, Any]:
        """What a page asks for: the version of the files, and why they cannot be shown where they cannot."""
        try:
            self.page()
        except (ResultsError, OSError) as error:
            return {"version": None, "error": " ".join(str(error).split())}
        return {"version": self._made and self._made[0], "error": None}


def make_server(report: LiveReport, port: int) -> ThreadingHTTPServer:
    """A server of a report on 127.0.0.1, at any free port for 0; an `OSError` where it is taken or not allowed."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A reader who leaves in the middle of an answer is not an error."""
            if not isinstance(sys.exc_info()[1], ConnectionError):
                super().handle_error(request, client_address)

    class Handler(BaseHTTPRequestHandler):
        server_version = "mebm"
        sys_version = ""
        timeout = _CLIENT_SECONDS

        def do_GET(self) -> None:
            """Answer a request for the page or its version."""
            # A name that only resolves to this machine (DNS rebinding) would let another site's page read the report.
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in (HOST, "localhost"):
                self._answer(403, "text/plain", b"ask for 127.0.0.1\n")
            elif self.path.partition("?")[0] == "/version":
                self._answer(200, "application/json", json.dumps(report.state()).encode())
            elif self.path.partition("?")[0] == "/":
                try:
                    self._answer(200, "text/html", report.page())
                except (ResultsError, OSError) as error:
                    self._answer(503, "text/plain", f"{' '.join(str(error).split())}\n".encode())
            else:
                self._answer(404, "text/plain", b"there is / and /version\n")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            sizes = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
            for name, value in (sizes | _HEADERS).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing: a line per look of a page would bury what matters."""

    return Server((HOST, port), Handler)
