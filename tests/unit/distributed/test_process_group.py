"""How processes exchange values: here threads, each with its own connection to one store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from structlog.testing import capture_logs
from torch.distributed import DistBackendError

from job.distributed import heartbeat, process_group
from job.distributed.common_exit_code import announce_end
from job.distributed.heartbeat import Heartbeat, HeartbeatMonitor
from job.distributed.process_group import ProcessGroup
from job.distributed.ranks import Place
from job.distributed.rendezvous import connect_store, host_store, keyspace
from job.errors import DataError, JobError, Killed, Preempted, Problem, Stalled, TrainingFailed, Unreachable
from job.preemption.stop_flag import StopFlag
from tests.waiting import wait_for

T = TypeVar("T")
GRACE, STALL = 60.0, 600.0


class Team:
    """Several processes on two machines, of two and of one."""

    def __init__(self, stall_seconds: float = STALL) -> None:
        self.host, self.stall_seconds = host_store(0), stall_seconds
        self.stops = [StopFlag() for _ in range(3)]
        self.beats = [0, 0, 0]
        self.members = [self._member(rank) for rank in range(3)]

    def _member(self, rank: int) -> ProcessGroup:
        def report_progress() -> None:
            self.beats[rank] += 1

        place = Place(rank, 3, rank % 2, 2 - rank // 2, "localhost", self.host.port, hosted=True)
        store = keyspace(connect_store(place), "run")
        member = ProcessGroup(
            place, store, self.stops[rank], report_progress, grace_seconds=GRACE, stall_seconds=self.stall_seconds
        )
        member.watch_peers()
        return member

    def start(self, *work: Callable[[ProcessGroup], T]) -> list[Future[T]]:
        """Lets each member do its work, at once."""
        pool = ThreadPoolExecutor(len(work))
        futures = [pool.submit(one, member) for one, member in zip(work, self.members, strict=False)]
        pool.shutdown(wait=False)
        return futures

    def all(self, work: Callable[[ProcessGroup], T]) -> list[T]:
        """Lets all do the same; returns what each gets."""
        return [future.result(timeout=60) for future in self.start(work, work, work)]


@pytest.fixture
def team() -> Iterator[Team]:
    """Three processes that have met."""
    made = Team()
    yield made
    for stop in made.stops:
        stop.request("the end of the test")


def test_all_get_what_the_first_found(team: Team) -> None:
    """Only process 0 looks; whatever JSON can hold arrives as it was, floats to the last bit."""
    value = {"step": 3, "loss": 0.1 + 0.2, "why": None, "names": ["ä", ""]}
    asked: list[int] = []

    def work(member: ProcessGroup) -> Any:
        return member.broadcast("value", lambda: asked.append(member.place.rank) or value)

    assert team.all(work) == [value] * 3
    assert asked == [0]
    assert [member.leads for member in team.members] == [True, False, False]


def test_what_is_large_arrives_too(team: Team) -> None:
    """The questions of a large evaluation are more than torch's store takes at once."""
    large = ["x" * 999] * 20_000
    assert team.all(lambda member: member.broadcast("large", lambda: large) == large) == [True] * 3


def test_each_machine_finds_for_itself(team: Team) -> None:
    """The first process of each machine looks, for those that are beside it."""
    assert team.all(lambda member: member.broadcast_on_machine("rank", lambda: member.place.rank)) == [0, 0, 2]


def test_gathering_keeps_the_order(team: Team) -> None:
    """All get what each gave, by rank, call after call."""
    assert (
        team.all(lambda member: [member.gather("r", [n, member.place.rank]) for n in range(3)])
        == [[[[n, 0], [n, 1], [n, 2]] for n in range(3)]] * 3
    )


def test_what_is_sent_arrives_once_and_in_order(team: Team) -> None:
    """Process 0 takes what is there without waiting for more; each sender's come in order."""
    first, second, third = team.members
    got: list[Any] = []

    def has_come(count: int) -> bool:
        got.extend(first.receive())
        return len(got) >= count

    assert first.receive() == []
    second.send({"row": 1})
    second.send({"row": 2})
    third.send("x")
    wait_for(lambda: has_come(3))  # a send does not wait until the store has it
    assert [one for one in got if one != "x"] == [{"row": 1}, {"row": 2}]
    assert got.count("x") == 1
    assert first.receive() == []
    second.send({"row": 3})
    wait_for(lambda: has_come(4))
    assert got[3:] == [{"row": 3}]


