"""Processes of this machine: started once, sent signals, ended together, with one common exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.distributed import launcher, other_machines
from job.distributed.common_exit_code import END, announce_end
from job.distributed.launcher import Machine, check_signals, count_processes, launch, recorded_signals
from job.distributed.other_machines import OtherMachines
from job.distributed.ranks import Place, find_place
from job.distributed.rendezvous import host_store, keyspace
from job.errors import JobError, Killed, Preempted, SettingsError, Unreachable, exit_codes
from tests.forked import free_port
from tests.waiting import wait_for

Run = Callable[..., int]


@pytest.fixture(autouse=True)
def _machines_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy this one is."""
    monkeypatch.setattr(other_machines, "SETTLE_SECONDS", 60.0)


RANK = """
import os, sys, time, signal
rank = int(os.environ['RANK'])
def ready(number=0):
    open(os.path.join(notes, f'{rank}-{number}'), 'w').close()
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """Launches Python code, and sends this process signals: each when all processes have said that they are ready."""

    def launched(code: str, machine: Machine | None = None, *, signals: Sequence[int] = (), grace: float = 60) -> int:
        notes = Path(tempfile.mkdtemp(dir=tmp_path))
        machine = machine or Machine(2)

        def send() -> None:
            for number, one in enumerate(signals):
                wait_for(lambda number=number: len(list(notes.glob(f"*-{number}"))) == machine.processes)
                os.kill(os.getpid(), one)

        sender = threading.Thread(target=send)
        with recorded_signals() as received:
            sender.start()
            try:
                command = [sys.executable, "-S", "-c", f"{RANK}notes = {str(notes)!r}\n{code}"]
                return launch(command, machine, received, run="r", environ=dict(os.environ), grace_seconds=grace)
            finally:
                sender.join()

    return launched


def test_each_process_gets_torchruns_variables(run: Run, tmp_path: Path) -> None:
    """As torchrun sets them, and the run's id, so that a made-up one is the same in all."""
    code = f"import json; open(r'{tmp_path}/' + str(rank), 'w').write(json.dumps(dict(os.environ)))"
    assert run(code) == 0
    found = [json.loads((tmp_path / name).read_text()) for name in ("0", "1")]
    for rank, environ in enumerate(found):
        assert environ["RANK"] == environ["LOCAL_RANK"] == str(rank)
        assert environ["WORLD_SIZE"] == environ["LOCAL_WORLD_SIZE"] == "2"
        assert environ["MASTER_ADDR"] == "localhost"
        assert int(environ["MASTER_PORT"]) > 0
        assert environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
        assert environ["JOB_RUN__ID"] == "r"
        assert find_place(environ) == Place(
            rank, 2, rank, 2, "localhost", int(environ["MASTER_PORT"]), hosted=True, launcher=os.getpid()
        )
    assert found[0]["MASTER_PORT"] == found[1]["MASTER_PORT"]


def test_ranks_go_on_over_the_machines(run: Run, tmp_path: Path) -> None:
    """The second machine of two has the upper half, and connects to the first."""
    code = f"open(r'{tmp_path}/' + str(rank), 'w').write(os.environ['WORLD_SIZE'] + os.environ['MASTER_ADDR'])"
    assert run(code, Machine(2, nodes=2, node_rank=1, rendezvous="[::1]:29400")) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {"2": "4::1", "3": "4::1"}


@pytest.mark.parametrize("code", sorted(exit_codes()))
def test_an_exit_code_survives(run: Run, code: int) -> None:
    """Where torchrun makes 1 of all of them: the codes decide whether a platform tries again."""
    assert run(f"sys.exit({code} if rank else 75)") == code


@pytest.mark.parametrize(
    ("codes", "late", "expected"),
    [
        ({0: 0, 1: 0}, set(), 0),
        ({0: 0, 1: 75}, set(), 0),  # the run is complete
        ({2: 0, 3: 0}, set(), 0),
        ({2: 0, 3: 75}, set(), 75),
        ({0: 75, 1: 75}, set(), 75),
        ({0: 75, 1: 69}, set(), 69),
        ({0: 75, 1: 1}, set(), 1),
        ({0: 65, 1: 1}, set(), 65),
        ({0: 75, 1: -9}, set(), 1),
        ({0: 2, 1: -9}, set(), 2),
        ({0: 75, 1: -9}, {1}, 75),
        ({0: -9, 1: -9}, {0, 1}, 75),
        ({0: 69, 1: -6}, set(), 1),
        ({0: 120, 1: 0}, set(), 1),
    ],
)
def test_the_gravest_end_counts(codes: dict[int, int], late: set[int], expected: int) -> None:
    """Final failures take precedence over counted ones, and these over free ones; only process 0 decides on success."""
    assert launcher._one_exit_code(codes, late) == expected


