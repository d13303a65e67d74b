"""Connects the processes of a run through a TCPStore at an address that all of them are given.

`join` waits in loops, because torch's own client cannot be interrupted by a signal while it waits. It connects in a
thread, because that client waits for a frozen machine without a limit.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

from job import log
from job.common.formatting import first_line
from job.common.threads import in_thread
from job.distributed.process_group import CHECK_SECONDS, ProcessGroup
from job.distributed.processes import ALONE, Processes
from job.distributed.ranks import Place
from job.errors import Killed, Problem, SettingsError, Unreachable
from job.preemption.stop_flag import StopFlag

_CONNECT_SECONDS = 2.0
_REACH_SECONDS = 10.0
"""How long torch's client may try to connect to a port that is open."""
_ANSWER_SECONDS = 60.0
"""How long the store may take to answer; then another connection is tried."""
_RETRY_SECONDS = 0.2
_RUN = "run"
"""Key, outside of the keyspaces, of the id of the run that the store is for."""
_FOREIGN_PROCESS = "stranger"
"""Key, outside of the keyspaces, of why a process that connected to the store does not belong to its run."""
_FOREIGN_PROCESS_SECONDS = 10.0
"""How long processes that wait go on after it has come: it may be left over from an earlier run."""
_REMINDER_SECONDS = 30.0
"""How often the log says for whom this process waits."""
_MAX_LISTED = 20


def host_store(port: int, run: str | None = None) -> Any:
    """Hosts the store in this process, on all network interfaces; port 0 takes a free one.

    Args:
        port: Where to listen.
        run: The id of the run that it is for; None if that is not known.

    Raises:
        Unreachable: The port is in use, by an earlier attempt that has not ended yet or by another program.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        timeout = timedelta(seconds=_ANSWER_SECONDS)
        store = TCPStore("localhost", port, is_master=True, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise Unreachable(f"cannot listen for the other processes on port {port}: {first_line(error)}") from error
    if run is not None:
        store.set(_RUN, run)
    return store


def announce_foreign_process(store: Any, why: str) -> None:
    """Tells the processes that wait at a store that one has come that does not belong to their run.

    Args:
        store: Without a keyspace.
        why: What is wrong with it.
    """
    store.compare_set(_FOREIGN_PROCESS, "", why[:2000])


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


def reach_keyspace(place: Place, run: str, seconds: float) -> Any:
    """The keyspace of a run in a store that listens already.

    Raises:
        OSError, RuntimeError: The store cannot be reached, or is for another run.
    """
    store = reach_store(place, seconds)
    if store.check([_RUN]) and store.get(_RUN).decode() != run:
        raise RuntimeError(f"the store at {place.host}:{place.port} is for another run")
    return keyspace(store, run)


def keyspace(store: Any, run: str, restart: int = 0) -> Any:
    """The store with a prefix for one start of one run, which hides the keys of other starts."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(f"{run}/{restart}", store)


@contextmanager
def join(
    place: Place | None,
    run: str,
    *,
    stop: StopFlag,
    report_progress: Callable[[], None],
    timeout_seconds: float,
    grace_seconds: float,
    machine_checks: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Processes]:
    """Context manager in which the processes are connected: they exchange values, and the failure of one ends all.

    Args:
        place: Rank and world size of this process; None for a single process.
        run: The run's id. Processes of another run at the same address are not connected.
        stop: This process's stop flag.
        report_progress: Reports progress to the watchdog while this process waits.
        timeout_seconds: Seconds to wait for all processes: platforms start machines one after the other.
        grace_seconds: Seconds in which the other processes have to end after one has ended.
        machine_checks: `Platform.machine_checks`: a machine that lacks a GPU has too few processes.

    Raises:
        Unreachable: The store cannot be reached, or not all processes arrived within `timeout_seconds`.
        SettingsError: Two processes have the same rank, they disagree on the world size or on the run's id, or a
            machine that does not know the id has ended.
        Preempted: This process has to stop.
        Stalled: Process 0 had arrived, and has not run for `timeout_seconds` since then.
        Killed: Another process or this process's launcher has died, although none had to stop.
    """
    if place is None or place.world_size == 1:
        yield ALONE
        return
    limit = _Limit(timeout_seconds)
    address = _reach(place, run, limit, stop, report_progress)
    with machine_checks(), _store_errors(place):
        _check_run(address, run)  # before it is one of the processes, which wait for each other at the end
    store = keyspace(address, run, place.restart)
    group = ProcessGroup(
        place, store, stop, report_progress, grace_seconds=grace_seconds, stall_seconds=timeout_seconds
    )
    try:
        with machine_checks(), _store_errors(place):
            foreign_processes = _ForeignProcesses(address)

            def check() -> None:
                _check_launcher(place)
                group.check()
                foreign_processes.check()
                stop.check()
                report_progress()

            _await_all(group, store, limit, check)
        group.watch_peers()
        group.start_heartbeat()
        _connect(group, run, 2 * timeout_seconds)
        yield group
        _disconnect()
    except BaseException as error:
        group.end(error)
        raise
    finally:
        group.leave()


