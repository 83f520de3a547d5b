"""Groups of a field's values: few, named by what is there, no trial lost."""

import pytest

from analysis.stats.trials.grouping import by_value


def groups(values):
    return {name: [t["x"] for t in part] for name, part in by_value([{"x": v} for v in values], "x").items()}


def test_few_values_and_text_are_groups_of_their_own():
    assert groups([10, 1, 2, 1, None]) == {"1": [1, 1], "2": [2], "10": [10], "none": [None]}
    assert list(groups(["b", "a", "e", "d", "c"])) == ["a", "b", "c", "d", "e"]
    assert groups([]) == {}


def test_many_numbers_are_at_most_three_groups_that_part_no_value():
    steps = [1] * 7 + [2] * 3 + [3] * 4 + [4] + [5] * 3 + [9, 10]
    got = groups(steps)
    assert list(got) == ["1 to 2", "3 to 10"]
    assert sorted(v for part in got.values() for v in part) == sorted(steps)
    assert list(groups([*range(1, 10), None])) == ["1 to 3", "4 to 6", "7 to 9", "none"]


def test_levels_that_were_run_often_are_not_pooled():
    levels = [0.0, 0.05, 0.2, 0.5, 1.0, 2.0]
    assert {name: len(part) for name, part in groups(levels * 5).items()} == dict.fromkeys(
        ("0", "0.05", "0.2", "0.5", "1", "2"), 5
    )
    assert list(groups(levels[1:] * 5 + [None])) == ["0.05", "0.2", "0.5", "1", "2", "none"]
    assert len(groups((levels * 5)[:-1])) == 3, "one has four trials"
    assert len(groups([float(i) for i in range(7)] * 5)) == 3, "seven are too many"
    assert len(groups([*levels * 5, None])) == 4, "and so are six and null"


def test_neighbours_never_share_a_bound():
    got = groups([0.01, 0.1291, 0.1292, 0.1294, 0.3, 0.4])
    assert list(got) == ["0.01 to 0.1291", "0.1292 to 0.1294", "0.3 to 0.4"]


@pytest.mark.parametrize("n", range(5, 30))
def test_no_trial_is_lost(n):
    values = [i * i / 7 for i in range(n)]
    got = groups(values)
    assert len(got) == 3
    assert [v for part in got.values() for v in part] == values