@given(st.dictionaries(st.integers(0, 7), st.sampled_from([0, -9, -15, 99, *exit_codes()]), min_size=1), st.data())
def test_an_end_is_a_success_only_if_it_was_one(codes: dict[int, int], data: Any) -> None:
    """0 means that process 0 was successful, or, where it is on another machine, that all here were."""
    late = data.draw(st.sets(st.sampled_from(sorted(codes))))
    assert (launcher._one_exit_code(codes, late) == 0) == (codes.get(0) == 0 or not any(codes.values()))


def test_a_killed_process_is_told_of(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others, wherever they are, read in the store that it is gone; the error says which and how."""
    stores: list[Any] = []
    monkeypatch.setattr(launcher, "host_store", lambda *given: stores.append(host_store(*given)) or stores[0])
    told = tmp_path / "told"
    monkeypatch.setattr(other_machines, "announce_end", lambda *given: (announce_end(*given), told.touch()))
    wait = f"while not os.path.exists({str(told)!r}): time.sleep(0.01)"
    with pytest.raises(Killed, match="process 1 was killed by SIGKILL; the machine may be out of memory") as caught:
        run(f"if rank: os.kill(os.getpid(), 9)\n{wait}\nsys.exit(75)")
    assert caught.value.exit_code == 1
    end = json.loads(keyspace(stores[0], "r").get(END))
    assert (end["process"], end["code"]) == (1, 1)


LISTENS = """
signal.signal(15, lambda *_: sys.exit(69))
signal.signal(2, lambda *_: sys.exit(69))
ready()
time.sleep(30)
"""
COUNTS = """
n = []
signal.signal(15, lambda *_: n.append(0) or (os._exit(69) if len(n) > 1 else ready(1)))
ready()
while True: time.sleep(1)
"""
DEAF = "signal.signal(15, signal.SIG_IGN); "


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on(run: Run, number: int) -> None:
    """To all processes; the end of all is the end of the launcher, with their exit code."""
    assert run(LISTENS, signals=[number]) == 69


def test_every_signal_is_handed_on(run: Run) -> None:
    """The second one means: at once."""
    assert run(COUNTS, signals=[signal.SIGTERM, signal.SIGTERM]) == 69


def test_a_process_that_is_not_ready_for_a_signal_was_preempted_too(run: Run) -> None:
    """A process that a signal kills while it starts was preempted; it did not fail."""
    assert run("ready(); time.sleep(30)", signals=[signal.SIGTERM]) == 75


def test_after_the_grace_all_are_killed(run: Run) -> None:
    """A process that does not end when it has to, or when another one has ended, holds nothing up."""
    began = time.monotonic()
    assert run(DEAF + "ready(); time.sleep(100)", signals=[signal.SIGTERM], grace=1) == 75
    assert run(DEAF + "rank and sys.exit(65); time.sleep(100)", grace=1) == 65
    assert time.monotonic() - began < 100


def on_two_machines(codes: tuple[str, str], grace: float = 60) -> list[int]:
    """The exit codes of the launchers of two machines with one process each, which runs the code for its rank."""
    port = free_port()

    def machine(rank: int) -> int:
        command = [sys.executable, "-S", "-c", RANK + codes[rank]]
        place = Machine(1, nodes=2, node_rank=rank, rendezvous=f"localhost:{port}")
        if rank:
            wait_for(lambda: listens(port))
        try:
            return launch(command, place, [], run="r", environ=dict(os.environ), grace_seconds=grace)
        except JobError as error:
            return error.exit_code

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(machine, (0, 1)))


def listens(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("sys.exit(1)", "sys.exit(75)", 1),
        ("sys.exit(75)", "sys.exit(2)", 2),
        ("os.kill(os.getpid(), 9)", "sys.exit(75)", 1),
        ("sys.exit(74)", "sys.exit(69)", 74),
    ],
)
def test_machines_end_with_the_most_serious_code(one: str, other: str, both: int, first: int) -> None:
    """Whichever machine fails first, and in whichever way: both launchers end with the same exit code."""
    codes = [f"time.sleep({0.3 * (rank != first)}); {code}" for rank, code in enumerate((one, other))]
    assert on_two_machines((codes[0], codes[1])) == [both, both]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_is_stopped_holds_no_machine_up(
    stopped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot notice that the process of the other machine has failed: its launcher does, and kills it."""
    monkeypatch.setattr(other_machines, "_RECONNECT_SECONDS", 0.2)
    # The store ends with machine 0, three seconds after its process.
    monkeypatch.setattr(other_machines, "_QUESTION_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(other_machines, "ANSWER_SECONDS", 1.0)
    stops = str(tmp_path / "stops")
    codes = [f"while not os.path.exists({stops!r}): time.sleep(0.01)\ntime.sleep(1); sys.exit(74)"] * 2
    codes[stopped] = f"open({stops!r}, 'w').close(); os.kill(os.getpid(), signal.SIGSTOP)"
    began = time.monotonic()
    assert on_two_machines((codes[0], codes[1]), grace=3) == [74, 74]
    assert time.monotonic() - began < 60


def test_a_store_that_is_silent_for_a_moment_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes wait for it for a minute, and so does the launcher of another machine than that of the store."""
    answers = iter([None, RuntimeError("timed out"), None, *[RuntimeError("timed out")] * 9])
    now = [0.0]
    monkeypatch.setattr(other_machines, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def read(_: object) -> None:
        if (answer := next(answers)) is not None:
            raise answer

    for name, value in {"_QUESTION_PAUSE_SECONDS": 0.0, "_RECONNECT_SECONDS": 0.0}.items():
        monkeypatch.setattr(other_machines, name, value)
    monkeypatch.setattr(other_machines, "reach_keyspace", lambda *_: object())
    monkeypatch.setattr(other_machines, "read_first_failure", read)
    place = Place(rank=1, world_size=2, local_world_size=1, host="localhost", port=1, hosted=True)
    others = OtherMachines(1, 2, place, None, "r")
    monkeypatch.setattr(others, "_requests", Now())
    assert [others.ended_elsewhere() for _ in range(4)] == [False] * 4
    now[0] += other_machines._GONE_SECONDS
    assert not others.ended_elsewhere()
    now[0] += 1
    assert others.ended_elsewhere()


class Now:
    """In place of a thread: makes each request at once."""

    def submit(self, request: Callable[..., Any], *given: Any) -> Future[Any]:
        """Makes the request."""
        done = Future[Any]()
        done.set_result(request(*given))
        return done


def test_a_hang_after_the_loss_of_the_store_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine 0 was lost before it could say why, and this machine hangs: no preemption, whose retry is free."""
    short = {"_QUESTION_PAUSE_SECONDS": 0.0, "_RECONNECT_SECONDS": 0.0, "_GONE_SECONDS": 0.2, "ANSWER_SECONDS": 0.5}
    for name, value in short.items():
        monkeypatch.setattr(other_machines, name, value)
    stores = [host_store(0, "r")]
    read_first_failure = other_machines.read_first_failure

    def answer_once(store: Any) -> Any:
        end = read_first_failure(store)
        stores.clear()  # the server ends with it
        return end

    monkeypatch.setattr(other_machines, "read_first_failure", answer_once)
    second = Machine(1, nodes=2, node_rank=1, rendezvous=f"localhost:{stores[0].port}")
    with pytest.raises(Killed, match="machine 0 of this run cannot be reached"):
        run(DEAF + "time.sleep(100)", second, grace=0.5)


def test_a_process_that_hangs_after_the_end_of_another_counts(run: Run) -> None:
    """Where that one succeeded and no signal came, nobody was preempted."""
    with pytest.raises(Killed, match="process 0 did not end"):
        run("rank or time.sleep(100)", grace=0.5)


@pytest.mark.parametrize("silent", ["reach_keyspace", "read_first_failure", "announce_end"])
def test_a_silent_store_delays_no_signal(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, silent: str
) -> None:
    """Here it does not answer at all until the signal has reached the process."""
    asked, told, in_time = tmp_path / "asked", tmp_path / "told", list[bool]()

    def wait(*_: object) -> None:
        asked.touch()
        with suppress(TimeoutError):
            wait_for(told.exists, seconds=20)
        in_time.append(told.exists())
        raise RuntimeError("timed out")

    store, slow = host_store(0, "r"), {"ANSWER_SECONDS": 60.0, "CONNECT_SECONDS": 60.0}
    for name, value in {
        "_QUESTION_PAUSE_SECONDS": 0.0,
        "_RECONNECT_SECONDS": 0.0,
        "SETTLE_SECONDS": 0.1,
        silent: wait,
        **slow,
    }.items():
        monkeypatch.setattr(other_machines, name, value)
    code = f"""
signal.signal(15, lambda *_: (open(r'{told}', 'w'), sys.exit(69)))
if rank == 3 and {silent == "announce_end"}: ready(), sys.exit(69)
while not os.path.exists(r'{asked}'): time.sleep(0.01)
ready(), time.sleep(100)
"""
    machine = Machine(2, nodes=2, node_rank=1, rendezvous=f"localhost:{store.port}")
    assert run(code, machine, signals=[signal.SIGTERM], grace=60) == 69
    assert in_time[0]


def test_a_store_that_is_frozen_holds_no_launcher_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's client waits for its answer without a limit; signals are handed on meanwhile, and the end comes."""
    released = threading.Event()
    for name, value in {"_RECONNECT_SECONDS": 0.0, "ANSWER_SECONDS": 0.05, "CONNECT_SECONDS": 0.05}.items():
        monkeypatch.setattr(other_machines, name, value)
    monkeypatch.setattr(other_machines, "reach_keyspace", lambda *_: released.wait(600))
    place = Place(rank=1, world_size=2, local_world_size=1, host="localhost", port=1, hosted=True)
    others = OtherMachines(1, 2, place, None, "r")
    try:
        assert not others.ended_elsewhere()
        others.announce_end(0, 74, "it stalled")
        assert others.agree_on_code(74, 0.05, 0.1) == 74
        others.close()
        wait_for(lambda: not any(one.name.startswith("ends of the machines") for one in threading.enumerate()))
    finally:
        released.set()


def test_a_complete_run_is_complete_on_all_machines() -> None:
    """Process 0 was successful: what the other machine still went through changes nothing."""
    assert on_two_machines(("pass", "os.kill(os.getpid(), 9)")) == [0, 0]


def test_a_machine_that_says_nothing_is_not_waited_for_long(run: Run) -> None:
    """The other machine is gone, or the store with it: the launcher ends with its own code, within its grace period."""
    began = time.monotonic()
    lonely = Machine(1, nodes=2, node_rank=0, rendezvous=f"localhost:{free_port()}")
    assert run("sys.exit(75)", lonely, grace=1) == 75
    assert run("sys.exit(75)", replace(lonely, node_rank=1), grace=1) == 75
    assert time.monotonic() - began < other_machines.SETTLE_SECONDS


def test_a_signal_before_the_start_starts_nothing(tmp_path: Path) -> None:
    """It is not lost on a launcher that is still reading its settings."""
    command = [sys.executable, "-S", "-c", f"open(r'{tmp_path}/x', 'w')"]
    with recorded_signals() as received:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Preempted, match="SIGTERM"):
            launch(command, Machine(2), received, run="r", environ=dict(os.environ), grace_seconds=5)
    assert not list(tmp_path.iterdir())
    check_signals([])


def test_signals_are_the_old_ones_afterwards(run: Run) -> None:
    """Nobody else's handlers are lost, not to torch either."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    assert run("pass") == 0
    assert before == [signal.getsignal(number) for number in numbers]


def test_a_port_that_is_taken_is_worth_a_retry(run: Run) -> None:
    """The attempt before may still be ending on this machine."""
    host = host_store(0)
    with pytest.raises(Unreachable, match="port"):
        run("pass", Machine(1, nodes=2, node_rank=0, rendezvous=f"localhost:{host.port}"))


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One for each visible GPU; on CPUs one, or as many as are asked for; never more than GPUs, or than CPUs bear."""
    import torch

    assert count_processes("auto") == 1
    assert [count_processes(wanted) for wanted in (1, 3)] == [1, 3]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(SettingsError, match="17 is more than 16, the most for the 2 CPUs of a machine without GPUs"):
        count_processes(17)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)))
    assert count_processes(96) == 96
    monkeypatch.setattr(launcher, "_DRIVERS", (tmp_path,))
    assert count_processes("auto") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [count_processes(wanted) for wanted in ("auto", 1, 4)] == [4, 1, 4]
    with pytest.raises(SettingsError, match="5 is more than the 4 visible GPUs"):
        count_processes(5)
