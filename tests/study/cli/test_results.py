"""The commands recommend and serve."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys

import pytest

from analysis.results.parquet import write_parquet
from trainables.results.schema import EPOCH_COLUMNS, SCHEMA_VERSION, TRIAL_COLUMNS


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    rows = [
        {
            "study": "small",
            "trial_id": f"t{i}",
            "setting_id": f"s{i // 3}",
            "seed": i % 3,
            "outcome": "completed",
            "method": "m-ebm",
            "dataset": "digits",
            "sampling_steps": 1 + i // 3,
            "iterations_done": 100,
            "iterations_planned": 100,
            "seconds_per_iteration": 0.36,
            "fd_buffer_best": 1.0 + i // 3 + 0.01 * (i % 3),
            "fd_buffer_protocol": "p",
            "hardware": "NVIDIA T4",
        }
        for i in range(6)
    ]
    write_parquet(rows, TRIAL_COLUMNS, place / "trials.parquet")
    write_parquet([], EPOCH_COLUMNS, place / "epochs.parquet")
    (place / "manifest.json").write_text(json.dumps({"study": "small", "schema_version": SCHEMA_VERSION}))
    return place


def test_recommend_says_what_with_which_evidence(mebm, folder):
    code, out, _ = mebm("recommend", str(folder), "--gpu", "T4", "--hours", "1")
    assert code == 0
    assert out.splitlines()[0] == "run         K 1 (m-ebm on digits)"
    assert "small/t0, small/t1, small/t2" in out
    assert "up to 56% may fail" in out
    assert "36 s for the whole training; measured on NVIDIA T4" in out


def test_recommend_scales_by_known_rates_and_says_so(mebm, folder):
    shown = json.loads(mebm("recommend", str(folder), "--gpu", "H100", "--json")[1])
    assert shown["recommended"]["fields"]["sampling_steps"] == 1
    assert shown["recommended"]["pace"]["source"] == "scaled"
    assert shown["recommended"]["hours"] == pytest.approx(36 * 20 / 400 / 3600)
    assert any("not measured on H100" in w for w in shown["warnings"])
    other = json.loads(mebm("recommend", str(folder), "--gpu", "Nothing 9", "--json")[1])
    assert other["recommended"]["pace"]["source"] == "elsewhere"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["recommend"], "Missing argument"),
        (["recommend", "nowhere"], "nowhere: no such folder"),
        (["recommend", "FOLDER", "--hours", "0"], "--hours"),
        (["recommend", "FOLDER", "--metric", "fid_buffer"], "no trial has a 'fid_buffer'"),
        (["recommend", "FOLDER", "--dataset", "cifar10"], "no trial on data set 'cifar10'"),
        (["serve", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(mebm, folder, arguments, expected):
    code, _, err = mebm(*(str(folder) if a == "FOLDER" else a for a in arguments))
    assert code == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1


def test_a_taken_port_is_a_mistake(mebm, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = mebm("serve", str(folder), "--port", str(taken.getsockname()[1]))
    assert code == 2
    assert "--port" in err


def test_serve_shows_the_report_until_it_is_interrupted(folder):
    before = sorted(p.name for p in folder.iterdir())
    command = [sys.executable, "-m", "study.cli", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            while said and "http://" not in said:
                said += process.stdout.readline()
            port = re.search(r"http://127\.0\.0\.1:\s*(\d+)", said)
            assert port is not None, said
            connection = http.client.HTTPConnection("127.0.0.1", int(port[1]))
            connection.request("GET", "/")
            assert "Stability report: small" in connection.getresponse().read().decode()
            connection.close()
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert sorted(p.name for p in folder.iterdir()) == before
