"""A study's YAML means one thing: no key twice, no truth value where a number stands."""

from __future__ import annotations

import pytest
import yaml

from study.config.errors import UserError
from study.config.load import load_study
from study.config.yaml_input import parse_yaml

PLAIN = """\
name: twice
trial: {method: m-ebm, dataset: digits, network: conv-8}
search:
  sampler: random
  trials: 2
  space: {step_size: {low: 0.5, high: 2.0}}
"""


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        (f"{PLAIN}name: other\n", "name", (1, 7)),
        (PLAIN.replace("  trials: 2\n", "  trials: 2\n  'trials': 20\n"), "trials", (5, 6)),
        (PLAIN.replace("low: 0.5,", "low: 0.5,\n    low: 1.5,"), "low", (6, 7)),
        (f"{PLAIN}objectives:\n- metric: fd_buffer\n  metric: accuracy\n", "metric", (8, 9)),
        (f"{PLAIN}? name\n: other\n", "name", (1, 7)),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(mebm, tmp_path, text, key, lines):
    path = tmp_path / "twice.yaml"
    path.write_text(text, encoding="utf-8")
    code, out, err = mebm("sweep", path, "--results", tmp_path / "results")
    assert (code, out) == (2, "")
    assert f"{path}: the key {key!r} stands twice" in err
    assert f"on line {lines[0]} and on line {lines[1]}" in err
    assert not (tmp_path / "results").exists()


def test_a_value_of_set_and_a_trial_s_file_are_read_alike(mebm, tmp_path, write_config):
    code, _, err = mebm("sweep", write_config(PLAIN), "-n", "--set", "seeds=[{a: 1, a: 2}]")
    assert code == 2
    assert "the key 'a' stands twice" in err
    trial = write_config("method: m-ebm\nepochs: 1\nepochs: 2\n", "t.yaml")
    code, _, err = mebm("train", trial, "--out", tmp_path / "out")
    assert code == 2
    assert "line 2 and on line 3" in err
    assert not (tmp_path / "out").exists()


def test_what_a_merge_brings_may_be_said_otherwise():
    text = "a: &base {p: 1, q: 2}\nb: {<<: *base, p: 3}\nc: [*base, *base]\n"
    assert parse_yaml(text, "x") == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("search.trials=true", "search.trials"),
        ("search.seed=false", "search.seed"),
        ("search.space={step_size: {low: true, high: 2}}", "search.space.step_size.low"),
        ("search.space={epochs: {choices: [true, 2]}}", "epochs"),
        ("search.start=[{step_size: true}]", "step_size"),
        ("seeds=[true]", "seeds.0"),
        ("seeds=[0, yes]", "seeds.1"),
        ("resources.cpus=true", "resources.cpus"),
        ("budget.hours=on", "budget.hours"),
        ("run.max_failures=false", "run.max_failures"),
        ("trial.epochs=true", "trial.epochs"),
        ("trial.decay_epochs=[60, true]", "trial.decay_epochs.1"),
        ("trial.divergence={gap_limit: true}", "trial.divergence.gap_limit"),
    ],
)
def test_a_truth_value_is_no_number(write_config, assignment, key):
    path = write_config(PLAIN)
    with pytest.raises(UserError) as found:
        load_study(str(path), (assignment,))
    message = str(found.value)
    assert key in message
    assert "true" in message.lower() or "false" in message.lower()


def test_a_number_stays_a_number_and_a_truth_value_one(write_config):
    path = write_config(PLAIN)
    study = load_study(
        str(path), ("trial.learning_rate=1e-4", "trial.merge_bias=true", "seeds=[0, 1]", "budget.hours=2")
    )
    assert study.trial == {**study.trial, "learning_rate": 1e-4, "merge_bias": True}
    assert study.seeds == (0, 1)
    assert study.budget.hours == 2
