"""Collective operations on the processes of a run: exchange values, sum tensors, agree. Often there is only one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from job.distributed.ranks import Place
from job.errors import Problem, SettingsError

T = TypeVar("T")


class Processes(Protocol):
    """The processes of a run. All of them call the same methods in the same order, like collectives.

    With several processes any method may raise what another process ended with (`JobError` and its subclasses), and
    `Preempted` when this one has to stop while it waits.
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

    def share(self, what: str, value: Callable[[], T]) -> T:
        """What `value` returns in process 0, JSON-able; the others wait for it. `what` names it in the store's keys."""

    def share_on_machine(self, what: str, value: Callable[[], T]) -> T:
        """The same for each machine, where the machine's first process calls `value`."""

    def gather(self, what: str, value: Any) -> list[Any]:
        """The JSON-able values of all processes, in the order of their ranks."""

    def send(self, value: Any) -> None:
        """Sends a JSON-able value to process 0, without waiting for `receive` there."""

    def receive(self) -> list[Any]:
        """The values that other processes have sent since the last call, without waiting."""

    def agree(self, *, repeat: bool) -> bool:
        """Whether any process has to repeat the current step. Also sets `stopping` if any has to stop."""

    def add_up(self, tensor: Any) -> None:
        """Replaces the tensor, in place, by its sum over all processes, which wait for each other here."""

    def start_add_up(self, tensor: Any) -> Callable[[], None]:
        """Starts `add_up`; on a GPU, what is launched afterwards waits for the sum, and the host does not.

        Returns:
            Waits until the sum is there. If another process has ended it raises that process's error, and what was
            launched on the current stream in the meantime may never run.
        """

    def exchange(self, number: int) -> list[int]:
        """The numbers of all processes, in the order of their ranks; fast, for what is done thousands of times."""

    def gather_into(self, whole: Any, own: Any) -> Callable[[], None]:
        """Starts to fill `whole` with the tensors `own` of all processes, of one length, one behind the other.

        Returns:
            Waits until they are there: on a GPU what is launched afterwards waits.
        """

    def all_to_all(self, received: Any, sent: Any, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """Sends each process its part of a tensor, and fills another one with the parts that all processes send here.

        Args:
            received: Contiguous, of one dimension: the parts that come, in the order of the ranks.
            sent: The same of the parts that go.
            received_sizes: Numbers in each part that comes.
            sent_sizes: Numbers in each part that goes.
        """


class Alone:
    """`Processes` for a single process."""

    place = Place()
    leads = True
    stopping = False

    def check(self) -> None:
        """Does nothing."""

    def share(self, what: str, value: Callable[[], T]) -> T:  # noqa: ARG002 - as in Processes
        """Calls `value`."""
        return value()

    share_on_machine = share

    def gather(self, what: str, value: Any) -> list[Any]:  # noqa: ARG002 - as in Processes
        """The one value."""
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
        """Leaves the tensor as it is."""

    def start_add_up(self, tensor: Any) -> Callable[[], None]:
        """Calls `add_up`."""
        self.add_up(tensor)
        return lambda: None

    def exchange(self, number: int) -> list[int]:
        """The one number."""
        return [number]

    def gather_into(self, whole: Any, own: Any) -> Callable[[], None]:
        """Copies it."""
        whole.copy_(own)
        return lambda: None

    def all_to_all(self, received: Any, sent: Any, received_sizes: list[int], sent_sizes: list[int]) -> None:  # noqa: ARG002 - as in Processes
        """Copies it."""
        received.copy_(sent)


ALONE: Processes = Alone()


def require_one_kind(processes: Processes, device: str) -> None:
    """Refuses a run in which only some processes have a GPU: they cannot communicate, and would wait forever.

    Args:
        processes: All processes of the run, each of which calls this.
        device: The type of this process's, `cuda` or `cpu`.

    Raises:
        SettingsError: Some have none.
    """
    devices = processes.gather("device", device)
    if without := [rank for rank, kind in enumerate(devices) if kind != "cuda" and "cuda" in devices]:
        numbers = ", ".join(map(str, without))
        what = f"the processes {numbers} see no GPU, the others do; start fewer processes, or give each a GPU"
        raise SettingsError([Problem("JOB_RUN__PROCESSES", what)])
