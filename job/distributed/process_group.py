"""One of several processes: what they tell each other is JSON in a common store, what they add up goes by all-reduce.

The store is torch's TCPStore, which the launcher hosts. Nothing is pickled. Nobody waits for another one blindly:
whoever ends says so in the store, or its launcher does, and whoever waits looks there and ends the same way.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from job.distributed.ranks import Place
from job.errors import JobError, Preempted, elsewhere
from job.preemption.stop_flag import Stop

T = TypeVar("T")

END = "end"
"""Key of what the first process that failed says: who it is, its exit code, and why."""
LOOK_SECONDS = 1.0
LAST_WORDS_SECONDS = 5.0
"""How long to look for the reason when a process is gone."""
_LONG = 1e9
_PART_BYTES = 4 << 20
"""torch's store closes the connection on values of more than 8 MiB."""
_PAUSE_SECONDS = 0.0005
_LONGEST_SUM, _LONGEST_TALK = 0.005, 0.03
"""Between two looks whether there is what is waited for: a sum, which a step waits for, or an answer."""


def tell_end(store: Any, process: int, exit_code: int, why: str) -> None:
    """Says in the store that a process has ended, unless another one was faster."""
    store.compare_set(END, "", json.dumps({"process": process, "code": exit_code, "why": why[:2000]}))


