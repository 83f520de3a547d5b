"""What the command line tells of itself: packaged studies, fields, a first study of one's own, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from study.config.describe import study_fields, trial_fields
from study.config.fields import known_fields
from study.config.load import load_study
from study.config.packaged import packaged_configs
from study.estimate.plan import make_plan
from trainables.config.trial import ARGUMENTS


def test_every_packaged_study_is_listed_with_what_it_needs_and_costs(mebm):
    code, out, err = mebm("configs")
    assert (code, err) == (0, "")
    begun = [line.split()[0] for line in out.splitlines() if not line.startswith(" ")]
    assert sorted(begun) == packaged_configs() and begun[0] == "quickstart"
    found = {row["name"]: row for row in json.loads(mebm("configs", "--json", "--gpu", "H200")[1])}
    assert found["quickstart"]["needs"] == "a CPU, nothing else" and found["quickstart"]["cost"].endswith("FLOP")
    assert found["table1"]["needs"] == "a GPU, images of cifar10"
    assert found["table1"]["cost"].endswith("GPU-hours on H200")
    assert found["table1"]["asks"] in " ".join(out.split())
    assert found["cifar10_night"]["gpu_hours"] <= 10


def test_a_study_is_shown_as_it_is_written(mebm, tmp_path):
    text = Path("configs/quickstart.yaml")
    root = Path(__file__).resolve().parents[3]
    assert mebm("show", "quickstart") == (0, (root / text).read_text(encoding="utf-8"), "")
    own = tmp_path / "my.yaml"
    own.write_text(mebm("show", "table1")[1], encoding="utf-8")
    assert mebm("show", own)[1] == own.read_text(encoding="utf-8")
    assert load_study(str(own)) == load_study("table1")
    code, out, err = mebm("show", "quickstrat")
    assert (code, out) == (2, "") and err.endswith("did you mean quickstart?\n")


def test_every_field_is_told_of():
    trial = {f.name for f in trial_fields()}
    # Arguments of parts that other tests of this process named are known too.
    assert trial == {f for f in (*known_fields(), *ARGUMENTS) if f.partition(".")[0] not in ARGUMENTS or f in ARGUMENTS}
    assert not [f.name for f in trial_fields() + study_fields() if not f.meaning]
    names = {f.name for f in study_fields()}
    assert {"seeds", "search.trials", "resources.memory_gb", "pruning.rule", "run.hang_minutes"} <= names
    of = {f.name: f for f in trial_fields()}
    assert (of["sampling_steps"].values, of["sampling_steps"].symbol) == ("integer, 1 to 100,000", "K")
    assert of["gradient_clamp"].values == "number, above 0 or null"
    assert of["betas"].default_text == "[0.9, 0.999]" and of["betas"].values.startswith("list of 2: number")
    assert of["method_args.noise_dim"].methods == ("vera", "gebm")
    assert of["method_args.importance_samples"].methods == ("vera",)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("K", ["sampling_steps  (K)", "integer, 1 to 100,000", "jem: 20", "shortrun: 100"]),
        ("lambda", ["l2_weight  (λ)", "0 (celeba_hq_128, digits), else 0.5"]),
        ("trial.step_size", ["step_size  (α)", "number, above 0"]),
        ("hang_minutes", ["run.hang_minutes", "number, above 0 or null"]),
        ("sam_rho", ["sam_rho", "number, at least 0", "sada-jem: 2"]),
        ("noise_dim", ["method_args.noise_dim", "of vera, gebm alone", "32 (digits), else 128"]),
    ],
)
def test_a_field_is_found_by_its_name_or_symbol(mebm, name, said):
    code, out, err = mebm("fields", name)
    assert (code, err) == (0, "")
    assert [text for text in said if text not in out] == []


def test_fields_are_listed_on_lines_that_fit(mebm):
    code, out, _ = mebm("fields")
    lines = out.splitlines()
    assert code == 0 and len(lines) == len(trial_fields()) + len(study_fields())
    assert max(map(len, lines)) <= 110
    assert [line.split()[0] for line in mebm("fields", "budget")[1].splitlines()] == [
        "budget.hours", "budget.gpu_hours", "budget.trials", "budget.deadline"
    ]  # fmt: skip
    found = json.loads(mebm("fields", "rho", "--json")[1])
    assert found[0]["name"] == "reinit_probability" and found[0]["defaults"]["m-ebm"]["cifar10"] == 0.05
    code, out, err = mebm("fields", "sampling_step")
    assert (code, out) == (2, "") and "did you mean sampling_steps?" in err


@pytest.mark.parametrize("method", ["m-ebm", "softmax", "vera", "shortrun", "diffurecov", "cf-ebm", "gebm", "clel"])
def test_a_first_study_on_digits_is_valid(mebm, tmp_path, method):
    file = tmp_path / "first.yaml"
    code, out, err = mebm("init", file, "--method", method)
    assert (code, err) == (0, "") and str(file) in out
    study = load_study(str(file))
    assert study.name == "first" and study.trial["method"] == method and study.planned_trials == 20
    before = file.read_bytes()
    code, _, err = mebm("init", file)
    assert (code, file.read_bytes()) == (2, before) and err == f"mebm: {file}: exists\n"


@pytest.mark.parametrize(("hours", "method"), [(1, "m-ebm"), (8, "m-jem"), (40, "jem"), (4, "vera")])
def test_a_first_study_for_a_gpu_fits_its_budget(mebm, tmp_path, hours, method):
    file = tmp_path / "night.yaml"
    options = ("--dataset", "cifar10", "--gpu", "H100", "--gpu-hours", str(hours), "--method", method)
    assert mebm("init", file, *options)[0] == 0
    study = load_study(str(file))
    found = make_plan(study, "H100").gpu_hours
    assert found is not None and 0 < found <= hours == study.budget.gpu_hours
    assert study.resources.gpus == 1 and study.planned_trials >= 12


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dataset", "cifar10", "--gpu", "none"], "cifar10 takes a GPU"),
        (["--method", "m-emb"], "method"),
        (["--dataset", "imagenet32", "--method", "kl-ebm", "--gpu", "T4", "--gpu-hours", "0.001"], "pay for no study"),
        (["--dataset", "cifar10", "--gpu", "abacus"], "the rate of abacus is not known"),
        (["--gpu-hours", "0"], "--gpu-hours"),
    ],
)
def test_what_no_first_study_is_made_of_is_one_line(mebm, tmp_path, options, said):
    code, out, err = mebm("init", tmp_path / "x.yaml", *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mebm sw", "sweep"),
        ("mebm sweep cifar10_n", "cifar10_night"),
        ("mebm plan quickstart --set resources.m", "resources.memory_gb="),
        ("mebm train m-j", "m-jem"),
        ("mebm fields reinit", "reinit_probability"),
        ("mebm init x.yaml --dataset cifar100", "cifar100"),
        ("mebm status results/fi", "results/first"),
    ],
)
def test_a_shell_completes(tmp_path, line, expected):
    (tmp_path / "results" / "first").mkdir(parents=True)
    (tmp_path / "results" / "first" / "study.yaml").touch()
    words = line.split()
    ended = subprocess.run(
        [sys.executable, "-m", "study.cli"], cwd=tmp_path, capture_output=True, text=True, timeout=100,
        env=os.environ | {"_MEBM_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert expected in [item.partition(",")[2] for item in ended.stdout.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "m-emb"], "did you mean m-ebm?"),
        (["train", "m-jme"], "did you mean m-jem?"),
        (
            ["sweep", "quickstart", "-n", "--set", "evaluation.protocols=small-buffer"],
            "trial.evaluation.protocols = 'small-buffer': must be a list, such as [small-buffer]",
        ),
        (["sweep", "quickstart", "-n", "--set", "seeds=3"], "seeds = 3: must be a list, such as [0, 1, 2]"),
    ],
)
def test_an_error_says_what_is_really_wrong(mebm, arguments, said):
    code, out, err = mebm(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err


def test_the_papers_symbols_are_names_wherever_a_field_is(mebm, tmp_path):
    code, out, err = mebm("sweep", "quickstart", "-n", "--set", "search.space.K.high=20", "--set", "lambda=0.1")
    assert (code, err) == (0, "") and "sampling_steps: 1 to 20 (log)" in out
    study = load_study("quickstart", ("search.space.alpha.low=0.5", "trial.sigma=0.01"))
    assert study.search.space["step_size"].low == 0.5 and study.trial["noise_std"] == 0.01
    file = tmp_path / "letters.yaml"
    file.write_text(
        """
name: letters
trial: {dataset: digits, B: 500, lambda: 0, sigma: 0.01}
search: {sampler: random, trials: 2, space: {K: {low: 1, high: 5}, p0: {choices: [gaussian, uniform]}}, start: [{K: 2, p0: uniform}]}
"""
    )
    study = load_study(str(file))
    assert study.trial == {"dataset": "digits", "buffer_size": 500, "l2_weight": 0, "noise_std": 0.01}
    assert list(study.search.space) == ["sampling_steps", "initial"]
    assert study.space.start == ({"sampling_steps": 2, "initial": "uniform"},)
    file.write_text(file.read_text().replace("sigma: 0.01", "sigma: 0.01, noise_std: 0.1"))
    code, _, err = mebm("sweep", file, "-n")
    assert code == 2 and "trial.sigma: stands there as noise_std too; remove one" in err
