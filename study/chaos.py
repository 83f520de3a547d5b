"""A study under fire: its workers, nodes and driver are killed at seeded moments, and it must end as if they were not.

The study runs twice on a local cluster of several Ray nodes, each with one logical GPU: calmly, and while something is
killed again and again. `mebm` is started as a user starts it and is judged by the files it leaves behind, nothing else.
What is killed next and when comes from a seed; a moment is a number of journal lines after the kill before, because
those advance with the study on a fast machine and on a slow one.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from analysis.load import write_parquet
from study.errors import RunError, UserError
from trainables.files import write_text
from trainables.schema import METRICS, SETTING_NAMES, Column, Outcome

SIGNALS = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "sigusr1": signal.SIGUSR1}
"""Kinds of kills that the driver answers: it saves what there is and ends with `INTERRUPTED`."""
KINDS = ("worker", "node", "driver", *SIGNALS, "raylet", "agent", "gcs", "memory", "stop", "store")
"""worker: SIGKILL of a process that trains a trial. node: all processes of a node that trains one. driver: SIGKILL.
raylet, agent: that process of Ray's on such a node. gcs: the head's, with which the whole Ray is lost; the driver ends
itself, and goes on with another. memory: so much of it is taken that Ray kills workers. stop: the driver stands still
for a while. store: the study's results are in a store, which is gone for a while."""
_WEIGHTS = {
    "worker": 0.3,
    "node": 0.12,
    "driver": 0.15,
    "raylet": 0.1,
    "agent": 0.06,
    "gcs": 0.04,
    "memory": 0.05,
    "stop": 0.06,
    "store": 0.06,
}
"""How often a kind is drawn; the signals share the rest."""
_ANY_TIME = ("worker", "node", "driver")
"""Kinds that may also come while a driver or a worker starts; what is promised of the others is so once trials run."""
LOST = 1
"""Exit code of a driver whose Ray is lost."""
_STOPPED_SECONDS = 20.0
_GONE_SECONDS = 20.0
_HEADROOM = 4e9
"""Bytes that other programs may use more than at the start before Ray's monitor takes the memory for short."""
_HOG = """
import sys, time
held = bytearray(b"x") * int(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""
SPACING = 20
"""Journal lines from one kill to the next, on average; a small trial writes two per epoch."""
_EARLY = 0.25
"""Share of the kills that do not wait for a journal line: they meet a driver or a worker that is starting."""
_EARLY_SECONDS = 8.0
_HANDLED = 2
"""Journal lines after its start by which a driver has its signal handlers in place: a trial has started."""
_PROGRESS = tuple(f'{{"event": "{event}"'.encode() for event in ("start", "report", "checkpoint"))
"""Beginnings of the journal lines that are counted; others say that a driver lives, not that a study advances."""
_PHASE_SECONDS = 0.5
INTERRUPTED = 130
PATIENCE = 300.0
"""Seconds without a journal line after which a study is held to be stuck."""
_ENDS_OF_ITS_OWN = 3
"""Times a round goes on although its driver ended with an error that nobody asked for."""
NAME, _STORE = "chaos", "store"
_NODE: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1}
_POLL = 0.05

EPOCH_CLOCKS = (
    "seconds",
    "train_seconds",
    "evaluation_seconds",
    "reported_at",
    "attempt",
    "energy_joules",
    "peak_memory_bytes",
)
"""Columns of `epochs.parquet` that tell of the machine and the attempt, not of the training."""
TRIAL_RESULTS = (
    "setting_id",
    "seed",
    "outcome",
    "cause",
    "iteration",
    "alarm_iteration",
    "alarm_cause",
    "loss_limit_iteration",
    "epochs_done",
    "iterations_done",
    "iterations_planned",
    *SETTING_NAMES,
    *(
        name
        for m in METRICS
        for name in (
            f"{m.name}_best",
            f"{m.name}_best_se",
            f"{m.name}_best_epoch",
            f"{m.name}_last",
            f"{m.name}_initial",
            m.protocol_column,
        )
    ),
    "undertrained",
    "model_metric",
    "model_epoch",
    "selected_on",
    "config",
)
"""Columns of `trials.parquet` that a kill must not change."""

CHAOS_COLUMNS: tuple[Column, ...] = (
    Column("kind", "string", "what was killed: worker, node, driver, or the driver by a signal it answers"),
    Column("kills", "int64", "kills that really happened"),
    Column("recovery_seconds", "float64", "median time from the kill to the journal's next line", "s"),
    Column("seed", "int64", "seed of the kills"),
    Column("trials", "int64", "trials of the study"),
    Column("nodes", "int64", "nodes of the cluster, its head among them"),
    Column("equal", "bool", "true where the whole run, all kinds together, ended equal to the calm one"),
)
"""`chaos.parquet`: one row per kind."""

Row = Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------- decisions


@dataclass(frozen=True)
class Kill:
    """A kill that is planned.

    Attributes:
        kind: one of `KINDS`.
        lines: journal lines to wait for since the kill before; 0 does not wait.
        delay: seconds to wait after that.
        pick: which of the targets, as a share of their number, in [0, 1).
    """

    kind: str
    lines: int
    delay: float
    pick: float


def plan_kills(seed: int, count: int, kinds: Sequence[str] = KINDS, spacing: int = SPACING) -> list[Kill]:
    """The kills of a run, in their order; every kind occurs.

    Raises:
        UserError: fewer kills than kinds, or an unknown kind.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"kinds: {unknown[0]!r} is none of {', '.join(KINDS)}")
    if count < len(kinds):
        raise UserError(f"--kills {count}: must be at least {len(kinds)}, one of each kind ({', '.join(kinds)})")
    rng = random.Random(seed)
    rest = (1 - sum(_WEIGHTS.values())) / len(SIGNALS)
    weights = [_WEIGHTS.get(kind, rest) for kind in kinds]
    chosen = [*kinds, *rng.choices(list(kinds), weights, k=count - len(kinds))]
    rng.shuffle(chosen)
    plan = []
    for kind in chosen:
        early = rng.random() < _EARLY
        lines = rng.randint(1, 2 * spacing - 1)
        delay, pick = rng.random(), rng.random()
        if early and kind in _ANY_TIME:
            plan.append(Kill(kind, 0, delay * _EARLY_SECONDS, pick))
        else:
            lines = lines if kind in _ANY_TIME else max(lines, _HANDLED)
            plan.append(Kill(kind, lines, delay * _PHASE_SECONDS, pick))
    return plan


