"""What a study exposes, and what the files of somebody else's study can do to whoever looks at them: nothing."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from ray.tune.experiment import Trial as RayTrial

import analysis
import mebm
import study
import trainables
from study.config.errors import UserError
from study.config.load import validate_study
from study.record.folder import create_folder
from study.record.ledger import Ledger
from study.record.manifest import write_manifest
from study.run.callback import LedgerCallback
from trainables.methods.presets import build_trial
from trainables.results.layout import JOURNAL
from trainables.results.schema import Outcome

CONFIG = build_trial({"dataset": "digits", "epochs": 2})
PACKAGES = [Path(package.__file__).parent for package in (analysis, mebm, study, trainables)]
WAIT = 500


def values(outcome="completed", **others):
    return {
        "outcome": outcome, "cause": None, "iteration": None, "message": None, "epochs_done": 2, "iterations_done": 24,
        "iterations_planned": 24, "iterations_per_epoch": 12, "train_seconds": 2.0, "evaluation_seconds": 1.0, **others,
    }  # fmt: skip


def row(epoch):
    return {"epoch": epoch, "iteration": 12 * epoch, "train_seconds": 1.0, "evaluation_seconds": 0.5}


@pytest.fixture
def begun(tiny, tmp_path):
    """A study's folder and its ledger, without anything in it."""
    made = validate_study({**tiny, "description": "<img src=x onerror=alert(1)>"}, "tiny")
    folder = create_folder(made, tmp_path / "results")
    write_manifest(folder, made)
    ledger = Ledger(folder, made.name)
    ledger.run({"driver": "", "config": made.model_dump(mode="json"), "code": {}})
    return folder, ledger


# --------------------------------------------------------------------------------------------------------- network


def process_tree(root):
    children = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, left = [], [root]
    while left:
        pid = left.pop()
        found.append(pid)
        left += children.get(pid, [])
    return found


def address(text):
    """The address of a line of /proc/net/tcp or tcp6: hexadecimal words in this machine's byte order."""
    raw = bytes.fromhex(text.partition(":")[0])
    words = struct.unpack(f"={len(raw) // 4}I", raw)
    packed = struct.pack(f"!{len(words)}I", *words) if sys.byteorder == "little" else raw
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def listening(pid):
    """Addresses a process listens on."""
    sockets, found = set(), set()
    try:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(file.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                sockets.add(target[len("socket:[") : -1])
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in sockets:
                    found.add(address(fields[1]))
    except OSError:
        pass  # it has just ended
    return found


def test_the_listing_of_sockets_sees_what_listens():
    with socket.socket() as one, socket.socket(socket.AF_INET6) as two:
        before = listening(os.getpid())
        one.bind(("127.0.0.1", 0))
        one.listen()
        two.bind(("::", 0))
        two.listen()
        assert listening(os.getpid()) - before <= {"127.0.0.1", "::"}
        assert {"127.0.0.1", "::"} <= listening(os.getpid())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")
def test_a_study_on_this_machine_listens_on_no_other_interface(tiny, write_config, tmp_path):
    """Ray executes whatever it is sent: nobody on the network may reach it, while trials run and before."""
    tiny["search"] = {"sampler": "grid", "grid": [{"initial": "gaussian"}]}
    tiny["trial"]["epochs"] = 10_000
    process = subprocess.Popen(
        [Path(sys.executable).with_name("mebm"), "sweep", write_config(tiny), "--results", tmp_path],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    journal, seen = tmp_path / "tiny" / JOURNAL, {}
    try:
        until = time.monotonic() + WAIT
        while time.monotonic() < until and process.poll() is None:
            for pid in process_tree(process.pid):
                if found := listening(pid):
                    seen.setdefault(pid, set()).update(found)
            if journal.exists() and b'"event": "report"' in journal.read_bytes():
                break
            time.sleep(0.2)
        else:
            pytest.fail(f"no trial reported:\n{process.stdout.read() if process.poll() is not None else ''}")
    finally:
        process.terminate()
        try:
            process.communicate(timeout=WAIT)
        finally:
            process.kill()
    assert len(seen) >= 3, "Ray's server, its node and a worker"
    loopback = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert set().union(*seen.values()) <= loopback


# ------------------------------------------------------------------------------------------------------ source code

UNSAFE = {
    "eval", "exec", "pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "dill.load", "joblib.load",
    "marshal.loads", "shelve.open", "pd.read_pickle", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "os.system", "os.popen", "tempfile.mktemp", "torch.jit.load",
}  # fmt: skip
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "_pickle"}


def sources():
    return [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]


def calls(tree):
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def findings(text, name="x.py"):
    """What of a source file reads code as data, or data as code."""
    tree, found = ast.parse(text), []
    for function, call in calls(tree):
        keywords = {k.arg: k.value for k in call.keywords}
        if function in UNSAFE:
            found.append(f"{name}:{call.lineno} {function}")
        if function == "torch.load":
            flag = keywords.get("weights_only")
            if not (isinstance(flag, ast.Constant) and flag.value is True):
                found.append(f"{name}:{call.lineno} torch.load without weights_only=True")
        for danger in ("allow_pickle", "shell", "trust_remote_code"):
            flag = keywords.get(danger)
            if flag is not None and not (isinstance(flag, ast.Constant) and flag.value is False):
                found.append(f"{name}:{call.lineno} {danger}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
            found.append(f"{name}:{node.lineno} from torch import load")
    return found


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)", "yaml.load(text, yaml.Loader)", "pickle.load(file)", "eval(text)",
        "subprocess.run(text, shell=True)", "from torch import load",
    ],
)  # fmt: skip
def test_the_scan_finds_what_it_looks_for(text):
    assert findings(text)


