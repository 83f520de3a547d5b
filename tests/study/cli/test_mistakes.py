"""What a new user mistypes, command by command: one line that says what is really wrong and what was likely meant."""

from __future__ import annotations

import json

import pytest

from analysis.results.parquet import write_parquet
from trainables.methods.presets import build_trial
from trainables.results.schema import EPOCH_COLUMNS, SCHEMA_VERSION, TRIAL_COLUMNS
from trainables.results.spelling import edits, likeliest, nearest_path

SET = ("sweep", "quickstart", "-n", "--set")


@pytest.fixture
def results(tmp_path):
    """A folder of results with one study, in which K and the seed differ."""
    place = tmp_path / "results" / "first"
    (place / "models").mkdir(parents=True)
    (place / "models" / "t0001.pt").write_bytes(b"")
    rows = []
    for i, (steps, seed) in enumerate([(1, 0), (5, 0), (1, 1), (5, 1)]):
        config = build_trial({"sampling_steps": steps, "seed": seed})
        row = {"study": "first", "trial_id": f"t{i}", "setting_id": f"s{steps}", "seed": seed, "outcome": "completed"}
        row |= {**config.setting(), "dataset": "digits", "method": "m-ebm", "config": config.to_json()}
        rows.append(row | {"fd_buffer_best": 1.0 + i, "fd_buffer_last": 1.0 + i, "fd_buffer_protocol": "p"})
    write_parquet(rows, TRIAL_COLUMNS, place / "trials.parquet")
    write_parquet([], EPOCH_COLUMNS, place / "epochs.parquet")
    (place / "manifest.json").write_text(json.dumps({"study": "first", "schema_version": SCHEMA_VERSION}))
    (place / "study.yaml").write_text("name: first\n")
    return tmp_path / "results"


