"""Files of recorded runs: what is read of them, and what is said of those that cannot be."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from study.config.errors import UserError
from study.imports.read import Mapped, gather, parse_map, read_runs

ROWS = [{"step": 0, "e_pos": 0.5, "e_neg": 0.25}, {"step": 10, "e_pos": 0.75, "e_neg": 0.5}]
ENERGIES = parse_map(["energy_data_mean=e_pos,energy_sample_mean=e_neg"])


def csv_of(rows, tab=False):
    mark = "\t" if tab else ","
    return "\n".join([mark.join(rows[0]), *(mark.join(map(str, r.values())) for r in rows)]) + "\n"


def write(path: Path, rows=ROWS) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(csv_of(rows).encode()))
    else:
        path.write_text(csv_of(rows, path.suffix == ".tsv"))
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.jsonl", "a.parquet"])
def test_every_kind_is_one(name: str, tmp_path: Path) -> None:
    runs, _ = gather([write(tmp_path / name)], ENERGIES, None)
    (run,) = runs.values()
    assert run.name == "a" and list(run.iterations) == [0, 10] and run.repeated == 0
    assert list(run.columns["energy_data_mean"]) == [0.5, 0.75] and list(run.columns["energy_sample_mean"]) == [
        0.25,
        0.5,
    ]


def test_tensorboard_files_are_read(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    for name in ("k1", "k5"):
        writer = tensorboard.SummaryWriter(tmp_path / "logs" / name)
        for step in (0, 5, 10):
            writer.add_scalar("e/pos", 0.5 + step, step)
            writer.add_scalar("e/neg", 0.5, step)
        writer.add_scalar("fid", 30.0, 10)
        writer.close()
    mapping = parse_map(["energy_data_mean=e.pos,energy_sample_mean=e.neg"])
    runs, _ = gather([tmp_path / "logs"], mapping, re.compile(r"/k(?P<sampling_steps>\d+)/"))
    assert sorted(runs) == ["k1", "k5"] and runs["k5"].settings == {"sampling_steps": 5}
    assert list(runs["k1"].columns["energy_data_mean"]) == [0.5, 5.5, 10.5]
    assert list(runs["k1"].given["fid"]) == [False, False, True]


def test_a_folder_per_run_and_files_that_share_a_run(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        write(tmp_path / "runs" / name / "energies.csv")
        write(tmp_path / "runs" / name / "fid.csv", [{"iteration": 10, "fid": 30.0}, {"iteration": 20, "fid": 25.0}])
    runs, _ = gather([tmp_path / "runs"], ENERGIES, None)
    assert sorted(runs) == ["one", "two"] and list(runs["one"].iterations) == [0, 10, 20]
    assert list(runs["one"].given["fid"]) == [False, True, True]
    assert list(runs["one"].given["energy_data_mean"]) == [True, True, False]


def test_runs_of_one_file_are_told_apart_by_a_column(tmp_path: Path) -> None:
    rows = [{"run": r, "it": i, "e_pos": i + n, "e_neg": 0.0} for n, r in enumerate("ab") for i in range(3)]
    runs, _ = gather([write(tmp_path / "all.csv", rows)], ENERGIES, None)
    assert {n: list(r.columns["energy_data_mean"]) for n, r in runs.items()} == {"a": [0, 1, 2], "b": [1, 2, 3]}


def test_signs_and_fixed_values(tmp_path: Path) -> None:
    mapping = parse_map(["energy_data_mean=-e_pos", "energy_sample_mean=-e_neg,method='my ebm',batch_size='64'"])
    runs, _ = gather([write(tmp_path / "a.csv")], mapping, None)
    assert list(runs["a"].columns["energy_data_mean"]) == [-0.5, -0.75]
    assert runs["a"].settings == {"method": "my ebm", "batch_size": 64}
    assert mapping["energy_data_mean"] == Mapped("e_pos", negated=True)


def test_a_nan_was_measured_and_an_empty_cell_was_not(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("step,e_pos,e_neg\n0,nan,1\n1,,1\n2,inf,1\n")
    runs, _ = gather([path], ENERGIES, None)
    values, given = runs["a"].columns["energy_data_mean"], runs["a"].given["energy_data_mean"]
    assert list(given) == [True, False, True] and math.isnan(values[0]) and math.isinf(values[2])


def test_of_repeated_iterations_the_later_is_kept(tmp_path: Path) -> None:
    rows = [{"step": s, "e_pos": float(n), "e_neg": 0.0} for n, s in enumerate([0, 1, 2, 1, 2, 3])]
    runs, _ = gather([write(tmp_path / "a.csv", rows)], ENERGIES, None)
    assert list(runs["a"].columns["energy_data_mean"]) == [0, 3, 4, 5] and runs["a"].repeated == 2


@pytest.mark.parametrize(
    ("text", "mapping", "said"),
    [
        ("t,e_pos,e_neg\n0,1,1\n", [], "a.csv: no iteration column; it has t, e_pos, e_neg: --map iteration=t"),
        ("step,e_pos,e_neg\n0,1,1\n1,n/a,1\n", ["energy_data_mean=e_pos"], "a.csv: line 3: e_pos = 'n/a' is not a number"),
        ("step,e_pos\n0,1\n0.5,1\n", [], "a.csv: line 3: step = 0.5 is not an iteration"),
        ("step,e_pos\n0,1\n-1,1\n", [], "a.csv: line 3: step = -1 is not an iteration"),
        ("step,e_pos\n0,1\n,1\n", [], "a.csv: line 3: step = None is not an iteration"),
        ("run,step,e_pos\na,0,1\n,0,1\n", [], "a.csv: line 3: run is empty"),
        ("step,e_pos\n0,1\n", ["loss=los"], "--map loss=los: no file has the column 'los'"),
        ("step,e_pos\n0,1\n", ["loss"], "--map loss: must be NAME=COLUMN"),
        ("step,e_pos\n0,1\n", ["loss=a", "loss=b"], "--map loss: is there more than once"),
        ("", [], "a.csv: cannot be read"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(text: str, mapping: list[str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{re.escape(said)}") as caught:
        gather([path], parse_map(mapping), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b'{"step": 0}\n{"step": '), ("a.jsonl", b"[" * 100_000), ("a.parquet", b"PAR1"), ("a.csv.gz", b"no"),
     ("a.csv", b"step,a\n0,1,2,3\n"), ("a.csv", b"\xff\xfe\x00"), ("events.out.tfevents.1", b"x" * 100)],
)  # fmt: skip
def test_a_damaged_file_is_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        gather([tmp_path / name], {}, None)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_damage_anywhere_is_no_crash(tmp_path: Path) -> None:
    """Bytes changed at random in each kind of file: it is read, or refused in one line."""
    rng = np.random.default_rng(0)
    rows = [{"run": "a", "step": i, "e_pos": 0.1 * i, "e_neg": 0.0, "fid": 3.0} for i in range(30)]
    refused = 0
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        whole = write(tmp_path / name, rows).read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, len(whole), 3):
                damaged[place] = rng.integers(0, 256)
            (tmp_path / name).write_bytes(bytes(damaged))
            try:
                gather([tmp_path / name], {}, None)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 20


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".yaml"])
def test_a_table_of_runs(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"runs{suffix}"
    rows = [
        {"run": "a", "l2": 0.5, "lr": 0.1, "outcome": "diverged"},
        {"run": "b", "l2": 0.0, "lr": 0.1, "outcome": "ok"},
    ]
    if suffix == ".yaml":
        path.write_text("a: {l2: 0.5, lr: 0.1, outcome: diverged}\nb: {l2: 0.0, lr: 0.1, outcome: ok}\n")
    else:
        write(path, rows)
    found = read_runs(path)
    assert found == [{"run": "a", "l2_weight": 0.5, "learning_rate": 0.1, "outcome": "diverged"},
                     {"run": "b", "l2_weight": 0.0, "learning_rate": 0.1, "outcome": "ok"}]  # fmt: skip


def test_a_table_without_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"runs.csv: row 1 has no run; it has name, lr"):
        read_runs(write(tmp_path / "runs.csv", [{"name": "a", "lr": 1}]))


@pytest.mark.parametrize(
    "text",
    ["step;energy_gap\n0;0,5\n10;-1,5e1\n", "step;energy_gap\n0;0.5\n10;-15\n", "\ufeffstep, energy_gap\n0, 0.5\n10, -15\n",
     'step,energy_gap,note\n0,0.5,"a\nb, ""c"""\n10,-15,d\n', "step,energy_gap\r\n0,0.5\r\n10,-15\r\n"],
)  # fmt: skip
def test_csv_of_every_country_and_spreadsheet(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8", newline="")
    (run,) = gather([tmp_path / "a.csv"], {}, None)[0].values()
    assert list(run.iterations) == [0, 10] and list(run.columns["energy_gap"]) == [0.5, -15.0]


def test_a_column_or_a_run_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("step,energy_gap,energy_gap\n0,1,2\n")
    with pytest.raises(UserError, match="has the column energy_gap more than once"):
        gather([tmp_path / "a.csv"], {}, None)
    (tmp_path / "runs.csv").write_text("run,seed\na,1\na,2\n")
    with pytest.raises(UserError, match="'a' is there more than once; expected a row per run"):
        read_runs(tmp_path / "runs.csv")


def test_names_of_the_paper_are_settings(tmp_path: Path) -> None:
    write(tmp_path / "k5_s1.csv")
    (run,) = gather([tmp_path / "k5_s1.csv"], ENERGIES, re.compile(r"k(?P<K>\d+)_s(?P<seed>\d+)"))[0].values()
    assert run.settings == {"sampling_steps": 5, "seed": 1}
    (tmp_path / "runs.csv").write_text("run,alpha,rho,B\na,0.1,0.05,10\n")
    expected = {"run": "a", "step_size": 0.1, "reinit_probability": 0.05, "buffer_size": 10}
    assert read_runs(tmp_path / "runs.csv") == [expected]
