"""The closing summary: its claims carry counts and go no further than the budget."""

import numpy as np

from analysis.results.labels import duration
from analysis.results.load import Results, load
from analysis.results.parquet import records
from analysis.stats.comparison.summary import best_text, summarise
from trainables.results.hours import Hours


def p0_study(row):
    trials = []
    for i in range(12):
        trials.append(row(f"g{i}", initial="gaussian", setting_id="g", seed=i, fd_buffer_best=0.5 + i / 100))
        bad = "diverged" if i < 8 else "completed"
        trials.append(
            row(f"u{i}", bad, initial="uniform", setting_id="u", seed=i, fd_buffer_best=0.1 if i == 9 else 3.0)
        )
    return [t | {"fd_buffer_protocol": "small-v1", "sampling_steps": 1 + t["seed"] % 2} for t in trials]


def test_lines_of_a_study(make_results, row):
    results = make_results(p0_study(row))
    lines = summarise(results).lines()
    assert lines[0] == "24 trials: 16 completed, 8 diverged"
    # A permutation test of 2 fields; Fisher's exact test of 0/12 against 8/12 alone has p = 0.0013.
    assert lines[1].startswith("p0 gaussian 0/12 diverged, uniform 8/12 diverged (p = 0.00")
    assert lines[1].endswith(", corrected for 2 fields)")
    assert "p0 gaussian: stable for 600 iterations (0/12 diverged, at most 24% at 95%)" in lines
    # The best setting is that of the best mean over its trials, not that of the luckiest trial.
    best = next(line for line in lines if line.startswith("best setting"))
    assert "p0 gaussian" in best
    assert "protocol small-v1" in best
    assert "0/6 diverged by iteration 600, at most 39% at 95%" in best
    said = "trial-minutes: 2.9 useful, 1.5 diverged, 0.2 replayed or lost"
    # One count of time for the console while it runs, and for the summary after.
    assert lines[-1] == Hours.of(records(results.trials)).text() == said


def test_no_field_is_named_where_none_matters(make_results, row):
    rng = np.random.default_rng(0)
    trials = [
        row(f"t{i}", "diverged" if rng.random() < 0.4 else "completed", setting_id=str(i), step_size=rng.random(),
            sampling_steps=int(rng.integers(1, 11)), initial=str(rng.choice(["gaussian", "uniform"])))
        for i in range(20)
    ]  # fmt: skip
    results = make_results(trials, varied=["step_size", "sampling_steps", "initial"])
    lines = summarise(results).lines()
    assert lines[1].startswith("no field stands out in 20 trials, and some ")
    assert lines[1].endswith(" more trials would be needed to confirm the largest effect seen")
    assert not any("stable for" in line or "p0" in line.partition(":")[0] for line in lines)


def test_a_number_of_many_values_is_named_first_and_cut_for_its_rates_after(make_results, row):
    trials = [
        row(f"t{i}", "diverged" if i < 10 else "completed", step_size=0.1 * (i + 1), setting_id=str(i))
        for i in range(30)
    ]
    results = make_results(trials, varied=["step_size"])
    lines = summarise(results).lines()
    assert lines[1] == "α = 0.1 to 1: 10/10, α = 1.1 to 2: 0/10, α = 2.1 to 3: 0/10 diverged (p = 0.001)"
    assert any(line.startswith("α = 2.1 to 3: stable for 600 iterations (0/10 diverged") for line in lines)


def test_pruned_trials_stay_in_the_counts_of_a_named_field(make_results, row):
    trials = [
        row(f"{p0}{i}", outcome, initial=p0, setting_id=p0, iteration=20 if outcome == "diverged" else None,
            iterations_done=done)
        for p0, ends in (
            ("gaussian", [("completed", 600)] * 4 + [("pruned", 300)] * 16),
            ("uniform", [("diverged", 20)] * 12 + [("pruned", 300)] * 5 + [("completed", 600)] * 3),
        )
        for i, (outcome, done) in enumerate(ends)
    ]  # fmt: skip
    lines = summarise(make_results(trials, varied=["initial"])).lines()
    # 12 of 20 diverge before any is pruned: 60%, and not 12 of the 15 that were not pruned.
    assert lines[1].startswith("p0 gaussian 0% of 20, 16 cut off diverged, uniform 60% of 20, 5 cut off diverged (p = ")
    # Four were still there in the end: at most 49%, and not the 16% of 20.
    stable = "p0 gaussian: stable for 600 iterations (0 of 20 diverged, 16 cut off before: 0%, at most 49% at 95%)"
    assert stable in lines


