"""Optuna's storage of a study: a file of the folder, or a server that several studies share."""

from __future__ import annotations

import importlib.util
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from study.config.addresses import filled
from study.config.errors import UserError, one_line
from study.config.study import StudyConfig
from study.search.earlier_trials import EARLIER, earlier_trials
from study.search.optuna_private import NumberedSobol
from trainables.results.credentials import redacted
from trainables.results.layout import STORAGE
from trainables.results.own import OWN

AWAY = (SQLAlchemyError, optuna.exceptions.StorageInternalError)
"""What is raised where a storage cannot be used."""
_CMA_TRIALS = 10
"""Earlier trials from which CMA-ES can begin: it takes the best tenth."""
_TABLE_TRIES, _TABLE_SECONDS = 10, 0.5
"""Times and pauses of opening a shared storage whose tables another driver is making."""
_MAKER = "maker"
"""Attribute of a shared study: which driver enters what it begins with."""
_CLAIM_SECONDS = 1.0
_MAKER_SECONDS = 5.0
"""Without a new trial for so long, the driver that makes a shared study is taken to be dead."""


def storage_url(folder: Path) -> str:
    """URL of the Optuna storage in a study's folder, an SQLite file that optuna-dashboard opens."""
    return f"sqlite:///{(folder / STORAGE).resolve()}"


def shared_url(study: StudyConfig) -> str | None:
    """URL of the storage that several drivers share, with `${NAME}` replaced; None for the one in the folder."""
    return filled(study.search.storage) if study.search.storage else None


def storage_error(error: BaseException, url: str | None) -> str:
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
            raise UserError(f"search.storage: {storage_error(error, shared)}") from None
        except AWAY as error:
            raise UserError(f"search.storage: cannot be reached ({storage_error(error, shared)})") from None
    storage = RDBStorage(storage_url(folder))

    @event.listens_for(storage.engine, "connect")
    def _fast(connection: Any, _record: Any) -> None:
        # No write is waited for: the ledger is the truth, and the storage can be rebuilt from it.
        connection.execute("PRAGMA synchronous = OFF")

    storage.engine.dispose()
    return storage


def _connected(url: str) -> RDBStorage:
    """A shared storage. Of drivers that find it empty at once each makes its tables, and all but one fail at that."""
    tries = 1
    while True:
        try:
            # Connections die on a weekend; each is tried before it is used.
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except SQLAlchemyError as error:
            if tries == _TABLE_TRIES or not (isinstance(error, IntegrityError) or "already exists" in str(error)):
                raise
        tries += 1
        time.sleep(_TABLE_SECONDS)


def check_sampler(study: StudyConfig) -> None:
    """That the package of a study's sampler is there. UserError: it is not; says which extra brings it."""
    if study.search.sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
        missing = "cmaes needs the package cmaes, which is not installed"
        raise UserError(f"search.sampler: {missing}; pip install 'mebm-study[cmaes]'")


def make_sampler(
    study: StudyConfig, already: int, driver: str = "", *, known: int = 0, earlier: Sequence[FrozenTrial] = ()
) -> BaseSampler:
    """The sampler of a study, whose seed the stored trials shift, or a resumed study would propose its first again.

    So does the driver's name: those that share a storage propose different ones. A Sobol sequence is one for all, and
    goes on at its point of number `known`, that of the settings that came from it: earlier ones are known. CMA-ES
    begins where the `earlier` trials of other studies were good.
    """
    check_sampler(study)
    search = study.search
    seed = (search.seed + already + zlib.crc32(driver.encode())) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        first = search.startup_trials
        match search.sampler:
            case "tpe":
                return TPESampler(seed=seed, n_startup_trials=first, multivariate=True, constant_liar=True)
            case "gp":
                return GPSampler(seed=seed, n_startup_trials=first, deterministic_objective=False)
            case "nsga2":
                return NSGAIISampler(seed=seed)
            case "nsga3":
                return NSGAIIISampler(seed=seed)
            case "cmaes":
                scored = [t for t in earlier if t.state is TrialState.COMPLETE]
                enough = scored if len(scored) >= _CMA_TRIALS else None
                return CmaEsSampler(seed=seed, with_margin=True, source_trials=enough)
            case "qmc":
                return NumberedSobol(study.space.distributions, search.seed, known)
            case _:
                return RandomSampler(seed=seed)


