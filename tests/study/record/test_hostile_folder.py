"""A folder from a stranger: through the real commands, nothing outside of it is read, written or deleted.

Every test has a canary beside the folder: files and folders that links, pipes' places and names in the folder lead to.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from analysis.figures.models.index import INDEX_FORMAT, read_index
from analysis.report.server import LiveReport, make_server
from analysis.results.load import load
from analysis.results.messages import ResultsError
from analysis.results.parquet import write_parquet
from benchmarks.example import write_example
from study.config.load import validate_study
from study.record.folder import write_study
from study.record.ledger import Ledger
from study.record.manifest import write_manifest
from trainables.methods.presets import build_trial
from trainables.results.layout import JOURNAL
from trainables.results.schema import EPOCH_COLUMNS, TRIAL_COLUMNS

SECRET = "c4nary-5e3d1b"
WAIT = 500


class Outside:
    """The canary: what is beside the folder, and whether it is as it was."""

    def __init__(self, folder: Path, example: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "secret").write_text(SECRET)
        (folder / "secret.yaml").write_text(f"name: {SECRET}\n")
        shutil.copytree(example, folder / "study")
        (folder / "study" / "manifest.json").write_text(
            (example / "manifest.json").read_text().replace('"description": "', f'"description": "{SECRET} ')
        )
        Image.new("RGB", (40, 40), (1, 2, 3)).save(folder / "secret.png")
        (folder / "checkpoint_000000").mkdir()
        (folder / "checkpoint_000000" / "secret").write_text(SECRET)
        self.before = self.now()

    def now(self) -> dict[str, bytes | None]:
        return {
            path.relative_to(self.folder).as_posix(): path.read_bytes() if path.is_file() else None
            for path in sorted(self.folder.rglob("*"))
        }

    def check(self, out: str, err: str, *places: Path) -> None:
        """Nothing was written, deleted or made there, and nothing of it shows in an output."""
        assert self.now() == self.before
        assert "Traceback" not in out + err
        picture = base64.b64encode((self.folder / "secret.png").read_bytes())
        for text in (out.encode(), err.encode(), *self._written(places)):
            assert SECRET.encode() not in text
            assert picture not in text

    @staticmethod
    def _written(places: tuple[Path, ...]) -> list[bytes]:
        found = []
        for place in places:
            for root, _, names in os.walk(place):  # does not follow links
                paths = [Path(root) / name for name in names]
                found += [p.read_bytes() for p in paths if not p.is_symlink() and p.is_file()]
        return found


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A study with signals, and what a driver leaves beside its tables."""
    folder = write_example(tmp_path_factory.mktemp("example") / "tiny")
    for name in ("samples", "models", "tables", "figures", "tune", "tensorboard", "wandb"):
        (folder / name).mkdir(exist_ok=True)
    for trial_id in load(folder).trials["trial_id"][:2]:
        Image.new("RGB", (32, 32), (200, 0, 0)).save(folder / "samples" / f"{trial_id}_buffer.png")
    return folder


@pytest.fixture
def stranger(example, tiny, tmp_path):
    """The folder, with the files of a driver, below a folder of studies."""
    folder = Path(shutil.copytree(example, tmp_path / "results" / "tiny"))
    made = validate_study(tiny, "tiny")
    manifest = (folder / "manifest.json").read_text()
    write_study(folder, made)
    write_manifest(folder, made)
    ledger = Ledger(folder, made.name)
    ledger.run({"driver": "", "config": made.model_dump(mode="json"), "code": {}})
    ledger.close()
    for name in ("trials", "epochs"):
        shutil.copy(example / f"{name}.parquet", folder)
    (folder / "manifest.json").write_text(manifest)
    return folder


@pytest.fixture
def outside(example, tmp_path):
    return Outside(tmp_path / "outside", example)


def commands(folder, out, config):
    """Every command that takes the folder, or makes it, with its outputs in it or elsewhere."""
    yield "report", folder
    yield "report", folder, "--out", out / "r" / "report.html"
    yield "report", folder.parent, "--out", out / "joint" / "report.html"
    yield "tables", folder
    yield "figures", folder, "--kind", "curves"
    yield "figures", folder, "--list"
    yield "recommend", folder
    yield "compare", folder, "--by", "initial"
    yield "detector", folder
    yield "status", folder
    yield "status", folder, "--json"
    yield "resume", folder
    yield "evaluate", folder, "-p", "small-buffer"
    yield "serve", folder, "--port", "0"
    yield "sweep", config, "--results", folder.parent


