"""How processes connect, and how connecting fails."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from job.distributed import process_group, rendezvous
from job.distributed.common_exit_code import announce_end
from job.distributed.processes import ALONE, Processes
from job.distributed.ranks import Place
from job.distributed.rendezvous import connect_store, host_store, join, keyspace
from job.errors import Killed, Preempted, SettingsError, Unreachable
from job.platforms.detect import detect
from job.preemption.stop_flag import StopFlag
from tests.forked import free_port

POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 0 does not wait long for those that never came to leave again."""
    monkeypatch.setattr(process_group, "REASON_SECONDS", 0.2)


def joining(
    place: Place | None, stop: StopFlag | None = None, timeout_seconds: float = 1.0, **more: Any
) -> AbstractContextManager[Processes]:
    """Joins a run."""
    return join(
        place,
        "run",
        stop=stop or StopFlag(),
        report_progress=lambda: None,
        timeout_seconds=timeout_seconds,
        grace_seconds=1,
        **more,
    )


@pytest.mark.parametrize("place", [None, Place(), Place(world_size=1, host="nowhere", port=1)])
def test_one_process_is_alone(place: Place | None) -> None:
    """Nobody is waited for, nothing is opened; all that processes can do works alone."""
    with joining(place) as processes:
        assert processes is ALONE
    assert ALONE.leads
    assert ALONE.broadcast("x", lambda: 1) == ALONE.broadcast_on_machine("x", lambda: 1) == 1
    assert ALONE.gather("x", 2) == [2]
    ALONE.send("x")
    assert ALONE.receive() == []
    assert [ALONE.agree(repeat=repeat) for repeat in (True, False)] == [True, False]
    ALONE.check()
    ALONE.all_reduce(None)
    assert not ALONE.stopping


def fail(place: Place, **changes: Any) -> BaseException | None:
    """What joining ends with."""
    try:
        with joining(place, **changes):
            pass
    except Exception as error:  # noqa: BLE001
        return error
    return None


def test_those_that_do_not_come_are_named() -> None:
    """After the timeout: worth a retry, with the numbers of the missing."""
    host = host_store(0)
    place = Place(1, 4, host="localhost", port=host.port, hosted=True)
    keyspace(host, "run").add("here#0", 1)
    error = fail(place, timeout_seconds=0.3)
    assert isinstance(error, Unreachable)
    assert "of 4 processes, these did not connect: 2, 3" in str(error)


def test_a_store_that_is_not_there_is_told_of() -> None:
    """The address is in the message."""
    port = free_port()
    error = fail(Place(1, 2, host="localhost", port=port, hosted=True), timeout_seconds=0.3)
    assert isinstance(error, Unreachable)
    assert f"localhost:{port}" in str(error)


@pytest.mark.parametrize(("rank", "first_here", "says"), [(4, 4, True), (5, 4, True), (6, 4, False)])
def test_the_log_says_who_is_missing(
    monkeypatch: pytest.MonkeyPatch, rank: int, first_here: int, *, says: bool
) -> None:
    """Once for each machine, while it waits: by the first of its processes that has come, here 4 or without it 5."""
    monkeypatch.setattr(rendezvous, "_REMINDER_SECONDS", 0.0)
    host = host_store(0)
    for one in {0, 1, 2, 5} - {rank}:
        keyspace(host, "run").add(f"here#{one}", 1)
    place = Place(rank, 8, rank - first_here, 4, host="localhost", port=host.port, hosted=True)
    with capture_logs() as lines:
        assert isinstance(fail(place, timeout_seconds=0.5), Unreachable)
    waiting = [line for line in lines if line["event"] == "waiting for processes that have not connected"]
    assert bool(waiting) == says
    missing = sorted(set(range(8)) - {0, 1, 2, 5, rank})
    for line in waiting:
        assert line["log_level"] == "warning"  # which processes other than 0 log too
        assert line["missing"] == missing
        assert line["on_this_machine"] == [one for one in missing if one >= first_here]
        assert 0 <= line["at_most_seconds"] <= 1


@pytest.mark.parametrize(("rank", "local_rank", "says"), [(1, 1, True), (2, 2, False), (4, 0, True), (5, 1, False)])
def test_the_log_says_that_process_0_is_missing(
    monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, *, says: bool
) -> None:
    """Nobody knows more as long as it does not listen."""
    monkeypatch.setattr(rendezvous, "_REMINDER_SECONDS", 0.1)
    place = Place(rank, 8, local_rank, 4, host="localhost", port=free_port())
    with capture_logs() as lines:
        assert isinstance(fail(place, timeout_seconds=0.5), Unreachable)
    waiting = [line for line in lines if line["event"] == "waiting for process 0, which cannot be reached"]
    assert bool(waiting) == says
    assert all(line["at"] == f"localhost:{place.port}" for line in waiting)


def test_without_its_launcher_a_process_does_not_wait() -> None:
    """Nor does it join the next attempt at the same address: its launcher is not its parent any more."""
    host = host_store(0)
    place = Place(1, 2, host="localhost", port=host.port, hosted=True, launcher=os.getpid())
    began = time.monotonic()
    error = fail(place, timeout_seconds=60)
    assert isinstance(error, Killed)
    assert time.monotonic() - began < 30
    assert not keyspace(host, "run").check(["here#1"])
    at_work = fail(replace(place, launcher=os.getppid()), timeout_seconds=0.3)
    assert isinstance(at_work, Unreachable)  # the other one does not come