MISTAKES = [
    # commands and options
    (("swepe", "x"), "no command 'swepe'; did you mean sweep?"),
    (("stauts", "x"), "no command 'stauts'; did you mean status?"),
    (("run", "quickstart"), "no command 'run'; did you mean sweep?"),
    (("plot", "x"), "no command 'plot'; did you mean figures?"),
    (("zzz",), "no command 'zzz'; mebm --help lists them"),
    (("sweep", "quickstart", "--trails", "3"), "no option --trails; did you mean --trials?"),
    (("sweep", "quickstart", "--seed", "3"), "no option --seed; did you mean --seeds?"),
    (("sweep", "quickstart", "--epochs", "3"), "no option --epochs; it is a field: --set epochs=VALUE"),
    (("train", "m-ebm", "--lr", "0.1"), "no option --lr; it is a field: --set learning_rate=VALUE"),
    (("sweep", "quickstart", "--hours", "3"), "no option --hours; it is a field: --set budget.hours=VALUE"),
    (("sweep", "quickstart", "--set", "epochs", "5"), "--set epochs: must be KEY=VALUE, for example --set epochs=5"),
    (("tables", "x", "--merge", "newst"), "'newst' is not one of 'all', 'newest', 'best'; did you mean newest?"),
    (("figures", "x", "--kind", "tnse"), "; did you mean tsne?"),
    (("new", "methd", "x"), "; did you mean method?"),
    (("sweep", "quickstart", "-n", "--results", "s3:/bucket/x"), "'s3:/bucket/x' is not a URL; did you mean s3://bucket/x?"),
    # studies, methods, data sets, networks, protocols, devices
    (("sweep", "quickstart.yml"), "quickstart.yml: no such file, and no packaged config; mebm configs lists those; did you mean quickstart?"),
    (("show", "cifar10-night"), "; did you mean cifar10_night?"),
    (("train", "m-emb"), "; did you mean m-ebm?"),
    (("train", "mjem"), "; did you mean m-jem?"),
    (("methods", "shortrn"), "; did you mean shortrun?"),
    ((*SET, "method=igbem"), "; did you mean igebm?"),
    ((*SET, "dataset=cifar"), "dataset 'cifar' is unknown (known: celeba_hq_128, cifar10, cifar100, digits, imagenet32); images of your own need data_dir; did you mean cifar10?"),
    (("init", "x.yaml", "--dataset", "cifar"), "; did you mean cifar10?"),
    ((*SET, "network=resnet"), "or wrn-DEPTH-WIDTH, but got 'resnet'; for example conv-16 or wrn-28-10"),
    ((*SET, "evaluation.protocols=[small-bufer]"), "; did you mean small-buffer?"),
    ((*SET, "device=gpu"), "'auto', 'cpu' or 'cuda'; did you mean cuda?"),
    ((*SET, "run.loggers=[tensorbord]"), "; did you mean tensorboard?"),
    # a folder of images alone
    ((*SET, "data_dir=NOWHERE"), "; data_dir is given, but dataset is digits, which comes with the package (8x8x1): name the data set of the folder too, such as dataset=cifar10 ("),
    ((*SET, "data_dir=RESULTS"), "; data_dir is given, but dataset is digits, which comes with the package (8x8x1): name the data set of the folder too"),
    # lists, mappings, ranges
    ((*SET, "evaluation.protocols=small-buffer"), "trial.evaluation.protocols = 'small-buffer': must be a list, such as [small-buffer]\n"),
    ((*SET, "seeds=3"), "seeds = 3: must be a list, such as [0, 1, 2]\n"),
    ((*SET, "run.loggers=tensorboard"), "must be a list, such as [tensorboard]"),
    ((*SET, "resources=2"), "resources = 2: must be a mapping of cpus, gpus, memory_gb, gpu_type, placement"),
    ((*SET, "objectives=fid"), "objectives.0.metric = 'fid': must be one of fd_buffer, fd_fresh, fid_buffer"),
    ((*SET, "search.space.K=5"), "search.space.sampling_steps = 5: is not a range: give {low: 1, high: 5} or {choices: [1, 2]}"),
    (("sweep", "quickstart", "-n", "-s", "K=1..5"), "-s K=1..5: a range is K=1:5, and choices are K=1,2,5"),
    (("sweep", "quickstart", "-n", "-s", "K=1-5"), "a range is K=1:5"),
    # fields
    ((*SET, "space.sampling_step.high=5"), "--set space.sampling_step.high: unknown key; did you mean search.space.sampling_steps.high?"),
    ((*SET, "search.space.sampling_step.high=5"), "search.space.sampling_step: unknown trial field; did you mean sampling_steps?"),
    ((*SET, "search.space.K.hi=5"), "search.space.sampling_steps.hi: unknown key; did you mean high?"),
    ((*SET, "K.high=5"), "--set sampling_steps.high: unknown key; did you mean search.space.sampling_steps.high?"),
    ((*SET, "search.trails=5"), "search.trails: unknown key; did you mean trials?"),
    ((*SET, "trials=5"), "--set trials: unknown key; did you mean search.trials?"),
    ((*SET, "gpus=1"), "--set gpus: unknown key; did you mean resources.gpus?"),
    ((*SET, "sampler=tpe"), "; did you mean search.sampler?"),
    ((*SET, "langevin_steps=5"), "; did you mean sampling_steps?"),
    ((*SET, "batch=5"), "; did you mean batch_size?"),
    ((*SET, "n_steps=5"), "; did you mean sampling_steps?"),
    ((*SET, "K=5"), "--set sampling_steps=5: the study searches sampling_steps; mebm sweep -s sampling_steps=5 fixes it"),
    (("train", "m-ebm", "--set", "search.trials=3"), "--set search.trials: is of a study, and this is one trial; mebm sweep runs studies"),
    (("fields", "sampling_step"), "; did you mean sampling_steps?"),
    # results
    (("report", "RESULTS/frist"), "no such folder; expected a study's folder or one that holds studies; did you mean RESULTS/first?"),
    (("resume", "RESULTS/frist"), "no such folder; did you mean RESULTS/first?"),
    (("status", "RESULTS"), "it has no study.yaml; name one of the studies in it: RESULTS/first"),
    (("evaluate", "RESULTS/frist", "-p", "hybrid"), "; did you mean RESULTS/first?"),
    (("sample", "RESULTS/first/models/t0001", "--out", "x.png"), "; did you mean RESULTS/first/models/t0001.pt?"),
    (("compare", "RESULTS/first", "--by", "seed"), "--by seed: the two trials of a pair have the same seed; mebm report shows how seeds differ"),
    (("compare", "RESULTS/first", "--by", "precison"), "--by precison: no finished trial has this field; did you mean precision?"),
    (("compare", "RESULTS/first", "--by", "zzz"), "--by zzz: no finished trial has this field; the trials differ in K"),
    (("recommend", "RESULTS/first", "--metric", "fd"), "no trial has a 'fd'; expected one of fd_buffer; did you mean fd_buffer?"),
    (("recommend", "RESULTS/first", "--dataset", "digit"), "; expected one of digits; did you mean digits?"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"), MISTAKES, ids=lambda value: "-".join(value) if isinstance(value, tuple) else ""
)
def test_a_mistake_is_told_in_one_line_with_what_was_meant(mebm, results, monkeypatch, arguments, said):
    monkeypatch.chdir(results.parent)
    named = [a.replace("RESULTS", str(results)).replace("NOWHERE", str(results / "nowhere")) for a in arguments]
    monkeypatch.setattr("sys.argv", ["mebm", *named])
    code, out, err = mebm(*named)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said.replace("RESULTS", str(results)) in err
    assert not (results.parent / "results" / "quickstart").exists()


def test_pairs_by_the_papers_symbol_are_those_by_the_field(mebm, results):
    by_symbol = mebm("compare", results / "first", "--by", "K", "--json")
    assert by_symbol == mebm("compare", results / "first", "--by", "sampling_steps", "--json")
    shown = json.loads(by_symbol[1])
    assert (shown["field"], shown["pairs"], {r["value"] for r in shown["rows"]}) == ("sampling_steps", 2, {"5"})
    assert mebm("compare", results / "first", "--by", "K")[1].startswith("K 5 against 1: 0/2 pairs ended differently")
    assert mebm("compare", results / "first", "--by", "p0")[1] == (
        "no two trials differ in p0 alone and have the same seed\n"
    )


def test_what_is_searched_may_be_named_by_symbols(mebm):
    out = mebm("sweep", "quickstart", "-n", "-s", "K=2,3", "-s", "alpha=0.5", "-s", "p0=gaussian")[1]
    assert "searched    sampling_steps: 2, 3" in out
    searched = [line.split()[1] for line in out.splitlines() if line.startswith("searched")]
    assert searched == ["reinit_probability:", "buffer_size:", "sampling_steps:"]


def test_short_forms_mean_what_they_say(mebm):
    out = mebm(*SET, "objectives=[fd_fresh, seconds_per_iteration]", "--set", "pruning=median")[1]
    assert "objectives  minimize fd_fresh, minimize seconds_per_iteration" in out


def test_a_word_that_is_no_field_finds_those_that_speak_of_it(mebm):
    code, out, err = mebm("fields", "langevin")
    assert (code, err) == (0, "") and "evaluation.fresh_steps" in out and "learning_rate" not in out


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "ab", 2), ("m-emb", "m-ebm", 1), ("ab", "ba", 1), ("kitten", "sitting", 3), ("ca", "abc", 3)],
)
def test_edits_count_swapped_neighbours_once(first, second, distance):
    assert edits(first, second) == edits(second, first) == distance


def test_the_likeliest_name_comes_first():
    assert likeliest("fd", ["fid_buffer", "fd_buffer", "fd_fresh"]) == "fd_buffer"
    assert likeliest("Sampling-Steps", ["sampling_steps", "sampler"]) == "sampling_steps"
    assert likeliest("hours", ["budget.gpu_hours", "budget.hours"]) == "budget.hours"
    assert (
        likeliest("xyzzy", ["sampling_steps"]) is None and likeliest("", ["a"]) is None and likeliest("a", []) is None
    )
    assert likeliest("alhpa", ["step_size"], {"alpha": "step_size"}) == "step_size"


def test_a_path_is_looked_for_beside_the_one_that_is_not_there(tmp_path):
    (tmp_path / "study.yaml").touch()
    assert nearest_path(tmp_path / "study.yml") == f"; did you mean {tmp_path / 'study.yaml'}?"
    assert nearest_path(tmp_path / "zzz") == nearest_path(tmp_path / "no" / "where") == ""
