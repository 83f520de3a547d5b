"""YAML to `StudyConfig`, and what a user is told about a mistake."""

from __future__ import annotations

import pytest

from analysis.results.parquet import records
from analysis.results.published import published_results
from analysis.tables.comparability import matching
from study.config.errors import UserError
from study.config.load import load_study, validate_study
from study.config.packaged import packaged_configs
from study.record.folder import change_since
from study.run.launch import describe
from trainables.config.method import METHODS

GRID = "search: {sampler: grid, grid: [{sampling_steps: [1, 2]}]}\n"


def message(text, write_config, *assignments):
    path = write_config(text)
    with pytest.raises(UserError) as caught:
        load_study(str(path), assignments)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(str(path), "FILE")


TABLES = (
    "table1", "table1_baselines", "table2", "table2_celeba_hq", "table2_imagenet32", "table3", "table3_baselines",
    "table4", "table4_baselines", "table6",
)  # fmt: skip


def test_packaged_studies_are_all_valid_and_cover_the_papers_tables():
    own = {
        "quickstart",
        "digits_rescue",
        "digits_stability",
        "digits_scaling",
        "cifar10_stability",
        "cifar10_night",
        "cifar10_gpu",
        "cifar10_scaling",
        "cifar10_cpu",
        "all_methods",
        "all_methods_cifar10",
        "precision_parity",
    }
    assert set(packaged_configs()) == own | set(TABLES)
    for name in packaged_configs():
        study = load_study(name)
        assert study.name == name
        assert validate_study(study.model_dump(mode="json"), name) == study


def test_digits_stability_is_the_rehearsed_grid_of_57_trials():
    study = load_study("digits_stability")
    space = study.space
    assert space.settings * len(study.seeds) == 57
    settings = {(p["norm"], p["initial"], p["sampling_steps"], p["l2_weight"]) for p in space.start}
    plain = {(n, i, k, 0.0) for n in ("none", "batch") for i in ("gaussian", "uniform") for k in (1, 2, 5, 10)}
    assert settings == plain | {("batch", "uniform", k, 0.1) for k in (1, 2, 5)}


def test_quickstart_searches_the_papers_four_and_starts_from_its_setting():
    study = load_study("quickstart")
    assert {"sampling_steps", "step_size", "reinit_probability", "buffer_size"} <= set(study.search.space)
    assert study.search.trials >= 16
    paper = {"step_size": 1.0, "reinit_probability": 0.05, "buffer_size": 10000, "initial": "gaussian"}
    assert any(paper.items() <= point.items() for point in study.search.start)
    assert study.space.trial(dict(study.search.start[0]), 0).norm == "none"


def table_trials(name):
    space = load_study(name).space
    return [space.trial(dict(point), 0) for point in space.start]


@pytest.mark.parametrize(
    ("table", "methods", "steps"),
    [
        ("table1", {"m-ebm"}, {1, 2, 5, 10, 20}),
        ("table2", {"m-ebm"}, {1, 2, 5, 10}),
        ("table3", {"m-jem", "softmax"}, {1, 2, 5, 10, 20}),
        ("table4", {"m-jem", "softmax"}, {1, 2, 5, 10}),
    ],
)
def test_table_studies_run_the_papers_rows(table, methods, steps):
    trials = table_trials(table)
    assert {t.method for t in trials} == methods <= set(METHODS)
    assert {t.sampling_steps for t in trials if t.method != "softmax"} == steps
    assert {t.network for t in trials} == {"wrn-28-10"}
    assert {t.dataset for t in trials} == {"cifar100" if table in ("table2", "table4") else "cifar10"}
    # K decides lambda and sigma as in scripts/maebm_cifar10.sh.
    for t in trials:
        if t.method != "softmax":
            assert (t.l2_weight, t.noise_std) == ((0.1, 0.0) if t.sampling_steps < 5 else (0.5, 0.001))
    rate = 0.02 if table in ("table2", "table4") else 0.1
    assert {t.learning_rate for t in trials} == {rate}


@pytest.mark.parametrize("table", [1, 2, 3, 4, 6])
def test_every_row_of_a_method_that_runs_is_measured_by_a_packaged_study(table):
    trials = [t for name in TABLES if name.startswith(f"table{table}") for t in table_trials(name)]
    measured = [t.setting() for t in trials]
    left = {
        row["model"] + " on " + row["dataset"]
        for row in records(published_results(table))
        if row["method"] is not None and not matching(measured, row)
    }
    # Its row there is the class-conditional model, which does not run here.
    assert left == ({"IGEBM(K=60) on cifar10"} if table == 3 else set())


