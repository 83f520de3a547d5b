"""Stores for tests of every package: fsspec's in memory, and a local server that speaks S3."""

from __future__ import annotations

import io
import logging
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout

import pytest

PROCESSES = 2


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in two processes, a file in one of them; what the command line names, in this one."""
    option, parts = config.option, config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    if parts or hasattr(config, "workerinput") or getattr(option, "numprocesses", 0) is not None:
        return
    watched = option.usepdb or option.trace or option.capture == "no"
    if not watched and len(os.sched_getaffinity(0)) >= PROCESSES:
        option.numprocesses, option.dist = PROCESSES, "loadfile"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # or each of them takes every core


@pytest.fixture(scope="module", autouse=True)
def _nobodys_code() -> None:
    """What a file's tests have named and allowed is not known to those of the next."""
    from trainables.plugins.reference import trust_code, use

    use(None)
    trust_code(False)


class S3Server:
    """A server of this process; what it holds outlives a stop."""

    def __init__(self) -> None:
        moto = pytest.importorskip("moto.server")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._make = moto.ThreadedMotoServer
        self._server = self._make(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def bucket(self) -> str:
        """URL of a new bucket."""
        from pyarrow import fs

        name = f"bucket-{uuid.uuid4().hex[:8]}"
        url = f"s3://{name}?endpoint_override=127.0.0.1:{self.port}&scheme=http&allow_bucket_creation=true"
        fs.FileSystem.from_uri(url)[0].create_dir(name)
        return url

    def stop(self) -> None:
        self._server.stop()

    def start(self) -> None:
        self._server = self._make(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "an-access-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = S3Server()
        yield server
        server.stop()


@pytest.fixture
def memory_url() -> str:
    """A URL of an empty place in memory."""
    return f"memory://{uuid.uuid4().hex}/studies"


@pytest.fixture(params=["memory", "s3", "path"])
def store_place(request: pytest.FixtureRequest, tmp_path) -> str:
    """URL (or path) of an empty place, once per kind of store."""
    if request.param == "path":
        return str(tmp_path / "store" / "studies")
    if request.param == "memory":
        return str(request.getfixturevalue("memory_url"))
    url = request.getfixturevalue("s3").bucket()
    return url.replace("?", "/studies?")


@pytest.fixture(params=["memory", "s3"])
def store_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty place, once per kind of store."""
    if request.param == "memory":
        return str(request.getfixturevalue("memory_url"))
    return request.getfixturevalue("s3").bucket().replace("?", "/studies?")


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """The environment, put back as it was."""
    before = dict(os.environ)
    yield os.environ  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(before)


class Faults:
    """A store's file system that fails when told to.

    Attributes:
        away: every call fails.
        writes: writing fails after so many more bytes; None: it does not.
        calls: calls so far.
    """

    def __init__(self) -> None:
        self.away, self.writes, self.calls = False, None, 0

    def check(self) -> None:
        self.calls += 1
        if self.away:
            raise ConnectionError("no route to host; user=joe password=open-sesame")


@pytest.fixture
def breakable():
    """`breakable(url)` gives a `Store` of the URL and its `Faults`."""

    def make(url: str):
        import pyarrow as pa
        from pyarrow import fs

        from trainables.results.store import Store, open_filesystem

        faults, (inner, root) = Faults(), open_filesystem(url)

        class Handler(fs.FSSpecHandler):
            def open_output_stream(self, path, metadata):
                faults.check()
                return pa.PythonFile(Stream(super().open_output_stream(path, metadata)), mode="w")

        class Stream:
            closed = False

            def __init__(self, stream):
                self.stream = stream

            def write(self, data):
                data = bytes(data)
                if faults.writes is not None:
                    part = data[: faults.writes]
                    self.stream.write(part)
                    faults.writes -= len(part)
                    if len(part) < len(data):
                        raise ConnectionError("the connection was reset")
                    return len(data)
                return self.stream.write(data)

            def flush(self):
                self.stream.flush()

            def close(self):
                self.closed = True
                self.stream.close()

        for name in ("get_file_info", "get_file_info_selector", "open_input_file", "open_input_stream", "move",
                     "delete_file", "create_dir"):  # fmt: skip

            def checked(self, *arguments, _name=name):
                faults.check()
                return getattr(fs.FSSpecHandler, _name)(self, *arguments)

            setattr(Handler, name, checked)
        store = Store(url)
        store.__dict__["_opened"] = (fs.PyFileSystem(Handler(inner.handler.fs)), root)
        return store, faults

    return make


@pytest.fixture(scope="session")
def run_mebm():
    """Calls the command line (or another command) in this process; returns exit code, standard output and standard error."""

    def call(*arguments, command=None):
        from study.cli.main import cli, main

        out, err, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["mebm", *map(str, arguments)])
            try:
                main(command or cli)
            except SystemExit as stop:
                code = stop.code or 0
        return code, out.getvalue(), err.getvalue()

    return call


@pytest.fixture
def mebm(run_mebm):
    """The command line; see `run_mebm`."""
    return run_mebm
