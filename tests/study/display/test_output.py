"""What happens to a command's standard streams: nothing of it ends a study, and none of it is a traceback."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from study.config.load import validate_study
from study.display import console, output
from study.record.folder import create_folder, load_folder
from study.record.ledger import Ledger
from trainables.methods.presets import build_trial

MEBM = f"{sys.executable} -m study.cli"
HOSTILE = (
    "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x1b]8;;http://evil\x1b\\x\x9b31m‮\u2028\r\nmebm: all is well [bold]b[/] [/nothing]"
)
TRAIN = "train m-ebm --set dataset=digits --set network=conv-8 --set epochs=1 --set iterations_per_epoch=2"


@pytest.fixture
def folder(tiny, tmp_path):
    """A study's folder with two trials, one of which failed with a message that a stranger wrote."""
    made = create_folder(validate_study({**tiny, "description": HOSTILE}, "tiny"), tmp_path)
    ledger = Ledger(made, "tiny")
    ledger.run({"host": "elsewhere.example", "config": load_folder(made).model_dump(mode="json")})
    for trial_id, outcome in (("t0001", "completed"), ("t0002", "failed")):
        ledger.start(trial_id, build_trial({"dataset": "digits", "epochs": 2}), "abcd", 0.0)
        columns = {"outcome": outcome, "cause": None, "iteration": None, "message": HOSTILE, "epochs_done": 0}
        columns |= {"train_seconds": 1.0, "evaluation_seconds": 0.0}
        ledger.report(trial_id, None, columns)
    ledger.close()
    return made


def shell(line, **environment):
    """A line of bash; exit code of its last command, what it wrote to standard output and error."""
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL")}
    done = subprocess.run(
        ["bash", "-c", line], env={**variables, **environment}, capture_output=True, timeout=300, check=False
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr.decode(errors="replace")


@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        ("{mebm} status {folder} | head -1; exit ${{PIPESTATUS[0]}}", 0, ""),
        ("{mebm} methods | true; exit ${{PIPESTATUS[0]}}", 0, ""),
        ("{mebm} status {folder} > /dev/full", 2, "mebm: standard output: No space left on device\n"),
        ("{mebm} status {folder} --json > /dev/full", 2, "mebm: standard output: No space left on device\n"),
        ("{mebm} sweep {folder}/study.yaml -n > /dev/full", 2, "mebm: standard output: No space left on device\n"),
        ("{mebm} --help > /dev/full", 2, "mebm: standard output: No space left on device\n"),
        ("{mebm} status {folder} >&-", 0, ""),
        ("{mebm} status {folder} <&- 2>&- >&-", 0, ""),
        ("{mebm} status {folder}/none 2> /dev/full", 2, ""),
        ("{mebm} status {folder}/none 2>&-", 2, ""),
        ("{mebm} tables --out {folder}/t > /dev/full", 0,
         "mebm: standard output: No space left on device; not all of it was shown\n"),
        ("{mebm} tables --out {folder}/t | true; exit ${{PIPESTATUS[0]}}", 0, ""),
    ],
)  # fmt: skip
def test_an_exit_code_means_what_it_means_whatever_becomes_of_the_output(folder, line, code, error):
    found, _, err = shell(line.format(mebm=MEBM, folder=folder))
    assert (found, err) == (code, error)
    if "tables" in line:
        assert (folder / "t" / "table_1.md").stat().st_size > 500


@pytest.mark.parametrize(
    ("environment", "encoding"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, "latin-1"),
        ({"PYTHONIOENCODING": "ascii:strict"}, "ascii"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "ascii"),
        ({"PYTHONIOENCODING": "utf-16"}, "utf-16"),
        ({}, "utf-8"),
    ],
)
def test_letters_that_cannot_be_shown_are_replaced(folder, environment, encoding):
    code, out, err = shell(f"{MEBM} status {folder}", **environment)
    assert (code, err) == (0, "")
    text = out.decode(encoding)
    assert text.splitlines()[0].split()[:3] == ["trial", "K", "α" if encoding.startswith("utf") else "?"]
    assert json.loads(shell(f"{MEBM} methods --json", **environment)[1].decode(encoding))["protocols"]


def test_no_text_of_a_file_steers_a_terminal_or_makes_a_line_of_its_own(folder):
    code, out, err = shell(f"{MEBM} status {folder}")
    assert code == 0
    lines = out.decode().splitlines()
    assert all(line.isprintable() for line in lines)
    assert not [line for line in lines if line.startswith("mebm:")]
    assert "\\x1b]52" in out.decode()
    for line in (f"{MEBM} status {folder} --json", f"{MEBM} sweep {folder}/study.yaml -n"):
        code, out, err = shell(line)
        assert code == 0, err
        assert all(text.isprintable() for text in out.decode().splitlines())
    _, _, err = shell(f"{MEBM} status $'{folder}/\\x1b[31m\\xff'")
    assert err.rstrip("\n").isprintable()
    assert err.count("\n") == 1


