"""`search.from`: what a study takes of earlier ones, what it says of that, and that a resume is exact without them."""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from optuna.trial import TrialState

from study.config.errors import UserError
from study.config.load import validate_study
from study.record import warm_start
from study.record.ledger import Ledger
from study.record.manifest import write_manifest
from study.record.warm_start import digest_of, read_warm_start, refuse_other_start, write_warm_start
from study.run.stopping import StopPolicy
from study.search.earlier_trials import EARLIER, STABLE
from study.search.searcher import StudySearch
from study.search.storage import open_storage
from study.search.tell import reconcile, set_right
from study.search.warm_start import Scored, collect, own_images, said
from trainables.results.files import write_text
from trainables.results.layout import STORAGE, WARM_START
from trainables.results.schema import Outcome

PROTOCOL = "small-v1-digits-e04c266c-buffer-n1000"
SPACE = {"sampling_steps": {"low": 1, "high": 8}, "step_size": {"low": 0.1, "high": 10, "log": True}}


def make_study(**changes):
    search = {"sampler": "tpe", "trials": 6, "startup_trials": 2, "space": SPACE, **changes.pop("search", {})}
    trial = {"dataset": "digits", "epochs": 4, "iterations_per_epoch": 10, **changes.pop("trial", {})}
    return validate_study({"name": "new", "trial": trial, "search": search, **changes}, "test")


class Recorded:
    """An earlier study's folder, written by a real ledger."""

    def __init__(self, folder, study):
        folder.mkdir()
        self.folder, self.study = folder, study
        self.ledger = Ledger(folder, study.name)
        self.ledger.run({"driver": "", "config": study.model_dump(mode="json"), "code": {}})

    def add(self, outcome, values, curve=(), best=None, **columns):
        name = f"t{len(self.ledger.trials) + 1:04d}"
        trial = self.study.space.trial(values, 0)
        self.ledger.start(name, trial, name, 0.0)
        told = {"outcome": "running", "iterations_planned": 40, "iterations_per_epoch": 10, "epochs_done": len(curve),
                "hardware": "a CPU", "train_seconds": 1.0, "seconds_per_iteration": 0.1, "fd_buffer_protocol": PROTOCOL, "fd_buffer_initial": 9.0, **columns}  # fmt: skip
        for epoch, value in enumerate(curve, 1):
            row = {"epoch": epoch, "iteration": 10 * epoch, "train_seconds": 1.0, "evaluation_seconds": 1.0,
                   "fd_buffer": value, "fd_buffer_protocol": PROTOCOL}  # fmt: skip
            self.ledger.report(name, row, told)
        if outcome == "running":
            return
        if outcome in ("pruned", "failed", "stopped"):
            self.ledger.end(name, Outcome(outcome), "why")
        else:
            cause = None if outcome == "completed" else "energy_gap"
            best = min(curve, default=None) if best is None else best
            self.ledger.report(name, None, told | {"outcome": outcome, "cause": cause, "fd_buffer_best": best})

    def done(self):
        self.ledger.close()
        write_manifest(self.folder, self.study)
        write_text(self.folder / "study.yaml", self.study.to_yaml())
        return str(self.folder)


def point(steps, alpha=1.0):
    return {"sampling_steps": steps, "step_size": alpha}


@pytest.fixture
def earlier(tmp_path):
    """Nine trials: four that were measured in the new space, two outside of it, three without a result."""
    recorded = Recorded(
        tmp_path / "old", make_study(name="old", search={"space": {**SPACE, "sampling_steps": {"low": 1, "high": 20}}})
    )
    recorded.add("completed", point(4), [3.0, 2.0, 1.0, 0.5])
    recorded.add("diverged", point(1), [3.0])
    recorded.add("diverged", point(2), fd_buffer_initial=None)
    recorded.add("pruned", point(3), [5.0, 4.0])
    recorded.add("completed", point(20), [1.0] * 4)
    recorded.add("collapsed", point(9), [1.0])
    recorded.add("failed", point(5), [1.0])
    recorded.add("stopped", point(5), [1.0])
    recorded.add("running", point(5), [1.0])
    return recorded.done()