def test_the_papers_networks_off_cifar():
    assert {t.network for t in table_trials("table2_celeba_hq") if t.method == "m-ebm"} == {"wrn-28-5"}
    assert {t.network for t in table_trials("table2_imagenet32") if t.method == "m-ebm"} == {"wrn-28-2"}


@pytest.mark.parametrize("name", ["all_methods", "all_methods_cifar10"])
def test_the_studies_of_all_methods_have_all_methods(name):
    assert {t.method for t in table_trials(name)} == set(METHODS)


def test_set_changes_fields_and_a_trial_field_needs_no_prefix(write_config):
    path = str(write_config("name: x\n" + GRID))
    study = load_study(path, ("epochs=7", "trial.step_size=2.5", "seeds=[3, 4]", "divergence.gap_limit=1"))
    assert study.trial == {"epochs": 7, "step_size": 2.5, "divergence": {"gap_limit": 1}}
    assert study.seeds == (3, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "FILE: line 1, column 8 not valid YAML"),
        ("- 1", "FILE: must be a mapping of keys to values, but is list"),
        ("name: x\nserach: {}\n" + GRID, "FILE: serach: unknown key; did you mean search?"),
        ("name: x\n", "FILE: search: is missing"),
        ("name: a b\n" + GRID, "FILE: name = 'a b': must be made of letters"),
        ("name: x\ntrial: {stepsize: 1}\n" + GRID, "FILE: trial.stepsize: unknown key; did you mean step_size?"),
        ("name: x\ntrial: {step_size: -1}\n" + GRID, "FILE: trial.step_size = -1: input should be greater than 0"),
        ("name: x\ntrial: {step_size: fast}\n" + GRID, "FILE: trial.step_size = 'fast': input should be a valid number"),
        ("name: x\ntrial: {method: m-ebn}\n" + GRID, "did you mean m-ebm?"),
        ("name: x\ntrial: {norm: batc}\n" + GRID, "FILE: trial.norm = 'batc': input should be 'batch', 'none', 'spectral' or 'instance'"),
        ("name: x\ntrial: {network: wrn-27-1}\n" + GRID, "depth of 10, 16, 22, 28, ... (6n + 4)"),
        ("name: x\ntrial: {divergence: {gap_limt: 1}}\n" + GRID, "trial.divergence.gap_limt: unknown key; did you mean gap_limit?"),
        ("name: x\ntrial: {seed: 1}\n" + GRID, "FILE: trial.seed: seeds are not a trial field here"),
        ("name: x\ntrial: {sampling_steps: 1}\n" + GRID, "sampling_steps: is searched here and fixed under trial"),
        ("name: x\nseeds: [1, 1]\n" + GRID, "seeds"),
        ("name: x\nobjectives: [{metric: fid}]\n" + GRID, "did you mean"),
        ("name: x\nresources: {gpus: 1.5}\n" + GRID, "resources.gpus = 1.5: must be a fraction below 1 or a whole number"),
        ("name: x\nsearch: {sampler: grid, grid: [{sampling_step: [1]}]}", "unknown trial field; did you mean sampling_steps?"),
        ("name: x\nsearch: {sampler: grid, grid: [{sampling_steps: []}]}", "must be a value or a list of values"),
        ("name: x\nsearch: {sampler: grid}", "needs grid"),
        ("name: x\nsearch: {trials: 3, space: {}}", "space is empty"),
        ("name: x\nsearch: {space: {sampling_steps: {low: 1, high: 3}}}", "needs trials"),
        ("name: x\nsearch: {trials: 3, space: {sampling_steps: {low: 3, high: 1}}}", "got low=3, high=1"),
        ("name: x\nsearch: {trials: 3, space: {step_size: {low: 0, high: 1, log: true}}}", "needs low > 0"),
        ("name: x\nsearch: {trials: 3, space: {sampling_steps: {low: 0, high: 3}}}", "sampling_steps"),
        ("name: x\nsearch: {trials: 3, space: {sampling_steps: {low: 1.5, high: 3}}}", "is an integer field"),
        ("name: x\nsearch: {trials: 3, space: {initial: {low: 1, high: 3}}}", "give choices instead"),
        ("name: x\nsearch: {trials: 3, space: {initial: {choices: [gauss]}}}", "initial = 'gauss'"),
        (
            "name: x\nsearch: {trials: 3, space: {sampling_steps: {low: 1, high: 3}}, start: [{sampling_steps: 4}]}",
            "FILE: search.start[0].sampling_steps = 4: is outside of search.space.sampling_steps",
        ),
        (
            "name: x\nsearch: {trials: 3, space: {sampling_steps: {low: 1, high: 3}}, start: [{step_size: 4}]}",
            "search.start[0].step_size: is not in search.space",
        ),
    ],
)  # fmt: skip
def test_every_mistake_is_one_line_with_file_key_and_remedy(text, expected, write_config):
    assert expected in message(text, write_config)