FILES = (
    "manifest.json", "trials.parquet", "epochs.parquet", "attempts.parquet", JOURNAL, "study.yaml", "optuna.db",
    "optuna.db-journal", "study.log", ".driver.lock", "report.html", "evaluations.parquet", "bench.parquet",
    "loggers.json", "mlflow.db", ".report.html.tmp", "manifest.part", "tables/table_1.md", "tables/.table_1.md.tmp",
    "figures/figures.json", "figures/plotly.min.js", "samples/s000-0_buffer.png", "signals/s000-0.parquet",
    "models/t0001.pt", "tune/run-001/t0001/checkpoint_000000/trial.pt", "wandb/debug.log",
)  # fmt: skip
FOLDERS = ("tables", "figures", "samples", "signals", "models", "tune", "tune/run-001", "tensorboard", "wandb")


def plant(folder, name, target):
    place = folder / name
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


@pytest.mark.parametrize(
    ("name", "kind"), list(zip(FILES, itertools.cycle(["absolute", "relative", "twice", "missing"]), strict=False))
)
def test_a_file_that_is_a_link_out_is_followed_by_no_command(
    stranger, outside, mebm, write_config, tiny, tmp_path, name, kind
):
    target = outside.folder / "study" / name
    if not target.exists():
        target = outside.folder / ("secret.yaml" if name.endswith(".yaml") else "secret")
    if kind == "missing":
        target = outside.folder / "not there"
    if kind == "relative":
        target = Path(os.path.relpath(target, (stranger / name).parent))
    if kind == "twice":
        (stranger / "link").symlink_to(target)
        target = stranger / "link"
    plant(stranger, name, target)
    run_all(stranger, outside, mebm, write_config(tiny), tmp_path)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_a_link_out_is_entered_by_no_command(
    stranger, outside, mebm, write_config, tiny, tmp_path, name
):
    target = outside.folder / "study" / name
    plant(stranger, name, target if target.exists() else outside.folder)
    run_all(stranger, outside, mebm, write_config(tiny), tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", JOURNAL, ".driver.lock", "figures/figures.json", "signals/x", "x"])
def test_no_command_waits_for_a_pipe(stranger, outside, mebm, write_config, tiny, tmp_path, name):
    (stranger / name).unlink(missing_ok=True)
    os.mkfifo(stranger / name)
    run_all(stranger, outside, mebm, write_config(tiny), tmp_path, "is a pipe")


def run_all(folder, outside, mebm, config, tmp_path, word="leads out of"):
    for arguments in commands(folder, tmp_path / "out", config):
        code, out, err = mebm(*arguments)
        assert code == 2, (arguments, out, err)
        assert err.count("\n") == 1, (arguments, err)
        assert word in err, arguments
        outside.check(out, err, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_that_stays_in_the_folder_is_one_of_its_files(stranger, mebm):
    (stranger / "signals").rename(stranger / "kept")
    (stranger / "signals").symlink_to("kept")
    code, out, err = mebm("detector", stranger)
    assert (code, err) == (0, "")
    assert "signals" not in err + out


def test_a_study_beside_that_is_a_link_out_is_refused_and_others_are_not_looked_through(
    stranger, outside, mebm, tmp_path
):
    """What holds no study is neither read nor written: a virtual environment with links out may lie there."""
    (stranger.parent / "venv").mkdir()
    (stranger.parent / "venv" / "python").symlink_to(sys.executable)
    assert mebm("report", stranger.parent, "--out", tmp_path / "out.html")[::2] == (0, "")
    (stranger.parent / "other").symlink_to(outside.folder / "study")
    code, out, err = mebm("report", stranger.parent, "--out", tmp_path / "out.html")
    assert code == 2
    assert "other: leads out of" in err
    outside.check(out, err, stranger.parent)


def test_logs_of_weights_and_biases_lead_out_and_are_left_alone(stranger, outside, mebm):
    """Its runs hold a link to a log in the user's cache: the study is read all the same."""
    (stranger / "wandb" / "run-1" / "logs").mkdir(parents=True)
    (stranger / "wandb" / "run-1" / "logs" / "debug-core.log").symlink_to(outside.folder / "secret")
    code, out, err = mebm("report", stranger)
    assert (code, err) == (0, "")
    outside.check(out, err, stranger)


# ------------------------------------------------------------------------------------------------- places of outputs


@pytest.mark.parametrize("command", ["report", "tables"])
def test_links_at_the_places_of_an_output_are_replaced_and_not_followed(stranger, outside, mebm, tmp_path, command):
    """Names of old temporary files too: `.report.html.tmp` was written through."""
    out = tmp_path / "out"
    out.mkdir()
    target = out / "report.html" if command == "report" else out
    names = (
        ["report.html"] if command == "report" else [f"table_1.{s}" for s in ("md", "tex", "csv", "html", "parquet")]
    )
    for name in (*names, *(f".{name}.tmp" for name in names), *(f".{name}.{os.getpid()}.tmp" for name in names)):
        (out / name).symlink_to(outside.folder / "secret")
    code, printed, err = mebm(command, stranger, "--out", target)
    assert (code, err) == (0, "")
    assert not any((out / name).is_symlink() for name in names)
    outside.check(printed, err, stranger, out)


@pytest.mark.parametrize("name", ["figures.json", "curves.html", "plotly.min.js", "sub/x", "survival.parquet"])
def test_a_folder_of_figures_with_a_link_out_is_refused(stranger, outside, mebm, tmp_path, name):
    out = tmp_path / "out"
    plant(out, name, outside.folder / "secret")
    code, printed, err = mebm("figures", stranger, "--kind", "curves", "--out", out)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{name}: leads out of" in err
    outside.check(printed, err, out)


def test_figures_of_several_studies_beside_a_report_are_not_taken_from_elsewhere(stranger, outside, mebm, tmp_path):
    other = shutil.copytree(outside.folder / "study", tmp_path / "results" / "other")
    manifest = (other / "manifest.json").read_text().replace(SECRET, "").replace('"study": "example"', '"study": "b"')
    (other / "manifest.json").write_text(manifest)
    for file, columns in (("trials.parquet", TRIAL_COLUMNS), ("epochs.parquet", EPOCH_COLUMNS)):
        frame = pd.read_parquet(other / file)
        write_parquet(frame.assign(trial_id="b" + frame["trial_id"]), columns, other / file)
    out = tmp_path / "out"
    out.mkdir()
    (out / "figures").symlink_to(outside.folder)
    code, printed, err = mebm("report", stranger, other, "--out", out / "report.html")
    assert code == 2
    assert "figures: leads out of" in err
    outside.check(printed, err, out)


@pytest.mark.parametrize("name", ["bench.parquet", "bench.json", "profile.json"])
def test_bench_reads_no_rows_of_elsewhere(outside, mebm, tmp_path, name):
    plant(tmp_path / "bench", name, outside.folder / "secret")
    code, out, err = mebm("bench", "--out", tmp_path / "bench", "--methods", "m-ebm:2", "--device", "cpu")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{name}: leads out of" in err
    outside.check(out, err, tmp_path / "bench")
    code, out, err = mebm("plan", "quickstart", "--bench", tmp_path / "bench")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no bench.parquet in it" in err
    outside.check(out, err)


# --------------------------------------------------------------------------------------------------- names in files


def write_index(folder, **fields):
    """An index of one figure, and the files that an honest one has."""
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(figures / "own.png")
    exhibit = {
        "kind": "curves", "drawing": "pictures", "title": "t", "caption": "c", "key": "", "data": "curves.parquet",
        "pictures": [{"file": "own.png", "label": "l"}], "page": None, **fields,
    }  # fmt: skip
    (figures / "figures.json").write_text(json.dumps({"format": INDEX_FORMAT, "exhibits": [exhibit]}))
    return figures


def test_an_honest_index_is_shown_and_replaced(stranger, mebm):
    figures = write_index(stranger)
    assert mebm("report", stranger)[::2] == (0, "")
    assert base64.b64encode((figures / "own.png").read_bytes()) in (stranger / "report.html").read_bytes()
    assert mebm("figures", stranger, "--kind", "curves")[::2] == (0, "")
    assert not (figures / "own.png").exists()


NAMES = (
    "../../../outside/secret{}", "{outside}/secret{}", "sub/../../../../outside/secret{}", "../trials{}",
    "..\\..\\secret{}", "/etc/hostname", "own.png\0{}", "\ud800{}", "", ".", "..", "{}", 3, ["own.png"], {},
    "a" * 5000 + "{}", "own.png/../own{}", "~/x{}\n",
)  # fmt: skip
PLACES = {"picture": ".png", "detail": ".png", "page": ".html", "data": ".parquet"}


def write_named(folder, outside, place, name):
    """An index that names such a file at a place."""
    if isinstance(name, str):
        name = name.replace("{outside}", str(outside.folder)).replace("{}", PLACES[place])
    picture = {"file": name, "label": "l", "detail": place == "detail"}
    fields = {"pictures": [picture]} if place in ("picture", "detail") else {place: name, "pictures": []}
    write_index(folder, **fields, **({"drawing": "tsne", "kind": "tsne"} if place == "data" else {}))


@pytest.mark.parametrize("place", PLACES)
def test_no_name_in_the_index_is_taken_that_is_no_file_of_a_figure(stranger, outside, place):
    for name in (*NAMES, *([None] if place != "page" else [])):
        write_named(stranger, outside, place, name)
        with pytest.raises(ResultsError, match=r"figures\.json") as error:
            read_index(stranger / "figures")
        assert len(str(error.value)) < 600, name


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES[:3], ids=range(3))
def test_a_name_in_the_index_deletes_and_shows_no_file_elsewhere(stranger, outside, mebm, place, name):
    for kind in ("html", "json", "svg", "pdf"):
        (outside.folder / f"secret.{kind}").write_text(SECRET)
    shutil.copy(outside.folder / "study" / "trials.parquet", outside.folder / "secret.parquet")
    outside.before = outside.now()
    write_named(stranger, outside, place, name)
    for arguments in (("report", stranger), ("figures", stranger, "--kind", "curves")):
        code, out, err = mebm(*arguments)
        assert (code, err.count("\n")) == (2, 1), (arguments, err)
        assert "figures.json" in err
        outside.check(out, err, stranger)
    assert (stranger / "trials.parquet").is_file()


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "x"}, {"drawing": "x"}, {"kind": []}, {"title": 3}, {"pictures": 3}, {"pictures": [3]},
        {"pictures": {"file": "x"}}, {"key": None}, {"unknown": 1}, {"page": "own.png"}, {"data": "own.png"},
        {"pictures": [{"file": "figures.json", "label": ""}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_index_is_one_line(stranger, mebm, fields):
    write_index(stranger, **fields)
    code, _, err = mebm("figures", stranger, "--kind", "curves")
    assert (code, err.count("\n")) == (2, 1), err
    assert "figures.json: damaged" in err


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "null", "[]", '{"format": 1}', '{"format": 2, "exhibits": []}'])
def test_an_index_that_is_none_is_refused(stranger, text):
    (stranger / "figures" / "figures.json").write_text(text)
    with pytest.raises(ResultsError, match=r"figures\.json"):
        read_index(stranger / "figures")