def open_storage(study: StudyConfig, folder: Path, started: Collection[int] = ()) -> optuna.Study:
    """The study in its Optuna storage, made if need be, its starting points but those `started` in the queue."""
    return open_both(study, folder, started)[0]


def open_both(study: StudyConfig, folder: Path, started: Collection[int] = ()) -> tuple[optuna.Study, RDBStorage]:
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        names = [o.metric.removeprefix(OWN) for o in study.objectives]
        if opened.metric_names != names:
            opened.set_metric_names(names)  # for whoever looks at it, as optuna-dashboard does
    there = [d.name.lower() for d in opened.directions]
    if there != directions:
        raise UserError(f"{study.name}: its Optuna storage has the directions {there}, the study {directions}")
    opened.sampler = make_sampler(study, len(opened.get_trials(deepcopy=False)))
    beginning = (
        earlier_trials(study, folder, opened.sampler),
        {
            number: dict(point)
            for number, point in enumerate(study.space.start[: study.space.settings])
            if number not in started
        },
    )
    shared = shared_url(study) is not None
    while fresh or _left_half_made(opened, *beginning, patience=_MAKER_SECONDS if shared else 0):
        if _fill(opened, *beginning, shared=shared, fresh=fresh):
            opened.sampler = make_sampler(study, len(opened.get_trials(deepcopy=False)))
            break
        fresh = False
    return opened, storage


def _fill(
    opened: optuna.Study,
    earlier: Sequence[FrozenTrial],
    points: Mapping[int, dict[str, Any]],
    *,
    shared: bool,
    fresh: bool,
) -> bool:
    """Enter what a study begins with and its storage has not; False where another driver has taken that over."""
    me = uuid.uuid4().hex
    if shared:
        opened.set_user_attr(_MAKER, me)
        if not fresh:  # others may have waited as long; the last one that said so does it
            time.sleep(_CLAIM_SECONDS)
    trials, queued = _missing(opened, earlier, points)
    entries: list[Callable[[], None]] = [partial(opened.add_trial, trial) for trial in trials]
    entries += [partial(opened.enqueue_trial, p, user_attrs={"setting": number}) for number, p in queued.items()]
    for enter in entries:
        if shared and opened.user_attrs.get(_MAKER) != me:
            return False
        enter()
    return True


def _missing(
    opened: optuna.Study, earlier: Sequence[FrozenTrial], points: Mapping[int, dict[str, Any]]
) -> tuple[list[FrozenTrial], dict[int, dict[str, Any]]]:
    """Of what a study begins with, the earlier trials and the starting points that its storage has not."""
    there = [t.user_attrs for t in opened.get_trials(deepcopy=False)]
    taken, queued = {t.get(EARLIER) for t in there}, {t.get("setting") for t in there}
    trials = [t for t in earlier if t.user_attrs[EARLIER] not in taken]
    return trials, {number: point for number, point in points.items() if number not in queued}


def _left_half_made(
    opened: optuna.Study, earlier: Sequence[FrozenTrial], points: Mapping[int, dict[str, Any]], patience: float
) -> bool:
    """Whether its maker died while it entered what the study begins with: nothing more comes, and no trial began."""
    before, until = -1, 0.0
    while any(_missing(opened, earlier, points)):
        trials = opened.get_trials(deepcopy=False)
        if any(t.state is not TrialState.WAITING and EARLIER not in t.user_attrs for t in trials):
            return False
        if len(trials) != before:
            before, until = len(trials), time.monotonic() + patience
        elif time.monotonic() >= until:
            return True
        time.sleep(min(patience, _TABLE_SECONDS))
    return False
