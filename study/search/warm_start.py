"""Warm start: which trials of earlier studies a new one learns from (`search.from`), and what differs between them.

A trial is taken where its values of the searched fields, searched or fixed there, lie in the new search space. It is
never taken where the objective was scored under another protocol: such numbers do not compare.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from optuna.distributions import CategoricalDistribution, IntDistribution

from analysis.results.labels import text
from analysis.results.load import Results, current_epochs, load
from analysis.results.messages import ResultsError
from analysis.results.parquet import records
from study.config.errors import UserError, one_line, shown
from study.config.fields import is_script
from study.config.space import any_value, contains, snapped
from study.config.study import COST_METRICS, Objective, StudyConfig
from study.record.warm_start import MAX_TAKEN, Source, Taken, WarmStart, digest_of
from study.search.tell import TOLD, WORST, learning_curve, told_value
from trainables.results.bounded import parse_json
from trainables.results.layout import EPOCHS, TRIALS
from trainables.results.schema import METRIC_BY_NAME, Outcome

_SCORED = ("dataset", "dataset_args", "image_size", "train_images", "validation_images", "evaluation.weights")
"""Fields that decide against what a score is taken, and of which weights."""
_SCORED_BY = {"fresh": ("evaluation.fresh_steps",), "accuracy": ("evaluation.accuracy_on",)}
"""Further ones of metrics with such a word in their name."""
_HOW = frozenset(
    ("seed", "data_dir", "device", "signal_every", "evaluation.keep_model", "evaluation.batch_size", "python")
)
"""Fields that change no result, or are expected to differ."""
_NAMED, _VALUES = 8, 3
"""Differing settings that a line names, and values of each."""


class Scored(NamedTuple):
    """How a study scores a metric: how the protocol's id begins, and how many images it asks for; None: all."""

    begins: str
    asked: int | None = None


def collect(
    study: StudyConfig, protocols: Mapping[str, Scored] | None = None, images: str | None = None
) -> WarmStart:  # fmt: skip
    """What a study takes of the ones under `search.from`, read with the limits of any results.

    Args:
        protocols: the study's own, by metric, as far as they are known (`own_protocols`).
        images: fingerprint of the study's own images, where it is known (`own_images`).

    Raises:
        UserError: a place holds no study; an objective was not measured there, or under another protocol; too many.
    """
    sources: list[Source] = []
    trials: list[Taken] = []
    read: dict[str, str] = {}
    for place in study.search.earlier:
        try:
            results = load(place)
        except (ResultsError, OSError) as error:
            raise UserError(f"search.from: {one_line(error)}") from error
        for name in results.studies:
            folder = results.origin(name)
            if folder in read:
                places = f"{shown(read[folder], 200, quoted=False)} and {shown(place, 200, quoted=False)}"
                raise UserError(
                    f"search.from: {shown(name, quoted=False)} is in {places}; its trials would count twice"
                )
            read[folder] = place
            source, taken = _Reader(study, results, name, place, protocols or {}, images).read()
            sources.append(source)
            trials += taken
    if len(trials) > MAX_TAKEN:
        raise UserError(f"search.from: {len(trials):,} trials, but at most {MAX_TAKEN:,} can be learnt from")
    return WarmStart(tuple(sources), tuple(trials))


def own_protocols(study: StudyConfig) -> dict[str, Scored]:
    """The protocols of a built-in study by metric; what follows the beginning of an id is how many samples there were.

    UserError: an extractor of the user's own cannot be loaded.
    """
    from trainables.data.subset import training_images
    from trainables.evaluation.inception import NoFeaturesError
    from trainables.evaluation.inception_scores import loaded
    from trainables.evaluation.own_features import own_extractor
    from trainables.evaluation.scores import protocols_for
    from trainables.evaluation.small_features import small_extractor

    if study.is_script:
        return {}
    trial = study.space.built_in(_some_values(study), study.seeds[0])
    data = training_images(trial)
    made_by = trial.method_args.made_by(trial.evaluation.fresh_steps)
    found: dict[str, Scored] = {}
    for protocol in protocols_for(trial, data.shape):
        if protocol.extractor is not None:
            try:
                protocol = loaded(protocol, own_extractor(protocol.extractor))
            except (ValueError, NoFeaturesError) as error:
                raise UserError(one_line(error)) from error
        length = f"-{made_by}" if protocol.source == "fresh" else ""
        for metric in METRIC_BY_NAME.values():
            if metric.source != protocol.source or metric.features not in ("", protocol.features):
                continue
            name = f"{small_extractor(data).id}-{protocol.source}" if metric.features == "small" else protocol.name
            found.setdefault(metric.name, Scored(f"{name}{length}", protocol.count))
    return found


def own_images(study: StudyConfig) -> str | None:
    """Fingerprint of a built-in study's images; None of a script's, and where the search changes them."""
    from trainables.data.subset import training_images

    if study.is_script or any(key.split(".")[0] in _SCORED for key in study.space.distributions):
        return None
    return training_images(study.space.built_in(_some_values(study), study.seeds[0])).fingerprint


