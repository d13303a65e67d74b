"""Connects the processes of a run through a TCPStore at an address that all of them know.

The functions here wait in loops, because torch's own client cannot be interrupted by a signal while it waits.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

from job import log
from job.distributed.process_group import ProcessGroup
from job.distributed.processes import ALONE, Processes
from job.distributed.ranks import Place
from job.errors import Killed, Problem, SettingsError, Unreachable
from job.preemption.stop_flag import Stop

_CONNECT_SECONDS = 2.0
_REACH_SECONDS = 10.0
"""How long torch's client may try to connect; neither a signal nor the end of the launcher interrupts it."""
_ANSWER_SECONDS = 60.0


def host_store(port: int) -> Any:
    """Hosts the store in this process, on all network interfaces; with port 0 on any free port.

    Raises:
        Unreachable: The port is in use, by an earlier attempt that has not ended yet or by another program.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        timeout = timedelta(seconds=_ANSWER_SECONDS)
        return TCPStore("localhost", port, is_master=True, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise Unreachable(f"cannot listen for the other processes on port {port}: {_first_line(error)}") from error


def connect_store(place: Place, seconds: float = _ANSWER_SECONDS) -> Any:
    """Connects to a store that is already listening.

    Raises:
        RuntimeError: It is not listening, or an answer takes longer than `seconds`, now or in a later call.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = timedelta(seconds=seconds)
    return TCPStore(place.host, place.port, is_master=False, wait_for_workers=False, timeout=timeout)


def reach_store(place: Place, seconds: float = _ANSWER_SECONDS) -> Any:
    """Like `connect_store`, but fails at once if nothing is listening.

    Raises:
        OSError, RuntimeError: The store cannot be reached.
    """
    # torch's client cannot be interrupted by a signal while it waits for the port, so it is used once the port is open.
    socket.create_connection((place.host, place.port), timeout=_CONNECT_SECONDS).close()
    return connect_store(place, seconds)


def keyspace(store: Any, run: str, restart: int = 0) -> Any:
    """The store with a prefix for one start of one run, which hides the keys of other starts."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(f"{run}/{restart}", store)


@contextmanager
def join(
    place: Place | None,
    run: str,
    *,
    stop: Stop,
    report_progress: Callable[[], None],
    patience: float,
    grace_seconds: float,
    machine_checks: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Processes]:
    """Context manager in which the processes are connected: they exchange values, and the failure of one ends all.

    Args:
        place: Rank and world size of this process; None for a single process.
        run: The run's id. Processes of another run at the same address are not connected.
        stop: This process's stop flag.
        report_progress: Reports progress to the watchdog while this process waits.
        patience: Seconds to wait for all processes: platforms start machines one after the other.
        grace_seconds: Seconds in which the other processes have to end after one has ended.
        machine_checks: `Platform.machine_checks`: a machine that lacks a GPU has too few processes.

    Raises:
        Unreachable: The store cannot be reached, or not all processes connected within `patience`.
        SettingsError: Two processes have the same rank, or they disagree on the world size.
        Preempted: This process has to stop.
        Killed: Another process or this process's launcher has died, although none had to stop.
    """
    if place is None or place.world_size == 1:
        yield ALONE
        return
    deadline = time.monotonic() + patience
    store = keyspace(_reach(place, deadline, stop, report_progress), run, place.restart)
    joined = ProcessGroup(place, store, stop, report_progress, grace_seconds)
    try:
        with machine_checks():
            _await_all(joined, store, deadline, stop, report_progress)
        joined.watch_peers()
        _connect(place, store, 2 * patience)
        yield joined
        _disconnect()
    except BaseException as error:
        joined.end(error)
        raise
    finally:
        joined.leave()


def _reach(place: Place, deadline: float, stop: Stop, report_progress: Callable[[], None]) -> Any:
    """The store, once it can be reached; process 0 hosts it if no launcher does."""
    if place.rank == 0 and not place.hosted:
        return host_store(place.port)
    while True:
        if place.launcher not in {0, os.getppid()}:
            # Otherwise it would go on waiting, and could join the next attempt's processes.
            raise Killed("the process that started this one is gone; start the run again to resume it")
        try:
            store = reach_store(place, _REACH_SECONDS)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline:
                where = f"{place.host}:{place.port}"
                raise Unreachable(f"process 0 of this run cannot be reached at {where}: {error}") from error
        else:
            store.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
            return store
        stop.check()
        report_progress()
        time.sleep(0.2)


def _await_all(
    joined: ProcessGroup, store: Any, deadline: float, stop: Stop, report_progress: Callable[[], None]
) -> None:
    """Waits until all processes have connected, and checks that their ranks and world sizes are consistent."""
    place = joined.place
    total = store.compare_set("world_size", "", str(place.world_size)).decode()
    if total != str(place.world_size):
        what = f"adds up to {place.world_size} here and to {total} on another machine; set the same number on all"
        raise SettingsError([Problem("JOB_RUN__PROCESSES", what)])
    joined.announce()
    if store.add(f"here#{place.rank}", 1) > 1:
        # On Kubernetes the rank is the pod's index, so the other process is mostly in the pod that this one replaces.
        # If that has published why it ended, this process ends for the same reason; else with code 72, and the
        # platform's retry starts when the old pod is gone.
        joined.check()
        what = (
            f"another process has rank {place.rank}, too; give each machine its own rank, or wait until "
            "the old process has ended"
        )
        raise SettingsError([Problem("JOB_RUN__NODE_RANK", what)])
    here = [f"here#{rank}" for rank in range(place.world_size)]
    while not store.check(here):
        if time.monotonic() > deadline:
            missing = [rank for rank, key in enumerate(here) if not store.check([key])]
            raise Unreachable(f"of {place.world_size} processes, these did not connect: {', '.join(map(str, missing))}")
        joined.check()
        stop.check()
        report_progress()
        time.sleep(0.05)


def _connect(place: Place, store: Any, timeout_seconds: float) -> None:
    """Creates the group for all-reduce: gloo for tensors on a CPU (flags, gradients), NCCL for tensors on a GPU."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    store.set_timeout(timedelta(seconds=_ANSWER_SECONDS))  # init_process_group has set the group's timeout on it
    log.get_logger().info("all processes are connected", processes=place.world_size)


def _disconnect() -> None:
    """Ends the group. Called after success only: after a failure it would wait for processes that have ended."""
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):  # the work is done, so a failure here costs nothing
        dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
