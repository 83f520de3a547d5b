"""Troubles while a study runs: it drains, hangs, loses workers, meets bugs and full disks, and its budget ends.

Every study here is its own process, as a user starts it, and ends with the numbers of one that met no trouble.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from study.record.ledger import Ledger
from study.search.storage import storage_url
from trainables.methods.presets import build_trial
from trainables.results.layout import JOURNAL
from trainables.results.schema import Outcome
from trainables.trial.checkpoint import STATE_FILE, verify_checkpoint

needs_ray = [pytest.mark.ray, pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(1800)]

LONG = {
    "name": "long",
    "trial": {
        "dataset": "digits",
        "norm": "batch",
        "epochs": 40,
        "iterations_per_epoch": 10,
        "evaluation": {"every": 10, "fresh_steps": 2},
        "batch_size": 16,
        "buffer_size": 1000,
    },
    "search": {"sampler": "grid", "grid": [{"sampling_steps": [1, 2, 3]}]},
    "seeds": [0],
    "run": {"checkpoint_seconds": 0},
}
CLOCKS = ["seconds", "train_seconds", "evaluation_seconds", "reported_at", "attempt"]
WAIT = 500
"""Seconds; a machine that does much else at the same time may need them."""

FAULTS = '''
"""Troubles in the processes that import this, for as long as a file of that name is in the folder."""
import importlib.abc
import importlib.machinery
import os
import sys
import time

FOLDER = os.environ["TROUBLES"]


def on(name):
    return os.path.exists(os.path.join(FOLDER, name))


class Loader(importlib.abc.Loader):
    def __init__(self, inner):
        self.inner = inner

    def create_module(self, spec):
        return self.inner.create_module(spec)

    def exec_module(self, module):
        self.inner.exec_module(module)
        step, save = module.MebmTrainable._step, module.write_checkpoint

        def troubled_step(self):
            if on("slow"):
                time.sleep(0.5)
            if on("hungry") and self._trial.config.sampling_steps == 2 and self._trial.trainer.epoch >= 3:
                held = bytearray(b"x") * 4_000_000_000
                time.sleep(60)
                del held
            if on("bug") and self._trial.config.sampling_steps == 2 and self._trial.trainer.epoch >= 3:
                raise ValueError("a bug of this trial")
            return step(self)

        def troubled_save(folder, state):
            if on("full") and '"sampling_steps":3' in state["config"].replace(" ", ""):
                raise OSError(28, "No space left on device")
            save(folder, state)

        module.MebmTrainable._step, module.write_checkpoint = troubled_step, troubled_save


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "trainables.trial.ray_trainable":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = Loader(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())
'''


def start(*arguments, **environment):
    """`mebm` in its own process, as a user starts it."""
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def finish(process):
    try:
        output, _ = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    return process.returncode, output


def wait_until(found, process, what):
    """Until `found()` is true; returns it."""
    until = time.monotonic() + WAIT
    while time.monotonic() < until:
        if result := found():
            return result
        if process.poll() is not None:
            pytest.fail(f"the study ended before {what}:\n{process.stdout.read()}")
        time.sleep(0.05)
    process.kill()
    return pytest.fail(f"{what} did not happen in time")


def wait_for_events(folder, count, process):
    journal = folder / JOURNAL
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= count, process, f"event {count}")


def events(folder):
    return (folder / JOURNAL).read_bytes().count(b"\n")


def below(root):
    """Process ids of all processes below one, with their command lines."""
    children = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            if stat.rpartition(")")[2].split()[0] != "Z":
                children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, left = {}, [root]
    while left:
        for child in children.get(left.pop(), []):
            left.append(child)
            try:
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
    return found


def workers(root):
    """Process ids of the trials' workers below a process."""
    # While it does a task a worker has the name of the class that Ray wraps around ours.
    names = (b"ray::MebmTrainable", b"ray::ResourceTrainable")
    return [pid for pid, name in below(root).items() if name.startswith(names)]


RAY = {
    "raylet": lambda name: b"/raylet/raylet" in name.split(b"\0")[0],
    "gcs": lambda name: b"gcs_server" in name.split(b"\0")[0],
    "agent": lambda name: name.startswith(b"ray::DashboardAgent"),
}
"""What tells the processes of Ray from each other."""


def ray_process(root, what):
    return next(pid for pid, name in below(root).items() if RAY[what](name))


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def all_gone(pids, seconds=90):
    until = time.monotonic() + seconds
    while (left := [pid for pid in pids if lives(pid)]) and time.monotonic() < until:
        time.sleep(0.2)
    return left == []


