"""The processes of one run, as a stage sees them: what they tell each other, and sums over all of them. Usually one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from job.distributed.ranks import Place

T = TypeVar("T")


class Processes(Protocol):
    """What a stage needs to know of the processes. With several of them, all call the same things in the same order."""

    place: Place

    @property
    def leads(self) -> bool:
        """Whether this is process 0, the only one that changes the run's store."""

    @property
    def stopping(self) -> bool:
        """Whether they have agreed to stop after the step in hand."""

    def check(self) -> None:
        """Ends here if another process has ended."""

    def share(self, what: str, value: Callable[[], T]) -> T:
        """What process 0 finds by calling `value`, JSON-able; the others wait for it. `what` is for people."""

    def share_on_machine(self, what: str, value: Callable[[], T]) -> T:
        """The same among the processes of each machine, where the first one calls `value`."""

    def gather(self, what: str, value: Any) -> list[Any]:
        """What each of them gives, JSON-able, in the order of the ranks."""

    def send(self, value: Any) -> None:
        """Sends something JSON-able to process 0, which gets it by `receive`."""

    def receive(self) -> list[Any]:
        """What the others have sent since the last call, without waiting."""

    def agree(self, *, repeat: bool) -> bool:
        """Whether any of them has to repeat the step in hand. Also spreads the news that one has to stop."""

    def add_up(self, tensor: Any) -> None:
        """Replaces the tensor by its sum over all of them."""


class Alone:
    """One process: nobody to talk to."""

    place = Place()
    leads = True
    stopping = False

    def check(self) -> None:
        """There is no other."""

    def share(self, what: str, value: Callable[[], T]) -> T:  # noqa: ARG002 - there is nobody to tell
        """Calls it."""
        return value()

    share_on_machine = share

    def gather(self, what: str, value: Any) -> list[Any]:  # noqa: ARG002
        """The one value."""
        return [value]

    def send(self, value: Any) -> None:
        """Nobody sends anything."""

    def receive(self) -> list[Any]:
        """Nothing."""
        return []

    def agree(self, *, repeat: bool) -> bool:
        """Its own wish."""
        return repeat

    def add_up(self, tensor: Any) -> None:
        """The sum of one is itself."""


ALONE: Processes = Alone()
