"""`mebm serve`: the report of a study that runs."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import click

from study.cli.options import PATH, argument, option
from study.config.errors import UserError
from study.display.activity import held
from study.display.console import StudyConsole


@dataclass(frozen=True)
class Serve:
    """Show the report of the study in DIR while it runs, at http://127.0.0.1:PORT, for this machine alone.

    \b
    Examples:
      mebm serve results/NAME
      ssh -L 8642:127.0.0.1:8642 HOST     and the same page in a browser here

    The page follows the study's files: it is rebuilt after every epoch. Nothing is written. Ctrl-C ends it.
    """

    folder: Path = argument(type=PATH, metavar="DIR")
    port: int = option("Port on 127.0.0.1; 0: any free one.", type=click.IntRange(0, 65535), default=8642)

    def __call__(self) -> None:
        from analysis.report.server import LiveReport, make_server
        from analysis.results.load import load

        load(self.folder)  # a folder without a study is a mistake to name now, not in the browser
        report = LiveReport(self.folder)
        try:
            server = make_server(report, self.port)
        except OSError as error:
            raise UserError(f"--port {self.port}: {error.strerror or error}") from error
        StudyConsole().line(f"report of {self.folder} at http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)")
        with server:
            # A shell starts what runs in the background with SIGINT ignored; an interrupt is how this ends.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with held():
                server.serve_forever()
