"""What ends a process that waits for another to connect: the other's death or suspension, a signal, an error."""

from __future__ import annotations

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.distributed.launcher import Machine, launch
from job.distributed.rendezvous import host_store
from job.errors import JobError
from tests.forked import ROOT, free_port
from tests.waiting import wait_for
from tests.warm import Member, Processes

PROGRAM = """
import os, pathlib, signal, sys, time
from job.distributed import process_group, rendezvous
from job.distributed.ranks import find_place
from job.errors import JobError
from job.preemption.stop_flag import stop_on_signals
import torch.distributed as dist

folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]
process_group.REASON_SECONDS = 2.0
place, connect = find_place(os.environ), dist.init_process_group

def hit(**options):
    (folder / f"connects{place.rank}").touch()
    if place.rank == 1:
        if what in {"is killed", "breaks the connection"}:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hangs":
            time.sleep(600)
        raise RuntimeError("no route to host")
    if what == "breaks the connection":
        while not (folder / "connects1").exists():
            time.sleep(0.01)
        raise RuntimeError("Connection closed by peer")
    connect(**options)

dist.init_process_group = hit
try:
    with stop_on_signals(10) as stop, rendezvous.join(
        place, "r", stop=stop, report_progress=lambda: None, timeout_seconds=60, grace_seconds=10
    ):
        pass
except JobError as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("what", "codes", "said"),
    [
        ("is killed", [1, -9], "process 1 was killed, or it crashed"),
        ("breaks the connection", [1, -9], "process 1 was killed, or it crashed"),
        ("fails", [69, 69], "cannot connect to each other: no route to host"),
        ("hangs", [75, 75], ""),
    ],
)
def test_a_process_that_never_connects_ends_the_others(tmp_path: Path, what: str, codes: list[int], said: str) -> None:
    """Process 1 has arrived, and goes no further: process 0 ends within seconds; torch would wait for minutes."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    members = []
    for rank, log in enumerate(logs):
        log.touch()
        environ = {**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        members.append(Member([str(tmp_path), what], environ, log, log, source=PROGRAM))
    processes = Processes(members)
    wait_for((tmp_path / "connects1").exists)
    if what == "hangs":
        wait_for((tmp_path / "connects0").exists)
        os.kill(processes.pids[0], signal.SIGTERM)
    assert processes.wait(60) == codes, [log.read_text(encoding="utf-8") for log in logs]
    assert said in logs[0].read_text(encoding="utf-8")


STOPPING = """
import os, pathlib, signal, sys
from job.distributed import heartbeat, rendezvous
from job.distributed.process_group import ProcessGroup
from job.distributed.ranks import find_place
from job.errors import JobError
from job.preemption.stop_flag import stop_on_signals
from job.preemption.watchdog import watch
import torch.distributed as dist

note, when, stall = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
place = find_place(os.environ)
heartbeat._PAUSE_SECONDS = 600  # it is stopped before the heartbeat's thread has run

def stops(call, *given, **options):
    if place.rank == 0:
        note.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    return call(*given, **options)

def stop_in(owner, name):
    call = getattr(owner, name)
    setattr(owner, name, lambda *given, **options: stops(call, *given, **options))

if when == "it has arrived":
    stop_in(ProcessGroup, "watch_peers")
if when == "it connects":
    stop_in(dist, "init_process_group")
try:
    with (
        stop_on_signals(5) as stop,
        watch(stall, lambda message: None) as report_progress,
        rendezvous.join(
            place, "r", stop=stop, report_progress=report_progress, timeout_seconds=stall, grace_seconds=1
        ) as processes,
    ):
        if when == "all have connected":
            stops(lambda: None)
        processes.broadcast("what it pulls", lambda: 0)
except JobError as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(error.exit_code)
"""
SAID = "process 0 of this run, on {host}, has not run for 4 s (JOB_TRAIN__STALL_SECONDS)"


def test_a_process_0_that_is_stopped_as_it_begins_ends_the_others(tmp_path: Path) -> None:
    """Right after all have connected, before its heartbeat: the other ends after the limit, with 74 and the reason."""
    store = host_store(0, "r")
    address = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    started = []
    for rank, log in enumerate(logs):
        log.touch()
        environ = {**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        words = [str(tmp_path / "stops"), "all have connected", "4"]
        started.append(Processes([Member(words, environ, log, log, source=STOPPING)]))
    try:
        assert started[1].wait(60) == [74]
        assert SAID.format(host="127.0.0.1") in logs[1].read_text(encoding="utf-8")
    finally:
        started[0].kill()


@pytest.mark.long
@pytest.mark.parametrize("when", ["it has arrived", "it connects", "all have connected"])
def test_a_process_0_that_is_stopped_as_it_begins_ends_all_machines(tmp_path: Path, when: str) -> None:
    """Both launchers end with 74 soon after the limit, and none leaves the stopped process behind."""
    program, port = tmp_path / "program.py", free_port()
    program.write_text(STOPPING, encoding="utf-8")
    command = [sys.executable, str(program), str(tmp_path / "stops"), when, "4"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}

    def machine(rank: int) -> tuple[int, str, float]:
        place = Machine(1, nodes=2, node_rank=rank, rendezvous=f"localhost:{port}")
        try:
            code, why = launch(command, place, [], run="r", environ=environ, grace_seconds=5), ""
        except JobError as error:
            code, why = error.exit_code, str(error)
        return code, why, time.monotonic()

    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(machine, rank) for rank in range(2)]
        wait_for((tmp_path / "stops").exists, seconds=120)
        stopped = time.monotonic()
        codes, reasons, times = zip(*(end.result(timeout=120) for end in ends), strict=True)
    assert codes == (74, 74)
    assert SAID.format(host="localhost") in "".join(reasons)
    assert max(times) - stopped < 60
