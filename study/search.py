"""Optuna behind Ray Tune: what is proposed, and what Optuna is told of it.

Ray ships `OptunaSearch`. It is not used here because it leaves a trial RUNNING for ever when its value is NaN, has no
way to pass a constraint, knows no seeds per setting, and cannot take up a study whose driver was killed. This searcher
uses only Optuna's public interface. Which seeds of which settings are still to be run follows from the ledger and the
storage, so a killed driver forgets nothing; and the storage can be made anew from the ledger.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import random
import time
import uuid
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from study.addresses import filled
from study.config import Objective, StudyConfig
from study.distinct import DistinctSampler
from study.errors import UserError, one_line, shown
from study.ledger import Ledger
from study.space import ID_DIGITS, OLD_ID_DIGITS, Space, lookup, setting_id
from trainables.config import TrialConfig
from trainables.credentials import redacted
from trainables.schema import METRIC_BY_NAME, Outcome

log = logging.getLogger("mebm")

STORAGE = "optuna.db"
STABLE = "stable"
"""Name of the constraint; a diverged or collapsed trial violates it."""
MEASURED = (Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED)
"""Ends that are a trial's own result."""
_WORST = 1e6
"""Told where a trial ended without any value and no other trial has one."""
_PATIENCE = 600.0
"""Seconds that a storage which cannot be reached may hold the study up."""
_TABLE_TRIES, _TABLE_SECONDS = 10, 0.5
"""Times and pauses of opening a shared storage whose tables another driver is making."""
_APART = 0.5
"""Most seconds that a driver waits after another has proposed the same setting."""
_STALE = 600.0
"""Seconds after which a trial of a shared storage that no driver has put its name to is given up."""


def storage_url(folder: Path) -> str:
    """URL of the Optuna storage in a study's folder, an SQLite file that optuna-dashboard opens."""
    return f"sqlite:///{(folder / STORAGE).resolve()}"


def shared_url(study: StudyConfig) -> str | None:
    """URL of the storage that several drivers share, with `${NAME}` replaced; None for the one in the folder.

    Raises:
        UserError: it names an environment variable that is not set.
    """
    return filled(study.search.storage) if study.search.storage else None


def _told(error: BaseException, url: str | None) -> str:
    """An error of a storage in a line, without the password of its address."""
    text = one_line(error).partition(" (Background on this error")[0]
    return redacted(text, *([url] if url else []))[:200]


def _storage(study: StudyConfig, folder: Path) -> RDBStorage:
    shared = shared_url(study)
    if shared is not None:
        try:
            return _connected(shared)
        except (ArgumentError, ValueError):
            # One that cannot be read may be named in the error, password and all.
            raise UserError("search.storage: not an address of a database") from None
        except (ImportError, TypeError) as error:  # of the driver: not installed, an option it does not know
            raise UserError(f"search.storage: {_told(error, shared)}") from None
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            raise UserError(f"search.storage: cannot be reached ({_told(error, shared)})") from None
    storage = RDBStorage(storage_url(folder))

    @event.listens_for(storage.engine, "connect")
    def _fast(connection: Any, _record: Any) -> None:
        # No write is waited for: the ledger is the truth, and the storage can be made anew from it.
        connection.execute("PRAGMA synchronous = OFF")

    storage.engine.dispose()
    return storage


def _connected(url: str) -> RDBStorage:
    """A shared storage. Of drivers that find it empty at once each makes its tables, and all but one fail at that."""
    for left in reversed(range(_TABLE_TRIES)):
        try:
            # Connections die on a weekend; each is tried before it is used.
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except SQLAlchemyError as error:
            if left == 0 or not (isinstance(error, IntegrityError) or "already exists" in str(error)):
                raise
            time.sleep(_TABLE_SECONDS)
    raise AssertionError("unreachable")


def make_sampler(study: StudyConfig, already: int, driver: str = "") -> BaseSampler:
    """The sampler of a study.

    Args:
        already: trials in the storage. It shifts the seed, because a resumed study that began its random stream anew
            would propose its first settings a second time.
        driver: name of the driver: those that share a storage propose different settings.
    """
    search = study.search
    seed = (search.seed + already + zlib.crc32(driver.encode())) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match search.sampler:
            case "tpe":
                return TPESampler(
                    seed=seed, n_startup_trials=search.startup_trials, multivariate=True, constant_liar=True
                )
            case "gp":
                return GPSampler(seed=seed, n_startup_trials=search.startup_trials, deterministic_objective=False)
            case "nsga2":
                return NSGAIISampler(seed=seed)
            case _:
                return RandomSampler(seed=seed)


