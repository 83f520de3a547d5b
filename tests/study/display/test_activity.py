"""The line that says what a command is at: when it is drawn, what it says, and that it leaves nothing behind."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from study.display.activity import Activity, work_text
from trainables.results.progress import counted, listening, note


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def shown():
    clock, drawn = Clock(), []
    return Activity(drawn.append, clock), clock, drawn


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("starting Ray", 0, None, 12.4), "starting Ray, 12s"),
        (("evaluating fresh chains", 0, 10_000, 30.0), "evaluating 0/10,000 fresh chains"),
        (("evaluating fresh chains", 3200, 10_000, 18.8), "evaluating 3,200/10,000 fresh chains, 40s left"),
        (("evaluating fresh chains", 10_000, 10_000, 60.0), "evaluating 10,000/10,000 fresh chains"),
    ],
)
def test_work_in_words(arguments, text):
    assert work_text(*arguments) == text


def test_the_line_comes_after_a_silence_and_goes_before_anything_else(shown):
    activity, clock, drawn = shown
    activity.tick()
    assert drawn == []
    clock.now = 2.0
    activity.work.take("reading results/x")
    activity.tick()
    activity.tick()
    assert len(drawn) == 1 and "reading results/x, 0s" in drawn[0]
    clock.now = 3.0
    activity.tick()
    assert "reading results/x, 1s" in drawn[-1]
    activity.touched("a line\n")
    assert drawn[-1] == "\r\x1b[K"
    activity.tick()
    assert drawn[-1] == "\r\x1b[K"  # somebody has just spoken
    clock.now = 5.0
    activity.tick()
    assert "reading results/x, 3s" in drawn[-1]


def test_nothing_is_drawn_beside_a_prompt_or_another_display(shown):
    activity, clock, drawn = shown
    activity.touched("method [m-ebm]: ")
    clock.now = 100.0
    activity.tick()
    assert drawn == []
    with activity.held():
        activity.touched("frame\n")
        clock.now = 200.0
        activity.tick()
    assert drawn == []
    clock.now = 300.0
    activity.tick()
    assert len(drawn) == 1


def test_listeners_hear_how_far_work_is():
    heard = []
    note("nobody listens")
    with listening(lambda *said: heard.append(said)):
        with counted("scoring images", 3) as advance:
            advance(2)
        with listening(lambda *said: heard.append(("inner", *said))):
            note("reading")
        note("reading")
    note("nobody listens")
    assert heard == [
        ("scoring images", 0, 3),
        ("scoring images", 2, 3),
        ("inner", "reading", 0, None),
        ("reading", 0, None),
    ]


def on_a_terminal(*arguments: str, term: str = "xterm") -> str:
    """What `python -c` shows on its own terminal."""
    main, other = pty.openpty()
    environment = {**os.environ, "TERM": term}
    with subprocess.Popen([sys.executable, *arguments], stdout=other, stderr=other, env=environment) as process:
        os.close(other)
        found = b""
        try:
            while chunk := os.read(main, 4096):
                found += chunk
        except OSError:  # the other end is closed
            pass
    os.close(main)
    assert process.returncode == 0, found
    return found.decode()


WORK = """
import time, sys
from study.display import output
from study.display.activity import show_activity
from trainables.results.progress import note
output.steady_streams()
show_activity()
note("starting Ray")
time.sleep(2.5)
print("done")
"""


def test_on_a_terminal_a_command_says_what_it_is_at_and_leaves_its_answer_alone():
    shown = on_a_terminal("-c", WORK)
    assert "starting Ray, " in shown
    assert re.sub(r"\r\x1b\[K(\x1b\[2m[^\x1b]*\x1b\[0m)?", "", shown) == "done\r\n"
    assert on_a_terminal("-c", WORK, term="dumb") == "done\r\n"


def test_a_pipe_never_sees_it():
    ended = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, timeout=100)
    assert (ended.stdout, ended.stderr) == ("done\n", "")
