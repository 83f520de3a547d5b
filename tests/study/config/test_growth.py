"""What `mebm scale` makes of its options: sizes, the field that grows, and the studies of the sizes."""

import pytest

from study.config.errors import UserError
from study.config.growth import Axis, axis_of, boundary_field, sizes_of, study_name
from study.config.load import validate_study

NONE = dict.fromkeys(("widths", "depths", "resolutions", "batches"))


def study(trial=None, **more):
    values = {"name": "s", "trial": {"dataset": "digits", "network": "conv-16"} | (trial or {})}
    search = {"sampler": "random", "trials": 4, "space": {"learning_rate": {"low": 0.01, "high": 1, "log": True}}}
    return validate_study({**values, "search": search, **more}, "s.yaml")


@pytest.mark.parametrize(
    ("option", "text", "trial", "made"),
    [
        ("widths", "8,4", {}, ["network=conv-4", "network=conv-8"]),
        ("widths", "1, 2", {"network": "wrn-10-1"}, ["network=wrn-10-1", "network=wrn-10-2"]),
        ("depths", "16,10", {"network": "wrn-10-1"}, ["network=wrn-10-1", "network=wrn-16-1"]),
        ("resolutions", "16,8", {}, ["image_size=8", "image_size=16"]),
        ("batches", "32,64", {}, ["batch_size=32", "batch_size=64"]),
    ],
)
def test_a_size_is_a_number_in_the_networks_name_or_a_field(option, text, trial, made):
    axis = axis_of(NONE | {option: text}, None)
    assert [axis.assignment(study(trial), size) for size in axis.sizes] == made


def test_any_field_may_grow():
    axis = axis_of(NONE, "|B|=500,2e3")
    assert (axis.field, axis.sizes) == ("buffer_size", (500.0, 2000.0))
    assert axis.assignment(study(), 2000) == "buffer_size=2000"
    axis = axis_of(NONE, "trial.l2_weight=0.01,0.1")
    assert axis.assignment(study(), 0.01) == "l2_weight=0.01"
    assert study_name(study(), axis, 0.01) == "s-l2_weight-0.01"
    assert study_name(study(), Axis("--widths", "width", (8.0,)), 8.0) == "s-width-8"


@pytest.mark.parametrize(
    ("options", "over", "words"),
    [
        ({}, None, "give one of --widths, --depths, --resolutions, --batches or --over, such as --widths 8,16,32"),
        ({"widths": "8,16", "batches": "32,64"}, None, "not several"),
        ({"widths": "8,16"}, "epochs=1,2", "not several"),
        ({"widths": "1.5,2"}, None, "--widths 1.5: must be a whole number"),
        ({}, "buffer_size", "must be FIELD=V,V"),
        ({}, "=1,2", "must be FIELD=V,V"),
    ],
)
def test_one_axis_grows(options, over, words):
    with pytest.raises(UserError) as error:
        axis_of(NONE | options, over)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["", "8,", "a", "0", "-8", "nan", ".inf", "1e10", "true", "[8]", "8 16", "{a: 1}", "8,8", "8,8.0", "!!python/x 8", "0x1g",
     ",".join(str(n) for n in range(1, 102)), "9" * 5000, "\x1b[2J"],
)  # fmt: skip
def test_what_is_no_list_of_sizes_is_refused_in_a_line(text):
    with pytest.raises(UserError) as error:
        sizes_of(text, "--widths")
    message = str(error.value)
    assert message.startswith("--widths") and message.isprintable() and len(message) < 400


def test_a_network_without_such_a_size_is_refused():
    words = "network 'conv-16' has no depth in its name; those of diffurecov-CHANNELS-BLOCKS, wrn-DEPTH-WIDTH have one"
    with pytest.raises(UserError, match=words):
        axis_of(NONE | {"depths": "8,16"}, None).assignment(study(), 8)


def space(**fields):
    return {"search": {"sampler": "random", "trials": 4, "space": fields}}


ALPHA, RATE = {"low": 0.1, "high": 10, "log": True}, {"low": 0.01, "high": 1, "log": True}


@pytest.mark.parametrize(
    ("more", "wanted", "words"),
    [
        (space(step_size=ALPHA, learning_rate=RATE), None, "fix the others; to study step_size: -s learning_rate=VALUE"),
        (space(step_size=ALPHA, learning_rate=RATE), "learning_rate", "to study learning_rate: -s step_size=VALUE"),
        (space(step_size=ALPHA), "learning_rate", "--boundary learning_rate: the study does not search it; -s"),
        (space(initial={"choices": ["gaussian", "uniform"]}), None, "initial has 'gaussian'; a boundary is that of numbers"),
        (space(l2_weight={"low": 0, "high": 1}), None, "l2_weight has 0.0; a boundary is that of numbers above 0"),
        ({"search": {"sampler": "grid", "grid": [{"step_size": [1.0]}]}}, None, "searches no field, so there is no boundary"),
        ({"pruning": {"rule": "asha"}}, None, "pruning ends trials before their stability is known"),
    ],
)  # fmt: skip
def test_a_boundary_is_that_of_one_searched_number(more, wanted, words):
    with pytest.raises(UserError) as error:
        boundary_field(study(**more), wanted)
    assert words in str(error.value)


def test_a_field_that_is_searched_at_one_value_is_fixed():
    grid = {"sampler": "grid", "grid": [{"step_size": [0.5, 1.0, 2.0], "learning_rate": [0.1]}]}
    assert boundary_field(study(search=grid), None) == "step_size"
    assert boundary_field(study(), "learning_rate") == "learning_rate"


def test_a_searched_network_does_not_grow():
    grid = {"sampler": "grid", "grid": [{"network": ["conv-4", "conv-8"], "learning_rate": [0.1, 1.0]}]}
    one = validate_study({"name": "s", "trial": {"dataset": "digits"}, "search": grid}, "s.yaml")
    with pytest.raises(UserError, match="searches network; fix it"):
        axis_of(NONE | {"widths": "8,16"}, None).assignment(one, 8)
