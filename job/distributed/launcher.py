"""Starts one process for each GPU of this machine, forwards signals to them, and returns one exit code for all.

It uses torch's elastic multiprocessing, as torchrun does. The torchrun command itself turns every exit code into 1 and
kills the processes 30 seconds after a signal. The job also works under torchrun: where torchrun's variables are set,
nothing is launched here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from job import log
from job.distributed.process_group import REASON_SECONDS, publish_end
from job.distributed.ranks import Place
from job.distributed.rendezvous import connect_store, host_store, keyspace
from job.errors import Killed, Preempted, Problem, SettingsError, exit_codes
from job.preemption.stop_flag import signals_to_handle

_POLL_SECONDS = 0.05
_PUBLISH_SECONDS = 5.0
_DRIVERS = Path("/dev/nvidiactl"), Path("/dev/dxg")
"""One of these devices exists where CUDA does: on Linux, and on Windows' subsystem for Linux."""
_SEVERITY = ("no", "counts against the limit", "yes", "yes, free")
"""Values of the column "retry?" of the exit codes, most serious first: what no retry can fix outweighs the others."""


@dataclass(frozen=True)
class Machine:
    """This machine of a run: its processes, its number, and where machine 0 listens (`host:port`)."""

    processes: int
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None


def count_processes(wanted: int | Literal["auto"]) -> int:
    """The number of processes to start: `wanted`; with `auto` one for each visible GPU, or one without a GPU.

    Raises:
        SettingsError: More are wanted than there are visible GPUs.
    """
    if wanted == 1 or not any(device.exists() for device in _DRIVERS):
        return 1 if wanted == "auto" else wanted  # before torch, which takes seconds to import
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return max(1, gpus)
    if gpus and wanted > gpus:
        what = f"{wanted} is more than the {gpus} visible GPUs; lower it, or set auto"
        raise SettingsError([Problem("JOB_RUN__PROCESSES", what)])
    return wanted


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within it the signals of `stop_flag.SIGNALS` are appended to the list, and do nothing else."""
    received: list[int] = []

    def record(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, record) for number in signals_to_handle()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_signals(received: Sequence[int]) -> None:
    """Ends the job if a signal arrived.

    Raises:
        Preempted: One did.
    """
    if received:
        raise Preempted(f"stopped by {signal.Signals(received[0]).name} before the run began")


def launch(
    command: Sequence[str],
    machine: Machine,
    received: list[int],
    *,
    run: str,
    environ: Mapping[str, str],
    grace_seconds: float,
) -> int:
    """Runs the command in each process of this machine, with torchrun's variables set, until all have ended.

    No process is started again: retries are the platform's. When one process has ended, or a signal arrived, the
    others get `grace_seconds` to end; then they are killed.

    Args:
        command: What each process runs.
        machine: How many processes, and which machine of the run this is.
        received: The list of `noted_signals`; each signal in it is forwarded to every process.
        run: The run's id.
        environ: The environment of the processes, to which torchrun's variables are added.
        grace_seconds: See above.

    Returns:
        0 if process 0 runs here and succeeded, otherwise the most serious exit code.

    Raises:
        Killed: A process was killed, or ended with a code that is not in the table of exit codes.
        Preempted: A signal arrived before the processes were started.
        Unreachable: This is machine 0, and its port is taken.
    """
    host, port = _split(machine.rendezvous)
    hosted = host_store(port) if machine.node_rank == 0 else None
    place = Place(
        rank=machine.node_rank * machine.processes,
        world_size=machine.nodes * machine.processes,
        local_world_size=machine.processes,
        host="localhost" if hosted else host,
        port=hosted.port if hosted else port,
        hosted=True,
    )
    check_signals(received)
    context = _start(command, place, run, environ)
    try:
        codes, late = _watch(context, received, grace_seconds, _EndPublisher(place, hosted, run))
    finally:
        context.close(signal.SIGKILL, timeout=5)
    if hosted and machine.nodes > 1 and any(codes.values()):
        time.sleep(REASON_SECONDS)  # the store ends with this process, and others may still read the reason
    return _combined(
        {place.rank + local: code for local, code in codes.items()}, {place.rank + local for local in late}
    )


def _split(rendezvous: str | None) -> tuple[str, int]:
    host, _, port = (rendezvous or "localhost:0").rpartition(":")
    return host.strip("[]"), int(port)


def _start(command: Sequence[str], place: Place, run: str, environ: Mapping[str, str]) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    common = {
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "MASTER_ADDR": place.host,
        "MASTER_PORT": str(place.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "JOB_RUN__ID": run,
    }
    if "OMP_NUM_THREADS" not in environ:
        common["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))
    ranks = range(place.local_world_size)
    # In a thread, because start_processes installs signal handlers that end this process, and cannot do so outside of
    # the main thread.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(
            start_processes,
            name="job",
            entrypoint=command[0],
            args=dict.fromkeys(ranks, tuple(command[1:])),
            envs={local: {**common, "RANK": str(place.rank + local), "LOCAL_RANK": str(local)} for local in ranks},
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        ).result()


class _EndPublisher:
    """Publishes in the common store that a process of this machine has failed, for the processes of all machines."""

    def __init__(self, place: Place, hosted: Any, run: str) -> None:
        self._place, self._hosted, self._run = place, hosted, run

    def __call__(self, local: int, code: int) -> None:
        known = code in exit_codes()
        try:
            store = keyspace(self._hosted or connect_store(self._place, _PUBLISH_SECONDS), self._run)
            # A process that was killed leaves the durable state intact, so the others end as preempted: worth a retry.
            publish_end(store, self._place.rank + local, code if known else Preempted.exit_code, _how_it_ended(code))
        except RuntimeError as error:
            log.get_logger().debug("the other machines cannot be informed", why=str(error))


def _watch(
    context: Any, received: list[int], grace_seconds: float, publish: _EndPublisher
) -> tuple[dict[int, int], set[int]]:
    """Waits until all processes have ended.

    Returns:
        Exit codes by local rank, negative for a signal, and the local ranks whose signal came from here.
    """
    forwarded, deadline, published = 0, float("inf"), False
    while True:
        codes = {local: handler.proc.poll() for local, handler in context.subprocess_handlers.items()}
        ended = {local: code for local, code in codes.items() if code is not None}
        running = codes.keys() - ended.keys()
        failed = next((local for local, code in ended.items() if code), None)
        if failed is not None and not published:
            publish(failed, ended[failed])
            published = True
        # A process that has not installed its handlers yet is killed by the signal that was forwarded to it.
        late = {local for local, code in ended.items() if -code in received}
        if not running:
            return ended, late
        for number in received[forwarded:]:
            forwarded += 1
            for local in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(context.pids()[local], number)
        if ended or received:
            deadline = min(deadline, time.monotonic() + grace_seconds)
        if time.monotonic() > deadline:
            context.close(signal.SIGKILL, timeout=5)
            return {**ended, **dict.fromkeys(running, -signal.SIGKILL)}, late | running
        time.sleep(_POLL_SECONDS)


def _how_it_ended(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    why = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{why}"


def _combined(codes: Mapping[int, int], late: set[int]) -> int:
    """One exit code for all processes.

    Args:
        codes: Exit codes by rank, negative for a signal.
        late: Ranks that the launcher itself signalled or killed: their codes say nothing about the cause.
    """
    if codes.get(0) == 0 or not any(codes.values()):
        return 0
    table = exit_codes()
    unknown = {rank: code for rank, code in codes.items() if code and code not in table and rank not in late}
    known = {code for code in codes.values() if code in table}
    by_severity = sorted(known, key=lambda code: _SEVERITY.index(table[code][1]))
    if unknown and not (by_severity and table[by_severity[0]][1] == "no"):
        raise Killed("; ".join(f"process {rank} {_how_it_ended(code)}" for rank, code in unknown.items()))
    return by_severity[0] if by_severity else Preempted.exit_code


def worker_command(words: Sequence[str]) -> list[str]:
    """The command that each process runs: this program again, with the same arguments."""
    return [sys.executable, "-m", "job", "run", *words]
