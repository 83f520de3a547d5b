"""Damaged study folders: no traceback, no wrong number, no trial that is missing without a word.

A whole study is written by the ledger itself; every case damages a copy of it and does what a user does: load it, make
its tables and its report, ask how it stands, and go on with it as far as that goes without starting a trial.
"""

from __future__ import annotations

import io
import json
import math
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from analysis.report.page import report_html
from analysis.results.load import Results, load
from analysis.results.messages import ResultsError
from analysis.results.parquet import read_parquet, records, write_parquet
from analysis.tables.paper import build_tables
from study.config.errors import UserError
from study.config.load import validate_study
from study.record.folder import create_folder, load_folder, refuse_changes
from study.record.ledger import Ledger
from study.record.manifest import write_manifest
from study.record.verify import check_checkpoints, code_print, refuse_other_code, repair
from trainables.config.trial import TrialConfig
from trainables.methods.presets import build_trial
from trainables.results.layout import JOURNAL
from trainables.results.schema import EPOCH_COLUMNS, EVALUATION_COLUMNS, SIGNAL_COLUMNS, TRIAL_COLUMNS, Outcome

STUDY = {
    "name": "tiny",
    "trial": {"dataset": "digits", "epochs": 3, "iterations_per_epoch": 12, "batch_size": 16, "buffer_size": 100},
    "search": {"sampler": "grid", "grid": [{"initial": ["gaussian", "uniform"], "sampling_steps": [1, 2]}]},
    "seeds": [0, 1],
}
TABLES = ("trials.parquet", "epochs.parquet", "attempts.parquet")
SIDE = ("signals/t0001.parquet", "signals/t0003.parquet", "samples/t0001_buffer.png", "evaluations.parquet")
CONTENT = ("study.yaml", "manifest.json", JOURNAL, "optuna.db", *TABLES, *SIDE)
SEEDS = 8


def values(outcome: str, epochs: int, value: float, **others: Any) -> dict[str, Any]:
    """What a trial reports of itself after so many epochs."""
    best = {f"fd_buffer_{part}": value for part in ("best", "last", "initial")} | {"fd_buffer_best_epoch": 0}
    return {
        "outcome": outcome, "cause": None, "iteration": None, "message": None, "epochs_done": epochs,
        "iterations_done": 12 * epochs, "iterations_planned": 36, "train_seconds": 2.0 * epochs,
        "evaluation_seconds": 0.5 * epochs, "saved_seconds": 0.0, "seconds_per_iteration": 0.17, "device": "cpu",
        "hardware": "a CPU", "data_source": "sklearn:digits:abc", "fd_buffer_protocol": "small-buffer-v1",
        **best, **others,
    }  # fmt: skip


def epoch_row(epoch: int, value: float) -> dict[str, Any]:
    return {
        "epoch": epoch, "iteration": 12 * epoch, "seconds": 2.5 * epoch, "train_seconds": 2.0,
        "evaluation_seconds": 0.5, "loss": 0.25, "energy_gap": -0.5, "fd_buffer": value,
        "fd_buffer_protocol": "small-buffer-v1",
    }  # fmt: skip


