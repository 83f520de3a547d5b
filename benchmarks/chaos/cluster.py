"""A Ray cluster on this machine whose processes can be killed."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from study.config.errors import RunError

_HEADROOM = 4e9
"""Bytes that other programs may use more than at the start before Ray's monitor takes the memory for short."""
_HOG = """
import sys, time
held = bytearray(b"x") * int(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""
PATIENCE = 300.0
"""Seconds without a journal line after which a study is held to be stuck."""
_NODE: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1}
POLL = 0.05


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
        from study.run.ray_session import quiet_ray

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
                time.sleep(POLL)
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
            time.sleep(POLL)

    def _left(self) -> list[int]:
        processes = _processes()
        return [pid for pid, started in self._seen.items() if pid in processes and processes[pid][1] == started]


@contextmanager
def local_cluster(nodes: int, kinds: Sequence[str]) -> Iterator[LocalCluster]:
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
