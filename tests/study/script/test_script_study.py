"""A script's study before it runs: what the command line and YAML say, what the script declares, what it is made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from study.cli.search_options import given, objective_of, seeds_of
from study.config.errors import UserError
from study.config.load import validate_study
from trainables.config.script import ScriptConfig
from trainables.script.identity import script_print

HEAD = "import os\nfrom mebm import Monitor\n"
DECLARES = HEAD + "Monitor(sampling_steps=5, step_size=0.1, sampler='sgld', warm=None, ema=True, sizes=[1], seed=0)\n"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(DECLARES)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("k=1:20:log", "k", {"low": 1, "high": 20, "log": True}),
        ("a=0.1:10", "a", {"low": 0.1, "high": 10}),
        ("a=1e-4:1e-1:log", "a", {"low": 1e-4, "high": 0.1, "log": True}),
        ("a=-1:1:0.5", "a", {"low": -1, "high": 1, "step": 0.5}),
        ("k=1.0:8.0:int", "k", {"low": 1, "high": 8}),
        ("k=1,2,5", "k", {"choices": [1, 2, 5]}),
        ("opt.name=sgd,adam", "opt.name", {"choices": ["sgd", "adam"]}),
        ("k=[1, null, true, 'a,b']", "k", {"choices": [1, None, True, "a,b"]}),
        ("k=5", "k", 5),
        ("lr=1e-3", "lr", 1e-3),
        ("d=data:v2", "d", "data:v2"),
        ("d=true", "d", True),
    ],
)
def test_what_s_says(text: str, name: str, value: object) -> None:
    found = given(text)
    assert found == (name, value) and json.dumps(found[1]) == json.dumps(value)  # 1 and 1.0 differ


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("k", "must be NAME=low:high"),
        ("=1", "must be NAME=low:high"),
        ("k=", "must be NAME=low:high"),
        ("k=1:2:lin", "'lin' is none of log, int and a step"),
        ("k=1:2:-1", "none of log, int and a step"),
        ("k=1:2.5:int", "int needs whole ends"),
        ("k=[]", "must be a list of plain values"),
        ("k=[[1]]", "must be a list of plain values"),
        ("k=[1", "not valid YAML"),
    ],
)
def test_what_s_cannot_say(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        given(text)


def test_seeds_and_objectives() -> None:
    assert seeds_of("3") == [0, 1, 2] and seeds_of("4, 7") == [4, 7]
    assert objective_of("fid") == {"metric": "fid", "direction": None}
    assert objective_of("acc:maximize") == {"metric": "acc", "direction": "maximize"}
    for text in ("0", "a", "-1", "1,,2", "1.5"):
        with pytest.raises(UserError, match="--seeds"):
            seeds_of(text)
    with pytest.raises(UserError, match="did you mean minimize"):
        objective_of("fid:minimise")


def dry(run_mebm: Run, *words: object) -> str:
    code, out, err = run_mebm("sweep", *words, "--dry-run")
    assert (code, err) == (0, ""), err
    return out


def test_a_study_without_a_file(here: Path, run_mebm: Run) -> None:
    out = dry(run_mebm, "--script", "train.py", "-s", "sampling_steps=1:20:log", "-s", "step_size=1:10", "-s", "warm=3",
              "--trials", 40, "--seeds", 3)  # fmt: skip
    lines = dict(line.split(None, 1) for line in out.splitlines() if not line.startswith("searched"))
    assert lines["study"] == "train (train.py)" and lines["trials"] == "120 = 40 settings x 3 seeds [0, 1, 2]"
    assert lines["sampler"] == "tpe" and lines["method"] == "train.py sampler=sgld ema=True warm=3"
    assert (
        lines["different"] == "unbounded: step_size is continuous"
    )  # its default is a float, so 1:10 is not an integer
    assert lines["objectives"].startswith("the first metric with a direction")
    assert not (here / "results").exists() and not (here / "runs").exists()


def test_choices_alone_are_the_grid(here: Path, run_mebm: Run) -> None:
    words = ("--script", "train.py", "-s", "sampling_steps=1,2", "-s", "step_size=1,2,5", "--objective", "fid:maximize")
    out = dry(run_mebm, *words)
    assert "6 = 6 settings x 1 seed" in out and "sampler     grid" in out and "objectives  maximize fid" in out
    assert "step_size: 1.0, 2.0, 5.0" in out
    assert "3 = 3 settings" in dry(run_mebm, *words, "--trials", 3)
    assert "1 = 1 setting x 1 seed" in dry(run_mebm, "--script", "train.py")


def test_s_changes_a_study_of_a_file(here: Path, run_mebm: Run) -> None:
    out = dry(run_mebm, "quickstart", "-s", "sampling_steps=2,3", "--seeds", "5,6", "--trials", 3)
    assert "sampling_steps: 2, 3" in out and "seeds [5, 6]" in out
    out = dry(run_mebm, "quickstart", "-s", "sampling_steps=2", "-s", "divergence.gap_limit=3:9", "-s", "epochs=7")
    assert "sampling_steps" not in out and "divergence.gap_limit: 3 to 9" in out and "7 epochs" in out
    study = {"name": "one", "trial": {"script": "train.py", "args": {"step_size": 1}}, "seeds": [1],
             "search": {"sampler": "grid", "grid": [{"sampling_steps": [1, 2]}]}}  # fmt: skip
    (here / "sub").mkdir()
    (here / "train.py").rename(here / "sub" / "train.py")
    (here / "sub" / "study.yaml").write_text(yaml.safe_dump(study))
    out = dry(run_mebm, "sub/study.yaml", "-s", "ema=true,false")  # the script lies beside its study
    assert "4 = 4 settings" in out and "step_size=1.0" in out
    code, _, err = run_mebm("sweep", "sub/study.yaml", "-s", "step_size=1:2", "--dry-run")
    assert code == 2 and "the study is a grid, which has no ranges" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-s", "sampling_step=1,2"), "train.py declares no 'sampling_step'; did you mean sampling_steps?"),
        (("-s", "zzz=1"), "train.py declares no 'zzz'; it has sampling_steps, step_size, sampler, warm, ema, sizes, seed"),
        (("-s", "sampling_steps=0.5,1"), "0.5 is not of type int, as its default 5 is"),
        (("-s", "sampling_steps=1:2:0.5", "--trials", 2), "0.5 is not of type int"),
        (("-s", "sampling_steps=two"), "'two' is not of type int"),
        (("-s", "sampler=1:2", "--trials", 2), "search.space.sampler: has no order, give choices"),
        (("-s", "ema=1:2", "--trials", 2), "search.space.ema: has no order, give choices"),
        (("-s", "sizes=1,2"), "cannot take the place of its default, a list"),
        (("-s", "step_size=0:1:log", "--trials", 2), "a logarithmic range needs low > 0"),
        (("-s", "step_size=0.1:1"), "sampler tpe needs trials"),
        (("-s", "seed=1,2"), "seeds are not searched"),
        (("-s", "sampling_steps=1", "-s", "sampling_steps=2"), "is given twice"),
        (("--set", "resources=auto"), "resources: auto needs a built-in method"),
        (("--set", "scirpt=3"), "--set scirpt: unknown key; did you mean script?"),
        (("--set", "trial.epochs=3"), "trial.epochs: unknown key"),
        (("--objective", "f i d"), "f i d"),
        (("--python", "no-such-python"), "trial.python = 'no-such-python': no such program"),
        (("--set", "cwd=nowhere"), "trial.cwd = 'nowhere': no such folder"),
        (("--set", "divergence.rule=mebm"), "trial.divergence.rule"),
        (("--command", "python train.py"), "one of them alone"),
    ],
)  # fmt: skip
def test_a_mistake_costs_one_start_and_writes_nothing(
    words: tuple[object, ...], said: str, here: Path, run_mebm: Run
) -> None:
    code, out, err = run_mebm("sweep", "--script", "train.py", *words)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1, err
    assert [p.name for p in here.iterdir()] == ["train.py"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import os\nimport timm_", "train.py:2: ModuleNotFoundError: No module named 'timm_'; nothing was started"),
        ("x = = 1", "train.py:1: SyntaxError: invalid syntax"),
        ("def f():\n    1 / 0\nf()", "train.py:2: ZeroDivisionError: division by zero"),
        (HEAD + "raise SystemExit('no data')", "never reached Monitor(...); it said: no data"),
        (HEAD + "Monitor('5')", "train.py:3: mebm.monitor.MonitorError: Monitor takes one Options and keywords"),
        (HEAD + "os.abort()", "train.py ended (signal 6) and never reached Monitor(...)"),
        ("print('done')", "train.py ended (code 0) and never reached Monitor(...); it said: done"),
    ],
)
def test_a_script_that_fails_before_its_monitor(text: str, said: str, here: Path, run_mebm: Run) -> None:
    (here / "train.py").write_text(text)
    code, out, err = run_mebm("sweep", "--script", "train.py", "-s", "k=1,2")
    assert code == 2 and out == "" and said in err and err.count("\n") == 1, err
    assert not (here / "results").exists()


def test_a_script_that_is_not_there(here: Path, run_mebm: Run) -> None:
    for name, said in (("tran.py", "no such file (looked in"), ("folder.py", "is a folder"), ("train", "neither a Python file"),
                       ("nothing_:main", "No module named 'nothing_'"), ("empty:main", "has no attribute 'main'")):  # fmt: skip
        (here / "folder.py").mkdir(exist_ok=True)
        (here / "empty.py").touch()
        code, out, err = run_mebm("sweep", "--script", name, "-s", "k=1,2")
        assert code == 2 and out == "" and said in err and err.count("\n") == 1, err
    assert "did you mean train.py?" in run_mebm("sweep", "--script", "tran.py")[2]
    assert "Give a study, or --script or --command" in run_mebm("sweep")[2]


def test_a_function_declares_by_its_defaults(here: Path, run_mebm: Run) -> None:
    (here / "pkg").mkdir()
    (here / "pkg" / "train.py").write_text("def main(run, depth=3, alpha=0.1):\n    pass\n")
    out = dry(run_mebm, "--script", "pkg.train:main", "-s", "depth=1:4", "--trials", 2)
    assert "study       pkg.train" in out and "pkg.train:main alpha=0.1" in out and "depth: 1 to 4" in out


def test_a_command_has_places_for_its_arguments(here: Path, run_mebm: Run) -> None:
    (here / "argued.py").write_text(
        "import argparse\nfrom mebm import Monitor\np = argparse.ArgumentParser()\np.add_argument('--k', type=int, "
        "default=2)\np.add_argument('--seed', type=int)\nMonitor(**vars(p.parse_args()))\n"
    )
    out = dry(run_mebm, "--command", "python argued.py --k {k} --seed {seed}", "-s", "k=1,2")
    assert "study       argued" in out and "k: 1, 2" in out
    assert "k: 1, 2" in dry(run_mebm, "--script", "python argued.py --k {k}", "-s", "k=1,2")
    for command, said in (
        ("cd . && python argued.py --j {j}", "&& is for a shell, which needs shell: true"),
        ("python argued.py", "argued.py declares no 'j'"), ("python argued.py --k {m}", "{m} is not an argument"),
        ("python argued.py --k 'x", "No closing quotation"), ("", "command is empty"), ("no-such-program", "No such file"),
    ):  # fmt: skip
        code, _, err = run_mebm("sweep", "--command", command, "-s", "j=1,2")
        assert code == 2 and said in err and err.count("\n") == 1, err


def test_a_plan_says_what_it_does_not_know(here: Path, run_mebm: Run) -> None:
    study = {"name": "one", "trial": {"script": "train.py"}, "search": {"sampler": "grid", "grid": [{"k": [1, 2]}]}}
    (here / "study.yaml").write_text(yaml.safe_dump(study))
    code, out, err = run_mebm("plan", "study.yaml")
    assert (code, err) == (0, "") and "time        unknown until a first trial" in out and "2: 2 settings" in out
    assert json.loads(run_mebm("plan", "study.yaml", "--json")[1])["trials"] == 2
    code, out, err = run_mebm("train", "study.yaml", "--out", "one")
    assert code == 2 and "is a script's" in err and not (here / "one").exists()


def test_own_metrics_are_named_as_their_columns(here: Path) -> None:
    values = {"name": "one", "trial": {"script": str(here / "train.py")}, "pruning": {"rule": "median"},
              "objectives": [{"metric": "fid", "direction": "minimize"}, {"metric": "train_seconds"}],
              "search": {"sampler": "grid", "grid": [{"k": [1]}]}}  # fmt: skip
    study = validate_study(values, "x")
    assert [o.metric for o in study.objectives] == ["own.fid", "train_seconds"] and study.pruning_metric == "own.fid"
    assert [o.column for o in study.objectives] == ["own.fid_best", "train_seconds"]
    assert validate_study(yaml.safe_load(study.to_yaml()), "x") == study
    built_in = {**values, "trial": {}, "search": {"sampler": "grid", "grid": [{"sampling_steps": [1]}]}}
    for metric in ("own.fid", "auto", "fid"):
        with pytest.raises(UserError, match=r"expected one of|must be one of"):
            validate_study({**built_in, "objectives": [{"metric": metric}]}, "x")


def test_what_a_script_is_made_of(tmp_path: Path) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "__init__.py").write_text("from . import wide")
    (tmp_path / "nets" / "wide.py").write_text("from .layers import Conv\nimport train")
    (tmp_path / "nets" / "layers.py").write_text("import numpy")
    (tmp_path / "nets" / "unused.py").write_text("")
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / "train.py").write_text("import nets.wide, json\nfrom mebm import Monitor\n")
    config = ScriptConfig(script=str(tmp_path / "train.py"), cwd=str(tmp_path), files=("*.json",))
    names = {n.removeprefix("script/") for n in script_print(config) if n.startswith("script/")}
    assert names == {"train.py", "nets/__init__.py", "nets/wide.py", "nets/layers.py", "data.json"}
    before = script_print(config)
    (tmp_path / "nets" / "layers.py").write_text("import numpy, math")
    after = script_print(config)
    assert [n for n in before if before[n] != after[n]] == ["script/nets/layers.py"]
    command = ScriptConfig(command="python train.py --config data.json", cwd=str(tmp_path))
    assert {"script/train.py", "script/data.json", "script/nets/layers.py"} < set(script_print(command))