IDS = ("../../../outside/secret", "..", ".", "{outside}/secret", "a/../../../../outside/secret", "x\\y", "a" * 3000)


@pytest.mark.slow
@pytest.mark.parametrize("trial_id", IDS, ids=range(len(IDS)))
def test_an_id_of_a_trial_reads_and_writes_no_file_elsewhere(stranger, outside, mebm, tmp_path, trial_id):
    trial_id = trial_id.replace("{outside}", str(outside.folder))
    signals = next((stranger / "signals").glob("*.parquet"))
    shutil.copy(signals, outside.folder / "secret.parquet")
    for kind in ("buffer", "fresh", "end"):
        shutil.copy(outside.folder / "secret.png", outside.folder / f"secret_{kind}.png")
    shutil.copy(outside.folder / "secret", outside.folder / "secret.pt")
    outside.before = outside.now()
    trials = pd.read_parquet(stranger / "trials.parquet")
    first = trials["trial_id"][0]
    trials.loc[trials["trial_id"] == first, "trial_id"] = trial_id
    write_parquet(trials, TRIAL_COLUMNS, stranger / "trials.parquet")
    for arguments in (
        ("report", stranger), ("tables", stranger), ("figures", stranger), ("detector", stranger),
        ("replay", stranger, "--orders", "2", "--set", "divergence.gap_limit=1"),
        ("figures", stranger, "--kind", "samples", "--trials", trial_id), ("recommend", stranger),
        ("evaluate", stranger, "-p", "small-buffer"), ("status", stranger),
    ):  # fmt: skip
        code, out, err = mebm(*arguments)
        assert code in (0, 2), arguments
        assert err.count("\n") == (1 if code else 0), (arguments, err)
        outside.check(out, err, stranger)
    beside = {p.name for p in tmp_path.iterdir()}
    assert beside == {"results", "outside"}
    assert {p.name for p in (tmp_path / "results").iterdir()} == {"tiny"}


