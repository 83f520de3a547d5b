"""What a study is after."""

from analysis.stats.trials.objective import objective


def test_objective_is_the_manifests_if_measured(make_results, row):
    results = make_results([row("t1", fd_fresh_best=1.0, accuracy_best=0.5)])
    metric = objective(results, "demo")
    assert metric is not None
    assert metric.name == "fd_fresh"
    assert objective(make_results([row("t1")]), "demo") is None