def _some_values(study: StudyConfig) -> dict[str, Any]:
    """Values of the searched fields, those of the first starting point where there is one."""
    first = {name: any_value(d) for name, d in study.space.distributions.items()}
    return first | dict(next(iter(study.space.start), {}))


class _Reader:
    """Reads one earlier study for a new one."""

    def __init__(
        self,
        study: StudyConfig,
        results: Results,
        name: str,
        place: str,
        protocols: Mapping[str, Scored],
        images: str | None,
    ) -> None:
        self.study, self.results, self.name, self.place = study, results, name, place
        self.protocols, self.images = protocols, images
        self.space, self.script = study.space, study.is_script

    @cached_property
    def _epochs(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of a trial's epochs, in their order."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in records(current_epochs(self.results.epochs[self.results.epochs["study"] == self.name])):
            found[row["trial_id"]].append(row)
        return found

    def read(self) -> tuple[Source, list[Taken]]:
        """What is taken of it."""
        left: Counter[str] = Counter()
        rows = records(self.results.trials[self.results.trials["study"] == self.name])
        found: list[tuple[dict[str, Any], Taken]] = []
        other: dict[str, None] = {}
        for row in rows:
            taken = self._taken(row)
            if isinstance(taken, str):
                left[taken] += 1
            elif wrong := self._other_protocol(row, taken):
                left["protocol"] += 1
                other.setdefault(wrong)
            else:
                found.append((row, taken))
        where = f"search.from: {shown(self.place, 200, quoted=False)}"
        if other and not found:
            raise UserError(f"{where}: {next(iter(other))}; such scores do not compare")
        trials = self._with_values(found)
        left["unmeasured"] += len(found) - len(trials)
        if not trials and rows:
            counts = f"{left['outside']} are outside of search.space, {left['unmeasured']} have no result"
            raise UserError(f"{where}: none of its {len(rows)} trials can be learnt from ({counts})")
        folder = self.results.folders[self.name]
        digest = digest_of(folder, (TRIALS, EPOCHS)) or ""
        counts_of = (left["outside"], left["unmeasured"], left["protocol"])
        return Source(self.name, self.place, digest, len(trials), *counts_of, tuple(self._differences(trials))), trials

    def _taken(self, row: Mapping[str, Any]) -> Taken | str:
        """A trial without its values; or why it is left out."""
        outcome = Outcome(row["outcome"]) if row["outcome"] in [*Outcome] else None
        if outcome not in TOLD:
            return "unmeasured"
        assert outcome is not None
        try:
            there = parse_json(row["config"] or "")
            parameters = self._parameters(there)
            here = json.loads(self.space.trial(parameters, self.study.seeds[0]).to_json())
        except (ValueError, TypeError, KeyError, UserError):  # not a trial of this study's
            return "outside"
        curve = self._curve(row)
        epochs = self._epochs.get(row["trial_id"], [])
        differs = dict(_differing(there, here, {self._path(key) for key in parameters}))
        differs |= {} if self._hardware is None else {"hardware": (row["hardware"], self._hardware)}
        return Taken(
            self.name, row["trial_id"], outcome, parameters, None,
            learning_curve(self.study, row, epochs) if outcome is Outcome.PRUNED else {},
            curve, row["epochs_done"] or 0, row["iterations_per_epoch"],
            {key: pair for key, pair in differs.items() if pair[0] != pair[1]},
        )  # fmt: skip

    @cached_property
    def _hardware(self) -> str | None:
        """What this machine trains on, where an objective is a cost; None where none is."""
        if not any(o.metric in COST_METRICS for o in self.study.objectives):
            return None
        import torch

        from trainables.training.device import cpu_name

        on_gpu = self.study.resources.gpus != 0 and torch.cuda.is_available()
        return torch.cuda.get_device_name(0) if on_gpu else cpu_name()

    def _path(self, key: str) -> str:
        return f"args.{key}" if self.script else key

    def _parameters(self, config: Any) -> dict[str, Any]:
        """The searched fields of an earlier trial; a ValueError where one is outside of the space."""
        if not isinstance(config, dict) or is_script(config) != self.script:
            raise ValueError("not a configuration of such a trial")
        found = {}
        for key, distribution in self.space.distributions.items():
            value: Any = config
            for part in ("args", key) if self.script else key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if not contains(distribution, value):
                raise ValueError(f"{key} = {value}")
            if isinstance(distribution, CategoricalDistribution):
                value = next(
                    c for c in distribution.choices if c == value and isinstance(c, bool) == isinstance(value, bool)
                )
            else:
                value = int(value) if isinstance(distribution, IntDistribution) else snapped(distribution, float(value))
            found[key] = value
        return found

    def _curve(self, row: Mapping[str, Any]) -> dict[int, float]:
        """The metric that pruning looks at, by epoch, without the untrained model's."""
        metric = self._metric_of_pruning(row)
        if metric is None:
            return {}
        rows = self._epochs.get(row["trial_id"], [])
        return {r["epoch"]: float(r[metric]) for r in rows if r["epoch"] > 0 and r.get(metric) is not None}

    def _metric_of_pruning(self, row: Mapping[str, Any]) -> str | None:
        named = self.study.pruning_metric if self.study.pruning.rule != "none" else None
        found = Objective(metric=named, direction=None).resolved(row) if named else None
        return found.metric if found else None

    def _other_protocol(self, row: Mapping[str, Any], taken: Taken) -> str | None:
        """Which metric was scored under another protocol there, and how that shows; None where none was."""
        resolved = [o.resolved(row) for o in self.study.objectives]
        metrics = [o.metric for o in resolved if o is not None and o.metric not in COST_METRICS]
        pruning = self._metric_of_pruning(row)
        for metric in dict.fromkeys([*metrics, *([pruning] if pruning else [])]):
            further = [f for word, fields in _SCORED_BY.items() if word in metric for f in fields]
            for field in (*_SCORED, *further):
                for key, (there, here) in taken.differs.items():
                    if key == field or key.startswith(f"{field}."):
                        return (
                            f"{metric} was scored under another protocol ({key} {text(there)} there, {text(here)} here)"
                        )
            images = (row.get("data_source") or "").rpartition("#")[2]
            if images and self.images is not None and images != self.images:
                return (
                    f"{metric} was scored on another data set (images {shown(images)} there, {shown(self.images)} here)"
                )
            there, own = row.get(f"{metric}_protocol"), self.protocols.get(metric)
            if there is None or own is None:
                continue
            if not (number := re.fullmatch(rf"{re.escape(own.begins)}(?:-n(\d+))?", there)):
                return f"{metric} was scored under another protocol ({shown(there)} there, {own.begins} here)"
            if "buffer_size" in taken.differs and "buffer" in metric:  # a smaller buffer has fewer images to score
                sizes = [min(size, own.asked or size) for size in taken.differs["buffer_size"]]
                count = int(number[1] or sizes[0])
                if count < sizes[0]:  # one that was not full yet, and would not be here
                    sizes[1] = min(sizes[1], count)
                if count != sizes[1]:
                    return f"{metric} was scored under another protocol ({count:,} images there, {sizes[1]:,} here)"
        return None

    def _with_values(self, found: Sequence[tuple[dict[str, Any], Taken]]) -> list[Taken]:
        """The trials with a value per objective; bad ends without one have the worst of all, as in the study itself.

        One that completed without a score is left out.
        """
        objectives = self.study.objectives
        told = [[told_value(self.study, o, row) for o in objectives] for row, _ in found]
        signs = [1 if o.resolved_direction == "minimize" else -1 for o in objectives]
        scored = [v for (_, t), v in zip(found, told, strict=True) if t.outcome is not Outcome.PRUNED]
        worst = [
            sign * max((sign * v for values in scored if (v := values[i]) is not None), default=WORST)
            for i, sign in enumerate(signs)
        ]
        trials = []
        for (_, taken), values in zip(found, told, strict=True):
            if taken.outcome is Outcome.PRUNED:
                trials.append(taken)
            elif taken.outcome is not Outcome.COMPLETED or None not in values:
                whole = tuple(w if v is None else v for v, w in zip(values, worst, strict=True))
                trials.append(Taken(**{**vars(taken), "values": whole}))
        return trials

    def _differences(self, trials: Sequence[Taken]) -> Iterator[str]:
        """Settings outside of the search that differ, in words, those of most trials first."""
        pairs: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        for trial in trials:
            for key, pair in trial.differs.items():
                pairs[key].append(pair)
        for key, found in sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0])):
            there, here = (list(dict.fromkeys(text(pair[i]) for pair in found)) for i in (0, 1))
            of = "" if len(found) == len(trials) else f" ({len(found)} of them)"
            yield f"{key} {_some(there)} there, {_some(here)} here{of}"


def _some(values: Sequence[str]) -> str:
    more = f" and {len(values) - _VALUES} more" if len(values) > _VALUES else ""
    return ", ".join(shown(v, quoted=False) for v in values[:_VALUES]) + more


def _differing(there: Mapping[str, Any], here: Mapping[str, Any], searched: set[str]) -> Iterator[tuple[str, Any]]:
    """Fields that differ between two configurations, with both values."""
    flat = [dict(_flat(values)) for values in (there, here)]
    for key in dict.fromkeys([*flat[1], *flat[0]]):
        if key in searched or key in _HOW:
            continue
        pair = tuple(json.dumps(f.get(key)) if isinstance(f.get(key), list) else f.get(key) for f in flat)
        if pair[0] != pair[1]:
            yield key, pair


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", None if value == {} else value


def said(found: WarmStart) -> Iterator[str]:
    """A line per earlier study."""
    for source in found.sources:
        differs = source.differs
        if len(differs) > _NAMED:
            differs = (*differs[:_NAMED], f"and {len(differs) - _NAMED} more, in manifest.json")
        yield Source(**{**vars(source), "differs": differs}).text()