# ------------------------------------------------------------------------------------------------------ trained models


@pytest.fixture(scope="module")
def trained(run_mebm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "one"
    fields = ("epochs=1", "iterations_per_epoch=6", "batch_size=32", "buffer_size=100", "sampling_steps=1",
              "device=cpu", "evaluation.protocols=none")  # fmt: skip
    code, out, err = run_mebm("train", "m-ebm", *(p for f in fields for p in ("--set", f)), "--out", folder)
    assert (code, err) == (0, ""), out
    return folder


@pytest.mark.parametrize("trial_id", ["..", ".", "...", ".hidden"])
def test_an_id_makes_no_folder_of_figures_elsewhere(trained, mebm, tmp_path, trial_id):
    """`...pt` in `models` is the model of a trial called `..`, whose pictures went into the folder above."""
    folder = Path(shutil.copytree(trained, tmp_path / "study"))
    trials = pd.read_parquet(folder / "trials.parquet")
    write_parquet(trials.assign(trial_id=trial_id), TRIAL_COLUMNS, folder / "trials.parquet")
    (folder / "models" / "t0001.pt").rename(folder / "models" / f"{trial_id}.pt")
    code, out, err = mebm("figures", folder, "--kind", "samples", "--out", tmp_path / "deep" / "out")
    assert (code, err) == (0, ""), out
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    exhibit = read_index(tmp_path / "deep" / "out")[0]
    assert all((tmp_path / "deep" / "out" / file).is_file() for file in exhibit.files)
    assert not any(file.startswith(".") for file in exhibit.files)


TAKES = {
    "models/t0001.pt": ("evaluate folder", "evaluate model", "sample model", "sample models", "figures folder"),
    "models": ("evaluate folder", "evaluate model", "sample model", "figures folder"),
    "evaluations.parquet": ("evaluate folder", "evaluate model"),
    "checkpoint.pt": ("evaluate folder", "sample folder"),
}
"""What is linked, and the commands that would read it."""


@pytest.mark.parametrize("name", TAKES)
def test_models_and_scores_are_not_taken_from_elsewhere(trained, outside, mebm, tmp_path, name):
    folder = Path(shutil.copytree(trained, tmp_path / "study"))
    shutil.copytree(trained / "models", outside.folder / "models")
    shutil.copy(trained / "models" / "t0001.pt", outside.folder / "checkpoint.pt")
    outside.before = outside.now()
    plant(folder, name, outside.folder / name)
    places = {"folder": folder, "models": folder / "models", "model": folder / "models" / "t0001.pt"}
    options = {"evaluate": ("-p", "small-buffer"), "figures": ("--kind", "samples")}
    options["sample"] = ("--out", tmp_path / "grid.png")
    for words in TAKES[name]:
        command, place = words.split()
        code, out, err = mebm(command, places[place], *options[command])
        assert (code, err.count("\n")) == (2, 1), (words, err)
        assert "leads out of" in err
        outside.check(out, err, folder)
    assert not (tmp_path / "grid.png").exists()


# -------------------------------------------------------------------------------------------------------------- caches


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.slow
def test_a_cache_with_planted_files_executes_nothing_and_is_not_followed(tmp_path):
    """In a place that others can write to: links at the names of its files, pickles behind them, links at its locks."""
    cache, marker, victim = tmp_path / "cache", tmp_path / "executed", tmp_path / "victim"

    def train(name):
        fields = ("epochs=1", "iterations_per_epoch=6", "batch_size=32", "buffer_size=100", "device=cpu",
                  "evaluation.fresh_steps=1")  # fmt: skip
        return subprocess.run(
            [Path(sys.executable).with_name("mebm"), "train", "m-ebm", "--out", tmp_path / name,
             *(p for f in fields for p in ("--set", f))],
            env={**os.environ, "MEBM_CACHE": str(cache), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=WAIT,
        )  # fmt: skip

    assert train("first").returncode == 0
    files = sorted(p for p in cache.rglob("*") if p.is_file() and p.suffix in (".pt", ".npz", ".json", ".images"))
    assert len(files) >= 2
    bomb = pickle.dumps(Bomb(marker))
    victim.write_bytes(bomb)
    for file in files:
        file.unlink()
        file.symlink_to(victim)
    found = train("second")
    assert found.returncode == 0, found.stderr
    assert not marker.exists()
    assert victim.read_bytes() == bomb
    assert not any(file.is_symlink() for file in files)
    locks = sorted(cache.rglob("*.lock"))
    for file in (*files, *locks):
        file.unlink(missing_ok=True)
    for file in files:
        Path(f"{file}.lock").symlink_to(victim)
    found = train("third")
    assert "Traceback" not in found.stderr
    assert victim.read_bytes() == bomb


# --------------------------------------------------------------------------------------------------------------- serve


def ask(port, target, host):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_serve_has_two_pages_and_follows_no_path_and_no_link(stranger, outside, capfd):
    server = make_server(LiveReport(stranger), 0)
    port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        own = f"127.0.0.1:{port}"
        assert b" 200 " in ask(port, "/version", own).partition(b"\r\n")[0]
        for target in (
            "/../outside/secret", "/..%2foutside%2fsecret", "/%2e%2e/outside/secret", f"/{outside.folder}/secret",
            f"{outside.folder}/secret", "/figures/figures.json", "//outside/secret", "/manifest.json", "\\outside",
            f"file://{outside.folder}/secret", "/version/../../outside/secret", "*", "/\0",
        ):  # fmt: skip
            answer = ask(port, target, own)
            assert answer.split(b" ")[1] in (b"404", b"400"), target
            assert SECRET.encode() not in answer
        for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil:{port}", "", f"[::1]:{port}"):
            assert ask(port, "/", host).split(b" ")[1] == b"403", host
        (stranger / "figures" / "x.png").symlink_to(outside.folder / "secret.png")  # while it is served
        answer = ask(port, "/", own)
        assert answer.split(b" ")[1] == b"503"
        assert b"leads out of" in answer
        with socket.create_connection(("127.0.0.1", port)) as connection:  # one that leaves at once
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(f"GET / HTTP/1.1\r\nHost: {own}\r\n\r\n".encode())
        assert b" 200 " not in ask(port, "/", own).partition(b"\r\n")[0]
    finally:
        server.shutdown()
        server.server_close()
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    outside.check(out, err, stranger)


# ----------------------------------------------------------------------------------------------------- what a kill left


def test_a_study_that_goes_on_removes_what_killed_writers_left(tiny, mebm, tmp_path):
    """Of its own folder, under its lock; here it ends before a trial, because the images are gone."""
    tiny["trial"]["dataset"], tiny["trial"]["data_dir"] = "mine", str(tmp_path / "gone")
    made = validate_study(tiny, "tiny")
    folder = tmp_path / "tiny"
    folder.mkdir()
    write_study(folder, made)
    write_manifest(folder, made)
    Ledger(folder, made.name).close()
    left = [folder / ".trials.parquet.0a1b2c3d4e5f.part", folder / "models" / ".t0001.pt.0a1b2c3d4e5f.part"]
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    (folder / "notes.part").write_text("kept")
    code, _, err = mebm("resume", folder)
    assert (code, err.count("\n")) == (2, 1), err
    assert "gone" in err
    assert not any(path.exists() for path in left)
    assert (folder / "notes.part").read_text() == "kept"


def test_the_recorder_of_a_trial_has_no_file_elsewhere(tmp_path):
    from trainables.results.files import UnsafePathError
    from trainables.trial.recorder import Recorder

    for trial_id in ("../x", "/x", "", "a/../b", "x\0"):
        with pytest.raises(UnsafePathError):
            Recorder(tmp_path / "study", trial_id)
    assert Recorder(tmp_path / "study", build_trial({"dataset": "digits"}).method).signals_path.parent.name == "signals"
