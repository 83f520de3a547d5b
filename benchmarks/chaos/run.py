"""A study from its start to its end, with kills on the way."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.results.parquet import write_parquet
from benchmarks.chaos.cluster import PATIENCE, POLL, LocalCluster, local_cluster
from benchmarks.chaos.compare import compare_folders, read_rows
from benchmarks.chaos.driver import Driver, Journal
from benchmarks.chaos.plan import SIGNALS, Kill, judge_exit, plan_kills
from benchmarks.chaos.result import CHAOS_COLUMNS, ChaosOptions, ChaosResult
from study.config.errors import RunError, UserError
from trainables.results.files import write_text
from trainables.results.schema import Outcome

_STOPPED_SECONDS = 20.0
_GONE_SECONDS = 20.0
_ENDS_OF_ITS_OWN = 3
"""Times a round goes on although its driver ended with an error that nobody asked for."""
NAME, _STORE = "chaos", "store"


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
            from study.remote.layout import work_folder
            from trainables.results.store import join

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
            time.sleep(POLL)

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
                if self._running() is None:  # a worker that outlives its driver for a moment is not a target
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
        # A signalled driver writes its own lines while it ends; the study goes on with those that come after.
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
        """The store's folder goes, and cannot be rebuilt; then it is back as it was."""
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
        rows = read_rows(self.folder / "trials.parquet")
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
    with local_cluster(options.nodes, options.kinds) as cluster:
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
    for row in read_rows(folder / "trials.parquet"):
        result.attempts += row["attempts"] or 0
        result.counted_seconds += (row["train_seconds"] or 0.0) + (row["evaluation_seconds"] or 0.0)
        result.replayed_seconds += row["replayed_seconds"] or 0.0
        lost = row.get("lost_seconds")
        if lost is not None:
            result.lost_seconds = (result.lost_seconds or 0.0) + lost