class _Limit:
    """How long this process waits for the others.

    Args:
        seconds: JOB_TRAIN__STALL_SECONDS, from now on.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, time.monotonic() + seconds

    def __str__(self) -> str:
        return f"{self._seconds:g} s (JOB_TRAIN__STALL_SECONDS)"

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self._end

    @property
    def seconds_left(self) -> int:
        """What is left of it."""
        return max(0, round(self._end - time.monotonic()))


def _reach(place: Place, run: str, limit: _Limit, stop: StopFlag, report_progress: Callable[[], None]) -> Any:
    """The store, once it can be reached; process 0 hosts it where no launcher does."""
    if place.rank == 0 and not place.hosted:
        return host_store(place.port, run)
    import torch.distributed  # noqa: F401 - not first in the thread below, which may be left behind

    address, reminder = f"{place.host}:{place.port}", _Reminder()
    attempt: Future[Any] | None = None
    abandon_at = 0.0
    while True:
        _check_launcher(place)
        if attempt is None:
            # In a thread: if the store's machine is frozen, it accepts the connection, and torch's client waits for an
            # answer without a limit.
            attempt = in_thread(partial(reach_store, place, _REACH_SECONDS), "store")
            abandon_at = time.monotonic() + _ANSWER_SECONDS
        try:
            store = attempt.result(timeout=_RETRY_SECONDS)
        except (OSError, RuntimeError) as error:  # one is TimeoutError: the attempt goes on
            why = str(error)[:200] or "no answer"
            # One process of each machine says so; on machine 0 the one after process 0, if that hosts the store itself.
            if (place.local_rank == 0 or place.rank == 1) and reminder.is_due():
                what = "waiting for process 0, which cannot be reached"
                log.get_logger().warning(what, at=address, why=why, at_most_seconds=limit.seconds_left)
            if limit.is_over:
                what = f"process 0 of this run cannot be reached at {address}: {why}; waited for {limit}"
                raise Unreachable(what) from error
            if attempt.done() or time.monotonic() > abandon_at:
                attempt = None
        else:
            store.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
            return store
        stop.check()
        report_progress()
        time.sleep(_RETRY_SECONDS)


@contextmanager
def _store_errors(place: Place) -> Iterator[None]:
    """Within it, an error of torch's means that the store is gone: machine 0 has ended before all had come."""
    try:
        yield
    except RuntimeError as error:
        what = f"process 0 of this run cannot be reached any more at {place.host}:{place.port}"
        raise Unreachable(f"{what}: {first_line(error)}") from error


def _check_launcher(place: Place) -> None:
    """Raises Killed if this process's launcher is gone.

    It would wait until its time is over, and then be taken for a process of the next attempt, or keep the
    place of one.
    """
    if place.launcher not in {0, os.getppid()}:
        raise Killed("the process that started this one is gone; start the run again to resume it")


def _check_run(store: Any, run: str) -> None:
    """Raises SettingsError, and tells the processes that wait, if the store is for another run than this process."""
    other = store.compare_set(_RUN, "", run).decode()
    if other != run:
        announce_foreign_process(store, f"one process has {run}, the others have {other}")
        what = f"is {run} here and {other} on another machine at this address; set the same id on all, or another port"
        raise SettingsError([Problem("JOB_RUN__ID", f"{what} in JOB_RUN__RENDEZVOUS")])