class ProcessGroup:
    """One of several processes. See `Processes`.

    Args:
        place: Which one.
        store: The common TCPStore; keys are this run's and this start's own.
        stop: This process's flag; `agree` raises it when another process's is up.
        beat: Tells the watchdog that waiting is all that there is to do. Process 0 does not: when everybody waits for
            everybody, one of them has to notice.
        grace_seconds: How long a process has to end by itself when another one has ended.
    """

    def __init__(self, place: Place, store: Any, stop: Stop, beat: Callable[[], None], grace_seconds: float) -> None:
        self.place, self.leads, self.stopping = place, place.rank == 0, False
        self._store, self._stop, self._beat, self._grace = store, stop, beat, grace_seconds
        self._calls = 0
        self._looked = time.monotonic()
        self._sent = [0] * place.world_size
        """How much each has sent: here by this process at its own rank, in process 0 what was received from each."""

    def check(self) -> None:
        """See `Processes`. Looks once a second at most."""
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            with self._reaching():
                ended = self._store.check([END])
            if ended:
                raise self._ended()

    def share(self, what: str, value: Callable[[], T]) -> T:
        """See `Processes`."""
        return self._share(self._key(what), value, leads=self.leads)

    def share_on_machine(self, what: str, value: Callable[[], T]) -> T:
        """See `Processes`."""
        key = f"{self._key(what)}@{self.place.first_of_machine}"
        return self._share(key, value, leads=self.place.local_rank == 0)

    def gather(self, what: str, value: Any) -> list[Any]:
        """See `Processes`."""
        key = self._key(what)
        self._set(f"{key}#{self.place.rank}", value)
        return [self._wait_for(f"{key}#{rank}") for rank in range(self.place.world_size)]

    def send(self, value: Any) -> None:
        """See `Processes`."""
        rank = self.place.rank
        self._set(f"sent#{rank}.{self._sent[rank]}", value)
        self._sent[rank] += 1

    def receive(self) -> list[Any]:
        """See `Processes`."""
        found = []
        for rank in range(1, self.place.world_size):
            with self._reaching():
                while self._store.check([key := f"sent#{rank}.{self._sent[rank]}"]):
                    found.append(self._get(key))
                    self._sent[rank] += 1
        return found

    def agree(self, *, repeat: bool) -> bool:
        """See `Processes`."""
        import torch
        from torch.distributed import ReduceOp

        left = min(self._stop.remaining(), _LONG)
        flags = torch.tensor([repeat, self._stop(), -left], dtype=torch.float64)
        self._reduce(flags, ReduceOp.MAX)
        repeat, stop, less = bool(flags[0]), bool(flags[1]), -float(flags[2])
        if stop:
            self.stopping = True
            self._stop.request("another process, which was told to stop", less)
        return repeat

    def add_up(self, tensor: Any) -> None:
        """See `Processes`."""
        from torch.distributed import ReduceOp

        self._reduce(tensor, ReduceOp.SUM)

    def end(self, error: BaseException) -> None:
        """Tells the others what this process ends with, unless one was faster."""
        code = error.exit_code if isinstance(error, JobError) else JobError.exit_code
        with contextlib.suppress(RuntimeError):
            tell_end(self._store, self.place.rank, code, str(error) or type(error).__name__)

    def leave(self) -> None:
        """Lets process 0 finish first: some launchers kill the others as soon as one is gone, and it has most to do.

        Then it waits for the others, because the store may go with it, or with its launcher.
        """
        gone = [f"gone#{rank}" for rank in range(self.place.world_size)]
        with contextlib.suppress(RuntimeError):
            self._store.set(gone[self.place.rank], "")
            if self.leads:
                self._patiently(lambda: self._store.check(gone), LAST_WORDS_SECONDS)
            else:
                self._patiently(lambda: self._store.check(gone[:1]) or self._end_of(0), self._grace)

    def _share(self, key: str, value: Callable[[], T], *, leads: bool) -> T:
        if leads:
            found = value()
            self._set(key, found)
            return found
        shared: T = self._wait_for(key)
        return shared

    def _key(self, what: str) -> str:
        self._calls += 1
        return f"{self._calls} {what}"

    def _set(self, key: str, value: Any) -> None:
        text = json.dumps(value)  # in ASCII
        first, *others = [text[start : start + _PART_BYTES] for start in range(0, len(text), _PART_BYTES)]
        with self._reaching():
            for number, part in enumerate(others, start=1):
                self._store.set(f"{key}/{number}", part)
            self._store.set(key, f"{len(others)} {first}")

    def _get(self, key: str) -> Any:
        others, _, first = self._store.get(key).decode().partition(" ")
        parts = [self._store.get(f"{key}/{number}").decode() for number in range(1, int(others) + 1)]
        return json.loads("".join([first, *parts]))

    def _wait_for(self, key: str) -> Any:
        with self._reaching():
            self._until(lambda: self._store.check([key]), _LONGEST_TALK, stoppable=True)
            return self._get(key)

    def _reduce(self, tensor: Any, operation: Any) -> None:
        import torch
        import torch.distributed as dist

        try:
            work = dist.all_reduce(tensor, operation, async_op=True)
            # A stop has to wait for the others, which want to hear of it here.
            self._until(work.is_completed, _LONGEST_SUM, stoppable=False)
            work.wait()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._lost(error) from error

    def _until(self, ready: Callable[[], bool], longest: float, *, stoppable: bool) -> None:
        pause = _PAUSE_SECONDS
        while not ready():
            self.check()
            if stoppable:
                self._stop.check()
            if not self.leads:
                self._beat()
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _patiently(self, ready: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not (found := ready()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, why: RuntimeError) -> JobError:
        """The error to end with when the others cannot be reached."""
        with contextlib.suppress(RuntimeError):
            if self._patiently(lambda: self._store.check([END]), LAST_WORDS_SECONDS):
                return self._ended()
        self._stop.request("the loss of another process", self._grace)
        first = (str(why).splitlines() or [""])[0]
        return Preempted(f"another process of this run is gone, start the run again to go on: {first[:200]}")

    def _ended(self) -> JobError:
        """The error to end with when another process has."""
        end = json.loads(self._store.get(END))
        self._stop.request(f"the end of process {end['process']}", self._grace)
        return elsewhere(end["code"], f"process {end['process']}", end["why"])

    def _end_of(self, rank: int) -> bool:
        return bool(self._store.check([END])) and json.loads(self._store.get(END))["process"] == rank