class Run:
    """A driver without Ray: what `run_study` does with a new study, or with one that goes on."""

    def __init__(self, study, folder):
        folder.mkdir(exist_ok=True)
        self.study, self.folder = study, folder
        self.ledger = Ledger(folder, study.name)
        if self.ledger.runs:
            refuse_other_start(folder, self.ledger)
        else:
            write_warm_start(folder, collect(study))
        self.changed = set_right(study, folder, self.ledger)
        reconcile(study, folder, self.ledger)
        self.search = StudySearch(study, folder, {"folder": str(folder)}, self.ledger)
        self.ledger.run({"driver": "", "config": {"seeds": [0]}, "code": {}, WARM_START: digest_of(folder)})

    def proposed(self, number):
        found = []
        for _ in range(number):
            config = self.search.suggest(f"ray{len(self.ledger.trials)}")
            trial = json.loads(config["trial"])
            found.append((config["trial_id"], trial["sampling_steps"], trial["step_size"]))
            self.ledger.start(
                config["trial_id"],
                self.study.space.trial(point(*found[-1][1:]), 0),
                config["setting_id"],
                0.0,
                config["setting"],
            )
            told = {
                "outcome": "completed",
                "cause": None,
                "iteration": None,
                "fd_buffer_best": abs(found[-1][1] - 4.0),
                "train_seconds": 1.0,
            }
            self.ledger.report(
                config["trial_id"], None, {**told, "evaluation_seconds": 1.0, "epochs_done": 4, "message": None}
            )
            self.search.on_trial_complete(f"ray{len(self.ledger.trials) - 1}", {})
        return found


def test_trials_enter_as_the_studys_own_do(earlier, tmp_path):
    study = make_study(search={"from": [earlier]})
    found = collect(study)
    (source,) = found.sources
    assert (source.taken, source.outside, source.unmeasured, source.other_protocol) == (4, 2, 3, 0)
    assert list(said(found)) == [
        "old: 4 of 9 trials taken (2 outside of search.space, 3 without a result); no other setting differs"
    ]
    run = Run(study, tmp_path / "new")
    told = open_storage(study, run.folder).get_trials()
    assert [t.state for t in told] == [TrialState.COMPLETE] * 3 + [TrialState.PRUNED]
    assert [t.params["sampling_steps"] for t in told] == [4, 1, 2, 3]
    # A divergence violates the constraint; one that was never scored has the worst value of all that was told.
    assert [t._values for t in told[:3]] == [[0.5], [3.0], [3.0]]
    assert [t.constraints[STABLE] > 0 for t in told] == [False, True, True, False]
    assert told[3].intermediate_values == {1: 5.0, 2: 4.0}
    assert told[0].user_attrs[EARLIER] == "old/t0001"
    # They are none of the study's own: all of its settings are still to be run, none is known.
    assert run.search.remaining() == 6
    assert not run.ledger.trials


def test_a_field_that_was_fixed_there_counts_with_its_value(tmp_path):
    old = Recorded(
        tmp_path / "old",
        make_study(name="old", trial={"step_size": 2.0}, search={"space": {"sampling_steps": SPACE["sampling_steps"]}}),
    )
    old.add("completed", {"sampling_steps": 3}, [1.0])
    found = collect(make_study(search={"from": [old.done()]}))
    assert [t.parameters for t in found.trials] == [{"sampling_steps": 3, "step_size": 2.0}]
    with pytest.raises(UserError, match=r"none of its 1 trials can be learnt from .1 are outside of search\.space"):
        collect(
            make_study(
                search={"from": [old.folder.as_posix()], "space": {**SPACE, "step_size": {"low": 3, "high": 10}}}
            )
        )


def test_settings_that_differ_are_said(tmp_path):
    old = Recorded(
        tmp_path / "old",
        make_study(name="old", trial={"epochs": 9}, search={"space": {**SPACE, "learning_rate": [0.1, 0.01]}}),
    )
    for rate in (0.1, 0.01, 0.01):
        old.add("completed", {**point(3), "learning_rate": rate}, [1.0])
    found = collect(make_study(trial={"learning_rate": 0.1}, search={"from": [old.done()]}))
    assert found.sources[0].differs == ("epochs 9 there, 4 here", "learning_rate 0.01 there, 0.1 here (2 of them)")


