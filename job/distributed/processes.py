"""Collective operations on the processes of a run: broadcast, all-gather, all-reduce, all-to-all.

Many runs have a single process. The interface is `Processes`; `Alone` implements it for one process, and
`process_group.ProcessGroup` for several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from job.distributed.ranks import Place
from job.errors import Problem, SettingsError

T = TypeVar("T")


class Processes(Protocol):
    """The processes of a run. The methods are collectives: all processes call the same ones in the same order.

    With several processes any method may raise the error with which another process ended (`JobError` and its
    subclasses), and `Preempted` if this process has to stop while it waits.
    """

    place: Place

    @property
    def leads(self) -> bool:
        """Whether this is process 0, the only one that writes to the run's store."""

    @property
    def stopping(self) -> bool:
        """Whether the processes have agreed to stop after the current step."""

    def check(self) -> None:
        """Raises the error with which another process has ended, if one has."""

    def broadcast(self, name: str, value: Callable[[], T]) -> T:
        """Process 0 calls `value`, and all processes return its result, which must be JSON-able.

        `name` is part of the result's key in the store.
        """

    def broadcast_on_machine(self, name: str, value: Callable[[], T]) -> T:
        """Like `broadcast`, on each machine separately: the machine's first process calls `value`."""

    def gather(self, name: str, value: Any) -> list[Any]:
        """All-gather: the JSON-able values of all processes, in the order of their ranks."""

    def send(self, value: Any) -> None:
        """Sends a JSON-able value to process 0, without waiting for `receive` there."""

    def receive(self) -> list[Any]:
        """The values that other processes have sent since the last call; does not wait. Not a collective."""

    def agree(self, *, repeat: bool) -> bool:
        """Whether any process has to repeat the current step. Also sets `stopping` if any has to stop."""

    def all_reduce(self, tensor: Any) -> None:
        """Replaces the tensor, in place, by its sum over all processes, and waits for that."""

    def start_all_reduce(self, tensor: Any) -> Callable[[], None]:
        """Starts `all_reduce`, and returns. On a GPU, work launched afterwards waits for the sum; the host does not.

        Returns:
            A function that waits for the sum. If another process has ended, it raises that process's error, and work
            that was launched on the current stream in the meantime may never run.
        """

    def exchange(self, number: int) -> list[int]:
        """All-gather of one number: those of all processes, by rank. Faster than `gather`, for frequent use."""

    def gather_into(self, gathered: Any, part: Any) -> Callable[[], None]:
        """Starts an all-gather: fills `gathered` with the tensors `part` of all processes, by rank, all of one length.

        Returns:
            A function that waits for it. On a GPU only work that is launched after calling that function waits for the
            tensors, so the function must be called before they are used.
        """

    def all_to_all(self, received: Any, sent: Any, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """Sends a part of `sent` to each process, and fills `received` with the parts that all processes send here.

        Args:
            received: (sum of received_sizes,), contiguous: the received parts, in the order of the ranks.
            sent: (sum of sent_sizes,), contiguous: the parts to send, in the order of the ranks.
            received_sizes: Number of elements of each received part.
            sent_sizes: Number of elements of each part to send.
        """


class Alone:
    """`Processes` for a single process."""

    place = Place()
    leads = True
    stopping = False

    def check(self) -> None:
        """Does nothing."""

    def broadcast(self, name: str, value: Callable[[], T]) -> T:  # noqa: ARG002 - as in Processes
        """Calls `value`."""
        return value()

    broadcast_on_machine = broadcast

    def gather(self, name: str, value: Any) -> list[Any]:  # noqa: ARG002 - as in Processes
        """A list of this value."""
        return [value]

    def send(self, value: Any) -> None:
        """Does nothing: process 0 never sends."""

    def receive(self) -> list[Any]:
        """An empty list."""
        return []

    def agree(self, *, repeat: bool) -> bool:
        """Returns `repeat`."""
        return repeat

    def all_reduce(self, tensor: Any) -> None:
        """Does nothing: the sum over one process is the tensor itself."""

    def start_all_reduce(self, tensor: Any) -> Callable[[], None]:
        """Calls `all_reduce`."""
        self.all_reduce(tensor)
        return lambda: None

    def exchange(self, number: int) -> list[int]:
        """A list of this number."""
        return [number]

    def gather_into(self, gathered: Any, part: Any) -> Callable[[], None]:
        """Copies `part` to `gathered`."""
        gathered.copy_(part)
        return lambda: None

    def all_to_all(self, received: Any, sent: Any, received_sizes: list[int], sent_sizes: list[int]) -> None:  # noqa: ARG002 - as in Processes
        """Copies `sent` to `received`."""
        received.copy_(sent)


ALONE: Processes = Alone()


def require_one_kind(processes: Processes, device: str) -> None:
    """Refuses a run in which only some processes have a GPU: they cannot communicate, and would wait forever.

    Args:
        processes: All processes of the run, each of which calls this.
        device: Type of this process's device, `cuda` or `cpu`.

    Raises:
        SettingsError: Some processes have a GPU, others do not.
    """
    devices = processes.gather("device", device)
    if without := [rank for rank, kind in enumerate(devices) if kind != "cuda" and "cuda" in devices]:
        numbers = ", ".join(map(str, without))
        what = f"processes without a GPU: {numbers}; the others have one; start fewer processes, or give each a GPU"
        raise SettingsError([Problem("JOB_RUN__PROCESSES", what)])