def test_a_setting_that_nearly_always_diverges_is_never_the_best(make_results, row):
    def trials(k, values):
        return [
            row(f"{k}-{i}", "completed" if v else "diverged", sampling_steps=k, setting_id=str(k), seed=i,
                fd_buffer_best=v or 9.0)
            for i, v in enumerate(values)
        ]  # fmt: skip

    lucky = trials(1, [0.1, *[None] * 9])
    both = summarise(make_results([*lucky, *trials(5, [0.5] * 10)])).lines()
    assert any(line.startswith("best setting: K 5") for line in both)
    alone = summarise(make_results(lucky, varied=["sampling_steps"])).lines()
    assert not any(line.startswith("best setting") for line in alone)
    why = next(line for line in alone if line.startswith("no best setting"))
    assert "no setting is expected to survive more often than not" in why
    assert "1 of 10 did" in why


def test_where_fresh_chains_put_another_setting_first_both_are_said(make_results, row):
    def trials(k, buffer, fresh):
        return [
            row(f"{k}-{i}", sampling_steps=k, setting_id=str(k), seed=i, fd_buffer_best=buffer + i / 100,
                fd_fresh_best=fresh + i / 100, fd_buffer_protocol="b", fd_fresh_protocol="f")
            for i in range(5)
        ]  # fmt: skip

    lines = summarise(make_results([*trials(1, 0.2, 3.0), *trials(10, 0.3, 0.5)])).lines()
    best = [i for i, line in enumerate(lines) if line.startswith("best setting: K 1")]
    assert len(best) == 1
    assert "FD (fresh) 3.02" in lines[best[0]]
    assert lines[best[0] + 1].startswith("  ahead of K 10")
    assert lines[best[0] + 2].startswith("  K 10 is first by fresh chains from p0: FD (fresh) 0.52")
    agree = summarise(make_results([*trials(1, 0.4, 3.0), *trials(10, 0.3, 0.5)])).lines()
    assert not any("first by fresh chains" in line for line in agree)


def test_best_of_the_buffer_has_its_fresh_value_beside(make_results, row):
    trials = [
        row(f"t{i}", seed=i, fd_buffer_best=0.2, fd_buffer_protocol="b", fd_fresh_best=2.7 + 0.2 * i,
            fd_fresh_protocol="f")
        for i in range(2)
    ]  # fmt: skip
    best = summarise(make_results(trials)).studies[0].best
    assert best is not None
    assert "FD (buffer) 0.2 ± 0 (standard error 0), FD (fresh) 2.8 ± 0.141 (2 trials, protocols b, f)" in best_text(
        best
    )
    mixed = [trials[0], trials[1] | {"fd_fresh_protocol": "other"}]
    best = summarise(make_results(mixed)).studies[0].best
    assert best is not None
    # Values of two protocols are no mean: those of one stand there.
    assert best.fresh is not None
    assert best.fresh.n == 1
    alone = summarise(make_results([row("t", fd_fresh_best=1.0)])).studies[0].best
    assert alone is not None
    assert alone.fresh is None


def test_many_no_and_unfinished_studies(synthetic, study, row):
    assert summarise(Results(load(study([])).trials, load(study([])).epochs, {}, {})).lines() == ["no studies"]
    assert summarise(load(study([]))).lines() == ["no trials"]
    assert summarise(load(study([row("t1", "pending", seconds=None)]))).lines()[0] == "1 trial: 1 pending"
    both = load(synthetic(6, name="a"), synthetic(6, name="b"))
    lines = summarise(both).lines()
    assert [line for line in lines if line in ("a:", "b:")] == ["a:", "b:"]


def test_duration():
    assert [duration(s) for s in (0.0, 9.96, 61, 600, 7200)] == ["0.0 s", "10.0 s", "61 s", "10.0 min", "2.0 h"]


def test_trials_of_another_protocol_are_counted_beside_the_best(make_results, row):
    trials = [row(f"a{i}", setting_id="a", fd_buffer_best=2.0, seed=i) for i in range(2)]
    other = row("b0", setting_id="b", fd_buffer_best=1.0) | {"fd_buffer_protocol": "q"}
    lines = summarise(make_results([*trials, other])).lines()
    (best,) = (i for i, line in enumerate(lines) if line.startswith("best setting"))
    assert any("1 trial was scored under another protocol" in line and "left out" in line for line in lines[best + 1 :])
