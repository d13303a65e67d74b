"""Starts the processes of this machine, hands signals on to them, and ends with the exit code that they add up to.

By torch's elastic multiprocessing, which torchrun stands on. The torchrun command itself turns every exit code into 1
and kills after 30 seconds; under it the job works all the same, as whoever sets torchrun's variables starts processes.
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
from job.distributed.process_group import LAST_WORDS_SECONDS, tell_end
from job.distributed.ranks import Place
from job.distributed.rendezvous import enter_store, host_store, keyspace
from job.errors import Killed, Preempted, Problem, SettingsError, exit_codes
from job.preemption.stop_flag import signals_to_handle

_LOOK_SECONDS = 0.05
_TELL_SECONDS = 5.0
_DRIVERS = Path("/dev/nvidiactl"), Path("/dev/dxg")
"""One of these is there where CUDA is, natively or in Windows' Linux."""
_GRAVITY = ("no", "counts against the limit", "yes", "yes, free")
"""The columns of the table of exit codes, the gravest first: an error that no retry can mend outweighs the others."""


@dataclass(frozen=True)
class Machine:
    """This machine among those of the run: how many processes it has, and where machine 0 listens."""

    processes: int
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None


def count_processes(wanted: int | Literal["auto"]) -> int:
    """How many processes this machine gets: what was asked for, or one for each visible GPU, or one.

    Raises:
        SettingsError: More are wanted than there are GPUs.
    """
    if wanted == 1 or not any(device.exists() for device in _DRIVERS):
        return 1 if wanted == "auto" else wanted  # without torch, which takes seconds to import
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return max(1, gpus)
    if gpus and wanted > gpus:
        what = f"{wanted} is more than the {gpus} GPUs that are visible; lower it, or set auto"
        raise SettingsError([Problem("run.processes", what)])
    return wanted


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within it the signals that ask for an end are only noted."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in signals_to_handle()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_signals(received: Sequence[int]) -> None:
    """Ends here if a signal came."""
    if received:
        raise Preempted(f"stopped by {signal.Signals(received[0]).name} before anything began")


def launch(
    command: Sequence[str],
    machine: Machine,
    received: list[int],
    *,
    run: str,
    environ: Mapping[str, str],
    grace_seconds: float,
) -> int:
    """Runs the command in each of this machine's processes, with torchrun's variables set, to their end.

    None of them is ever started again: that is the platform's, which counts and pays for it. When one has ended, and
    when a signal came, the others have `grace_seconds` to end by themselves.

    Args:
        command: What each of them runs.
        machine: How many, and among which others.
        received: The signals of `noted_signals`.
        run: The run's id.
        environ: The environment; the processes get it with torchrun's variables.
        grace_seconds: See above.

    Returns:
        The exit code of process 0 if it is here and was successful, else the gravest.

    Raises:
        Killed: A process was, or ended with a code that is none of ours.
        Unreachable: Machine 0 cannot listen.
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
        codes, late = _watch(context, received, grace_seconds, _Teller(place, hosted, run))
    finally:
        context.close(signal.SIGKILL, timeout=5)
    if hosted and machine.nodes > 1 and any(codes.values()):
        time.sleep(LAST_WORDS_SECONDS)  # the store goes with this process, and the others are still reading why
    return _verdict({place.rank + local: code for local, code in codes.items()}, {place.rank + local for local in late})


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
    # In a thread of its own, where it cannot put its signal handlers, which end this process, in place of ours.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(
            start_processes,
            name="job",
            entrypoint=command[0],
            args=dict.fromkeys(ranks, tuple(command[1:])),
            envs={local: {**common, "RANK": str(place.rank + local), "LOCAL_RANK": str(local)} for local in ranks},
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        ).result()


class _Teller:
    """Tells the other processes of the run, wherever they are, that one of this machine has ended badly."""

    def __init__(self, place: Place, hosted: Any, run: str) -> None:
        self._place, self._hosted, self._run = place, hosted, run

    def __call__(self, local: int, code: int) -> None:
        known = code in exit_codes()
        try:
            store = keyspace(self._hosted or enter_store(self._place, _TELL_SECONDS), self._run)
            # One that died without a word says nothing of the state, which is durable: the others are worth a retry.
            tell_end(store, self._place.rank + local, code if known else Preempted.exit_code, _manner(code))
        except RuntimeError as error:
            log.get_logger().debug("the other machines cannot be told", why=str(error))


def _watch(context: Any, received: list[int], grace_seconds: float, tell: _Teller) -> tuple[dict[int, int], set[int]]:
    """Waits for the end of all; returns their exit codes, negative for a signal, and who died of signals from here."""
    handed_on, deadline, told = 0, float("inf"), False
    while True:
        codes = {local: handler.proc.poll() for local, handler in context.subprocess_handlers.items()}
        ended = {local: code for local, code in codes.items() if code is not None}
        running = codes.keys() - ended.keys()
        failed = next((local for local, code in ended.items() if code), None)
        if failed is not None and not told:
            tell(failed, ended[failed])
            told = True
        # Before it knows what to do with a signal, a process dies of it.
        late = {local for local, code in ended.items() if -code in received}
        if not running:
            return ended, late
        for number in received[handed_on:]:
            handed_on += 1
            for local in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(context.pids()[local], number)
        if ended or received:
            deadline = min(deadline, time.monotonic() + grace_seconds)
        if time.monotonic() > deadline:
            context.close(signal.SIGKILL, timeout=5)
            return {**ended, **dict.fromkeys(running, -signal.SIGKILL)}, late | running
        time.sleep(_LOOK_SECONDS)


def _manner(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    why = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{why}"


def _verdict(codes: Mapping[int, int], late: set[int]) -> int:
    """The exit code for all; `late` are those whose own end says nothing: killed because others had ended or had to."""
    if codes.get(0) == 0 or not any(codes.values()):
        return 0
    table = exit_codes()
    strange = {rank: code for rank, code in codes.items() if code and code not in table and rank not in late}
    known = {code for code in codes.values() if code in table}
    graves = sorted(known, key=lambda code: _GRAVITY.index(table[code][1]))
    if strange and not (graves and table[graves[0]][1] == "no"):
        raise Killed("; ".join(f"process {rank} {_manner(code)}" for rank, code in strange.items()))
    return graves[0] if graves else Preempted.exit_code


def worker_command(words: Sequence[str]) -> list[str]:
    """What each process runs: this program again, with the same words."""
    return [sys.executable, "-m", "job", "run", *words]
