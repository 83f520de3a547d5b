"""Pruning over seeds: who gets further ones, how often it is wrong, and what it does to divergence rates."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon

from study.config.errors import UserError
from study.search.seeds import SeedResults, _upper_tail, given_up, threshold
from study.search.tell import set_right


def load_file(path):
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SEARCHER = load_file(Path(__file__).with_name("test_searcher.py"))
Driver, make_study = SEARCHER.Driver, SEARCHER.make_study
GRID = {"sampler": "grid", "grid": [{"sampling_steps": [1, 2, 3], "step_size": 1.0}]}


def pruned_study(seeds=8, **changes):
    return make_study(**{"search": GRID, "seeds": list(range(seeds)), "pruning": {"seeds": "wilcoxon"}, **changes})


def run_grid(driver, quality, bad=lambda config: False):
    """Run all; returns the seeds that each K got, in their order."""
    seeds = {}
    while isinstance(config := driver.propose(), dict):
        trial = config["values"]
        seeds.setdefault(trial.sampling_steps, []).append(trial.seed)
        if bad(trial):
            driver.end(config, outcome="diverged", cause="energy_gap", iteration=4, fd_buffer_best=0.001)
        else:
            driver.end(config, fd_buffer_best=quality(trial))
    return seeds


def noise(trial):
    return float(np.random.default_rng([trial.seed, trial.sampling_steps]).normal(0, 0.1))


def test_a_clearly_worse_setting_gets_fewer_seeds_and_the_best_gets_all(tmp_path):
    driver = Driver(pruned_study(), tmp_path / "s")
    seeds = run_grid(driver, lambda t: {1: 9.0, 2: 1.0, 3: 5.0}[t.sampling_steps] + noise(t))
    assert seeds[2] == list(range(8))
    assert 5 <= len(seeds[3]) < 8
    # The first setting had nothing to be compared with but what followed: it may have had all of its seeds by then.
    assert seeds[1] == list(range(len(seeds[1])))
    assert driver.search.remaining() == 0
    assert driver.search.suggest("last") == "FINISHED"


def test_settings_that_cannot_be_told_apart_get_all_seeds(tmp_path):
    seeds = run_grid(
        Driver(pruned_study(), tmp_path / "s"), lambda t: 1.0 + (t.seed % 2) * 0.1 * (t.sampling_steps - 2)
    )
    assert {k: len(s) for k, s in seeds.items()} == {1: 8, 2: 8, 3: 8}


def test_a_seed_that_diverged_is_no_evidence_against_a_setting(tmp_path):
    """K=3 diverges with every seed but two, and has the best scores then: two pairs decide nothing, it gets all seeds."""
    seeds = run_grid(
        Driver(pruned_study(), tmp_path / "s"),
        lambda t: 1.0 + 0.1 * t.seed,
        bad=lambda t: t.sampling_steps == 3 and t.seed not in (0, 4),
    )
    assert len(seeds[3]) == 8


@pytest.mark.parametrize("killed_after", [4, 9, 14, 17])
def test_a_resumed_study_gives_up_the_same_seeds(tmp_path, killed_after):
    def quality(trial):
        return {1: 1.0, 2: 9.0, 3: 1.05}[trial.sampling_steps] + noise(trial)

    study = pruned_study()
    calm = run_grid(Driver(study, tmp_path / "calm"), quality)
    cut = Driver(study, tmp_path / "cut")
    begun = {}
    for _ in range(killed_after):
        config = cut.propose()
        begun.setdefault(config["values"].sampling_steps, []).append(config["values"].seed)
        cut.end(config, fd_buffer_best=quality(config["values"]))
    cut.kill()
    resumed = Driver(study, tmp_path / "cut")
    rest = run_grid(resumed, quality)
    assert {k: begun.get(k, []) + rest.get(k, []) for k in calm} == calm
    assert len(calm[2]) < 8
    assert set_right(study, resumed.folder, resumed.ledger) is None


@pytest.mark.parametrize("killed_after", [16, 17, 18, 19])
def test_a_resumed_study_may_run_the_seeds_that_a_later_verdict_wants(tmp_path, killed_after):
    """Seeds of K=2 and K=3 are held back until K=1, the best so far, diverges with its last seed."""

    def end(driver, config):
        trial = config["values"]
        if (trial.sampling_steps, trial.seed) in ((1, 7), (2, 0), (2, 1)):
            driver.end(config, outcome="diverged", cause="energy_gap", iteration=4, fd_buffer_best=0.001)
        else:
            driver.end(config, fd_buffer_best=trial.sampling_steps + noise(trial))

    def run(driver, most=100):
        number = 0
        while number < most and isinstance(config := driver.propose(), dict):
            end(driver, config)
            number += 1
        return number

    study = pruned_study()
    assert run(Driver(study, tmp_path / "calm")) == 24
    cut = Driver(study, tmp_path / "cut")
    run(cut, killed_after)
    cut.kill()
    resumed = Driver(study, tmp_path / "cut")
    wanted = 24 - killed_after
    assert resumed.search.remaining() < wanted <= resumed.search.at_most()
    assert run(resumed) == wanted
    assert resumed.search.at_most() == resumed.search.remaining() == 0


def test_what_is_held_back_waits_for_the_trials_at_work(tmp_path):
    """The verdict can change while trials run, so the search is not over until they are."""
    driver = Driver(pruned_study(), tmp_path / "s")
    at_work = None
    while isinstance(config := driver.propose(), dict):
        if config["values"].sampling_steps == 1 and config["values"].seed == 7:
            at_work = config
            continue
        driver.end(
            config, fd_buffer_best={1: 1.0, 2: 1.0, 3: 9.0}[config["values"].sampling_steps] + noise(config["values"])
        )
    assert config is None
    driver.end(at_work, fd_buffer_best=1.0)
    assert driver.propose() == "FINISHED"


def test_too_few_seeds_are_refused():
    with pytest.raises(
        UserError, match=r"wilcoxon cannot tell settings apart by 4 seeds at seeds_alpha 0\.1; give more"
    ):
        pruned_study(seeds=4)
    assert pruned_study(seeds=5).pruning.seeds == "wilcoxon"
    assert threshold(4, 0.1) is None
    assert threshold(5, 0.1) is not None


@pytest.mark.parametrize(("seeds", "alpha"), [(3, 0.25), (4, 0.125), (5, 0.0625), (6, 0.03125), (8, 2.0**-7)])
def test_the_fewest_seeds_that_a_config_may_have_can_tell(seeds, alpha):
    """One that is worse with every seed is given up at the first look that can tell, whatever was simulated."""
    assert pruned_study(seeds, pruning={"seeds": "wilcoxon", "seeds_alpha": alpha}).pruning.seeds_alpha == alpha
    assert threshold(seeds, alpha) is not None
    looks = range(seeds - 1)
    assert 1 in given_up(
        {0: SeedResults(dict.fromkeys(looks, 0.0)), 1: SeedResults({s: 1.0 + s for s in looks})}, seeds, alpha
    )
    assert threshold(seeds, alpha * 0.99) is None
    with pytest.raises(UserError, match="wilcoxon cannot tell settings apart"):
        pruned_study(seeds, pruning={"seeds": "wilcoxon", "seeds_alpha": alpha * 0.99})


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_the_tail_is_the_signed_rank_test_of_scipy(n):
    differences = np.arange(1, n + 1) * np.where(np.arange(n) % 3, 1.0, -1.0)
    total = int(differences[differences > 0].sum())
    assert _upper_tail(n)[total] == pytest.approx(wilcoxon(differences, alternative="greater", method="exact").pvalue)


@pytest.mark.parametrize(("seeds", "alpha"), [(5, 0.1), (10, 0.1), (20, 0.05)])
def test_all_looks_together_are_wrong_as_rarely_as_was_asked(seeds, alpha):
    """With a setting that is no worse, whatever the scores' distribution: here with heavy tails."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(600):
        differences = rng.standard_t(2, seeds)
        settings = [
            {0: SeedResults(dict.fromkeys(range(n), 0.0)), 1: SeedResults({s: differences[s] for s in range(n)})}
            for n in range(1, seeds)
        ]
        wrong += any(
            wilcoxon(list(s[1].scores.values()), alternative="greater").pvalue <= threshold(seeds, alpha)
            for s in settings
        )
    assert wrong / 600 <= alpha + 3 * (alpha * (1 - alpha) / 600) ** 0.5


def test_the_best_setting_is_the_stablest_then_the_best_scored():
    scores = {s: 1.0 + 0.01 * s for s in range(8)}
    worse = {s: 2.0 + 0.02 * s for s in range(8)}
    assert list(given_up({0: SeedResults(scores), 1: SeedResults(worse)}, 10, 0.1)) == [1]
    # The better scores are of a setting that diverges more: neither is given up for the other.
    assert given_up({0: SeedResults(scores, bad=3), 1: SeedResults(worse)}, 10, 0.1) == {}
    assert list(given_up({0: SeedResults(scores, bad=3), 1: SeedResults(worse, bad=5)}, 10, 0.1)) == [1]


def test_divergence_rates_over_unequal_seeds_are_hardly_biased():
    """`benchmarks/seed_pruning.py` in small: pooled over settings by their seeds the rate is right (Wald's identity)."""
    module = load_file(Path(__file__).parents[3] / "benchmarks" / "seed_pruning.py")
    found = module.measure(studies=40, seeds=10, divergence=0.2)
    assert found["trials_share"] < 0.95
    assert abs(found["pooled_rate"] - 0.2) < 0.03
    assert abs(found["mean_rate"] - 0.2) < 0.03
    assert found["best_has_all_seeds"] > 0.8