def on_terminal(command, columns, term="xterm"):
    """Runs a command on a terminal of so many columns; returns its exit code and what it wrote."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.pop("TERM", None)
        if term is not None:
            os.environ["TERM"] = term
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.execvp("bash", ["bash", "-c", command])
    shown = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux says so at the end
            break
        if not data:
            break
        shown += data
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.decode()


@pytest.mark.parametrize("columns", [0, 1, 20, 80])
def test_a_terminal_of_any_width_is_steered_by_us_alone(folder, columns):
    code, shown = on_terminal(f"{MEBM} status {folder}", columns)
    assert code == 0
    assert "Traceback" not in shown
    for theirs in ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\x1b[31m", "\u202e"):
        assert theirs not in shown.replace("\x1b[1;31m", "")
    if columns == 80:
        assert "\x1b[" in shown


def test_a_terminal_without_a_name_gets_plain_text(folder):
    code, shown = on_terminal(f"{MEBM} status {folder}", 80, None)
    assert code == 0
    assert "\x1b" not in shown


def test_what_was_scored_is_shown_as_it_stands(capsys):
    row = {"trial_id": "t1\x1b[2J", "model": "[link=http://evil]x[/link]", "epoch": 1, "protocol": "[/]", "samples": 10,
           "metric": "fid", "value": 1.0, "low": None, "remark": "a\nb"}  # fmt: skip
    console.StudyConsole().evaluations([row])
    out = capsys.readouterr().out
    assert "[link=http://evil]x[/link]" in out
    assert all(line.isprintable() for line in out.splitlines())


def test_watching_ends_when_nobody_is_there_any_more(folder):
    # A driver elsewhere that has written just now counts as running, so the watching would go on.
    began = time.monotonic()
    code, _, err = shell(f"{MEBM} status {folder} --watch 0.2 | head -1; exit ${{PIPESTATUS[0]}}")
    assert (code, err) == (0, "")
    assert time.monotonic() - began < 100


SAYS_MUCH = """
import sys
from study.display import output
output.steady_streams()
output.go_on()
for number in range(5000):
    print("x" * 100)
sys.stderr.write(f"{output.end_streams()}\\n")
"""


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        ("sleep 60", "is not read"),
        ("(sleep 1; cat > {file})", "None"),
        ("true", "None"),
        ("tail -c 1 > {file}", "None"),
    ],
)
def test_a_study_waits_for_no_reader(tmp_path, reader, said):
    file = tmp_path / "file"
    program = subprocess.Popen(
        ["bash", "-c", f'{sys.executable} -c "$0" | {reader.format(file=file)}', SAYS_MUCH], stderr=subprocess.PIPE
    )
    try:
        assert program.stderr is not None
        assert said in program.stderr.readline().decode()  # long before a reader that sleeps for a minute has ended
        if said == "None" and "cat" in reader:
            program.wait(60)
            assert file.stat().st_size == 5000 * 101
    finally:
        subprocess.run(["pkill", "-P", str(program.pid)], check=False)
        program.kill()
        program.wait()
        program.stderr.close()


def test_a_disk_with_room_again_gets_the_rest(tmp_path):
    script = f"""
import os, resource, signal, sys
from study.display import output
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
output.steady_streams()
output.go_on()
print("first")
resource.setrlimit(resource.RLIMIT_FSIZE, (6, resource.RLIM_INFINITY))
print("second")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("third")
os._exit(0 if output.end_streams().errno == {27} else 1)
"""
    with (tmp_path / "out").open("wb") as out:
        assert subprocess.run([sys.executable, "-c", script], stdout=out, check=False).returncode == 0
    assert (tmp_path / "out").read_text(encoding="utf-8") == "first\nthird\n"


def test_no_file_gets_the_number_of_a_stream_that_was_closed(tmp_path):
    script = "from study.display import output; output.steady_streams(); f = open(r'{}', 'w'); print('x'); exit(f.fileno() < 3)"
    line = f'{sys.executable} -c "{script.format(tmp_path / "f")}" <&- >&- 2>&-'
    assert shell(line)[0] == 0
    assert (tmp_path / "f").read_bytes() == b""


def test_a_log_that_cannot_be_written_says_nothing():
    script = (
        "import logging; from study.display import output; output.steady_streams(); "
        "logging.getLogger('mebm').addHandler(logging.FileHandler('/dev/full')); logging.getLogger('mebm').error('x')"
    )
    assert shell(f'{sys.executable} -c "{script}"') == (0, b"", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", ["| head -1; exit ${PIPESTATUS[0]}", "> /dev/full", ">&- 2>&-", "2>&1 | true; exit ${PIPESTATUS[0]}"]
)
def test_a_training_goes_on_to_its_end(tmp_path, where):
    code, _, err = shell(f"{MEBM} {TRAIN} --out {tmp_path / 'out'} {where}", OMP_NUM_THREADS="1")
    assert code == 0, err
    assert "Traceback" not in err
    assert "Exception" not in err
    assert (tmp_path / "out" / "checkpoint.pt").is_file()
    assert '"completed"' in (tmp_path / "out" / "ledger.jsonl").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_goes_on_to_its_end(tmp_path, tiny, write_config):
    small = {**tiny, "search": {"sampler": "random", "trials": 1, "space": {"step_size": {"choices": [1.0]}}}}
    path = write_config(small)
    line = f"{MEBM} sweep {path} --results {tmp_path / 'r'} | head -1; exit ${{PIPESTATUS[0]}}"
    code, out, err = shell(line, OMP_NUM_THREADS="1", PYTHONIOENCODING="latin-1")
    assert code == 0, err
    assert out.count(b"\n") == 1
    assert (tmp_path / "r" / "tiny" / "report.html").is_file()


def test_the_streams_of_a_notebook_are_left_to_it(monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr(sys, "stdout", kept := sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    output.steady_streams()
    assert sys.stdout is not kept
    with pytest.raises(TypeError):
        sys.stdout.write(b"bytes")
    assert sys.stdout.write("ä\n") == 2
    output.steady_streams()
    assert not isinstance(sys.stdout._stream, output.Output)
    assert Path(os.devnull).exists()
