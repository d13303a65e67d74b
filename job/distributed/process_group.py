"""How several processes exchange values and sum tensors: JSON in a common TCPStore, and all-reduce.

The launcher hosts the store. Nothing is pickled. No process waits for a failed one: a process that fails, or its
launcher, writes the reason to the store, and every waiting process reads it there and ends with the same exit code.
Without a launcher, the death of a process is detected by the processes in its PID namespace (`peers`). A process 0 that
is stopped, and so cannot fail, is detected by all others (`heartbeat`).
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from threading import Thread
from typing import Any, TypeVar

from job.common.formatting import first_line
from job.common.out_of_memory import ran_out, says_full
from job.common.process_identity import ProcessIdentity, this_process
from job.distributed.common_exit_code import END, announce_end, failure_key, gone_key
from job.distributed.heartbeat import Heartbeat, HeartbeatMonitor
from job.distributed.peers import Peers
from job.distributed.ranks import Place
from job.errors import JobError, Killed, Preempted, Stalled, error_of_process
from job.preemption.stop_flag import StopFlag

T = TypeVar("T")

CHECK_SECONDS = 1.0
"""Shortest time between two reads of the store in `check`."""
REASON_SECONDS = 5.0
"""How long to wait for the reason in the store after the connection to a process broke."""
_FAR_FUTURE = 1e9
"""Seconds that stand for "no deadline" among the flags."""
_PART_BYTES = 4 << 20
"""torch's store closes the connection on values of more than 8 MiB."""
_PAUSE_SECONDS = 0.0005
_SHORT_PAUSE_SECONDS = 0.00005
"""The first pause in operations that wait twice for every layer of a model."""
_MAX_PAUSE_SUM, _MAX_PAUSE_VALUE = 0.001, 0.03
"""Longest pause between two polls: for an all-reduce, which a step waits for, and for a value in the store.

After an operation has ended, the GPU is idle for the rest of the pause."""


