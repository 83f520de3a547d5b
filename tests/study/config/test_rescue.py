"""`rescue` of a study: what it changes, number by number, and what is refused, in one line."""

from __future__ import annotations

import pytest

from study.config.errors import UserError
from study.config.load import load_study, validate_study
from study.config.rescue import CHANGEABLE, rescued_trial
from study.run.launch import describe
from trainables.config.trial import TrialConfig
from trainables.methods.presets import build_trial
from trainables.training.device import derive_seed

CHANGE = {"sampling_steps": "x2", "learning_rate": "x0.5", "seed": "new"}


def _study(tiny, **rescue):
    return validate_study(tiny | {"rescue": {"change": CHANGE} | rescue}, "study.yaml")


def test_by_default_nothing_is_rescued(tiny):
    study = validate_study(tiny, "study.yaml")
    assert study.rescue is None
    assert not any("rescue" in line for line in describe(study, "study.yaml"))


def test_every_rescue_changes_the_one_before(tiny):
    study = _study(tiny, most=3)
    trial, seeds = build_trial({"sampling_steps": 3, "learning_rate": 0.1, "seed": 4}), []
    for number, (steps, rate) in enumerate([(6, 0.05), (12, 0.025), (24, 0.0125)], start=1):
        before, trial = trial, rescued_trial(study.rescue, trial, number, 4)
        assert (trial.sampling_steps, trial.learning_rate) == (steps, pytest.approx(rate))
        changed = {n for n in TrialConfig.model_fields if getattr(trial, n) != getattr(before, n)}
        assert changed == {"sampling_steps", "learning_rate", "seed"}
        seeds.append(trial.seed)
    assert seeds == [derive_seed(4, f"rescue {n}") % 2**31 for n in (1, 2, 3)]
    assert len({*seeds, 4}) == 4


def test_values_are_set_and_whole_numbers_stay_whole(tiny):
    study = _study(tiny, change={"sampling_steps": "x1.5", "noise_std": 0.0, "clip_norm": 1, "precision": "bf16"})
    trial = rescued_trial(study.rescue, build_trial({"sampling_steps": 3}), 1, 0)
    assert (trial.sampling_steps, trial.noise_std, trial.clip_norm, trial.precision) == (4, 0.0, 1.0, "bf16")
    assert type(trial.sampling_steps) is int


def test_the_study_goes_through_its_yaml(tiny, write_config):
    study = _study(tiny, on=["diverged"], rewind=4, most=2)
    assert load_study(str(write_config(study.to_yaml()))) == study


