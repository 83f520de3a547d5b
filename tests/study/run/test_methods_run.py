"""Every method as a trial from the command line, and its folder in tables and a report."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from analysis.results.load import load
from trainables.config.method import METHODS, method_class

# Two epochs of three iterations on small batches; evaluation on chains of two steps.
SMALL = ("epochs=2", "iterations_per_epoch=3", "buffer_size=100", "evaluation.fresh_steps=2", "device=cpu")
CHAINS = {name for name in METHODS if "langevin" in method_class(name).uses}
STEPS = dict.fromkeys(CHAINS, ("sampling_steps=2",))


@pytest.fixture(scope="module")
def folders(run_mebm, tmp_path_factory):
    """A folder per method, each written by `mebm train`."""
    root = tmp_path_factory.mktemp("methods")
    made = {}
    for name in METHODS:
        wanted = (*SMALL, *STEPS.get(name, ()), "batch_size=20", "label_batch_size=20")
        if name == "kl-ebm":  # its entropy term needs a larger buffer
            wanted = (*wanted, "buffer_size=1001")
        assignments = [part for value in wanted for part in ("--set", value)]
        made[name] = root / name.replace("+", "p")
        code, text, err = run_mebm("train", name, *assignments, "--out", made[name])
        assert (code, err) == (0, ""), (name, text, err)
    return made


@pytest.mark.parametrize("name", METHODS)
def test_its_trial_says_what_it_had(folders, name):
    (row,) = pq.read_table(folders[name] / "trials.parquet").to_pylist()
    method = method_class(name)
    assert row["method"] == name
    # Six iterations may leave a buffer worse than p0; none of them blows up.
    assert row["outcome"] in ("completed", "collapsed")
    assert row["iterations_done"] == 6
    chains = name in CHAINS
    assert row["sampling_steps"] == (2 if chains else None)
    assert (row["buffer"] is not None) == chains
    assert (row["buffer_size"] is not None) == (chains and name not in ("shortrun", "diffurecov", "cf-ebm"))
    assert (row["accuracy_last"] is not None) == ("classifier" in method.uses) == (row["class_weight"] is not None)
    assert (row["f_divergence"] == "jensen-shannon") == (name == "f-ebm")
    assert (row["fd_fresh_last"] is not None) == (name != "softmax")
    assert (row["fd_buffer_last"] is not None) == (row["buffer_size"] is not None)
    if name in ("vera", "gebm"):
        assert "generator" in row["fd_fresh_protocol"]
    elif chains:
        assert "2steps" in row["fd_fresh_protocol"]


def test_tables_and_report_take_all_of_them(folders, mebm, tmp_path):
    results = load(*folders.values())
    assert set(results.trials["method"]) == set(METHODS)
    assert mebm("tables", *folders.values(), "--out", tmp_path / "tables")[0] == 0
    code, _, err = mebm("report", *folders.values(), "--out", tmp_path / "report.html")
    assert (code, err) == (0, "")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(name in text for name in METHODS)