def results(folder):
    epochs = pd.read_parquet(folder / "epochs.parquet").drop(columns=CLOCKS)
    return epochs.sort_values(["trial_id", "epoch"], ignore_index=True)


def trials_of(folder):
    return pd.read_parquet(folder / "trials.parquet").set_index("trial_id")


def states(folder):
    return [t.state for t in optuna.load_study(study_name=folder.name, storage=storage_url(folder)).get_trials()]


def assert_like(folder, calm, trial_ids=("t0001", "t0002", "t0003")):
    """The folder's epochs and signals are bit by bit those of the undisturbed study."""
    expected = results(calm / "long")
    expected = expected[expected["trial_id"].isin(trial_ids)].reset_index(drop=True)
    pd.testing.assert_frame_equal(results(folder), expected, check_exact=True)
    for trial_id in trial_ids:
        mine, undisturbed = (pd.read_parquet(f / "signals" / f"{trial_id}.parquet") for f in (folder, calm / "long"))
        pd.testing.assert_frame_equal(mine, undisturbed, check_exact=True)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The study, undisturbed."""
    base = tmp_path_factory.mktemp("calm")
    (base / "long.yaml").write_text(json.dumps(LONG), encoding="utf-8")
    code, output = finish(start("sweep", base / "long.yaml", "--results", base))
    assert code == 0, output
    return base


@pytest.fixture
def troubles(tmp_path):
    """A folder where a file turns a trouble on, and the environment of processes that meet it."""
    folder = tmp_path / "troubles"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FAULTS, encoding="utf-8")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return folder, {"TROUBLES": str(folder), "PYTHONPATH": path}


class TestDriver:
    pytestmark = needs_ray

    def test_sigusr1_lets_trials_finish_their_epoch_and_nothing_is_trained_twice(self, calm, tmp_path):
        folder = tmp_path / "long"
        process = start("sweep", calm / "long.yaml", "--results", tmp_path)
        wait_for_events(folder, 30, process)
        process.send_signal(signal.SIGUSR1)
        code, output = finish(process)
        assert code == 130, output
        assert "Traceback" not in output
        assert f"mebm resume {folder}" in output
        assert TrialState.RUNNING not in states(folder)
        trials = trials_of(folder)
        assert "interrupted" in set(trials["outcome"])
        assert set(trials["outcome"]) <= {"interrupted", "completed"}
        ledger = Ledger(folder, "long", writable=False)
        for trial_id in ledger.unfinished():
            newest = ledger.checkpoint_folders(trial_id)[0]
            verify_checkpoint(Path(newest))
        code, output = finish(start("resume", folder))
        assert code == 0, output
        assert "repaired" not in output
        assert_like(folder, calm)
        trials = trials_of(folder)
        assert set(trials["outcome"]) == {"completed"}
        assert set(trials["replayed_seconds"]) == {0.0}
        attempts = pd.read_parquet(folder / "attempts.parquet")
        assert set(attempts["ended"]) == {"interrupted", "finished"}
        second = attempts[attempts["attempt"] == 2]
        assert len(second)
        assert all(second["first_epoch"] >= 0)

    def test_a_checkpoint_damaged_by_a_crash_gives_way_to_the_one_before(self, calm, tmp_path):
        folder = tmp_path / "long"
        process = start("sweep", calm / "long.yaml", "--results", tmp_path)

        def two_checkpoints():
            if not (folder / JOURNAL).exists():
                return None
            text = (folder / JOURNAL).read_text()
            return text.count('"event": "checkpoint", "trial_id": "t0001"') >= 3

        wait_until(two_checkpoints, process, "a third checkpoint")
        process.kill()
        finish(process)
        ledger = Ledger(folder, "long", writable=False)
        assert "t0001" in ledger.unfinished()
        newest, older = (Path(f) for f in ledger.checkpoint_folders("t0001"))
        time.sleep(2)  # the worker may be in the middle of one that no line of the journal names
        verify_checkpoint(older)
        with (newest / STATE_FILE).open("r+b") as file:
            file.truncate(1000)
        code, output = finish(start("resume", folder))
        assert code == 0, output
        assert f"repaired: t0001: {newest / STATE_FILE}: 1000 bytes, but" in output
        assert "it goes on from the one before it" in output
        assert_like(folder, calm)
        assert set(trials_of(folder)["outcome"]) == {"completed"}
        assert TrialState.RUNNING not in states(folder)


class TestWorkers:
    pytestmark = needs_ray

    def test_a_hanging_worker_is_killed_and_its_trial_completes(self, calm, tmp_path):
        folder = tmp_path / "long"
        process = start("sweep", calm / "long.yaml", "--results", tmp_path, "--set", "run.hang_minutes=0.2")
        wait_for_events(folder, 20, process)
        stopped = wait_until(lambda: workers(process.pid), process, "a worker")[0]
        os.kill(stopped, signal.SIGSTOP)
        try:
            code, output = finish(process)
        finally:
            try:
                os.kill(stopped, signal.SIGKILL)
            except ProcessLookupError:
                stopped = None
        assert code == 0, output
        assert stopped is None, "the hanging process outlived its study"
        assert_like(folder, calm)
        assert set(trials_of(folder)["outcome"]) == {"completed"}
        attempts = pd.read_parquet(folder / "attempts.parquet")
        lost = attempts[attempts["ended"] == "failed"]
        assert len(lost) == 1
        assert lost["reason"].item().startswith("no sign of life for 0.2")
        assert lost["lost_seconds"].item() > 0

    def test_lost_workers_do_not_use_up_a_trials_restarts(self, calm, tmp_path):
        folder = tmp_path / "long"
        process = start(
            "sweep", calm / "long.yaml", "--results", tmp_path,
            "--set", "run.max_failures=1", "--set", "search.grid=[{sampling_steps: 1}]",
        )  # fmt: skip
        for losses in range(3):
            text = f'"attempt": {losses + 1}'
            wait_until(lambda: (folder / JOURNAL).exists() and text in (folder / JOURNAL).read_text(), process, text)  # noqa: B023
            wait_for_events(folder, events(folder) + 4, process)
            os.kill(wait_until(lambda: workers(process.pid), process, "a worker")[0], signal.SIGKILL)
        code, output = finish(process)
        assert code == 0, output
        trial = trials_of(folder).loc["t0001"]
        assert (trial["outcome"], trial["attempts"]) == ("completed", 4)
        attempts = pd.read_parquet(folder / "attempts.parquet")
        assert list(attempts["ended"]) == ["failed"] * 3 + ["finished"]
        assert all(attempts["reason"].iloc[:3].notna())
        assert_like(folder, calm, ["t0001"])

    def test_a_bug_fails_at_once_a_full_disk_after_its_restarts_and_the_rest_goes_on(self, calm, tmp_path, troubles):
        switches, environment = troubles
        folder = tmp_path / "long"
        for name in ("bug", "full"):
            (switches / name).touch()
        code, output = finish(start("sweep", calm / "long.yaml", "--results", tmp_path, **environment))
        assert code == 1, output
        assert "2 trial(s) failed" in output
        trials = trials_of(folder)
        assert dict(trials["outcome"]) == {"t0001": "completed", "t0002": "failed", "t0003": "failed"}
        assert trials.loc["t0002", "message"] == "ValueError: a bug of this trial"
        assert trials.loc["t0002", "attempts"] == 1
        assert "No space left on device" in trials.loc["t0003", "message"]
        assert trials.loc["t0003", "attempts"] == 3  # run.max_failures is 2
        assert sorted(s.name for s in states(folder)) == ["COMPLETE", "FAIL", "FAIL"]
        attempts = pd.read_parquet(folder / "attempts.parquet")
        full = attempts[attempts["trial_id"] == "t0003"]
        assert all("No space left" in reason for reason in full["reason"])

        for name in ("bug", "full"):
            (switches / name).unlink()
        before = events(folder)
        code, output = finish(start("resume", folder, **environment))
        assert code == 1, output
        assert events(folder) == before  # what failed stays so until it is asked for
        code, output = finish(start("resume", folder, "--retry-failed", **environment))
        assert code == 0, output
        assert_like(folder, calm)
        trials = trials_of(folder)
        assert set(trials["outcome"]) == {"completed"}
        assert trials["message"].isna().all()
        assert states(folder).count(TrialState.COMPLETE) == 3


class TestRay:
    """Ray itself is lost or stands still: the study ends, says so in its own line, and is resumed exactly."""

    pytestmark = needs_ray

    @pytest.mark.parametrize(
        ("what", "number", "reason"),
        [
            ("raylet", signal.SIGKILL, "Ray's process raylet ended (signal 9)"),
            ("gcs", signal.SIGKILL, "Ray's process gcs_server ended (signal 9)"),
            ("agent", signal.SIGKILL, "Ray's process raylet ended"),
            ("raylet", signal.SIGSTOP, "the Ray node that the driver belongs to was lost"),
            ("gcs", signal.SIGSTOP, "Ray has given no answer for 70 s"),
        ],
    )
    def test_a_lost_ray_ends_the_study_which_resumes_exactly(self, calm, tmp_path, troubles, what, number, reason):
        switches, environment = troubles
        (switches / "slow").touch()  # so that it is not over before
        folder = tmp_path / "long"
        process = start("sweep", calm / "long.yaml", "--results", tmp_path, **environment)
        wait_for_events(folder, 12, process)
        others = list(below(process.pid))
        os.kill(ray_process(process.pid, what), number)
        struck = time.monotonic()
        code, output = finish(process)
        took = time.monotonic() - struck
        assert code == 1, output
        assert took < 240, "it waits for a Ray that is not there"  # two minutes, on a machine that does nothing else
        last = output.splitlines()[-1]
        assert last.startswith(f"mebm: {folder}: {reason}"), output
        assert last.endswith(f"; see study.log, then: mebm resume {folder}")
        assert all(word not in output for word in ("Traceback", "(raylet)", "GCS may", "\x1b"))
        assert reason in (folder / "study.log").read_text()
        assert all_gone(others), "processes of Ray outlive the study"
        _, output = finish(start("status", folder))
        assert f"not running; mebm resume {folder}" in output
        assert "running" not in set(trials_of(folder)["outcome"])
        assert TrialState.RUNNING not in states(folder)
        (switches / "slow").unlink()
        code, output = finish(start("resume", folder, **environment))
        assert code == 0, output
        assert_like(folder, calm)
        assert set(trials_of(folder)["outcome"]) == {"completed"}
        assert states(folder).count(TrialState.COMPLETE) == 3

    def test_a_driver_that_was_stopped_blames_nobody_for_it(self, calm, tmp_path):
        folder = tmp_path / "long"
        process = start("sweep", calm / "long.yaml", "--results", tmp_path, "--set", "run.hang_minutes=1")
        wait_for_events(folder, 12, process)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(90)  # longer than any trial may be silent, and than Ray may give no answer
        os.kill(process.pid, signal.SIGCONT)
        code, output = finish(process)
        assert code == 0, output
        assert_like(folder, calm)
        assert list(pd.read_parquet(folder / "attempts.parquet")["ended"]) == ["finished"] * 3

    def test_the_only_node_of_a_cluster_is_waited_for_and_not_for_ever(self, calm, tmp_path, troubles, monkeypatch):
        """A head that runs no trials, and one node that does."""
        from ray.cluster_utils import Cluster

        switches, environment = troubles
        (switches / "slow").touch()
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        folder = tmp_path / "long"
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            node = cluster.add_node(num_cpus=2)
            place = ("--address", cluster.address)
            process = start("sweep", calm / "long.yaml", "--results", tmp_path, *place)
            wait_for_events(folder, 12, process)
            cluster.remove_node(node, allow_graceful=False)
            time.sleep(20)
            assert process.poll() is None, process.stdout.read()
            node = cluster.add_node(num_cpus=2)
            wait_for_events(folder, events(folder) + 8, process)  # it goes on
            cluster.remove_node(node, allow_graceful=False)
            struck = time.monotonic()
            code, output = finish(process)
            assert code == 1, output
            assert time.monotonic() - struck < 240
            assert "for 45 s no Ray node could run a trial (1 CPU)" in output.splitlines()[-1]
            (switches / "slow").unlink()
            cluster.add_node(num_cpus=2)
            code, output = finish(start("resume", folder, *place))
            assert code == 0, output
            assert_like(folder, calm)
        finally:
            cluster.shutdown()


HOG = """
import sys, time
held = bytearray(b"x") * int(sys.argv[1])
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


