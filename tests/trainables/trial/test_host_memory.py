"""A process's own memory, and what happens above a limit."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from trainables.trial import host_memory
from trainables.trial.host_memory import MemoryLimit, private_bytes

SIZE = 300 * 2**20


def test_memory_that_is_written_counts_and_a_mapped_file_does_not(tmp_path):
    path = tmp_path / "large.npy"
    np.save(path, np.ones(SIZE, np.uint8))
    before = private_bytes()
    mapped = np.load(path, mmap_mode="r")
    assert int(mapped[::4096].sum()) == -(-SIZE // 4096)
    assert private_bytes() - before < SIZE / 4
    held = np.ones(SIZE, np.uint8)
    assert private_bytes() - before > 0.9 * SIZE
    del held
    assert private_bytes() - before < SIZE / 4


def test_only_above_the_limit_it_is_said_and_once():
    told, over = [], threading.Event()

    def say(used):
        told.append(used)
        over.set()

    limit = MemoryLimit(private_bytes() + SIZE // 2, say)
    try:
        assert not over.wait(1.0)
        held = np.ones(SIZE, np.uint8)
        assert over.wait(30.0)
        assert told[0] > limit.limit
        assert not over.clear()
        assert not over.wait(1.0), "it is said once"
        del held
    finally:
        limit.close()


def test_a_limit_that_is_closed_says_nothing():
    over = threading.Event()
    limit = MemoryLimit(2**60, lambda _: over.set())
    limit.close()
    limit.limit = 1
    assert not over.wait(1.0)


@pytest.mark.parametrize("text", [None, "Name:\tpython\n"])
def test_a_system_that_does_not_tell_has_no_limit(tmp_path, monkeypatch, text):
    status = tmp_path / "status"
    if text is not None:
        status.write_text(text)
    monkeypatch.setattr(host_memory, "_STATUS", status)
    assert private_bytes() is None
