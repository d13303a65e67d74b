"""A machine that ends before it has connected, such as for invalid settings, reports it in the rendezvous store.

Otherwise the other machines would wait for it for JOB_TRAIN__STALL_SECONDS. Only ends that no retry helps are
published: after any other one the platform starts the machine again, and those that wait go on with it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from job import log
from job.distributed.ends import ended_key, publish_end, read_key
from job.distributed.launcher import Machine, split_address
from job.distributed.ranks import Place
from job.distributed.rendezvous import host_store, keyspace, publish_stranger, reach_store
from job.errors import JobError, Unreachable

_TELL_SECONDS = 30.0
"""How long the end is offered: machines that are started together are not ready at the same moment."""
_ANSWER_SECONDS = 5.0
_PAUSE_SECONDS = 0.1


@contextmanager
def reporting_early_end(
    machine: Callable[[], tuple[Machine, str | None] | None], signals: Sequence[int] = ()
) -> Iterator[None]:
    """Within it, an error that no retry helps is published to the other machines before it is raised further.

    Args:
        machine: Called after such an error: this machine and the run's id, None where that is not known; None in place
            of both for a run of one machine, or if it is not known where machine 0 listens.
        signals: The list of `recorded_signals`: once a signal is in it, the other machines are not waited for.
    """
    try:
        yield
    except JobError as error:
        if error.retry == "no" and (machine_and_run := machine()) is not None:
            log.get_logger().warning(
                "this machine cannot take part in the run; the other machines are notified",
                at_most_seconds=_TELL_SECONDS,
            )
            with contextlib.suppress(OSError, RuntimeError, Unreachable):  # it ends with its own error all the same
                _report_end(*machine_and_run, error.exit_code, str(error), signals)
        raise


def _report_end(machine: Machine, run: str | None, code: int, why: str, signals: Sequence[int]) -> None:
    """Publishes the end of this machine; machine 0 hosts the store until the others have read it.

    Raises:
        OSError, RuntimeError, Unreachable: The store cannot be reached, or hosted.
    """
    deadline = time.monotonic() + _TELL_SECONDS

    def over() -> bool:
        return bool(signals) or time.monotonic() > deadline

    host, port = split_address(machine.rendezvous)
    store = host_store(port) if machine.node_rank == 0 else _reach(Place(host=host, port=port), over)
    keys: Any = None if run is None else keyspace(store, run)
    if keys is None:
        publish_stranger(store, f"machine {machine.node_rank} has ended: {why}")
    else:
        keys.set(ended_key(machine.node_rank), str(code))
        keys.set(read_key(machine.node_rank), "")
        publish_end(keys, machine.node_rank * machine.processes, code, why)
    if machine.node_rank == 0:
        others = [read_key(number) for number in range(1, machine.nodes)]
        while not over() and (keys is None or not keys.check(others)):
            time.sleep(_PAUSE_SECONDS)


def _reach(place: Place, over: Callable[[], bool]) -> Any:
    while True:
        try:
            return reach_store(place, _ANSWER_SECONDS)
        except (OSError, RuntimeError):
            if over():
                raise
            time.sleep(_PAUSE_SECONDS)
