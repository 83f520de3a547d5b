"""Passwords, keys and tokens: none in a file, a log, a command line or an error."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray
from ray.tune.execution import class_cache
from sqlalchemy import make_url

from study.config.addresses import check_address, filled
from study.config.errors import UserError
from study.config.load import validate_study
from study.record.folder import change_since
from study.run.launch import _log_file
from study.run.ray_private import forward_no_keys

SECRET = "hunter2pw"
IN_ADDRESSES = [
    "postgresql://u:hunter2pw@h/db",
    "postgresql://u:a?hunter2pw@h/db",
    "postgresql://u:hunter2pw/b@h/db",
    "postgresql://u:hunter2pw#b@h/db",
    "postgresql://u:a b hunter2pw@h/db",
    "postgresql://u:a\nhunter2pw@h/db",
    "postgresql://a:b:hunter2pw@h/db",
    "postgresql://u:@hunter2pw@h/db",
    "postgresql://u%3Ahunter2pw@h/db",
    "postgresql://u:hunter2pw",
    "postgresql://u:hunter2pw@${HOST}/db",
    "postgresql://u:hunter2pw${PW}@h/db",
    "postgresql://u:${PW}hunter2pw@h/db",
    "postgresql://u:${PW:-hunter2pw}@h/db",
    "postgresql://h/db?password=hunter2pw",
    "postgresql://h/db?user=u&PassWord=hunter2pw",
    "postgresql://h/db?pass%77ord=hunter2pw",
    "postgresql://h/db?%20password=hunter2pw",
    "postgresql://h/db?sslpassword=hunter2pw",
    "postgresql://h/db?sslkey=hunter2pw",
    "postgresql://h/db?options=-c%20my.pw%3Dhunter2pw",
    "postgresql://h/db?application_name=postgresql://u:hunter2pw@h",
    "postgresql://h/db?dbname=host%3Dh+password%3Dhunter2pw",
    "postgresql://h/db?sslmode=require&;password=hunter2pw",
    "postgresql://h/db??password=hunter2pw",
    "postgresql://h/db;password=hunter2pw",
    "postgresql://h/db#password=hunter2pw",
    "mysql+pymysql://u@h/db?passwd=hunter2pw",
    "mysql+pymysql://u@h/db?ssl_key_password=hunter2pw",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3D%7Bx%7D%3BPWD%3Dhunter2pw",
    "u:hunter2pw@h/db",
    "postgresql:u:hunter2pw@h/db",
    " postgresql://u:hunter2pw@h/db",
]
WITHOUT = [
    "${MEBM_TEST_ALL}",
    "sqlite:////data/a b/shared.db?timeout=60",
    "sqlite:///shared.db",
    "postgresql+psycopg://joe:${MEBM_TEST_PW}@h:5432/db?sslmode=require&connect_timeout=3",
    "postgresql://${MEBM_TEST_PW}:${MEBM_TEST_PW}@[::1]:5432/db",
    "postgresql://h/db?password=${MEBM_TEST_PW}",
    "postgresql://h/db?host=a:5432&host=b:5432&target_session_attrs=read-write",
    "mysql+pymysql://joe@h/db?charset=utf8mb4&read_default_file=/home/joe/.my.cnf",
]


@pytest.mark.parametrize("address", IN_ADDRESSES)
def test_a_secret_in_the_address_of_a_storage_is_refused_and_not_repeated(address, tiny):
    tiny["search"]["storage"] = address
    with pytest.raises(UserError, match=r"search\.storage: .*\$\{NAME\}") as refused:
        validate_study(tiny, "file")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("value", [[IN_ADDRESSES[0]], {"url": IN_ADDRESSES[1]}, {"password": SECRET}, [SECRET]])
def test_what_is_no_address_is_not_repeated(value, tiny):
    tiny["search"]["storage"] = value
    with pytest.raises(UserError, match=r"search\.storage") as refused:
        validate_study(tiny, "file")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("address", WITHOUT)
def test_an_address_without_secrets_is_taken(address, monkeypatch):
    monkeypatch.setenv("MEBM_TEST_PW", "a/b@c?d&e=f:g")
    monkeypatch.setenv("MEBM_TEST_ALL", "postgresql://joe:a%2Fb@h/db")
    check_address(address)
    url = make_url(filled(address))
    if "MEBM_TEST_PW" in address:
        assert "a/b@c?d&e=f:g" in (url.password, url.query.get("password"))


def test_errors_do_not_repeat_a_secret(mebm, write_config, tiny, tmp_path, monkeypatch):
    """Wherever it was written: in a wrong key, on the command line, in an address taken from the environment."""
    good = write_config(tiny, "good.yaml")
    address = "postgresql://u:a?hunter2pw@h/db"
    url = "s3://KEYID:hunter2pw@bucket/x"
    calls = [
        ("sweep", good, "--set", f"search.storage={address}"),
        ("sweep", good, "--set", address),
        ("sweep", good, "--set", f"{address}=1"),
        ("sweep", good, "--set", f"search.storage=[{address}"),
        ("sweep", write_config({**tiny, "search": address}, "a.yaml")),
        ("sweep", write_config({**tiny, address: 1}, "b.yaml")),
        ("sweep", write_config(f"search:\n  storage: '{address}\n", "c.yaml")),
        ("sweep", write_config(f"- {address}\n", "d.yaml")),
        ("sweep", url),
        ("sweep", good, url),
        ("sweep", good, "--results", url),
        ("sweep", good, "--results", "s3://bucket/x?secret_key=hunter2pw"),
        ("sweep", good, "--results", "simplecache::s3://KEYID:hunter2pw@bucket/x"),
        ("resume", url), ("status", url), ("report", url), ("figures", url), ("evaluate", url), ("recommend", url),
        ("serve", url), ("train", url),
    ]  # fmt: skip
    monkeypatch.setenv("MEBM_TEST_PW", SECRET)
    for number, text in enumerate(["${MEBM_TEST_ALL}", "mysql+pymysql://u@127.0.0.1:1/db?passwd=${MEBM_TEST_PW}",
                                   "mysql+pymysql://u@127.0.0.1:1/db?unknown_option=${MEBM_TEST_PW}",
                                   "postgresql+psycopg://u:${MEBM_TEST_PW}@127.0.0.1:1/db"]):  # fmt: skip
        named = {**tiny, "search": {**tiny["search"], "storage": text}}
        calls.append(("sweep", write_config(named, f"named{number}.yaml"), "--results", tmp_path / "results"))
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    for all_of_it in ("postgresql://u:x@h:hunter2pw/db", "hunter2pw"):
        monkeypatch.setenv("MEBM_TEST_ALL", all_of_it)
        for call in calls:
            code, out, err = mebm(*call)
            assert code == 2 and len(err.strip().splitlines()) == 1, (call, err)
            assert "hunter2" not in out + err, (call, err)
        assert {p.name for p in set(tmp_path.rglob("*")) - before} <= {"results"}


def test_differences_between_studies_do_not_repeat_a_secret(tiny):
    began = validate_study(tiny, "file").model_dump(mode="json")
    began["search"]["storage"] = "postgresql://u:hunter2pw@h/db"  # of a version that let it pass
    difference = change_since(began, validate_study(tiny, "file"))
    assert difference is not None and "search.storage" in difference
    assert "hunter2" not in str(UserError(difference))


def test_the_log_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    log, handler = logging.getLogger("mebm"), _log_file(tmp_path)
    log.addHandler(handler)
    try:
        log.warning("refused %s", SECRET)
        try:
            raise OSError(f"cannot open s3://KEY:{SECRET[:-2]}@b with {SECRET}")
        except OSError:
            log.exception("it broke")
    finally:
        log.removeHandler(handler)
        handler.close()
    text = (tmp_path / "study.log").read_text()
    assert "refused ***" in text and "Traceback" in text and "hunter2" not in text


def test_ray_tune_forwards_no_keys(monkeypatch):
    """It does by itself, by name, into its runtime environments; so it was with this version of Ray."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    forward_no_keys()
    actor = class_cache._ActorClassCache().get(type("Trainable", (), {}))
    assert actor._default_options["runtime_env"]["env_vars"], f"Ray {ray.__version__} does it otherwise"
    assert SECRET not in str(actor._default_options)
    words = ("SECRET", "TOKEN", "PASSWORD", "KEY")
    assert not [n for n in class_cache.ENV_VARS_TO_PROPAGATE if any(word in n for word in words)]