def open_storage(study: StudyConfig, folder: Path, started: Collection[int] = ()) -> optuna.Study:
    """The study in its Optuna storage, created where it is not there yet, with its starting points in the queue.

    Args:
        started: numbers of starting points that have been taken, for a storage that is made anew.

    Raises:
        UserError: a shared storage that cannot be reached, or whose study of that name has other objectives.
    """
    return _open(study, folder, started)[0]


def _open(study: StudyConfig, folder: Path, started: Collection[int] = ()) -> tuple[optuna.Study, RDBStorage]:
    """See `open_storage`; also the storage without Optuna's cache around it."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = _storage(study, folder)
    directions = [objective.resolved_direction for objective in study.objectives]
    try:
        # Of several drivers that start at once one makes the study; only that one fills the queue.
        opened = optuna.create_study(study_name=study.name, storage=storage, directions=directions)
        fresh = True
    except optuna.exceptions.DuplicatedStudyError:
        opened = optuna.load_study(study_name=study.name, storage=storage)
        fresh = False
    there = [d.name.lower() for d in opened.directions]
    if there != directions:
        raise UserError(f"{study.name}: its Optuna storage has the directions {there}, the study {directions}")
    if fresh:
        from study.space import build_space

        space = build_space(study)
        for number, point in enumerate(space.start[: space.settings]):
            if number not in started:
                opened.enqueue_trial(dict(point), user_attrs={"setting": number})
    opened.sampler = make_sampler(study, len(opened.get_trials(deepcopy=False)))
    return opened, storage


class MemoryCopy:
    """A study in memory that is written on to its storage, for the one driver that works on it.

    A proposal and its end read and write Optuna's storage some twenty times, each a transaction through SQLAlchemy;
    that was most of a driver's own time per trial. In memory they cost next to nothing, and what follows from them is
    one transaction at the proposal and a few at the end.

    Args:
        stored: the study in its storage.
        storage: its storage.

    Attributes:
        study: the study in memory, with the sampler of the stored one.
    """

    def __init__(self, stored: optuna.Study, storage: RDBStorage) -> None:
        self._storage, self._study_id = storage, storage.get_study_id_from_name(stored.study_name)
        self.study = optuna.create_study(directions=stored.directions, sampler=stored.sampler)
        trials = stored.get_trials(deepcopy=False)
        self.study.add_trials(trials)
        mine = self.study.get_trials(deepcopy=False)
        # Of trials that are not over: id in the storage, and the trial as it stands there.
        self._there = {
            m.number: (t._trial_id, _still(m)) for t, m in zip(trials, mine, strict=True) if not m.state.is_finished()
        }
        self._changed: dict[int, None] = {}
        self._broke_off = False

    def changed(self, trial: optuna.Trial) -> None:
        """A trial is to be written on."""
        self._changed[trial.number] = None

    def write(self) -> None:
        """Bring the storage up to date; what cannot be written stays for the next time.

        Raises:
            SQLAlchemyError, optuna.exceptions.StorageInternalError: the storage cannot be used.
        """
        while self._changed:
            number = next(iter(self._changed))
            if self._broke_off:
                self._look_for(number)
            self._broke_off = True
            self._write(self.study.get_trials(deepcopy=False)[number])
            self._broke_off = False
            del self._changed[number]

    def _look_for(self, number: int) -> None:
        """A trial that was added just before the storage went away is not added again. Numbers are the same there."""
        stored = self._storage.get_all_trials(self._study_id, deepcopy=False)
        if number not in self._there and number < len(stored):
            self._there[number] = stored[number]._trial_id, _still(stored[number])

    def _write(self, trial: FrozenTrial) -> None:
        if trial.number not in self._there:
            trial_id = self._storage.create_new_trial(self._study_id, template_trial=trial)
        else:
            trial_id, before = self._there[trial.number]
            if self._storage.get_trial(trial_id).state.is_finished():  # written before the storage went away
                del self._there[trial.number]
                return
            if before.state is TrialState.WAITING:
                self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
            for name in trial.params.keys() - before.params.keys():
                distribution = trial.distributions[name]
                value = distribution.to_internal_repr(trial.params[name])
                self._storage.set_trial_param(trial_id, name, value, distribution)
            for step in trial.intermediate_values.keys() - before.intermediate_values.keys():
                self._storage.set_trial_intermediate_value(trial_id, step, trial.intermediate_values[step])
            for key, value in _news(before.user_attrs, trial.user_attrs):
                self._storage.set_trial_user_attr(trial_id, key, value)
            for key, value in _news(before.system_attrs, trial.system_attrs):
                self._storage.set_trial_system_attr(trial_id, key, value)
            if trial.state.is_finished():
                self._storage.set_trial_state_values(trial_id, trial.state, trial.values)
        if trial.state.is_finished():
            self._there.pop(trial.number, None)
        else:
            self._there[trial.number] = trial_id, _still(trial)


def _still(trial: FrozenTrial) -> FrozenTrial:
    """A trial as it stands: Optuna adds to the attributes of one that it has handed out."""
    still = copy.copy(trial)
    still.params, still.intermediate_values = dict(trial.params), dict(trial.intermediate_values)
    still.user_attrs, still.system_attrs = dict(trial.user_attrs), dict(trial.system_attrs)
    return still


def _news(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in now.items() if key not in before or before[key] != value]


@dataclass(frozen=True)
class Replicate:
    """A seed of a setting that is known and still to be run, or to be taken up again."""

    setting: int
    parameters: Mapping[str, Any]
    seed: int


class StudySearch(Searcher):
    """Proposes the trials of a study to Ray Tune and tells Optuna how they ended.

    Args:
        study: the study.
        space: its search space.
        folder: its folder, which holds the storage.
        common: what every trial's Ray configuration holds besides its own.
        ledger: what has happened; it says which trials are over and where they go on.
        driver: name of this driver among those that share a storage; its trials' ids begin with it. Empty for the
            only one.
        closed: says why no further trial may start, given how many have been proposed and have not started (None for
            one that was cut off); None from it if one may.
    """

    def __init__(
        self,
        study: StudyConfig,
        space: Space,
        folder: Path,
        common: Mapping[str, Any],
        ledger: Ledger,
        driver: str = "",
        closed: Callable[[int | None], str | None] = lambda _: None,
    ) -> None:
        super().__init__(metric=None, mode=None)
        self.study, self.space, self.folder = study, space, folder
        self.common, self.ledger, self.driver, self.closed = dict(common), ledger, driver, closed
        self._url = shared_url(study)
        stored, storage = _open(study, folder)
        # Other drivers' trials are seen in the storage alone.
        self._copy = None if driver else MemoryCopy(stored, storage)
        self._optuna = stored if self._copy is None else self._copy.study
        self._live: dict[str, optuna.Trial] = {}
        self._untold: list[tuple[optuna.Trial, str]] = []
        self._unnamed: optuna.Trial | None = None
        self._token: str | None = None
        self._known_left: int | None = None
        self._away_since: float | None = None
        self._settings = self._known_settings()
        self._ids, self._id_digits = self._known_ids()
        self._taken = self._taken_ids()
        self._spent = False
        already = len(self._optuna.get_trials(deepcopy=False))
        sampler = make_sampler(study, already, driver)
        self._sampler = DistinctSampler(
            sampler, space.distributions, self._is_taken, (study.search.seed + already) % 2**32
        )
        self._optuna.sampler = self._sampler
        self._queue = deque(self._replicates())

    # -------------------------------------------------------------------------------------------- proposing

    def _known_settings(self) -> dict[int, dict[str, Any]]:
        """Parameters of this driver's settings, by number, from the storage."""
        found: dict[int, dict[str, Any]] = {}
        for trial in self._optuna.get_trials(deepcopy=False):
            if trial.user_attrs.get("driver") == self.driver and trial.params and "seed" in trial.user_attrs:
                found.setdefault(int(trial.user_attrs["setting"]), dict(trial.params))
        return found

    def _known_ids(self) -> tuple[dict[int, str], int]:
        """Ids of this driver's settings, by number, and how long ids are in this study: as long as when it began."""
        known = {self.ledger.settings[t]: str(row["setting_id"]) for t, row in self.ledger.trials.items()}
        others = (t.user_attrs.get("setting_id") for t in self._optuna.get_trials(deepcopy=False))
        first = next((str(text) for text in (*known.values(), *others) if text is not None), "")
        return known, OLD_ID_DIGITS if len(first) == OLD_ID_DIGITS else ID_DIGITS

    def _taken_ids(self, but: int | None = None) -> set[str]:
        """Ids of the settings that are known, of other drivers too, but for that of one trial of the storage."""
        found = set(self._ids.values())
        for trial in self._optuna.get_trials(deepcopy=False):
            given_up = trial.state is TrialState.FAIL and "seed" not in trial.user_attrs
            if "setting_id" in trial.user_attrs and not given_up and trial.number != but:
                found.add(str(trial.user_attrs["setting_id"]))
        return found

    def _is_taken(self, parameters: Mapping[str, Any]) -> bool:
        return self._id_of(parameters) in self._taken

    def _id_of(self, parameters: Mapping[str, Any]) -> str:
        return setting_id(self.space.trial(dict(parameters), self.study.seeds[0]), self._id_digits)

    def _setting_id(self, number: int, config: TrialConfig) -> str:
        return self._ids.get(number) or setting_id(config, self._id_digits)

    def _replicates(self) -> list[Replicate]:
        """Seeds still to be run of the settings that are known: those that were cut off first.

        Earlier versions proposed a setting again; of such a one no further seed starts.
        """
        found = []
        first: dict[str, int] = {}
        for number in sorted(self._settings):
            again = first.setdefault(self._ids.get(number) or self._id_of(self._settings[number]), number) != number
            for seed in self.study.seeds:
                outcome = self.ledger.outcome(self.trial_id(number, seed))
                if (outcome is None and not again) or (outcome is not None and not outcome.finished):
                    found.append(Replicate(number, self._settings[number], seed))
        return sorted(found, key=lambda r: self.ledger.outcome(self.trial_id(r.setting, r.seed)) is None)

    def trial_id(self, setting: int, seed: int) -> str:
        """Id of a trial: the same whenever and in whatever order it is run."""
        place = self.study.seeds.index(seed)
        first = self.ledger.seeds_at_first or len(self.study.seeds)
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
        return len(self._live)

    def remaining(self) -> int:
        """Trials still to be run: seeds of known settings, and settings not yet proposed."""
        try:
            left = self._left()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError):
            if self._known_left is None:
                raise
            left = self._known_left  # the storage is away at the end of a run
        return len(self._queue) + left * len(self.study.seeds)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next trial's configuration, `FINISHED`, or None while the storage cannot be reached."""
        names = (str(t.user_attrs["trial_id"]) for t in self._live.values())
        proposed = sum(self.ledger.outcome(name) is None for name in names)
        if self.closed(None if self._cut_off() else proposed) is not None:
            return str(Searcher.FINISHED)
        try:
            self._tell_waiting()
            found = self._next()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            return self._wait(error)
        self._away_since = None
        if found is None:
            return str(Searcher.FINISHED)
        trial, replicate = found
        self._live[trial_id] = trial
        if self._copy is not None:
            self._copy.changed(trial)
            self._write_on()
        name = self.trial_id(replicate.setting, replicate.seed)
        config = self.space.trial(dict(replicate.parameters), replicate.seed)
        return {
            **self.common,
            "trial": config.to_json(),
            "trial_id": name,
            "setting_id": self._setting_id(replicate.setting, config),
            "setting": replicate.setting,
            "resume_from": self._checkpoints(name),
        }

    def _write_on(self) -> None:
        """Write on what has changed in memory, or leave it for later."""
        try:
            if self._copy is not None:
                self._copy.write()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            log.warning("the Optuna storage cannot be used: %s", _told(error, self._url))

    def _checkpoints(self, name: str) -> list[str]:
        """A trial's checkpoints, the newest first; in a store by their names there."""
        if "store" in self.common:
            return list(reversed(self.ledger.checkpoints.get(name, [])))
        return self.ledger.checkpoint_folders(name)

    def _wait(self, error: Exception) -> str | None:
        now = time.monotonic()
        if self._away_since is None:
            log.warning("the Optuna storage cannot be used: %s", _told(error, self._url))
            self._away_since = now
        # With nothing at work and no storage there is nothing to wait for in the end.
        return str(Searcher.FINISHED) if not self._live and now - self._away_since > _PATIENCE else None

    def _next(self) -> tuple[optuna.Trial, Replicate] | None:
        """Seeds that were cut off, then starting points, then further seeds, then settings of the sampler."""
        # One without its name is there where the storage went away.
        if self._unnamed is not None and (found := self._first_of(self._unnamed)) is not None:
            return found
        if not self._cut_off() and (found := self._starting_point()) is not None:
            return found
        if self._queue:
            replicate = self._queue[0]
            trial = self._adopt(replicate)
            self._queue.popleft()
            return trial, replicate
        while self.study.search.sampler != "grid" and self._left():
            if (found := self._first_of(self._optuna.ask(self.space.distributions))) is not None:
                return found
            self._spent = self._sampler.spent
            if not self._spent:  # another driver proposed it at the same time
                time.sleep(random.uniform(0, _APART))
        return None

    def _cut_off(self) -> bool:
        """Whether the next trial is one that an earlier run began."""
        return bool(self._queue) and self.ledger.outcome(self._name(self._queue[0])) is not None

    def _name(self, replicate: Replicate) -> str:
        return self.trial_id(replicate.setting, replicate.seed)

    def _starting_point(self) -> tuple[optuna.Trial, Replicate] | None:
        """A setting of the queue in the storage, which is filled once; several drivers may take from it."""
        while self._left() and self._optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            trial = self._optuna.ask(self.space.distributions)
            if "setting" not in trial.user_attrs:  # another driver was faster
                self._optuna.tell(trial, state=TrialState.FAIL)
                return None  # never of a study in memory
            if trial.user_attrs["setting"] in self._settings:  # an older copy of the storage was put back
                self._optuna.tell(trial, state=TrialState.FAIL)
                if self._copy is not None:
                    self._copy.changed(trial)
                continue
            if (found := self._first_of(trial)) is not None:
                return found
        return None

    def _first_of(self, trial: optuna.Trial) -> tuple[optuna.Trial, Replicate] | None:
        """Give a new setting its number and put its further seeds into the queue; None where it is known."""
        self._unnamed = trial
        if not self._claim(trial):
            fail(self._optuna, trial, "is a setting that has been proposed before")
            if self._copy is not None:
                self._copy.changed(trial)
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
        for key, value in self._attributes(replicate).items():
            if trial.user_attrs.get(key) != value:
                trial.set_user_attr(key, value)

    def _attributes(self, replicate: Replicate) -> dict[str, Any]:
        config = self.space.trial(dict(replicate.parameters), replicate.seed)
        return {
            "driver": self.driver,
            "setting": replicate.setting,
            "seed": replicate.seed,
            "trial_id": self._name(replicate),
            "setting_id": self._setting_id(replicate.setting, config),
        }

    def _adopt(self, replicate: Replicate) -> optuna.Trial:
        """A running Optuna trial with given parameters, not through the queue that all drivers take from."""
        # A storage that goes away in the middle may have the trial already.
        self._token = self._token or uuid.uuid4().hex
        trial = add_running(self._optuna, self.space, replicate.parameters, self._attributes(replicate), self._token)
        self._token = None
        return trial

    # ---------------------------------------------------------------------------------------------- telling

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: a trial is told once, when it is over, with its course."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how a trial ended: what the ledger says, or FAIL."""
        trial = self._live.pop(trial_id, None)
        if trial is not None:
            self._untold.append((trial, "error" if error else "interrupted"))
            try:
                self._tell_waiting()
            except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as problem:
                log.warning("the Optuna storage cannot be used: %s", _told(problem, self._url))

    def _tell_waiting(self) -> None:
        while self._untold:
            trial, reason = self._untold[0]
            # One that is over there was told just before the storage went away.
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                self._tell(trial, reason)
            if self._copy is not None:
                self._copy.changed(trial)
            self._untold.pop(0)
        if self._copy is not None:
            self._copy.write()

    def _tell(self, trial: optuna.Trial, reason: str) -> None:
        name = str(trial.user_attrs["trial_id"])
        outcome = self.ledger.outcome(name)
        if reason != "error" and outcome is not None and outcome.finished:
            tell(self._optuna, self.study, trial, self.ledger.trials[name], self.ledger.rows(name))
            return
        fail(self._optuna, trial, reason)

    def abandon(self, reason: str) -> None:
        """Tell Optuna of every trial that is still live; no end of a run leaves one RUNNING.

        One whose end is in the ledger already (the run ended during its last save) is told; any other is told FAIL.
        A storage that cannot be reached is told when the study is resumed.
        """
        self._untold += [(trial, reason) for trial in self._live.values()]
        self._live.clear()
        try:
            self._tell_waiting()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as problem:
            log.warning("the Optuna storage is told when the study is resumed: %s", _told(problem, self._url))

    # ------------------------------------------------------------------------------------------------ state

    def save(self, checkpoint_path: str) -> None:
        """Nothing worth saving: the queue and every result are in the ledger and in Optuna's storage."""
        Path(checkpoint_path).write_text("the state of this searcher is the study's ledger\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore; see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles its tuner and with it the searcher; a database connection stays behind."""
        return {"study": self.study, "folder": self.folder}


def add_running(
    opened: optuna.Study,
    space: Space,
    parameters: Mapping[str, Any],
    attributes: Mapping[str, Any],
    token: str | None = None,
) -> optuna.Trial:
    """Add a running trial with given parameters to a storage.

    Args:
        token: names the trial; the second time it is asked for it is not added again. None: a new one.
    """
    token = token or uuid.uuid4().hex

    def added() -> optuna.Trial | None:
        running = opened.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        mine = next((t for t in reversed(running) if t.user_attrs.get("token") == token), None)
        return None if mine is None else optuna.Trial(opened, mine._trial_id)

    if (trial := added()) is not None:
        return trial
    opened.add_trial(
        optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(parameters),
            distributions={name: space.distributions[name] for name in parameters},
            user_attrs={**attributes, "token": token},
        )
    )
    trial = added()
    assert trial is not None
    return trial