def test_nothing_reads_data_as_code():
    assert len(sources()) > 60
    found = [f for path in sources() for f in findings(path.read_text(encoding="utf-8"), path.name)]
    # An extractor's TorchScript is code, and is trusted like any other: `check_trusted` stands before it.
    assert [(f.partition(":")[0], f.partition(" ")[2]) for f in found] == [("own_features.py", "torch.jit.load")]
    source = next(p for p in sources() if p.name == "own_features.py").read_text(encoding="utf-8")
    body = source[source.index("def _torchscript") :]
    assert body.index("check_trusted(") < body.index("torch.jit.load(")


def test_pickles_are_read_in_one_place_that_takes_arrays_only():
    importing = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                if name.split(".")[0] in PICKLES:
                    importing.setdefault(str(path.relative_to(PACKAGES[0].parent)), set()).add(name)
    assert set(importing) == {"trainables/data/readers/batches.py"}
    from trainables.data.readers import batches

    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("never",)

    with pytest.raises(pickle.UnpicklingError, match="only NumPy arrays"):
        batches._ArraysOnly(io.BytesIO(pickle.dumps(Bomb()))).load()


# ------------------------------------------------------------------------------------------------------ names, paths


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/tmp/x", "..", ".", ".hidden", "", "a b", "x\n", "a\\b", "é", "<b>", "x\x00", "-rf", "~x"]
)
def test_a_studys_name_is_one_plain_folder(tiny, write_config, mebm, tmp_path, name):
    with pytest.raises(UserError, match="name"):
        validate_study({**tiny, "name": name}, "test")
    code, _, err = mebm("sweep", write_config({**tiny, "name": name}), "--results", tmp_path / "results")
    assert code == 2
    assert err.count("\n") == 1
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "x").exists()


@pytest.fixture
def victim(tmp_path):
    """A folder beside the study's that none of its files may touch."""
    folder = tmp_path / "victim" / "checkpoint_000000"
    folder.mkdir(parents=True)
    (folder / "precious").write_text("mine", encoding="utf-8")
    return folder


@pytest.mark.parametrize("path", ["../../victim/checkpoint_000000", "tune/../../../victim/checkpoint_000000"])
def test_a_journal_whose_checkpoint_is_outside_of_the_folder_is_refused(begun, victim, mebm, path):
    folder, ledger = begun
    ledger.start("t0001", CONFIG, "abcd", 0.0)
    ledger._write({"event": "checkpoint", "trial_id": "t0001", "path": path, "at": "now"})
    ledger.close()
    with pytest.raises(UserError, match=r"checkpoint .* of t0001 is outside of the folder"):
        Ledger(folder, "tiny", writable=False).checkpoint_folders("t0001")
    code, _, err = mebm("resume", folder, "--accept-changes")
    assert code == 2
    assert err.count("\n") == 1
    assert "t0001 is outside of the folder" in err
    assert (victim / "precious").read_text() == "mine"


def test_a_link_in_the_folder_leads_no_checkpoint_out_of_it(begun, victim):
    folder, ledger = begun
    (folder / "tune").mkdir()
    (folder / "tune" / "run-001").symlink_to(victim.parent)
    ledger.start("t0001", CONFIG, "abcd", 0.0)
    ledger._write({"event": "checkpoint", "trial_id": "t0001", "path": "tune/run-001/checkpoint_000000", "at": "now"})
    with pytest.raises(UserError, match="outside of the folder"):
        ledger.checkpoint_folders("t0001")


@pytest.mark.parametrize(
    "path", ["../../victim/checkpoint_000000", "tune/../../../victim/checkpoint_000000", "/{}", ".", "tune/.."]
)
def test_deleting_checkpoints_stays_in_the_folder(begun, victim, path):
    """The checkpoints of a trial that is over are deleted; a journal must not name others' folders there."""
    folder, ledger = begun
    ledger.start("t0001", CONFIG, "abcd", 0.0)
    ledger._write({"event": "checkpoint", "trial_id": "t0001", "path": path.format(victim), "at": "now"})
    ledger.report("t0001", row(2), values())
    assert ledger.outcome("t0001") is Outcome.COMPLETED
    callback = LedgerCallback(ledger, None, 0.0)
    callback.on_trial_complete(1, [], RayTrial("x", config={"trial_id": "t0001"}, stub=True))
    assert (victim / "precious").read_text() == "mine"
    assert (folder / JOURNAL).is_file()
    assert (folder / "study.yaml").is_file()