class _ForeignProcesses:
    """Raises SettingsError when a process that does not belong to the run has come, and a while later one is missing.

    Not at once: a process may be left over from an earlier run that met at this address.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._checked = self._seen_since = math.inf

    def check(self) -> None:
        """Asks the store once a second at most.

        Raises:
            SettingsError: See above.
        """
        now = time.monotonic()
        if self._checked != math.inf and now - self._checked < CHECK_SECONDS:
            return
        self._checked = now
        if not self._store.check([_FOREIGN_PROCESS]):
            return
        self._seen_since = min(self._seen_since, now)
        if now - self._seen_since >= _FOREIGN_PROCESS_SECONDS:
            why = self._store.get(_FOREIGN_PROCESS).decode()
            what = f"must be the same on all machines, but a machine without it or with another one connected: {why}"
            raise SettingsError([Problem("JOB_RUN__ID", what)])


def _await_all(group: ProcessGroup, store: Any, limit: _Limit, check: Callable[[], None]) -> None:
    """Waits until all processes have arrived, and checks that their ranks and world sizes fit together."""
    place = group.place
    agreed_size = store.compare_set("world_size", "", str(place.world_size)).decode()
    if agreed_size != str(place.world_size):
        message = (
            f"adds up to {place.world_size} here and to {agreed_size} on another machine; set the same number on all"
        )
        raise SettingsError([Problem("JOB_RUN__PROCESSES", message)])
    group.announce()
    if store.add(f"here#{place.rank}", 1) > 1:
        # On Kubernetes the rank is the pod's index, so the other process is mostly in the pod that this one replaces.
        # If that has announced why it ended, this process ends for the same reason; else with code 72, and the
        # platform's retry starts when the old pod is gone.
        group.check()
        message = (
            f"another process has rank {place.rank}, too; give each machine its own rank, or wait until "
            "the old process has ended"
        )
        raise SettingsError([Problem("JOB_RUN__NODE_RANK", message)])
    keys, reminder = [f"here#{rank}" for rank in range(place.world_size)], _Reminder()
    while not store.check(keys):
        if reminder.is_due():
            _log_missing(place, [rank for rank, key in enumerate(keys) if not store.check([key])], limit)
        check()  # before the limit is looked at: why a process has ended says more than that it did not come
        if limit.is_over:
            missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
            what = f"of {place.world_size} processes, these did not connect: {missing}; waited for {limit}"
            raise Unreachable(what)
        time.sleep(0.05)


class _Reminder:
    """Says every `_REMINDER_SECONDS` that it is time for a line in the log, the first time after these seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _REMINDER_SECONDS

    def is_due(self) -> bool:
        """Whether it is time."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + _REMINDER_SECONDS
        return True


def _log_missing(place: Place, missing: Sequence[int], limit: _Limit) -> None:
    """Logs for which processes this one waits, if it is the first of its machine that has come.

    A process that ends before it connects is not noticed, unless the job's launcher has started it, or it could say so
    (`early_end`): nobody knows its process id. So a person has to see which one it is. As a warning, because processes
    other than 0 log only those.
    """
    first = place.first_of_machine
    if not set(range(first, place.rank)) <= set(missing):
        return
    last = first + max(place.local_world_size, place.local_rank + 1)
    log.get_logger().warning(
        "waiting for processes that have not connected",
        processes=place.world_size,
        missing_processes=len(missing),
        missing=list(missing[:_MAX_LISTED]),
        on_this_machine=[rank for rank in missing if first <= rank < last][:_MAX_LISTED],
        at_most_seconds=limit.seconds_left,
    )


def _connect(group: ProcessGroup, run: str, timeout_seconds: float) -> None:
    """Creates the group for all-reduce: gloo for tensors on a CPU (flags, gradients), NCCL for tensors on a GPU.

    It has a connection to the store of its own: while torch waits for a key, the connection is locked.

    Raises:
        Unreachable: The processes cannot connect to each other.
        Preempted: This process has to stop.
        Killed: Another process has died, or the store is gone.
    """
    import torch
    import torch.distributed as dist

    place = group.place

    def connect() -> None:
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=keyspace(connect_store(place), run, place.restart),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )

    try:
        group.wait_in_thread(connect, stoppable=True)
    except RuntimeError as error:
        # A connection also breaks when the other process is killed. Its end is seen a moment later.
        deadline = time.monotonic() + 2 * CHECK_SECONDS
        while time.monotonic() < deadline:
            group.check()
            time.sleep(0.1)
        raise Unreachable(f"the processes of this run cannot connect to each other: {first_line(error)}") from error
    log.get_logger().info("all processes are connected", processes=place.world_size)


def _disconnect() -> None:
    """Ends the group. Called after success only: after a failure it would wait for processes that have ended."""
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):  # the work is done, so a failure here is harmless
        dist.destroy_process_group()