def choose(targets: Sequence[int], pick: float) -> int | None:
    """One of the targets, whatever order they come in; None where there is none."""
    return sorted(targets)[int(pick * len(targets))] if targets else None


def trains(title: str) -> bool:
    """True for the title of a Ray worker process that holds a trial."""
    return title.startswith("ray::") and "Trainable" in title.split("(")[0]


def descendants(parents: Mapping[int, int], root: int) -> set[int]:
    """All processes below one, from the parent of each."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    open_ = [root]
    while open_:
        for child in children.get(open_.pop(), []):
            if child not in found:
                found.add(child)
                open_.append(child)
    return found


def judge_exit(kind: str | None, code: int, complete: bool) -> str | None:
    """What is wrong with how a driver ended; None where it is as promised.

    Args:
        kind: the kill it was given; None where it ended by itself.
        code: its exit code, negative for a signal.
        complete: all its trials are over, so that it was about to end anyhow.
    """
    if kind is None:
        return None if code == 0 else f"the driver ended by itself with code {code}"
    promised = INTERRUPTED if kind in SIGNALS else LOST if kind == "gcs" else None
    if promised is not None and code not in (0, promised) and not complete:
        return f"the driver answered {kind} with code {code} instead of {promised}"
    return None


# --------------------------------------------------------------------------------------------------- comparison


def same(here: Any, there: Any) -> bool:
    """Exactly equal; a NaN equals a NaN, null only null."""
    if isinstance(here, float) and isinstance(there, float) and math.isnan(here):
        return math.isnan(there)
    return bool(here == there)


def compare_rows(
    what: str,
    calm: Sequence[Row],
    chaotic: Sequence[Row],
    key: Sequence[str],
    columns: Sequence[str] | None = None,
    ignored: Iterable[str] = (),
) -> list[str]:
    """Differences of two tables, one line each: rows doubled, lost or new, and values changed.

    Args:
        what: what a row is called.
        key: columns that tell rows apart.
        columns: what is compared; None for all but `ignored`.
    """

    def indexed(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
        return {tuple(row[name] for name in key): row for row in rows}

    def named(values: tuple[Any, ...]) -> str:
        return f"{what} {'/'.join(str(v) for v in values)}"

    there, here = indexed(calm), indexed(chaotic)
    times = Counter(tuple(row[name] for name in key) for row in chaotic)
    found = [f"{named(k)}: {n} times" for k, n in times.items() if n > 1]
    found += [f"{named(k)}: lost" for k in there if k not in here]
    found += [f"{named(k)}: not in the calm run" for k in here if k not in there]
    skipped = {*key, *ignored}
    for k in there.keys() & here.keys():
        names = columns or [n for n in dict.fromkeys([*there[k], *here[k]]) if n not in skipped]
        changed = [n for n in names if not same(here[k].get(n), there[k].get(n))]
        if changed:
            first, more = changed[0], f" (and {len(changed) - 1} more columns)" if len(changed) > 1 else ""
            found.append(f"{named(k)}: {first} {there[k].get(first)!r} calmly, {here[k].get(first)!r} here{more}")
    return sorted(found)


def calm_names(calm: Sequence[Row], chaotic: Sequence[Row]) -> dict[str, str]:
    """The calm run's trial id by that of the other: ids are given in the order of first starts, which kills change."""
    ids = {(row["setting_id"], row["seed"]): str(row["trial_id"]) for row in calm}
    return {str(row["trial_id"]): ids[key] for row in chaotic if (key := (row["setting_id"], row["seed"])) in ids}