@pytest.mark.parametrize(
    ("there", "here", "objective", "expected"),
    [
        ({"train_images": 500}, {}, "fd_buffer", "fd_buffer was scored under another protocol (train_images 500 there, none here)"),
        ({"evaluation": {"fresh_steps": 9}}, {}, "fd_fresh", "(evaluation.fresh_steps 9 there, 20 here)"),
        ({"evaluation": {"fresh_steps": 9}}, {}, "fd_buffer", None),
        ({"evaluation": {"every": 2}}, {}, "fd_buffer", None),
    ],
)  # fmt: skip
def test_scores_under_another_protocol_are_refused(tmp_path, there, here, objective, expected):
    old = Recorded(tmp_path / "old", make_study(name="old", trial=there))
    old.add("completed", point(3), [1.0], fd_fresh_best=1.0)
    study = make_study(trial=here, objectives=[objective], search={"from": [old.done()]})
    if expected is None:
        assert len(collect(study).trials) == 1
        return
    with pytest.raises(UserError, match="do not compare") as error:
        collect(study)
    assert expected in str(error.value)


def test_a_study_that_two_places_hold_is_refused(earlier, tmp_path):
    """Its trials would count twice, for the sampler and for pruning."""
    (tmp_path / "link").symlink_to(earlier)
    for places in ([earlier, earlier], [str(tmp_path), earlier], [earlier, str(tmp_path / "link")]):
        with pytest.raises(UserError, match=r"search\.from: old is in .* and .*; its trials would count twice"):
            collect(make_study(search={"from": places}))


def test_scores_of_other_images_are_refused_though_the_configuration_is_the_same(tmp_path):
    """A folder of images may hold others by now, and the ids of most protocols do not name the images."""
    study = make_study()
    images = own_images(study)
    old = Recorded(tmp_path / "old", make_study(name="old"))
    old.add("completed", point(3), [1.0], data_source=f"sklearn:digits#{images}")
    old.add("completed", point(4), [1.0], data_source="folder:digits#0123456789abcdef")
    study = make_study(search={"from": [old.done()]})
    found = collect(study, images=images)
    assert [t.trial_id for t in found.trials] == ["t0001"]
    assert found.sources[0].other_protocol == 1
    with pytest.raises(UserError, match=r"fd_buffer was scored on another data set .* 'fedcba98' here"):
        collect(study, images="fedcba98")


def test_a_loop_of_links_is_refused_in_a_line(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for changes in ({"search": {"from": [str(loop)]}}, {"trial": {"data_dir": str(loop / "data")}}):
        with pytest.raises(UserError, match=r"^test: .*loop.* cannot be followed") as error:
            make_study(**changes)
        assert "\n" not in str(error.value)


def test_the_protocol_that_was_recorded_is_compared_with_the_studys_own(earlier):
    study = make_study(search={"from": [earlier]})
    assert len(collect(study, {"fd_buffer": Scored(PROTOCOL.removesuffix("-n1000"))}).trials) == 4
    with pytest.raises(UserError, match="small-v1-digits-e04c266c-buffer-n1000' there, small-v2-digits here"):
        collect(study, {"fd_buffer": Scored("small-v2-digits")})


def test_the_studys_own_protocol_begins_as_its_trials_record_it():
    from study.search.warm_start import own_protocols

    found = own_protocols(make_study())
    assert found["fd_buffer"] == Scored(PROTOCOL.removesuffix("-n1000"), 1000)
    assert found["fd_fresh"] == Scored(PROTOCOL.replace("-buffer-n1000", "-fresh-20steps"), 1000)


def test_an_extractor_is_compared_by_its_code_and_weights(tmp_path, monkeypatch):
    import torch

    from study.config.own_code import short_names
    from study.search.warm_start import own_protocols
    from trainables.evaluation.own_features import own_extractor
    from trainables.plugins.reference import allow, use

    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "import torch\n\n\ndef pixels(weights):\n    factor = torch.load(weights, weights_only=True)\n"
        "    return lambda images: images[:, 0].flatten(1).float() * factor\n"
    )
    torch.save(torch.tensor(2.0), "two.pth")
    allow(tmp_path)
    try:
        named = {"trial": {"evaluation": {"protocols": ["small-buffer@nets.py:pixels@two.pth"]}}}
        trial = short_names(named, "study.yaml")["trial"]
        objective = "extractor_fd_buffer"
        identity = own_extractor(f"nets.py:pixels@{tmp_path / 'two.pth'}").id
        old = Recorded(tmp_path / "old", make_study(name="old", trial=trial, objectives=[objective]))
        recorded = f"small-buffer@{identity}"
        told = {f"{objective}_best": 1.0, f"{objective}_protocol": recorded}
        old.add("completed", point(3), [1.0], **told)
        old.add("completed", point(4), [1.0], **told | {f"{objective}_protocol": f"{recorded}-n500"})
        study = make_study(trial=trial, objectives=[objective], search={"from": [old.done()]})
        assert own_protocols(study)[objective].begins == recorded
        assert len(collect(study, own_protocols(study)).trials) == 2
        torch.save(torch.tensor(3.0), "two.pth")
        use(None)
        allow(tmp_path)
        with pytest.raises(UserError, match="scored under another protocol") as error:
            collect(study, own_protocols(study))
        assert recorded in str(error.value) and "\n" not in str(error.value)
    finally:
        use(tmp_path / "elsewhere")
        use(None)


