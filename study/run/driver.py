"""The driver: run trials on Ray; leave a resumable folder however the run ends.

Ray Tune only executes. A study is resumed from the ledger and the Optuna storage: Tune's own restore starts over
silently when its state file is damaged, forgets replayed time, and cannot retry a failed trial with a searcher.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from study.config.errors import RunError, one_line
from study.config.study import StudyConfig
from study.display.console import StudyConsole, error
from study.display.status import StudyStatus
from study.estimate.resources import refuse_more_memory
from study.loggers.build import make_loggers
from study.record.ledger import Ledger
from study.record.own_code import code_hashes, packed_code
from study.record.verify import run_facts
from study.run.allocation import bundle_of, concurrency, max_at_once, placement, trial_resources
from study.run.callback import LedgerCallback
from study.run.ending import Ending, place_lost, resumable, study_signals
from study.run.ray_private import corrected, messages_into_log
from study.run.ray_session import connect, log_only_to, streams_into
from study.run.scheduler import StudyScheduler
from study.run.stopping import StopPolicy
from study.run.watchdog import Watchdog
from study.run.workers import Workers
from study.search.searcher import StudySearch
from trainables.results.layout import CHECKPOINTS, LOG_FILE
from trainables.results.progress import note
from trainables.results.schema import Outcome
from trainables.script.ray_trainable import ScriptTrainable
from trainables.trial import ray_kv
from trainables.trial.ray_trainable import MebmTrainable

if TYPE_CHECKING:
    from study.remote.mirror import Mirror

log = logging.getLogger("mebm")


def run_trials(
    study: StudyConfig,
    folder: Path,
    console: StudyConsole,
    ledger: Ledger,
    address: str | None,
    handler: logging.Handler,
    driver: str,
    trainable: type | None = None,
    mirror: Mirror | None = None,
) -> Ending:
    """Run a study's trials through Ray Tune until all are over, the budget is spent or a signal comes.

    `handler` takes our log and Ray's; `driver` is its name for `StudySearch`; of a study whose results live in object
    storage `mirror` brings them there. A `RunError` says that Ray or a callback broke off; what was measured is kept.
    """
    run = _Run(study, folder, console, ledger, driver, mirror)
    if (nothing_to_do := run.over()) is not None:
        return nothing_to_do
    if address is None:
        refuse_more_memory(study)
    with ExitStack() as stack:
        cluster = run.connect(address, handler, stack)
        run.allocate(cluster)
        tuner = run.tuner(trainable or (ScriptTrainable if study.is_script else MebmTrainable))
        ledger.run(run_facts(study, driver, folder))
        with corrected(run.workers), study_signals(run.policy, run.callback):
            console.start(run.progress)
            failure = run.fit(tuner)
            ending = run.close()
        run.raise_what_broke(failure)
        return ending


@dataclass
class _Run:
    """One run of a study, step by step; `run_trials` has their order. `place`: its folder or URL, for messages."""

    study: StudyConfig
    folder: Path
    console: StudyConsole
    ledger: Ledger
    driver: str
    mirror: Mirror | None

    def __post_init__(self) -> None:
        study, folder, ledger, mirror = self.study, self.folder, self.ledger, self.mirror
        self.place = mirror.store.shown if mirror else str(folder)
        common: dict[str, Any] = {"folder": str(folder.resolve()), "checkpoint_seconds": study.run.checkpoint_seconds}
        if study.is_script:
            common["stop_seconds"] = study.run.stop_seconds
        if mirror is not None:
            common["store"] = mirror.url
        if code := code_hashes(folder):
            common["code"] = code
        self.policy = StopPolicy(study, ledger)
        self.search = StudySearch(study, folder, common, ledger, self.driver, self.policy.closed)
        self.remaining = self.search.remaining()
        self.workers = Workers(limited=study.resources.memory_gb is not None)
        self._hurried = False

    def over(self) -> Ending | None:
        """How the study has ended where nothing is left to run; None where something is."""
        spent = self.policy.budget.spent_on(self.policy.spent()) if self.remaining else None
        return None if self.remaining and not spent else Ending(False, spent, self._failed())

    def connect(self, address: str | None, handler: logging.Handler, stack: ExitStack) -> dict[str, float]:
        """Start or join Ray, and watch over it until `stack` ends; returns the cluster's resources."""
        note("starting Ray")
        started_here = not ray.is_initialized()
        cluster = connect(address, self.folder / LOG_FILE)
        log_only_to(handler)
        for code, packed in packed_code(self.folder).items():
            ray_kv.put(ray_kv.CODE, code, packed)
        stack.enter_context(messages_into_log())
        give_back = stack.enter_context(streams_into(self.folder / LOG_FILE, (2,)))

        def last_words(reason: str) -> None:
            give_back()
            error(resumable(self.place, reason))

        seconds = self.study.run.node_seconds
        self.watchdog = stack.enter_context(Watchdog(seconds, last_words, place_lost(self.ledger)))
        if started_here:
            stack.callback(self.watchdog.leave_ray)
        self.policy.lost = lambda: self.watchdog.lost
        return cluster

    def allocate(self, cluster: Mapping[str, float]) -> None:
        """Decide what a trial gets and how many run at once."""
        study, resources = self.study, self.study.resources
        self.cpus, self.gpus = trial_resources(study, cluster, self.folder)
        self.policy.gpus = self.gpus
        self.search.common |= {"cpus": self.cpus, "gpus": self.gpus, "memory_gb": resources.memory_gb}
        bundle = bundle_of(study, self.cpus, self.gpus)
        self.watchdog.needs(bundle)
        if "auto" in (resources.cpus, resources.gpus):
            self.console.line(f"resources auto: {self.cpus:g} CPU(s) and {self.gpus:.3g} GPU(s) per trial")
        most = max_at_once(study, self.folder, self.mirror)
        self.at_once = concurrency(most, cluster, self.cpus, self.gpus, bundle.get("memory"))

    def tuner(self, trainable: type) -> tune.Tuner:
        """Ray's tuner, with what listens to it: progress, scheduler, loggers, the ledger's callback."""
        study, mirror = self.study, self.mirror
        self.progress = StudyStatus.of(study)
        self.progress.begin(self.ledger.trials)
        scheduler = StudyScheduler(self.policy, self.workers, self.watchdog.clock)
        self.loggers = make_loggers(study.run.loggers, self.folder, study.name)
        self.callback = LedgerCallback(
            self.ledger, self.console, self.gpus, self.policy, scheduler.look_after, self.loggers, mirror, self.workers
        )
        self.callback.write_lock = self.watchdog.write_lock
        local = str((self.folder / CHECKPOINTS).resolve())
        store = mirror.store if mirror else None
        return tune.Tuner(
            tune.with_resources(trainable, placement(study, self.cpus, self.gpus)),
            tune_config=tune.TuneConfig(
                search_alg=self.search,
                scheduler=scheduler,
                num_samples=self.search.at_most() * (1 + (study.rescue.most if study.rescue else 0)),
                max_concurrent_trials=self.at_once,
                reuse_actors=study.run.reuse_workers,
                trial_name_creator=lambda trial: str(trial.config["trial_id"]),
                trial_dirname_creator=lambda trial: str(trial.config["trial_id"]),
            ),
            run_config=tune.RunConfig(
                name=self._name(),
                storage_path=f"{store.root}/{CHECKPOINTS}" if store else local,
                storage_filesystem=store.filesystem if store else None,
                callbacks=[self.callback],
                stop=self.policy,
                failure_config=tune.FailureConfig(max_failures=study.run.max_failures),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=2, checkpoint_at_end=False),
                verbose=0,
            ),
        )

    def _name(self) -> str:
        """Its own folder for every start of Ray Tune: a second run under one name would overwrite `tuner.pkl`."""
        mirror = self.mirror
        names = mirror.store.folders(CHECKPOINTS) if mirror else [p.name for p in self.folder.glob("tune/run-*")]
        numbers = [int(name[4:]) for name in names if name.startswith("run-") and name[4:].isdigit()]
        return f"run-{max(numbers, default=0) + 1:03d}"

    def fit(self, tuner: tune.Tuner) -> Exception | None:
        """Run the trials; returns the error that broke the run off, if one did."""

        def put_down_alone() -> None:
            self._put_down()
            self.ledger.close()
            if self.mirror is not None:
                self.mirror.close()

        self.watchdog.close = put_down_alone
        try:
            tuner.fit()
        except KeyboardInterrupt:
            self._hurried = True
            self.policy.interrupt("SIGINT")
        except Exception as failure:  # whatever it was, what has been measured is kept and nothing stays RUNNING
            log.exception("the run ended with an error")
            return failure
        return None

    def close(self) -> Ending:
        """Put everything down, unless the watchdog is doing that already, and say how the run ended."""
        with self.watchdog.write_lock:
            self.watchdog.close = lambda: None
            return replace(self._put_down(), hurried=self._hurried)

    def _put_down(self) -> Ending:
        """Everything has its end: in the ledger, in Optuna, for the loggers and on the screen."""
        ledger, trials = self.ledger, self.ledger.trials
        cut = [t for t in ledger.unfinished() if ledger.outcome(t) is Outcome.RUNNING]
        try:
            return self._end_trials()
        finally:
            for trial_id in cut:
                self.callback.ended(trial_id)
            self.progress.hold(trials)
            self.progress.given_up = self.search.seeds_given_up
            self.console.stop()
            for logger in self.loggers:
                logger.close()

    def _end_trials(self) -> Ending:
        """Whatever is still open has an end: in the ledger and in Optuna."""
        ledger, policy = self.ledger, self.policy
        unfinished = ledger.unfinished()
        left = bool(unfinished) or self.search.open > 0 or self.search.remaining() > 0
        signalled = policy.interrupted or policy.draining or policy.lost()
        spent = policy.closed() if left and not signalled else None
        for trial_id in unfinished:
            if spent:
                ledger.end(trial_id, Outcome.STOPPED, spent)
            elif ledger.outcome(trial_id) is not Outcome.INTERRUPTED:  # one that drained has its end
                ledger.end(trial_id, Outcome.INTERRUPTED, None)
        self.search.abandon("budget" if spent else "interrupted")
        # What is left without a reason was cut off: Ray's loop ends itself when the driver's process is asked to.
        return Ending(bool(signalled) or (left and not spent), spent, self._failed())

    def _failed(self) -> int:
        return sum(t["outcome"] == Outcome.FAILED for t in self.ledger.trials.values())

    def raise_what_broke(self, failure: Exception | None) -> None:
        """Tell the user with a `RunError` of a run that was given up, or broke off."""
        if self.watchdog.lost is not None:
            raise RunError(resumable(self.place, self.watchdog.lost))
        if failure is not None and not self.ledger.unfinished() and self.search.remaining() == 0:
            log.warning("all trials are over, so Ray's error has cost nothing")
            failure = None
        if failure := failure or self.callback.error:
            reason = one_line(f"{type(failure).__name__}: {failure}")[:300]
            raise RunError(resumable(self.place, f"the run broke off ({reason})"))