def compare_states(states: Mapping[str, int], trials: int) -> list[str]:
    """What is wrong with the numbers of Optuna's trials by state, after a study of so many trials."""
    found = [f"Optuna: {states[s]} trials left {s}" for s in ("RUNNING", "WAITING") if states.get(s, 0)]
    if states.get("COMPLETE", 0) != trials:
        found.append(f"Optuna: {states.get('COMPLETE', 0)} trials COMPLETE, but {trials} trials were run")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    """A Parquet file's rows; through Arrow, because pandas makes one of null and NaN."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist() if path.is_file() else []
    return rows


def optuna_states(folder: Path) -> Counter[str]:
    """Optuna's trials of a study's folder by state; none where it has no storage."""
    import optuna

    if not (folder / "optuna.db").is_file():  # Optuna would make an empty one
        return Counter()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    opened = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{(folder / 'optuna.db').resolve()}")
    return Counter(trial.state.name for trial in opened.get_trials(deepcopy=False))


def compare_folders(calm: Path, chaotic: Path) -> list[str]:
    """In what a study's folder differs from that of its calm run, clocks and attempts aside; empty where in nothing."""
    there, here = _rows(calm / "trials.parquet"), _rows(chaotic / "trials.parquet")
    names = calm_names(there, here)

    def renamed(rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [{**row, "trial_id": names.get(row["trial_id"], row["trial_id"])} for row in rows]

    def files(folder: Path, pattern: str, known: Mapping[str, str]) -> dict[str, Path]:
        """Files by their name in the calm run; a name is a trial's id with something after it."""
        found = {}
        for path in folder.glob(pattern):
            trial, line, rest = path.stem.partition("_")
            found[known.get(trial, trial) + line + rest] = path
        return found

    found = compare_rows("trial", there, renamed(here), ("setting_id", "seed"), ("trial_id", *TRIAL_RESULTS))
    epochs = _rows(calm / "epochs.parquet"), renamed(_rows(chaotic / "epochs.parquet"))
    found += compare_rows("epoch", *epochs, ("trial_id", "epoch"), ignored=EPOCH_CLOCKS)
    for pattern in ("signals/*.parquet", "models/*.pt"):
        what = pattern.partition("/")[0]
        calmly, wildly = files(calm, pattern, {}), files(chaotic, pattern, names)
        found += [f"{what}: {name} is missing" for name in sorted(calmly.keys() - wildly.keys())]
        found += [f"{what}: {name} is not in the calm run" for name in sorted(wildly.keys() - calmly.keys())]
        for name in sorted(calmly.keys() & wildly.keys()) if what == "signals" else ():
            pair = _rows(calmly[name]), renamed(_rows(wildly[name]))
            found += compare_rows("signal", *pair, ("trial_id", "iteration"))
    return found + compare_states(optuna_states(chaotic), len(there))


# ---------------------------------------------------------------------------------------------------- processes


def _processes() -> dict[int, tuple[int, str]]:
    """Parent and start time of every process there is; a process id comes again, the two together do not."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if fields[0] != "Z":
                found[int(entry.name)] = (int(fields[1]), fields[19])
    return found


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
    except OSError:
        return ""


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _memory() -> tuple[int, int]:
    """Bytes of memory of this machine, and those in use."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    known = {name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return known["MemTotal"], known["MemTotal"] - known["MemAvailable"]


class LocalCluster:
    """Ray nodes on this machine: a head that trains nothing, and nodes of one CPU and one logical GPU each.

    Args:
        nodes: how many, the head among them.
        memory: bytes in use on this machine, by all its programs, above which Ray kills workers.
    """

    def __init__(self, nodes: int, memory: float = math.inf) -> None:
        from study.driver import quiet_ray

        quiet_ray()
        self._nodes, self._memory = nodes, memory
        self._seen: dict[int, str] = {}
        self._on_term = signal.getsignal(signal.SIGTERM)
        self._start()

    def _start(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(self._nodes - 1):
                self._cluster.add_node(**_NODE)
            self._answer_sigterm()
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """What a driver joins."""
        return str(self._cluster.address)

    def _answer_sigterm(self) -> None:
        """A SIGTERM ends us as a Ctrl-C does; every node that is added puts a handler that drains it in place."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    def note(self) -> None:
        """Remember which processes are ours, for `close`."""
        processes = _processes()
        ours = descendants({pid: parent for pid, (parent, _) in processes.items()}, os.getpid())
        self._seen |= {pid: processes[pid][1] for pid in ours}

    def workers(self) -> dict[int, Any]:
        """Processes that hold a trial, and the node of each."""
        parents = {pid: parent for pid, (parent, _) in _processes().items()}
        found: dict[int, Any] = {}
        for node in self._cluster.worker_nodes:
            for raylet in node.all_processes.get("raylet", ()):
                found |= {pid: node for pid in descendants(parents, raylet.process.pid) if trains(_title(pid))}
        return found

    def kill_worker(self, pick: float) -> str | None:
        """SIGKILL a process that holds a trial; returns which, None where there is none."""
        self.note()
        pid = choose(list(self.workers()), pick)
        if pid is None:
            return None
        title = _title(pid)
        return f"{title} {pid}" if _kill(pid) else None

    def kill_node(self, pick: float) -> str | None:
        """Kill a node that trains a trial and put a new one in its place; returns which, None where none trains."""
        self.note()
        workers = self.workers()
        pid = choose(list(workers), pick)
        if pid is None:
            return None
        return f"{self._replace(workers[pid])} with {pid}"

    def _replace(self, node: Any) -> str:
        name = str(node.node_id)[:8]
        self._cluster.remove_node(node, allow_graceful=False)
        self._cluster.add_node(wait=False, **_NODE)
        self._answer_sigterm()
        return name

    def kill_raylet(self, pick: float) -> str | None:
        """SIGKILL the raylet of a node that trains a trial, and put a new node beside what is left; see `kill_node`."""
        return self._kill_of_node(pick, lambda raylet: raylet)

    def kill_agent(self, pick: float) -> str | None:
        """SIGKILL the agent of a node that trains a trial, without which its raylet ends; see `kill_node`."""

        def agent(raylet: int) -> int | None:
            parents = {pid: parent for pid, (parent, _) in _processes().items()}
            found = (pid for pid in descendants(parents, raylet) if _title(pid).startswith("ray::DashboardAgent"))
            return next(found, None)

        return self._kill_of_node(pick, agent)

    def _kill_of_node(self, pick: float, of: Callable[[int], int | None]) -> str | None:
        self.note()
        workers = self.workers()
        worker = choose(list(workers), pick)
        if worker is None:
            return None
        raylet = workers[worker].all_processes["raylet"][0].process
        pid = of(raylet.pid)
        if pid is None or not _kill(pid):
            return None
        try:
            raylet.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise RunError(f"the raylet of {pid} goes on without it") from None
        return f"{pid} of {self._replace(workers[worker])}"

    def kill_gcs(self) -> str:
        """SIGKILL the head's GCS, with which all of Ray is lost; see `restart`."""
        self.note()
        head: Any = self._cluster.head_node
        process = head.all_processes["gcs_server"][0].process
        _kill(process.pid)
        return f"process {process.pid}"

    def restart(self) -> None:
        """Another cluster, at another address, in the place of this one."""
        self.close()
        self._start()

    def take_memory(self, killed: Callable[[], bool]) -> str | None:
        """Take so much memory that Ray kills workers, until `killed` says so; None where it does not within a minute.

        Raises:
            RunError: that much is not there.
        """
        self.note()
        total, used = _memory()
        wanted = int(max(0.0, self._memory - used) + 1e9)
        if used + wanted > 0.95 * total:
            raise RunError(f"kind memory: {wanted / 1e9:.3g} GB more than is free")
        hog = subprocess.Popen([sys.executable, "-c", _HOG, str(wanted)], stdout=subprocess.PIPE)
        try:
            assert hog.stdout is not None
            hog.stdout.readline()
            until = time.monotonic() + 60
            while not (found := killed()) and time.monotonic() < until:
                time.sleep(_POLL)
        finally:
            hog.kill()
            hog.wait()
        return f"{wanted / 1e9:.3g} GB taken" if found else None

    def close(self) -> None:
        """Stop all nodes and see to it that no process of theirs is left."""
        self.note()
        self._cluster.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_term)
        until = time.monotonic() + 10
        while left := self._left():
            if time.monotonic() > until:
                for pid in left:
                    _kill(pid)
                break
            time.sleep(_POLL)

    def _left(self) -> list[int]:
        processes = _processes()
        return [pid for pid, started in self._seen.items() if pid in processes and processes[pid][1] == started]


@contextmanager
def _cluster(nodes: int, kinds: Sequence[str]) -> Iterator[LocalCluster]:
    """A cluster for these kinds of kills."""
    total, used = _memory()
    # With the variable set Ray refuses logical GPUs that it does not name.
    changes: dict[str, str | None] = {"CUDA_VISIBLE_DEVICES": None}
    memory = min(0.9 * total, used + _HEADROOM) if "memory" in kinds else math.inf
    if memory < math.inf:
        changes |= {"RAY_memory_usage_threshold": f"{memory / total:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    before = {name: os.environ.pop(name, None) for name in changes}
    os.environ.update({name: value for name, value in changes.items() if value is not None})
    try:
        cluster = LocalCluster(nodes, memory)
        try:
            yield cluster
        finally:
            cluster.close()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class Journal:
    """Counts the lines of a study's journal that tell of progress, reading only what is new."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ledger.jsonl"
        self._read = self._lines = 0

    def lines(self) -> int:
        """Lines of progress so far, only whole ones."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size < self._read:  # a resumed study cuts off the line its last driver did not finish
                    self._read = self._lines = 0
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return 0
        whole = new.rfind(b"\n") + 1
        self._read += whole
        self._lines += sum(line.startswith(_PROGRESS) for line in new[:whole].splitlines())
        return self._lines


class Driver:
    """A process of `mebm`, as a user starts it; in a session of its own, so that a Ctrl-C here does not reach it."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        program = Path(sysconfig.get_path("scripts")) / "mebm"
        if not program.is_file():
            raise UserError(f"{program}: is not there; install the package (pip install .)")
        with log.open("ab") as file:
            file.write(f"$ mebm {' '.join(arguments)}\n".encode())
            file.flush()
            self.process = subprocess.Popen(
                [str(program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        """Exit code; None while it runs."""
        return self.process.poll()

    def send(self, number: int) -> int:
        """Send a signal and wait for the end; returns the exit code.

        Raises:
            RunError: it does not end.
        """
        self.process.send_signal(number)
        return self.wait(f"after {signal.Signals(number).name}")

    def wait(self, what: str) -> int:
        """Wait for the end of itself; returns the exit code.

        Raises:
            RunError: it does not end.
        """
        try:
            return self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise RunError(f"the driver goes on for {PATIENCE:.0f} s {what}") from None

    def close(self) -> None:
        """Kill it if it still runs."""
        if self.code is None:
            self.process.kill()
            self.process.wait()


# ---------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class ChaosOptions:
    """A run of `mebm chaos`.

    Attributes:
        kills: how many must really happen.
        seed: of the kills.
        trials: at least so many, of four settings and as many seeds as it takes.
        epochs: of a trial; 5 iterations each.
        nodes: of the cluster, its head among them.
        assignments: of `--set`, for the study.
    """

    kills: int = 100
    seed: int = 0
    trials: int = 16
    epochs: int = 24
    nodes: int = 3
    kinds: tuple[str, ...] = KINDS
    assignments: tuple[str, ...] = ()


@dataclass
class ChaosResult:
    """What came of it.

    Attributes:
        kills: every kill that happened: round, kind, journal line, target, seconds until the journal's next line.
        differences: from the calm run, and what else was not as promised; empty where all is well.
        attempts: starts of trials, in all rounds.
        counted_seconds: time of trials that is in the results; replayed_seconds: of epochs done again; lost_seconds:
            that no row holds, null where the study does not say.
        wall_ratio: of an average round to the calm run.
    """

    seed: int
    trials: int
    nodes: int
    rounds: int = 0
    resumes: int = 0
    attempts: int = 0
    kills: list[dict[str, Any]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    counted_seconds: float = 0.0
    replayed_seconds: float = 0.0
    lost_seconds: float | None = None
    calm_wall_seconds: float = 0.0
    chaos_wall_seconds: float = 0.0

    @property
    def equal(self) -> bool:
        """True where every round ended as the calm run did."""
        return not self.differences

    @property
    def by_kind(self) -> dict[str, int]:
        """Kills that happened by kind."""
        counted = Counter(kill["kind"] for kill in self.kills)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    @property
    def wall_ratio(self) -> float | None:
        """Wall time of an average round over that of the calm run."""
        return self.chaos_wall_seconds / self.rounds / self.calm_wall_seconds if self.rounds else None

    def share(self, seconds: float | None) -> float | None:
        """Seconds as a share of all the time trials took."""
        total = self.counted_seconds + self.replayed_seconds + (self.lost_seconds or 0.0)
        return seconds / total if seconds is not None and total > 0 else None

    def rows(self) -> list[dict[str, Any]]:
        """One row per kind, `CHAOS_COLUMNS`."""
        found = []
        for kind, count in self.by_kind.items():
            took = [
                k["recovery_seconds"] for k in self.kills if k["kind"] == kind and k["recovery_seconds"] is not None
            ]
            found.append(
                {
                    "kind": kind,
                    "kills": count,
                    "recovery_seconds": statistics.median(took) if took else None,
                    "seed": self.seed,
                    "trials": self.trials,
                    "nodes": self.nodes,
                    "equal": self.equal,
                }
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        shown = asdict(self)
        return {
            "equal": self.equal,
            "by_kind": self.by_kind,
            "replayed_share": self.share(self.replayed_seconds),
            "lost_share": self.share(self.lost_seconds),
            "wall_ratio": self.wall_ratio,
            **{key: shown[key] for key in shown if key not in ("kills", "differences")},
            "differences": self.differences,
            "kinds": self.rows(),
            "kills": self.kills,
        }

    def lines(self) -> list[str]:
        """For people."""
        kinds = ", ".join(
            f"{row['kills']} {row['kind']}"
            + (f" (goes on after {row['recovery_seconds']:.1f} s)" if row["recovery_seconds"] is not None else "")
            for row in self.rows()
        )
        replayed, lost = self.share(self.replayed_seconds), self.share(self.lost_seconds)
        parts = [f"{share:.1%} {word}" for share, word in ((replayed, "replayed"), (lost, "lost")) if share is not None]
        lines = [
            f"{len(self.kills)} kills in {self.rounds} round(s), seed {self.seed}: {kinds or 'none'}",
            f"{self.trials} trials on {self.nodes} nodes, {self.attempts} attempts, {self.resumes} resumes",
            f"trial time: {', '.join(parts) or 'unknown'}",
        ]
        if self.wall_ratio is not None:
            lines.append(f"wall time: {self.wall_ratio:.2f} times the calm run's {self.calm_wall_seconds:.0f} s")
        if self.equal:
            return [*lines, "every round ended equal to the calm run"]
        shown, more = self.differences[:20], len(self.differences) - 20
        lines += [f"{len(self.differences)} difference(s):", *(f"  {text}" for text in shown)]
        return [*lines, f"  and {more} more"] if more > 0 else lines


def chaos_study(options: ChaosOptions) -> dict[str, Any]:
    """The study: a grid, because what a search proposes depends on the order in which trials end.

    One of its settings diverges within ten iterations, so that verdicts are compared as well as finished trials. Every
    epoch is saved, so that any number of kills is survived; it trains on the CPU, where numbers come again exactly.
    """
    return {
        "name": NAME,
        "trial": {
            "dataset": "digits",
            "norm": "none",
            "epochs": options.epochs,
            "iterations_per_epoch": 5,
            "batch_size": 16,
            "buffer_size": 200,
            "evaluation": {"every": 4, "fresh_steps": 2},
            "device": "cpu",
        },
        "search": {
            "sampler": "grid",
            "grid": [
                {"initial": "gaussian", "sampling_steps": [1, 2, 3]},
                {"initial": "uniform", "sampling_steps": 1},
            ],
        },
        "seeds": list(range(math.ceil(options.trials / 4))),
        "resources": {"cpus": 1, "gpus": 1},
        "run": {"checkpoint_seconds": 0, "max_failures": 1000},
    }


class Round:
    """One study from its start to its end, with kills on the way.

    Args:
        base: new folder for the study's folder and the drivers' output.
        config: the study's file.
        cluster: where it runs.
        options: of the run.
        result: takes kills, resumes and what was not as promised.
        say: is told of every kill.
    """

    def __init__(
        self,
        base: Path,
        config: Path,
        cluster: LocalCluster,
        options: ChaosOptions,
        result: ChaosResult,
        say: Callable[[str], None],
    ) -> None:
        self.base, self.config, self.cluster, self.options = base, config, cluster, options
        self.result, self.say = result, say
        self.folder = self.results = base / NAME
        self.url: str | None = None
        if "store" in options.kinds:
            from study.mirror import work_folder
            from trainables.storage import join

            above = (base / _STORE).resolve().as_uri()
            self.url, self.folder, self.results = join(above, NAME), work_folder(above, NAME), base / _STORE / NAME
            shutil.rmtree(self.folder, ignore_errors=True)  # of an earlier run at this place
        self.journal = Journal(self.folder)
        self.driver: Driver | None = None
        self._starts = 0
        self._since = 0
        self._pending: tuple[dict[str, Any], float, int] | None = None

    def run(self, plan: list[Kill]) -> float:
        """Run the study; kills that happen are taken from the front of `plan`. Returns the wall time in seconds.

        Raises:
            RunError: it is stuck, or ends with errors again and again.
        """
        self.base.mkdir(parents=True)
        started = time.monotonic()
        ended_badly = 0
        try:
            self._start()
            while True:
                if plan and self._reached(plan[0]):
                    if not self._strike(plan[0]):
                        continue  # it had ended before it was struck
                    plan.pop(0)
                    if self._running() is None:
                        self._start()
                    continue
                code = self._end()
                if wrong := judge_exit(None, code, complete=False):
                    self._complain(wrong)
                    if self._complete():  # with a failed trial, which the comparison names
                        return time.monotonic() - started
                    ended_badly += 1
                    if ended_badly > _ENDS_OF_ITS_OWN:
                        raise RunError("the study does not come to its end")
                    self._start()
                    continue
                return time.monotonic() - started
        finally:
            self._watch()
            if self.driver is not None:
                self.driver.close()

    def _start(self) -> None:
        """`mebm sweep`, or `mebm resume` once there is a study; a driver can die before that."""
        again = (self.results / "study.yaml").is_file()
        sets = [part for text in self.options.assignments for part in ("--set", text)]
        place = str(self.base) if self.url is None else (self.base / _STORE).resolve().as_uri()
        sweep = ["sweep", str(self.config), "--results", place, *sets]
        arguments = ["resume", self.url or str(self.folder)] if again else sweep
        self.result.resumes += again
        self._starts += 1
        self.driver = Driver([*arguments, "--address", self.cluster.address], self.base / "driver.log")
        self._since = self.journal.lines()

    def _running(self) -> Driver | None:
        return self.driver if self.driver is not None and self.driver.code is None else None

    def _complain(self, text: str) -> None:
        done = f"after kill {len(self.result.kills)}" if self.result.kills else "before any kill"
        found = f"{self.base.name}: {text}, {done}; see {self.base / 'driver.log'}"
        self.result.differences.append(found)
        self.say(found)

    def _watch(self) -> int:
        """Journal lines so far; notes when the study went on after the last kill."""
        lines = self.journal.lines()
        if self._pending is not None and lines > self._pending[2]:
            kill, at, _ = self._pending
            kill["recovery_seconds"] = time.monotonic() - at
            self._pending = None
        return lines

    def _wait(self, done: Callable[[int], bool]) -> bool:
        """Until `done` says so of the journal's lines (True) or the driver has ended (False).

        Raises:
            RunError: the journal stands still.
        """
        last, still = -1, time.monotonic()
        while True:
            ended = self._running() is None
            lines = self._watch()
            if done(lines):
                return True
            if ended:
                return False
            if lines != last:
                last, still = lines, time.monotonic()
            if time.monotonic() - still > PATIENCE:
                raise RunError(f"no journal line for {PATIENCE:.0f} s")
            time.sleep(_POLL)

    def _reached(self, kill: Kill) -> bool:
        """Wait for a kill's moment; False where the driver ends before it."""
        if not self._wait(lambda lines: lines >= self._since + kill.lines):
            return False
        until = time.monotonic() + kill.delay
        return self._wait(lambda _: time.monotonic() >= until) and self._running() is not None

    def _strike(self, kill: Kill) -> bool:
        """Kill what is planned, as soon as there is such a thing; False where the study ends before that."""
        driver = self._running()
        if driver is None:
            return False
        before, at = self._watch(), time.monotonic()
        target: str | None = f"process {driver.process.pid}"
        strikes: dict[str, Callable[[float], str | None]] = {
            "worker": self.cluster.kill_worker,
            "node": self.cluster.kill_node,
            "raylet": self.cluster.kill_raylet,
            "agent": self.cluster.kill_agent,
            "memory": self._take_memory,
        }
        if strike := strikes.get(kill.kind):
            hit: list[str] = []

            def struck(lines: int) -> bool:
                nonlocal before, at
                if self._running() is None:  # a worker that outlives its driver for a moment is no target
                    return False
                before, at = lines, time.monotonic()
                found = strike(kill.pick)
                hit.extend([found] if found else [])
                return bool(hit)

            if not self._wait(struck):
                return False
            target = hit[0]
        elif kill.kind == "driver":
            self.cluster.note()
            if driver.send(signal.SIGKILL) != -signal.SIGKILL:
                return False
        elif kill.kind == "stop":
            driver.process.send_signal(signal.SIGSTOP)
            time.sleep(_STOPPED_SECONDS)
            driver.process.send_signal(signal.SIGCONT)
        elif kill.kind == "store":
            target = self._take_store()
        elif kill.kind == "gcs":
            target = self.cluster.kill_gcs()
            code = driver.wait("without its Ray")
            self.cluster.restart()
            if code == 0:
                return False
            if wrong := judge_exit(kill.kind, code, self._complete()):
                self._complain(wrong)
        else:
            self.cluster.note()
            code = driver.send(SIGNALS[kill.kind])
            if code == 0:
                return False
            if wrong := judge_exit(kill.kind, code, self._complete()):
                self._complain(wrong)
        made = {
            "number": len(self.result.kills) + 1,
            "round": self.result.rounds,
            "kind": kill.kind,
            "line": before,
            "target": target,
            "recovery_seconds": None,
        }
        self.result.kills.append(made)
        # A signalled driver writes lines of its own while it ends; the study goes on with those that come after.
        after = self.journal.lines() if self._running() is None else before
        self._pending = made, at, after
        self._since = after
        self.say(f"kill {made['number']}/{self.options.kills}: {kill.kind} ({target}) at line {before}")
        return True

    def _take_memory(self, _pick: float) -> str | None:
        path = self.folder / "ledger.jsonl"

        def kills() -> int:
            return path.read_bytes().count(b'"killed under memory pressure') if path.is_file() else 0

        before = kills()
        taken = self.cluster.take_memory(lambda: kills() > before or self._running() is None)
        return taken if kills() > before else None

    def _take_store(self) -> str:
        """The store's folder goes, and cannot be made anew; then it is back as it was."""
        store = self.base / _STORE
        away = store.rename(store.with_name(f"{_STORE}.away"))
        store.touch()
        try:
            time.sleep(_GONE_SECONDS)
        finally:
            store.unlink()
            away.rename(store)
        return str(store)

    def _complete(self) -> bool:
        rows = _rows(self.folder / "trials.parquet")
        return len(rows) >= self.result.trials and all(Outcome(row["outcome"]).finished for row in rows)

    def _end(self) -> int:
        self._wait(lambda _: False)
        assert self.driver is not None
        code = self.driver.code
        assert code is not None
        return code


def run_chaos(options: ChaosOptions, out: Path, say: Callable[[str], None] = lambda _: None) -> ChaosResult:
    """Run the study calmly and under kills, compare, and write `chaos.json` and `chaos.parquet`.

    Args:
        options: what to do.
        out: a new folder.
        say: is told of every step.

    Raises:
        UserError: the folder is in use, or the options are impossible.
        RunError: the calm run already fails.
    """
    plan = plan_kills(options.seed, options.kills, options.kinds)
    if options.nodes < 2:
        raise UserError(f"--nodes {options.nodes}: must be at least 2, because the head trains nothing")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: holds something already; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    config = out / f"{NAME}.yaml"
    values = chaos_study(options)
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")  # JSON is YAML
    result = ChaosResult(options.seed, 4 * len(values["seeds"]), options.nodes)
    plain = replace(options, kinds=tuple(kind for kind in options.kinds if kind != "store"))
    calm = out / "calm"
    with _cluster(options.nodes, options.kinds) as cluster:
        say("calm run")
        result.calm_wall_seconds = Round(calm, config, cluster, plain, result, say).run([])
        if result.differences:
            raise RunError(f"the calm run failed: {result.differences[0]}")
        while plan:
            result.rounds += 1
            base = out / f"round-{result.rounds}"
            say(f"round {result.rounds}")
            study = Round(base, config, cluster, options, result, say)
            try:
                result.chaos_wall_seconds += study.run(plan)
            except RunError as error:
                result.differences.append(f"{base.name}: {error}; see {base / 'driver.log'}")
                break
            finally:
                _account(result, study.results)
            result.differences += [f"{base.name}: {text}" for text in compare_folders(calm / NAME, study.results)]
    write_text(out / "chaos.json", json.dumps(result.to_dict(), indent=2) + "\n")
    write_parquet(result.rows(), CHAOS_COLUMNS, out / "chaos.parquet")
    return result


def _account(result: ChaosResult, folder: Path) -> None:
    """Add a round's attempts and times."""
    for row in _rows(folder / "trials.parquet"):
        result.attempts += row["attempts"] or 0
        result.counted_seconds += (row["train_seconds"] or 0.0) + (row["evaluation_seconds"] or 0.0)
        result.replayed_seconds += row["replayed_seconds"] or 0.0
        lost = row.get("lost_seconds")
        if lost is not None:
            result.lost_seconds = (result.lost_seconds or 0.0) + lost