class ProcessGroup:
    """`Processes` for a run of several processes.

    Args:
        place: Rank and world size of this process.
        store: The common TCPStore, with a prefix for this run and this start.
        stop: This process's stop flag; `agree` sets it when that of another process is set.
        report_progress: Called while this process waits. Process 0 does not call it, so that its watchdog detects a
            deadlock, in which all wait for each other, and ends all.
        grace_seconds: Seconds in which the other processes have to end after one has ended.
        stall_seconds: Seconds after which the others end if process 0 is stopped, and its watchdog with it.
    """

    def __init__(
        self,
        place: Place,
        store: Any,
        stop: StopFlag,
        report_progress: Callable[[], None],
        *,
        grace_seconds: float,
        stall_seconds: float,
    ) -> None:
        self.place, self.leads, self.stopping = place, place.rank == 0, False
        self._store, self._stop, self._report_progress, self._grace = store, stop, report_progress, grace_seconds
        self._peers = Peers({})
        self._all_connected = self._gpus_connected = False
        self._failed = False
        """Whether this process ends because another one failed, not because it had to stop before that."""
        self._calls = 0
        self._checked = -math.inf  # the first `check` reads the store
        self._heartbeat, self._stall_seconds = Heartbeat(store), stall_seconds
        self._monitor: HeartbeatMonitor | None = None
        """Whether process 0 runs; None in process 0, and until all have arrived."""
        self._sent = [0] * place.world_size
        """Number of values by rank: those this process has sent, and in process 0 those it has received from each."""

    def check(self) -> None:
        """See `Processes`. Reads the store at most once in `CHECK_SECONDS`."""
        if time.monotonic() - self._checked >= CHECK_SECONDS:
            self._checked = time.monotonic()
            with self._store_errors():
                self._heartbeat.check()
                ended = self._store.check([END])
                if ended:
                    raise self._ended()
                self._check_peers()
                self._check_process_0()

    def start_heartbeat(self) -> None:
        """In process 0: shows the others from now on that this process runs. Called before the processes connect."""
        if self.leads:
            with self._store_errors():
                self._heartbeat.start()

    def announce(self) -> None:
        """Publishes this process's identity, for `watch_peers` of the others. Called before the processes connect."""
        own = this_process()
        self._set(f"identity#{self.place.rank}", own and asdict(own))

    def watch_peers(self) -> None:
        """Makes `check` also end this process when another one in its PID namespace has died.

        Called once all processes have arrived. In processes other than 0, `check` also ends them from now on if
        process 0 is stopped.
        """
        self._all_connected = True
        if not self.leads:
            self._monitor = HeartbeatMonitor(self.place, self._store, self._stall_seconds)
        with self._store_errors():
            keys = {rank: f"identity#{rank}" for rank in range(self.place.world_size) if rank != self.place.rank}
            found = {rank: self._get(key) for rank, key in keys.items() if self._store.check([key])}
        self._peers = Peers({rank: ProcessIdentity(**identity) for rank, identity in found.items() if identity})

    def wait_in_thread(self, call: Callable[[], object], *, stoppable: bool) -> None:
        """Makes a call that blocks until all processes make it, and checks meanwhile whether another one has ended.

        Args:
            call: Runs in a thread, which is abandoned if another process has ended, since the call may never return.
            stoppable: Whether this process may stop before the call returns.

        Raises:
            JobError: Another process has ended.
            Preempted: This process has to stop.
            RuntimeError: What the call raised.
        """
        errors: list[Exception] = []

        def run() -> None:
            try:
                call()
            except Exception as error:  # noqa: BLE001 - raised below, in the calling thread
                errors.append(error)

        thread = Thread(target=run, daemon=True)
        thread.start()
        self._wait_until(lambda: not thread.is_alive(), _MAX_PAUSE_VALUE, stoppable=stoppable)
        if errors:
            raise errors[0]

    def broadcast(self, name: str, value: Callable[[], T]) -> T:
        """See `Processes`."""
        return self._broadcast(self._key(name), value, leads=self.leads)

    def broadcast_on_machine(self, name: str, value: Callable[[], T]) -> T:
        """See `Processes`."""
        key = f"{self._key(name)}@{self.place.first_of_machine}"
        return self._broadcast(key, value, leads=self.place.local_rank == 0)

    def gather(self, name: str, value: Any) -> list[Any]:
        """See `Processes`."""
        key = self._key(name)
        self._set(f"{key}#{self.place.rank}", value)
        return [self._wait_for(f"{key}#{rank}") for rank in range(self.place.world_size)]

    def send(self, value: Any) -> None:
        """See `Processes`."""
        rank = self.place.rank
        self._set(f"sent#{rank}.{self._sent[rank]}", value)
        self._sent[rank] += 1

    def receive(self) -> list[Any]:
        """See `Processes`."""
        values = []
        for rank in range(1, self.place.world_size):
            with self._store_errors():
                while self._store.check([key := f"sent#{rank}.{self._sent[rank]}"]):
                    values.append(self._get(key))
                    self._sent[rank] += 1
        return values

    def agree(self, *, repeat: bool) -> bool:
        """See `Processes`."""
        import torch
        from torch.distributed import ReduceOp

        left = min(self._stop.remaining(), _FAR_FUTURE)
        # One MAX over three flags: any wants to repeat, any has to stop, and the earliest deadline (negated).
        flags = torch.tensor([repeat, self._stop(), -left], dtype=torch.float64)
        self._reduce(flags, ReduceOp.MAX)
        repeat, stop, seconds_left = bool(flags[0]), bool(flags[1]), -float(flags[2])
        if stop:
            self.stopping = True
            self._stop.request("another process, which had to stop", seconds_left)
        return repeat

    def all_reduce(self, tensor: Any) -> None:
        """See `Processes`."""
        from torch.distributed import ReduceOp

        self._reduce(tensor, ReduceOp.SUM, longest=_SHORT_PAUSE_SECONDS if tensor.is_cuda else _MAX_PAUSE_SUM)

    def start_all_reduce(self, tensor: Any) -> Callable[[], None]:
        """See `Processes`."""
        import torch.distributed as dist

        if not tensor.is_cuda:  # gloo's wait would block the host, which then could not notice another process's end
            self.all_reduce(tensor)
            return lambda: None
        with self._collective_errors():
            self._connect_gpus(tensor)
            work = dist.all_reduce(tensor, async_op=True)
            work.wait()  # only the current stream waits
        # Pauses are short, so that the next step is launched while the GPU still computes the optimizer's step.
        return lambda: self._finish(lambda: work, _SHORT_PAUSE_SECONDS, _SHORT_PAUSE_SECONDS)

    def exchange(self, number: int) -> list[int]:
        """See `Processes`."""
        import torch
        import torch.distributed as dist

        numbers = torch.empty(self.place.world_size, dtype=torch.int64)
        own = torch.tensor([number], dtype=torch.int64)
        self._finish(lambda: dist.all_gather_into_tensor(numbers, own, async_op=True), _SHORT_PAUSE_SECONDS)
        return [int(one) for one in numbers]

    def gather_into(self, gathered: Any, part: Any) -> Callable[[], None]:
        """See `Processes`."""
        import torch.distributed as dist

        with self._collective_errors():
            self._connect_gpus(part)
            work = dist.all_gather_into_tensor(gathered, part, async_op=True)
        # The caller waits only when it needs the weights: until then the previous layer computes.
        return lambda: self._finish(lambda: work, _SHORT_PAUSE_SECONDS)

    def all_to_all(self, received: Any, sent: Any, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """See `Processes`. Also waits for a GPU, so that the end of another process is noticed."""
        import torch
        import torch.distributed as dist

        if not sent.is_cuda:  # gloo does not take every dtype
            size = sent.element_size()
            received, sent = (x.view(torch.uint8) for x in (received, sent))
            received_sizes, sent_sizes = ([size * n for n in sizes] for sizes in (received_sizes, sent_sizes))
        with self._collective_errors():
            self._connect_gpus(sent)
        self._finish(
            lambda: dist.all_to_all_single(received, sent, received_sizes, sent_sizes, async_op=True),
            _SHORT_PAUSE_SECONDS,
        )

    def end(self, error: BaseException) -> None:
        """Announces to the other processes the error that this one fails with."""
        code = error.exit_code if isinstance(error, JobError) else JobError.exit_code
        with contextlib.suppress(RuntimeError):
            announce_end(self._store, self.place.rank, code, str(error) or type(error).__name__)

    def leave(self) -> None:
        """Called at the end of the run: the other processes wait for process 0, and then process 0 waits for them.

        They wait for process 0 because it has the most left to do, and some launchers kill all processes as soon as one
        has ended. Process 0 waits for them because the store may end with it, or with its launcher.
        """
        left_keys = [gone_key(rank) for rank in range(self.place.world_size)]
        self._peers.close()
        self._heartbeat.stop()
        with contextlib.suppress(RuntimeError):
            self._store.set(left_keys[self.place.rank], "")
            if self.leads:
                self._wait_at_most(REASON_SECONDS, lambda: self._store.check(left_keys))
            else:
                self._wait_at_most(
                    self._grace, lambda: self._store.check(left_keys[:1]) or self._store.check([failure_key(0)])
                )

    def _check_process_0(self) -> None:
        if self._monitor is not None:
            try:
                self._monitor.check()
            except Stalled:
                self._end_by("process 0, which does not run")
                raise

    def _check_peers(self) -> None:
        for rank in self._peers.dead():
            if self._store.check([gone_key(rank)]):  # it ended regularly, or its error is in the store
                self._peers.forget(rank)
            else:
                raise self._lost(RuntimeError(f"process {rank} was killed, or it crashed"))

    def _broadcast(self, key: str, value: Callable[[], T], *, leads: bool) -> T:
        if leads:
            own = value()
            self._set(key, own)
            return own
        received: T = self._wait_for(key)
        return received

    def _key(self, name: str) -> str:
        self._calls += 1
        return f"{self._calls} {name}"

    def _set(self, key: str, value: Any) -> None:
        text = json.dumps(value)  # ASCII: a character is a byte, so the text may be cut anywhere
        first, *others = [text[start : start + _PART_BYTES] for start in range(0, len(text), _PART_BYTES)]
        with self._store_errors():
            for number, part in enumerate(others, start=1):
                self._store.set(f"{key}/{number}", part)
            self._store.set(key, f"{len(others)} {first}")

    def _get(self, key: str) -> Any:
        others, _, first = self._store.get(key).decode().partition(" ")
        parts = [self._store.get(f"{key}/{number}").decode() for number in range(1, int(others) + 1)]
        return json.loads("".join([first, *parts]))

    def _wait_for(self, key: str) -> Any:
        with self._store_errors():
            self._wait_until(lambda: self._store.check([key]), _MAX_PAUSE_VALUE, stoppable=True)
            return self._get(key)

    def _reduce(self, tensor: Any, operation: Any, longest: float = _MAX_PAUSE_SUM) -> None:
        import torch.distributed as dist

        start = lambda: dist.all_reduce(tensor, operation, async_op=True)  # noqa: E731
        with self._collective_errors():
            self._connect_gpus(tensor)
        self._finish(start, min(_PAUSE_SECONDS, longest), longest)

    def _finish(self, start: Callable[[], Any], pause: float = _PAUSE_SECONDS, longest: float = _MAX_PAUSE_SUM) -> None:
        """Waits for one of torch's collective operations, in pauses that double up to the longest."""
        with self._collective_errors():
            work = start()
            # Not stoppable: the other processes take part in this operation, and may learn of the stop from it.
            self._wait_until(work.is_completed, longest, stoppable=False, pause=pause)
            work.wait()

    def _connect_gpus(self, tensor: Any) -> None:
        """Connects the GPUs by a first small all-reduce, in a thread.

        NCCL connects in its first collective operation, and blocks the host until all processes take part. In the main
        thread, a process could not notice that another one was killed before that.
        """
        import torch
        import torch.distributed as dist

        if tensor.is_cuda and not self._gpus_connected:
            connect = lambda: dist.all_reduce(torch.zeros(1, device=tensor.device))  # noqa: E731
            # Not stoppable: as in `_finish`.
            self.wait_in_thread(connect, stoppable=False)
            self._gpus_connected = True

    @contextmanager
    def _collective_errors(self) -> Iterator[None]:
        """Context manager in which an error of torch means that another process has ended, unless memory ran out.

        NCCL allocates its buffers in its first collective operation, outside of torch's allocator. If memory runs out
        there, this process cannot repeat the operation, in which the others wait. So it announces the error at once,
        and they end.
        """
        try:
            yield
        except RuntimeError as error:
            if not says_full(error):
                raise self._lost(error) from error
            fix = "lower JOB_TRAIN__GPU_MEMORY_GB, which leaves more to NCCL, or JOB_TRAIN__MAX_LENGTH"
            full = ran_out("the processes exchanged tensors", fix, error)
            self.end(full)
            self._end_by("memory that ran out")
            raise full from error

    def _wait_until(
        self, ready: Callable[[], bool], longest: float, *, stoppable: bool, pause: float = _PAUSE_SECONDS
    ) -> None:
        while not ready():
            self.check()
            if stoppable:
                self._stop.check()
            if not self.leads:
                self._report_progress()
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _wait_at_most(self, seconds: float, ready: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + seconds
        while not (is_ready := ready()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return is_ready

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        """Context manager in which an error of torch means that another process has ended.

        Before all processes have connected, it is raised unchanged: `rendezvous.join` takes it as a loss of the store.
        """
        try:
            yield
        except RuntimeError as error:
            if not self._all_connected:
                raise
            raise self._lost(error) from error

    def _lost(self, why: RuntimeError) -> JobError:
        """The error to raise when the other processes cannot be reached: the reason in the store, if there is one."""
        with contextlib.suppress(RuntimeError):
            if self._wait_at_most(REASON_SECONDS, lambda: self._store.check([END])):
                return self._ended()
        # If this process had to stop, the other one had to stop as well. Otherwise the other one may have run out of
        # memory, which no retry fixes, so it must not count as a preemption, whose retry is free.
        error_class = Preempted if self._stop() and not self._failed else Killed
        self._end_by("the loss of another process")
        return error_class(
            f"another process of this run has ended; start the run again to resume it: {first_line(why)}"
        )

    def _ended(self) -> JobError:
        """The error to raise when another process has failed."""
        end = json.loads(self._store.get(END))
        self._end_by(f"the end of process {end['process']}")
        return error_of_process(end["code"], f"process {end['process']}", end["why"])

    def _end_by(self, reason: str) -> None:
        self._failed = self._failed or not self._stop()
        self._stop.request(reason, self._grace)