# -------------------------------------------------------------------------------------------------- hostile folders

SCRIPT = "<script>alert(document.domain)</script>"


class Bomb:
    """Creates a file where it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def hostile(begun, tmp_path):
    """A study whose every file was made by somebody who means harm; and what must not come into being."""
    folder, ledger = begun
    marker = tmp_path / "executed"
    for trial_id in ("t0001", "../../outside", f"x{SCRIPT}"):
        ledger.start(trial_id, CONFIG, "abcd", 0.0)
        outcome = "failed" if trial_id == "t0001" else "completed"
        ledger.report(trial_id, row(0), values("running"))
        ledger.report(trial_id, row(2), values(outcome, message=SCRIPT, device=SCRIPT, hardware=SCRIPT))
    ledger.close()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"study": f"tiny{SCRIPT}", "description": SCRIPT, "commit": SCRIPT, "varied": [SCRIPT]}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    bomb = pickle.dumps(Bomb(marker))
    for name in ("models/t0001.pt", "models/t0001_best.pt", "tune/run-001/tuner.pkl", "samples/t0001_buffer.png",
                 "signals/t0001.parquet"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bomb)
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / "results" / "outside_buffer.png")
    return folder, marker


def page_text(path):
    """The page without the plotting library."""
    page = path.read_text(encoding="utf-8")
    before, start, rest = page.partition('<script type="text/plain" id="plotly">')
    assert start
    return before + rest.partition("</script>")[2]


@pytest.mark.parametrize("command", ["status", "report", "tables"])
def test_looking_at_a_hostile_folder_executes_nothing(hostile, mebm, tmp_path, command):
    folder, marker = hostile
    code, out, err = mebm(command, folder, *([] if command == "status" else ["--out", tmp_path / "out.html"]))
    assert code in (0, 2)
    assert "Traceback" not in out + err
    assert code == 0 or err.count("\n") == 1
    assert not marker.exists()


def test_names_and_messages_of_a_study_are_text_in_the_report(hostile, mebm, tmp_path):
    import base64

    folder, _ = hostile
    for name in ("samples/t0001_buffer.png", "signals/t0001.parquet"):
        (folder / name).unlink()
    code, _, err = mebm("report", folder, "--out", tmp_path / "report.html")
    assert (code, err) == (0, "")
    page = page_text(tmp_path / "report.html")
    assert "alert(document.domain)" in page  # it is shown
    assert SCRIPT not in page
    assert "<img src=x" not in page
    outside = (tmp_path / "results" / "outside_buffer.png").read_bytes()
    assert base64.b64encode(outside).decode() not in page  # a trial's id reads no picture elsewhere


@pytest.mark.parametrize("file", ["study.yaml", "manifest.json"])
@pytest.mark.parametrize("command", ["status", "report", "tables", "resume"])
def test_yaml_with_objects_in_it_makes_none(begun, mebm, tmp_path, file, command):
    folder, ledger = begun
    ledger.close()
    shutil.copy(folder / "study.yaml", tmp_path / "kept.yaml")
    marker = tmp_path / "executed"
    (folder / file).write_text(f"!!python/object/apply:os.mkdir ['{marker}']\n", encoding="utf-8")
    (folder / JOURNAL).unlink()
    if file == "study.yaml":
        (folder / "manifest.json").unlink()
    options = {"status": [], "resume": []}.get(command, ["--out", tmp_path / "out"])
    if command == "resume" and file == "manifest.json":
        return  # written anew; see the tests of damaged folders
    code, out, err = mebm(command, folder, *options)
    assert not marker.exists()
    assert code in (0, 2)
    assert "Traceback" not in out + err


def test_a_config_with_objects_in_it_is_a_mistake(mebm, write_config, tmp_path):
    marker = tmp_path / "executed"
    text = f"name: x\ntrial: !!python/object/apply:os.mkdir ['{marker}']\n"
    for arguments in (
        ["sweep", write_config(text), "--results", tmp_path / "results"],
        ["sweep", "quickstart", "--dry-run", "--set", f"trial.epochs=!!python/object/apply:os.mkdir ['{marker}']"],
    ):
        code, _, err = mebm(*arguments)
        assert code == 2
        assert err.count("\n") == 1
        assert not marker.exists()


def test_a_model_with_code_in_it_is_refused(tmp_path, mebm):
    marker = tmp_path / "executed"
    (tmp_path / "models").mkdir()
    model = tmp_path / "models" / "t0001.pt"
    model.write_bytes(pickle.dumps(Bomb(marker)))
    code, out, err = mebm("sample", model, "--out", tmp_path / "grid.png")
    assert code == 2
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert not marker.exists()