def test_mistakes_of_set(write_config):
    good = "name: x\n" + GRID
    assert "--set epochs: must be KEY=VALUE" in message(good, write_config, "epochs")
    assert "--set epoch: unknown key; did you mean epochs?" in message(good, write_config, "epoch=1")
    assert "not valid YAML" in message(good, write_config, "epochs=[")
    assert "trial.epochs = 0" in message(good, write_config, "epochs=0")


AUTO = "name: a\ntrial: {method: %s}\nsearch: {trials: 3, space: {%s: auto}}\n"


def test_auto_is_the_range_that_a_method_has_for_its_own_field(write_config):
    study = load_study(str(write_config(AUTO % ("vera", "method_args.entropy_weight"))))
    assert study.search.space["method_args.entropy_weight"].model_dump(exclude_none=True) == {
        "low": 1e-6, "high": 1e-2, "log": True,
    }  # fmt: skip
    assert validate_study(study.model_dump(mode="json"), "again") == study


@pytest.mark.parametrize(
    ("method", "field", "expected"),
    [
        ("vera", "step_size", "; vera has one for method_args.entropy_weight"),
        ("m-ebm", "method_args.rho", "; 'm-ebm' has none"),
        ("nothing", "method_args.rho", "; 'nothing' has none"),
        ("[1, 2]", "method_args.rho", "; [1, 2] has none"),
    ],
)
def test_auto_without_a_range_is_refused(method, field, expected, write_config):
    said = message(AUTO % (method, field), write_config)
    assert said == f"FILE: search.space.{field}: auto needs a range of the method's own{expected}"


def test_a_missing_config_names_the_nearest_packaged_one():
    with pytest.raises(UserError, match=r"quickstrt: no such file, .*did you mean quickstart\?"):
        load_study("quickstrt")


def test_the_yaml_of_a_study_gives_the_study_back(write_config):
    for name in packaged_configs():
        study = load_study(name)
        assert load_study(str(write_config(study.to_yaml()))) == study


def test_studies_that_began_with_an_older_key_of_pruning_are_read_and_may_go_on():
    values = {
        "name": "s", "trial": {"dataset": "digits"}, "search": {"sampler": "grid", "grid": [{"sampling_steps": 1}]},
        "pruning": {"rule": "median", "least": 7},
    }  # fmt: skip
    study = validate_study(values, "test")
    assert study.pruning.min_trials == 7
    assert study.model_dump(mode="json")["pruning"]["min_trials"] == 7
    assert change_since(values, study) is None
    changed = validate_study({**values, "pruning": {"rule": "median", "min_trials": 8}}, "test")
    assert "pruning.min_trials" in str(change_since(values, changed))
    with pytest.raises(UserError, match=r"pruning\.least: unknown key"):
        validate_study({**values, "pruning": {"rule": "median", "least": 7, "min_trials": 7}}, "test")
    with pytest.raises(UserError, match=r"pruning\.min_trials = 0"):
        validate_study({**values, "pruning": {"rule": "median", "least": 0}}, "test")


def test_a_dry_run_says_what_ends_trials_and_the_study_early(tiny):
    def said(**parts):
        lines = describe(validate_study(tiny | parts, "s"), "s")
        return [line for line in lines if line.startswith(("budget", "pruning"))]

    assert said() == []
    assert said(budget={"gpu_hours": 1}) == ["budget      ends at 1 GPU-hours"]
    assert said(budget={"hours": 2.5, "trials": 1, "deadline": "2027-01-02T03:04:00"}) == [
        "budget      ends at 2.5 hours or 1 trial started or 2027-01-02 03:04, whichever comes first"
    ]
    assert said(pruning={"rule": "median", "metric": "fd_buffer"}) == [
        "pruning     median by fd_buffer: from epoch 1, once 3 trials came as far"
    ]
    both = {"rule": "asha", "metric": "fd_buffer", "first_epoch": 2, "reduction": 4, "seeds": "wilcoxon"}
    assert said(seeds=list(range(9)), pruning=both) == [
        "pruning     asha by fd_buffer: the top 1/4 go on at each rung, from epoch 2",
        "pruning     wilcoxon: no further seeds of a setting that is worse than the best (level 0.1)",
    ]
    one = validate_study(tiny | {"trial": tiny["trial"] | {"epochs": 1, "iterations_per_epoch": 150}}, "s")
    assert any(line.endswith(", 1 epoch of 150 iterations") for line in describe(one, "s"))
