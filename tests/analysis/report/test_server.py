"""The live report: follows the files, answers this machine alone, keeps the last page where a file is broken."""

import http.client
import json
import socket
import struct
import threading
from contextlib import contextmanager, suppress

import pytest

from analysis.report.server import LiveReport, make_server
from analysis.results.messages import ResultsError


@contextmanager
def serving(folder):
    server = make_server(LiveReport(folder), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(address, path, **headers):
    connection = http.client.HTTPConnection(*address)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


def test_the_page_is_made_anew_when_an_epoch_has_landed_and_only_then(study, row):
    folder = study([row("t1", "running", iterations_done=50)])
    with serving(folder) as address:
        answer, page = get(address, "/")
        assert answer.status == 200
        assert address[0] == "127.0.0.1"
        assert "No trial has ended yet" in page
        version = json.loads(get(address, "/version")[1])["version"]
        assert json.dumps(version) in page
        assert json.loads(get(address, "/version")[1]) == {"version": version, "error": None}
        study([row("t1", fd_buffer_best=1.0), row("t2", "diverged")])
        later = json.loads(get(address, "/version")[1])["version"]
        assert later != version
        page = get(address, "/")[1]
        assert "1 of 2 trials diverged" in page
        assert json.dumps(later) in page


def test_a_broken_file_keeps_the_page_and_is_named(study, row):
    folder = study([row("t1")])
    report = LiveReport(folder)
    page = report.page()
    trials = (folder / "trials.parquet").read_bytes()
    (folder / "trials.parquet").write_bytes(trials[:100])
    assert report.state()["version"] is None
    assert "trials.parquet" in report.state()["error"]
    (folder / "trials.parquet").write_bytes(trials)
    assert report.state()["error"] is None
    assert report.page().count(b'id="live"') == page.count(b'id="live"') == 1


def test_nothing_else_is_served_and_to_no_other_name(study, row):
    with serving(study([row("t1")])) as address:
        for path in ("/trials.parquet", "/../etc/passwd", "/study.yaml"):
            assert get(address, path)[0].status == 404
        assert get(address, "/", Host=f"localhost:{address[1]}")[0].status == 200
        for name in ("example.org", f"example.org:{address[1]}", f"127.0.0.1.example.org:{address[1]}", ""):
            answer, body = get(address, "/", Host=name)
            assert answer.status == 403
            assert "<html" not in body


def test_the_page_may_ask_for_nothing_but_its_version(study, row):
    with serving(study([row("t1")])) as address:
        answer, page = get(address, "/")
    policy = answer.getheader("Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "http" not in policy
    assert page.count('fetch("/version"') == 1
    assert answer.getheader("Cache-Control") == "no-store"


def test_a_folder_without_a_study_is_a_mistake(tmp_path):
    with pytest.raises(ResultsError, match="not a study folder"):
        LiveReport(tmp_path).page()


def test_what_clients_do_to_it_is_not_said_and_stops_nothing(study, row, capfd):
    with serving(study([row("t1")])) as address:
        host = f"Host: {address[0]}:{address[1]}\r\n\r\n".encode()
        idle = [socket.create_connection(address) for _ in range(100)]
        for _ in range(20):  # leave in the middle of the answer, rudely
            client = socket.create_connection(address)
            client.sendall(b"GET / HTTP/1.1\r\n" + host)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        for asked, status in {
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + host: b" 414 ",
            b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n" + host: b" 431 ",
            b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 500 + host: b" 431 ",
            b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n" + host: b" 501 ",
            b"GET http://example.org/ HTTP/1.1\r\n" + host: b" 404 ",
            b"GET / HTTP/1.1\r\n\r\n": b" 403 ",
            b"\x16\x03\x01\x00\xa5\x01\x00\r\n\r\n": b"",
        }.items():
            with socket.create_connection(address, timeout=60) as client, suppress(ConnectionError):
                client.sendall(asked)
                client.shutdown(socket.SHUT_WR)
                assert status in client.recv(200).partition(b"\r\n")[0]
        assert get(address, "/")[0].status == 200
        for client in idle:
            client.close()
    assert capfd.readouterr() == ("", "")