@pytest.mark.parametrize(
    ("there", "images", "here", "taken"),
    [(500, 500, 2000, False), (2000, 1000, 500, False), (2000, 1000, 3000, True), (1000, 1000, 2000, True),
     (1000, 480, 2000, True), (2000, 480, 300, False)],
)  # fmt: skip
def test_scores_of_a_smaller_buffer_are_of_fewer_images(tmp_path, there, images, here, taken):
    old = Recorded(tmp_path / "old", make_study(name="old", trial={"buffer_size": there}))
    old.add("completed", point(4), [1.0], fd_buffer_protocol=PROTOCOL.replace("n1000", f"n{images}"))
    study = make_study(trial={"buffer_size": here}, search={"from": [old.done()]})
    protocols = {"fd_buffer": Scored(PROTOCOL.removesuffix("-n1000"), 1000)}
    if taken:
        assert len(collect(study, protocols).trials) == 1
        return
    said = f"{images:,} images there, {min(here, 1000):,} here"
    with pytest.raises(UserError, match=f"fd_buffer was scored under another protocol .{said}.; such scores do not"):
        collect(study, protocols)


def test_a_protocol_of_the_whole_buffer_has_as_many_images_as_the_buffer(tmp_path):
    objective, protocol = "fid_buffer", "buffer-all"
    old = Recorded(tmp_path / "old", make_study(name="old", trial={"buffer_size": 500}, objectives=[objective]))
    old.add("completed", point(4), [1.0], fid_buffer_best=1.0, fid_buffer_protocol=protocol)
    place = old.done()
    for size, taken in ((500, True), (10_000, False)):
        study = make_study(trial={"buffer_size": size}, objectives=[objective], search={"from": [place]})
        if taken:
            assert len(collect(study, {objective: Scored(protocol)}).trials) == 1
            continue
        with pytest.raises(UserError, match="500 images there, 10,000 here"):
            collect(study, {objective: Scored(protocol)})


def test_a_protocol_whose_name_begins_like_another_is_another(earlier):
    study = make_study(search={"from": [earlier]})
    with pytest.raises(UserError, match="scored under another protocol"):
        collect(study, {"fd_buffer": Scored(PROTOCOL.removesuffix("-buffer-n1000"))})


def test_the_sampler_models_at_once(earlier, tmp_path):
    """With the earlier trials it has what it needs for a model: no random settings first."""
    search = {"startup_trials": 4, "trials": 3}
    warm = Run(make_study(search={**search, "from": [earlier]}), tmp_path / "warm")
    warm.proposed(1)
    (own,) = [t for t in open_storage(warm.study, warm.folder).get_trials() if EARLIER not in t.user_attrs]
    assert any(key.startswith("tpe:") for key in own.system_attrs)
    cold = Run(make_study(search=search), tmp_path / "cold")
    cold.proposed(1)
    (own,) = open_storage(cold.study, cold.folder).get_trials()
    assert not any(key.startswith("tpe:") for key in own.system_attrs)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "cmaes", "nsga3"])
