"""Detects by process id that another process on the same kernel has died, if no launcher reports it.

A killed process announces no reason, and without a launcher no other process does. An all-reduce fails when its
connection breaks, but a process that waits for a value in the store would wait until the watchdog ends it.
"""

from __future__ import annotations

import os
import select
from collections.abc import Mapping

from job.common.process_identity import ProcessIdentity, has_ended, is_visible, this_process


class Peers:
    """The other processes that this one can watch: those in its own PID namespace, whose process ids are valid here.

    Args:
        identities: Rank -> `this_process()` of the process.
    """

    def __init__(self, identities: Mapping[int, ProcessIdentity]) -> None:
        self._descriptors: dict[int, int | None] = {}
        own = this_process()
        for rank, other in identities.items():
            if other == own or not is_visible(other):
                continue
            try:
                # not the id itself, which the kernel may give to another process later
                self._descriptors[rank] = os.pidfd_open(other.pid)
            except ProcessLookupError:
                self._descriptors[rank] = None
            except OSError:  # a sandbox without this system call
                continue
            if has_ended(other):  # the descriptor may be of a later process with its id
                self.forget(rank)
                self._descriptors[rank] = None

    def dead(self) -> list[int]:
        """Ranks of the processes that have ended, for any reason."""
        return [rank for rank, descriptor in self._descriptors.items() if descriptor is None or _readable(descriptor)]

    def forget(self, rank: int) -> None:
        """Stops watching a process."""
        descriptor = self._descriptors.pop(rank)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        """Stops watching all processes."""
        for rank in list(self._descriptors):
            self.forget(rank)


def _readable(descriptor: int) -> bool:
    polled = select.poll()  # not select.select, which refuses descriptors from 1024 on
    polled.register(descriptor, select.POLLIN)
    return bool(polled.poll(0))
