"""Input that never ends, explodes or claims what it has not: one line, exit code 2, in bounded time and memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.example import write_example
from study.config.errors import UserError, shown
from study.config.yaml_input import MAX_NODES, parse_yaml, read_yaml
from trainables.config.trial import TrialConfig
from trainables.models.model_file import load_model
from trainables.models.tensor_file import load_tensors
from trainables.results.bounded import check_table, parse_json, read_table
from trainables.training.cost import check_fits

SECONDS = 60
ROOM = 3 * 2**30
"""Bytes of addresses that a command may take beyond what this process has."""


def _bomb(levels: int, width: int = 9) -> str:
    """Nested aliases that stand for width ** levels words."""
    lists = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * width)}]\n" for i in range(1, levels))
    return f"a0: &a0 [{','.join('x' * width)}]\n{lists}"


@contextmanager
def _limited():
    """Little memory and a minute, for what is called here and now."""

    def late(*_):
        pytest.fail(f"it takes more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def refused(mebm):
    """Calls a command that must refuse in one short line; returns the line."""

    def call(*arguments):
        with _limited():
            code, out, err = mebm(*arguments)
        assert (code, out) == (2, ""), (arguments[0], code, out[-200:], err[-500:])
        assert err.startswith("mebm: ") and err.count("\n") == 1 and len(err) < 1500, err[:2000]
        return err

    return call


# ---------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_bomb(20), "holds more than 300,000 values"),
        ("a: &a {x: 1, y: 2}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join(['*a'] * 9)}]}}\n" for i in range(20))
         + "z: [" + "*a0," * 200_000 + "]", "holds more than 300,000 values"),
        ("a: &x " + "y" * 100_000 + "\nb: [" + "*x," * 20_000 + "]", "holds more than 300,000 values"),
        ("a: &x [*x]", "the alias *x is part of what it stands for"),
        ("a: &x 1\nb: &x [*x]", "the alias *x is part of what it stands for"),
        ("a: " + "[" * 20_000, "not valid YAML"),
        ("? " * 20_000, "nested deeper than 50 levels"),
        ("\n".join(" " * i + "a:" for i in range(1500)), "nested deeper than 50 levels"),
        ("a: " + "9" * 5000, "is too large, expected less than 2^63"),
        ("a: 0x" + "f" * 5000, "is too large"),
        ("a: 1" + ":1" * 5000, "is a number to the base 60"),
        ("a: -9223372036854775809", "is too large"),
        ("a: 2024-99-99", "month must be in 1..12"),
        ("a: !!float x", "could not convert"),
        ("a: b\0c", "not valid YAML"),
        ('a: "\\ud800"', "not valid YAML"),
        ("1: 2", "the key 1 must be a text, but is int"),
        ("a: !!set {b, c}", "is set, which no key takes"),
        ("[" + "1," * (MAX_NODES + 1) + "]", "holds more than 300,000 values"),
    ],
)  # fmt: skip
def test_yaml_that_explodes_is_one_line(text, message):
    with _limited(), pytest.raises(UserError) as found:
        parse_yaml(text, "FILE")
    assert message in str(found.value)
    assert str(found.value).startswith("FILE: ") and len(str(found.value)) < 300 and str(found.value).isprintable()


def test_what_people_write_is_read():
    assert parse_yaml("\ufeffa: 1\nb: &x {c: [1.5, yes, ~]}\nd: {<<: *x, e: 0x10}".encode(), "F") == {
        "a": 1, "b": {"c": [1.5, True, None]}, "d": {"c": [1.5, True, None], "e": 16},
    }  # fmt: skip
    assert parse_yaml(f"[{2**63 - 1}]", "F") == [2**63 - 1]


def test_files_that_are_none_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**30)
    (tmp_path / "wide").write_bytes("a: 1".encode("utf-16"))
    for path, message in (
        (tmp_path / "pipe", "not a regular file"), (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "not a regular file"), (tmp_path / "large", "larger than"), (tmp_path / "wide", "not UTF-8"),
        (Path("a\0b"), "cannot be read"), (tmp_path / ("x" * 5000), "cannot be read"),
    ):  # fmt: skip
        with _limited(), pytest.raises(UserError, match=message):
            read_yaml(path)


def test_values_in_messages_are_cut():
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    shared = ["x"] * 9
    for _ in range(12):
        shared = [shared] * 9
    with _limited():
        for value in (nested, shared, 10**5000, "x" * 10**7, {"a" * 10**6: "b" * 10**6}, b"x" * 10**6, {1: nested}):
            for quoted in (True, False) if isinstance(value, str) else (True,):
                text = shown(value, quoted=quoted)
                assert 0 < len(text) <= 60 and text.isprintable()
    assert shown("\x1b[31m\ud800\n") == r"'\x1b[31m\ud800\n'"
    assert len(str(UserError("x" * 10**6))) <= 3000


# ------------------------------------------------------------------------------------------------------ commands

STUDY = "name: q\ntrial: {{method: m-ebm{trial}}}\nsearch: {{trials: 2, space: {{{space}}}}}\nseeds: {seeds}\n"


def _study(trial="", space="step_size: {low: 0.1, high: 1}", seeds="[0]"):
    return STUDY.format(trial=trial, space=space, seeds=seeds)


HOSTILE = {
    "bomb": _bomb(20),
    "small bomb, printed in the error": _bomb(4) + "name: *a3",
    "brackets": "a: " + "[" * 20_000,
    "digits": _study(seeds="[" + "9" * 5000 + "]"),
    "step": _study(space="step_size: {low: 0.1, high: 1.0, step: 1.0e-320}"),
    "far": _study(space="step_size: {low: 0.1, high: 1.0e+308}"),
    "nan": _study(space="step_size: {low: .nan, high: 1}"),
    "epochs": _study(trial=", epochs: 1" + "0" * 30),
    "batch": _study(trial=", batch_size: 1000000000000"),
    "channels": _study(trial=", network: conv-99999999999"),
    "depth": _study(trial=", network: wrn-1000000-100000"),
    "digits of a network": _study(trial=", network: conv-" + "9" * 5000),
    "no memory holds it": _study(trial=", network: wrn-28-1000"),
    "name": _study().replace("name: q", "name: " + "q" * 5000),
    "NUL": _study(trial=', data_dir: "a\\0b"'),
    "escape": _study(trial=', network: "\\e[31mred"'),
    "trials": _study().replace("trials: 2", "trials: 1000000000000000"),
    "sampler's seed": _study().replace("trials: 2", "trials: 2, seed: 9999999999"),
    "objectives": _study() + "objectives: [" + "{metric: fid_buffer}," * 20_000 + "]",
    "CPUs": _study() + "resources: {cpus: 1.0e+300}",
    "grid": "name: q\nsearch: {sampler: grid, grid: [{" + ", ".join(
        f"{key}: [{','.join(map(str, range(64, 1064)))}]" for key in ("epochs", "buffer_size", "batch_size")) + "}]}",
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_is_refused_in_one_line(case, refused, write_config, tmp_path):
    line = refused("sweep", write_config(HOSTILE[case]), "--dry-run")
    assert line.isascii() and line[:-1].isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


@pytest.mark.parametrize(
    "assignment",
    ["seeds=" + "[" * 20_000, "epochs=" + "9" * 5000, "network=conv-99999999999", "network=wrn-28-1000",
     "9" * 5000 + "=1", "a." * 5000 + "b=1", "x" * 10_000, "search.space.step_size={low: 0.1, high: 1, step: 1.0e-320}",
     "name=[&a [x,x,x,x,x,x,x,x,x],&b [*a,*a,*a,*a,*a,*a],&c [*b,*b,*b,*b,*b,*b],[*c,*c,*c,*c,*c,*c]]"],
)  # fmt: skip
def test_a_hostile_assignment_is_refused_in_one_line(assignment, refused):
    refused("sweep", "quickstart", "--dry-run", "--set", assignment)


def test_every_command_that_takes_a_config_bounds_it(refused, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bomb.yaml").write_text(_bomb(20))
    for config in (tmp_path / "pipe", "/dev/zero", tmp_path / "bomb.yaml", "x" * 5000):
        refused("plan", config)
        refused("train", config, "--out", tmp_path / "o")
    for network in ("wrn-28-1000", "wrn-1000000-100000", "conv-99999999999"):
        refused("plan", "quickstart", "--set", f"network={network}")
        refused("train", "m-ebm", "--set", f"network={network}", "--out", tmp_path / "o")
        refused("bench", "--methods", "m-ebm:2", "--network", network, "--out", tmp_path / "o")
    refused("bench", "--methods", "m-ebm:" + "9" * 5000, "--out", tmp_path / "o")
    refused("train", "vera", "--set", "generator.features=65536", "--out", tmp_path / "o")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bomb.yaml", "pipe"]


@pytest.mark.slow
def test_a_process_of_little_memory_refuses_too(tmp_path):
    def limits():
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30,) * 2)

    (tmp_path / "bomb.yaml").write_text(_bomb(20))
    for arguments in (("sweep", "bomb.yaml", "-n"), ("train", "m-ebm", "--set", "network=conv-10000")):
        done = subprocess.run(
            [sys.executable, "-m", "study.cli", *arguments], cwd=tmp_path, timeout=120, check=False,
            capture_output=True, text=True, preexec_fn=limits,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr[-2000:]


def test_memory_is_estimated_before_it_is_allocated():
    shape = (3, 32, 32)
    host = torch.device("cpu")
    check_fits(TrialConfig(), shape, 10, host)
    for fields in (
        {"network": "conv-10000"}, {"buffer_size": 10_000_000, "image_size": 1024},
        {"network": "wrn-28-10", "batch_size": 65_536, "buffer_size": 65_536},
    ):  # fmt: skip
        side = fields.pop("image_size", 32)
        with _limited(), pytest.raises(ValueError, match=r"needs at least .* GB of memory for images of .* cpu has"):
            check_fits(TrialConfig(**fields), (3, side, side), 10, host)
    with pytest.raises(ValueError, match="no device has more than"):
        check_fits(TrialConfig(network="wrn-28-1000"), shape, 10)


# ------------------------------------------------------------------------------------------------- study folders


@pytest.fixture
def study(tmp_path):
    return write_example(tmp_path / "study")


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    "text", [DEEP, '{"a":' * 300 + "1" + "}" * 300, '{"study": "q", "seeds": [' + "9" * 5000 + "]}"]
)
def test_a_deep_manifest_is_one_line(text, refused, study):
    (study / "manifest.json").write_text(text)
    assert "not readable as JSON" in refused("tables", study)
    assert "not readable as JSON" in refused("report", study)


def test_a_manifest_without_end_is_one_line(refused, study):
    os.truncate(study / "manifest.json", 2**30)
    assert "larger than" in refused("tables", study)


def _rewritten(path, name, values):
    table = pq.read_table(path)
    number = table.column_names.index(name)
    columns = [values if n == number else table.column(n) for n in range(table.num_columns)]
    schema = pa.schema([f if f.name != name else pa.field(name, values.type) for f in table.schema])
    pq.write_table(pa.table(columns, schema=schema), path, store_schema=False, compression="zstd")


def test_a_table_that_explodes_is_one_line(refused, study):
    path = study / "trials.parquet"
    whole = path.read_bytes()
    rows = pq.read_table(path).num_rows
    _rewritten(path, "config", pa.array([DEEP] * rows))
    assert "is not a JSON object" in refused("tables", study)
    path.write_bytes(whole)
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), ["x" * (2**31 // rows + 2**20)])
    _rewritten(path, "message", text)
    del text
    assert "its texts need 2 GB of memory" in refused("tables", study)
    schema = pq.read_schema(path)
    with pq.ParquetWriter(path, schema) as writer:
        some = pa.table([pa.nulls(2_000_000, field.type) for field in schema], schema=schema)
        for _ in range(10):
            writer.write_table(some)
    assert "20,000,000 rows of" in refused("tables", study)


def test_what_a_table_claims_is_looked_at(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", None]}), path)
    check_table(pq.read_metadata(path))
    assert read_table(path).to_pydict() == {"a": [1, 2], "b": ["x", None]}
    assert read_table(path, ["b"], checked=True).to_pydict() == {"b": ["x", None]}
    pq.write_table(pa.table({"a": pa.array(np.zeros(2**20, np.int64))}), path)
    assert read_table(path).num_rows == 2**20
    for text in ('{"a": ' * 101 + "1" + "}" * 101, "[" * 10**6, "1" * 5000):
        with pytest.raises(ValueError, match=r"nested|digits"):
            parse_json(text)


# -------------------------------------------------------------------------------------------- models, checkpoints


class _Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def _model(folder):
    from study.models.train import load_trial
    from trainables.models.model_file import model_state
    from trainables.training.trainer import Trainer

    config, _ = load_trial("m-ebm", ("network=conv-8", "buffer_size=64", "evaluation.protocols=none"))
    path = folder / "model.pt"
    torch.save(model_state(Trainer(config)), path)
    return path


def test_a_hostile_model_file_is_one_line(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = _model(tmp_path)
    state = torch.load(path, weights_only=True)
    config = json.loads(state["config"])
    first = next(iter(state["model"]))
    weight = state["model"][first]

    def weights(value):
        return {"model": state["model"] | {first: value}}

    cases = [
        {"shape": [1, 10**6, 10**6]}, {"shape": "x"}, {"shape": [1, 8]}, {"classes": 10**12}, {"classes": "x"},
        {"config": json.dumps(config | {"network": "wrn-28-1000"})}, {"config": DEEP}, {"config": 5},
        {"config": json.dumps(config | {"network": "wrn-1000000-100000"})},
        weights(weight * float("nan")), weights(weight.double()), weights("x"), weights(weight[:1]),
        weights(torch.zeros(1).expand(10**12)), weights(torch.zeros(2, device="meta")), weights(weight.to_sparse()),
        {"samples": state["samples"].float()}, {"samples": None}, {"samples": torch.zeros(5, 3, 9, 9)},
        {"samples": torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(10**6, 1, 10**3, 10**3)},
        {"truncated": 5}, {"epoch": "x"}, {"iteration": 10**400}, {"data_source": [1]}, {"format": "x" * 10**5},
        {"config": _Code()},
    ]  # fmt: skip
    for change in cases:
        torch.save(state | change, path)
        line = refused("sample", path, "--count", "1", "--out", "o.png")
        assert line.startswith(f"mebm: {path}: "), line
        with _limited(), pytest.raises(ValueError, match=r"model\.pt: "):
            load_model(path)
    path.unlink()
    os.mkfifo(path)
    refused("sample", path, "--count", "1", "--out", "o.png")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_a_zip_bomb_is_no_model(tmp_path):
    import zipfile

    path = tmp_path / "bomb.pt"
    torch.save({"a": torch.zeros(10**7)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    assert path.stat().st_size < 10**6
    with pytest.raises(ValueError, match="compressed"):
        load_tensors(path)
    itself: list = []
    itself.append(itself)
    torch.save(itself, path)
    with pytest.raises(ValueError, match="or itself"):
        load_tensors(path)
    assert load_tensors(tmp_path / "whole.pt")["a"].shape == (10**7,)


def test_a_hostile_checkpoint_with_its_own_checksum_is_none(tmp_path):
    from trainables.trial.checkpoint import SEAL_FILE, STATE_FILE, CheckpointError, read_checkpoint, write_checkpoint

    write_checkpoint(tmp_path, {"a": torch.zeros(1).expand(10**12).as_strided((1,), (1,)), "b": 1})
    assert read_checkpoint(tmp_path)["b"] == 1
    for content in ({"a": torch.zeros(1).expand(10**12)}, {"a": torch.zeros(2, device="meta")}):
        write_checkpoint(tmp_path, content)
        with _limited(), pytest.raises(CheckpointError, match="not a checkpoint"):
            read_checkpoint(tmp_path)
    (tmp_path / SEAL_FILE).write_text(DEEP)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path)
    os.truncate(tmp_path / SEAL_FILE, 2**30)
    with _limited(), pytest.raises(CheckpointError, match="larger than"):
        read_checkpoint(tmp_path)
    assert (tmp_path / STATE_FILE).is_file()


# ------------------------------------------------------------------------------------------------ Optuna's storage


def test_a_damaged_optuna_storage_is_said_before_anything_starts(tmp_path, tiny, write_config):
    import optuna

    from study.config.load import load_study
    from study.record.verify import _storage_damage
    from study.search.storage import open_storage
    from trainables.results.layout import STORAGE

    study = load_study(str(write_config(tiny)))
    opened = open_storage(study, tmp_path)
    opened.add_trial(optuna.trial.create_trial(
        params={"x": 0.5}, distributions={"x": optuna.distributions.FloatDistribution(0, 1)},
        values=[1.0] * len(study.objectives)))  # fmt: skip
    whole = (tmp_path / STORAGE).read_bytes()
    assert _storage_damage(tmp_path / STORAGE) is None
    for statement in (
        'update trial_params set distribution_json=\'{"name":"FloatDistribution","attributes":{"low":1}}\'',
        f"update trial_params set distribution_json='{DEEP}'",
        "update alembic_version set version_num='zzz'",
    ):
        (tmp_path / STORAGE).write_bytes(whole)
        connection = sqlite3.connect(tmp_path / STORAGE)
        connection.execute(statement)
        connection.commit()
        connection.close()
        # As `launch` catches them around `reconcile`.
        with pytest.raises((ValueError, LookupError, TypeError, RuntimeError, optuna.exceptions.OptunaError)):
            open_storage(study, tmp_path).get_trials()
    (tmp_path / STORAGE).write_bytes(whole)
    with sqlite3.connect(tmp_path / STORAGE) as connection:
        connection.execute(
            "create view v as with recursive x(i) as (select 1 union all select i + 1 from x) select * from x"
        )
    connection.close()
    assert "not a table" in str(_storage_damage(tmp_path / STORAGE))


def test_a_storage_that_somebody_else_holds_is_not_taken_for_damaged(tmp_path):
    from study.record.verify import _storage_damage

    path = tmp_path / "optuna.db"
    holder = sqlite3.connect(path)
    holder.execute("create table t (a)")
    holder.commit()
    holder.execute("begin exclusive")
    with pytest.raises(UserError, match="is locked by another process"):
        _storage_damage(path)
    holder.close()