def test_every_sampler_that_learns_takes_them(earlier, tmp_path, sampler):
    goals = ["fd_buffer", "train_seconds", "seconds_per_iteration"] if sampler == "nsga3" else ["fd_buffer"]
    run = Run(make_study(search={"sampler": sampler, "from": [earlier]}, objectives=goals), tmp_path / "new")
    assert len(run.proposed(6)) == 6
    assert run.search.suggest("last") == "FINISHED"


def test_cma_es_begins_where_ten_earlier_trials_were_good(tmp_path):
    old = Recorded(tmp_path / "old", make_study(name="old"))
    for number in range(20):
        alpha = 0.1 * 100 ** (number / 19)
        old.add("completed", point(1 + number % 8, alpha), [abs(alpha - 0.2)])
    search = {
        "sampler": "cmaes",
        "from": [old.done()],
        "space": {**SPACE, "learning_rate": {"low": 0.01, "high": 1, "log": True}},
    }
    run = Run(make_study(search={**search, "trials": 8}), tmp_path / "new")
    assert max(alpha for *_, alpha in run.proposed(8)) < 2  # the middle of its range is 1, and its upper end 10


def test_a_resume_is_exact_without_the_earlier_study(earlier, tmp_path):
    study = make_study(search={"from": [earlier]})
    first = Run(study, tmp_path / "new")
    first.proposed(2)
    shutil.copytree(first.folder, tmp_path / "copy")
    first.ledger._file.close()  # its driver is killed
    (tmp_path / "copy" / STORAGE).unlink()  # and the copy's storage is rebuilt from what it has
    shutil.rmtree(earlier)
    resumed = Run(study, tmp_path / "new")
    rebuilt = Run(study, tmp_path / "copy")
    assert resumed.changed is None
    told = [
        [(t.params, t._values, t.constraints) for t in open_storage(study, r.folder).get_trials()]
        for r in (resumed, rebuilt)
    ]
    assert told[0] == told[1]
    assert len(told[0]) == 4 + 2
    assert resumed.proposed(3) == rebuilt.proposed(3)


def test_a_copy_that_is_gone_changed_or_damaged_is_refused(earlier, tmp_path):
    study = make_study(search={"from": [earlier]})
    run = Run(study, tmp_path / "new")
    run.ledger.close()
    path = run.folder / WARM_START
    whole = path.read_bytes()
    found = read_warm_start(run.folder)
    write_warm_start(run.folder, replace(found, trials=found.trials[1:]))
    with pytest.raises(UserError, match="is not the one that the study began with"):
        Run(study, run.folder)
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="damaged"):
        read_warm_start(run.folder)
    path.unlink()
    with pytest.raises(UserError, match="is gone"):
        Run(study, run.folder)
    path.write_bytes(whole)
    Run(study, run.folder).ledger.close()


def test_a_storage_that_says_something_else_of_them_is_rebuilt(earlier, tmp_path):
    study = make_study(search={"from": [earlier]})
    run = Run(study, tmp_path / "new")
    run.proposed(1)
    run.ledger.close()
    import sqlite3

    with sqlite3.connect(run.folder / STORAGE) as database:
        database.execute("UPDATE trial_values SET value = 0.01 WHERE trial_id = 1")
    database.close()
    again = Run(study, run.folder)
    assert again.changed.startswith("optuna.db was changed: trial 0 is not that of warm_start.parquet")
    assert open_storage(study, run.folder).get_trials()[0]._values == [0.5]


@pytest.mark.parametrize("column", ["curve", "parameters", "outcome", "values", "differs"])
@pytest.mark.parametrize("text", ["[" * 5000, "null", "7", "{", '[["a", "b"]]'])
def test_a_hostile_copy_is_one_line(earlier, tmp_path, column, text):
    study = make_study(search={"from": [earlier]})
    run = Run(study, tmp_path / "new")
    table = pq.read_table(run.folder / WARM_START)
    changed = table.set_column(table.column_names.index(column), column, pa.array([text] * table.num_rows))
    pq.write_table(changed, run.folder / WARM_START)
    with pytest.raises(UserError, match="damaged") as error:
        read_warm_start(run.folder)
    assert "\n" not in str(error.value)