def run_trial(ledger: Ledger, trial_id: str, config: TrialConfig, number: int, outcome: str) -> None:
    """A trial's events: an attempt that was lost for some, its epochs, and how it ended."""
    value = 3.0 + number / 7
    ledger.start(trial_id, config, f"setting{number // 2}", 0.0, number // 2)
    ledger.report(trial_id, epoch_row(0, value), values("running", 0, value), "10.0.0.1")
    ledger.checkpoint(trial_id, str(ledger.folder.resolve() / f"tune/run-001/{trial_id}/checkpoint_000000"))
    if number % 3 == 2:
        ledger.lost(trial_id, "RuntimeError: out of memory")
        ledger.start(trial_id, config, f"setting{number // 2}", 0.0, number // 2)
    ledger.report(trial_id, epoch_row(1, value / 2), values("running", 1, value), "10.0.0.1")
    if outcome == "failed":
        ledger.end(trial_id, Outcome.FAILED, "ValueError: a bug")
    elif outcome == "diverged":
        found = {"cause": "energy_gap", "iteration": 17, "saved_seconds": 2.0, "iterations_done": 17}
        ledger.report(trial_id, None, values(outcome, 1, value, **found))
    elif outcome == "completed":
        ledger.report(trial_id, epoch_row(2, value / 3), values("running", 2, value))
        ledger.report(trial_id, epoch_row(3, value / 4), values(outcome, 3, value))


def build(results: Path, name: str = "tiny", outcomes: str = "cdcdcfd") -> Path:
    """The folder of a study whose driver was killed: trials that ended, and one at work."""
    study = validate_study({**STUDY, "name": name}, name)
    folder, space = create_folder(study, results), study.space
    write_manifest(folder, study)
    ledger = Ledger(folder, name)
    ledger.run(
        {"driver": "", "host": socket.gethostname(), "config": study.model_dump(mode="json"), "code": code_print()}
    )
    words = {"c": "completed", "d": "diverged", "f": "failed"}
    for number, letter in enumerate(outcomes):
        config = build_trial({**STUDY["trial"], **space.start[number // 2], "seed": number % 2})  # type: ignore[dict-item]
        run_trial(ledger, f"t{number + 1:04d}", config, number, words[letter])
    ledger.start("t0008", config, "setting3", 0.0, 3)
    ledger.close()
    for trial_id in ("t0001", "t0003"):
        rows = [{"trial_id": trial_id, "iteration": i, "energy_gap": -i / 9, "loss": 0.25} for i in range(36)]
        write_parquet(rows, SIGNAL_COLUMNS, folder / "signals" / f"{trial_id}.parquet")
    (folder / "samples").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (82, 82), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "samples" / "t0001_buffer.png")
    score = {"study": name, "trial_id": "t0001", "model": "last", "protocol": "p", "metric": "fd", "value": 1.5}
    write_parquet([score], EVALUATION_COLUMNS, folder / "evaluations.parquet")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna.create_study(storage=f"sqlite:///{folder}/optuna.db", study_name=name)
    return folder


@dataclass
class Whole:
    """The study before any damage: its folder, what it holds, and an earlier copy of it and another study."""

    folder: Path
    results: Results
    ledger: Ledger
    earlier: Path
    other: Path
    trials: dict[str, dict[str, Any]] = field(init=False)
    epochs: dict[str, list[dict[str, Any]]] = field(init=False)

    def __post_init__(self) -> None:
        self.trials = by_trial(self.results.trials)
        self.epochs = epochs_of(self.results)


def by_trial(trials: pd.DataFrame) -> dict[str, dict[str, Any]]:
    return {row["trial_id"]: row for row in records(trials)}


def epochs_of(results: Results) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in records(results.epochs):
        found.setdefault(row["trial_id"], []).append(row)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    place = tmp_path_factory.mktemp("whole")
    folder = build(place / "a")
    earlier, other = place / "earlier", build(place / "b", "other", "ddcc")
    shutil.copytree(folder, earlier)
    cut = earlier / JOURNAL
    lines = cut.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[: len(lines) // 2]))
    Ledger(earlier, "tiny").close()  # its tables as they were by then
    yield Whole(folder, load(folder), Ledger(folder, "tiny", writable=False), earlier, other)


# --------------------------------------------------------------------------------------------------------- damages

Damage = Callable[[Path, random.Random, Whole], str]


def one(folder: Path, rng: random.Random, names: tuple[str, ...] = CONTENT) -> Path:
    return folder / rng.choice(names)


def rewrite(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """A table as another tool writes it that read it: no version, no checksums."""
    pq.write_table(pa.Table.from_pandas(change(pq.read_table(path).to_pandas()), preserve_index=False), path)


def truncated(folder: Path, rng: random.Random, whole: Whole) -> str:
    path = one(folder, rng)
    raw = path.read_bytes()
    length = rng.choice([rng.randrange(len(raw)), len(raw) - 1, len(raw) - 8, 1, 4])
    path.write_bytes(raw[:length])
    return f"{path.name} cut to {length} of {len(raw)} bytes"


def flipped(folder: Path, rng: random.Random, whole: Whole) -> str:
    path = one(folder, rng)
    raw = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(raw)), rng.randrange(8)
    raw[place] ^= 1 << bit
    path.write_bytes(bytes(raw))
    return f"bit {bit} of byte {place} of {path.name}"


def flipped_table(folder: Path, rng: random.Random, whole: Whole) -> str:
    path = one(folder, rng, TABLES[:2])
    raw = bytearray(path.read_bytes())
    places = [rng.randrange(len(raw)) for _ in range(rng.choice([1, 3]))]
    for place in places:
        raw[place] ^= rng.randrange(1, 256)
    path.write_bytes(bytes(raw))
    return f"bytes {places} of {path.name}"


def flipped_journal(folder: Path, rng: random.Random, whole: Whole) -> str:
    raw = bytearray((folder / JOURNAL).read_bytes())
    place = rng.choice([rng.randrange(len(raw)), len(raw) - 1, raw.index(b"\n"), raw.rindex(b"crc")])
    raw[place] ^= rng.randrange(1, 256)
    (folder / JOURNAL).write_bytes(bytes(raw))
    return f"byte {place} of the journal"


def flipped_text(folder: Path, rng: random.Random, whole: Whole) -> str:
    path = one(folder, rng, ("study.yaml", "manifest.json"))
    text = path.read_text(encoding="utf-8")
    places = [m.start() for m in re.finditer(r"\d", text)]
    place = rng.choice(places)
    path.write_text(text[:place] + str((int(text[place]) + rng.randint(1, 9)) % 10) + text[place + 1 :])
    return f"digit {place} of {path.name}"


def empty(folder: Path, rng: random.Random, whole: Whole) -> str:
    path = one(folder, rng)
    path.write_bytes(b"")
    return f"{path.name} empty"


def zeroed(folder: Path, rng: random.Random, whole: Whole) -> str:
    path = one(folder, rng)
    raw = path.read_bytes()
    start = rng.randrange(len(raw))
    end = len(raw) if rng.random() < 0.7 else min(len(raw), start + 512)
    path.write_bytes(raw[:start] + bytes(end - start) + raw[end:])
    return f"{path.name} zero from {start} to {end}"


def missing(folder: Path, rng: random.Random, whole: Whole) -> str:
    names = rng.sample(CONTENT, rng.choice([1, 1, 2, 4]))
    for name in names:
        (folder / name).unlink()
    return f"without {', '.join(names)}"


def repeated_rows(folder: Path, rng: random.Random, whole: Whole) -> str:
    path, keep = one(folder, rng, TABLES[:2]), rng.random() < 0.5
    table = pq.read_table(path)
    rows = table.slice(rng.randrange(len(table) - 1), rng.choice([1, 2, len(table)]))
    rows = rows if keep else rows.replace_schema_metadata(None)
    pq.write_table(pa.concat_tables([table, rows.replace_schema_metadata(table.schema.metadata)]), path)
    return f"{len(rows)} rows of {path.name} twice"


def lost_rows(folder: Path, rng: random.Random, whole: Whole) -> str:
    path = one(folder, rng, TABLES[:2])
    table = pq.read_table(path)
    kept = [i for i in range(len(table)) if rng.random() < 0.7]
    pq.write_table(table.take(kept), path)
    return f"{len(table) - len(kept)} rows of {path.name} lost"


def repeated_lines(folder: Path, rng: random.Random, whole: Whole) -> str:
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    at = rng.randrange(len(lines))
    kind = json.loads(lines[at])["event"]
    lines = [*lines, *lines] if rng.random() < 0.3 else [*lines[:at], lines[at], *lines[at:]]
    (folder / JOURNAL).write_bytes(b"".join(lines))
    return f"line {at + 1} of the journal ({kind}) or all of it twice"


def copied(folder: Path, rng: random.Random, whole: Whole) -> str:
    kind = rng.choice(["table", "table", "signals", "journal", "sample"])
    if kind == "table":
        shutil.copy(folder / rng.choice(TABLES), folder / "trials (1).parquet")
    elif kind == "signals":
        shutil.copy(folder / "signals/t0001.parquet", folder / f"signals/{rng.choice(['t0002', 't0001 (1)'])}.parquet")
    elif kind == "journal":
        shutil.copy(folder / JOURNAL, folder / "ledger (1).jsonl")
    else:
        shutil.copy(folder / "manifest.json", folder / "samples/t0001_fresh.png")
    return f"a second copy: {kind}"


def old_schema(folder: Path, rng: random.Random, whole: Whole) -> str:
    """Tables and a manifest of a schema version that was never released."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(
        json.dumps({k: v for k, v in manifest.items() if k != "crc"} | {"schema_version": 1})
    )
    for name, columns in zip(TABLES, (TRIAL_COLUMNS, EPOCH_COLUMNS), strict=False):
        added = [c.name for c in columns if c.added]
        lost = added if rng.random() < 0.5 else rng.sample(added, 1)
        table = pq.read_table(folder / name).drop_columns(lost)
        pq.write_table(table.replace_schema_metadata(None), folder / name)
    return "schema version 1"


def odd_version(folder: Path, rng: random.Random, whole: Whole) -> str:
    version = rng.choice([0, 4, 99, -1, "1", None, True, 1.5, [], "\ud800"])
    if rng.random() < 0.5:
        manifest = json.loads((folder / "manifest.json").read_text()) | {"schema_version": version}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    else:
        path = one(folder, rng, TABLES[:2])
        table = pq.read_table(path)
        text = json.dumps(version).encode() if version not in (1, True) else b"1x"
        pq.write_table(table.replace_schema_metadata({b"mebm.schema_version": text}), path)
    return f"schema version {version!r}"


def odd_columns(folder: Path, rng: random.Random, whole: Whole) -> str:
    path = one(folder, rng, TABLES[:2])
    kind = rng.choice(["lacks", "has one more", "other type", "twice", "all text", "all null"])
    table = pq.read_table(path)
    at = rng.randrange(table.num_columns)
    name = table.column_names[at]
    if kind == "lacks":
        table = table.drop_columns([name])
    elif kind == "has one more":
        table = table.append_column("mine", pa.array([1.5] * len(table)))
    elif kind == "other type":
        table = table.set_column(at, name, pa.array([{"a": i} for i in range(len(table))]))
    elif kind == "twice":
        table = table.append_column(name, table.column(at))
    elif kind == "all text":
        if pa.types.is_string(table.schema.field(at).type):
            return odd_columns(folder, rng, whole)  # another text: no reader can know that it is wrong
        table = table.set_column(at, name, pa.array([f"x{v}" for v in table.column(at).to_pylist()]))
    else:
        table = table.set_column(at, name, pa.nulls(len(table)))
        if name not in ("trial_id", "study", "setting_id", "outcome", "epoch", "attempt"):
            return odd_columns(folder, rng, whole)  # a null says "not measured": no reader can tell it from one
    pq.write_table(table, path)
    return f"{path.name} {kind}: {name}"


def odd_numbers(folder: Path, rng: random.Random, whole: Whole) -> str:
    path = one(folder, rng, TABLES[:2])
    name, value = rng.choice(
        [("seconds", math.nan), ("seconds", math.inf), ("fd_buffer_protocol", 3), ("train_seconds", -math.inf),
         ("train_seconds", -1.0), ("energy_joules", -1.0), ("accuracy", 7.0), ("epochs_done", -1), ("epoch", -3),
         ("attempt", -1), ("iteration", -5), ("seed", -1)]
    )  # fmt: skip
    table = pq.read_table(path)
    if name not in table.column_names or isinstance(value, int) is (name == "fd_buffer_protocol"):
        return odd_numbers(folder, rng, whole)
    column = table.column(name).to_pylist()
    column[rng.randrange(len(column))] = value
    at = table.column_names.index(name)
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(column, table.schema.field(at).type)), path)
    return f"{value} in {name} of {path.name}"


def odd_ids(folder: Path, rng: random.Random, whole: Whole) -> str:
    name = rng.choice(["../../etc/passwd", "/etc/passwd", "a\0b", "", "t\n1", "x" * 5000, "..", "\x1b[2Jx", "<b>"])
    for table, column in ((TABLES[0], "trial_id"), (TABLES[1], "trial_id"), (TABLES[2], "trial_id")):
        rewrite(folder / table, lambda f, c=column: f.assign(**{c: f[c].replace("t0003", name)}))  # type: ignore[misc]
    return f"trial t0003 is called {name[:30]!r}"


def odd_words(folder: Path, rng: random.Random, whole: Whole) -> str:
    column, word = rng.choice(
        [("outcome", "exploded"), ("outcome", "Completed"), ("cause", "x\ny"), ("config", "{"), ("config", "[1]"),
         ("config", "[" * 100_000), ("alarm_cause", "?"), ("study", "foreign")]
    )  # fmt: skip

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[rng.randrange(len(frame)), column] = word
        return frame

    rewrite(folder / TABLES[0], change)
    return f"{word[:20]!r} in {column}"


def odd_manifest(folder: Path, rng: random.Random, whole: Whole) -> str:
    key = rng.choice(["study", "objectives", "seeds", "planned_trials", "varied", "versions", "hardware", "config"])
    value = rng.choice([5, -1, "x", [1, None], {"a": []}, [[]], True, "\ud83d", float("nan")])
    manifest = json.loads((folder / "manifest.json").read_text()) | {key: value}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return f"manifest: {key} = {value!r}"


def odd_yaml(folder: Path, rng: random.Random, whole: Whole) -> str:
    content = rng.choice(
        [b"\xff\xfe\x00", b"name: [", b"5", b"null", b"[]", b"a: &a [*a]", b"name: !!python/object/apply:os.abort []",
         b"[" * 400, b"at: 2025-99-99", b"name: tiny\n", b"\x00" * 100, "name: \u00e9".encode("latin-1"),
         b"name: tiny\nname: other\nseeds: 5\n", b"{" * 200]
    )  # fmt: skip
    path = one(folder, rng, ("study.yaml", "study.yaml", "manifest.json"))
    path.write_bytes(content)
    return f"{path.name}: {content[:30]!r}"


def odd_lines(folder: Path, rng: random.Random, whole: Whole) -> str:
    path = folder / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    line = rng.choice(
        [b"\n", b"[]\n", b"5\n", b"{}\n", b'{"event": "end"}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"null\n",
         b'{"event": "start", "trial_id": "t0099", "attempt": 1, "at": "2026-01-01T00:00:00Z", "columns": {}}\n',
         b'{"event": "end", "trial_id": "t0001", "outcome": "failed", "message": null, "at": "2026-01-01T00:00:00Z"}\n',
         b'{"event": "end", "trial_id": "t0001", "outcome": "failed", "mess']
    )  # fmt: skip
    at = len(lines) if not line.endswith(b"\n") else rng.choice([0, 1, rng.randrange(len(lines)), len(lines)])
    path.write_bytes(b"".join([*lines[:at], line, *lines[at:]]))
    return f"journal line {at + 1} of {len(lines)}: {line[:40]!r}"


def lost_lines(folder: Path, rng: random.Random, whole: Whole) -> str:
    path = folder / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    kept = rng.randrange(1, len(lines))
    path.write_bytes(b"".join(lines[:kept]))
    return f"the journal's first {kept} of {len(lines)} lines"


def not_a_file(folder: Path, rng: random.Random, whole: Whole) -> str:
    path = one(folder, rng)
    path.unlink()
    kind = rng.choice(["folder", "folder with a file", "loop", "dangling link", "pipe link"])
    if kind.startswith("folder"):
        path.mkdir()
        if kind != "folder":
            (path / "x").write_text("x")
    else:
        path.symlink_to({"loop": path, "dangling link": folder / "nowhere"}.get(kind, Path("/dev/null")))
    return f"{path.name} is a {kind}"


def folders_gone(folder: Path, rng: random.Random, whole: Whole) -> str:
    name = rng.choice(["signals", "samples"])
    shutil.rmtree(folder / name)
    if rng.random() < 0.5:
        (folder / name).write_text("not a folder")
    elif rng.random() < 0.5:
        (folder / name).symlink_to(folder / name)
    return f"{name} is not a folder"


def foreign_table(folder: Path, rng: random.Random, whole: Whole) -> str:
    path = one(folder, rng, (*TABLES, "signals/t0001.parquet", "evaluations.parquet"))
    kind = rng.choice(["numbers", "nothing", "csv", "nested", "other study"])
    if kind == "csv":
        path.write_text("trial_id,outcome\nt0001,completed\n")
    elif kind == "other study":
        shutil.copy(whole.other / path.relative_to(folder), path)
    else:
        table = {
            "numbers": pa.table({"a": [1, 2], "b": [0.5, None]}),
            "nothing": pa.table({}),
            "nested": pa.table({"trial_id": [["t0001"], []], "outcome": [{"x": 1}, None]}),
        }[kind]
        pq.write_table(table, path)
    return f"{path.name} is {kind}"


def two_studies(folder: Path, rng: random.Random, whole: Whole) -> str:
    names = rng.sample([*TABLES, "manifest.json", "study.yaml", JOURNAL], rng.choice([1, 2]))
    for name in names:
        shutil.copy(whole.other / name, folder / name)
    if rng.random() < 0.3:
        tables = [pq.read_table(place / TABLES[0]) for place in (whole.folder, whole.other)]
        pq.write_table(pa.concat_tables(tables), folder / TABLES[0])
        names.append("rows of both")
    return f"of another study: {', '.join(names)}"


def partial_copy(folder: Path, rng: random.Random, whole: Whole) -> str:
    names = rng.sample([*TABLES, JOURNAL], rng.choice([1, 2, 3]))
    for name in names:
        shutil.copy(whole.earlier / name, folder / name)
    return f"earlier: {', '.join(names)}"


def another_tool(folder: Path, rng: random.Random, whole: Whole) -> str:
    path = one(folder, rng, TABLES[:2])
    rewrite(path, lambda frame: frame.sample(frac=1, random_state=rng.randrange(99)))
    return f"{path.name} written anew by pandas"


DAMAGES: tuple[Damage, ...] = (
    truncated, flipped, flipped_table, flipped_journal, flipped_text, empty, zeroed, missing, repeated_rows, lost_rows,
    repeated_lines, copied, old_schema, odd_version, odd_columns, odd_numbers, odd_ids, odd_words, odd_manifest,
    odd_yaml, odd_lines, lost_lines, not_a_file, folders_gone, foreign_table, two_studies, partial_copy, another_tool,
)  # fmt: skip

DRAWN = (lost_rows, odd_ids)
"""Of those that leave a study readable, one each is drawn: a report takes a hundred times as long as the rest."""


# ---------------------------------------------------------------------------------------------------------- checks


def mebm(*arguments: object) -> tuple[int, str, str]:
    """The command line in this process: exit code, standard output and standard error."""
    from study.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["mebm", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def check_line(text: str, folder: Path) -> None:
    """A refusal is one printable line that names the folder or a file in it."""
    assert text.isprintable(), text
    assert str(folder) in text, text
    assert len(text) < 900, text


def counts(notes: list[str]) -> tuple[set[str], int]:
    """Trials that notes name, and how many more they count."""
    text = " ".join(notes)
    return set(re.findall(r"\bt\d{4}\b", text)), sum(int(n) for n in re.findall(r"and (\d+) more", text))


def check_loaded(results: Results, whole: Whole, damage: Damage) -> bool:
    """Every trial is there with its numbers, or named or counted; returns whether anything is not as it was."""

    def as_was(row: dict[str, Any], was: dict[str, Any]) -> bool:
        return all(row[k] == was[k] for k in was if k != "study")

    for trial_id in ("t0001", "t0003"):
        signals, was = results.signals(results.studies[0], trial_id), whole.results.signals("tiny", trial_id)
        assert signals is None or signals.equals(was), f"signals of {trial_id}"
    if results.trials.equals(whole.results.trials) and results.epochs.equals(whole.results.epochs):
        return False
    named, more = counts(results.notes)
    found, epochs = by_trial(results.trials), epochs_of(results)
    renamed = sum(t not in whole.trials for t in found)
    gone = {t for t, was in whole.trials.items() if t not in found or not as_was(found[t], was)}
    for trial_id, rows in whole.epochs.items():
        there = {(r["epoch"], r["attempt"]): r for r in epochs.get(trial_id, [])}
        assert len(there) == len(epochs.get(trial_id, [])), f"epochs of {trial_id} are there twice"
        lost = [r for r in rows if (r["epoch"], r["attempt"]) not in there]
        wrong = [r for r in rows if (k := (r["epoch"], r["attempt"])) in there and not as_was(there[k], r)]
        assert not wrong, f"epochs of {trial_id} have other numbers"
        if lost:
            gone.add(trial_id)
    assert renamed <= 1, f"trials that nobody ran: {sorted(set(found) - set(whole.trials))}"
    silent = gone - named
    if damage is partial_copy and len(found) < 8:  # an earlier state of the study: the plan counts what is to come
        assert results.manifests["tiny"]["planned_trials"] == 8
        silent &= set(found)
    assert len(silent) <= more + renamed, f"{sorted(silent)} differ or are missing; the notes say {results.notes}"
    return bool(gone or renamed)


def check_status(folder: Path, whole: Whole) -> None:
    code, out, err = mebm("status", folder, "--json")
    assert code in (0, 2), err
    if code == 2:
        check_line(err.strip(), folder)
        return
    shown = json.loads(out)
    trials = {t["trial_id"]: t for t in shown["trials"]}
    for trial_id, row in whole.ledger.trials.items():
        was = {k: v for k, v in row.items() if v is not None and k != "config"}
        was["outcome"] = trials.get(trial_id, was)["outcome"] if was["outcome"] == "running" else was["outcome"]
        if trials.get(trial_id) != was:
            assert shown["doubts"], f"{trial_id} is {trials.get(trial_id)}, but was {was}"
    assert shown["doubts"] or (shown["planned"], shown["study"]) == (8, "tiny")


def check_resume(folder: Path, whole: Whole, read_again: bool) -> str:
    """What `mebm resume` does before it starts anything; returns what it said, or why it refused.

    Args:
        read_again: load the folder once more afterwards, whose tables were rebuilt from the ledger.
    """
    try:
        study = load_folder(folder)
        refuse_changes(folder, study)
        said = repair(folder, study, shared=False)
        ledger = Ledger(folder, study.name)
        refuse_other_code(folder, ledger, study)
        said += check_checkpoints(ledger)
        ledger.close()
    except UserError as error:
        check_line(str(error), folder)
        return str(error)
    except OSError as error:  # the command line says its file and reason
        assert error.filename is not None
        assert str(folder) in str(error.filename)
        return f"{error.filename}: {error.strerror}"
    for text in said:
        assert text.isprintable()
        assert len(text) < 900
    over = {t: r for t, r in whole.ledger.trials.items() if Outcome(r["outcome"]).finished}
    named, more = counts(said)
    silent = {t for t, row in over.items() if ledger.trials.get(t) != row} - named
    assert len(silent) <= more or "no whole line" in " ".join(said), f"{silent} would go on otherwise; said: {said}"
    same = {t for t, row in over.items() if ledger.trials.get(t) == row}
    for trial_id in same:
        assert ledger.rows(trial_id) == whole.ledger.rows(trial_id)
    if not read_again:
        return " ".join(said)
    shutil.copy(whole.folder / "manifest.json", folder)  # a resume writes it anew
    again = load(folder).trials
    if not again.equals(whole.results.trials):
        rows = by_trial(again)
        assert {t: rows[t] for t in same} == {t: whole.trials[t] for t in same}
    return " ".join(said)


def check(damage: Damage, seed: int, whole: Whole, place: Path, reports: list[str]) -> str:
    """One damaged folder; returns how it ended: whole, noted or refused."""
    folder = place / f"{damage.__name__}-{seed}"
    shutil.copytree(whole.folder, folder)
    label = damage(folder, random.Random(f"{damage.__name__} {seed}"), whole)
    try:
        ending = "whole"
        try:
            results = load(folder)
        except ResultsError as error:
            check_line(str(error), folder)
            ending = "refused"
            code, _, err = mebm("tables", folder, "--out", place / "tables")
            assert (code, err.count("\n")) == (2, 1), err
        else:
            assert damage is not old_schema
            other = check_loaded(results, whole, damage)
            ending = "noted" if results.notes else ending
            for note in results.notes:
                check_line(note, folder)
            if other:
                build_tables(results)
            if (other or results.notes) and damage in DRAWN and not reports:
                reports.append(label)
                page = report_html(results)
                assert ("Left out or in doubt" in page) is bool(results.notes)
                assert str(folder) not in page
        check_status(folder, whole)
        check_resume(folder, whole, read_again=seed < 2)
    except BaseException as error:
        error.add_note(f"the damage: {label} ({damage.__name__}, seed {seed})")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ending


def test_the_undamaged_study_is_read_as_it_was_written(whole):
    assert whole.results.notes == []
    assert len(whole.trials) == 8
    assert sum(map(len, whole.epochs.values())) == 20
    assert whole.results.signals("tiny", "t0001") is not None
    assert whole.results.sample_grid("tiny", "t0001", "buffer") is not None


@pytest.mark.parametrize(("name", "columns"), [(TABLES[0], TRIAL_COLUMNS), (TABLES[1], EPOCH_COLUMNS)])
def test_a_flipped_bit_of_a_table_is_never_another_number(whole, tmp_path, name, columns):
    raw, was = (whole.folder / name).read_bytes(), read_parquet(whole.folder / name, columns)
    group = pq.ParquetFile(whole.folder / name).metadata.row_group(0)
    parts = [group.column(i) for i in range(group.num_columns)]
    # Of a column without a value little is read, and tables get more of them as they get columns.
    places = [
        part.data_page_offset + i
        for part in parts
        if part.statistics is None or part.statistics.null_count < group.num_rows
        for i in range(part.total_compressed_size)
    ]
    rng, refused = random.Random(0), 0
    for _ in range(150):
        place, bit = rng.choice([p for p in places if p < len(raw) - 8]), rng.randrange(8)
        (tmp_path / name).write_bytes(raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :])
        try:
            assert read_parquet(tmp_path / name, columns).equals(was), f"bit {bit} of byte {place}"
        except ResultsError:
            refused += 1
    assert refused > 75


def test_a_journal_that_lost_the_end_of_a_trial_has_it_from_the_tables_or_is_not_gone_on_with(whole, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(whole.folder, folder)
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    (folder / JOURNAL).write_bytes(b"".join(lines[:-2]))  # the last started, the one before it ended
    cut = (folder / JOURNAL).read_bytes()
    said = repair(folder, load_folder(folder), shared=False)
    assert any("2 trials put back from the tables (t0007, t0008)" in text for text in said)
    assert Ledger(folder, "tiny", writable=False).trials == whole.ledger.trials
    (folder / JOURNAL).write_bytes(cut)
    (folder / TABLES[0]).unlink()  # the attempts know it too
    with pytest.raises(UserError, match="lacks the end of 1 trial"):
        repair(folder, load_folder(folder), shared=False)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_study_is_refused_by_name_or_counted_and_never_wrong(whole, tmp_path, damage):
    reports: list[str] = []
    endings = [check(damage, seed, whole, tmp_path, reports) for seed in range(SEEDS)]
    assert len(endings) == SEEDS
    assert SEEDS * len(DAMAGES) >= 200


FOOTER = """
import random, struct, sys
from pathlib import Path
from analysis.results.messages import ResultsError
from analysis.results.parquet import read_parquet
from trainables.results.schema import TRIAL_COLUMNS

raw, place = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
size, rng = struct.unpack("<I", raw[-8:-4])[0], random.Random(1)
for _ in range(400):
    at = rng.randrange(len(raw) - 8 - size, len(raw) - 8)
    place.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :])
    try:
        read_parquet(place, TRIAL_COLUMNS)
    except ResultsError:
        pass
print("read to the end")
"""


def test_a_damaged_footer_is_an_error_and_not_the_end_of_the_process(whole, tmp_path):
    """pyarrow aborts where a damaged footer is asked for single columns."""
    arguments = [sys.executable, "-c", FOOTER, str(whole.folder / TABLES[0]), str(tmp_path / "t.parquet")]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and ended.stdout == "read to the end\n", ended.stderr[-2000:]