class TestMemory:
    pytestmark = needs_ray

    def test_workers_that_are_killed_under_memory_pressure_go_on_from_their_checkpoints(self, calm, tmp_path):
        """Another program takes memory, twice: Ray's monitor kills workers, and fewer run at once the second time."""
        known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (1024 * int(known[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
        if free < 10e9:
            pytest.skip("needs 10 GB of free memory")
        folder = tmp_path / "long"
        environment = {
            "RAY_memory_usage_threshold": f"{(total - free + 4e9) / total:.3f}",
            "RAY_memory_monitor_refresh_ms": "100",
        }
        process = start("sweep", calm / "long.yaml", "--results", tmp_path, **environment)
        for _ in range(2):
            wait_for_events(folder, (events(folder) if (folder / JOURNAL).exists() else 0) + 12, process)
            lost = (folder / JOURNAL).read_text().count('{"event": "lost"')
            hog = subprocess.Popen([sys.executable, "-c", HOG, "6_000_000_000", "600"], stdout=subprocess.PIPE)
            try:
                hog.stdout.readline()
                wait_until(
                    lambda n=lost: (folder / JOURNAL).read_text().count('{"event": "lost"') > n, process, "a kill"
                )
            finally:
                hog.kill()
                hog.wait()
        code, output = finish(process)
        assert code == 0, output
        assert_like(folder, calm)
        assert set(trials_of(folder)["outcome"]) == {"completed"}
        attempts = pd.read_parquet(folder / "attempts.parquet")
        reasons = attempts[attempts["ended"] == "failed"]["reason"]
        assert len(reasons) >= 2
        assert all(reason.startswith("killed under memory pressure: ") for reason in reasons), list(reasons)
        assert "memory runs short: at most 1 trial(s) at once from now on" in output

    def test_a_trial_that_uses_more_than_it_may_fails_and_the_others_do_not(self, calm, tmp_path, troubles):
        switches, environment = troubles
        (switches / "hungry").touch()
        folder = tmp_path / "long"
        limit = ("--set", "resources.memory_gb=2.5")
        code, output = finish(start("sweep", calm / "long.yaml", "--results", tmp_path, *limit, **environment))
        assert code == 1, output
        trials = trials_of(folder)
        assert dict(trials["outcome"]) == {"t0001": "completed", "t0002": "failed", "t0003": "completed"}
        said = trials.loc["t0002", "message"]
        assert said.startswith("used ") and said.endswith(
            " GB of the host's memory, more than resources.memory_gb = 2.5"
        )
        assert trials.loc["t0002", "attempts"] == 3  # run.max_failures is 2
        (switches / "hungry").unlink()
        code, output = finish(start("resume", folder, "--retry-failed", **environment))
        assert code == 0, output
        assert_like(folder, calm)


class TestBudget:
    pytestmark = needs_ray

    def test_every_budget_ends_a_study_and_a_larger_one_completes_it(self, calm, tmp_path, troubles, monkeypatch):
        """On a cluster with one logical GPU, so that trials come one after the other."""
        from ray.cluster_utils import Cluster

        switches, environment = troubles
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        folder = tmp_path / "long"
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False}
        )

        def resume(*changes):
            options = [part for change in changes for part in ("--set", change)]
            return finish(start("resume", folder, "--address", cluster.address, *options))

        try:
            (switches / "slow").touch()  # no trial is over before the budget is
            code, output = finish(
                start(
                    "sweep", calm / "long.yaml", "--results", tmp_path, "--address", cluster.address,
                    "--set", "resources.gpus=1", "--set", "budget.gpu_hours=0.0025",
                )
            )  # fmt: skip
            assert code == 0, output
            assert "budget of 0.0025 GPU-hours is spent" in output
            self._stopped(folder, ["t0001"])

            code, output = resume()
            assert code == 0, output  # nothing may start, and it is said
            assert "budget of 0.0025 GPU-hours is spent" in output

            (switches / "slow").unlink()
            code, output = resume("budget.gpu_hours=null", "budget.trials=2")
            assert code == 0, output
            assert dict(trials_of(folder)["outcome"]) == {"t0001": "completed", "t0002": "completed"}
            assert TrialState.RUNNING not in states(folder)

            (switches / "slow").touch()
            deadline = datetime.now(UTC) + timedelta(seconds=25)
            code, output = resume("budget.trials=null", f"budget.deadline='{deadline.isoformat()}'")
            assert code == 0, output
            assert "deadline" in output
            trials = trials_of(folder)
            assert set(trials.index) - {"t0003"} == {"t0001", "t0002"}
            self._stopped(folder, set(trials.index) & {"t0003"})

            (switches / "slow").unlink()
            code, output = resume("budget.deadline=null")
            assert code == 0, output
            assert_like(folder, calm)
            assert set(trials_of(folder)["outcome"]) == {"completed"}
            assert states(folder).count(TrialState.COMPLETE) == 3
            assert TrialState.RUNNING not in states(folder)
        finally:
            cluster.shutdown()

    @staticmethod
    def _stopped(folder, trial_ids):
        trials, ledger = trials_of(folder), Ledger(folder, "long", writable=False)
        assert TrialState.RUNNING not in states(folder)
        for trial_id in trial_ids:
            assert trials.loc[trial_id, "outcome"] == "stopped"
            assert "the study's" in trials.loc[trial_id, "message"]
            if trials.loc[trial_id, "epochs_done"] > 1:
                verify_checkpoint(Path(ledger.checkpoint_folders(trial_id)[0]))


# ------------------------------------------------------------------------------------------- the journal's own disk


class Disk(io.RawIOBase):
    """A file on a disk that is full for a while: writes fail or are cut short, and then truncating may fail too."""

    def __init__(self, file):
        self.file, self.room, self.truncates = file, None, True

    def write(self, data):
        if self.room is None:
            return self.file.write(data)
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = self.file.write(data[: self.room])
        self.room -= done
        return done

    def truncate(self, size=None):
        if not self.truncates:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self.file.truncate(size)

    def fileno(self):
        return self.file.fileno()

    def close(self):
        self.file.close()


CONFIG = build_trial({"dataset": "digits"})


def row(epoch):
    return {"epoch": epoch, "iteration": 10 * epoch, "train_seconds": 1.0, "evaluation_seconds": 0.5}


def running(**values):
    return {"outcome": "running", "train_seconds": 2.0, "evaluation_seconds": 1.0, "epochs_done": 0, **values}


def on_a_disk(folder):
    ledger = Ledger(folder, "s")
    disk = Disk(ledger._file)
    ledger._file = disk
    ledger.start("t0001", CONFIG, "abcd", 0.0)
    ledger.report("t0001", row(0), running())
    return ledger, disk


@pytest.mark.parametrize("room", [0, 1, 60])
def test_a_full_disk_loses_no_event_and_leaves_the_journal_whole(tmp_path, room):
    ledger, disk = on_a_disk(tmp_path)
    whole = (tmp_path / JOURNAL).read_bytes()
    disk.room = room
    ledger.report("t0001", row(1), running())
    assert ledger.trouble is not None and ledger.trouble.errno == errno.ENOSPC
    assert (tmp_path / JOURNAL).read_bytes() == whole  # no half a line, for whoever reads it now
    disk.room = 0
    ledger.report("t0001", row(2), running())
    ledger.end("t0001", Outcome.STOPPED, "the budget")
    assert [r["epoch"] for r in ledger.rows("t0001")] == [0, 1, 2]
    assert (tmp_path / JOURNAL).read_bytes() == whole
    disk.room = None
    assert ledger.flush()
    assert ledger.trouble is None
    again = Ledger(tmp_path, "s", writable=False)
    assert [r["epoch"] for r in again.rows("t0001")] == [0, 1, 2]
    assert again.outcome("t0001") is Outcome.STOPPED
    assert again.trials == ledger.trials


def test_a_line_that_could_not_be_cut_off_again_does_not_spoil_the_next(tmp_path):
    """A disk, or a server, that fails for good for a moment: half a line stays until it can be cut off."""
    ledger, disk = on_a_disk(tmp_path)
    disk.room, disk.truncates = 20, False
    ledger.report("t0001", row(1), running())
    assert ledger.trouble is not None
    disk.room, disk.truncates = None, True
    ledger.report("t0001", row(2), running())
    assert ledger.trouble is None
    again = Ledger(tmp_path, "s", writable=False)
    assert [r["epoch"] for r in again.rows("t0001")] == [0, 1, 2]


def test_events_that_never_reach_the_disk_are_said_at_the_end(tmp_path):
    from study.config.errors import RunError

    ledger, disk = on_a_disk(tmp_path)
    disk.room = 0
    ledger.report("t0001", row(1), running())
    with pytest.raises(RunError, match="the last 1 events could not be written"):
        ledger.close()
    again = Ledger(tmp_path, "s")  # what is there is whole
    assert [r["epoch"] for r in again.rows("t0001")] == [0]
    again.close()


def test_tables_that_cannot_be_written_are_written_later(tmp_path, monkeypatch):
    from study.record import ledger as module

    ledger, _ = on_a_disk(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as away:
        away.setattr(module, "write_table", full)
        ledger.snapshot(force=True)
        ledger.report("t0001", row(1), running())
    ledger.close()
    assert list(pd.read_parquet(tmp_path / "epochs.parquet")["epoch"]) == [0, 1]
