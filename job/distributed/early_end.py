"""A machine or process that ends before it has connected, such as for invalid settings, announces that it has ended.

Otherwise the others would wait for it for JOB_TRAIN__STALL_SECONDS. If this job launches the processes, the launcher of
a machine reads the settings first and announces for all of its processes; under torchrun each process announces for
itself. Only errors that a retry cannot fix are announced: after any other error the platform starts the machine again,
and the others continue with it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from functools import partial
from typing import Any

from job import log
from job.common.threads import in_thread
from job.distributed.common_exit_code import announce_end, ended_key, gone_key, read_key
from job.distributed.launcher import Machine, split_address
from job.distributed.ranks import Place
from job.distributed.rendezvous import announce_foreign_process, host_store, keyspace, reach_store
from job.errors import JobError, Unreachable

_ANNOUNCE_SECONDS = 30.0
"""How long this process tries to announce its end: machines started together are not ready at the same time."""
_ANSWER_SECONDS = 5.0
_PAUSE_SECONDS = 0.1
_LAST_SECONDS = 1.0
"""How long it still tries after a signal."""


@contextmanager
def announcing_early_end(
    find: Callable[[], tuple[Machine | Place, str | None] | None], received: Sequence[int] = ()
) -> Iterator[None]:
    """Context manager in which an error that a retry cannot fix is announced to the others, and then raised.

    Args:
        find: Called after such an error. Returns this machine, or this process if another launcher started it, with
            the run's id (None if it is not known). Returns None for a run of one machine or process, and if the address
            of the first one is not known.
        received: The list of `recorded_signals`: once it has a signal, this process does not wait for other machines.
    """
    try:
        yield
    except JobError as error:
        if error.retry == "no" and (member_and_run := find()) is not None:
            kind, kinds = (
                ("machine", "machines") if isinstance(member_and_run[0], Machine) else ("process", "processes")
            )
            what = f"this {kind} cannot take part in the run; the other {kinds} are informed"
            log.get_logger().warning(what, at_most_seconds=_ANNOUNCE_SECONDS)
            reporting = in_thread(
                partial(_report_end, *member_and_run, error.exit_code, str(error), received), "early end"
            )
            # A request to a store that does not answer blocks, without limit if the store's machine is suspended. So
            # the thread is abandoned at the limit, or when a signal arrives.
            limit = time.monotonic() + _ANNOUNCE_SECONDS + 2 * _ANSWER_SECONDS
            while not reporting.done() and not received and time.monotonic() < limit:
                wait([reporting], timeout=_PAUSE_SECONDS)
            # Whether that succeeded or not, the error below is what this process ends with.
            with contextlib.suppress(OSError, RuntimeError, Unreachable):
                reporting.result(timeout=_LAST_SECONDS)
        raise


def _report_end(member: Machine | Place, run: str | None, code: int, why: str, signals: Sequence[int]) -> None:
    """Announces the end of this machine or process. If it hosts the store, it waits until the others have read it.

    Raises:
        OSError, RuntimeError, Unreachable: The store cannot be reached, or hosted.
    """
    deadline = time.monotonic() + _ANNOUNCE_SECONDS

    def is_over() -> bool:
        return bool(signals) or time.monotonic() > deadline

    if isinstance(member, Machine):
        host, port = split_address(member.rendezvous)
        place, hosts, name = Place(host=host, port=port), member.node_rank == 0, f"machine {member.node_rank}"
        rank, ended = member.node_rank * member.processes, {ended_key(member.node_rank): str(code)}
        own_end, others = read_key(member.node_rank), [read_key(number) for number in range(1, member.nodes)]
    else:
        place, hosts, name = member, member.rank == 0 and not member.hosted, f"process {member.rank}"
        rank, ended = member.rank, {}
        own_end, others = gone_key(rank), [gone_key(number) for number in range(1, member.world_size)]
    store = host_store(place.port) if hosts else _reach(place, is_over)
    keys: Any = None if run is None else keyspace(store, run, place.restart)
    if keys is None:
        announce_foreign_process(store, f"{name} has ended: {why}")
    else:
        announce_end(keys, rank, code, why)
        for key, value in {**ended, own_end: ""}.items():
            keys.set(key, value)
    if hosts:
        while not is_over() and (keys is None or not keys.check(others)):
            time.sleep(_PAUSE_SECONDS)


def _reach(place: Place, is_over: Callable[[], bool]) -> Any:
    while True:
        try:
            return reach_store(place, _ANSWER_SECONDS)
        except (OSError, RuntimeError):
            if is_over():
                raise
            time.sleep(_PAUSE_SECONDS)
