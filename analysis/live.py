"""The report of a study while it runs: a server for this machine alone that follows the study's files."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from analysis.load import ResultsError, load
from analysis.report import report_html

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
_SCRIPT = """
<p id="live" role="status" aria-live="polite" style="position:fixed;right:.8rem;bottom:.8rem;margin:0;
padding:.3rem .7rem;border-radius:.5rem;background:var(--panel);border:1px solid var(--line);font-size:.85rem">live</p>
<script>
(function () {
  "use strict";
  var shown = VERSION, note = document.getElementById("live"), key = "mebm-open";
  var boxes = Array.prototype.slice.call(document.querySelectorAll("details"));
  try {
    (JSON.parse(sessionStorage.getItem(key)) || []).forEach(function (i) { if (boxes[i]) { boxes[i].open = true; } });
  } catch (error) { /* without a storage the boxes start closed */ }
  function look() {
    fetch("/version", { cache: "no-store" }).then(function (r) { return r.json(); }).then(function (now) {
      note.textContent = now.error ? "waiting: " + now.error : "live";
      if (!now.error && now.version !== shown) {
        var open = boxes.map(function (b, i) { return b.open ? i : -1; }).filter(function (i) { return i >= 0; });
        try { sessionStorage.setItem(key, JSON.stringify(open)); } catch (error) { /* as above */ }
        location.reload();
        return;
      }
      setTimeout(look, EVERY);
    }).catch(function () { note.textContent = "the server has ended"; setTimeout(look, EVERY); });
  }
  setTimeout(look, EVERY);
})();
</script>
"""


class LiveReport:
    """The report of a folder, made anew when its files have changed.

    Args:
        folder: A study's folder, or one that holds studies.
        every_seconds: How often a page looks for changes.
    """

    def __init__(self, folder: Path, every_seconds: float = 3.0) -> None:
        self.folder = Path(folder)
        self.every_seconds = every_seconds
        self._lock = threading.Lock()
        self._made: tuple[str, bytes] | None = None

    def version(self) -> str:
        """A hash of the names, sizes and times of the files the report is made of."""
        found = []
        for pattern in _WATCHED:
            for depth in ("", "*/"):
                for path in self.folder.glob(depth + pattern):
                    try:
                        status = path.stat()
                    except FileNotFoundError:  # replaced this very moment; the next look sees its successor
                        continue
                    found.append(f"{path.relative_to(self.folder)} {status.st_size} {status.st_mtime_ns}")
        return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:16]

    def page(self) -> bytes:
        """The report as it is now.

        Raises:
            ResultsError: The folder holds no study, or a file of it cannot be read.
        """
        with self._lock:
            version = self.version()
            if self._made is None or self._made[0] != version:
                script = _SCRIPT.replace("VERSION", json.dumps(version))
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
        assert self._made is not None
        return {"version": self._made[0], "error": None}


def make_server(report: LiveReport, port: int) -> ThreadingHTTPServer:
    """A server of a report on 127.0.0.1.

    Args:
        report: What to show.
        port: 0 for any free one.

    Raises:
        OSError: The port is taken or not allowed.
    """

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A reader who leaves in the middle of an answer is no error."""
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
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", _POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing: a line per look of a page would bury what matters."""

    return Server((HOST, port), Handler)
