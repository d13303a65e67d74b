"""What the launcher of a machine exchanges with those of the others: whether a process failed, and the exit code.

They use the rendezvous store; its keys are those of `common_exit_code`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from job import log
from job.common.threads import in_thread
from job.distributed.common_exit_code import SETTLE_SECONDS, End, agree_on_end, announce_end, read_first_failure
from job.distributed.ranks import Place
from job.distributed.rendezvous import keyspace, reach_keyspace
from job.errors import error_of_process, most_serious

T = TypeVar("T")

ANSWER_SECONDS = 5.0
"""How long the store may take to answer in `ended_elsewhere`, which asks again."""
CONNECT_SECONDS = 12.0
"""How long it may take to connect to the store, for requests that are not repeated. Torch looks up the names of both
ends' addresses, and by default the system waits 5 s until it asks a name server again whose answer was lost."""
_QUESTION_PAUSE_SECONDS, _RECONNECT_SECONDS = 1.0, 10.0
"""Pause between two requests to the store whether a process of another machine has failed, and between two attempts to
connect to the store for that."""
_GONE_SECONDS = 60.0
"""How long the store may be silent before machine 0 counts as lost: a network or a machine may pause for seconds."""


class OtherMachines:
    """Exchanges with the other machines, through the common store, how the processes of each have ended.

    All requests are made one after the other in a thread, because a store may be silent for seconds, in which the
    launcher must still forward signals.

    Args:
        number: Number of this machine.
        machines: Number of machines.
        place: Rank and world size of this machine's first process.
        hosted: The store, if this machine hosts it.
        run: The run's id.
    """

    def __init__(self, number: int, machines: int, place: Place, hosted: Any, run: str) -> None:
        self._number, self._machines, self._place, self._run = number, machines, place, run
        self._requests = ThreadPoolExecutor(1, "ends of the machines")
        self._question: Future[None] | None = None
        self._asked = time.monotonic()
        self._store = None if hosted is None else keyspace(hosted, run)
        self._unreachable = False
        self._answered = float("inf")
        """When the store last answered `_ask_for_failure`; infinity before the first answer, since machine 0 may not
        have begun."""
        self.lost = False
        """Whether machine 0 is lost: the last request failed, and none was answered for `_GONE_SECONDS`."""
        self.first: End | None = None
        """The first failure of the run, if this launcher has read it."""

    def ended_elsewhere(self) -> bool:
        """Whether a process of the run has failed, or the store has not answered for `_GONE_SECONDS`.

        This machine's processes then end by themselves, unless they hang or are suspended. Returns at once, according
        to the last answer of the store.
        """
        pause = _RECONNECT_SECONDS if self._store is None else _QUESTION_PAUSE_SECONDS
        idle = self._question is None or self._question.done()
        if self._question is not None and idle:
            self._question.result()  # raises unexpected errors; the expected ones are handled in the thread
        if self._machines > 1 and self.first is None and idle and time.monotonic() >= self._asked + pause:
            self._asked = time.monotonic()
            self._question = self._requests.submit(self._ask_for_failure)
        return self.first is not None or self.lost

    def _ask_for_failure(self) -> None:
        try:
            self.first = _bounded(ANSWER_SECONDS, lambda: read_first_failure(self._reach(ANSWER_SECONDS)))
            self._answered, self.lost = time.monotonic(), False
        except (OSError, RuntimeError):
            self._store = None  # connects again: a late answer would be mistaken for that to the next request
            self.lost = time.monotonic() - self._answered > _GONE_SECONDS

    def announce_end(self, local: int, code: int, why: str) -> None:
        """Announces that a process of this machine has failed; does not wait for it."""
        rank = self._place.rank + local
        self._requests.submit(self._ask, lambda store: announce_end(store, rank, code, why), None, 0.0)

    def agree_on_code(self, own_code: int, seconds: float, answer_seconds: float) -> int:
        """The exit code of all machines, after at most `seconds`; `own_code` if the store cannot be reached.

        Args:
            own_code: The exit code of this machine.
            seconds: How long the other machines may take to end.
            answer_seconds: How much longer the store may take to answer.

        Raises:
            JobError: Another machine ended with a more serious exit code, which this error has.
        """
        fallback = End(own_code)
        if self.first is not None and own_code and most_serious((own_code, self.first.code)) != own_code:
            fallback = self.first
        seconds = min(SETTLE_SECONDS, seconds)
        agreed = self._requests.submit(
            self._ask,
            lambda store: agree_on_end(
                store,
                own_code,
                machine=self._number,
                machines=self._machines,
                processes=self._place.world_size,
                seconds=seconds,
            ),
            fallback,
            seconds,
        )
        try:
            end = agreed.result(timeout=seconds + answer_seconds)
        except TimeoutError:  # this request, or one before it, still waits for a silent store
            end = fallback
        if end.code not in {0, own_code}:
            raise error_of_process(end.code, end.where, end.why)
        return end.code

    def close(self) -> None:
        """Makes the thread end after the remaining requests; does not wait for it."""
        self._requests.shutdown(wait=False)

    def _reach(self, seconds: float) -> Any:
        if self._store is None:
            self._store = reach_keyspace(self._place, self._run, seconds)
        return self._store

    def _ask(self, request: Callable[[Any], T], fallback: T, seconds: float) -> T:
        """The result of `request` for the store; `fallback` if the store cannot be reached, or could not earlier.

        The request may wait for other machines for `seconds`.
        """
        if self._unreachable:
            return fallback
        try:
            return _bounded(CONNECT_SECONDS + seconds, lambda: request(self._reach(CONNECT_SECONDS)))
        except (OSError, RuntimeError) as error:
            self._unreachable = True
            log.get_logger().debug("the other machines cannot be reached", why=repr(error))
            return fallback


def _bounded(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call of torch's store, which itself would wait without limit if the store's machine is suspended.

    Raises:
        OSError, RuntimeError: As the call raises; TimeoutError, an OSError, after `seconds`. The thread in which the
            call runs is then abandoned.
    """
    return in_thread(call, "store").result(seconds)
