"""While a helper process quantizes, another process's death or a signal ends everything within seconds.

The quantizing is a helper that sleeps; connections, shares, signals and exit codes are the job's.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from job.distributed.launcher import Machine, launch, recorded_signals
from job.errors import Killed
from tests.forked import ROOT, free_port
from tests.waiting import wait_for
from tests.warm import Member, Processes

SLEEPER = """
import os, pathlib, sys, time
from threading import Thread
from job.export import autoround_process

def main():
    Thread(target=autoround_process._end_with_the_job, daemon=True).start()
    note = pathlib.Path(sys.argv[1]).with_name("helper")
    note.with_suffix(".new").write_text(str(os.getpid()))
    note.with_suffix(".new").rename(note)
    time.sleep(600)
"""
PROGRAM = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(folder))
from job.common.helper_process import start_helper
from job.distributed import process_group, rendezvous
from job.distributed.ranks import find_place
from job.errors import JobError
from job.export import autoround
from job.preemption.stop_flag import stop_on_signals

process_group.REASON_SECONDS = 1.0
autoround.start_helper = lambda _module, *arguments: start_helper("sleeper", *arguments)
task = autoround.Task("", "", "", 32, [], 0, 0, "cpu", 1)

def run():
    place = find_place(os.environ)
    (folder / f"pid{place.rank}").write_text(str(os.getpid()))
    with stop_on_signals(10) as stop, rendezvous.join(
        place, "r", stop=stop, report_progress=lambda: None, timeout_seconds=60, grace_seconds=10
    ) as processes:
        def check_stop(progress=True):
            stop.check()
            processes.check()
        processes.broadcast_on_machine("w4a16", lambda: autoround.run_process(task, folder, check_stop))
        processes.gather("failures", "")
        (folder / "published").touch()

try:
    run()
except JobError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def assert_all_ended(folder: Path) -> None:
    """The helper is gone, and nothing is published."""
    helper = int((folder / "helper").read_text(encoding="utf-8"))
    wait_for(lambda: not psutil.pid_exists(helper) or psutil.Process(helper).status() == psutil.STATUS_ZOMBIE)
    assert not (folder / "published").exists()


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_a_death_without_a_launcher_ends_the_others_and_the_helper(tmp_path: Path, killed: int) -> None:
    """SIGKILL to either of two processes while one quantizes: the other ends with 1 within seconds."""
    (tmp_path / "sleeper.py").write_text(SLEEPER, encoding="utf-8")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    members = [
        Member(
            [str(tmp_path)],
            {**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            log,
            log,
            source=PROGRAM,
        )
        for rank, log in enumerate(logs)
    ]
    for log in logs:
        log.touch()
    processes = Processes(members)
    wait_for((tmp_path / "helper").exists)
    began = time.monotonic()
    os.kill(processes.pids[killed], signal.SIGKILL)
    codes = processes.wait(120)
    assert codes == [-9 if rank == killed else 1 for rank in range(2)], logs[1 - killed].read_text(encoding="utf-8")
    assert time.monotonic() - began < 60
    assert "start the run again" in logs[1 - killed].read_text(encoding="utf-8")
    assert_all_ended(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("how", ["SIGKILL to process 0", "SIGKILL to process 1", "SIGTERM to the launcher"])
def test_under_the_launcher_all_end_with_the_helper(tmp_path: Path, how: str) -> None:
    """A process's death is an error worth a retry, a signal to the launcher ends with 75; both within seconds."""
    (tmp_path / "sleeper.py").write_text(SLEEPER, encoding="utf-8")
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    hit: list[float] = []
    code: int | None

    def strike() -> None:
        wait_for((tmp_path / "helper").exists)
        hit.append(time.monotonic())
        if how == "SIGTERM to the launcher":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            os.kill(int((tmp_path / f"pid{how[-1]}").read_text(encoding="utf-8")), signal.SIGKILL)

    thread = threading.Thread(target=strike)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with recorded_signals() as received:
        thread.start()
        try:
            code, why = launch(command, Machine(2), received, run="r", environ=environ, grace_seconds=10), ""
        except Killed as error:
            code, why = None, str(error)
        finally:
            thread.join()
    assert time.monotonic() - hit[0] < 60
    if how == "SIGTERM to the launcher":
        assert code == 75
    else:
        assert code is None
        assert f"process {how[-1]} was killed by SIGKILL" in why
    assert_all_ended(tmp_path)
