"""What the watch over Ray takes for its end, and what of a worker's end is the memory's doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

from study.run import watchdog
from study.run.watchdog import OWN_NODE_SECONDS, AwakeClock, Health
from study.run.workers import MAX_LOSSES_ALONE, LostWorkerError, Workers, as_lost, is_loss, memory_pressure

TRIAL = {"CPU": 2.0, "GPU": 0.0, "memory": 1e9}


def node(name="a", alive=True, **resources):
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": 4.0, "memory": 4e9, **resources}}


def health(own_node=None):
    found = Health(120.0, 70.0, own_node)
    found.bundle = TRIAL
    return found


def test_a_ray_that_answers_and_has_a_node_is_well_however_long():
    found = health("a")
    for now in range(0, 10_000, 60):
        found.answered([node()], now)
        assert found.wrong(now) is None


def test_a_ray_that_never_answered_is_given_up_after_its_time_and_not_before():
    found = health()
    assert found.wrong(1000.0) is None
    assert found.wrong(1069.0) is None
    assert found.wrong(1070.0) == "Ray has given no answer for 70 s"


@pytest.mark.parametrize(
    "nodes",
    [[], [node(alive=False)], [node(CPU=1.0)], [node(memory=1e8)], [node("b", CPU=1.0), node("c", alive=False)]],
)
def test_without_a_node_that_can_run_a_trial_it_is_given_up_after_the_studys_time(nodes):
    found = health()
    found.answered([node()], 0.0)
    for now in range(10, 120, 10):
        found.answered(nodes, now)
        assert found.wrong(now) is None
    found.answered(nodes, 120.0)
    assert found.wrong(120.0) == "for 120 s no Ray node could run a trial (2 CPU, 1e+09 memory)"


def test_a_node_that_comes_in_time_is_enough():
    found = health()
    found.answered([node()], 0.0)
    for now in range(10, 120, 10):
        found.answered([node(alive=False)], now)
    found.answered([node(alive=False), node("b")], 119.0)
    for now in range(120, 230, 10):
        found.answered([node(alive=False)], now)
        assert found.wrong(now) is None


def test_silence_is_not_taken_for_the_loss_of_nodes():
    found = Health(6.0, 70.0, "a")
    found.bundle = TRIAL
    found.answered([node()], 0.0)
    assert found.wrong(60.0) is None, "nobody has said that the node is gone"


def test_a_driver_whose_own_node_is_lost_does_not_wait_for_others():
    found = health("a")
    found.answered([node(), node("b")], 0.0)
    found.answered([node(alive=False), node("b")], OWN_NODE_SECONDS - 1)
    assert found.wrong(OWN_NODE_SECONDS - 1) is None
    found.answered([node(alive=False), node("b")], OWN_NODE_SECONDS)
    assert found.wrong(OWN_NODE_SECONDS) == "the Ray node that the driver belongs to was lost"


def test_a_clock_does_not_count_the_time_for_which_nobody_ticked(monkeypatch):
    now = 100.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    clock = AwakeClock()
    for _ in range(10):
        now += 0.5
        clock.tick()
    assert clock() == 5.0
    now += 3600
    assert clock() == 5.0
    assert clock.tick() <= 10.0
    before = clock()
    now += 1.0
    assert clock.tick() == before + 1.0


def test_what_a_process_has_started_is_found_at_every_depth():
    nested = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    child = subprocess.Popen([sys.executable, "-c", nested])
    try:
        until = time.monotonic() + 60
        while not (found := watchdog._below({child.pid})) and time.monotonic() < until:
            time.sleep(0.05)
        assert len(found) == 1
        assert child.pid not in found
        assert {child.pid, *found} <= watchdog._below({os.getpid()})
        assert watchdog._below(found) == set()
    finally:
        for pid in watchdog._below({child.pid}):
            os.kill(pid, signal.SIGKILL)
        child.kill()
        child.wait()


# --------------------------------------------------------------------------------------------------- memory

TOLD = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.1, ID: 19) was "
    "3.68GB used / 23.54GB limit (0.156382)\nOOM kill reason: Memory usage exceeded threshold\n"
)


def test_an_error_that_rays_loop_does_not_expect_is_a_lost_worker():
    for error in (OutOfMemoryError(TOLD), NodeDiedError("gone")):
        assert isinstance(as_lost(error), LostWorkerError)
        assert is_loss(as_lost(error))
    died = ActorDiedError()
    failed = RayTaskError("f", "trace", ValueError("a bug"))
    bug = ValueError("not Ray's")
    assert [as_lost(e) for e in (died, failed, bug)] == [died, failed, bug]


def test_memory_pressure_is_named_with_its_numbers():
    assert memory_pressure(as_lost(OutOfMemoryError(TOLD))) == (
        "killed under memory pressure: 3.68GB of 23.54GB in use on its node"
    )
    assert memory_pressure(RayActorError(error_msg="it died: the node was running low on memory")).startswith(
        "killed under memory pressure: it died"
    )
    assert memory_pressure(as_lost(OutOfMemoryError("other\nwords"))).startswith("killed under memory pressure: ")
    assert memory_pressure(ActorDiedError()) is None
    assert memory_pressure(OSError("low on memory")) is None


def test_the_first_shortage_is_another_try_and_then_fewer_run_at_once():
    workers = Workers()
    workers.short(3, 0.0)
    workers.short(2, 1.0)  # of the same shortage
    assert workers.room(2, 2.0) is None
    workers.short(3, 100.0)
    assert workers.at_most == 3
    workers.short(2, 101.0)
    assert (workers.at_most, workers.room(2, 102.0), workers.room(0, 102.0)) == (2, 0, 2)
    workers.short(1, 200.0)
    workers.short(0, 201.0)
    assert (workers.at_most, workers.room(0, 202.0)) == (1, 1)
    assert workers.notes[-1] == "memory runs short: at most 1 trial(s) at once from now on"


def test_a_trial_that_is_alone_waits_longer_and_longer_for_memory():
    workers, pauses = Workers(), []
    for i in range(10):
        now = 1000.0 * i
        workers.short(0, now)
        pauses.append(next(s for s in range(1000) if workers.room(0, now + s) != 0))
    assert pauses[0] == 0
    assert pauses[1] == 0, "it may not have been alone before"
    assert pauses[2:6] == sorted(pauses[2:6])
    assert pauses[2] > 0
    assert pauses[-1] == pauses[-2] == 60
    assert sum(pauses[:MAX_LOSSES_ALONE]) > 30, "time for others to give memory back"


def test_a_process_that_was_stopped_is_noticed_by_nobody_but_its_clock():
    clock = AwakeClock()
    time.sleep(0.01)
    assert 0 < clock.tick() < 5
