"""Starts one process for each GPU of this machine, forwards signals to them, and returns one exit code for all.

It uses torch's elastic multiprocessing, as torchrun does. The torchrun command is not used, because it turns every exit
code into 1 and kills the processes 30 seconds after a signal. The job also works under torchrun: if torchrun's
variables are set, nothing is launched here.
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

from job.distributed import other_machines
from job.distributed.other_machines import OtherMachines
from job.distributed.ranks import LAUNCHER, Place
from job.distributed.rendezvous import host_store
from job.errors import Killed, Preempted, Problem, SettingsError, exit_codes, most_serious
from job.preemption.stop_flag import signals_to_handle

_POLL_SECONDS = 0.05
_DRIVERS = Path("/dev/nvidiactl"), Path("/dev/dxg")
"""If CUDA is available, one of these devices exists: the first on Linux, the second on Windows' subsystem for Linux."""
# Without GPUs: more processes would only take the machine's memory, half a GB each, until the kernel kills the run.
_FEW_PROCESSES, _PROCESSES_OF_A_CPU = 16, 4


@dataclass(frozen=True)
class Machine:
    """This machine: its processes, the number of machines, its rank, and where machine 0 listens (`host:port`)."""

    processes: int
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None


def count_processes(requested: int | Literal["auto"]) -> int:
    """The number of processes to start: `requested`; with `auto` one for each visible GPU, or one without a GPU.

    Raises:
        SettingsError: `requested` is more than the number of visible GPUs; without a GPU, more than the CPUs can run.
    """
    gpus = 0
    if requested != 1 and any(device.exists() for device in _DRIVERS):
        import torch  # only here, since it takes seconds

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "auto":
        return max(1, gpus)
    cpus = len(os.sched_getaffinity(0))
    if requested > (most := gpus or max(_FEW_PROCESSES, _PROCESSES_OF_A_CPU * cpus)):
        on = f"the {gpus} visible GPUs" if gpus else f"{most}, the most for the {cpus} CPUs of a machine without GPUs"
        raise SettingsError([Problem("JOB_RUN__PROCESSES", f"{requested} is more than {on}; lower it, or set auto")])
    return requested


@contextmanager
def recorded_signals() -> Iterator[list[int]]:
    """Context manager in which the signals of `stop_flag.SIGNALS` are only appended to the list."""
    signals: list[int] = []

    def record(number: int, _frame: FrameType | None) -> None:
        signals.append(number)

    before = {number: signal.signal(number, record) for number in signals_to_handle()}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_signals(signals: Sequence[int]) -> None:
    """Ends the job if a signal has arrived.

    Raises:
        Preempted: A signal has arrived.
    """
    if signals:
        raise Preempted(f"stopped by {signal.Signals(signals[0]).name} before the run began")


def launch(
    command: Sequence[str],
    machine: Machine,
    signals: list[int],
    *,
    run: str,
    environ: Mapping[str, str],
    grace_seconds: float,
) -> int:
    """Runs the command in each process of this machine, with torchrun's variables set, until all have ended.

    No process is restarted here: the platform retries the job. When one process has ended, or a signal has arrived, the
    others have `grace_seconds` to end; then they are killed.

    Args:
        command: The command that each process runs.
        machine: This machine.
        signals: The list of `recorded_signals`; each signal in it is forwarded to every process.
        run: The run's id.
        environ: The environment of the processes, to which torchrun's variables are added.
        grace_seconds: See above.

    Returns:
        0 if process 0 succeeded, otherwise the most serious exit code of this machine's processes.

    Raises:
        JobError: Another machine ended with a more serious exit code, which this error has.
        Killed: A process was killed, or ended with a code that is not in the table of exit codes; or it had to be
            killed because it did not end, although no signal had arrived and no other process is known to have failed.
        Preempted: A signal arrived before the processes were started.
        Unreachable: This is machine 0, and its port is in use.
    """
    host, port = split_address(machine.rendezvous)
    hosted = host_store(port, run) if machine.node_rank == 0 else None
    place = Place(
        rank=machine.node_rank * machine.processes,
        world_size=machine.nodes * machine.processes,
        local_world_size=machine.processes,
        host="localhost" if hosted else host,
        port=hosted.port if hosted else port,
        hosted=True,
    )
    check_signals(signals)
    context = _start(command, place, run, environ)
    with contextlib.closing(OtherMachines(machine.node_rank, machine.nodes, place, hosted, run)) as others:
        try:
            outcome = _watch(context, signals, grace_seconds, others)
        finally:
            context.close(signal.SIGKILL, timeout=5)
        codes = {place.rank + local: code for local, code in outcome.codes.items()}
        late = {place.rank + local for local in outcome.late}
        # Processes that hang, though nobody asked them to stop, are no preemption, whose retry is free without limit.
        only_late = Preempted if outcome.stopped or others.first is not None else Killed
        code = _one_exit_code(codes, late, only_late.exit_code)
        if machine.nodes > 1:
            # Without a signal there is no time by which the platform kills this machine.
            answer_seconds = 1.0 if outcome.stopped else 2 * other_machines.CONNECT_SECONDS
            code = others.agree_on_code(code, max(0.0, outcome.deadline - time.monotonic()), answer_seconds)
    if code == Killed.exit_code:
        killed = {rank: _how_it_ended(code) for rank, code in _killed_or_unknown(codes, late).items()}
        if not killed and only_late is Killed:
            killed = dict.fromkeys(sorted(late), _how_it_hung(machine_0_lost=outcome.lost))
        if killed:
            raise Killed("; ".join(f"process {rank} {how}" for rank, how in killed.items()))
    return code