def test_an_end_reaches_those_that_wait_and_those_that_work(team: Team) -> None:
    """Processes that wait, and those that work, end with the same kind of error as the first, with its reason."""

    def wait(member: ProcessGroup) -> None:
        member.broadcast("never", lambda: None if member.leads else "")
        member.gather("never", 1)

    def work(member: ProcessGroup) -> None:
        while True:
            member.check()
            time.sleep(0.01)

    waiting, working = team.start(wait, work)
    team.members[2].end(DataError([Problem("rows.jsonl:3", "is empty")]))
    for future in (waiting, working):
        error = future.exception(timeout=60)
        assert isinstance(error, DataError)
        assert str(error) == "process 2: rows.jsonl:3: is empty"
        assert error.reported
    assert team.stops[0].remaining() <= GRACE


def test_the_first_end_counts(team: Team) -> None:
    """What others end with because of it does not replace the reason."""
    team.members[1].end(Unreachable("the store is silent"))
    team.members[2].end(ValueError("a consequence"))
    with pytest.raises(Unreachable, match="process 1: the store is silent"):
        team.members[0].gather("x", 0)


def test_a_bug_ends_the_others_as_a_bug(team: Team) -> None:
    """An error that is none of the job's has exit code 1 everywhere."""
    team.members[0].end(ZeroDivisionError())
    with pytest.raises(JobError, match="process 0: ZeroDivisionError") as caught:
        team.members[1].broadcast("x", lambda: None)
    assert caught.value.exit_code == 1


def test_a_signal_ends_the_waiting(team: Team) -> None:
    """A process that has to stop does not wait for the others until it is killed."""
    (_, waiting) = team.start(lambda _: None, lambda member: member.broadcast("never", lambda: 0))
    team.stops[1].request("SIGTERM", 10)
    assert isinstance(waiting.exception(timeout=60), Preempted)


def test_waiting_is_progress_but_for_the_first(team: Team) -> None:
    """The watchdog of the others is fed; that of process 0 ends a wait of all for all."""
    team.members[0].start_heartbeat()
    (leading, waiting) = team.start(lambda m: m.gather("x", 0), lambda m: m.gather("x", 1))
    wait_for(lambda: team.beats[1])
    team.members[2].gather("x", 2)
    assert leading.result(timeout=60) == waiting.result(timeout=60) == [0, 1, 2]
    assert team.beats[0] == 0


def test_the_first_one_goes_first(team: Team) -> None:
    """The others leave when process 0 has left, and do not wait for it when it is dead."""
    _, second, third = team.start(lambda _: None, ProcessGroup.leave, ProcessGroup.leave)
    time.sleep(0.1)
    assert not second.done()
    team.members[0].leave()
    second.result(timeout=30)
    third.result(timeout=30)


def test_nobody_waits_for_a_first_one_that_died(team: Team) -> None:
    """When its launcher has told that process 0 is dead, the others go."""
    announce_end(keyspace(team.host, "run"), 0, 75, "was killed by SIGKILL")
    began = time.monotonic()
    team.members[1].leave()
    assert time.monotonic() - began < GRACE / 2


@pytest.mark.parametrize(("stopped", "kind"), [(False, Killed), (True, Preempted)])
def test_a_store_that_is_gone_is_a_reason_to_start_again(*, stopped: bool, kind: type[JobError]) -> None:
    """Its machine may be out of memory, so it counts, unless the run was stopped before; the time left is bounded."""
    team = Team()
    member, stop = team.members[1], team.stops[1]
    if stopped:
        stop.request("SIGTERM", GRACE)
    del team.host
    for _ in range(2):  # the end of this process, which the loss asked for, changes nothing
        with pytest.raises(kind, match="another process of this run has ended"):
            member.receive()
    assert stop.remaining() <= GRACE


class Pending:
    """An operation of torch's that does not complete, since a process is missing in it."""

    def is_completed(self) -> bool:
        """Never."""
        return False


