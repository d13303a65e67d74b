"""What ends a process that waits for another one to connect: that one's death, a signal, or an error of torch's."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.forked import free_port
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
