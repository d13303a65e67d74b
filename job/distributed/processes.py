"""Collective operations on the processes of a run: exchange values, sum tensors, agree. Many runs have one process."""

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
        """The JSON-able result of `value`, which only process 0 calls; the others wait. `name` is part of its key."""

    def broadcast_on_machine(self, name: str, value: Callable[[], T]) -> T:
        """Like `broadcast` on each machine: the machine's first process calls `value`."""

    def gather(self, name: str, value: Any) -> list[Any]:
        """The JSON-able values of all processes, in the order of their ranks."""

    def send(self, value: Any) -> None:
        """Sends a JSON-able value to process 0, without waiting for `receive` there."""

    def receive(self) -> list[Any]:
        """The values that other processes have sent since the last call; does not wait. Not a collective."""

    def agree(self, *, repeat: bool) -> bool:
        """Whether any process has to repeat the current step. Also sets `stopping` if any has to stop."""

    def add_up(self, tensor: Any) -> None:
        """Replaces the tensor, in place, by its sum over all processes; waits for the other processes."""

    def start_add_up(self, tensor: Any) -> Callable[[], None]:
        """Starts `add_up`. On a GPU, work that is launched afterwards waits for the sum; the host does not.

        Returns:
            A function that waits for the sum. If another process has ended, it raises that process's error, and work
            that was launched on the current stream in the meantime may never run.
        """

    def exchange(self, number: int) -> list[int]:
        """The numbers of all processes, in the order of their ranks; faster than `gather`, for frequent use."""

    def gather_into(self, gathered: Any, part: Any) -> Callable[[], None]:
        """Starts to fill `gathered` with the tensors `part` of all processes, all of one length, in the order of ranks.

        Returns:
            A function that waits for them; on a GPU, work that is launched after it waits.
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

    def add_up(self, tensor: Any) -> None:
        """Does nothing: the sum over one process is the tensor itself."""

    def start_add_up(self, tensor: Any) -> Callable[[], None]:
        """Calls `add_up`."""
        self.add_up(tensor)
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
