"""The published values, cell by cell against the files they come from."""

import csv
from pathlib import Path

import pytest

import analysis
from analysis.results.parquet import records
from analysis.results.published import parse_model, published_hyperparameters, published_results

DATA = Path(analysis.__file__).parent / "results/data"


def lines(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_cell_of_the_results():
    expected, got = lines("reported_results.csv"), records(published_results())
    assert len(got) == len(expected) == 76
    for line, row in zip(expected, got, strict=True):
        for name, text in line.items():
            value = row[name]
            if text == "":
                assert value is None, (line, name)
            elif isinstance(value, str):
                assert value == text
            else:
                assert float(text) == value, (line, name)


def test_every_cell_of_the_hyperparameters():
    expected, got = lines("hyperparameters.csv"), records(published_hyperparameters())
    assert [(r["variable"], r["symbol"], r["value"]) for r in got] == [
        (line["variable"], line["symbol"], float(line["value"])) for line in expected
    ]
    fields = ["epochs", "buffer_size", "reinit_probability", "step_size", "noise_std"]
    assert [r["field"] for r in got] == fields


@pytest.mark.parametrize(
    ("model", "parsed"),
    [
        ("M-EBM(K=1)", ("m-ebm", 1)),
        ("M-JEM(K=10)", ("m-jem", 10)),
        ("JEM(K=20)", ("jem", 20)),
        ("JEM++(M=5)", ("jem++", 5)),
        ("JEM++(K=10)", ("jem++", 10)),
        ("Softmax", ("softmax", None)),
        ("Classifier", ("softmax", None)),
        ("VERA(alpha=100)", ("vera", None)),
        ("IGEBM(K=60)", ("igebm", 60)),
        ("ShortRun(K=100)", ("shortrun", 100)),
        ("KL-EBM(K=40)", ("kl-ebm", 40)),
        ("f-EBM(K=60)", ("f-ebm", 60)),
        ("CF-EBM(K=50)", ("cf-ebm", 50)),
        ("DiffuRecov(K=30)", ("diffurecov", 30)),
        ("SNGAN(Cond)", (None, None)),
        ("Residual Flow", (None, None)),
    ],
)
def test_names_of_rows(model, parsed):
    assert parse_model(model) == parsed


def test_steps_of_names_agree_with_the_column():
    for row in records(published_results()):
        assert parse_model(row["model"])[1] in (row["sampling_steps"], None)
