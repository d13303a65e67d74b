"""How the processes of a run find each other: through a store at an address that all of them know."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from job import log
from job.distributed.process_group import ProcessGroup
from job.distributed.processes import ALONE, Processes
from job.distributed.ranks import Place
from job.errors import Problem, SettingsError, Unreachable
from job.preemption.stop_flag import Stop

_TRY_SECONDS = 2.0
_ANSWER_SECONDS = 60.0


def host_store(port: int) -> Any:
    """Hosts the store in this process, on all its interfaces; port 0 takes a free one.

    Raises:
        Unreachable: The port is taken, by an attempt before this one that is still ending, or by a stranger.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        timeout = timedelta(seconds=_ANSWER_SECONDS)
        return TCPStore("localhost", port, is_master=True, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise Unreachable(f"cannot listen for the other processes on port {port}: {_first_line(error)}") from error


def enter_store(place: Place, seconds: float = _ANSWER_SECONDS) -> Any:
    """Connects to the store where it is known to be there.

    Raises:
        RuntimeError: It is not, or does not answer within so many seconds, now or later.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = timedelta(seconds=seconds)
    return TCPStore(place.host, place.port, is_master=False, wait_for_workers=False, timeout=timeout)


def keyspace(store: Any, run: str, restart: int = 0) -> Any:
    """The part of the store that belongs to one start of one run."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(f"{run}/{restart}", store)


@contextmanager
def join(
    place: Place | None, run: str, *, stop: Stop, beat: Callable[[], None], patience: float, grace_seconds: float
) -> Iterator[Processes]:
    """Meets the other processes; within it they can talk, and what ends one of them ends all.

    Args:
        place: Which process this is; None where it is the only one.
        run: The run's id: strangers at the same address are not taken for its processes.
        stop: This process's flag.
        beat: Tells the watchdog that waiting is all that there is to do.
        patience: Seconds to wait for all to come: machines are given one by one.
        grace_seconds: How long a process has to end by itself when another one has ended.

    Raises:
        Unreachable: Not all came.
        SettingsError: Two are the same one.
    """
    if place is None or place.world_size == 1:
        yield ALONE
        return
    deadline = time.monotonic() + patience
    store = keyspace(_reach(place, deadline, stop, beat), run, place.restart)
    joined = ProcessGroup(place, store, stop, beat, grace_seconds)
    try:
        _meet(joined, store, deadline, stop, beat)
        _connect(place, store, 2 * patience)
        yield joined
        _disconnect()
    except BaseException as error:
        joined.end(error)
        raise
    finally:
        joined.leave()


def _reach(place: Place, deadline: float, stop: Stop, beat: Callable[[], None]) -> Any:
    """The store; process 0 hosts it where no launcher does."""
    if place.rank == 0 and not place.hosted:
        return host_store(place.port)
    # Waiting in torch's client would be deaf to signals.
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=_TRY_SECONDS).close()
            return enter_store(place)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline:
                where = f"{place.host}:{place.port}"
                raise Unreachable(f"process 0 of this run is not to be found at {where}: {error}") from error
        stop.check()
        beat()
        time.sleep(0.2)


def _meet(joined: ProcessGroup, store: Any, deadline: float, stop: Stop, beat: Callable[[], None]) -> None:
    """Waits until all are there."""
    place = joined.place
    total = store.compare_set("world_size", "", str(place.world_size)).decode()
    if total != str(place.world_size):
        what = f"adds up to {place.world_size} here and to {total} on another machine; give all the same number"
        raise SettingsError([Problem("run.processes", what)])
    if store.add(f"here#{place.rank}", 1) > 1:
        what = f"another process is number {place.rank} too; give each machine its own, or wait for the old one to end"
        raise SettingsError([Problem("run.node_rank", what)])
    here = [f"here#{rank}" for rank in range(place.world_size)]
    while not store.check(here):
        if time.monotonic() > deadline:
            missing = [rank for rank, key in enumerate(here) if not store.check([key])]
            raise Unreachable(f"of {place.world_size} processes these did not come: {', '.join(map(str, missing))}")
        joined.check()
        stop.check()
        beat()
        time.sleep(0.05)


def _connect(place: Place, store: Any, timeout_seconds: float) -> None:
    """Makes the group that sums go through: gloo for flags, and for gradients where they are on a CPU; NCCL on GPUs."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    store.set_timeout(timedelta(seconds=_ANSWER_SECONDS))  # it was given the group's
    log.get_logger().info("processes have met", processes=place.world_size)


def _disconnect() -> None:
    """Not where one has failed: it would wait for those that are gone, and the process ends anyway."""
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):  # the work is done, whatever comes of it
        dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
