"""What to run: the choice by its stated rule, honest numbers, times of the wanted device."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from analysis.results.load import load
from analysis.results.messages import ResultsError
from analysis.stats.comparison.recommend import recommend
from analysis.stats.comparison.summary import summarise
from analysis.stats.survival.rates import wilson

_SPEC = importlib.util.spec_from_file_location("best_setting", Path(__file__).parents[4] / "benchmarks/best_setting.py")
assert _SPEC is not None
assert _SPEC.loader is not None
simulation = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(simulation)


@pytest.fixture
def trials(row):
    def make(setting, values, **fields):
        """A trial per value; None stands for one that diverged."""
        return [
            row(
                f"{setting}{i}",
                "diverged" if v is None else "completed",
                setting_id=setting,
                seed=i,
                step_size=float(ord(setting[0])),
                fd_buffer_best=9.0 if v is None else v,
                fd_buffer_protocol="p",
                evaluation_seconds=0.0,
                **fields,
            )
            for i, v in enumerate(values)
        ]

    return make


def test_the_best_of_those_that_survive_with_its_evidence(make_results, trials):
    results = make_results(
        [*trials("a", [2.0, 2.2, 2.1]), *trials("b", [1.0, None, 1.0]), *trials("c", [3.0, 3.1, 3.2])]
    )
    found = recommend(results)
    assert found.best is not None
    assert found.best.setting_id == "a"
    assert found.best.quality == pytest.approx(2.1)
    # t of 2 degrees of freedom: 4.303 * 0.1 / sqrt(3)
    assert found.best.low == pytest.approx(2.1 - 4.30265 * 0.1 / 3**0.5, abs=1e-5)
    assert found.best.trial_ids == ("demo/a0", "demo/a1", "demo/a2")
    assert (found.best.survival.k, found.best.survival.n) == (3, 3)
    why = {c.setting_id: c.why_not for c in found.runners_up}
    assert why["b"] == "1 of 3 trials diverged or collapsed"
    # Seeds of a and c vary by 4% with 4 degrees of freedom: 0.05 of 2.1 and 0.07 of 3.1 over 3 seeds.
    assert why["c"] == "worse by 1, standard error 0.088"
    assert not found.runners_up[1].tied
    assert found.nearest is not None
    assert found.nearest.setting_id == "c"
    text = "\n".join(found.lines())
    assert "3 of 3; up to 56% may fail (95%, Wilson)" in text
    assert "3 seeds, 0 diverged or collapsed: up to 56% may still fail" in text
    assert "demo/a0, demo/a1, demo/a2" in text


def test_survival_asked_for_changes_the_choice(make_results, trials):
    results = make_results([*trials("a", [2.0] * 3), *trials("b", [1.0, None, 1.0])])
    # b's mean counts what the diverged trial had before: (1 + 9 + 1) / 3.
    assert recommend(results, survival=0.5).best.setting_id == "a"
    better = make_results([*trials("a", [5.0] * 3), *trials("b", [1.0, None, 1.0])])
    assert recommend(better, survival=0.5).best.setting_id == "b"
    assert recommend(better).best.setting_id == "a"
    assert recommend(better).runners_up[0].setting_id == "b"


def test_where_none_survives_often_enough_the_likeliest_and_said_so(make_results, trials):
    found = recommend(make_results([*trials("a", [1.0, None, None]), *trials("b", [3.0, 3.0, None])]))
    assert found.best.setting_id == "b"
    assert "no setting is expected to survive in 90% of trainings" in found.warnings[0]
    assert found.lines()[3].endswith("2 of 3 (1 diverged or collapsed); 6% to 79% may fail (95%, Wilson)")


def test_nothing_to_recommend_is_said_with_why(make_results, trials):
    found = recommend(make_results(trials("a", [None, None])))
    assert found.best is None
    assert found.lines()[0].endswith("nothing to recommend")
    assert "no setting has a completed trial" in found.lines()[1]
    with pytest.raises(ResultsError, match="no trial to recommend from"):
        recommend(make_results([]))


def test_one_seed_has_the_spread_of_the_others_or_none(make_results, trials):
    alone = recommend(make_results([*trials("a", [1.0]), *trials("b", [1.5])]))
    assert (alone.best.low, alone.best.interval_from) == (None, "none")
    assert "1 trial: no interval" in alone.lines()[1]
    assert alone.runners_up[0].why_not == "tied: worse by 0.5: neither seeds nor a sampling error say how surely"
    assert any("the sampling error of its score was not recorded" in w for w in alone.warnings)
    assert any("quality is of one training" in w for w in alone.warnings)
    pooled = recommend(make_results([*trials("a", [1.0]), *trials("b", [1.5, 1.7])]))
    assert pooled.best.interval_from == "pooled"
    # sd of (1.5, 1.7) is 0.1414, t of one degree of freedom 12.706
    assert pooled.best.high == pytest.approx(1 + 12.7062 * 0.141421, abs=1e-4)


def test_larger_is_better_for_an_accuracy(make_results, trials, row):
    rows = [row(f"t{i}", setting_id=str(i), step_size=float(i + 1), accuracy_best=0.5 + i / 10) for i in range(3)]
    found = recommend(make_results(rows), metric="accuracy")
    assert (found.best.setting_id, found.best.quality) == ("2", pytest.approx(0.7))


def course(trial_id, values):
    return [
        {
            "trial_id": trial_id,
            "epoch": i,
            "attempt": 1,
            "iteration": 100 * i,
            "seconds": float(i),
            "train_seconds": 1.0,
        }
        | {"fd_buffer": v, "fd_buffer_protocol": "p"}
        for i, v in enumerate(values)
    ]


def test_within_the_hours_only_what_fits_counts(make_results, trials):
    # 600 iterations each; b is better at the end and takes ten times as long per iteration.
    rows = [*trials("a", [2.0], seconds_per_iteration=0.01), *trials("b", [1.0], seconds_per_iteration=0.1)]
    epochs = course("a0", [9.0, 3.0, 2.5, 2.2, 2.1, 2.05, 2.0]) + course("b0", [9.0, 5.0, 4.0, 3.0, 2.0, 1.5, 1.0])
    results = make_results(rows, epochs)
    assert recommend(results).best.setting_id == "b"
    found = recommend(results, hours=21 / 3600)
    assert found.best.setting_id == "a"
    assert found.best.share == 1.0
    (other,) = found.runners_up
    # 21 s are 210 of b's iterations: the value of its second epoch.
    assert (other.quality, other.share) == (4.0, pytest.approx(0.35))
    said = "tied: worse by 2: neither seeds nor a sampling error say how surely; only 35% of its training fits"
    assert other.why_not == said
    assert found.best.hours == pytest.approx(6 / 3600)


def test_time_is_measured_there_before_anything_else(make_results, trials):
    results = make_results(trials("a", [1.0], hardware="NVIDIA H100"))
    found = recommend(results, "h100")
    assert found.best.pace.source == "measured"
    assert "measured on NVIDIA H100" in found.lines()[2]


def test_a_time_of_another_device_and_a_shared_one_are_warned_of(make_results, trials):
    found = recommend(make_results(trials("a", [1.0], gpus=0.25)), "H100")
    assert any("nothing was timed on H100" in w and "Test CPU" in w for w in found.warnings)
    assert any("shared a GPU" in w for w in found.warnings)


def test_one_data_set_one_protocol(make_results, trials):
    rows = [*trials("a", [1.0, 1.0]), *trials("b", [0.1], dataset="cifar10")]
    with pytest.raises(ResultsError, match=r"2 data sets \(cifar10, digits\); name one with --dataset"):
        recommend(make_results(rows))
    assert recommend(make_results(rows), dataset="digits").best.setting_id == "a"
    with pytest.raises(ResultsError, match="no trial on data set 'x'"):
        recommend(make_results(rows), dataset="x")
    with pytest.raises(ResultsError, match="no trial has a 'fid_buffer'; expected one of fd_buffer"):
        recommend(make_results(rows), dataset="digits", metric="fid_buffer")
    mixed = [*trials("a", [1.0, 1.0]), *(t | {"fd_buffer_protocol": "q"} for t in trials("b", [0.1]))]
    found = recommend(make_results(mixed))
    assert found.best.setting_id == "a"
    assert any("1 trial was scored under another protocol than p and left out" in w for w in found.warnings)


def test_as_plain_values(make_results, trials):
    shown = recommend(make_results([*trials("a", [1.0, 2.0]), *trials("b", [3.0])]), "H100", 2.0).to_dict()
    assert (shown["gpu"], shown["hours"], shown["metric"], shown["direction"]) == ("H100", 2.0, "fd_buffer", "minimize")
    best = shown["recommended"]
    assert best["survival"] == {"k": 2, "n": 2, "rate": 1.0, "low": wilson(2, 2).low, "high": 1.0}
    assert best["fields"]["step_size"] == float(ord("a"))
    assert best["why_not"] is None
    assert shown["runners_up"][0]["why_not"]


def test_one_lucky_seed_does_not_beat_twenty(make_results, trials):
    """A raw rate and mean say 1 of 1 at 0.199 before 20 of 20 at 0.201."""
    rng = np.random.default_rng(0)
    twenty = (0.201 * np.exp(rng.normal(0, 0.05, 20))).tolist()
    bad = trials("c", [None, None, 0.3, None])
    found = recommend(make_results([*trials("a", [0.199]), *trials("b", twenty), *bad]))
    assert found.best.setting_id == "b"
    assert found.best.survives > 0.95
    lone = next(c for c in found.runners_up if c.setting_id == "a")
    # Pooled: 3.5 of 26; of a then (2 * 0.135) / 3 fail.
    assert lone.survives == pytest.approx(1 - 2 * (3.5 / 26) / 3)
    assert lone.tied
    # No more apart than chance has it, so what is expected of a new training is the same, and survival decides.
    assert lone.expected == found.best.expected


def test_a_seed_run_twice_counts_once(make_results, trials):
    again = [t | {"trial_id": f"{t['trial_id']}-again"} for t in trials("a", [1.0, 1.2])]
    found = recommend(make_results([*trials("a", [1.0, 1.2]), *again]))
    assert (found.best.n, found.best.survival.n) == (2, 2)


def test_scores_whose_errors_overlap_are_tied(make_results, trials):
    """The three best of a quickstart: 0.175, 0.183 and 0.184, each with a standard error of 0.02 to 0.04."""

    def scored(setting, value, error):
        return [t | {"fd_buffer_best_se": error} for t in trials(setting, [value])]

    rows = [*scored("a", 0.175, 0.02), *scored("b", 0.183, 0.03), *scored("c", 0.184, 0.04), *scored("d", 0.9, 0.04)]
    found = recommend(make_results(rows))
    assert found.best.setting_id == "a"
    assert found.tied == 2
    assert found.best.interval_from == "samples"
    assert (found.best.low, found.best.high) == (pytest.approx(0.135), pytest.approx(0.215))
    # 0.008 apart, with a standard error of hypot(0.02, 0.03).
    assert found.lead() == (
        "tied with α 98, worse by 0.008, standard error 0.036; 1 other cannot be told from it either"
    )
    assert {c.setting_id: c.tied for c in found.runners_up} == {"b": True, "c": True, "d": False}
    # What is the best of several is expected to be worse the next time.
    assert found.best.expected > found.best.quality
    assert "; expect 0.176 of a new training" in found.lines()[1]
    assert not any("sampling error of its score was not recorded" in w for w in found.warnings)


def test_pruned_trials_are_censored_and_informative(make_results, trials, row):
    pruned = [
        row(f"p{i}", "pruned", setting_id="a", seed=100 + i, step_size=97.0, iterations_done=300) for i in range(20)
    ]
    diverged = [row(f"d{i}", "diverged", setting_id="a", seed=200 + i, step_size=97.0, iteration=20) for i in range(4)]
    found = recommend(make_results([*pruned, *diverged, *trials("a", [1.0, 1.0, 1.0])]), survival=0.8)
    best = found.best
    # 1 - KM of 4 events among 27: 15% [6, 35], not 4 of the 7 that were judged.
    assert (round(1 - best.survival.rate, 3), round(1 - best.survival.high, 2), round(1 - best.survival.low, 2)) == (
        0.148, 0.06, 0.35,
    )  # fmt: skip
    # As 27 trials: (2 * 4.5 / 28 + 4) / 29 fail.
    assert best.survives == pytest.approx(1 - (2 * 4.5 / 28 + 4) / 29)
    assert any("20 pruned" in w for w in found.warnings)
    assert "20 cut off before the end, Kaplan-Meier" in "\n".join(found.lines())


def test_a_setting_that_mostly_diverges_is_not_recommended(make_results, trials):
    found = recommend(make_results(trials("a", [0.1, *[None] * 9])))
    assert found.best is None
    assert "no setting is expected to survive more often than not" in found.warnings[-1]


def test_fresh_chains_that_prefer_another_setting_are_named(make_results, trials):
    a = [t | {"fd_fresh_best": 3.0, "fd_fresh_protocol": "f"} for t in trials("a", [0.2, 0.21])]
    b = [t | {"fd_fresh_best": 1.0, "fd_fresh_protocol": "f"} for t in trials("b", [0.3, 0.31])]
    found = recommend(make_results([*a, *b]))
    assert found.disagrees
    assert found.fresh_text() == (
        "α 98 is first by fresh chains from p0: FD (fresh) 1; this one, 3, worse by 2, standard error 0"
    )
    assert f"fresh       {found.fresh_text()}" in found.lines()
    assert found.to_dict()["fresh"]["recommended"]["setting_id"] == "b"


def test_simulated_picks():
    """A part of `benchmarks/best_setting.py`, which has the numbers over 300 studies of each kind."""
    raw, ours = simulation.measure(0, 40)
    assert raw["bad"] >= 0.1
    assert ours["bad"] <= 0.15
    assert ours["bad"] < raw["bad"]
    assert abs(ours["bias"]) <= 0.05


def test_of_several_objectives_the_front_is_shown(study, trials):
    import json

    from analysis.results.load import load
    from analysis.results.manifest import with_checksum
    from analysis.stats.comparison.summary import summarise

    rows = [
        *trials("a", [1.0, 1.2], seconds_per_iteration=0.3), *trials("b", [2.0, 2.0], seconds_per_iteration=0.1),
        *trials("c", [3.0, 3.0], seconds_per_iteration=0.2), *trials("d", [None, 4.0], seconds_per_iteration=0.01),
    ]  # fmt: skip
    folder = study(rows)
    assert recommend(load(folder)).front is None
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["objectives"].append({"metric": "seconds_per_iteration", "direction": "minimize"})
    (folder / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    results = load(folder)
    found = recommend(results)
    assert found.front is not None
    assert [row["setting_id"] for _, row in found.front.settings] == ["a", "b", "d"]
    lines = found.front.lines()
    assert lines[0] == (
        "3 of 4 settings are beaten by none in FD (buffer) (lower is better) and time per iteration (lower is better)"
    )
    assert lines[1].endswith(": FD (buffer) 1.1, time per iteration 0.3 s (2 trials)")
    assert lines[3].endswith(", 1 ended badly)")
    assert [label for label, _ in found.items()].count("front") == 1
    assert found.to_dict()["front"]["objectives"][1] == {"name": "seconds_per_iteration", "direction": "minimize"}
    assert lines[0] in summarise(results).lines()


def test_settings_are_told_apart_by_whatever_field_they_differ_in(make_results, row, study):
    def trial(name, setting, quality, **config):
        fields = {"sampling_steps": 1} | config.pop("columns", {})
        told = json.dumps({"method": "m-ebm", "method_args": {"temperature": 1.0}} | fields | config)
        return row(name, setting_id=setting, seed=0, fd_buffer_best=quality, config=told, **fields)

    rows = [
        trial("t1", "a", 1.0, sam_rho=0.5),
        trial("t2", "b", 2.0),
        trial("t3", "c", 3.0, method_args={"temperature": 0.5}),
        trial("t4", "d", 4.0, columns={"sampling_steps": 5}),
    ]
    listed = recommend(make_results(rows, varied=["sampling_steps", "sam_rho", "method_args.temperature"]))
    words = {c.setting_id: c.name for c in listed.every}
    assert words == {
        "a": "K 1, sam rho 0.5, temperature 1",
        "b": "K 1, sam rho 0, temperature 1",
        "c": "K 1, sam rho 0, temperature 0.5",
        "d": "K 5, sam rho 0, temperature 1",
    }
    assert {c.setting_id: c.to_dict()["fields"]["sam_rho"] for c in listed.every} == {"a": 0.5, "b": 0, "c": 0, "d": 0}
    # Where a manifest does not say what was searched, the configurations do, as far as names would be shared.
    unlisted = recommend(make_results(rows, varied=[]))
    assert {c.setting_id: c.name for c in unlisted.every} == {
        "a": "K 1, temperature 1, sam rho 0.5",
        "b": "K 1, temperature 1, sam rho 0",
        "c": "K 1, temperature 0.5, sam rho 0",
        "d": "K 5",
    }
    assert unlisted.best.to_dict()["fields"]["sam_rho"] == 0.5
    assert {c.to_dict()["fields"]["method_args.temperature"] for c in unlisted.every} == {0.5, 1.0}


def test_one_trial_that_ended_badly_is_not_all_of_them(make_results, trials):
    found = recommend(make_results([*trials("a", [2.0] * 3), *trials("b", [None]), *trials("c", [None, None])]))
    why = {c.setting_id: c.why_not for c in found.runners_up}
    assert why == {
        "b": "its one trial diverged or collapsed", "c": "all 2 of its trials diverged or collapsed",
    }  # fmt: skip


def test_the_published_study_of_sharpness_names_its_radius():
    found = recommend(load(Path(__file__).parents[4] / "results/published/digits_sam"))
    assert found.best.name == "K 1, sam rho 0.5"
    assert len({c.name for c in found.every}) == 12
    assert (
        summarise(load(Path(__file__).parents[4] / "results/published/digits_sam")).studies[0].best.setting
        == found.best.name
    )