def test_a_port_that_is_taken_is_worth_a_retry() -> None:
    """The attempt before may still hold it."""
    host = host_store(0)
    with pytest.raises(Unreachable, match=f"port {host.port}"):
        host_store(host.port)


def test_two_with_one_number_are_refused() -> None:
    """Two machines of the same number would train the same share twice."""
    host = host_store(0)
    place = Place(1, 2, host="localhost", port=host.port, hosted=True)
    keyspace(host, "run").add("here#1", 1)
    error = fail(place)
    assert isinstance(error, SettingsError)
    assert "another process has rank 1, too" in str(error)


def test_one_that_replaces_another_ends_for_its_reason() -> None:
    """A pod that starts before the one it replaces has left the run ends as that did, here preempted, at no cost."""
    host = host_store(0)
    store = keyspace(host, "run")
    store.add("here#1", 1)
    announce_end(store, 1, Preempted.exit_code, "SIGTERM")
    error = fail(Place(1, 2, host="localhost", port=host.port, hosted=True), machine_checks=detect(POD).machine_checks)
    assert isinstance(error, Preempted)


@pytest.mark.parametrize("timeout_seconds", [60, 0])
def test_on_kubernetes_wrong_settings_of_another_process_end_the_waiting(timeout_seconds: float) -> None:
    """The code that says that no retry helps is kept: it is not this machine that is at fault, or was late."""
    host = host_store(0)
    announce_end(keyspace(host, "run"), 0, SettingsError.exit_code, "JOB_TRAIN__EPOCHS: is wrong")
    place = Place(1, 2, host="localhost", port=host.port, hosted=True)
    error = fail(place, timeout_seconds=timeout_seconds, machine_checks=detect(POD).machine_checks)
    assert isinstance(error, SettingsError)
    assert error.reported


def test_machines_of_different_sizes_are_refused() -> None:
    """Their numbers would overlap, or leave gaps that are waited for."""
    host = host_store(0)
    keyspace(host, "run").set("world_size", "8")
    error = fail(Place(1, 4, host="localhost", port=host.port, hosted=True))
    assert isinstance(error, SettingsError)
    assert "adds up to 4 here and to 8 on another machine" in str(error)


@pytest.mark.parametrize("come", ["the store", "the others"])
def test_a_signal_ends_the_waiting(come: str) -> None:
    """While the other machines are still being started, this one may be taken away."""
    host = host_store(0)
    port = host.port if come == "the others" else free_port()
    stop = StopFlag()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fail, Place(1, 2, host="localhost", port=port, hosted=True), stop=stop, timeout_seconds=60)
        time.sleep(0.3)
        assert not future.done()
        stop.request("SIGTERM", 10)
        assert isinstance(future.result(timeout=60), Preempted)


@pytest.fixture
def frozen() -> Iterator[Place]:
    """A place whose store accepts connections and never answers, like that of a suspended machine."""
    with socket.create_server(("localhost", 0)) as listener:
        yield Place(1, 2, host="localhost", port=listener.getsockname()[1], hosted=True)


def test_a_frozen_machine_is_named(frozen: Place) -> None:
    """With its address, after the timeout; torch's client alone would wait without a limit."""
    error = fail(frozen, timeout_seconds=1)
    assert isinstance(error, Unreachable)
    what = f"process 0 of this run cannot be reached at localhost:{frozen.port}: no answer"
    assert str(error) == f"{what}; waited for 1 s (JOB_TRAIN__STALL_SECONDS)"


def test_a_signal_ends_the_waiting_for_a_frozen_machine(frozen: Place) -> None:
    """It is noticed although torch's client waits."""
    stop = StopFlag()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fail, frozen, stop=stop, timeout_seconds=60)
        time.sleep(1)
        assert not future.done()
        stop.request("SIGTERM", 10)
        assert isinstance(future.result(timeout=30), Preempted)


def test_a_frozen_machine_that_is_replaced_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address leads to another one then: a connection that gets no answer is given up."""
    host, asked = host_store(0), list[float]()

    def reach(place: Place, seconds: float) -> Any:
        asked.append(seconds)
        if len(asked) == 1:
            time.sleep(3)
            raise TimeoutError
        return connect_store(place, seconds)

    monkeypatch.setattr(rendezvous, "_ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous, "reach_store", reach)
    keyspace(host, "run").add("here#0", 1)
    error = fail(Place(1, 3, host="localhost", port=host.port, hosted=True), timeout_seconds=2)
    assert "of 3 processes, these did not connect: 2; waited for 2 s (JOB_TRAIN__STALL_SECONDS)" in str(error)


def test_an_error_before_all_have_come_is_told_to_those_that_have() -> None:
    """One that comes and fails does not leave the others waiting for it."""
    host = host_store(0)
    places = [Place(rank, 3, host="localhost", port=host.port, hosted=True) for rank in range(2)]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fail, places[0], timeout_seconds=60)
        error = fail(places[1], timeout_seconds=0.3)
        assert isinstance(error, Unreachable)
        told = waiting.result(timeout=60)
        assert isinstance(told, Unreachable)
        assert told.reported


def test_runs_at_one_address_do_not_meet() -> None:
    """Keys belong to one start of one run."""
    host = host_store(0)
    other = connect_store(Place(host="localhost", port=host.port))
    keyspace(host, "one").set("key", "1")
    assert keyspace(host, "one").get("key") == b"1"  # `set` is not answered: only now is it there for others
    assert keyspace(other, "one").check(["key"])
    assert not keyspace(other, "two").check(["key"])
    assert not keyspace(other, "one", restart=1).check(["key"])