def objective_values(study: StudyConfig, trials: optuna.Study, values: Mapping[str, Any]) -> list[float]:
    """A finite value for every objective of a trial that is over.

    A trial that diverged counts with its best before that; one that was never scored counts as its untrained p0, and
    where there is not even that, as the worst value told so far. Optuna learns what a divergence means from the
    constraint, not from the value.
    """
    told = []
    for number, objective in enumerate(study.objectives):
        value = _told_value(objective, values)
        if value is None:
            complete = trials.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            seen = [t.values[number] for t in complete]
            worst = max if objective.resolved_direction == "minimize" else min
            sign = 1 if objective.resolved_direction == "minimize" else -1
            value = worst(seen) if seen else sign * _WORST
        told.append(float(value))
    return told


def _told_value(objective: Objective, values: Mapping[str, Any]) -> float | None:
    """What a trial that is over has of an objective; None where it was never scored."""
    value = values.get(objective.column)
    if value is None:
        value = values.get(f"{objective.metric}_initial")
    return float(value) if value is not None and math.isfinite(value) else None


def _course(study: StudyConfig, rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """What a pruned trial is told to have had at its epochs: nothing where that is no single quality."""
    metric = study.objectives[0].metric
    if len(study.objectives) > 1 or metric not in METRIC_BY_NAME:
        return {}
    return {int(r["epoch"]): float(r[metric]) for r in reversed(rows) if r["epoch"] > 0 and r[metric] is not None}


def fail(trials: optuna.Study, trial: optuna.Trial, reason: str) -> None:
    """Tell Optuna that a trial ended without a result of its own."""
    trial.set_user_attr("reason", reason)
    trials.tell(trial, state=TrialState.FAIL)


def tell(
    trials: optuna.Study,
    study: StudyConfig,
    trial: optuna.Trial,
    values: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Tell Optuna of a trial that is over.

    Measured trials are COMPLETE, with finite values and a constraint that says whether they were stable. A pruned one
    is PRUNED; with a single objective its course goes along, which TPE learns from. Failed and stopped ones are FAIL.

    Args:
        values: the trial's columns of `trials.parquet`.
        rows: its epochs.
    """
    outcome = Outcome(values["outcome"])
    if outcome in (Outcome.FAILED, Outcome.STOPPED):
        fail(trials, trial, str(values.get("message") or outcome.value))
        return
    for name in ("outcome", "cause", "iteration"):
        if values.get(name) is not None:
            trial.set_user_attr(name, values[name])
    if outcome is Outcome.PRUNED:
        for number, value in sorted(_course(study, rows).items()):
            trial.report(value, number)
        _constrain(trial, -1.0)
        trials.tell(trial, state=TrialState.PRUNED)
        return
    _constrain(trial, -1.0 if outcome is Outcome.COMPLETED else 1.0)
    trials.tell(trial, objective_values(study, trials, values), state=TrialState.COMPLETE)


def _constrain(trial: optuna.Trial, value: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # told a second time, after a storage that was away
        trial.set_constraint(STABLE, value)


def reconcile(study: StudyConfig, space: Space, folder: Path, ledger: Ledger, driver: str = "") -> int:
    """Bring the storage in line with the ledger after a run that ended anyhow.

    A RUNNING trial of this driver whose end is in the ledger is told; any other of its is told FAIL. A trial that is
    in the ledger and not in the storage (another copy of it was put back, or it had to be made anew) is added.

    Returns:
        How many trials had to be added.
    """
    opened = open_storage(study, folder, set(ledger.settings.values()))
    known: set[str] = set()
    for frozen in opened.get_trials(deepcopy=False):
        if frozen.state is TrialState.RUNNING:
            _settle(study, opened, frozen, ledger, driver)
        if frozen.user_attrs.get("driver") == driver and "trial_id" in frozen.user_attrs:
            known.add(frozen.user_attrs["trial_id"])
    missing = [t for t in ledger.trials if t not in known]
    for trial_id in missing:
        config = TrialConfig.model_validate_json(ledger.trials[trial_id]["config"])
        number = ledger.settings[trial_id]
        attributes = {
            "driver": driver,
            "setting": number,
            "seed": config.seed,
            "trial_id": trial_id,
            "setting_id": ledger.trials[trial_id]["setting_id"],
        }
        parameters = {key: _as_proposed(d, lookup(config, key)) for key, d in space.distributions.items()}
        trial = add_running(opened, space, parameters, attributes)
        if Outcome(ledger.trials[trial_id]["outcome"]).finished:
            tell(opened, study, trial, ledger.trials[trial_id], ledger.rows(trial_id))
        else:
            fail(opened, trial, "interrupted")
    return len(missing)


def set_right(study: StudyConfig, space: Space, folder: Path, ledger: Ledger, driver: str = "") -> str | None:
    """See that the storage says of the trials that are over what the ledger does: the sampler learns from it.

    One that does not is kept beside, and `reconcile` makes it anew from the ledger.

    Returns:
        What was done, in words; None where nothing had to be.

    Raises:
        UserError: a shared storage, which other drivers need, says something else.
    """
    if not driver and not (folder / STORAGE).is_file():
        return None
    opened, storage = _open(study, folder, set(ledger.settings.values()))
    if (wrong := _disagreement(study, space, opened, ledger, driver)) is None:
        return None
    if driver:
        raise UserError(
            f"search.storage: {wrong}; put the storage back as it was, or begin the study anew under another name"
        )
    storage.engine.dispose()
    number = 1
    while (kept := folder / f"{STORAGE}.changed-{number}").exists() or kept.is_symlink():
        number += 1
    (folder / STORAGE).replace(kept)
    return f"{STORAGE} was changed: {wrong}; kept as {kept.name}, made anew from the journal"


def _disagreement(study: StudyConfig, space: Space, opened: optuna.Study, ledger: Ledger, driver: str) -> str | None:
    """The first trial of which a storage says something else than the ledger does, and what; None without any."""
    told: set[str] = set()
    for frozen in opened.get_trials(deepcopy=False):
        attributes = frozen.user_attrs
        if driver and attributes.get("driver") != driver:
            continue  # another driver's, whose ledger is elsewhere
        try:
            frozen._validate()  # `MemoryCopy` cannot take one that is not
        except (ValueError, TypeError) as error:
            return f"trial {frozen.number} is none ({one_line(error)[:120]})"
        if frozen.state is TrialState.WAITING and not driver:
            number, point = attributes.get("setting"), frozen.system_attrs.get("fixed_params")
            if not isinstance(number, int) or not 0 <= number < len(space.start) or point != dict(space.start[number]):
                return f"trial {frozen.number} waits there and is no starting point of the study"
        if frozen.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            continue
        name = str(attributes.get("trial_id"))
        outcome = ledger.outcome(name)
        if outcome not in (*MEASURED, Outcome.PRUNED) or name in told:
            return f"trial {frozen.number} ({shown(name, quoted=False)}) is over there, in the journal it is not"
        told.add(name)
        for what, there, here in _compared(study, space, frozen, ledger, name):
            if not _same(there, here):
                return f"{name} has {what} {shown(there)}, in the journal {shown(here)}"
    over = (t for t in ledger.trials if ledger.outcome(t) in (*MEASURED, Outcome.PRUNED) and t not in told)
    known = {t.user_attrs.get("trial_id"): t.state for t in opened.get_trials(deepcopy=False)}
    for name in over:
        if known.get(name) is TrialState.FAIL:
            return f"{name} has no result, in the journal it is {ledger.trials[name]['outcome']}"
    return None


def _compared(
    study: StudyConfig, space: Space, frozen: FrozenTrial, ledger: Ledger, name: str
) -> Iterator[tuple[str, Any, Any]]:
    """What a storage says of a trial that is over, and what the ledger does: what it is, there, here."""
    row = ledger.trials[name]
    outcome, config = Outcome(row["outcome"]), TrialConfig.model_validate_json(row["config"])
    yield "the setting", frozen.user_attrs.get("setting"), ledger.settings[name]
    yield "the seed", frozen.user_attrs.get("seed"), config.seed
    yield "the fields", sorted(frozen.params), sorted(space.distributions)
    for key, distribution in space.distributions.items():
        if frozen.params[key] is not None:  # else the method has filled it in
            yield key, frozen.params[key], lookup(config, key)
        yield f"another range of {key}:", frozen.distributions[key], distribution
    yield "the state", frozen.state.name, "PRUNED" if outcome is Outcome.PRUNED else "COMPLETE"
    stable = -1.0 if outcome in (Outcome.COMPLETED, Outcome.PRUNED) else 1.0
    yield f"{STABLE} =", frozen.constraints.get(STABLE), stable
    if outcome is Outcome.PRUNED:
        yield "the course", frozen.intermediate_values, _course(study, ledger.rows(name))
        return
    for objective, value in zip(study.objectives, frozen.values, strict=True):
        if (here := _told_value(objective, row)) is not None:  # else what it was told follows from other trials
            yield objective.metric, value, here


def _as_proposed(distribution: Any, value: Any) -> Any:
    """A trial's value as the search proposed it: where that was null the method has filled it in."""
    choices = getattr(distribution, "choices", (value,))
    return value if value in choices or None not in choices else None


def _same(there: Any, here: Any) -> bool:
    numbers = all(isinstance(value, int | float) for value in (there, here))
    # One is written as a decimal, the other as it is in memory.
    return math.isclose(there, here, rel_tol=1e-12) if numbers else bool(there == here)


def _settle(study: StudyConfig, opened: optuna.Study, frozen: FrozenTrial, ledger: Ledger, driver: str) -> None:
    """End a RUNNING trial that nobody runs any more."""
    attrs, live = frozen.user_attrs, optuna.Trial(opened, frozen._trial_id)
    if "seed" not in attrs:
        # Its driver was killed between the proposal and the naming of it.
        age = time.time() - frozen.datetime_start.timestamp() if frozen.datetime_start else math.inf
        if driver and age < _STALE:
            return  # another driver may be about to name it
        fail(opened, live, "interrupted")
        if "fixed_params" in frozen.system_attrs:
            opened.enqueue_trial(frozen.system_attrs["fixed_params"], user_attrs={"setting": attrs["setting"]})
        return
    if attrs.get("driver") != driver:
        return
    trial_id = str(attrs["trial_id"])
    outcome = ledger.outcome(trial_id)
    if outcome is not None and outcome.finished:
        tell(opened, study, live, ledger.trials[trial_id], ledger.rows(trial_id))
    else:
        fail(opened, live, "interrupted")