@pytest.mark.parametrize("error", ["NCCL error: Cuda failure 2 'out of memory'", torch.OutOfMemoryError("2 GiB")])
def test_memory_that_runs_out_in_an_exchange_ends_all(
    team: Team, monkeypatch: pytest.MonkeyPatch, error: str | Exception
) -> None:
    """One has none for NCCL's buffers: the others, which wait for it, end with it, by the code of a full GPU."""
    monkeypatch.setattr(process_group, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(process_group, "REASON_SECONDS", 600.0)  # nobody waits for a reason

    def fail() -> Any:
        raise DistBackendError(error) if isinstance(error, str) else error

    def wait(member: ProcessGroup) -> None:
        member._finish(Pending)

    ends = [future.exception(timeout=60) for future in team.start(wait, lambda member: member._finish(fail), wait)]
    assert [(type(end), getattr(end, "reported", None)) for end in ends] == [
        (TrainingFailed, True),
        (TrainingFailed, False),
        (TrainingFailed, True),
    ]
    assert all("JOB_TRAIN__GPU_MEMORY_GB" in str(end) for end in ends)
    assert all(stop.remaining() <= GRACE for stop in team.stops), "nor is there much time to save"


def test_an_error_while_memory_is_given_up_is_not_a_lack_of_memory(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is gone is no reason to give up for good, whatever this one was about."""
    monkeypatch.setattr(process_group, "REASON_SECONDS", 0.0)

    def fail() -> Any:
        error = RuntimeError("Connection closed by peer")
        error.__context__ = torch.OutOfMemoryError("2 GiB")  # as where it is raised while that is handled
        raise error

    with pytest.raises(Killed, match="Connection closed by peer"):
        team.members[1]._finish(fail)


class OnGPU:
    """Stands for a tensor on a GPU, whose first exchange blocks the host until all processes take part in it."""

    is_cuda = True
    device = "cpu"  # where the small tensor of that exchange is made here


def test_an_end_is_noticed_while_gpus_connect(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's call does not return, since a process is missing: those in it end by the reason that this one gave."""
    monkeypatch.setattr(process_group, "CHECK_SECONDS", 0.05)
    released = threading.Event()
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: released.wait(600))
    waiting = team.start(*[lambda member: member.start_all_reduce(OnGPU())] * 2)
    team.members[2].end(DataError([Problem("row 3", "is empty")]))
    try:
        assert [type(future.exception(timeout=60)) for future in waiting] == [DataError, DataError]
    finally:
        released.set()


def test_gpus_connect_once(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first exchange connects them, in a thread; those after it are launched by the caller."""
    work, threads = SimpleNamespace(wait=lambda: None, is_completed=lambda: True), []

    def exchange(*_: Any, **__: Any) -> Any:
        threads.append(threading.current_thread())
        return work

    monkeypatch.setattr("torch.distributed.all_reduce", exchange)
    monkeypatch.setattr("torch.distributed.all_gather_into_tensor", exchange)
    member = team.members[0]
    member.start_all_reduce(OnGPU())()
    member.gather_into(None, OnGPU())()
    here = threading.current_thread()
    assert [thread is here for thread in threads] == [False, True, True]


def test_an_error_while_gpus_connect_is_raised(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out for NCCL's buffers is told as such, though it was another thread that asked for it."""

    def fail(*_: Any, **__: Any) -> Any:
        raise DistBackendError("NCCL error: Cuda failure 2 'out of memory'")

    monkeypatch.setattr("torch.distributed.all_reduce", fail)
    with pytest.raises(TrainingFailed, match="JOB_TRAIN__GPU_MEMORY_GB"):
        team.members[1].start_all_reduce(OnGPU())


@pytest.mark.parametrize("when", ["after a while", "before its heartbeat's thread has run", "before its heartbeat"])
def test_a_first_one_that_is_stopped_ends_the_run(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Every other process ends with 74 and names it, where it is, and how long it has not run; the log warns before."""
    monkeypatch.setattr(process_group, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "_WARN_SECONDS", 0.2)
    monkeypatch.setattr(heartbeat, "_PAUSE_SECONDS", 0.02 if when == "after a while" else 600)
    team = Team(stall_seconds=1.0)
    first = team.members[0]
    if when != "before its heartbeat":
        first.start_heartbeat()
        assert first._store.add("beat", 0) > 0  # which the others need not wait for
    with capture_logs() as lines:
        _, second, third = team.start(lambda _: None, *[lambda member: member.broadcast("value", lambda: 0)] * 2)
        if when == "after a while":
            began = time.monotonic()
            wait_for(lambda: time.monotonic() - began > 2 * team.stall_seconds)
            assert not any(future.done() for future in (second, third))
            first._heartbeat.stop()  # as its threads stand still
        errors = [future.exception(timeout=60) for future in (second, third)]
    for error in errors:
        assert isinstance(error, Stalled)
        assert "process 0 of this run, on localhost, has not run for 1 s (JOB_TRAIN__STALL_SECONDS)" in str(error)
    warnings = [line for line in lines if line["event"].startswith("waiting for process 0, which is stopped")]
    assert {line["log_level"] for line in warnings} == {"warning"}
    assert all(0 <= line["at_most_seconds"] <= 1 for line in warnings)


def test_a_pause_of_all_processes_is_no_end_of_the_first(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when their machines are migrated: the clock has gone on, and each has stood still."""
    now = [0.0]
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monitor = HeartbeatMonitor(team.members[1].place, team.members[1]._store, STALL)
    for _ in range(9):
        now[0] += 2 * STALL
        monitor.check()
    now[0] += 2 * STALL
    with pytest.raises(Stalled):
        monitor.check()


class Counter:
    """A store whose number changes only when the test changes it."""

    def __init__(self) -> None:
        self.number = 1

    def add(self, _key: str, amount: int) -> int:
        """The number after `amount` is added, as in torch's store."""
        self.number += amount
        return self.number


WARNINGS = [(30, "machine-0", 30, 570), (60, "machine-0", 60, 540), (100, "machine-0", 30, 570)]


@pytest.mark.parametrize(
    ("rank", "local_rank", "warnings"), [(1, 1, WARNINGS), (2, 2, []), (3, 0, WARNINGS), (4, 1, [])]
)
def test_one_process_of_each_machine_warns_of_a_first_one_that_is_stopped(
    monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, warnings: list[Any]
) -> None:
    """After half a minute and then every half, with what is left; and again once it has run and is stopped again."""
    now, store = [0.0], Counter()
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monitor = HeartbeatMonitor(Place(rank, 6, local_rank, 3, "machine-0", 1), store, STALL)
    found = []
    for second in range(0, 130, 10):
        now[0] = float(second)
        store.number += second == 70
        with capture_logs() as lines:
            monitor.check()
        found += [(second, line["at"], line["seconds"], line["at_most_seconds"]) for line in lines]
    assert found == warnings


def test_the_heartbeat_is_faster_than_it_is_read_and_holds_up_no_end() -> None:
    """Between two reads the number has changed; a process that ends by an error does not wait for its thread."""
    assert 0 < heartbeat._PAUSE_SECONDS < process_group.CHECK_SECONDS
    beating = Heartbeat(Counter())
    before = {*threading.enumerate()}
    beating.start()
    started = {*threading.enumerate()} - before
    beating.stop()
    assert [(thread.name, thread.daemon) for thread in started] == [("heartbeat", True)]


def test_a_short_limit_counts_pauses_of_all_processes_as_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds usually pass between two checks: a tenth of a limit of 10 s would let it end after 20."""
    now = [0.0]
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monitor = HeartbeatMonitor(Place(1, 2, 1, 2, "machine-0", 1), Counter(), 10.0)
    monitor.check()
    for second in (100, 200, 300, 400):
        now[0] = float(second)
        monitor.check()
    now[0] = 402.0
    with pytest.raises(Stalled, match="has not run for 10 s"):
        monitor.check()


def test_a_first_one_that_cannot_show_that_it_runs_ends(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the others would be ended, as if it were stopped."""
    monkeypatch.setattr(process_group, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(process_group, "REASON_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "_PAUSE_SECONDS", 0.02)
    first = team.members[0]
    store, told = first._store, list[str]()

    class Silent:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def add(self, key: str, amount: int) -> int:
            told.append(key)
            if len(told) > 1:
                raise RuntimeError("timed out")
            return int(store.add(key, amount))

    monkeypatch.setattr(first._heartbeat, "_store", Silent())
    first.start_heartbeat()
    wait_for(lambda: first._heartbeat._error is not None)
    with pytest.raises(Killed, match="timed out"):
        first.check()


def test_gpus_connect_before_the_first_sum_of_any_kind(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of a validation may be the first exchange: it is also noticed there that another process has ended."""
    monkeypatch.setattr(process_group, "CHECK_SECONDS", 0.05)
    released = threading.Event()
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: released.wait(600))
    (waiting,) = team.start(lambda member: member.all_reduce(OnGPU()))
    team.members[2].end(DataError([Problem("row 3", "is empty")]))
    try:
        assert type(waiting.exception(timeout=60)) is DataError
    finally:
        released.set()