def split_address(rendezvous: str | None) -> tuple[str, int]:
    """Host and port of `Machine.rendezvous`; port 0 takes a free one."""
    host, _, port = (rendezvous or "localhost:0").rpartition(":")
    return host.strip("[]"), int(port)


def worker_environment(place: Place, run: str, local: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that this launcher sets for one of its processes, as torchrun does.

    Args:
        place: That of the machine's first process.
        run: The run's id.
        local: The process's rank on this machine.
        environ: The environment, which is not repeated; its OMP_NUM_THREADS is kept.
    """
    variables = {
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "RANK": str(place.rank + local),
        "LOCAL_RANK": str(local),
        "MASTER_ADDR": place.host,
        "MASTER_PORT": str(place.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        LAUNCHER: str(os.getpid()),
        "JOB_RUN__ID": run,
    }
    if "OMP_NUM_THREADS" not in environ:
        variables["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))
    return variables


def _start(command: Sequence[str], place: Place, run: str, environ: Mapping[str, str]) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    ranks = range(place.local_world_size)
    # In a thread, because start_processes installs signal handlers that end this process, and cannot do so outside of
    # the main thread.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(
            start_processes,
            name="job",
            entrypoint=command[0],
            args=dict.fromkeys(ranks, tuple(command[1:])),
            envs={local: worker_environment(place, run, local, environ) for local in ranks},
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        ).result()


@dataclass(frozen=True)
class _Outcome:
    """How this machine's processes have ended.

    Attributes:
        codes: Exit codes by local rank, negative for a signal.
        late: Local ranks of the processes that this launcher killed, or that a signal it passed on killed.
        deadline: Time by which this machine has to end, on the clock of `time.monotonic`.
        stopped: Whether it has to end because of a signal, and not because a process had ended or machine 0 was lost
            before that.
        lost: Whether it has to end because machine 0 was lost.
    """

    codes: Mapping[int, int]
    late: set[int]
    deadline: float
    stopped: bool
    lost: bool


def _watch(context: Any, signals: list[int], grace_seconds: float, others: OtherMachines) -> _Outcome:
    """Waits until all processes have ended, and announces each failure as soon as it is seen."""
    forwarded, deadline, announced, stopped, lost = 0, float("inf"), set[int](), False, False
    while True:
        codes = {local: handler.proc.poll() for local, handler in context.subprocess_handlers.items()}
        ended = {local: code for local, code in codes.items() if code is not None}
        running = codes.keys() - ended.keys()
        # A process that has not installed its handlers yet is killed by the signal that was forwarded to it.
        late = {local for local, code in ended.items() if -code in signals}
        for local in sorted(local for local, code in ended.items() if code and local not in announced):
            announced.add(local)
            others.announce_end(local, _one_exit_code({local: ended[local]}, late), _how_it_ended(ended[local]))
        if deadline == float("inf"):
            stopped = bool(signals)
        if ended or signals:
            deadline = min(deadline, time.monotonic() + grace_seconds)
        elif others.ended_elsewhere():
            lost = lost or others.first is None
            # this machine's processes notice it somewhat later than the launcher
            deadline = min(deadline, time.monotonic() + grace_seconds + other_machines.ANSWER_SECONDS)
        if not running:
            return _Outcome(ended, late, deadline, stopped, lost)
        for number in signals[forwarded:]:
            forwarded += 1
            for local in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(context.pids()[local], number)
        if time.monotonic() > deadline:
            context.close(signal.SIGKILL, timeout=5)
            killed = dict.fromkeys(running, -signal.SIGKILL)
            return _Outcome({**ended, **killed}, late | running, deadline, stopped, lost)
        time.sleep(_POLL_SECONDS)


def _how_it_ended(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        meaning = exit_codes()[code][0] if code in exit_codes() else "not a code of the job"
        return f"ended with exit code {code} ({meaning})"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    why = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{why}"


def _how_it_hung(*, machine_0_lost: bool) -> str:
    """How a process ended that this launcher killed although no signal had arrived, in words."""
    why = "machine 0 of this run cannot be reached any more" if machine_0_lost else "another process had ended"
    return f"did not end, although {why}, and was killed"


def _killed_or_unknown(codes: Mapping[int, int], late: set[int]) -> dict[int, int]:
    """The processes, by rank, that were killed, or that ended with a code that is not in the table."""
    table = exit_codes()
    return {rank: code for rank, code in codes.items() if code and code not in table and rank not in late}


def _one_exit_code(codes: Mapping[int, int], late: set[int], only_late: int = Preempted.exit_code) -> int:
    """One exit code for the processes of this machine; a process that was killed counts as `Killed`.

    Args:
        codes: Exit codes by rank, negative for a signal.
        late: Ranks that the launcher itself signalled or killed; their codes are ignored, since they are not the cause.
        only_late: The code where no process failed in another way.
    """
    if codes.get(0) == 0 or not any(codes.values()):
        return 0
    table = exit_codes()
    causes = [code for code in codes.values() if code in table] + [
        Killed.exit_code for _ in _killed_or_unknown(codes, late)
    ]
    return most_serious(causes) if causes else only_late


def worker_command(arguments: Sequence[str]) -> list[str]:
    """The command that each process runs: this program again, with the same arguments."""
    return [sys.executable, "-m", "job", "run", *arguments]
