"""Optuna behind Ray Tune: what is proposed, and what Optuna is told of it.

Ray's `OptunaSearch` leaves a trial RUNNING for ever when its value is NaN, passes no constraint, knows no seeds per
setting, and cannot take up a study whose driver was killed. Here what is to be run follows from ledger and storage.
"""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from study.config.fields import ID_DIGITS, OLD_ID_DIGITS, AnyTrial, setting_id
from study.config.study import StudyConfig
from study.record.ledger import Ledger
from study.search.distinct import TRIES, DistinctSampler
from study.search.earlier_trials import earlier_trials
from study.search.left import seed_results
from study.search.memory_copy import MemoryCopy
from study.search.rescue import open_rescues, rescue_of
from study.search.seeds import given_up
from study.search.storage import AWAY, make_sampler, open_both, shared_url, storage_error
from study.search.tell import add_running, fail, tell

log = logging.getLogger("mebm")

_PATIENCE = 600.0
"""Seconds that a storage which cannot be reached may hold the study up."""
_APART = 0.5
"""Most seconds that a driver waits after another has proposed the same setting."""
_SOBOL_TRIES = 10_000
"""A sequence goes on past the settings that it has proposed; other samplers repeat themselves."""
_CANNOT_BE_USED = "the Optuna storage cannot be used"


class Replicate(NamedTuple):
    """A seed of a setting that is known and still to be run, or to be taken up again."""

    setting: int
    parameters: Mapping[str, Any]
    seed: int