CANARIES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "GOOGLE_API_KEY",
    "AZURE_STORAGE_KEY", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "PGPASSWORD", "MYSQL_PWD",
    "MEBM_DATABASE_TOKEN", "MEBM_STORAGE",
)  # fmt: skip


@pytest.fixture
def short_folder():
    """A path of a socket has at most 107 bytes, which are few for Ray below pytest's own folders."""
    with tempfile.TemporaryDirectory(prefix="mebm-") as folder:
        yield Path(folder)


def _canary(name: str) -> str:
    return f"canary-{name.lower()[::-1]}"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_study_leaves_no_secret_in_files_logs_and_command_lines(tiny, write_config, tmp_path, short_folder):
    """Secrets in the environment of a whole `mebm sweep`; looked for in what it, Ray and the cache leave."""
    tiny["search"] = {"sampler": "grid", "grid": [{"initial": "gaussian"}]}
    tiny["seeds"] = [0]
    places = {"MEBM_CACHE": tmp_path / "cache", "RAY_TMPDIR": short_folder / "r", "TMPDIR": tmp_path / "tmp"}
    for folder in places.values():
        folder.mkdir()
    secrets = {name: _canary(name) for name in CANARIES}
    secrets["MEBM_STORAGE"] = f"postgresql://joe:{_canary('MEBM_STORAGE')}@h/db"
    process = subprocess.Popen(
        [Path(sys.executable).with_name("mebm"), "sweep", write_config(tiny), "--results", tmp_path / "results"],
        env={**os.environ, **secrets, **{name: str(path) for name, path in places.items()}, "OMP_NUM_THREADS": "1"},
        stdout=(tmp_path / "out").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    seen, workers = set(), 0
    while process.poll() is None:
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = file.read_bytes()
            except OSError:
                continue
            workers += b"runtime-env" in line
            seen |= {name for name in CANARIES if _canary(name).encode() in line}
        time.sleep(0.1)
    assert process.returncode == 0, (tmp_path / "out").read_text()
    assert workers and not seen
    files = [path for folder in (tmp_path, short_folder) for path in folder.rglob("*") if path.is_file()]
    assert any("runtime_env_agent.log" in path.name for path in files)  # where they were
    found = {(str(p), name) for p in files for name in CANARIES if _canary(name).encode() in p.read_bytes()}
    assert not found
