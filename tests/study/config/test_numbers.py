"""Numbers as people write them: read as what is meant, or refused by name, and the same wherever they stand."""

from __future__ import annotations

import pytest

from study.config.errors import UserError
from study.config.load import load_study, validate_study
from study.config.space import any_value
from study.config.study import StudyConfig
from study.config.yaml_input import parse_yaml, write_yaml

REAL = {"1e-1": 0.1, "1E0": 1.0, "+1": 1, ".5": 0.5, "1.5e-1": 0.15, "1.5E-01": 0.15, ".5e0": 0.5, "5.e-1": 0.5,
        "0.2_5": 0.25, "1": 1, "+1e-1": 0.1, "'1e-1'": 0.1, '"+.5"': 0.5, "1e+0": 1.0}  # fmt: skip
WHOLE = {"1e1": 10, "1E1": 10, "+7": 7, "1_0": 10, "0o17": 15, "0x1F": 31, "0b11": 3, "07": 7, "7.0": 7, "+0o17": 15,
         "'7'": 7, "'1_0'": 10, "1.2e1": 12}  # fmt: skip
AMBIGUOUS = ("1:30", "017", "-1:30", "1:30.5", "010", "0_17")
PLACES = {
    "trial": "trial: {{{field}: {number}}}\nsearch: {{trials: 1, space: {{norm: {{choices: [none]}}}}}}",
    "start": "search: {{trials: 1, space: {{{field}: {{low: {low}, high: 40}}}}, start: [{{{field}: {number}}}]}}",
    "choices": "search: {{trials: 1, space: {{{field}: {{choices: [{number}]}}}}}}",
    "start of choices": "search: {{trials: 1, space: {{{field}: {{choices: [{number}, 2]}}}}, start: [{{{field}: {number}}}]}}",
    "low": "search: {{trials: 1, space: {{{field}: {{low: {number}, high: {number}}}}}}}",
    "grid": "search: {{sampler: grid, grid: [{{{field}: [{number}]}}]}}",
    "grid of one": "search: {{sampler: grid, grid: [{{{field}: {number}}}]}}",
}


def value_of(text, field, number, tmp_path, low):
    path = tmp_path / "s.yaml"
    path.write_text("name: s\n" + text.format(field=field, number=number, low=low) + "\n", encoding="utf-8")
    study = load_study(str(path))
    again = StudyConfig.model_validate(parse_yaml(study.to_yaml(), "again"))
    assert again == study
    space = again.space
    point = {k: any_value(d) for k, d in space.distributions.items()} | (dict(space.start[0]) if space.start else {})
    return getattr(space.trial(point, 0), field)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", REAL)
def test_a_real_number_is_what_it_says_wherever_it_stands(tmp_path, place, number):
    assert value_of(PLACES[place], "step_size", number, tmp_path, 0.001) == REAL[number]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", WHOLE)
def test_a_whole_number_is_what_it_says_wherever_it_stands(tmp_path, place, number):
    found = value_of(PLACES[place], "sampling_steps", number, tmp_path, 1)
    assert found == WHOLE[number]
    assert type(found) is int


@pytest.mark.parametrize("number", ["1e1", "+7", "1_0", "0o17", "7.0"])
def test_seeds_and_counts_are_read_alike(tmp_path, number):
    path = tmp_path / "s.yaml"
    path.write_text(
        f"name: s\nseeds: [{number}]\nsearch: {{trials: {number}, seed: {number}, space: {{step_size: {{low: 1, high: 2}}}}}}"
    )
    study = load_study(str(path))
    assert study.seeds == (WHOLE[number],)
    assert (study.search.trials, study.search.seed) == (WHOLE[number], WHOLE[number])
    assert load_study(str(path), (f"seeds=[{number}, 99]",)).seeds == (WHOLE[number], 99)


@pytest.mark.parametrize("number", AMBIGUOUS)
@pytest.mark.parametrize("place", PLACES)
def test_a_number_of_two_readings_is_refused_with_its_key(tmp_path, place, number):
    with pytest.raises(
        UserError, match=r"sampling_steps(\[0\])?(\.low)?(\.choices\[0\])?: .*(base 60|YAML 1.1)"
    ) as caught:
        value_of(PLACES[place], "sampling_steps", number, tmp_path, 1)
    assert number in str(caught.value)


@pytest.mark.parametrize("number", ["1:30", "017"])
def test_so_it_is_in_seeds_and_on_the_command_line(tmp_path, number):
    path = tmp_path / "s.yaml"
    path.write_text(f"name: s\nseeds: [{number}]\nsearch: {{trials: 1, space: {{step_size: {{low: 1, high: 2}}}}}}")
    with pytest.raises(UserError, match=r"seeds\[0\]: "):
        load_study(str(path))
    with pytest.raises(UserError, match=f"--set trial.sampling_steps={number}: "):
        load_study("quickstart", (f"trial.sampling_steps={number}",))


@pytest.mark.parametrize(
    "number", ["'1:30'", "'0o17'", "one", "1e", "1.5.1", "e1", "'1e1x'", "0x", ".nan", "1,5", "yes"]
)
@pytest.mark.parametrize("place", [p for p in PLACES if p != "start of choices"])
def test_what_is_no_number_is_refused_by_name(tmp_path, place, number):
    if "," in number and place in ("choices", "grid"):
        return  # two numbers
    with pytest.raises(UserError, match="sampling_steps"):
        value_of(PLACES[place], "sampling_steps", number if "," not in number else f"'{number}'", tmp_path, 1)


@pytest.mark.parametrize("text", ["1e5", "1E3", "0o17", ".5e3", "017", "1:30", "+1", "yes", "-1e-1", "1_000", "1.e5"])
def test_a_text_that_looks_like_a_number_stays_a_text_in_the_studys_file(text):
    assert parse_yaml(write_yaml({"description": text}), "x") == {"description": text}
    study = validate_study(
        {"name": "s", "description": text, "search": {"trials": 1, "space": {"step_size": {"low": 1, "high": 2}}}}, "x"
    )
    assert StudyConfig.model_validate(parse_yaml(study.to_yaml(), "x")) == study


def test_numbers_given_as_texts_from_python_are_read_alike():
    search = {
        "trials": 9,
        "space": {"step_size": {"choices": ["1e-1", 0.1, "1E0", 1]}, "sampling_steps": {"low": "1", "high": "1e1"}},
        "start": [{"step_size": "1e0", "sampling_steps": "5"}],
    }
    space = validate_study({"name": "s", "trial": {"dataset": "digits"}, "search": search}, "x").space
    assert space.distributions["step_size"].choices == (0.1, 1.0)
    assert space.start == ({"step_size": 1.0, "sampling_steps": 5},)
    assert space.different == "20 settings"