class StudySearch(Searcher):
    """Proposes the trials of a study to Ray Tune and tells Optuna how they ended.

    `common` is what every trial's Ray configuration holds; with `driver` begin the ids of one that shares a storage.
    """

    def __init__(
        self,
        study: StudyConfig,
        folder: Path,
        common: Mapping[str, Any],
        ledger: Ledger,
        driver: str = "",
        closed: Callable[[int | None], str | None] = lambda _: None,
    ) -> None:
        super().__init__(metric=None, mode=None)
        self.study, self.space, self.folder = study, study.space, folder
        self.common, self.ledger, self.driver, self.closed = dict(common), ledger, driver, closed
        self._url = shared_url(study)
        stored, storage = open_both(study, folder)
        # Other drivers' trials are seen in the storage alone.
        self._copy = None if driver else MemoryCopy(stored, storage)
        self._optuna = stored if self._copy is None else self._copy.study
        self._live: dict[str, optuna.Trial] = {}
        self._untold: list[tuple[optuna.Trial, str]] = []
        self._unnamed: optuna.Trial | None = None
        self._token = ""
        self._known_left: int | None = None
        self._away_since: float | None = None
        self._settings: dict[int, dict[str, Any]] = {}  # parameters of this driver's settings, by number
        for trial in self._optuna.get_trials(deepcopy=False):
            if trial.user_attrs.get("driver") == driver and trial.params and "seed" in trial.user_attrs:
                self._settings.setdefault(int(trial.user_attrs["setting"]), dict(trial.params))
        self._ids, self._id_digits = self._known_ids()
        self._taken = self._taken_ids()
        self._spent = False
        already = len(self._optuna.get_trials(deepcopy=False))
        self._optuna.sampler = self._sampler = DistinctSampler(
            make_sampler(
                study,
                already,
                driver,
                known=len(self._taken) - self._given_whole(),
                earlier=earlier_trials(study, folder, self._optuna.sampler),
            ),
            self.space.distributions,
            lambda parameters: self._id_of(parameters) in self._taken,
            (study.search.seed + already) % 2**32,
            tries=_SOBOL_TRIES if study.search.sampler == "qmc" else TRIES,
        )
        self._queue = deque(self._replicates())
        self._given_up: dict[int, str] | None = None  # settings that need no further seeds; None: to be looked at
        self._rescues = deque(open_rescues(study, ledger))
        self._rescuing: set[str] = set()  # Ray's ids of rescues at work
        self._names: dict[str, str] = {}  # of trials and rescues at work, by Ray's id

    @contextmanager
    def _may_be_away(self, said: str = _CANNOT_BE_USED) -> Iterator[None]:
        """What cannot be written now is written later."""
        try:
            yield
        except AWAY as error:
            log.warning("%s: %s", said, storage_error(error, self._url))

    def _changed(self, trial: optuna.Trial) -> None:
        if self._copy is not None:
            self._copy.changed(trial)

    def _known_ids(self) -> tuple[dict[int, str], int]:
        """Ids of this driver's settings, by number, and how long ids are in this study: as long as when it began."""
        first = self.ledger.searched
        known = {self.ledger.settings[t]: str(self.ledger.trials[t]["setting_id"]) for t in first}
        others = (t.user_attrs.get("setting_id") for t in self._optuna.get_trials(deepcopy=False))
        some = next((str(text) for text in (*known.values(), *others) if text is not None), "")
        return known, OLD_ID_DIGITS if len(some) == OLD_ID_DIGITS else ID_DIGITS

    def _taken_ids(self, but: int | None = None) -> set[str]:
        """Ids of the settings that are known, of other drivers too, but for that of one trial of the storage."""
        found = set(self._ids.values())
        for trial in self._optuna.get_trials(deepcopy=False):
            given_up = trial.state is TrialState.FAIL and "seed" not in trial.user_attrs
            if "setting_id" in trial.user_attrs and not given_up and trial.number != but:
                found.add(str(trial.user_attrs["setting_id"]))
        return found

    def _given_whole(self) -> int:
        """Starting points that were begun and name every field: the sampler proposed nothing of them."""
        points = self.space.start[: self.space.settings]
        whole = {number for number, point in enumerate(points) if point.keys() >= self.space.distributions.keys()}
        trials = self._optuna.get_trials(deepcopy=False)
        return len(whole & {t.user_attrs["setting"] for t in trials if "seed" in t.user_attrs})

    def _id_of(self, parameters: Mapping[str, Any]) -> str:
        return setting_id(self.space.trial(dict(parameters), self.study.seeds[0]), self._id_digits)

    def _replicates(self) -> list[Replicate]:
        """Seeds still to be run of known settings, those cut off first; none of one that an old version repeated."""
        cut_off, new = [], []
        first: dict[str, int] = {}
        for number in sorted(self._settings):
            again = first.setdefault(self._ids.get(number) or self._id_of(self._settings[number]), number) != number
            for seed in self.study.seeds:
                replicate = Replicate(number, self._settings[number], seed)
                outcome = self.ledger.outcome(self.trial_id(replicate))
                if outcome is None and not again:
                    new.append(replicate)
                elif outcome is not None and not outcome.finished:
                    cut_off.append(replicate)
        return [*cut_off, *new]

    def trial_id(self, replicate: Replicate) -> str:
        """Id of a trial: the same whenever and in whatever order it is run."""
        setting, place = replicate.setting, self.study.seeds.index(replicate.seed)
        first = len(self.ledger.runs[0]["config"]["seeds"] if self.ledger.runs else self.study.seeds)
        # Seeds that were added later count behind all others, so that no id changes.
        name = f"t{setting * first + place + 1:04d}" if place < first else f"t{setting + 1:04d}s{place + 1}"
        return f"{self.driver}-{name}" if self.driver else name

    def _left(self) -> int:
        """Settings nobody has taken yet."""
        if self._spent:
            return 0
        known = len(self._settings)
        if self.driver:
            self._taken = self._taken_ids()
            trials = self._optuna.get_trials(deepcopy=False)
            known = len({(t.user_attrs["driver"], t.user_attrs["setting"]) for t in trials if "seed" in t.user_attrs})
        asked = self.study.search.trials or self.space.settings
        self._known_left = max(0, min(asked - known, self.space.settings - len(self._taken)))
        return self._known_left

    @property
    def open(self) -> int:
        """Trials that have been proposed and have not ended, whether they started or not."""
        return len(self._live) + len(self._rescuing)

    def remaining(self) -> int:
        """Trials still to be run as matters stand: seeds of known settings, and settings not yet proposed."""
        return self.at_most() - len(self._held())

    def at_most(self) -> int:
        """Trials that may still be run, with seeds that are held back: a later verdict can want those after all."""
        try:
            left = self._left()
        except AWAY:
            if self._known_left is None:
                raise
            left = self._known_left  # the storage is away at the end of a run
        return len(self._rescues) + len(self._queue) + left * len(self.study.seeds)

    @property
    def seeds_given_up(self) -> int:
        """Seeds that are not to be started, as matters stand."""
        return len(self._held())

    def _held(self) -> list[Replicate]:
        """Seeds of the queue that are not to be started, as matters stand: their setting is worse than the best.

        It follows from the journal alone, so that a resumed study decides as one that was never cut off.
        """
        if self.study.pruning.seeds == "all":
            return []
        if self._given_up is None:
            before = getattr(self, "_said", {})
            self._given_up = given_up(
                seed_results(self.study, self.ledger), len(self.study.seeds), self.study.pruning.seeds_alpha
            )
            for number in self._given_up.keys() - before.keys():
                log.info("setting %d gets no further seeds: %s", number, self._given_up[number])
            self._said = self._given_up
        return [r for r in self._queue if r.setting in self._given_up and self.ledger.outcome(self.trial_id(r)) is None]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next trial's configuration, `FINISHED`, or None while the storage cannot be reached."""
        names = (str(t.user_attrs["trial_id"]) for t in self._live.values())
        proposed = sum(self.ledger.outcome(name) is None for name in names)
        if self._rescues and self.closed(None) is None:
            rescue = self._rescues.popleft()
            self._rescuing.add(trial_id)
            self._names[trial_id] = rescue.trial_id
            return self._configured(rescue.trial_id, rescue.config(self._id_digits))
        if self.closed(None if self._cut_off() else proposed) is not None:
            return self._none_left()
        try:
            self._tell_waiting()
            found = self._next()
        except AWAY as error:
            now = time.monotonic()
            if self._away_since is None:
                log.warning("%s: %s", _CANNOT_BE_USED, storage_error(error, self._url))
                self._away_since = now
            # With nothing at work and no storage there is nothing to wait for in the end.
            return str(Searcher.FINISHED) if not self._live and now - self._away_since > _PATIENCE else None
        self._away_since = None
        if found is None:
            # What is held back may be wanted once the trials at work have ended.
            return None if self._queue and self._live else self._none_left()
        trial, replicate = found
        self._live[trial_id] = trial
        self._changed(trial)
        with self._may_be_away():
            self._write()
        config, attributes = self._trial(replicate)
        self._names[trial_id] = attributes["trial_id"]
        told = {key: attributes[key] for key in ("trial_id", "setting_id", "setting")}
        return self._configured(attributes["trial_id"], {"trial": config.to_json(), **told})

    def _configured(self, name: str, own: Mapping[str, Any]) -> dict[str, Any]:
        """Ray's configuration of a trial."""
        stored = reversed(self.ledger.checkpoints.get(name, []))  # of a study in a store: names there
        rescue, number = self.study.rescue, (own.get("columns") or {}).get("rescue", 0)
        again = rescue is not None and number < rescue.most  # else nobody goes back to its healthy states
        return {
            **self.common,
            **own,
            **({"rescue": {"on": [*rescue.on], "rewind": rescue.rewind}} if rescue is not None and again else {}),
            "resume_from": [*stored] if "store" in self.common else self.ledger.checkpoint_folders(name),
        }

    def _none_left(self) -> str | None:
        """`FINISHED`, or None while trials are at work that may want a rescue."""
        wanted = self.study.rescue is not None and self.open > 0 and self.closed(None) is None
        return None if wanted else str(Searcher.FINISHED)

    def _write(self) -> None:
        if self._copy is not None:
            self._copy.write()

    def _next(self) -> tuple[optuna.Trial, Replicate] | None:
        """Seeds that were cut off, then starting points, then further seeds, then settings of the sampler."""
        # One without its name is there where the storage went away.
        if self._unnamed is not None and (found := self._first_of(self._unnamed)) is not None:
            return found
        if not self._cut_off() and (found := self._starting_point()) is not None:
            return found
        held = self._held()
        if (replicate := next((r for r in self._queue if r not in held), None)) is not None:
            # A storage that goes away in the middle may have the trial already.
            self._token = self._token or uuid.uuid4().hex
            attributes = self._trial(replicate)[1]
            trial = add_running(self._optuna, self.space, replicate.parameters, attributes, self._token)
            self._token = ""
            self._queue.remove(replicate)
            return trial, replicate
        while self.study.search.sampler != "grid" and self._left():
            if (found := self._first_of(self._optuna.ask(self.space.distributions))) is not None:
                return found
            self._spent = self._sampler.spent
            if not self._spent:  # another driver proposed it at the same time
                time.sleep(random.uniform(0, _APART))
        return None

    def _cut_off(self) -> bool:
        return bool(self._queue) and self.ledger.outcome(self.trial_id(self._queue[0])) is not None

    def _starting_point(self) -> tuple[optuna.Trial, Replicate] | None:
        """A setting of the queue in the storage, which is filled once; several drivers may take from it."""
        while self._left() and self._optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            trial = self._optuna.ask(self.space.distributions)
            if "setting" not in trial.user_attrs:  # another driver was faster
                self._optuna.tell(trial, state=TrialState.FAIL)
                return None  # never of a study in memory
            if trial.user_attrs["setting"] in self._settings:  # an older copy of the storage was put back
                self._optuna.tell(trial, state=TrialState.FAIL)
                self._changed(trial)
                continue
            if (found := self._first_of(trial)) is not None:
                return found
        return None

    def _first_of(self, trial: optuna.Trial) -> tuple[optuna.Trial, Replicate] | None:
        """Give a new setting its number and put its further seeds into the queue; None where it is known."""
        self._unnamed = trial
        if not self._claim(trial):
            fail(self._optuna, trial, "is a setting that has been proposed before")
            self._changed(trial)
            self._unnamed = None
            return None
        number = trial.user_attrs.get("setting")
        if number is None:
            started = min(len(self.space.start), self.space.settings)
            number = max([started - 1, *self._settings]) + 1
        number = int(number)
        first, *others = self.study.seeds
        replicate = Replicate(number, dict(trial.params), first)
        self._label(trial, replicate)
        self._unnamed = None
        self._settings[number] = dict(trial.params)
        self._queue.extend(Replicate(number, replicate.parameters, seed) for seed in others)
        return trial, replicate

    def _claim(self, trial: optuna.Trial) -> bool:
        """Take a setting, unless it is known. Of two drivers that propose one at the same time neither gets it."""
        mine = self._id_of(trial.params)
        if self.driver:
            trial.set_user_attr("setting_id", mine)  # before the look at what others have taken: one of two sees it
            self._taken = self._taken_ids(but=trial.number)
        if mine in self._taken:
            return False
        self._taken.add(mine)
        return True

    def _label(self, trial: optuna.Trial, replicate: Replicate) -> None:
        for key, value in self._trial(replicate)[1].items():
            if trial.user_attrs.get(key) != value:
                trial.set_user_attr(key, value)

    def _trial(self, replicate: Replicate) -> tuple[AnyTrial, dict[str, Any]]:
        """A trial's configuration, and what its Optuna trial says of it."""
        config = self.space.trial(dict(replicate.parameters), replicate.seed)
        known = self._ids.get(replicate.setting) or setting_id(config, self._id_digits)
        attributes = {"driver": self.driver, "setting": replicate.setting, "seed": replicate.seed}
        return config, attributes | {"trial_id": self.trial_id(replicate), "setting_id": known}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how a trial ended: what the ledger says, or FAIL."""
        self._given_up = None
        trial, name = self._live.pop(trial_id, None), self._names.pop(trial_id, "")
        self._rescuing.discard(trial_id)
        try:
            following = rescue_of(self.study, self.ledger, name)
        except ValueError as wrong:
            following = None
            log.warning("%s is not rescued: %s", name, wrong)
        if following is not None:
            self._rescues.append(following)
        if trial is not None:
            self._untold.append((trial, "error" if error else "interrupted"))
            with self._may_be_away():
                self._tell_waiting()

    def _tell_waiting(self) -> None:
        while self._untold:
            trial, reason = self._untold[0]
            # One that is over there was told just before the storage went away.
            with suppress(optuna.exceptions.UpdateFinishedTrialError):
                tell(self._optuna, self.study, trial, self.ledger, reason)
            self._changed(trial)
            self._untold.pop(0)
        self._write()

    def abandon(self, reason: str) -> None:
        """Tell Optuna of every trial that is still live (see `tell`): no end of a run leaves one RUNNING."""
        self._untold += [(trial, reason) for trial in self._live.values()]
        self._live.clear()
        self._rescuing.clear()
        with self._may_be_away("the Optuna storage is told when the study is resumed"):
            self._tell_waiting()

    def save(self, checkpoint_path: str) -> None:
        """Nothing worth saving: the queue and every result are in the ledger and in Optuna's storage."""
        Path(checkpoint_path).write_text("the state of this searcher is the study's ledger\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore; see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles its tuner and with it the searcher; a database connection stays behind."""
        return {"study": self.study, "folder": self.folder}