def with_config(folder, text):
    """An earlier study whose first trial has another configuration."""
    path = f"{folder}/trials.parquet"
    table = pq.read_table(path)
    texts = pa.array([text, *table.column("config").to_pylist()[1:]])
    pq.write_table(table.set_column(table.column_names.index("config"), "config", texts), path)
    return make_study(search={"from": [folder]})


@pytest.mark.parametrize(
    "config", ['{"method": 3}', '{"kind": "script", "args": 5}', '{"sampling_steps": true, "step_size": "x"}']
)
def test_trials_of_another_kind_are_outside(earlier, config):
    found = collect(with_config(earlier, config))
    assert (found.sources[0].taken, found.sources[0].outside) == (3, 3)


@pytest.mark.parametrize("config", ["{", "[]", "null", "[" * 5000])
def test_a_hostile_folder_is_refused_in_a_line(earlier, config):
    with pytest.raises(UserError, match=r"search\.from: .*the configuration of 1 trial .t0001. is not a JSON object"):
        collect(with_config(earlier, config))


@pytest.mark.parametrize("place", ["nowhere", "a file"])
def test_what_is_no_study_is_refused_in_a_line(tmp_path, place):
    (tmp_path / "a file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"search\.from: .*"):
        collect(make_study(search={"from": [str(tmp_path / place)]}))


def test_too_many_trials_are_refused(earlier, monkeypatch):
    monkeypatch.setattr("study.search.warm_start.MAX_TAKEN", 3)
    with pytest.raises(UserError, match="4 trials, but at most 3 can be learnt from"):
        collect(make_study(search={"from": [earlier]}))
    assert warm_start.MAX_TAKEN == 10_000


def test_a_sampler_that_learns_from_nothing_takes_nothing():
    with pytest.raises(UserError, match=r"search\.from: sampler random learns from no trial and nothing is pruned"):
        make_study(search={"sampler": "random", "from": ["old"]})
    make_study(search={"sampler": "random", "from": ["old"]}, pruning="asha")  # whose rungs they enter


def test_credentials_in_a_place_are_refused():
    with pytest.raises(UserError, match="must not hold credentials"):
        make_study(search={"from": ["s3://key:secret@bucket/old"]})


# --------------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize(("rule", "reason"), [
    ("asha", "rung 1: 3 of 5 trials did better, 1 go on"),
    ("median", "epoch 1: 4, the median of 4 trials is 2.5"),
])  # fmt: skip
@pytest.mark.parametrize("same_length", [True, False])
def test_pruning_knows_their_curves(tmp_path, rule, reason, same_length):
    """The first trial of the new study is judged by four of the old one, if an epoch is as long there."""
    old = Recorded(tmp_path / "old", make_study(name="old"))
    for values in ([1.0, 0.9], [2.0, 1.0], [3.0, 2.0]):
        old.add("completed", point(3), values, iterations_per_epoch=10 if same_length else 20)
    old.add("diverged", point(1), iterations_per_epoch=10 if same_length else 20)
    study = make_study(search={"from": [old.done()]}, pruning=rule)
    run = Run(study, tmp_path / "new")
    policy = StopPolicy(study, run.ledger)
    run.ledger.start("t0001", study.space.trial(point(2), 0), "x", 0.0)
    row = {"epoch": 1, "iteration": 10, "train_seconds": 1.0, "evaluation_seconds": 1.0, "fd_buffer": 4.0}
    told = {"outcome": "running", "iterations_planned": 40, "iterations_per_epoch": 10}
    assert policy.judge("t0001", row, told) == same_length
    if same_length:
        assert policy.ending["t0001"] == (Outcome.PRUNED, reason)
    assert len(read_warm_start(run.folder).trials) == 4
    assert not pd.read_parquet(f"{old.folder}/trials.parquet").empty


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("had", [0, 2, 5])
def test_a_maker_that_dies_while_it_fills_the_storage_loses_nothing(earlier, tmp_path, monkeypatch, shared, had):
    """KilledError after it had entered `had` of four earlier trials and three starting points."""
    import optuna

    from study.search import storage

    monkeypatch.setattr(storage, "_MAKER_SECONDS", 0.2)
    monkeypatch.setattr(storage, "_CLAIM_SECONDS", 0.2)
    search = {"from": [earlier], "start": [{"sampling_steps": k} for k in (2, 3, 4)]}
    if shared:
        search["storage"] = f"sqlite:///{tmp_path}/shared.db"
    study = make_study(search=search)
    write_warm_start(tmp_path, collect(study))

    class KilledError(Exception):
        pass

    entered, add_trial = iter(range(had)), optuna.Study.add_trial

    def add(self, trial):  # which enters the starting points, too
        if next(entered, None) is None:
            raise KilledError
        add_trial(self, trial)

    monkeypatch.setattr(optuna.Study, "add_trial", add)
    with pytest.raises(KilledError):
        open_storage(study, tmp_path)
    entered = iter(range(100))
    there = open_storage(study, tmp_path).get_trials()
    assert [t.user_attrs.get(EARLIER, t.user_attrs.get("setting")) for t in there] == [
        *("old/t0001", "old/t0002", "old/t0003", "old/t0004"), 0, 1, 2,
    ]  # fmt: skip
    assert len(open_storage(study, tmp_path).get_trials()) == 7


