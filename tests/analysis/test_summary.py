"""The closing summary: its claims carry counts and go no further than the budget."""

from analysis.load import Results, load
from analysis.summary import best_text, duration, explanatory_fields, objective, summarise


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
    lines = summarise(make_results(p0_study(row))).lines()
    assert lines[0] == "24 trials: 16 completed, 8 diverged"
    assert lines[1] == "p0 gaussian 0/12 diverged, uniform 8/12 diverged"
    assert "p0 gaussian: stable for 600 iterations (0/12 diverged, at most 24% at 95%)" in lines
    # The best setting is that of the best mean over its trials, not that of the luckiest trial.
    best = next(line for line in lines if line.startswith("best setting"))
    assert "p0 gaussian" in best
    assert "FD (buffer) 0.555" in best
    assert "protocol small-v1" in best
    assert "0/12 diverged in 600 iterations" in best
    assert lines[-1].startswith("trial time 4.8 min, 80 s of it on trials that diverged or collapsed")


def test_explanatory_fields_rank_what_separates_and_leave_out_noise(make_results, row):
    trials = make_results(p0_study(row)).trials
    # Bad seeds are the first eight, so whether a seed is even tells nothing.
    assert explanatory_fields(trials, ["sampling_steps", "initial", "norm"]) == ["initial"]


def test_a_number_of_many_values_is_cut_in_thirds(make_results, row):
    trials = [
        row(f"t{i}", "diverged" if i < 10 else "completed", step_size=0.1 * (i + 1), setting_id=str(i))
        for i in range(30)
    ]
    results = make_results(trials, varied=["step_size"])
    lines = summarise(results).lines()
    assert lines[1] == "α = 0.1 to 1: 10/10, α = 1.1 to 2: 0/10, α = 2.1 to 3: 0/10 diverged"
    assert any(line.startswith("α = 2.1 to 3: stable for 600 iterations (0/10 diverged") for line in lines)


def test_best_of_the_buffer_has_its_fresh_value_beside(make_results, row):
    trials = [
        row(f"t{i}", seed=i, fd_buffer_best=0.2, fd_buffer_protocol="b", fd_fresh_best=2.7 + 0.2 * i,
            fd_fresh_protocol="f")
        for i in range(2)
    ]  # fmt: skip
    best = summarise(make_results(trials)).studies[0].best
    assert best is not None
    assert "FD (buffer) 0.2 ± 0, FD (fresh) 2.8 ± 0.141 (2 trials, protocols b, f)" in best_text(best)
    mixed = [trials[0], trials[1] | {"fd_fresh_protocol": "other"}]
    best = summarise(make_results(mixed)).studies[0].best
    assert best is not None
    assert best.fresh is None
    assert "FD (buffer) 0.2 ± 0 (2 trials, protocol b)" in best_text(best)
    alone = summarise(make_results([row("t", fd_fresh_best=1.0)])).studies[0].best
    assert alone is not None
    assert alone.fresh is None


def test_objective_is_the_manifests_if_measured(make_results, row):
    results = make_results([row("t1", fd_fresh_best=1.0, accuracy_best=0.5)])
    metric = objective(results, "demo")
    assert metric is not None
    assert metric.name == "fd_fresh"
    assert objective(make_results([row("t1")]), "demo") is None


def test_many_no_and_unfinished_studies(synthetic, study, row):
    assert summarise(Results(load(study([])).trials, load(study([])).epochs, {}, {})).lines() == ["no studies"]
    assert summarise(load(study([]))).lines() == ["no trials"]
    assert summarise(load(study([row("t1", "pending", seconds=None)]))).lines()[0] == "1 trial: 1 pending"
    both = load(synthetic(6, name="a"), synthetic(6, name="b"))
    lines = summarise(both).lines()
    assert [line for line in lines if line in ("a:", "b:")] == ["a:", "b:"]


def test_duration():
    assert [duration(s) for s in (0.0, 9.96, 61, 600, 7200)] == ["0.0 s", "10.0 s", "61 s", "10.0 min", "2.0 h"]