@pytest.mark.parametrize(
    ("rescue", "words"),
    [
        ({"change": {"network": "conv-8"}}, "network cannot change within a trial; one that can: sampling_steps, "),
        ({"change": {"buffer_size": "x2"}}, "buffer_size cannot change within a trial"),
        ({"change": {"divergence.gap_limit": 9}}, "divergence.gap_limit cannot change within a trial"),
        ({"change": {"sampling_step": "x2"}}, "sampling_step is not a field of a trial"),
        ({"change": {"seed": 3}}, "seed must be new"),
        ({"change": {"sampling_steps": "x0"}}, "must multiply by a number above 0 that is not 1"),
        ({"change": {"sampling_steps": "x1"}}, "must multiply by a number above 0 that is not 1"),
        ({"change": {"sampling_steps": "x1e99"}}, "must multiply by a number above 0 that is not 1"),
        ({"change": {"sampling_steps": "x-2"}}, "'x-2' is not a factor; expected such as x2 or x0.5"),
        ({"change": {"sampling_steps": "x1.2.3"}}, "must multiply by a number above 0 that is not 1"),
        ({"change": {"sampling_steps": "many"}}, "sampling_steps"),
        ({"change": {"sampling_steps": -1}}, "sampling_steps"),
        ({"change": {"l2_form": "x2"}}, "l2_form is paper, which cannot be multiplied by 2"),
        ({"change": {"sam_adaptive": "x2"}}, "sam_adaptive is False, which cannot be multiplied by 2"),
        ({"change": {"reinit_probability": "x10"}, "most": 3}, "at rescue 2: "),
        ({"change": {"sam_rho": "x2"}}, "changes nothing here: the trial would end as it did"),
        ({"change": {"betas": "x2"}}, "betas cannot change within a trial"),
        ({"change": {"learning_rate": "X0.5"}}, "study.yaml: rescue.change.learning_rate = 'X0.5': input should be a "),
        ({"change": {"learning_rate": "X0.5"}}, "; expected such as x2, x0.5 or a value of the field"),
        ({"change": {}}, "rescue.change"),
        ({"on": []}, "rescue.on"),
        ({"on": ["failed"]}, "rescue.on"),
        ({"rewind": 0}, "rescue.rewind = 0: must be last-healthy, or a whole number of epochs from 1"),
        ({"rewind": "first"}, "rescue.rewind"),
        ({"rewind": True}, "rescue.rewind"),
        ({"most": 0}, "rescue.most"),
        ({"most": 10**9}, "rescue.most"),
        ({"often": 3}, "unknown key"),
        ("yes", "rescue"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(tiny, rescue, words):
    given = {"change": CHANGE} | rescue if isinstance(rescue, dict) else rescue
    with pytest.raises(UserError) as refused:
        validate_study(tiny | {"rescue": given}, "study.yaml")
    text = str(refused.value)
    assert words in text
    assert text.startswith("study.yaml: ")
    assert "\n" not in text
    assert len(text) < 900
    assert "pydantic" not in text and "validation error" not in text


def test_a_hostile_name_is_cut_short(tiny):
    with pytest.raises(UserError) as refused:
        validate_study(tiny | {"rescue": {"change": {"x\n" * 5000: "x2"}}}, "study.yaml")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 2000


def test_a_setting_of_the_space_that_cannot_be_changed_is_found(tiny):
    """Not the first setting but the last one of a range has no room for the factor."""
    space = {"sampler": "random", "trials": 4, "space": {"reinit_probability": {"low": 0.05, "high": 0.9}}}
    with pytest.raises(UserError, match="reinit_probability"):
        validate_study(tiny | {"search": space, "rescue": {"change": {"reinit_probability": "x2"}, "most": 1}}, "s")


def test_of_a_setting_the_first_and_the_last_rescue_are_tried(tiny, monkeypatch):
    """A hundred rescues of many settings are checked without making a hundred trials of each."""
    made = []
    validate = TrialConfig.model_validate
    monkeypatch.setattr(TrialConfig, "model_validate", lambda values: made.append(values) or validate(values))
    grid = {"sampler": "grid", "grid": [{"learning_rate": [0.0001 * n for n in range(1, 51)]}]}
    rescue = {"change": {"learning_rate": "x0.99"}, "most": 100}
    study = validate_study(tiny | {"search": grid, "rescue": rescue}, "study.yaml")
    assert len(made) < 10 * 50
    last = min(values.get("learning_rate", 1.0) for values in made)
    assert last == pytest.approx(0.0001 * 0.99**100), "the last rescue of the smallest rate is among them"
    assert study.rescue.most == 100


def test_a_late_rescue_that_cannot_be_is_named(tiny):
    """17 x 0.97 is 16, and 16 x 0.97 is 16 again; of a probability the 59th is too large."""
    with pytest.raises(UserError, match=r"s: at rescue 2: rescue\.change: .* changes nothing here"):
        validate_study(
            tiny | {"search": {"sampler": "grid", "grid": [{"sampling_steps": [17]}]}}
            | {"rescue": {"change": {"sampling_steps": "x0.97"}, "most": 100}}, "s",
        )  # fmt: skip
    late = {"sampler": "grid", "grid": [{"reinit_probability": [0.01]}]}
    change = {"change": {"reinit_probability": "x1.1", "seed": "new"}}
    assert validate_study(tiny | {"search": late, "rescue": change | {"most": 48}}, "s").rescue.most == 48
    with pytest.raises(UserError, match=r"s: at rescue 49: rescue\.change\.reinit_probability = 1\.06"):
        validate_study(tiny | {"search": late, "rescue": change | {"most": 100}}, "s")


def test_a_script_is_not_rescued(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("", encoding="utf-8")
    study = {"name": "s", "trial": {"script": str(script)}, "search": {"sampler": "grid", "grid": [{"a": [1]}]}}
    with pytest.raises(UserError, match="rescue: is of built-in methods"):
        validate_study(study | {"rescue": {"change": CHANGE}}, "study.yaml")


def test_a_dry_run_says_what_would_be_done(tiny):
    lines = [
        line for line in describe(_study(tiny, on=["diverged"], most=2), "s") if "rescue" in line or "most" in line
    ]
    assert lines == [
        "rescue      diverged: back to the last healthy state, before the alarm by the detector's lead (69 with norm "
        "batch, 6 with norm none); sampling_steps x2, learning_rate x0.5, seed new",
        "            at most 2 times a trial, up to 16 more runs",
    ]
    assert any("at least 5 epochs before the alarm" in line for line in describe(_study(tiny, rewind=5), "s"))


def test_every_field_that_can_change_is_a_field():
    assert set(CHANGEABLE) <= set(TrialConfig.model_fields)
