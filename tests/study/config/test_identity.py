"""Ids of settings: long enough that two settings never share one, and kept by studies that began with shorter ones."""

from __future__ import annotations

import re

import pytest
import yaml

from study.config.fields import ID_DIGITS, OLD_ID_DIGITS, setting_id, text_id
from study.config.space import MAX_SETTINGS, MAX_VALUES
from trainables.methods.presets import build_trial

_RATE, _WEIGHT = 0.123456789, 0.987654321


@pytest.mark.slow
def test_a_million_settings_have_as_many_ids():
    """Settings are told apart by the text of their configuration; the shorter ids of before are shared by some."""

    def config(rate, weight):
        return build_trial({"dataset": "digits", "learning_rate": rate, "l2_weight": weight})

    before, _, after = config(_RATE, _WEIGHT).identity().partition(str(_WEIGHT))
    between, _, end = after.partition(str(_RATE))
    rates = [(i + 1) / 1000 for i in range(1000)]
    for rate, weight in ((rates[0], rates[7]), (rates[-1], rates[499])):
        made = config(rate, weight)
        assert setting_id(made) == text_id(f"{before}{weight}{between}{rate}{end}")
        assert len(setting_id(made)) == ID_DIGITS
    ids = {text_id(f"{before}{weight}{between}{rate}{end}") for rate in rates for weight in rates}
    assert len(ids) == 1_000_000
    assert len({text[:OLD_ID_DIGITS] for text in ids}) < 1_000_000


def test_trials_that_differ_in_their_seed_alone_share_an_id():
    one, other = (build_trial({"dataset": "digits", "seed": seed}) for seed in (0, 1))
    assert setting_id(one) == setting_id(other)
    assert setting_id(one) != setting_id(build_trial({"dataset": "digits", "sampling_steps": 7}))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([{"learning_rate": 1000, "l2_weight": 1000}], f"1,000,000 settings or more, but expected at most {MAX_SETTINGS:,}"),
        ([{"learning_rate": 200, "l2_weight": 50}, {"sampling_steps": 2}], "10,002 settings or more"),
        ([{"learning_rate": MAX_VALUES + 1}], rf"search.grid\[0\].learning_rate: has {MAX_VALUES + 1:,} values"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["sweep", "dry", "plan"])
def test_a_grid_too_large_is_refused_before_it_is_made(mebm, write_config, tiny, tmp_path, grid, message, command):
    blocks = [
        {key: [i + 1 if key == "sampling_steps" else (i + 1) * 1e-6 for i in range(count)] for key, count in b.items()}
        for b in grid
    ]
    values = {**tiny, "search": {"sampler": "grid", "grid": blocks}}
    path = write_config(yaml.safe_dump(values))
    results = tmp_path / "results"
    arguments = {
        "sweep": ("sweep", path, "--results", results),
        "dry": ("sweep", path, "--dry-run"),
        "plan": ("plan", path),
    }
    code, out, err = mebm(*arguments[command])
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(message, err)
    assert not results.exists()