@pytest.mark.parametrize("maker", ["dead", "slow"])
def test_drivers_that_wait_for_a_maker_do_its_work_once(earlier, tmp_path, monkeypatch, maker):
    """Four drivers that start at once after one that died; or while one hangs in the middle, and then goes on."""
    import optuna

    from study.search import storage

    monkeypatch.setattr(storage, "_MAKER_SECONDS", 0.5)
    search = {"from": [earlier], "start": [{"sampling_steps": k} for k in (2, 3, 4)]}
    study = make_study(search=search | {"storage": f"sqlite:///{tmp_path}/shared.db"})
    write_warm_start(tmp_path, collect(study))
    add_trial, entered, hangs = optuna.Study.add_trial, iter(range(3)), threading.Event()

    class KilledError(Exception):
        pass

    def add(self, trial):
        if next(entered, None) is None and not hangs.is_set():
            hangs.set()
            if maker == "dead":
                raise KilledError
            time.sleep(4)
        add_trial(self, trial)

    monkeypatch.setattr(optuna.Study, "add_trial", add)
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(open_storage, study, tmp_path)
        assert hangs.wait(60)
        others = [pool.submit(open_storage, study, tmp_path) for _ in range(4)]
        assert isinstance(first.exception(), KilledError) if maker == "dead" else first.result()
        assert all(o.result() for o in others)
    there = [t.user_attrs.get(EARLIER, t.user_attrs.get("setting")) for t in open_storage(study, tmp_path).trials]
    whole = ["old/t0001", "old/t0002", "old/t0003", "old/t0004", 0, 1, 2]
    # The trial with which one hung comes late and a second time; nothing else does.
    assert sorted(there, key=str) == sorted(whole + ["old/t0004"] * (maker == "slow"), key=str)


def test_a_storage_in_use_gets_nothing_again(earlier, tmp_path):
    """A starting point that is gone from a study whose trials run is no sign of a maker that died."""
    study = make_study(search={"start": [{"sampling_steps": 3}]})
    opened = open_storage(study, tmp_path)
    opened.ask()
    opened.ask()
    assert (
        len(open_storage(make_study(search={"start": [{"sampling_steps": k} for k in (3, 4)]}), tmp_path).trials) == 2
    )


def test_a_study_in_a_store_gives_what_its_folder_gives(earlier, store_url, tmp_path):
    from pyarrow import fs

    filesystem, root = fs.FileSystem.from_uri(store_url if store_url.startswith("s3") else f"fsspec+{store_url}")
    filesystem.create_dir(f"{root}/old", recursive=True)
    for path in Path(earlier).iterdir():
        with filesystem.open_output_stream(f"{root}/old/{path.name}", compression=None) as stream:
            stream.write(path.read_bytes())
    url = store_url.replace("?", "/old?") if "?" in store_url else f"{store_url}/old"
    here, there = (collect(make_study(search={"from": [place]})) for place in (earlier, url))
    assert here.trials == there.trials and len(there.trials) == 4
    assert [s.digest for s in here.sources] == [s.digest for s in there.sources]
    assert list(said(there)) == list(said(here))
