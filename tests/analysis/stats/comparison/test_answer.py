"""The answer in one sentence: it names what the summary may name, and no more."""

import pytest

from analysis.results.load import load
from analysis.stats.comparison.answer import answer
from analysis.stats.comparison.summary import summarise


def said(results):
    return answer(summarise(results).studies[0])


def test_a_named_field_and_the_recommended_setting(synthetic):
    results = load(synthetic(60))
    text = said(results)
    summary = summarise(results).studies[0]
    assert text.startswith("Stability depends on p0 (p = 0.0")
    assert f"the best survivor is {summary.best.setting}: FD (buffer) " in text and "(fresh " in text
    assert text.endswith(".") and "\n" not in text and len(text) < 320


def test_without_a_named_field_none_is(make_results, row):
    trials = [row(f"t{i}", "diverged" if i % 3 == 0 else "completed", setting_id=f"s{i}", sampling_steps=1 + i,
                  fd_buffer_best=1.0 + i) for i in range(9)]  # fmt: skip
    results = make_results(trials, varied=["sampling_steps", "step_size"])
    assert said(results).startswith("3 of 9 trials diverged; ")
    assert "depends" not in said(results)


@pytest.mark.parametrize(
    ("outcomes", "start"),
    [
        (["diverged"] * 4, "All 4 trials diverged by iteration 150"),
        (["collapsed"] * 4, "All 4 trials collapsed by iteration 150"),
        (["diverged", "collapsed"], "Both trials diverged or collapsed by iteration 150"),
        (["completed"] * 9, "None of 9 trials diverged or collapsed by iteration 600 (a rate of up to 30% is still"),
        (["diverged"], "The one trial diverged by iteration 150"),
        (["completed"], "The one trial stayed stable for 600 iterations"),
        (["pending", "running"], "No trial has ended yet."),
        (["diverged", "diverged", "diverged", "running"], "All 3 trials that have ended diverged by iteration "),
        (["completed", "completed", "running"], "None of 2 trials that have ended diverged or collapsed by iteration "),
        (["diverged", "completed", "completed", "running"], "1 of 3 trials that have ended diverged"),
        (["diverged", "pending", "running"], "Of 3 trials one has ended: it diverged"),
        ([], "No trial has started yet."),
    ],
)
def test_few_trials_and_all_alike(make_results, row, outcomes, start):
    rows = [row(f"t{i}", o, **({"iterations_done": 0} if o == "pending" else {})) for i, o in enumerate(outcomes)]
    text = said(make_results(rows))
    assert text.startswith(start)
    assert text.endswith(".") and ". " not in text


def test_where_all_diverge_a_named_field_says_how_soon(make_results, row):
    trials = [
        row(f"t{i}", "diverged", iteration=5 + 50 * i, step_size=9.0 / (1 + i), setting_id=f"s{i}") for i in range(12)
    ]
    text = said(make_results(trials, varied=["step_size"]))
    assert text.startswith("All 12 trials diverged by iteration 555, how soon depending on α (p = 0.00")


def test_nothing_is_recommended_of_what_does_not_survive(make_results, row):
    trials = [
        row(f"t{i}", "diverged" if i else "completed", setting_id="s", seed=i, fd_buffer_best=1.0) for i in range(9)
    ]
    text = said(make_results(trials))
    assert text.startswith("8 of 9 trials diverged; nothing can be recommended: no setting is expected to survive")
